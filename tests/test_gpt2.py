"""The model, the sampler, the model folders and the tokenizer: gpt2.py against golden numbers."""

import dataclasses
import functools
import itertools
import json
import math
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import regex
from conftest import ROOT
from safetensors import safe_open
from safetensors.flax import load_file, save_file

import gpt2
import sft
from gpt2 import GPT2, GPT2Config, load_model, load_tokenizer
from sft import save_model

TINY = ROOT / "tests" / "goldens" / "gpt2_tiny"
REWARD_TINY = ROOT / "tests" / "goldens" / "gpt2_reward_tiny"
TOKENIZER = ROOT / "data" / "reviews" / "tokenizer"
EOS_ID, PAD_ID = (
    t["id"] for t in json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))["added_tokens"]
)
NO_EOS = -1  # an id that no token has: nothing ends


@functools.partial(jax.jit, static_argnames="config")
def forward(config, params, tokens, mask):
    return GPT2(config).apply({"params": params}, tokens, mask)


def log_softmax(logits):
    """In NumPy and float64, to hold JAX's float32 against."""
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def sample(model, prompts, mask, length, temperature, eos_id=NO_EOS, key=0, script=gpt2, **more):
    """What a script's generate gives, in NumPy: (prompt and response, mask, logprobs)."""
    (config, params), key = model, jax.random.key(key)
    sampled = script.generate(
        params, config, prompts, mask, key, length, temperature, eos_id, **more
    )
    return [np.asarray(x) for x in sampled]


@pytest.fixture(scope="module")
def tiny():
    """(config, params) of the golden model."""
    return load_model(TINY)


@pytest.fixture(scope="module")
def toy():
    """(config, params) of a model with 8 tokens whose distributions are far from uniform."""
    config = GPT2Config(
        vocab_size=8, n_positions=24, n_embd=16, n_layer=1, n_head=2, initializer_range=0.6
    )
    one = jnp.ones((1, 1), jnp.int32)
    return config, jax.jit(GPT2(config).init)(jax.random.key(3), one, one)["params"]


# ------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("case", ["full", "right", "left"])
def test_logits_equal_hugging_face(tiny, goldens, case):
    """Whatever stands in the padding."""
    golden = goldens("gpt2_forward")
    tokens, expected = golden[f"{case}_input_ids"], golden[f"{case}_logits_f32"]
    mask = golden.get(f"{case}_attention_mask", np.ones_like(tokens))
    logits, real = forward(*tiny, tokens, mask), mask > 0
    assert logits.dtype == jnp.float32
    assert np.abs(np.asarray(logits) - expected)[real].max() < 2e-5
    other = np.where(real, tokens, (tokens + 101) % 257).astype(np.int32)
    assert (other != tokens).any() == (case != "full")
    np.testing.assert_array_equal(forward(*tiny, other, mask)[real], logits[real])


def test_logits_of_a_row_that_fills_the_context(tiny, goldens):
    golden = goldens("gpt2_forward")
    tokens = golden["context_input_ids"]
    logits = forward(*tiny, tokens, np.ones_like(tokens))[:, -4:]
    np.testing.assert_allclose(logits, golden["context_last_logits_f64"], rtol=0, atol=2e-5)


def test_left_padding_is_not_counted_as_positions(goldens):
    """What GPT-2 says when padding is counted is another thing, so the test above can tell."""
    golden = goldens("gpt2_forward")
    wrong = golden["left_logits_default_positions_f64"] - golden["left_logits_f64"]
    assert np.abs(wrong)[golden["left_attention_mask"] > 0].max() > 0.1


def test_remat_gives_the_same_gradients(toy):
    tokens = np.array([[1, 2, 3, 4, 5, 6]], np.int32)
    gradients, programs = [], []
    for remat in (False, True):
        config = dataclasses.replace(toy[0], remat=remat)

        def loss(params, config=config):
            logits = GPT2(config).apply({"params": params}, tokens, np.ones_like(tokens))
            return gpt2.token_logprobs(logits[:, :-1], tokens[:, 1:]).sum()

        gradients.append(jax.jit(jax.grad(loss))(toy[1]))
        programs.append(str(jax.make_jaxpr(loss)(toy[1])))
    assert ["remat" in p or "checkpoint" in p for p in programs] == [False, True]
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradients[0])) > 0.1
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, *gradients)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.15), ("float16", 0.02)])
def test_half_precision_stays_close(tiny, goldens, dtype, tolerance):
    golden = goldens("gpt2_forward")
    tokens = golden["full_input_ids"]
    config = dataclasses.replace(tiny[0], dtype=dtype)
    logits = forward(config, tiny[1], tokens, np.ones_like(tokens))
    assert logits.dtype == jnp.float32
    error = np.abs(np.asarray(logits) - golden["full_logits_f64"]).max()
    assert 1e-4 < error < tolerance, error  # not 0: the computation is in the other type indeed


