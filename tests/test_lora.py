"""lora.py: adapters against their formula, against dpo.py and against PEFT; its runs."""

import contextlib
import functools
import importlib
import io
import json
import math
import re
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file
from test_runs import (
    assert_same_run,
    crash_after_a_checkpoint,
    crash_while_writing,
    make_inputs,
    metrics_of,
    small_args,
)

import dpo
import lora

TARGETS = ("c_attn", "c_proj", "c_fc")
CONFIG = lora.GPT2Config(vocab_size=40, n_positions=24, n_embd=16, n_layer=2, n_head=2)
ARGS = lora.Args(lora_rank=3, lora_alpha=5, lora_targets=TARGETS, nll_coef=0.5)
ROWS = [[[1, 2, 3], [4, 5, 6, 7], [8, 9]], [[7], [3, 3], [1, 5, 2]]]
ROWS += [[[9, 8], [7], [6, 5]], [[1, 1], [2, 3, 4], [5]]]
LAYERS = [(f"h.{i}", *rest) for i in range(2) for rest in (("attn", "c_attn"), ("mlp", "c_fc"))]
LAYERS += [(f"h.{i}", part, "c_proj") for i in range(2) for part in ("attn", "mlp")]


def targeting(targets, **changes):
    return lora.Args(**({"lora_rank": 3, "lora_alpha": 5, "lora_targets": targets} | changes))


@functools.cache
def base():
    """Parameters of a random model, with biases that are not 0."""
    one = jnp.ones((1, 1), jnp.int32)
    params = jax.jit(dpo.GPT2(CONFIG).init)(jax.random.key(0), one, one)["params"]
    return noisy(params, 1, 0.2)


def noisy(tree, seed, scale):
    """The tree with normal noise added to each leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + scale * rng.normal(size=x.shape).astype("float32"), tree)


def moved(args=ARGS, seed=2):
    """An adapter as after training: B is not 0."""
    return noisy(lora.init_adapter(base(), args), seed, 0.2)


def merged_by_hand(params, adapter, scale):
    """W + scale * A B, in float64."""
    flat, beside = flatten_dict(params), flatten_dict(adapter)
    for layer in {path[:-2] for path in beside}:
        A, B = (np.asarray(beside[*layer, x, "kernel"], np.float64) for x in ("lora_A", "lora_B"))
        product = (A @ B.reshape(len(B), -1)).reshape(flat[*layer, "kernel"].shape)
        flat[*layer, "kernel"] = flat[*layer, "kernel"] + scale * product
    return unflatten_dict(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), flat))


def logits_of(params, script=lora, config=CONFIG):
    tokens, mask = np.arange(30).reshape(3, 10), np.ones((3, 10), np.int32)
    return jax.jit(script.GPT2(config).apply)({"params": params}, tokens, mask)


def batch_of(rows=ROWS):
    batch = lora.make_batch(rows, 20)
    zeros = np.linspace(-9, -5, 2 * len(rows), dtype=np.float32).reshape(-1, 2)
    return batch | {"ref_logprobs": zeros}


# ---------------------------------------------------------------------------------------- adapters


def test_an_adapter_has_the_shapes_of_its_layers():
    """A [in, r] and B [r, *out], with PEFT's start: A uniform in +- 1 / sqrt(in), B zero."""
    adapter = flatten_dict(lora.init_adapter(base(), ARGS))
    kernels = flatten_dict(base())
    assert {path[:-2] for path in adapter} == set(LAYERS)
    for layer in LAYERS:
        fan_in, *out = kernels[*layer, "kernel"].shape
        A, B = (adapter[*layer, x, "kernel"] for x in ("lora_A", "lora_B"))
        assert A.shape == (fan_in, 3) and B.shape == (3, *out) and not B.any()
    wide = lora.init_adapter({"c_fc": {"kernel": jnp.zeros((4000, 5))}}, targeting(("c_fc",)))
    A = np.asarray(wide["c_fc"]["lora_A"]["kernel"]) * math.sqrt(4000)
    assert 0.99 < np.abs(A).max() <= 1 and A.var() == pytest.approx(1 / 3, rel=0.05)
    assert abs(A.mean()) < 0.03
    only = flatten_dict(lora.init_adapter(base(), targeting(("c_attn",))))
    assert {path[-3] for path in only} == {"c_attn"}
    same, other = (lora.init_adapter(base(), lora.Args(seed=seed)) for seed in (0, 1))
    first = [x["h.0"]["attn"]["c_attn"]["lora_A"]["kernel"] for x in (same, other)]
    second = same["h.1"]["attn"]["c_attn"]["lora_A"]["kernel"]
    assert (first[0] != first[1]).any() and (first[0] != second).any()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [("c_attn",), ("c_proj", "c_fc"), TARGETS], ids="-".join)
