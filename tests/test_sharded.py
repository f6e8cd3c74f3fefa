"""sharded.py: on every mesh grpo.py's numbers; what stands where, and what is sent; runs.

The meshes are of eight simulated devices (conftest.py). Comparisons are in float32; what is only
summed in another order is held to about 1e-5.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from safetensors.numpy import load_file
from test_runs import (
    REVIEWS,
    Crash,
    command,
    crash_after_a_checkpoint,
    metrics_of,
    write_jsonl,
)

import grpo
import reward
import sharded

OLD_JAX = jax.__version_info__ < (0, 10)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]  # data, fsdp, tensor
MESHES = MESHES[2:] if OLD_JAX else MESHES  # which compiles everything anew
EOS = 7
PROMPTS, GROUP, P, R = 8, 4, 6, 10  # prompts, completions to each, their lengths
ROWS, T = PROMPTS * GROUP, P + R
D, LAYERS = 64, 2
SAMPLING = (R, 0.9, EOS, 0, GROUP)  # what generate takes after the key
SGD = optax.sgd(0.1)  # one object for all tests: what is compiled for it is kept
ARGS = sharded.Args(
    num_generations=GROUP,
    micro_batch_size=16,
    max_completion_length=R,
    epochs=2,
    num_minibatches=1,
    learning_rate=1e-3,
    warmup_steps=1,
    temperature=SAMPLING[1],
    kl_in="loss",
    advantage="group-std",
    aggregation="token",
    ratio_level="sequence",
)
ADAM, _ = sharded.make_optimizer(ARGS, 10)
each_mesh = pytest.mark.parametrize("shape", MESHES, ids=str)
CASES = [*((shape, 512) for shape in MESHES), ((1, 1, 8), 509), ((2, 2, 2), 509)]  # 509: a prime
each_case = pytest.mark.parametrize("shape, vocab_size", CASES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def no_cache_in_old_jax():
    """What jax 0.5.0 reads from its cache of compiled programs has forgotten which buffers it is
    given for good, and on several devices it then corrupts memory."""
    if OLD_JAX:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
    yield
    if OLD_JAX:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def config_of(vocab_size, script=sharded):
    return script.GPT2Config(
        vocab_size=vocab_size, n_positions=24, n_embd=D, n_layer=LAYERS, n_head=8
    )


@functools.cache
def parameters(vocab_size, seed=0):
    """An untrained model, its biases and norms made random too; half of its samples end."""
    one, config = jnp.ones((1, 1), jnp.int32), config_of(vocab_size)
    shapes = jax.eval_shape(sharded.GPT2(config).init, jax.random.key(0), one, one)["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    for name in ("ln_1", "ln_2"):
        for i in range(LAYERS):
            params[f"h.{i}"][name]["scale"] += 1
    toward_eos = params["wte"]["embedding"][EOS]
    params["ln_f"] = {"scale": 1 + params["ln_f"]["scale"], "bias": toward_eos * 2}
    return jax.tree.map(jnp.asarray, params)


@functools.cache
def prompts():
    """(tokens, mask) [PROMPTS, P], of unequal lengths, padded on the left."""
    rng = np.random.default_rng(1)
    ids = [rng.integers(8, 500, rng.integers(2, P + 1)).tolist() for _ in range(PROMPTS)]
    return sharded.pad_rows(ids, P, left=True)


def mesh_of(shape):
    devices = np.array(jax.devices()[: np.prod(shape)])
    return Mesh(devices.reshape(shape), ("data", "fsdp", "tensor"))


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, Spec(*spec)))


SCORES = np.random.default_rng(2).normal(size=ROWS).astype(np.float32)
KEY = jax.eval_shape(lambda: jax.random.key(0))


@functools.cache
def on_mesh(shape, vocab_size):
    """{step: its result} of sharded.py on a mesh: all arrays brought to the host."""
    mesh, config = mesh_of(shape), config_of(vocab_size)
    params, reference = (parameters(vocab_size, seed) for seed in (0, 1))
    place = sharded.shardings(params, mesh)
    results = {}
    for name, optimizer in (("SGD", SGD), ("AdamW", ADAM)):
        build = functools.partial(sharded.make_state, optimizer=optimizer, ref_moves=True)
        states = sharded.shardings(jax.eval_shape(build, params), mesh)
        sample, train_step = sharded.jit_on_mesh(mesh, states)
        if name == "SGD":
            tokens, mask = (put(x, mesh, ("data", "fsdp")) for x in prompts())
            policy, ref = jax.device_put(params, place), jax.device_put(reference, place)
            sampled = sample(policy, ref, config, tokens, mask, jax.random.key(11), SAMPLING, mesh)
            whole = [np.asarray(x) for x in sampled]
            ended = np.any(whole[0][:, P:] == EOS, axis=1)
            batch, metrics = sharded.make_experience(*whole, SCORES, ended, ARGS)
            rows = NamedSharding(mesh, Spec(("data", "fsdp")))
            batch = {name: sharded.put(x, rows) for name, x in batch.items()}
            results |= {"sampled": sampled, "batch": batch, "metrics": metrics}
        state = jax.jit(build, out_shardings=states)(params)
        results[name] = train_step(state, batch, jax.random.key(4), config, optimizer, ARGS, mesh)
        results[name + " given"] = state
    return results


@functools.cache
def of_grpo(vocab_size):
    """The same by grpo.py, on one device."""
    config = config_of(vocab_size, grpo)
    params, reference = (parameters(vocab_size, seed) for seed in (0, 1))
    key = jax.random.key(11)
    tokens, mask, logprobs = grpo.generate(params, config, *prompts(), key, *SAMPLING)
    ref_logprobs, _ = grpo.policy_logprobs(reference, config, tokens, mask, P, ARGS.temperature)
    ended = np.any(np.asarray(tokens)[:, P:] == EOS, axis=1)
    assert ROWS / 4 < ended.sum() < ROWS  # some samples end, some do not
    sampled = (tokens, mask, logprobs, ref_logprobs)
    batch, metrics = grpo.make_experience(*sampled, SCORES, ended, ARGS)
    results = {"sampled": sampled, "batch": batch, "metrics": metrics}
    for name, optimizer in (("SGD", SGD), ("AdamW", ADAM)):
        state = grpo.make_state(params, optimizer, ref_moves=True)
        results[name] = grpo.train_step(state, batch, jax.random.key(4), config, optimizer, ARGS)
    return results


def assert_close(tree, other, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), tree, other)


def off_by(tree, other):
    """The differences of all numbers in two trees, as one array."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other))
    return np.concatenate([np.abs(np.asarray(x) - np.asarray(y)).ravel() for x, y in pairs])