# -------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("with_eos", [False, True])
def test_greedy_equals_hugging_face(tiny, goldens, with_eos):
    """Three prompts, two of them padded on the left: tokens and log-probabilities."""
    golden = goldens("gpt2_generate")
    prompts, prompt_mask = golden["batch_input_ids"], golden["batch_attention_mask"]
    eos_id = int(golden["eos_token_id"]) if with_eos else NO_EOS
    expected = golden["batch_greedy_eos" if with_eos else "batch_greedy"]
    tokens, mask, logprobs = sample(tiny, prompts, prompt_mask, 16, 0.0, eos_id)
    ends = [row.index(eos_id) + 1 if eos_id in row else 16 for row in expected.tolist()]
    assert (min(ends) < 16) == with_eos  # at least one row has ended early there
    real = np.arange(16) < np.array(ends)[:, None]
    np.testing.assert_array_equal(tokens, np.hstack([prompts, np.where(real, expected, 0)]))
    np.testing.assert_array_equal(mask, np.hstack([prompt_mask, real]))
    # They are those at temperature 1, and exactly 0 after EOS.
    logps = np.stack([golden[f"greedy_{row}_token_logps_f64"] for row in range(3)])
    np.testing.assert_allclose(logprobs, np.where(real, logps, 0), rtol=0, atol=1e-5)
    assert not logprobs[~real].any()


@pytest.mark.parametrize("k", [0, 2])
def test_logprobs_equal_a_full_forward(tiny, goldens, k):
    """With left padding, temperature 0.7 and three samples of each prompt, side by side.

    Top-k draws among the k likeliest; log-probabilities stay those of the whole vocabulary.
    """
    golden = goldens("gpt2_generate")
    prompts, prompt_mask = golden["batch_input_ids"], golden["batch_attention_mask"]
    top = {"filter_logits": functools.partial(gpt2.keep_top, k=k, p=1.0)} if k else {}
    tokens, mask, logprobs = sample(
        tiny, prompts, prompt_mask, 16, 0.7, key=1, num_samples=3, **top
    )
    assert tokens.shape == mask.shape == (9, 25) and logprobs.shape == (9, 16)
    np.testing.assert_array_equal(tokens[:, :9], np.repeat(prompts, 3, axis=0))
    np.testing.assert_array_equal(mask[:, :9], np.repeat(prompt_mask, 3, axis=0))
    assert len({tuple(row) for row in tokens}) == 9
    everywhere = log_softmax(np.asarray(forward(*tiny, tokens, mask))[:, 8:-1] / 0.7)
    expected = np.take_along_axis(everywhere, tokens[:, 9:, None], axis=-1)
    np.testing.assert_allclose(logprobs, expected[..., 0], rtol=0, atol=1e-5)
    ranks = set((everywhere > expected).sum(axis=-1).ravel().tolist())
    assert ranks == {0, 1} if k else max(ranks) > 1