def test_the_adapter_adds_its_product(targets, rslora):
    """x W + scale * x A B is what dpo.py's model computes with W + scale * A B."""
    args = targeting(targets, rslora=rslora)
    adapter, scale = moved(args), 5 / math.sqrt(3) if rslora else 5 / 3
    by_hand = merged_by_hand(base(), adapter, scale)
    expected = logits_of(by_hand, dpo)
    assert np.abs(expected - logits_of(base())).max() > 0.5
    found = logits_of(lora.attach(base(), adapter, args))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    merged = lora.merge(base(), adapter, args)
    np.testing.assert_allclose(found, logits_of(merged), rtol=0, atol=1e-5)
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(same, merged, by_hand)
    again = lora.attach(lora.attach(base(), moved(args, 3), args), adapter, args)
    assert (logits_of(again) == found).all()  # the later adapter counts


@pytest.mark.parametrize("remat", [False, True])
def test_the_adapter_works_in_half_precision_and_with_remat(remat):
    adapter = moved()
    for dtype, near in (("float32", 1e-5), ("bfloat16", 0.06)):
        config = lora.GPT2Config(**(vars(CONFIG) | {"dtype": dtype, "remat": remat}))
        found = logits_of(lora.attach(base(), adapter, ARGS), config=config)
        expected = logits_of(merged_by_hand(base(), adapter, 5 / 3), dpo)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=near)


def test_the_policy_begins_as_the_reference():
    """Bit by bit the same numbers from one program; and those of dpo.py's model."""
    adapter = lora.init_adapter(base(), ARGS)
    policy = lora.attach(base(), adapter, ARGS)
    off = lora.attach(base(), jax.tree.map(jnp.zeros_like, adapter), ARGS)
    batch = batch_of()
    found = lora.pair_logprobs(policy, batch, CONFIG)
    assert (found == lora.pair_logprobs(off, batch, CONFIG)).all()
    expected = dpo.pair_logprobs(base(), batch, CONFIG)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    tokens = np.arange(20).reshape(2, 10)
    one_by_one = (  # operation by operation, which XLA cannot fuse differently
        script.GPT2(CONFIG).apply({"params": params}, tokens, np.ones_like(tokens))
        for script, params in ((dpo, base()), (lora, policy))
    )
    np.testing.assert_array_equal(*one_by_one)


# ---------------------------------------------------------------------------------------- training


def test_the_gradient_is_that_of_dpo_by_the_chain_rule():
    """dA = scale * dW B^T and dB = scale * A^T dW; dW is the gradient at the merged weights."""
    adapter, batch, scale = moved(), batch_of(), 5 / 3

    def loss_of(params):
        logprobs = lora.pair_logprobs(params, batch, CONFIG)
        return lora.pair_loss(logprobs, batch["ref_logprobs"], batch["response_mask"].sum(2), ARGS)

    full, _ = jax.grad(loss_of, has_aux=True)(lora.merge(base(), adapter, ARGS))
    small, _ = jax.grad(lambda x: loss_of(lora.attach(base(), x, ARGS)), has_aux=True)(adapter)
    small, values, full = (flatten_dict(x) for x in (small, adapter, full))
    for layer in LAYERS:
        paths = [(*layer, x, "kernel") for x in ("lora_A", "lora_B")]
        A, B = (values[path].reshape(len(values[path]), -1) for path in paths)
        dA, dB = (small[path].reshape(len(small[path]), -1) for path in paths)
        dW = full[*layer, "kernel"].reshape(len(A), -1)
        assert np.abs(dA).max() > 1e-3 and np.abs(dB).max() > 1e-3
        np.testing.assert_allclose(dA, scale * dW @ B.T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dB, scale * A.T @ dW, rtol=1e-4, atol=1e-5)


def test_only_a_and_b_are_trained():
    """They alone have moments, and a step moves them alone; with B = 0, A has no gradient yet."""
    args = targeting(TARGETS, batch_size=4, micro_batch_size=2, warmup_steps=1, learning_rate=1e-2)
    adapter = lora.init_adapter(base(), args)
    optimizer, _ = lora.make_optimizer(args, 10)
    state = lora.make_state(adapter, optimizer)
    paths = set(flatten_dict(adapter))
    tensors = jax.tree.leaves_with_path(state)
    names = [[x.key for x in path if hasattr(x, "key")] for path, x in tensors if x.ndim]
    assert len(names) == 3 * len(paths) and {tuple(x) for x in names} == paths  # and mu, and nu
    before = jax.tree.map(np.array, base())
    new, _ = lora.train_step(state, batch_of(), base(), CONFIG, optimizer, args)
    jax.tree.map(np.testing.assert_array_equal, base(), before)
    for path, x in flatten_dict(new.params).items():
        assert (x != flatten_dict(adapter)[path]).any() == (path[-2] == "lora_B")
    newer, _ = lora.train_step(new, batch_of(), base(), CONFIG, optimizer, args)
    for path, x in flatten_dict(newer.params).items():
        assert (x != flatten_dict(adapter)[path]).any()


