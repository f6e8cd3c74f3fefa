"""mixed_precision.py: the loss scale, what is computed in half, and float16 without a scale."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from test_runs import make_inputs, metrics_of, run_and_resume, small_args, train

import gpt2
import mixed_precision
import sft
from benchmarks import mixed_precision as benchmark

EOS = 7
CONFIG = mixed_precision.GPT2Config(
    vocab_size=24, n_positions=32, n_embd=32, n_layer=1, n_head=2, initializer_range=0.2
)
ARGS = mixed_precision.Args(micro_batch_size=4, warmup_steps=2, growth_interval=3)
ADAM, _ = mixed_precision.make_optimizer(ARGS, 100)  # one object: what is compiled for it is kept
SGD = optax.sgd(1.0)


def in_dtype(dtype):
    return dataclasses.replace(CONFIG, dtype=dtype)


@functools.cache
def parameters():
    one = jnp.ones((1, 1), jnp.int32)
    return mixed_precision.GPT2(CONFIG).init(jax.random.key(0), one, one)["params"]


@functools.cache
def batch():
    """8 rows of a prompt and a completion, of unequal lengths."""
    rng = np.random.default_rng(0)
    rows = [[rng.integers(8, 24, rng.integers(1, n)).tolist() for n in (6, 13)] for _ in range(8)]
    return mixed_precision.make_batch(rows, 20)


def new_state(loss_scale, optimizer=ADAM, **changes):
    state = mixed_precision.make_state(parameters(), optimizer, loss_scale)
    return state._replace(**changes)


def step(state, dtype="float16", optimizer=ADAM, args=ARGS):
    """(state, metrics) of train_step, which gives the buffers of the state away: here a copy's."""
    state = jax.tree.map(jnp.copy, state)
    state, metrics = mixed_precision.train_step(state, batch(), in_dtype(dtype), optimizer, args)
    dtypes = {x.dtype for x in jax.tree.leaves(state)}  # half is only computed in
    assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32")}
    return state, jax.device_get(metrics)


def about_to_overflow(state):
    """`state` with the smallest power of two as its scale with which the next step overflows."""
    scale = 2.0**24
    while step(state._replace(loss_scale=jnp.float32(scale)))[1]["skipped_steps"]:
        scale /= 2
    assert 2.0**8 < scale < 2.0**24
    return state._replace(loss_scale=jnp.float32(2 * scale))