def test_after_eos_everything_is_zero(toy):
    """Every row up to its own end, and only its end: the rows end at many different places.

    Without a filter it is the other scripts' generate, which has none, token by token.
    """
    prompts = np.array([[1, 2, 3]], np.int32)
    given = (toy, prompts, np.ones_like(prompts), 12, 1.0, 6, 2)
    tokens, mask, logprobs = sample(*given, num_samples=64)
    response, response_mask = tokens[:, 3:], mask[:, 3:]
    lengths = [row.index(6) + 1 if 6 in row else 12 for row in response.tolist()]
    assert len(set(lengths)) > 3
    real = np.arange(12) < np.array(lengths)[:, None]
    np.testing.assert_array_equal(response_mask, real)
    assert not response[~real].any() and not logprobs[~real].any() and (logprobs[real] < 0).all()
    others = sample(*given, script=sft, num_samples=64)
    np.testing.assert_array_equal(others[0], tokens)
    np.testing.assert_array_equal(others[1], mask)
    np.testing.assert_allclose(others[2], logprobs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax(toy, temperature):
    """Chi-square test of the first two tokens together: 64 cells, 63 degrees of freedom."""
    count, prompt = 20_000, np.array([[1, 2, 3]], np.int32)
    sampled = sample(toy, prompt, np.ones_like(prompt), 2, temperature, key=4, num_samples=count)
    first, second = sampled[0][:, 3:].T
    pairs = np.array([[1, 2, 3, token] for token in range(8)], np.int32)
    logits = np.asarray(forward(*toy, pairs, np.ones_like(pairs))) / temperature
    joint = log_softmax(logits[:1, 2]).T + log_softmax(logits[:, 3])  # [first, second]
    expected = count * np.exp(joint).ravel()
    observed = np.bincount(first * 8 + second, minlength=64)
    assert expected.max() > 3 * count / 64  # not nearly uniform
    rare = expected < 5  # pooled, as the test wants at least 5 in each cell
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    chi_square = ((observed - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * (2 * degrees) ** 0.5
    np.testing.assert_allclose(sampled[2].sum(axis=1), joint[first, second], rtol=0, atol=4e-5)


SPREAD = np.random.default_rng(0).normal(0, 2, 600)
FEW = np.where(np.isin(np.arange(600), [3, 255, 520, 521, 599]), SPREAD, -np.inf)


def one_likely(size, p):
    """Logits [V] of a token with probability p, the others alike."""
    return np.where(np.arange(size) == 20, np.log(p / (1 - p) * (size - 1)), 0.0)


def draws(logits, rows, calls):
    """rows * calls draws of sft.draw_token from one distribution: logits [V]."""
    logits = jnp.asarray(logits, jnp.float32)
    draw = jax.jit(lambda key: sft.draw_token(key, jnp.broadcast_to(logits, (rows, len(logits)))))
    keys = jax.random.split(jax.random.key(5), calls)
    return np.concatenate([draw(key) for key in keys])


@pytest.mark.parametrize(
    ("logits", "calls"),
    [(SPREAD[:5], 5), (SPREAD, 5), (FEW, 5), (one_likely(300, 0.99), 16)],
    ids=["5 tokens", "600 tokens", "most at -inf, a whole block of them", "one of 0.99"],
)
def test_draws_follow_the_softmax(logits, calls):
    """Chi-square over the tokens; each that should come ten times does, one at -inf does not."""
    found = np.bincount(draws(logits, 20_000, calls), minlength=len(logits))
    expected = found.sum() * np.exp(log_softmax(logits))
    assert found[expected > 10].all() and not found[expected == 0].any()
    rare = expected < 5  # pooled
    found = np.append(found[~rare], found[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    degrees = len(expected) - 1
    assert ((found - expected) ** 2 / expected).sum() < degrees + 4 * (2 * degrees) ** 0.5


def test_every_token_of_a_large_vocabulary_can_be_drawn():
    """GPT-2's 50257 tokens, one of probability 0.998: the others come as often as they should.

    So do those among them that no uniform float32 number reaches in a cumulative sum.
    """
    logits = one_likely(50_257, 0.998)
    sums = np.asarray(jnp.cumsum(jax.nn.softmax(jnp.asarray(logits, jnp.float32))))
    uniform = np.arange(2**23, dtype=np.float32) / 2**23 * sums.max()
    never = ~np.isin(np.arange(50_257), np.searchsorted(sums, uniform, side="right"))
    assert 0.5 < never.mean() < 0.8
    drawn = draws(logits, 250, 40)
    for found, p in ((drawn != 20, 0.002), (never[drawn], 0.002 * never.mean())):
        assert abs(found.sum() - 10_000 * p) < 3 * (10_000 * p) ** 0.5


def test_keys_and_padding_of_the_batch(toy):
    """Another key gives other samples; a batch padded more gives the same ones."""
    prompts = np.array([[0, 4, 5], [1, 2, 3]], np.int32)
    mask = np.array([[0, 1, 1], [1, 1, 1]], np.int32)
    wide = [np.pad(x, ((0, 0), (5, 0))) for x in (prompts, mask)]
    draw = functools.partial(sample, toy, length=8, temperature=1.0, eos_id=6, num_samples=8)
    tokens, _, logprobs = draw(prompts, mask)
    np.testing.assert_array_equal(draw(prompts, mask)[0], tokens)
    assert (draw(prompts, mask, key=1)[0] != tokens).any()
    padded, _, padded_logprobs = draw(*wide)
    np.testing.assert_array_equal(padded[:, 8:], tokens[:, 3:])
    np.testing.assert_allclose(padded_logprobs, logprobs, rtol=0, atol=1e-5)


def test_prompt_and_response_must_fit_the_positions(toy):
    prompts = np.ones((1, 9), np.int32)
    with pytest.raises(AssertionError, match="24"):
        sample(toy, prompts, prompts, 16, 1.0)


@pytest.mark.parametrize(
    ("k", "p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [1, 3]),
        (1, 1.0, [1]),
        (9, 1.0, [0, 1, 2, 3]),
        (0, 0.5, [1]),  # 0.55 alone holds 0.5
        (0, 0.6, [1, 3]),  # 0.55 does not hold 0.6, 0.55 + 0.25 does
        (0, 0.85, [0, 1, 3]),
        (2, 0.6, [1]),  # among the two that are left, 0.55 / 0.8 = 0.69 holds 0.6
    ],
)
def test_keep_top_by_hand(k, p, kept):
    probabilities = np.array([[0.15, 0.55, 0.05, 0.25]], np.float32)
    logits = jnp.log(probabilities) + 3.0
    filtered = np.asarray(gpt2.keep_top(logits, k, p))[0]
    assert np.flatnonzero(np.isfinite(filtered)).tolist() == kept
    np.testing.assert_array_equal(filtered[kept], np.asarray(logits)[0, kept])


# ----------------------------------------------------------------------------------- model folders


def write_folder(folder, tensors, **changes):
    """A model folder with these tensors and the golden model's config.json, changed."""
    config = json.loads((TINY / "config.json").read_text()) | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tensors():
    """The tensors of the golden model's file."""
    return load_file(TINY / "model.safetensors")


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_loads_files_of_each_type(tmp_path, tensors, dtype):
    """As the float32 file that holds the rounded numbers."""
    rounded = {name: x.astype(dtype) for name, x in tensors.items()}
    _, params = load_model(write_folder(tmp_path / "half", rounded))
    exact = {name: x.astype(jnp.float32) for name, x in rounded.items()}
    _, expected = load_model(write_folder(tmp_path / "single", exact))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert_equal_trees(params, expected)


def older_buffers(tensors):
    """h.0.attn.bias is a causal mask, h.0.attn.c_attn.bias is a parameter."""
    buffers = {}
    for layer in range(2):
        prefix = f"transformer.h.{layer}.attn"
        assert jnp.abs(tensors[f"{prefix}.c_attn.bias"]).max() > 0.1
        buffers[f"{prefix}.bias"] = jnp.tril(jnp.ones((1, 1, 128, 128)))
        buffers[f"{prefix}.masked_bias"] = jnp.float32(-1e4)
    return tensors | buffers


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {name.removeprefix("transformer."): x for name, x in tensors.items()},
        older_buffers,
        lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"]},
    ],
    ids=["keys without the prefix", "buffers of older files", "wte twice in a tied file"],
)
def test_other_files_are_read_as_the_same_model(tmp_path, tiny, tensors, change):
    config, params = load_model(write_folder(tmp_path, change(tensors)))
    assert config == tiny[0]
    assert_equal_trees(params, tiny[1])  # whose logits are the golden ones


def test_untied_head(tmp_path, tensors, goldens):
    head = np.random.default_rng(0).normal(size=(257, 64)).astype(np.float32)
    both = tensors | {"lm_head.weight": jnp.asarray(head)}
    model = load_model(write_folder(tmp_path, both, tie_word_embeddings=False))
    golden = goldens("gpt2_forward")
    tokens = golden["full_input_ids"]
    logits = forward(*model, tokens, np.ones_like(tokens))
    np.testing.assert_allclose(logits, golden["full_final_hidden_f64"] @ head.T, rtol=0, atol=1e-4)


def test_weights_in_several_files(tmp_path, tiny, tensors):
    """As large models come; the .bin files that may lie beside them are no matter."""
    folder, names = write_folder(tmp_path, tensors), sorted(tensors)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"another format")
    for i, part in enumerate((names[:5], names[5:])):
        part = {name: tensors[name] for name in part}
        save_file(part, folder / f"model-0000{i + 1}-of-00002.safetensors")
    assert_equal_trees(load_model(folder)[1], tiny[1])


@pytest.mark.parametrize("source", [TINY, REWARD_TINY], ids=["language model", "reward model"])
def test_save_and_load_round_trip(tmp_path, source):
    """The tensors and names of the file they came from; saved a second time, the same bytes."""
    config, params = load_model(source)
    assert ("score" in params) == (source == REWARD_TINY) and config.eos_token_id == 256
    first, second = tmp_path / "a" / "model", tmp_path / "b"
    save_model(first, config, params, TOKENIZER)
    saved = load_file(first / "model.safetensors")
    assert_equal_trees(saved, load_file(source / "model.safetensors"))
    again = load_model(first)
    assert again[0] == config
    assert_equal_trees(again[1], params)
    save_model(second, config, jax.tree.map(lambda x: 2 * x, params), TOKENIZER)
    (second / "left_over.txt").write_text("old")
    save_model(second, *again, first)  # in place of another model
    files = sorted(path.name for path in second.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert files == sorted(path.name for path in first.iterdir())
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    with safe_open(second / "model.safetensors", "flax") as file:
        assert file.metadata() == {"format": "pt"}  # some versions of transformers insist on it
    written = json.loads((second / "config.json").read_text())
    kind = "GPT2ForSequenceClassification" if source == REWARD_TINY else "GPT2LMHeadModel"
    assert written["architectures"] == [kind]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # nothing half-written


def test_a_saved_model_keeps_what_its_source_says_besides(tmp_path, tiny, tensors):
    source = write_folder(tmp_path / "source", tensors, bos_token_id=3, task="chat", n_embd=1)
    for name in ("generation_config.json", "chat_template.jinja", "vocab.json", "merges.txt"):
        (source / name).write_text(name)
    save_model(tmp_path / "m", *tiny, source, reward_gain=2.5)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    expected = {"bos_token_id": 3, "task": "chat", "n_embd": 64, "reward_gain": 2.5}
    assert expected.items() <= config.items()
    for name in ("generation_config.json", "chat_template.jinja", "vocab.json", "merges.txt"):
        assert (tmp_path / "m" / name).read_text() == name


def transposed(name):
    """A change of this tensor only, and what the message must say: the number of elements fits."""

    def change(tensors):
        return tensors | {name: tensors[name].T}

    shapes = {"wpe": ("(128, 64)", "(64, 128)"), "c_attn": ("(64, 192)", "(192, 64)")}
    return change, {}, (name.removeprefix("transformer."), *shapes[name.split(".")[-2]])


C_FC = "transformer.h.1.mlp.c_fc.weight"
UNCHANGED = dict  # a copy


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (
            lambda tensors: {name: x for name, x in tensors.items() if name != C_FC},
            {},
            ("h.1.mlp.c_fc.weight",),
        ),
        (UNCHANGED, {"tie_word_embeddings": False}, ("lm_head.weight",)),
        transposed("transformer.wpe.weight"),
        transposed("transformer.h.0.attn.c_attn.weight"),
        (UNCHANGED, {"model_type": "llama"}, ("model_type", "llama")),
        (UNCHANGED, {"activation_function": "relu"}, ("activation_function", "relu")),
        (
            UNCHANGED,
            {"scale_attn_by_inverse_layer_idx": True},
            ("scale_attn_by_inverse_layer_idx", "True"),
        ),
        (UNCHANGED, {"scale_attn_weights": False}, ("scale_attn_weights", "False")),
        (UNCHANGED, {"add_cross_attention": True}, ("add_cross_attention", "True")),
        # An MLP of another width than 4 * n_embd.
        (
            lambda tensors: tensors | {C_FC: tensors[C_FC][:, :48]},
            {"n_inner": 48},
            ("h.1.mlp.c_fc.weight", "(64, 48)", "(64, 256)"),
        ),
        # A head of its own that the config says nothing of, and a conversion that has overflowed.
        (
            lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1},
            {},
            ("lm_head", "tie_word_embeddings"),
        ),
        *(
            (
                lambda tensors, x=x: tensors | {C_FC: jnp.asarray(tensors[C_FC]).at[5, 3].set(x)},
                {},
                words,
            )
            for words in [("h.1.mlp.c_fc.weight", "not finite")]
            for x in (math.nan, -math.inf)
        ),
    ],
)
def test_refuses_another_model(tmp_path, tensors, error_line, change, config, words):
    message = error_line(load_model, write_folder(tmp_path, change(tensors), **config))
    assert all(word in message for word in words), message