def moved(params, vocab_size):
    """How far parameters are from where they started."""
    start = parameters(vocab_size)
    return jax.tree.map(lambda x, y: np.array(x) - np.asarray(y), params, start)


# ------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("shape, vocab_size", [((1, 1, 1), 512), *CASES], ids=str)
def test_every_mesh_samples_what_one_device_samples(shape, vocab_size):
    """The same tokens, and log-probs of policy and reference.

    The keys and prompts here are such that no random number falls within 4e-6 of where the next
    token would be drawn, so that rounding (3e-7) cannot turn one token into another.
    """
    tokens, mask, *logprobs = on_mesh(shape, vocab_size)["sampled"]
    expected_tokens, expected_mask, *expected_logprobs = of_grpo(vocab_size)["sampled"]
    np.testing.assert_array_equal(tokens, expected_tokens)
    np.testing.assert_array_equal(mask, expected_mask)
    assert_close(logprobs, expected_logprobs, atol=2e-5)
    assert np.abs(logprobs[0] - logprobs[1]).max() > 0.1  # policy and reference are two models


@pytest.mark.parametrize("vocab_size", [512, 509])
def test_no_random_number_falls_near_a_boundary(vocab_size):
    """What the test above relies on, by the logits of one more forward pass."""
    tokens, mask = of_grpo(vocab_size)["sampled"][:2]
    logits = grpo.GPT2(config_of(vocab_size, grpo)).apply(
        {"params": parameters(vocab_size)}, tokens, mask
    )
    logits = np.asarray(logits[:, P - 1 : -1], np.float64) / ARGS.temperature  # [ROWS, R, V]
    cumulative = np.cumsum(np.exp(logits - logits.max(-1, keepdims=True)), axis=-1)
    cumulative /= cumulative[..., -1:]
    draw = functools.partial(jax.random.uniform, shape=(ROWS, 1))
    keys = [jax.random.fold_in(jax.random.key(11), t) for t in range(R)]
    uniform = np.concatenate([draw(key) for key in keys], axis=1)[..., None]  # [ROWS, R, 1]
    drawn = np.argmax(cumulative > uniform, axis=-1)
    real = np.asarray(mask)[:, P:] > 0
    assert (drawn == np.asarray(tokens)[:, P:])[real].all()
    assert np.abs(cumulative - uniform).min(axis=-1)[real].min() > 4e-6


@each_case
def test_every_mesh_trains_as_one_device_does(shape, vocab_size):
    results, expected = on_mesh(shape, vocab_size), of_grpo(vocab_size)
    assert_close(results["batch"], expected["batch"], atol=2e-5)
    assert_close(results["metrics"], expected["metrics"], rtol=1e-4, atol=1e-6)
    for name in ("SGD", "AdamW"):
        (state, metrics), (other, other_metrics) = results[name], expected[name]
        assert_close(metrics, other_metrics, rtol=1e-3, atol=1e-5)
        assert_close(state.ref_params, other.ref_params, atol=0, rtol=0)
        far, other_far = (moved(x.params, vocab_size) for x in (state, other))
        # The gradient of the keys' biases is 0 (they move all weights of a softmax alike), and Adam
        # divides what rounding leaves of it by its own size: two updates in any direction.
        for i in range(LAYERS):
            biases = [x[f"h.{i}"]["attn"]["c_attn"]["bias"] for x in (far, other_far)]
            bound = 1e-6 if name == "SGD" else 2.1 * ARGS.learning_rate
            assert max(np.abs(x[1]).max() for x in biases) < bound
            biases[0][1], biases[1][1] = 0, 0
        # Where another gradient happens to be near 0, it does the same to a lesser degree.
        off = off_by(far, other_far)
        assert off.max() < (1e-6 if name == "SGD" else 0.2 * ARGS.learning_rate)
        assert np.quantile(off, 0.999) < 5e-7
        for x in jax.tree.leaves(other_far):  # these bounds see something: every array has moved
            assert np.abs(x).max() > 5e-4


@each_mesh
def test_gradients_through_gathered_weights(shape):
    """gather_weights is the identity, and so is what it does to a gradient."""
    mesh, params = mesh_of(shape), parameters(509)
    tokens, mask = of_grpo(509)["sampled"][:2]

    def loss(params, config, gather):
        logprobs, _ = sharded.policy_logprobs(gather(params), config, tokens, mask, P, 1.0)
        return jnp.sum(logprobs * mask[:, P:]) / ROWS

    gather = functools.partial(sharded.gather_weights, mesh=mesh)
    place = sharded.shardings(params, mesh)
    assert_close(jax.jit(gather, in_shardings=(place,))(params), params, atol=0, rtol=0)
    grads = [
        jax.jit(jax.grad(functools.partial(loss, config=config_of(509), gather=function)))(params)
        for function in (gather, lambda x: x)
    ]
    scale = max(np.abs(x).max() for x in jax.tree.leaves(grads[1]))
    assert_close(*grads, atol=1e-5 * scale)
    twice = jax.jit(lambda x: gather(jax.tree.map(lambda y: 2 * y, x)))(params)
    assert_close(twice, jax.tree.map(lambda x: 2 * x, params), atol=0, rtol=0)


