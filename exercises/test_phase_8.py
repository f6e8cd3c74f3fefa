"""Phase 8, advanced: what your sharded.py, mixed_precision.py, iterative_dpo.py, evaluate.py do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from course import expect
from jax.sharding import PartitionSpec as Spec

import evaluate
import iterative_dpo
import lora
import mixed_precision
import sharded

RNG = np.random.default_rng(0)


def normal(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def test_8_1_mesh():
    mesh = sharded.make_mesh(2, 1, 4)
    hint = "the axes are data, fsdp, tensor, in this order"
    assert mesh.axis_names == ("data", "fsdp", "tensor"), f"{hint}: {mesh.axis_names}"
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}, f"sizes: {dict(mesh.shape)}"
    assert len({device.id for device in mesh.devices.flat}) == 8, "each device stands there once"
    shape = dict(sharded.make_mesh(-1, 2, 1).shape)
    hint = "-1 is as many as the others leave: 8 devices, fsdp 2, tensor 1 leave data 4"
    assert shape == {"data": 4, "fsdp": 2, "tensor": 1}, f"{hint}; found {shape}"


def test_8_1_mesh_that_does_not_fit():
    try:
        sharded.make_mesh(3, 1, 1)
    except SystemExit:
        return
    except ValueError as error:
        raise AssertionError("end with fail(…), one sentence, not a traceback") from error
    raise AssertionError("8 devices do not make a mesh of 3: call fail(…)")


def specs(tree, **options):
    found = sharded.shardings(tree, sharded.make_mesh(2, 2, 2), **options)
    return jax.tree.map(lambda x: x.spec, found)


TREE = {
    "wte": {"embedding": np.zeros((17, 8))},  # 17 does not divide by 2
    "h.0": {
        "attn": {"c_attn": {"kernel": np.zeros((8, 3, 2, 4)), "bias": np.zeros((3, 2, 4))}},
        "mlp": {"c_fc": {"kernel": np.zeros((8, 32))}},
        "ln_1": {"scale": np.zeros(8)},
    },
}


def padded(spec, length):
    """A spec with a None for each axis that it does not mention."""
    return (*spec, *(None,) * (length - len(spec)))


def check(found, path, wanted, message):
    for name in path:
        found = found[name]
    found = padded(found, len(wanted))
    assert found == wanted, f"{message}: {'.'.join(path)} lies as {found}, wanted {wanted}"


def test_8_1_rules():
    found = specs(TREE)
    attn = ("h.0", "attn", "c_attn")
    check(
        found, (*attn, "kernel"), ("fsdp", None, "tensor", None), "RULES gives the axes, in order"
    )
    check(found, (*attn, "bias"), (None, "tensor", None), "another rule is for the bias")
    check(found, ("h.0", "mlp", "c_fc", "kernel"), ("fsdp", "tensor"), "c_fc has a rule of its own")
    check(found, ("h.0", "ln_1", "scale"), (None,), "no pattern matches: the array stays whole")


def test_8_1_sizes_that_do_not_divide():
    found = specs(TREE)
    hint = "even: an axis whose size the mesh's does not divide stays whole, the others do not"
    check(found, ("wte", "embedding"), (None, "fsdp"), hint)
    found = specs(TREE, even=False)
    hint = "even=False: the axis is split although it does not divide"
    check(found, ("wte", "embedding"), ("tensor", "fsdp"), hint)


def test_8_1_without():
    found = specs(TREE, without="fsdp")
    hint = 'without="fsdp": that axis is whole, and only that one'
    check(found, ("h.0", "mlp", "c_fc", "kernel"), (None, "tensor"), hint)


def test_8_1_placed():
    mesh = sharded.make_mesh(1, 4, 2)
    tree = {"c_fc": {"kernel": np.zeros((8, 32), np.float32)}}
    placed = jax.device_put(tree, sharded.shardings(tree, mesh))
    shape = placed["c_fc"]["kernel"].addressable_shards[0].data.shape
    hint = "fsdp 4 and tensor 2 leave [8 / 4, 32 / 2] on each device"
    assert shape == (2, 16), f"{hint}; found {shape}"
    assert placed["c_fc"]["kernel"].sharding.spec == Spec("fsdp", "tensor"), hint


CONFIG = mixed_precision.GPT2Config(vocab_size=17, n_positions=16, n_embd=8, n_layer=1, n_head=2)
ARGS = mixed_precision.Args(batch_size=4, micro_batch_size=4, dtype="float32", growth_interval=3)


def scaling(scale, good_steps):
    return mixed_precision.TrainState({}, (), jnp.float32(scale), jnp.int32(good_steps), 0)


@pytest.mark.parametrize(
    ("scale", "good", "finite", "wanted", "hint"),
    [
        (8.0, 0, True, (8.0, 1), "a good step counts up, and the scale stays"),
        (8.0, 2, True, (16.0, 0), "at growth_interval the scale doubles and the count starts anew"),
        (8.0, 2, False, (4.0, 0), "a step that was not finite halves the scale, the count is 0"),
        (1.0, 0, False, (1.0, 0), "the scale never falls below 1"),
        (2.0**24, 2, True, (2.0**24, 0), "the scale never rises above 2^24"),
    ],
)
def test_8_2_scale(scale, good, finite, wanted, hint):
    found = mixed_precision.next_loss_scale(scaling(scale, good), jnp.bool_(finite), 3)
    expect(np.array([float(x) for x in found]), np.array(wanted, float), hint)


def test_8_2_scale_under_jit():
    f = jax.jit(lambda state, ok: mixed_precision.next_loss_scale(state, ok, 3))
    expect(f(scaling(8.0, 2), False)[0], 4.0, "it must work under jit: jnp.where, no if")


@pytest.fixture(scope="module")
def case():
    one = np.ones((1, 1), int)
    params = jax.jit(mixed_precision.GPT2(CONFIG).init)(jax.random.key(0), one, one)["params"]
    params = jax.tree.map(lambda x: np.asarray(x) + normal(*x.shape, scale=0.2), params)
    lengths = np.array([[3], [8], [5], [4]])
    mask = (np.arange(8) < lengths).astype(int)
    batch = {"tokens": RNG.integers(1, 17, (4, 8)) * mask, "mask": mask}
    return params, batch | {"loss_mask": mask * (np.arange(8) >= 2)}


def step(case, loss_scale, optimizer):
    params, batch = case
    state = mixed_precision.make_state(params, optimizer, loss_scale)
    return mixed_precision.train_step(state, batch, CONFIG, optimizer, ARGS)


def wanted_loss(params, batch):
    logits = mixed_precision.GPT2(CONFIG).apply({"params": params}, batch["tokens"], batch["mask"])
    logprobs = jax.nn.log_softmax(logits)[:, :-1]
    chosen = jnp.take_along_axis(logprobs, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(chosen * batch["loss_mask"][:, 1:]) / batch["loss_mask"][:, 1:].sum()


def test_8_2_the_scale_cancels(case):
    params, batch = case
    loss, grads = jax.jit(jax.value_and_grad(wanted_loss))(params, batch)
    state, metrics = step(case, 1024.0, optax.sgd(0.1))
    moved = np.asarray(state.params["wte"]["embedding"]) - params["wte"]["embedding"]
    hint = "the parameters move by -0.1 times the loss's own gradient: divide by the scale"
    expect(moved, -0.1 * grads["wte"]["embedding"], hint, tolerance=1e-4)
    expect(metrics["loss"], loss, 'metrics["loss"] is the loss, not scaled', tolerance=1e-4)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads)))
    expect(metrics["grad_norm"], norm, "grad_norm is that of the unscaled gradients", 1e-3)
    expect(metrics["loss_scale"], 1024.0, "loss_scale is the one that this step used")
    expect(state.good_steps, 1, "the new state has next_loss_scale's good_steps")


def test_8_2_a_skipped_step(case):
    params, _ = case
    optimizer = optax.adam(1e-3)
    state, metrics = step(case, np.inf, optimizer)  # no gradient is finite
    table = state.params["wte"]["embedding"]
    hint = "after an overflow the parameters stay as they were: jnp.where(finite, new, old)"
    assert np.isfinite(table).all(), hint
    expect(table, params["wte"]["embedding"], hint)
    moments = jax.tree.leaves(state.opt_state)
    hint = "the optimizer's state is kept, too: moments with inf in them would never recover"
    assert all(np.isfinite(x).all() and not np.any(x) for x in moments), hint
    expect(state.skipped_steps, 1, "skipped_steps counts it")
    expect(metrics["skipped_steps"], 1, 'metrics["skipped_steps"] counts this step')
    hint = "the scale is halved, within 2^24"
    expect(state.loss_scale, 2.0**24, hint)


def rollout(tokens, response_mask):
    tokens, response_mask = np.array(tokens), np.array(response_mask)
    logprobs = np.zeros(response_mask.shape, np.float32)
    ended = np.ones(len(tokens), bool)
    return iterative_dpo.Rollout(tokens, tokens > 0, response_mask, logprobs, logprobs, ended)


PROMPTS = [({"prompt": "a"}, [[1, 2]]), ({"prompt": "b"}, [[3]])]
SAMPLED = rollout(
    [
        [1, 2, 10, 11, 0],
        [1, 2, 12, 0, 0],
        [1, 2, 13, 14, 15],
        [0, 3, 20, 0, 0],
        [0, 3, 21, 22, 0],
        [0, 3, 23, 24, 25],
    ],
    [[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]],
)


def test_8_3_best_and_worst():
    rng = np.random.default_rng(0)
    scores = np.float32([0.1, 0.9, 0.5, 3.0, 1.0, 2.0])
    rows, ties = iterative_dpo.make_pairs(PROMPTS, SAMPLED, scores, "best-worst", rng)
    hint = "the chosen answer is the one with the highest score: [prompt, chosen, rejected]"
    assert rows[0][1] != [10, 11], hint
    hint = "an answer's ids are those with response_mask 1, without padding"
    assert all(0 not in ids for row in rows for ids in row), f"{hint}; found {rows}"
    wanted = [[[1, 2], [12], [10, 11]], [[3], [20], [21, 22]]]
    hint = "[prompt, best, worst] of each group of 3 samples"
    assert [list(map(list, row)) for row in rows] == wanted, f"{hint}: {rows}, wanted {wanted}"
    expect(ties, 0.0, "no prompt has equal scores")


def test_8_3_ties_and_no_score():
    rng = np.random.default_rng(0)
    scores = np.float32([0.1, np.nan, 0.5, 1.0, 1.0, 1.0])
    rows, ties = iterative_dpo.make_pairs(PROMPTS, SAMPLED, scores, "best-worst", rng)
    hint = "a score of NaN is neither best nor worst: -inf to find the best, +inf for the worst"
    assert list(map(list, rows[0])) == [[1, 2], [13, 14, 15], [10, 11]], f"{hint}; found {rows[0]}"
    expect(ties, 0.5, "one of two prompts has all scores equal")


def test_8_3_a_drawn_label():
    two = rollout(SAMPLED.tokens[[0, 1]], SAMPLED.response_mask[[0, 1]])
    first = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        scores = np.float32([1.0, 0.0])
        (row,), _ = iterative_dpo.make_pairs(PROMPTS[:1], two, scores, "sampled", rng)
        assert sorted(map(len, row[1:])) == [1, 2], "the two answers, one chosen, one rejected"
        first += list(row[1]) == [10, 11]
    share, wanted = first / 400, 1 / (1 + np.exp(-1.0))
    hint = "the first, one point ahead, wins with probability sigmoid(1) = 0.73"
    assert abs(share - wanted) < 0.08, f"{hint}; found {share:.2f} over 400 draws"


def test_8_3_a_drawn_label_without_score():
    two = rollout(SAMPLED.tokens[[0, 1]], SAMPLED.response_mask[[0, 1]])
    scores = np.float32([1.0, np.nan])
    rng = np.random.default_rng(0)
    (row,), _ = iterative_dpo.make_pairs(PROMPTS[:1], two, scores, "sampled", rng)
    hint = "without both scores there is nothing to learn: the first answer twice"
    assert list(row[1]) == list(row[2]) == [10, 11], f"{hint}; found {row}"


def test_8_4_two_outcomes():
    rewards = np.array([[0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    found = evaluate.frontier(rewards, np.array([np.inf, 0.5]))
    assert found.shape == (2, 2, 2), f"[2 + others, betas, prompts] = (2, 2, 2): {found.shape}"
    expect(found[0, 0], [0, 0], "beta = infinity is the reference itself: KL 0")
    expect(found[1, 0], [0.25, 0.5], "beta = infinity: the mean reward of the samples")
    for prompt, share in ((0, 0.25), (1, 0.5)):
        best = share * np.exp(2.0) / (share * np.exp(2.0) + 1 - share)  # the weight of reward 1
        hint = "the mean reward under weights exp(r / beta), which sum to 1 within each prompt"
        expect(found[1, 1, prompt], best, hint)
        kl = best * np.log(best / share) + (1 - best) * np.log((1 - best) / (1 - share))
        hint = "KL: the weighted mean of log(N * weight), since each sample had 1 / N before"
        expect(found[0, 1, prompt], kl, hint)


def test_8_4_others_and_small_beta():
    rewards, gold = RNG.normal(size=(3, 6)), RNG.normal(size=(3, 6))
    found = evaluate.frontier(rewards, np.array([1e-4]), gold)
    hint = "beta = 0.0001 takes the best sample of each prompt: subtract the largest before exp"
    assert np.isfinite(found).all(), hint
    expect(found[1, 0], rewards.max(axis=1), hint)
    expect(found[0, 0], np.full(3, np.log(6)), "one sample of 6: a KL of log 6")
    best = gold[np.arange(3), rewards.argmax(axis=1)]
    expect(found[2, 0], best, "others are weighted alike: by rewards, not by themselves")


LORA = lora.Args(lora_rank=2, lora_alpha=6, rslora=False)


def random_layer():
    """(params of a layer [4] -> [3, 2], an adapter of it, x)."""
    params = {"c_attn": {"kernel": normal(4, 3, 2), "bias": normal(3, 2)}}
    adapter = {"lora_A": {"kernel": normal(4, 2)}, "lora_B": {"kernel": normal(2, 3, 2)}}
    return params, {"c_attn": adapter}, normal(5, 4)


def adapted(scale, params, adapter):
    a, b = (adapter["c_attn"][name]["kernel"] for name in ("lora_A", "lora_B"))
    return params["c_attn"]["kernel"] + scale * np.tensordot(a, b, 1)


def test_8_5_attach():
    params, adapter, _ = random_layer()
    found = lora.attach(params, adapter, LORA)["c_attn"]
    assert set(found) == {"kernel", "bias", "lora_A", "lora_B"}, f"both trees in one: {set(found)}"
    expect(found["kernel"], params["c_attn"]["kernel"], "the layer's own weights stay")
    a, b = (adapter["c_attn"][name]["kernel"] for name in ("lora_A", "lora_B"))
    hint = "A is multiplied by alpha / r, 6 / 2, and B is not"
    expect(found["lora_A"]["kernel"], 3 * a, hint)
    expect(found["lora_B"]["kernel"], b, hint)
    root = lora.attach(params, adapter, dataclasses.replace(LORA, rslora=True))
    expect(root["c_attn"]["lora_A"]["kernel"], 6 / 2**0.5 * a, "rslora: alpha / sqrt(r)")


def test_8_5_layer():
    params, adapter, x = random_layer()
    layer = lora.LoRADense((3, 2))
    kernel, bias = params["c_attn"]["kernel"], params["c_attn"]["bias"]
    plain = layer.apply({"params": params["c_attn"]}, x)
    expect(plain, np.tensordot(x, kernel, 1) + bias, "without A and B it is a plain layer")
    both = layer.apply({"params": params["c_attn"] | adapter["c_attn"]}, x)
    wanted = np.tensordot(x, adapted(1.0, params, adapter), 1) + bias
    expect(both, wanted, "with A and B: x A B more, without a bias of their own", tolerance=1e-4)


def test_8_5_merge():
    params, adapter, _ = random_layer()
    before = params["c_attn"]["kernel"].copy()
    found = lora.merge(params, adapter, LORA)["c_attn"]
    assert set(found) == {"kernel", "bias"}, f"a plain tree, without A and B: {set(found)}"
    hint = "W + (alpha / r) A B"
    expect(found["kernel"], adapted(3.0, params, adapter), hint, tolerance=1e-4)
    expect(params["c_attn"]["kernel"], before, "do not change the tree that you were given")
