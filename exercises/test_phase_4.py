"""Phase 4, the reward model: what your reward.py does."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from course import both, expect

import reward

RNG = np.random.default_rng(0)
CONFIG = reward.GPT2Config(vocab_size=17, n_positions=16, n_embd=8, n_layer=1, n_head=2)
ARGS = reward.Args(batch_size=4, micro_batch_size=4, center_coef=0.1)


class Trunk(nn.Module):
    config: reward.GPT2Config

    @nn.compact
    def __call__(self, tokens, mask):
        return reward.trunk(self.config, tokens, mask)[0]


@pytest.fixture(scope="module")
def params():
    one = np.ones((1, 1), int)
    params = jax.jit(Trunk(CONFIG).init)(jax.random.key(0), one, one)["params"]
    params = jax.tree.map(lambda x: np.asarray(x) + RNG.normal(0, 0.3, x.shape), params)
    return params | {"score": {"kernel": RNG.normal(0, 0.5, (8, 1))}}


def hidden_states(params, tokens, mask):
    params = {name: x for name, x in params.items() if name != "score"}
    return np.asarray(jax.jit(Trunk(CONFIG).apply)({"params": params}, tokens, mask))


def test_4_1_head(params):
    tokens, mask = RNG.integers(0, 17, (2, 6)), np.ones((2, 6), int)
    try:
        scores = jax.jit(reward.RewardModel(CONFIG).apply)({"params": params}, tokens, mask)
    except Exception as error:
        hint = 'the head is one layer named "score" with a kernel alone, without a bias'
        assert "ScopeParamNotFound" not in type(error).__name__, f"{hint}: {error}"
        raise
    assert scores.shape == (2, 6), f"one score for each position, [B, T], found {scores.shape}"
    wanted = (hidden_states(params, tokens, mask) @ params["score"]["kernel"])[..., 0]
    hint = "a score is the product of a position's vector with \"score\"'s weights, without a bias"
    expect(scores, wanted, hint, tolerance=1e-4)


def test_4_1_start_of_the_head():
    config = dataclasses.replace(CONFIG, n_embd=256)
    one = np.ones((1, 1), int)
    made = jax.jit(reward.RewardModel(config).init)(jax.random.key(0), one, one)["params"]
    assert set(made["score"]) == {"kernel"}, "the layer named score has weights, and no bias"
    found, wanted = float(made["score"]["kernel"].std()), 257**-0.5
    hint = f"its weights start with a standard deviation of 1 / sqrt(D + 1) = {wanted:.4f}"
    assert abs(found / wanted - 1) < 0.15, f"{hint}, found {found:.4f}"


def test_4_1_last_real_token():
    scores = np.arange(12.0).reshape(2, 6)
    full = np.ones((2, 6), int)
    found = reward.sequence_scores(scores, full)
    assert found.shape == (2,), f"one score for each row, [B], found {found.shape}"
    expect(found, [5, 11], "without padding the last token is the last column")
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    found = reward.sequence_scores(scores, mask)
    expect(found, [2, 10], "padded on the right: the last column whose mask is 1")
    mask = np.array([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    hint = "padded on the left: the index is not the mask's sum less 1"
    expect(reward.sequence_scores(scores, mask), [5, 11], hint)
    mask = np.array([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]])
    hint = "padded on both sides, as a sampled text is: the last column whose mask is 1"
    expect(reward.sequence_scores(scores, mask), [3, 10], hint)


CHOSEN = np.array([1.0, -0.5, 2.0], np.float32)
REJECTED = np.array([0.0, 0.5, 1.5], np.float32)


def test_4_2_value():
    loss, _ = both(reward.preference_loss(CHOSEN, REJECTED))
    swapped = np.mean(np.log1p(np.exp(CHOSEN - REJECTED)))
    assert abs(loss - swapped) > 1e-4, "this rewards the rejected one: chosen minus rejected"
    hint = "the mean of -log sigmoid(chosen - rejected)"
    expect(loss, np.mean(np.log1p(np.exp(REJECTED - CHOSEN))), hint)
    equal, _ = reward.preference_loss(CHOSEN, CHOSEN)
    expect(equal, np.log(2), "equal scores: the loss is log 2")


def test_4_2_margin():
    margin = np.array([0.5, 0.0, 1.0], np.float32)
    loss, _ = reward.preference_loss(CHOSEN, REJECTED, margin)
    wanted = np.mean(np.log1p(np.exp(-(CHOSEN - REJECTED - margin))))
    expect(loss, wanted, "a margin is taken off the difference: chosen must be ahead by it")


def test_4_2_center():
    loss, _ = reward.preference_loss(CHOSEN, REJECTED, center_coef=0.1)
    plain, _ = reward.preference_loss(CHOSEN, REJECTED)
    wanted = 0.1 * np.mean((CHOSEN + REJECTED) ** 2)
    expect(loss - plain, wanted, "center_coef adds center_coef * mean((chosen + rejected)^2)")


def test_4_2_far_apart():
    def loss(chosen):
        return reward.preference_loss(chosen, np.array([200.0], np.float32))[0]

    value, grad = jax.value_and_grad(loss)(np.array([0.0], np.float32))
    hint = "a difference of -200 has a loss of 200: jax.nn.log_sigmoid, not log(sigmoid)"
    expect(value, 200.0, hint)
    expect(grad, [-1.0], hint)


def test_4_2_gradients():
    def loss(chosen, rejected):
        return reward.preference_loss(chosen, rejected, center_coef=0.1)[0]

    share = 1 / (1 + np.exp(CHOSEN - REJECTED))  # d(-log sigmoid(x)) / dx = -sigmoid(-x)
    level = 0.2 * (CHOSEN + REJECTED)
    grads = jax.grad(loss, argnums=(0, 1))(CHOSEN, REJECTED)
    hint = "both scores are learned, by both terms: no stop_gradient; wrong is that of"
    expect(grads[0], (level - share) / 3, f"{hint} chosen")
    expect(grads[1], (level + share) / 3, f"{hint} rejected")


def test_4_2_metrics():
    margin = np.array([0.5, 0.0, 1.0], np.float32)
    loss, metrics = reward.preference_loss(CHOSEN, REJECTED, margin, center_coef=0.1)
    assert "loss" in metrics, "metrics lack loss"
    expect(metrics["loss"], loss, 'metrics["loss"] is all of the loss, with the centre term')
    wanted = {"rewards/chosen": CHOSEN.mean(), "rewards/rejected": REJECTED.mean()}
    wanted |= {"rewards/accuracies": 2 / 3, "rewards/margins": (CHOSEN - REJECTED).mean()}
    for name, value in wanted.items():
        assert name in metrics, f"metrics lack {name}"
        hint = f"{name} is a mean over the pairs, of the scores themselves: without the margin"
        expect(metrics[name], value, hint)


def random_pairs():
    lengths = np.array([[3, 5], [8, 4], [5, 5], [4, 7]])[..., None]
    tokens = np.where(np.arange(8) < lengths, RNG.integers(1, 17, (4, 2, 8)), 0)
    margin = np.array([0.0, 0.5, 0.0, 1.0], np.float32)
    return {"tokens": tokens, "mask": (np.arange(8) < lengths).astype(int), "margin": margin}


@jax.jit
def wanted_loss(params, batch):
    scores = []
    for i in (0, 1):
        flat = batch["tokens"][:, i], batch["mask"][:, i]
        at = reward.RewardModel(CONFIG).apply({"params": params}, *flat)
        last = flat[1].sum(axis=1) - 1
        scores.append(at[jnp.arange(4), last])
    difference = scores[0] - scores[1] - batch["margin"]
    return -jax.nn.log_sigmoid(difference).mean() + 0.1 * ((scores[0] + scores[1]) ** 2).mean()


def step(params, batch, **flags):
    optimizer = optax.sgd(0.1)
    args = dataclasses.replace(ARGS, **flags)
    state = reward.make_state(params, optimizer)
    return reward.train_step(state, batch, CONFIG, optimizer, args)


def test_4_3_loss_and_metrics(params):
    batch = random_pairs()
    _, metrics = step(params, batch)
    hint = "the loss of the pairs' scores, with batch['margin'] and args.center_coef"
    expect(metrics["loss"], wanted_loss(params, batch), hint, tolerance=1e-4)
    names = {"rewards/accuracies", "rewards/margins", "grad_norm"}
    assert names <= set(metrics), f"metrics lack {names - set(metrics)}"


def test_4_3_update(params):
    batch = random_pairs()
    grads = jax.jit(jax.grad(wanted_loss))(params, batch)
    state, _ = step(params, batch)
    for name, leaf in (("score", "kernel"), ("wte", "embedding")):
        moved = np.asarray(state.params[name][leaf]) - params[name][leaf]
        hint = f"with plain gradient descent {name} moves by -0.1 times its gradient"
        expect(moved, -0.1 * grads[name][leaf], hint, tolerance=1e-4)


def test_4_3_micro_batches(params):
    batch = random_pairs()
    whole, _ = step(params, batch)
    parts, metrics = step(params, batch, micro_batch_size=2)
    hint = "micro-batches of 2 give another result: this loss is a mean over pairs, each counts 1"
    expect(parts.params["score"]["kernel"], whole.params["score"]["kernel"], hint)
    expect(metrics["loss"], wanted_loss(params, batch), hint, tolerance=1e-4)


def test_4_4_normalise():
    kernel, bias = RNG.normal(size=(8, 1)), RNG.normal(size=8)
    params = {"score": {"kernel": kernel}, "ln_f": {"bias": bias, "scale": np.ones(8)}}
    normed = RNG.normal(size=(5, 3, 8)) + RNG.normal(size=(5, 1, 8))  # before ln_f's bias
    scores = ((normed + bias) @ kernel)[..., 0]  # [prompts, samples]
    new, gain, shift = reward.normalise(params, scores)
    within = scores - scores.mean(axis=1, keepdims=True)
    wanted = 1 / np.sqrt((within**2).sum() / (15 - 5))
    hint = "gain: 1 / the standard deviation within prompts; found that of all scores together"
    assert abs(gain - 1 / scores.std()) > 1e-3, hint
    hint = "gain: the squares are divided by their number less one for each prompt"
    expect(gain, wanted, hint)
    hint = "shift brings the mean of gain * scores to 0"
    expect(gain * scores.mean() + shift, 0.0, hint)
    expect(params["score"]["kernel"], kernel, "do not change the tree that you were given")
    found = ((normed + new["ln_f"]["bias"]) @ new["score"]["kernel"])[..., 0]
    hint = "the new weights must give gain * score + shift: scale score, and move ln_f's bias"
    expect(found, gain * scores + shift, hint, tolerance=1e-4)
    expect(new["ln_f"]["scale"], np.ones(8), "ln_f's scale stays")