CONFIGS = {  # entry of config.json: values that it cannot have
    "n_head": [3, 0, -2, "2", 2.0, None, True, [2]],  # 3 does not divide the width
    "n_layer": ["1", 0, None],
    "n_embd": [0, 64.5, None],
    "n_positions": [-1, "128"],
    "vocab_size": [None, 10**12],
    "eos_token_id": [257, 50256, -1, "0", 1.0, True, [256, 255], [], [257]],
    "pad_token_id": ["0", [256], {}],
    "layer_norm_epsilon": [None, "1e-5"],
    "initializer_range": [None, "0.02", [0.02]],
    "tie_word_embeddings": ["no", [True], 1],
}


@pytest.mark.parametrize("name", CONFIGS)
def test_refuses_what_an_entry_of_the_config_cannot_be(tmp_path, tensors, error_line, name):
    for value in CONFIGS[name]:
        message = error_line(load_model, write_folder(tmp_path, tensors, **{name: value}))
        assert name in message and str(tmp_path) in message, (value, message)


def test_refuses_a_config_with_other_names_for_the_sizes(tmp_path, tensors, error_line):
    """Which transformers would read: GPT2Config's default of 12 heads is another model."""
    folder = write_folder(tmp_path, tensors, num_attention_heads=4)
    config = json.loads((folder / "config.json").read_text())
    del config["n_head"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "n_head" in error_line(load_model, folder)


def test_one_eos_in_a_list_is_that_one(tmp_path, tensors):
    config, _ = load_model(write_folder(tmp_path, tensors, eos_token_id=[7]))
    assert config.eos_token_id == 7


def test_refuses_a_folder_without_a_model(tmp_path, monkeypatch, error_line):
    """And says what to do."""
    assert "config.json" in error_line(load_model, tmp_path)
    shutil.copy(TINY / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = error_line(load_model, tmp_path)
    assert f"{tmp_path} has no safetensors" in message
    assert f"M.from_pretrained('{tmp_path}').save_pretrained(" in message
    monkeypatch.chdir(tmp_path)
    for script in ("sft", "reward"):
        assert f"python {script}.py" in error_line(load_model, f"runs/{script}/model")
    assert "runs/sft/model" in error_line(load_tokenizer, "runs/sft/model")
    assert "no folder mine/model" in error_line(load_model, "mine/model")


@pytest.mark.real_data
def test_gpt_nano_sort_sorts_every_input(shared_data):
    """A real model with an untied head: six letters, then the same letters in order, greedily."""
    model = load_model(shared_data / "gpt-nano-sort")
    with np.load(shared_data / "gpt-nano-sort" / "golden_partials.npz") as golden:
        rows, expected = golden["idx"].astype(np.int32), golden["lm_head"]
    logits = forward(*model, rows, np.ones_like(rows))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)
    prompts = np.array(list(itertools.product(range(3), repeat=6)), np.int32)  # [729, 6]
    # 11 positions: the sixth letter is read off the last logits and takes no position itself.
    tokens, mask, _ = sample(model, prompts, np.ones_like(prompts), 5, 0.0)
    last = np.argmax(forward(*model, tokens, mask)[:, -1], axis=-1)
    answers = np.concatenate([tokens[:, 6:], last[:, None]], axis=1)
    np.testing.assert_array_equal(answers, np.sort(prompts, axis=1))


BROKEN = {
    "empty": b"",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "no object": b"[]",
    "zeros": bytes(500),
    "too deep": b"[" * 100_000,
    "UTF-16": "{}".encode("utf-16"),
    "a number of 5000 digits": b'{"n_layer": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_refuses_a_file_that_cannot_be_read(tmp_path, tensors, error_line, name):
    """Whatever is wrong with it; last of all it is a folder."""
    file = write_folder(tmp_path, tensors) / name
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path)
    load = load_tokenizer if name == "tokenizer.json" else load_model
    load(tmp_path)
    content = file.read_bytes()
    for broken in [*BROKEN.values(), content[: len(content) // 2], content[:-1]]:
        file.write_bytes(broken)
        assert str(file) in error_line(load, tmp_path), broken[:50]
    file.unlink()
    file.mkdir()
    assert str(file) in error_line(load, tmp_path)


# --------------------------------------------------------------------------------------- tokenizer


def random_texts(count, seed=0):
    """Words, numbers, white space, accents, other scripts and emoji in wild mixtures."""
    rng = random.Random(seed)
    pieces = ["the film", " good", " 'S", " 3.14", " ", "  ", "\n", "\n\n", "\t", "\r\n"]
    pieces += ["\u00a0", "\u3000", "e\u0301", "\u200b", "\x00", "\x7f"]
    pieces += ["n't", "'ll", "don\u2019t", "<|endoftext|>", "[PAD]", "__", "...", "2024", "½", "٣"]
    pieces += ["é", "ß", "日本", "русский", "العربية", "हिन्दी", "👩\u200d👩\u200d👧", "🇨🇭"]

    def piece():
        if rng.random() < 0.6:
            return rng.choice(pieces)
        return chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0x2FF), 0x4E00, 0x1F600]))

    return ["".join(piece() for _ in range(rng.randrange(1, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def bpe_file():
    """The embedded tokenizer.json as it stands in the file, its merges as strings."""
    file = json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))
    merges = [m if isinstance(m, str) else " ".join(m) for m in file["model"]["merges"]]
    return file | {"model": file["model"] | {"merges": merges}}


def with_model(file, **changes):
    return file | {"model": file["model"] | changes}


def write_tokenizer(folder, file):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(file), "utf-8")
    return folder


def write_vocab_and_merges(folder, file, header="#version: 0.2\n"):
    """The same vocabulary in the two files of older folders, its special tokens in vocab.json."""
    vocabulary = file["model"]["vocab"] | {t["content"]: t["id"] for t in file["added_tokens"]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (folder / "merges.txt").write_text(header + "\n".join(file["model"]["merges"]) + "\n", "utf-8")
    return folder


def plain_bpe(vocabulary, merges, text):
    """Byte-pair encoding word by word, merge by merge, with the pattern of OpenAI's encoder.py."""
    pattern = (
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # as printed
    )
    printable = [b for b in range(256) if chr(b).isprintable() and b not in (32, 127, 160, 173)]
    others = iter(range(256, 512))
    letters = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    ids = []
    for word in regex.findall(pattern, text):
        parts = [letters[byte] for byte in word.encode("utf-8")]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == best
                merged.append("".join(best) if both else parts[i])
                i += 1 + both
            parts = merged
        ids += [vocabulary[part] for part in parts]
    return ids


def test_ids_equal_plain_byte_pair_encoding(bpe_file):
    tokenizer, model = load_tokenizer(TOKENIZER), bpe_file["model"]
    for text in random_texts(300):
        ids = tokenizer.encode_ordinary(text)
        assert ids == plain_bpe(model["vocab"], model["merges"], text), repr(text)
        assert tokenizer.decode(ids) == text


def test_special_tokens_in_text_are_plain_text(tmp_path, bpe_file):
    """Those of the embedded file, and an added [PAD]."""
    pad = bpe_file["added_tokens"][0] | {"id": PAD_ID + 1, "content": "[PAD]"}
    file = bpe_file | {"added_tokens": [*bpe_file["added_tokens"], pad]}
    special = {"<|endoftext|>": EOS_ID, "<|pad|>": PAD_ID}
    for folder, named in (
        (TOKENIZER, special),
        (write_tokenizer(tmp_path, file), special | {"[PAD]": PAD_ID + 1}),
    ):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.eot_token == EOS_ID and tokenizer.n_vocab == max(named.values()) + 1
        for token, number in named.items():
            assert tokenizer.encode_single_token(token) == number
            assert tokenizer.decode([number]) == token
            ids = tokenizer.encode_ordinary(f"good.{token} bad")
            assert max(ids) < EOS_ID and tokenizer.decode(ids) == f"good.{token} bad"


@pytest.mark.parametrize(
    "write",
    [
        write_tokenizer,
        lambda folder, file: write_tokenizer(
            folder, with_model(file, merges=[m.split(" ") for m in file["model"]["merges"]])
        ),
        write_vocab_and_merges,
        functools.partial(write_vocab_and_merges, header="#version: 0.2 - by a library\n"),
        functools.partial(write_vocab_and_merges, header=""),
    ],
    ids=["merges as strings", "as pairs", "two files", "another header", "no header"],
)
def test_the_ways_to_write_a_vocabulary(tmp_path, bpe_file, write):
    """Written anew at the same path, it is read anew."""
    tokenizer, expected = load_tokenizer(write(tmp_path, bpe_file)), load_tokenizer(TOKENIZER)
    assert tokenizer.n_vocab == expected.n_vocab and tokenizer.eot_token == expected.eot_token
    for text in random_texts(20):
        assert tokenizer.encode_ordinary(text) == expected.encode_ordinary(text)
    vocabulary, merges = bpe_file["model"]["vocab"], bpe_file["model"]["merges"]
    more = with_model(bpe_file, vocab=vocabulary | {"qz": PAD_ID + 1}, merges=[*merges, "q z"])
    assert load_tokenizer(write(tmp_path, more)).encode_ordinary("qzqz") == [PAD_ID + 1] * 2
    assert PAD_ID + 1 not in tokenizer.encode_ordinary("qzqz")


def test_a_first_merge_of_two_hash_signs_is_no_header(tmp_path, bpe_file):
    characters = [token for token in bpe_file["model"]["vocab"] if len(token) == 1]
    vocabulary = {token: i for i, token in enumerate([*characters, "##", "ab"])}
    assert len(characters) == 256
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (tmp_path / "merges.txt").write_text("# #\na b\n", "utf-8")
    assert load_tokenizer(tmp_path).encode_ordinary("##ab") == [256, 257]


@pytest.mark.parametrize("write", [write_tokenizer, write_vocab_and_merges])
def test_refuses_ids_out_of_merge_order(tmp_path, bpe_file, error_line, write):
    vocabulary = dict(bpe_file["model"]["vocab"])
    first, second = (m.replace(" ", "") for m in bpe_file["model"]["merges"][10:12])
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    folder = write(tmp_path, with_model(bpe_file, vocab=vocabulary))
    assert "order" in error_line(load_tokenizer, folder)


@pytest.mark.parametrize("token", ["Q", "Ā", "ÿ"])
def test_refuses_a_vocabulary_that_lacks_a_byte(tmp_path, bpe_file, error_line, token):
    vocabulary = {t: i for t, i in bpe_file["model"]["vocab"].items() if t != token}
    assert len(vocabulary) == len(bpe_file["model"]["vocab"]) - 1
    folder = write_tokenizer(tmp_path, with_model(bpe_file, vocab=vocabulary))
    assert token in error_line(load_tokenizer, folder)


def test_refuses_merges_that_tiktoken_reads_otherwise(tmp_path, bpe_file, error_line):
    """It joins whatever makes a token: "abc" would be one, and is [a, bc] by these merges."""
    letters = [token for token in bpe_file["model"]["vocab"] if len(token) == 1]

    def write(*merges):
        vocabulary = {token: i for i, token in enumerate([*letters, *map("".join, merges)])}
        return write_tokenizer(tmp_path, with_model(bpe_file, vocab=vocabulary, merges=merges))

    message = error_line(load_tokenizer, write(["b", "c"], ["a", "b"], ["ab", "c"]))
    assert "abc" in message and str(tmp_path) in message
    assert "aaa" in error_line(load_tokenizer, write(["a", "a"], ["a", "aa"]))
    folder = write(["a", "b"], ["b", "c"], ["ab", "c"])
    assert load_tokenizer(folder).encode_ordinary("abcbc") == [258, 257]


IDS = {"no number": "7", "a fraction": 7.5, "nothing": None, "below 0": -1, "too large": 2**33}


@pytest.mark.parametrize(
    "change",
    [
        *({"vocab": {"Ġthe": x}} for x in IDS.values()),
        {"vocab": {"Ġthe": 300}},  # another token has this id, as in the next
        {"vocab": {"Ġthe": EOS_ID}},
        *({"added": {"id": x, "content": "<x>"}} for x in [*IDS.values(), 300, EOS_ID]),
        *({"added": {"id": PAD_ID + 1, "content": x}} for x in (5, None, ["x"])),
        *({"merges": [x]} for x in ("ab", "a b c", ["a"], ["a", "b", "c"], 5, None, [1, 2])),
        *({"merges": x} for x in (None, 5, {})),
        *({"vocab": x} for x in (None, 5, [])),
    ],
    ids=str,
)
def test_refuses_a_broken_vocabulary(tmp_path, bpe_file, error_line, change):
    vocabulary, merges = bpe_file["model"]["vocab"], bpe_file["model"]["merges"]
    if "vocab" in change:
        other = change["vocab"]
        file = with_model(bpe_file, vocab=vocabulary | other if isinstance(other, dict) else other)
    elif "merges" in change:
        more = change["merges"]
        file = with_model(bpe_file, merges=[*merges, *more] if isinstance(more, list) else more)
    else:
        file = bpe_file | {"added_tokens": [*bpe_file["added_tokens"], change["added"]]}
    assert str(tmp_path) in error_line(load_tokenizer, write_tokenizer(tmp_path, file))


@pytest.mark.parametrize("line", ["ab", "a b c", " "])
def test_refuses_a_line_of_merges_that_is_no_pair(tmp_path, bpe_file, error_line, line):
    folder = write_vocab_and_merges(tmp_path, bpe_file, header=f"#version: 0.2\n{line}\n")
    assert str(tmp_path) in error_line(load_tokenizer, folder)


def test_special_tokens_and_ids_without_a_token_are_no_text(tmp_path, bpe_file):
    """A vocabulary padded to a multiple has such ids, here up to a last token; TRL's rule."""
    last = bpe_file["added_tokens"][0] | {"id": PAD_ID + 16, "content": "<last>"}
    file = bpe_file | {"added_tokens": [*bpe_file["added_tokens"], last]}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, file))
    ids = tokenizer.encode_ordinary(" good film")
    row = [5, *ids[:1], PAD_ID, PAD_ID + 7, PAD_ID + 16, PAD_ID + 90, *ids[1:], EOS_ID, 6]
    mask = [1] * (len(row) - 1) + [0]
    assert gpt2.decode_responses(tokenizer, [row], [mask], 1, EOS_ID) == [" good film"]