def assert_equal(tree, other):
    """To the last bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other)):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes()


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def error(tree, other):
    """Relative, of the whole tree."""
    return np.linalg.norm(flat(tree) - flat(other)) / np.linalg.norm(flat(other))


def gradient(dtype, loss_scale):
    """Of the first step: what SGD with a learning rate of 1 takes away."""
    state, metrics = step(new_state(loss_scale, SGD), dtype, SGD)
    assert metrics["skipped_steps"] == 0
    return jax.tree.map(jnp.subtract, parameters(), state.params)


# ------------------------------------------------------------------------------ the loss scale


def test_an_overflow_halves_the_scale_and_skips_one_step():
    state, _ = step(new_state(4.0))  # so that the optimizer's moments and count are not 0
    before = about_to_overflow(state)._replace(good_steps=jnp.int32(2))
    scale = before.loss_scale
    state, metrics = step(before)
    assert_equal(state[:2], before[:2])  # parameters; moments and counts
    assert (state.loss_scale, state.good_steps, state.skipped_steps) == (scale / 2, 0, 1)
    assert (metrics["loss_scale"], metrics["skipped_steps"]) == (scale, 1)
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["grad_norm"] == 0

    after, metrics = step(state)
    assert (after.loss_scale, after.good_steps, after.skipped_steps) == (scale / 2, 1, 1)
    assert metrics["grad_norm"] > 0
    # As if the step had not been: the same as from the state before, with the lower scale.
    other, _ = step(before._replace(loss_scale=scale / 2))
    assert_equal(after[:2], other[:2])
    counts = [x for x in jax.tree.leaves(after.opt_state) if x.dtype == jnp.int32]
    assert [int(count) for count in counts] == [2, 2]  # Adam's and the schedule's
    assert error(after.params, before[0]) > 1e-4
    # Two steps had been good before; it takes three again until the scale doubles.
    for good_steps, doubled in ((2, scale / 2), (0, scale)):
        after, _ = step(after)
        assert (after.good_steps, after.loss_scale) == (good_steps, doubled)


@pytest.mark.parametrize("value", [1e6, np.nan])
def test_a_step_that_is_not_finite_changes_nothing(value):
    """Also where it is the forward pass, which no scale can help."""
    bias = jnp.zeros(32).at[3].set(value)
    poisoned = parameters() | {"ln_f": {"scale": jnp.ones(32), "bias": bias}}
    state = mixed_precision.make_state(poisoned, ADAM, 8.0)
    before = state
    for skipped in range(1, 6):
        state, metrics = step(state)
        assert_equal(state[:2], before[:2])
        assert metrics["skipped_steps"] == state.skipped_steps == skipped
        assert metrics["loss_scale"] == max(8 / 2 ** (skipped - 1), 1)
        assert not np.isfinite(metrics["loss"])  # this ends a run: RunFolder.log
        # At the lowest scale the gradient's norm is as it is, and would end a run by itself.
        assert np.isfinite(metrics["grad_norm"]) == (metrics["loss_scale"] > 1)
    assert state.loss_scale == 1


def test_the_scale_doubles_after_good_steps_in_a_row():
    state, scales = new_state(8.0), []
    for _ in range(7):
        state, metrics = step(state)
        scales.append(float(metrics["loss_scale"]))
    assert scales == [8, 8, 8, 16, 16, 16, 32]  # growth_interval is 3
    assert (state.loss_scale, state.good_steps, state.skipped_steps) == (32, 1, 0)


@pytest.mark.parametrize("dtype, given", [("float32", 2.0**24), ("float16", np.inf)])
def test_the_scale_has_an_upper_bound(dtype, given):
    """It does not double beyond; and an absurd one comes down to it, and from there by halves."""
    state, metrics = step(new_state(given, good_steps=jnp.int32(2)), dtype)
    skipped = given == np.inf
    assert (metrics["loss_scale"], metrics["skipped_steps"]) == (given, skipped)
    assert (state.loss_scale, state.good_steps) == (2**24, 0)
    state, metrics = step(state, dtype)
    assert state.loss_scale == (2**23 if skipped else 2**24)
    assert np.isfinite(metrics["loss"]) and (metrics["grad_norm"] == 0) == skipped


# ------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=["adam", "sgd"])
def test_in_float32_the_scale_changes_nothing(optimizer):
    """Powers of two are exact. sft.train_step is another program, which XLA may round otherwise.

    Adam makes as much of the rounding in a gradient that is 0 (the keys' biases) as of others: they
    are left out.
    """

    def without_keys(params):
        def zero(path, x):
            biases = [p.key for p in path][-2:] == ["c_attn", "bias"]  # [3, H, D / H]
            return x.at[1].set(0) if biases else x

        return jax.tree_util.tree_map_with_path(zero, params)

    reference = sft.make_state(parameters(), optimizer)
    config = sft.GPT2Config(**dataclasses.asdict(CONFIG))
    scaled, unscaled = new_state(2.0**16, optimizer), new_state(1.0, optimizer)
    never = dataclasses.replace(ARGS, growth_interval=1000)
    for _ in range(3):
        reference, reference_metrics = sft.train_step(
            reference, batch(), config, optimizer, sft.Args(micro_batch_size=4)
        )
        unscaled, _ = step(unscaled, "float32", optimizer, never)
        scaled, metrics = step(scaled, "float32", optimizer, never)
        assert_equal(scaled[:2], unscaled[:2])
        off = error(without_keys(scaled.params), without_keys(reference.params))
        assert off < (1e-4 if optimizer is ADAM else 1e-6)
        for name, value in reference_metrics.items():
            assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
    assert error(scaled.params, parameters()) > 1e-3


def test_in_half_the_scale_changes_nothing_where_nothing_underflows():
    """Powers of two are exact in half, too; in float16 only subnormal numbers are rounded more."""
    exact = gradient("float32", 1.0)
    for dtype, low, high, bound in (("float16", 10, 12, 2e-3), ("bfloat16", 0, 12, 2e-2)):
        found = gradient(dtype, 2.0**low)
        assert_equal(found, gradient(dtype, 2.0**high))
        assert bound / 10 < error(found, exact) < bound  # it is half precision, and no worse
    assert 5e-5 < error(gradient("float16", 1.0), gradient("float16", 2.0**12)) < 2e-3


def test_micro_batches_in_half_equal_the_whole_batch():
    """Gradients of micro-batches are added up in float32."""
    results = []
    for size in (8, 1):
        args = dataclasses.replace(ARGS, micro_batch_size=size)
        results.append(step(new_state(2.0**10, SGD), "float16", SGD, args)[0])
    whole, parts = (jax.tree.map(jnp.subtract, parameters(), x.params) for x in results)
    assert error(parts, whole) < 1e-3


def equations(jaxpr):
    """All of a jaxpr's equations, those of its inner functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def forward_jaxpr(dtype, backward=False):
    def loss(params):
        logits = mixed_precision.GPT2(in_dtype(dtype)).apply({"params": params}, tokens, mask)
        return mixed_precision.cross_entropy_loss(logits[:, :-1], tokens[:, 1:], mask[:, 1:])[0]

    tokens, mask = batch()["tokens"], batch()["mask"]
    return jax.make_jaxpr(jax.grad(loss) if backward else loss)(parameters()).jaxpr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_are_in_half_and_norms_softmax_and_loss_in_float32(dtype):
    found = {}
    for equation in equations(forward_jaxpr(dtype)):
        ins = {str(x.aval.dtype) for x in equation.invars}
        found.setdefault(equation.primitive.name, []).append((ins, equation.outvars[0].aval))
    # q k v, scores, weighted values, c_proj, c_fc, c_proj; then the head. They add up in float32.
    products = found["dot_general"]
    assert len(products) == 7 and all(ins == {dtype} for ins, _ in products)
    assert all(out.dtype == jnp.float32 for _, out in products)
    assert len(found["rsqrt"]) == 3 and len(found["exp"]) == 2  # norms; softmax and logsumexp
    for name in ("rsqrt", "exp", "log", "reduce_sum", "reduce_max", "div", "tanh"):
        for ins, out in found[name]:
            assert dtype not in ins and out.dtype != dtype, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_products_of_the_backward_pass_are_in_half_too(dtype):
    """Two for each of the forward pass; all but attention's own (JAX's rule) take half only."""
    found = equations(forward_jaxpr(dtype, backward=True))
    products = [x for x in found if x.primitive.name == "dot_general"]
    assert len(products) == 3 * 7
    assert all(x.outvars[0].aval.dtype == jnp.float32 for x in products)
    half = [{str(y.aval.dtype) for y in x.invars} == {dtype} for x in products]
    assert half.count(False) == 4


@pytest.mark.parametrize("axis", [0, 1])
def test_half_dot_and_its_gradients_are_those_of_the_rounded_operands(axis):
    """In float16 numbers of few bits are exact: product and gradients equal float64's."""
    rng = np.random.default_rng(axis)
    shape = (6, 2, 3) if axis == 0 else (4, 6)  # a kernel of [D, 2, 3], a table of [V, D]
    x, w = (rng.integers(-8, 9, s) / 8 for s in ((5, 6), shape))
    y, pull = jax.vjp(
        lambda x, w: mixed_precision.half_dot("float16", x, w, axis), jnp.float32(x), jnp.float32(w)
    )
    g = rng.integers(-8, 9, y.shape) / 8
    rest = tuple(i for i in range(w.ndim) if i != axis)
    np.testing.assert_array_equal(y, np.tensordot(x, w, (1, axis)))
    x_gradient, w_gradient = pull(jnp.float32(g))
    np.testing.assert_array_equal(x_gradient, np.tensordot(g, w, (range(1, g.ndim), rest)))
    wanted = np.tensordot(x, g, (0, 0)) if axis == 0 else np.tensordot(g, x, (0, 0))
    np.testing.assert_array_equal(w_gradient, wanted)
    rounded = mixed_precision.half_dot("float16", jnp.float32([[1 + 2**-12]]), jnp.ones((1, 1)), 0)
    assert rounded == 1  # operands are rounded


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_no_bfloat16_where_it_was_not_asked_for(dtype):
    """Metal has none; training, evaluation, sampling and the ratio."""
    config, state = in_dtype(dtype), new_state(8.0)
    calls = (
        lambda: mixed_precision.train_step(state, batch(), config, ADAM, ARGS),
        lambda: mixed_precision.eval_step(state.params, batch(), config),
        lambda: sample(config, 1.0),
    )
    texts = [str(jax.make_jaxpr(call)()) for call in calls]
    assert not any("bf16" in text for text in texts)
    assert [dtype == "float16"] * 3 == ["f16[" in text for text in texts]
    assert "bf16" in str(forward_jaxpr("bfloat16"))


# ------------------------------------------------------------------------------ the log-ratio


def sample(config, temperature, rows=128, eos_id=EOS):
    """(tokens, mask, logprobs) and their log-ratios: prompts of 1 to 4 tokens, 10 new ones."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(8, 24, rng.integers(1, 5)).tolist() for _ in range(rows)]
    prompts = mixed_precision.pad_rows(prompts, 4, left=True)
    sampling = (jax.random.key(0), 10, temperature, eos_id)
    sampled = mixed_precision.generate(parameters(), config, *prompts, *sampling)
    return sampled, mixed_precision.log_ratios(parameters(), config, *sampled, temperature)


def test_log_ratios_by_hand():
    temperature = 0.7
    (tokens, mask, logprobs), ratios = sample(in_dtype("float16"), temperature)
    assert (np.asarray(mask)[:, 4:].sum(axis=1) < 10).any()  # rows that ended
    apply = jax.jit(mixed_precision.GPT2(CONFIG).apply)
    expected = []
    for row, kept, logprob in zip(np.asarray(tokens), np.asarray(mask) > 0, np.asarray(logprobs)):
        end, length = kept.sum(), kept[4:].sum()  # of the row without padding; of its response
        row = np.pad(row[kept], (0, 14 - end))
        logits = apply({"params": parameters()}, row[None], np.ones((1, 14), np.int32))[0]
        logits = np.asarray(logits, np.float64)[end - length - 1 : end - 1] / temperature
        full = logits[range(length), row[end - length : end]] - np.log(np.exp(logits).sum(axis=1))
        expected.append(logprob[:length].sum() - full.sum())
    np.testing.assert_allclose(ratios, expected, atol=2e-5)
    assert np.std(expected) > 5e-4
    _, ratios = sample(CONFIG, temperature)  # float32
    assert np.abs(ratios).max() < 2e-5


def test_spread_of_the_log_ratio():
    """Published of a 1B model and 10 tokens: 6.6e-6, 4.2e-3, 5.1e-2."""
    spreads, means = [], []
    for dtype in ("float32", "float16", "bfloat16"):
        _, ratios = sample(in_dtype(dtype), 1.0, 512, -1)
        spreads.append(float(ratios.std()))
        means.append(float(jnp.exp(ratios).mean()))
    assert spreads[0] < 1e-5
    assert spreads[1] / spreads[0] > 100
    assert 5 < spreads[2] / spreads[1] < 12  # three bits fewer: 8
    for mean, spread in zip(means, spreads):
        assert abs(mean - 1) < 5 * spread / 512**0.5 + spread**2


# ------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
def test_a_run_that_skips_is_resumed(inputs, tmp_path):
    """Overflows before the checkpoint and after it; the scale grows, too."""
    first = {"loss_scale": 2.0**24, "growth_interval": 2}
    (_, *rows), saved, _ = run_and_resume(mixed_precision, inputs, tmp_path, **first)
    scales, skipped = ([row[name] for row in rows] for name in ("loss_scale", "skipped_steps"))
    assert 1 <= skipped[2] < skipped[-1] < 8  # the checkpoints are of steps 3, 6 and 8
    assert scales[0] == 2**24 and scales[1] == 2**23 and len(set(scales)) > 3
    for row, before in zip(rows, [0, *skipped]):
        assert (row["grad_norm"] == 0) == (row["skipped_steps"] > before)
    assert (saved[".loss_scale"], saved[".skipped_steps"]) == (scales[3], skipped[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, low, high",
    [("float16", 2e-4, 1e-2), ("bfloat16", 2e-3, 1e-1), ("float32", 0, 2e-5)],
)
def test_a_run_logs_the_ratio_and_saves_float32(dtype, low, high, inputs, tmp_path):
    """In float32 it is the run of sft.py."""
    run = train(mixed_precision, inputs, tmp_path / dtype, dtype=dtype)
    rows = metrics_of(run)
    evaluated = [row for row in rows if "eval/loss" in row]
    assert len(evaluated) == 5
    for row in evaluated:
        assert low < row["eval/log_ratio_std"] < high
        assert abs(row["eval/ratio"] - 1) < 3 * high
    assert len((run / "samples.jsonl").read_text("utf-8").splitlines()) == 5 * 8
    tensors = load_file(run / "model" / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {np.dtype("float32")}
    assert json.loads((run / "model" / "config.json").read_text())["dtype"] == "float32"
    if dtype == "float32":
        other = train(sft, inputs, tmp_path / "sft")
        others = metrics_of(other)
        assert len(rows) == len(others) == 9
        for row, expected in zip(rows, others):
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert error(tensors, load_file(other / "model" / "model.safetensors")) < 1e-3


def test_no_bfloat16_on_metal(inputs, tmp_path, monkeypatch, error_line):
    def refused(**changes):
        args = small_args(mixed_precision, inputs, tmp_path / "run", **changes)
        return error_line(mixed_precision.main, args)

    monkeypatch.setattr(jax, "default_backend", lambda: "METAL")
    assert "Metal has no bfloat16" in refused(dtype="bfloat16")
    assert "--growth-interval" in refused(dtype="float16", growth_interval=0)  # looked at later
    message = error_line(gpt2.main, gpt2.Args(prompt=("It is",), dtype="bfloat16"))
    assert "Metal has no bfloat16" in message
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------ underflow


@pytest.fixture(scope="module")
def reviews():
    """(config, parameters, 300 batches of 4096 tokens): benchmarks/mixed_precision.py."""
    return *benchmark.make_model(), benchmark.review_batches(300)


def test_gradients_underflow_in_float16_without_a_scale(reviews):
    """In the residual stream, and more the larger it is; with a scale none."""
    config, params, batches = reviews
    exact = [
        benchmark.gradients(benchmark.enlarge_residual(params, factor), config, batches[0], 1.0)
        for factor in (1, 4096)
    ]
    assert float(exact[0][1]) == pytest.approx(float(exact[1][1]), abs=1e-4)  # one function
    assert error(exact[1][0][1], jax.tree.map(lambda x: x / 4096, exact[0][0][1])) < 0.02
    for factor, zeros, wrong in ((1, (0, 0.005), (0, 0.01)), (4096, (0.1, 1), (0.2, 1))):
        large = benchmark.enlarge_residual(params, factor)
        unscaled = benchmark.underflow(large, config, batches[0], "float16", 1.0)
        scaled = benchmark.underflow(large, config, batches[0], "float16", 65536.0)
        assert zeros[0] <= unscaled[0] <= zeros[1]
        assert wrong[0] <= unscaled[2] <= wrong[1]
        assert scaled[0] < 1e-3 and scaled[2] < 0.005


@pytest.mark.long
def test_float16_follows_float32_where_it_is_scaled(reviews):
    """The same 300 batches; the distance of the curves, each a mean of 20 steps, in nats."""
    config, params, batches = reviews
    params = benchmark.enlarge_residual(params, 4096)
    losses = {
        name: benchmark.smooth(benchmark.train(params, config, *run, batches)[0])
        for name, run in benchmark.RUNS.items()
    }
    exact = losses.pop("float32")
    assert exact[0] > 6 and exact[-1] < 3
    band = {name: np.abs(curve - exact).max() for name, curve in losses.items()}
    assert band["float16, scaled"] < 2e-3
    assert band["bfloat16"] < 2e-2
    assert band["float16, not scaled"] > 1