# ------------------------------------------------------------------------------ what stands where

# By hand, from what each axis of a weight means: how it is split, and its shape on one of the
# devices of the mesh (2, 2, 2).
PLACES = {
    "wte.embedding": (Spec("tensor", "fsdp"), (256, 32)),
    "wpe.embedding": (Spec(None, "fsdp"), (24, 32)),
    "attn.c_attn.kernel": (Spec("fsdp", None, "tensor", None), (32, 3, 4, 8)),
    "attn.c_attn.bias": (Spec(None, "tensor", None), (3, 4, 8)),
    "attn.c_proj.kernel": (Spec("tensor", "fsdp"), (32, 32)),
    "attn.c_proj.bias": (Spec(), (64,)),
    "mlp.c_fc.kernel": (Spec("fsdp", "tensor"), (32, 128)),
    "mlp.c_fc.bias": (Spec("tensor"), (128,)),
    "mlp.c_proj.kernel": (Spec("tensor", "fsdp"), (128, 32)),
    "mlp.c_proj.bias": (Spec(), (64,)),
    "ln_1.scale": (Spec(), (64,)),
    "ln_1.bias": (Spec(), (64,)),
    "ln_2.scale": (Spec(), (64,)),
    "ln_2.bias": (Spec(), (64,)),
    "ln_f.scale": (Spec(), (64,)),
    "ln_f.bias": (Spec(), (64,)),
}


def trees_of(state):
    """Those trees in a state that have the weights' names."""
    moments = [x for x in jax.tree.leaves(state.opt_state, is_leaf=is_moments) if is_moments(x)]
    return [state.params, state.ref_params, *moments]


def is_moments(x):
    return isinstance(x, dict) and "wte" in x


@each_mesh
def test_the_new_state_is_split_as_the_rules_say(shape):
    mesh, (state, _) = mesh_of(shape), on_mesh(shape, 512)["AdamW"]
    trees = trees_of(state)
    assert len(trees) == 4  # parameters, reference, Adam's two moments
    seen = set()
    for tree in trees:
        for name, x in flatten_dict(tree, sep=".").items():
            kind = re.sub(r"^h\.\d+\.", "", name)
            spec, shard = PLACES[kind]
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), name
            if shape == (2, 2, 2):
                assert {s.data.shape for s in x.addressable_shards} == {shard}, name
            seen.add(kind)
    assert seen == set(PLACES)
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.ndim == 0]
    assert counts and all(x.sharding.is_fully_replicated for x in counts)


def test_a_vocabulary_that_does_not_divide_is_whole_along_tensor():
    for shape, rest in (((1, 1, 8), (509, 64)), ((2, 2, 2), (509, 32))):
        for tree in trees_of(on_mesh(shape, 509)["AdamW"][0]):
            table = tree["wte"]["embedding"]
            assert {x.data.shape for x in table.addressable_shards} == {rest}


@each_mesh
def test_rows_are_split_over_data_and_fsdp(shape):
    mesh, results = mesh_of(shape), on_mesh(shape, 512)
    rows = NamedSharding(mesh, Spec(("data", "fsdp")))
    batch = [*results["sampled"], *results["batch"].values()]
    assert len(batch) == 10
    for x in batch:
        assert x.sharding.is_equivalent_to(rows, x.ndim)
        assert len(x) == ROWS and len(x.addressable_shards[0].data) == ROWS // (shape[0] * shape[1])


@each_mesh
def test_the_given_state_is_given_away(shape):
    """Each array of it is deleted once its buffer has become the new state's."""
    for name in ("SGD", "AdamW"):
        given = jax.tree.leaves(on_mesh(shape, 512)[name + " given"])
        assert given and all(x.is_deleted() for x in given)


# ------------------------------------------------------------------------------ what is sent


def lower_all(mesh, config, optimizer=ADAM, args=ARGS):
    """(sample, train_step), compiled for a mesh without running; and the state's shapes."""
    one, shape = jnp.ones((1, 1), jnp.int32), jax.ShapeDtypeStruct
    init = functools.partial(sharded.GPT2(config).init, jax.random.key(0))
    params = jax.eval_shape(init, one, one)["params"]
    build = functools.partial(sharded.make_state, optimizer=optimizer, ref_moves=False)
    state = jax.eval_shape(build, params)
    sample, train_step = sharded.jit_on_mesh(mesh, sharded.shardings(state, mesh))
    prompt = shape((PROMPTS, P), jnp.int32)
    sample = sample.lower(params, params, config, prompt, prompt, KEY, SAMPLING, mesh)
    batch = {name: shape((ROWS, T), jnp.int32) for name in ("tokens", "mask")}
    names = ("response_mask", "logprobs", "ref_logprobs")
    batch |= {name: shape((ROWS, R), jnp.float32) for name in names}
    batch |= {"advantages": shape((ROWS,), jnp.float32)}
    train_step = train_step.lower(state, batch, KEY, config, optimizer, args, mesh)
    return sample, train_step, state


@functools.cache
def programs(shape, vocab_size):
    sample, train_step, state = lower_all(mesh_of(shape), config_of(vocab_size))
    return sample.compile(), train_step.compile(), state


def forward_pass(shape, vocab_size):
    """The compiled log-probabilities of a batch, weights split by the rules at the start."""
    mesh, config = mesh_of(shape), config_of(vocab_size)
    params = parameters(vocab_size)

    def forward(params, tokens, mask):
        params = sharded.gather_weights(params, mesh)
        return sharded.policy_logprobs(params, config, tokens, mask, P, 1.0)[0]

    rows = NamedSharding(mesh, sharded.BATCH)
    places = (sharded.shardings(params, mesh), rows, rows)
    batch = jax.ShapeDtypeStruct((ROWS, T), jnp.int32)
    jitted = jax.jit(forward, in_shardings=places, out_shardings=rows)
    return jitted.lower(params, batch, batch).compile()