def test_the_end_of_text_is_the_config_s_else_the_tokenizer_s(tmp_path, bpe_file, tiny, error_line):
    tokenizer = load_tokenizer(TOKENIZER)
    config = dataclasses.replace(tiny[0], eos_token_id=7)
    assert gpt2.end_token(config, tokenizer) == 7
    config = dataclasses.replace(config, eos_token_id=None)
    assert gpt2.end_token(config, tokenizer) == EOS_ID
    vocabulary = {t: i for t, i in bpe_file["model"]["vocab"].items() if i < EOS_ID}
    added = [bpe_file["added_tokens"][0] | {"content": "</s>"}]
    file = with_model(bpe_file, vocab=vocabulary) | {"added_tokens": added}
    other = load_tokenizer(write_tokenizer(tmp_path, file))
    assert "eos_token_id" in error_line(gpt2.end_token, config, other)


BEGIN = [{"SpecialToken": {"id": "<|endoftext|>"}}, {"Sequence": {"id": "A"}}]


@pytest.mark.parametrize(
    "changes",
    [
        {"post_processor": {"type": "TemplateProcessing", "single": BEGIN}},
        {"end_of_word_suffix": "</w>"},
        {"continuing_subword_prefix": "##"},
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}},
        {"model": {"type": "WordPiece", "vocab": {}}},
    ],
)
def test_refuses_another_kind_of_tokenizer(tmp_path, bpe_file, error_line, changes):
    own = with_model(bpe_file, **{k: x for k, x in changes.items() if "word" in k})
    message = error_line(load_tokenizer, write_tokenizer(tmp_path, own | changes))
    assert "only byte-level BPE; no normalizer" in message
    assert str(tmp_path) in message