def products(jaxpr):
    """Sizes of the results of all products in it, inner programs included."""
    sizes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            sizes.append(equation.outvars[0].aval.size)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    sizes += products(inner)
    return sizes


def test_no_gradient_of_the_base_is_computed():
    """No product in the step has the size of a kernel or of the table of tokens; dpo.py's has."""
    config = lora.GPT2Config(vocab_size=41, n_positions=24, n_embd=22, n_layer=1, n_head=2)
    one = jnp.ones((1, 1), jnp.int32)
    params = jax.eval_shape(dpo.GPT2(config).init, jax.random.key(0), one, one)["params"]
    weights = {x.size for path, x in flatten_dict(params).items() if path[-1] == "kernel"}
    weights.add(41 * 22)
    sizes = {}
    for script in (dpo, lora):
        args = script.Args(batch_size=4, micro_batch_size=2)
        trained = params
        if script is lora:
            trained = jax.eval_shape(functools.partial(lora.init_adapter, args=ARGS), params)
        optimizer, _ = script.make_optimizer(args, 10)
        state = script.TrainState(trained, jax.eval_shape(optimizer.init, trained))
        more = () if script is dpo else (params,)
        static = {"config": config, "optimizer": optimizer, "args": args}
        step = functools.partial(script.train_step, **static)
        sizes[script] = set(products(jax.make_jaxpr(step)(state, batch_of(), *more).jaxpr))
    assert weights <= sizes[dpo]
    assert not weights & sizes[lora]


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def args_of(inputs, run_dir="run", **changes):
    """Args of a run of 6 steps that takes a second or two."""
    return lora.Args(**(vars(small_args(dpo, inputs, run_dir)) | {"resume": True} | changes))