SENDING = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def collectives(program):
    """[(operation, [shapes])] of the collectives in a compiled program's text."""
    found = []
    for line in program.as_text().splitlines():
        if match := re.search(rf" = (.*?) ({SENDING})(-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            shapes = [tuple(int(n) for n in x.split(",") if n) for x in shapes]
            found.append((match[2], shapes))
    return found


def sent(program):
    """Counter of (operation, shape) over the arrays; XLA may put several into one operation."""
    return Counter((name, shape) for name, shapes in collectives(program) for shape in shapes)


def sums_under_tensor(rows):
    """What a forward pass sends, for `rows` rows on a device."""
    blocks = {("all-reduce", (rows * T, D)): 2 * LAYERS}  # after attention, after the MLP
    look_up = {("all-reduce", (rows, T, D)): 1}  # a token's vector lies on one device
    softmax = {("all-reduce", (rows, R)): 2, ("all-reduce", (rows, R, 1)): 1}  # max, sum; target
    return Counter(blocks | look_up | softmax)


def filled_up(vocab_size, tensor):
    """The length of an axis that XLA has filled up, so that it divides."""
    return -(-vocab_size // tensor) * tensor


def gathered_under_fsdp(tensor, vocab_size=512):
    """Each weight that fsdp splits, once, whole along fsdp; `tensor` devices split the rest."""
    table = vocab_size if vocab_size % tensor else vocab_size // tensor
    width, hidden = D // tensor, 4 * D // tensor
    layer = [(D, 3, 8 // tensor, 8), (width, D), (D, hidden), (hidden, D)]
    weights = [(table, D), (24, D), *LAYERS * layer]
    return Counter(("all-gather", weight) for weight in weights)


def expected_forward(shape, vocab_size):
    data, fsdp, tensor = shape
    found = sums_under_tensor(ROWS // data // fsdp) if tensor > 1 else Counter()
    return found + (gathered_under_fsdp(tensor, vocab_size) if fsdp > 1 else Counter())


@each_case
def test_what_a_forward_pass_sends(shape, vocab_size):
    """Sums after each half of a block and of the vocabulary; each weight gathered once; no more."""
    program = forward_pass(shape, vocab_size)
    assert sent(program) == expected_forward(shape, vocab_size)
    if not OLD_JAX and shape[2] > 1:  # the softmax's sum and the target's logit go together
        operations = [name for name, _ in collectives(program)]
        assert operations.count("all-reduce") == 2 * LAYERS + 3


BROKEN = {  # a wrong rule, and a mesh on which more or less is sent because of it
    "c_attn split by width": ({"c_attn.*kernel": Spec("tensor", None, "fsdp")}, (1, 1, 8)),
    "c_attn split into q, k, v": ({"c_attn.*kernel": Spec("fsdp", "tensor")}, (1, 1, 8)),
    "c_attn split within heads": (
        {"c_attn.*kernel": Spec("fsdp", None, None, "tensor")},
        (1, 1, 8),
    ),
    "c_proj whole": ({"c_proj.*kernel": Spec(None, "fsdp")}, (1, 1, 8)),
    "c_proj split the other way": ({"c_proj.*kernel": Spec("fsdp", "tensor")}, (1, 1, 8)),
    "c_fc split the other way": ({"c_fc.*kernel": Spec("tensor", "fsdp")}, (1, 1, 8)),
    "wte whole": ({"wte|lm_head": Spec(None, "fsdp")}, (1, 1, 8)),
    "wte split by width": ({"wte|lm_head": Spec("fsdp", "tensor")}, (1, 1, 8)),
    "wpe split by tensor": ({"wpe": Spec(None, "tensor")}, (1, 1, 8)),
    "wpe whole": ({"wpe": Spec()}, (1, 8, 1)),
    "c_fc whole under fsdp": ({"c_fc.*kernel": Spec(None, "tensor")}, (1, 8, 1)),
    "a bias gathered": ({"c_fc.*bias": Spec("fsdp")}, (1, 8, 1)),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_rule_sends_something_else(broken, monkeypatch):
    """The test above would fail."""
    rules, shape = BROKEN[broken]
    assert set(rules) <= set(sharded.RULES)
    monkeypatch.setattr(sharded, "RULES", sharded.RULES | rules)
    assert sent(forward_pass(shape, 512)) != expected_forward(shape, 512)


@pytest.mark.parametrize("broken", ["no gathering", "tensor gathered, too"])
def test_broken_gathering_sends_something_else(broken, monkeypatch):
    right = sharded.gather_weights

    def gather(params, mesh):
        if broken == "no gathering":
            return params
        whole = NamedSharding(mesh, Spec())
        return jax.lax.with_sharding_constraint(right(params, mesh), whole)

    shape = (2, 2, 2)
    monkeypatch.setattr(sharded, "gather_weights", gather)
    assert sent(forward_pass(shape, 512)) != expected_forward(shape, 512)


def weight_gradients():
    """Counter of the weights' shapes, axes sorted: some gradients come transposed."""
    return Counter(tuple(sorted(x.shape)) for x in jax.tree.leaves(parameters(512)))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1)], ids=str)
def test_gradients_are_summed_over_the_rows(shape):
    """Those of all arrays, by all-reduce: XLA's CPU backend has no reduce-scatter."""
    _, train_step, _ = programs(shape, 512)
    summed = Counter()
    for (name, sizes), count in sent(train_step).items():
        if name in ("all-reduce", "reduce-scatter") and sizes:  # numbers are metrics and norms
            summed[tuple(sorted(sizes))] += count
    table = Counter([(D, 512)])  # what it gets as a look-up, and what it gets as a head
    # The minibatches are drawn from all rows: tokens, mask, three arrays [ROWS, R], advantages.
    minibatch = Counter({(T, ROWS): 2, (R, ROWS): 3, (ROWS,): 1})
    assert summed == weight_gradients() + table + minibatch


@each_case
def test_an_update_gathers_each_weight_once(shape, vocab_size):
    _, train_step, _ = programs(shape, vocab_size)
    gathered = {k: n for k, n in sent(train_step).items() if k[0] == "all-gather"}
    expected = gathered_under_fsdp(shape[2], vocab_size) if shape[1] > 1 else Counter()
    if vocab_size % shape[2]:  # its gradient comes in unequal parts, and is put together
        expected[("all-gather", (filled_up(vocab_size, shape[2]), D))] += 1
    assert gathered == expected
    others = {name for name, _ in sent(train_step)} - {"all-gather"}
    assert others == {"all-reduce"}


@each_case
def test_sampling_gathers_each_weight_before_the_loop(shape, vocab_size):
    sample, _, _ = programs(shape, vocab_size)
    weights = gathered_under_fsdp(shape[2], vocab_size) if shape[1] > 1 else Counter()
    logits = Counter()
    if shape[2] > 1:  # a row of logits is whole where a token is drawn
        logits[("all-gather", (ROWS // shape[0] // shape[1], filled_up(vocab_size, shape[2])))] = 1
    gathered = Counter({k: n for k, n in sent(sample).items() if k[0] == "all-gather"})
    assert gathered == weights + weights + logits  # policy and reference


@each_mesh
def test_the_cache_is_split_by_rows_and_heads(shape):
    """The keys and values that the loop of generate carries, on one device."""
    sample, _, _ = programs(shape, 512)
    loops = [line for line in sample.as_text().splitlines() if " while(" in line]
    carried = [re.findall(r"f32\[([\d,]+)\]", line.split(" while(")[0]) for line in loops]
    carried = [tuple(map(int, x.split(","))) for shapes in carried for x in shapes]
    caches = [x for x in carried if len(x) == 4 and x[2] == T]
    rows, heads = ROWS // shape[0] // shape[1], 8 // shape[2]
    assert caches == [(rows, heads, T, D // 8)] * 2 * LAYERS


# ------------------------------------------------------------------------------ memory


@each_mesh
def test_the_new_state_takes_the_place_of_the_old(shape):
    _, train_step, state = programs(shape, 512)
    own = sum(local_bytes(x, shape, name) for name, x in named(state))
    assert train_step.memory_analysis().alias_size_in_bytes == own


def named(state):
    """(kind of weight, array) of all arrays of a state; the kind of a count is None."""
    for leaf, x in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = ".".join(str(key.key) for key in leaf if isinstance(key, jax.tree_util.DictKey))
        yield re.sub(r"^h\.\d+\.", "", name) or None, x


def local_bytes(x, shape, kind):
    """Bytes on one device, by PLACES."""
    sizes = dict(zip(("data", "fsdp", "tensor"), shape))
    split = [sizes[axis] for axis in PLACES[kind][0] if axis] if kind else []
    return x.size * 4 // int(np.prod(split, dtype=int))


def test_memory_falls_as_one_over_fsdp():
    """Of GPT-2's shapes, compiled and not run: parameters, moments and moving reference."""
    config = sharded.GPT2Config(n_layer=2, n_positions=64)
    used = {}
    for n in (1, 2, 4, 8):
        _, train_step, state = lower_all(mesh_of((1, n, 1)), config)
        used[n] = train_step.compile().memory_analysis().argument_size_in_bytes
    total = sum(x.size * 4 for x in jax.tree.leaves(state))
    whole = sum(x.size * 4 for kind, x in named(state) if not kind or "fsdp" not in PLACES[kind][0])
    assert total > 5e8 and whole < 0.001 * total  # biases and norms, on every device
    for n, size in used.items():
        assert size == pytest.approx(whole + (total - whole) / n, rel=1e-3)  # and the batch
        assert size == pytest.approx(total / n, rel=1e-2)


# ------------------------------------------------------------------------------ runs


REWARDS = """
def ascii(prompts, completions, **_):
    return [sum(letter.isascii() for letter in text) / 4 for text in completions]
"""


def write_tokenizer(folder):
    """256 bytes and <|endoftext|>: with so few tokens rounding hardly ever draws another one."""
    file = json.loads((REVIEWS / "tokenizer" / "tokenizer.json").read_text("utf-8"))
    ids = file["model"]["vocab"]
    bytes_only = sorted((token for token in ids if len(token) == 1), key=ids.get)
    (eos,) = (token for token in file["added_tokens"] if token["content"] == "<|endoftext|>")
    file["model"] |= {"vocab": {token: i for i, token in enumerate(bytes_only)}, "merges": []}
    file["added_tokens"] = [eos | {"id": 256}]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(file), "utf-8")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Data, a language model and a reward model of 8 heads, both untrained; a reward function."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for name, count in (("train", 24), ("test", 8)):
        words = [
            "".join(rng.choice(list("abcdef "), size=rng.integers(2, 9))) for _ in range(count)
        ]
        write_jsonl(
            folder / f"{name}.jsonl", [{"prompt": w, "row": i} for i, w in enumerate(words)]
        )
    (folder / "rewards.py").write_text(REWARDS)
    tokenizer = write_tokenizer(folder / "tokenizer")
    config = sharded.GPT2Config(
        vocab_size=257,
        n_positions=24,
        n_embd=D,
        n_layer=1,
        n_head=8,
        initializer_range=0.2,
        eos_token_id=256,
    )
    one = jnp.ones((1, 1), jnp.int32)
    models = (("lm", sharded.GPT2), ("scorer", reward.RewardModel))
    for seed, (name, model) in enumerate(models):
        params = jax.jit(model(config).init)(jax.random.key(seed), one, one)["params"]
        bias = params["wte"]["embedding"][256] * 1.2  # some of the samples end
        params["ln_f"]["bias"] = bias if name == "lm" else params["ln_f"]["bias"]
        sharded.save_model(folder / name, config, params, tokenizer)
    return folder


def run_args(inputs, run_dir, shape=None, **changes):
    """Args of a small run of sharded.py on a mesh, or without a shape of grpo.py."""
    script = sharded if shape else grpo
    mesh = dict(zip(("data", "fsdp", "tensor"), shape)) if shape else {}
    common = {
        "model": str(inputs / "lm"),
        "reward_model": str(inputs / "scorer"),
        "reward": (f"{inputs / 'rewards.py'}:ascii",),
        "gold": f"{inputs / 'rewards.py'}:ascii",
        "dataset": str(inputs / "train.jsonl"),
        "eval_dataset": str(inputs / "test.jsonl"),
        "run_dir": str(run_dir),
        "seed": 1,  # its random numbers are 5e-6 or more away from where another token begins
        "steps": 6,
        "batch_size": 16,
        "num_generations": 2,
        "micro_batch_size": 8,
        "max_prompt_length": 8,
        "max_completion_length": 6,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "eval_every": 3,
        "save_every": 3,
    }
    return script.Args(**(common | mesh | changes))


class Runs:
    """Runs that were never stopped, each made when it is asked for."""

    def __init__(self, inputs, folder):
        self.inputs, self.folder, self.made = inputs, folder, {}

    def __call__(self, shape=None, **changes):
        key = (shape, *changes.items())
        if key not in self.made:
            self.made[key] = self.folder / str(len(self.made))
            script = sharded if shape else grpo
            script.main(run_args(self.inputs, self.made[key], shape, **changes))
        return self.made[key]


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    return Runs(inputs, tmp_path_factory.mktemp("runs"))


def samples_of(run):
    lines = (run / "samples.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_numbers(run, other):
    """Equal but for rounding: metrics, samples and model."""
    rows, others = metrics_of(run), metrics_of(other)
    assert [list(row) for row in rows] == [list(row) for row in others]
    for row, expected in zip(rows, others):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4), row["step"]
    assert len(samples_of(run)) == len(samples_of(other)) == 24
    for sample, expected in zip(samples_of(run), samples_of(other)):
        for name in ("step", "prompt", "completion"):
            assert sample[name] == expected[name]
        numbers, expected = ([x[k] for k in ("score", "gold")] for x in (sample, expected))
        assert numbers == pytest.approx(expected, rel=1e-3, abs=1e-4)
    weights, others = (load_file(x / "model" / "model.safetensors") for x in (run, other))
    assert weights.keys() == others.keys()
    for tensors in (weights, others):  # those of the keys: any direction, see above
        tensors["transformer.h.0.attn.c_attn.bias"][D : 2 * D] = 0
    off = off_by(weights, others)
    assert np.quantile(off, 0.99) < 1e-5 and off.max() < 6e-3


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_run_on_a_mesh_is_a_run_of_grpo(shape, runs):
    run = runs(shape)
    assert_same_numbers(run, runs())
    saved = json.loads((run / "args.json").read_text("utf-8"))
    assert saved == json.loads((runs() / "args.json").read_text("utf-8")) | {"run_dir": str(run)}
    names = {path.name for path in run.iterdir() if not path.name.startswith("events.out.")}
    assert names == {"args.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "model"}
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["6"]  # the last, alone


def test_the_final_model_is_whole(runs, inputs):
    """What grpo.py, and so all others, can read; moved away from where it began."""
    config, params = grpo.load_model(runs((2, 2, 2)) / "model")
    start_config, start = grpo.load_model(inputs / "lm")
    assert config == start_config
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, start)
    assert min(np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, (params, start)))) > 1e-3
    tokenizer = grpo.load_tokenizer(runs((2, 2, 2)) / "model")
    assert tokenizer.n_vocab == config.vocab_size == 257


@pytest.mark.parity
def test_transformers_reads_the_final_model(runs):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    folder = runs((2, 2, 2)) / "model"
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    config, params = grpo.load_model(folder)
    tokens = np.random.default_rng(0).integers(0, 257, (2, 9))
    logits = grpo.GPT2(config).apply({"params": params}, tokens, np.ones_like(tokens))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


# ------------------------------------------------------------------------------ resumed


def crash(args):
    """Ends a run in step 5; its last checkpoint is of step 3."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_after_a_checkpoint(sharded, patch)
        sharded.main(args)


def test_a_resumed_run_on_the_same_mesh_is_bit_equal(runs, inputs, tmp_path):
    args, whole = run_args(inputs, tmp_path / "run", (2, 2, 2)), runs((2, 2, 2))
    crash(args)
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["3"]
    assert not (tmp_path / "run" / "model").exists()
    sharded.main(dataclasses.replace(args, resume=True))
    assert metrics_of(tmp_path / "run") == metrics_of(whole)
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["6"]


@pytest.mark.parametrize("first, second", [((2, 2, 2), (1, 8, 1)), ((8, 1, 1), (1, 1, 8))], ids=str)
@pytest.mark.parametrize("ref_sync_steps", [None, 2])
def test_a_run_goes_on_on_another_mesh(first, second, ref_sync_steps, runs, inputs, tmp_path):
    """The optimizer's state, its count and a reference that moves go along."""
    changes = {"ref_sync_steps": ref_sync_steps}
    crash(run_args(inputs, tmp_path / "run", first, **changes))
    sharded.main(run_args(inputs, tmp_path / "run", second, resume=True, **changes))
    assert_same_numbers(tmp_path / "run", runs(None, **changes))


def test_the_checkpoint_is_restored_onto_the_mesh(runs, inputs, tmp_path, monkeypatch):
    """Each array as the rules say, not whole on one device."""
    restored, start = [], sharded.RunFolder.start

    def watched(run, state, total_steps):
        state, step = start(run, state, total_steps)
        restored.append((state, step))
        return state, step

    args = run_args(inputs, tmp_path / "run", (1, 1, 8))
    crash(args)
    monkeypatch.setattr(sharded.RunFolder, "start", watched)
    shape = (2, 2, 2)
    sharded.main(run_args(inputs, tmp_path / "run", shape, resume=True))
    ((state, step),) = restored
    assert step == 3
    for x in jax.tree.leaves(state.params):
        assert len(x.sharding.device_set) == 8


def test_overwrite_and_a_finished_run(runs, inputs, tmp_path, capsys):
    """--overwrite takes the checkpoint away with the rest; --resume has nothing left to do."""
    shape, run = (1, 8, 1), tmp_path / "run"
    sharded.main(run_args(inputs, run, shape, seed=2, steps=4))
    (run / "old.txt").write_text("of the run before")
    sharded.main(run_args(inputs, run, shape, overwrite=True))
    assert metrics_of(run) == metrics_of(runs(shape)) and not (run / "old.txt").exists()
    assert [path.name for path in (run / "checkpoint").iterdir()] == ["6"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sharded.main(run_args(inputs, run, (8, 1, 1), resume=True))
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == "" and "finished" in out and out.count("\n") == 1


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (8, 2, 1), (0, 1, 1), (8, 1, 0), (-1, -1, 1)], ids=str
)
def test_a_mesh_that_does_not_fit_the_devices(shape, inputs, tmp_path, error_line):
    message = error_line(sharded.main, run_args(inputs, tmp_path / "run", shape))
    assert "8 devices" in message and str(shape) in message
    assert all(flag in message for flag in ("--data", "--fsdp", "--tensor"))


@pytest.mark.parametrize("axis", range(3))
def test_one_axis_takes_what_the_others_leave(axis):
    shape = [2, 2, 2]
    shape[axis] = -1
    assert dict(sharded.make_mesh(*shape).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_rows_that_cannot_be_split(inputs, tmp_path, error_line):
    def refused(shape, **changes):
        return error_line(sharded.main, run_args(inputs, tmp_path / "run", shape, **changes))

    message = refused((8, 1, 1), num_generations=4)  # 4 prompts
    assert "'data': 8" in message and "4 prompts of a step" in message and "into 8" in message
    message = refused((2, 4, 1), micro_batch_size=4)
    assert "'fsdp': 4" in message and "4 sequences of --micro-batch-size" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [3, 11])
def test_held_out_prompts_need_not_divide(count, inputs, tmp_path):
    """They are sampled again from the first on until the devices have the same number each."""
    rows = [{"prompt": "abcdef"[: 2 + i % 5], "row": i} for i in range(count)]
    path = str(write_jsonl(tmp_path / "held_out.jsonl", rows))
    changes = {"eval_dataset": path, "steps": 1}
    runs = [tmp_path / "sharded", tmp_path / "grpo"]
    sharded.main(run_args(inputs, runs[0], (4, 2, 1), **changes))
    grpo.main(run_args(inputs, runs[1], **changes))
    for row, expected in zip(*map(metrics_of, runs)):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert len(samples_of(runs[0])) == len(samples_of(runs[1])) == 2 * min(count, 8)


def test_heads_that_cannot_be_split(inputs, tmp_path, error_line):
    config, params = sharded.load_model(inputs / "lm")
    config = dataclasses.replace(config, n_head=4)
    halves = params["h.0"]["attn"]["c_attn"]
    halves = {name: x.reshape(*x.shape[:-2], 4, D // 4) for name, x in halves.items()}
    params["h.0"]["attn"]["c_attn"] = halves
    sharded.save_model(tmp_path / "lm", config, params, inputs / "lm")
    args = run_args(inputs, tmp_path / "run", (1, 1, 8), model=str(tmp_path / "lm"))
    message = error_line(sharded.main, args)
    assert "'tensor': 8" in message and "4 heads of the model into 8" in message


def test_processes_without_a_coordinator(inputs, tmp_path, error_line):
    for flags in ({"num_processes": 2}, {"process_id": 0}):
        message = error_line(sharded.main, run_args(inputs, tmp_path / "run", (8, 1, 1), **flags))
        assert "--num-processes" in message and "without --coordinator" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "coordinator", ["127.0.0.1", "here:", ":1234", "host:port", "host:99999", "Auto"]
)
def test_a_coordinator_that_is_no_address(coordinator, error_line):
    message = error_line(sharded.join_processes, coordinator, 2, 1, 1)
    assert f"--coordinator {coordinator} is neither host:port nor auto" in message


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_coordinator_that_does_not_answer(host, error_line):
    coordinator = f"{host}:{free_port()}"
    message = error_line(sharded.join_processes, coordinator, 2, 1, 1)
    assert f"no coordinator answers at {coordinator}" in message


# ------------------------------------------------------------------------------ two processes

many_processes = pytest.mark.skipif(OLD_JAX, reason="many processes need a newer JAX")
# rewards.py's function again; it notes which rows a process is given, and in the process and at
# the call that stand in a file beside it (process, call, how) it fails.
RECORDING = """
import json, os, pathlib, signal
import jax

FOLDER = pathlib.Path(__file__).parent

def ascii(prompts, completions, row, **_):
    process, notes = jax.process_index(), FOLDER / f"{jax.process_index()}.jsonl"
    with open(notes, "a") as file:
        file.write(json.dumps(row) + "\\n")
    if (FOLDER / "failure.json").exists():
        which, call, how = json.loads((FOLDER / "failure.json").read_text())
        if process == which and len(notes.read_text().splitlines()) == call:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("only here")
    return [sum(letter.isascii() for letter in text) / 4 for text in completions]
"""


def environment(devices):
    """Of a started process: so many devices, and what else is set here."""
    return os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


class TwoProcesses:
    """Starts sharded.py twice, four devices each."""

    def __init__(self, inputs, folder):
        self.inputs, self.folder = inputs, folder
        (folder / "rewards.py").write_text(RECORDING)

    def args(self, shape, **changes):
        reward = (f"{self.folder / 'rewards.py'}:ascii",)
        return run_args(self.inputs, self.folder / "run", shape, reward=reward, **changes)

    def __call__(self, shape, **changes):
        """[(status, standard output, standard error)] of the two, which end within a minute."""
        port, started, first = free_port(), [], None
        for i in range(2):
            place = {"coordinator": f"127.0.0.1:{port}", "num_processes": 2, "process_id": i}
            line = command(sharded, self.args(shape, **place, **changes))
            with self.log(i, "out").open("w") as out, self.log(i, "err").open("w") as err:
                process = subprocess.Popen(line, env=environment(4), stdout=out, stderr=err)
            started.append(process)
        begin = time.monotonic()
        try:
            while running := [x for x in started if x.poll() is None]:
                if len(running) == 1:
                    first = first or time.monotonic()
                    assert time.monotonic() < first + 60
                assert time.monotonic() < begin + 300
                time.sleep(0.1)
        finally:
            for process in started:
                process.kill()
        texts = [[self.log(i, name).read_text("utf-8") for name in ("out", "err")] for i in (0, 1)]
        return [(process.returncode, *text) for process, text in zip(started, texts)]

    def log(self, process, name):
        return self.folder / f"{process}.{name}"

    def rows(self, process):
        """The rows that the reward function was given, call by call."""
        lines = (self.folder / f"{process}.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def two_processes(inputs, tmp_path):
    return TwoProcesses(inputs, tmp_path)


GLOO = "Gloo Rank is connected to peer ranks Expected number of"


def words_of(text):
    """The words of what a process prints, less those by which Gloo reports its connections.

    (It carries what processes send each other on CPUs; its threads break into each other's lines.)
    """
    return [word for word in re.findall(r"[^\W\d_]+", text) if word not in GLOO.split()]


@many_processes
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8)], ids=str)
def test_two_processes_are_one(shape, runs, two_processes):
    """On a folder with a run, which they replace; each scores its own half of the rows, also where
    both have all of them on their devices."""
    run = two_processes.folder / "run"
    shutil.copytree(runs((1, 8, 1)), run)
    (run / "old.txt").write_text("of the run before")
    (status, out, err), (other_status, other_out, other_err) = two_processes(shape, overwrite=True)
    assert (status, other_status) == (0, 0), (err, other_err)
    assert_same_numbers(run, runs(shape))
    assert "step 6" in out and words_of(other_out) == words_of(other_err) == []
    names = {path.name for path in run.iterdir() if not path.name.startswith("events.out.")}
    assert names == {"args.json", "metrics.jsonl", "samples.jsonl", "checkpoint", "model"}
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    calls = list(zip(two_processes.rows(0), two_processes.rows(1)))
    assert len(calls) == 6 + 3  # rollouts, evaluations
    for rows, others in calls:
        assert len(rows) == len(others) and not set(rows) & set(others)
        assert len(set(rows) | set(others)) == 8


@many_processes
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(victim, runs, two_processes):
    """It is killed in step 4; where process 0 is killed, another mesh of one process goes on."""
    shape, run = (2, 2, 2), two_processes.folder / "run"
    failure = two_processes.folder / "failure.json"
    failure.write_text(json.dumps([victim, 6, "killed"]))
    ends = two_processes(shape)
    assert ends[victim][0] == -signal.SIGKILL and ends[1 - victim][0] not in (0, None)
    assert not (run / "model").exists() and metrics_of(run)[-1]["step"] == 3
    failure.unlink()
    if victim == 0:
        sharded.main(two_processes.args((1, 8, 1), resume=True))
    else:
        assert [status for status, _, _ in two_processes(shape, resume=True)] == [0, 0]
    assert_same_numbers(run, runs(shape))


@many_processes
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_reward_function_that_fails_in_one_process_ends_both(victim, two_processes):
    failure = two_processes.folder / "failure.json"
    failure.write_text(json.dumps([victim, 2, "raises"]))
    ends = two_processes((2, 2, 2))
    assert all(status for status, _, _ in ends)
    assert "RuntimeError: only here" in ends[victim][2] and "error: " in ends[victim][2]


BAD_COORDINATORS = {  # flags, and a part of the line by which they are refused
    "nothing found": (["--coordinator", "auto"], "--coordinator auto"),
    "no process id": (["--coordinator", "HERE", "--num-processes", "2"], "--coordinator 127"),
    "port in use": (
        ["--coordinator", "HERE", "--num-processes", "2", "--process-id", "0"],
        "process 0 cannot listen at 127",
    ),
}


@many_processes
@pytest.mark.parametrize("case", BAD_COORDINATORS)
def test_a_coordinator_that_cannot_be(case, inputs, tmp_path):
    flags, words = BAD_COORDINATORS[case]
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = case == "port in use"
        here = f"127.0.0.1:{server.getsockname()[1] if taken else free_port()}"
        line = command(sharded, run_args(inputs, tmp_path / "run", (2, 2, 2)))
        line += [here if flag == "HERE" else flag for flag in flags]
        result = subprocess.run(
            line, env=environment(8), capture_output=True, text=True, timeout=60
        )
    assert result.returncode == 2, result.stderr
    lines = [x for x in result.stderr.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and words in lines[0]
    assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()