def test_refuses_a_folder_without_a_tokenizer(error_line):
    message = error_line(load_tokenizer, TINY)
    assert "vocab.json" in message and str(TINY) in message


@pytest.mark.real_data
def test_gpt2_vocabulary(shared_data):
    """Ids that are published, among them those that the real GPT-2 was given."""
    tokenizer = load_tokenizer(shared_data / "gpt2")
    assert tokenizer.n_vocab == 50257 and tokenizer.eot_token == 50256
    assert tokenizer.encode_ordinary("Hello world") == [15496, 995]
    assert tokenizer.encode_ordinary("Hello, my dog is cute") == [15496, 11, 616, 3290, 318, 13779]
    assert 50256 not in tokenizer.encode_ordinary("<|endoftext|>")
    with np.load(shared_data / "gpt2" / "gpt2_124m_last_token_logits.npz") as golden:
        for k, prompt in enumerate(golden["prompts"]):
            assert tokenizer.encode_ordinary(str(prompt)) == golden[f"ids_{k}"].tolist()
    merges = (shared_data / "gpt2" / "merges.txt").read_text("utf-8").split("\n")[1:-1]
    vocabulary = json.loads((shared_data / "gpt2" / "vocab.json").read_text("utf-8"))
    for text in random_texts(50, seed=1):
        assert tokenizer.encode_ordinary(text) == plain_bpe(vocabulary, merges, text), repr(text)