def train(inputs, folder, **changes):
    """The folder of a run, which is folder/run: its Args, and what is compiled, are the same."""
    folder.mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        lora.main(args_of(inputs, **changes))
    return folder / "run"


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """A run that was never stopped; beside it what it printed."""
    folder, printed = tmp_path_factory.mktemp("lora"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        train(inputs, folder, learning_rate=1e-2)
    (folder / "printed").write_text(printed.getvalue(), "utf-8")
    return folder / "run"


def test_what_a_run_leaves(run, inputs):
    """A checkpoint of A and B alone; adapter/ and model/ are the same policy."""
    saved = load_file(run / "checkpoint.safetensors")
    assert all("lora_A" in name or "lora_B" in name for name, x in saved.items() if x.ndim)
    _, params = lora.load_model(inputs / "lm")
    args = args_of(inputs, learning_rate=1e-2)
    adapter = lora.load_adapter(run / "adapter", lora.init_adapter(params, args), args)
    layer = adapter["h.0"]["attn"]["c_attn"]
    for name in ("lora_A", "lora_B"):
        key = f".params['h.0']['attn']['c_attn']['{name}']['kernel']"
        np.testing.assert_array_equal(layer[name]["kernel"], saved[key])
    _, model = lora.load_model(run / "model")
    jax.tree.map(np.testing.assert_array_equal, model, lora.merge(params, adapter, args))
    changed = [
        path for path, x in flatten_dict(model).items() if (x != flatten_dict(params)[path]).any()
    ]
    assert changed == [("h.0", "attn", "c_attn", "kernel")]
    trained, all_of_them = 8 * (32 + 96), sum(x.size for x in jax.tree.leaves(params))
    words = f"adapter: {trained:,} of {all_of_them:,} parameters, {trained / all_of_them:.2%}"
    assert words in (run.parent / "printed").read_text("utf-8").splitlines()


def test_a_run_begins_at_the_reference_and_leaves_it(run):
    start, first, *_, last = metrics_of(run)
    assert start["eval/rewards/margins"] == start["eval/rewards/accuracies"] == 0
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert abs(start["eval/objective/kl"]) < 1e-4
    assert abs(last["eval/rewards/margins"]) > 1e-3


@pytest.mark.parametrize("folder", ["adapter", "model"])
def test_resumed_equals_never_stopped(folder, run, inputs, tmp_path):
    """It crashes in step 5, and again while it writes the last files."""
    name = {"adapter": "adapter_model.safetensors", "model": "model.safetensors"}[folder]
    for crash in (crash_after_a_checkpoint, crash_while_writing(name)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(BaseException) as error:
            crash(lora, patch)
            train(inputs, tmp_path, learning_rate=1e-2)
        assert type(error.value).__name__ == "Crash" and not (tmp_path / "run" / "model").exists()
    resumed = train(inputs, tmp_path, learning_rate=1e-2)
    assert_same_run(resumed, run)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (resumed / "adapter" / file).read_bytes() == (run / "adapter" / file).read_bytes()


def test_a_run_goes_on_from_an_adapter(run, inputs, tmp_path):
    """Step 0 is the other run's last evaluation; the reference is the model without any adapter."""
    onward = train(inputs, tmp_path, adapter=str(run / "adapter"))
    start, last = metrics_of(onward)[0], metrics_of(run)[-1]
    for name in ("eval/loss", "eval/rewards/margins", "eval/logps/chosen"):
        assert start[name] == pytest.approx(last[name], abs=1e-6)
    assert "adapter" in json.loads((onward / "args.json").read_text())["checksums"]


# -------------------------------------------------------------------------------------- bad input


@pytest.fixture
def refused(inputs, tmp_path, error_line, monkeypatch):
    """refused(**changes) -> the line by which lora.py refuses these arguments."""
    monkeypatch.chdir(tmp_path)

    def call(**changes):
        message = error_line(lora.main, args_of(inputs, **changes))
        assert not (tmp_path / "run" / "model").exists()
        return message

    return call


FLAGS = {
    "lora_rank": [(0, "--lora-rank must be from 1"), (-4, "--lora-rank must be from 1")],
    "lora_alpha": [(0, "--lora-alpha must be from 1")],
    "lora_targets": [
        (("q_proj",), "--lora-targets: some of c_attn, c_fc, c_proj"),
        (("c_attn", "attn"), "--lora-targets: some of c_attn, c_fc, c_proj"),
        ((), "--lora-targets: some of c_attn, c_fc, c_proj"),
    ],
    "adapter": [("nowhere", "nowhere/adapter_config.json")],
}


@pytest.mark.parametrize(
    ("flag", "value", "words"), [(k, *case) for k, cases in FLAGS.items() for case in cases]
)
def test_flags_that_are_refused(flag, value, words, refused):
    assert words in refused(**{flag: value})


def test_a_rank_above_the_matrix(refused):
    message = refused(lora_rank=33)
    assert "--lora-rank is above a side of h.0.attn.c_attn" in message


def changed_adapter(run, folder, **changes):
    """A copy of the run's adapter with other entries in adapter_config.json."""
    folder.mkdir()
    saved = json.loads((run / "adapter" / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(saved | changes), "utf-8")
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"h.0.attn.c_attn": 4}),
        ("alpha_pattern", {"h.0.attn.c_attn": 4}),
        ("init_lora_weights", "pissa"),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("alora_invocation_tokens", [1, 2]),
        ("lora_bias", True),
        ("r", 4),
        ("lora_alpha", 8),
        ("use_rslora", True),
    ],
)
def test_what_peft_has_and_this_has_not_is_refused_by_name(name, value, run, refused, tmp_path):
    folder = changed_adapter(run, tmp_path / "a", **{name: value})
    assert f"{folder}: {name} is {value!r}" in refused(adapter=str(folder))


def test_harmless_entries_are_taken(run, inputs, tmp_path):
    more = {"lora_dropout": 0.1, "peft_version": "9", "auto_mapping": {"x": 1}, "revision": "main"}
    more |= {"base_model_name_or_path": "moved", "target_modules": "all-linear", "rank_pattern": {}}
    more |= {"init_lora_weights": "gaussian", "loftq_config": {}, "layers_to_transform": None}
    folder = changed_adapter(run, tmp_path / "a", **more)
    args = args_of(inputs)
    like = lora.init_adapter(lora.load_model(inputs / "lm")[1], args)
    found = lora.load_adapter(folder, like, args)
    jax.tree.map(
        np.testing.assert_array_equal, found, lora.load_adapter(run / "adapter", like, args)
    )


def test_an_adapter_of_another_model(run, inputs, refused, tmp_path):
    """Of other weights, which a checksum tells; of other layers, shapes or parts."""
    config, params = lora.load_model(inputs / "lm")
    lora.save_model(tmp_path / "other", config, noisy(params, 0, 0.1), inputs / "lm")
    adapter = str(run / "adapter")
    words = "belongs to another model than "
    assert words in refused(model=str(tmp_path / "other"), adapter=adapter)
    assert words in refused(adapter=adapter, lora_targets=("c_attn", "c_fc"))
    folder = changed_adapter(run, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    for wrong in (
        {name: tensors[name][:-1]},
        {name.replace("h.0", "h.1"): tensors[name]},
        {name.replace("lora_B.weight", "lora_magnitude_vector"): tensors[name][0]},
    ):
        save_file(tensors | wrong, path)
        message = refused(adapter=str(folder))
        assert words in message and next(iter(wrong)) in message
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refused(adapter=str(folder))


def test_the_diff_is_small():
    """What LoRA takes, in lines that `diff dpo.py lora.py` shows."""
    files = [str(ROOT / f"{name}.py") for name in ("dpo", "lora")]
    shown = subprocess.run(["diff", *files], capture_output=True, text=True).stdout
    assert 0 < len(re.findall(r"^[<>]", shown, re.MULTILINE)) <= 130


# -------------------------------------------------------------------------------------------- PEFT


@pytest.fixture(scope="module")
def peft():
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    importlib.import_module("torch").set_num_threads(2)
    return importlib.import_module("peft")


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


def hf_model(folder):
    import transformers

    return transformers.GPT2LMHeadModel.from_pretrained(folder)


TOKENS = np.random.default_rng(0).integers(0, 500, size=(3, 20))


def our_logits(config, params):
    return lora.GPT2(config).apply({"params": params}, TOKENS, np.ones_like(TOKENS))


@pytest.mark.parity
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [("c_attn",), TARGETS], ids="-".join)
def test_peft_loads_our_adapter(peft, targets, rslora, inputs, tmp_path):
    config, params = lora.load_model(inputs / "lm")
    changes = {"lora_rank": 4, "lora_alpha": 6, "rslora": rslora, "lora_targets": targets}
    args = args_of(inputs, **changes)
    adapter = noisy(lora.init_adapter(params, args), 3, 0.2)
    lora.save_adapter(tmp_path / "adapter", adapter, args)
    model = peft.PeftModel.from_pretrained(hf_model(inputs / "lm"), tmp_path / "adapter")
    expected = our_logits(config, lora.attach(params, adapter, args))
    assert np.abs(expected - our_logits(config, params)).max() > 0.5
    np.testing.assert_allclose(torch_logits(model, TOKENS), expected, rtol=0, atol=5e-5)
    with model.disable_adapter():
        off = torch_logits(model, TOKENS)
    np.testing.assert_allclose(off, our_logits(config, params), rtol=0, atol=5e-5)
    lora.save_model(tmp_path / "m", config, lora.merge(params, adapter, args), inputs / "lm")
    merged = torch_logits(hf_model(tmp_path / "m"), TOKENS)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=5e-5)
    auto = importlib.import_module("transformers").AutoModelForCausalLM
    for kind in (peft.AutoPeftModelForCausalLM, auto):  # which find the base by the folder's config
        found = torch_logits(kind.from_pretrained(tmp_path / "adapter"), TOKENS)
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parity
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [("c_attn",), TARGETS], ids="-".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_of_peft_loads_here(peft, targets, rslora, dtype, inputs, tmp_path):
    import torch

    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": rslora, "target_modules": list(targets)}
    settings |= {"lora_dropout": 0.1, "init_lora_weights": False}  # False: B is not 0
    model = peft.get_peft_model(hf_model(inputs / "lm"), peft.LoraConfig(**settings))
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(hf_model(inputs / "lm"), tmp_path / "adapter")
    config, params = lora.load_model(inputs / "lm")
    changes = {"lora_rank": 4, "lora_alpha": 6, "rslora": rslora, "lora_targets": targets}
    args = args_of(inputs, **changes)
    adapter = lora.load_adapter(tmp_path / "adapter", lora.init_adapter(params, args), args)
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    found = our_logits(config, lora.attach(params, adapter, args))
    assert np.abs(found - our_logits(config, params)).max() > 0.1
    np.testing.assert_allclose(torch_logits(model, TOKENS), found, rtol=0, atol=5e-5)


@pytest.mark.parity
def test_dora_of_peft_is_refused(peft, inputs, tmp_path, refused):
    config = peft.LoraConfig(r=8, lora_alpha=64, target_modules=["c_attn"], use_dora=True)
    peft.get_peft_model(hf_model(inputs / "lm"), config).save_pretrained(tmp_path / "dora")
    assert "use_dora is True" in refused(adapter=str(tmp_path / "dora"))
