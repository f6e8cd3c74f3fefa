"""Phase 6, DPO: what your dpo.py does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from course import both, expect

import dpo

RNG = np.random.default_rng(0)
CONFIG = dpo.GPT2Config(vocab_size=17, n_positions=16, n_embd=8, n_layer=1, n_head=2)
ARGS = dpo.Args(batch_size=4, micro_batch_size=4, beta=0.5, loss="sigmoid", label_smoothing=0.0)
ARGS = dataclasses.replace(ARGS, nll_coef=0.0)


def normal(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    one = np.ones((1, 1), int)
    params = jax.jit(dpo.GPT2(CONFIG).init)(jax.random.key(0), one, one)["params"]
    return jax.tree.map(lambda x: np.asarray(x) + normal(*x.shape, scale=0.2), params)


def random_pairs():
    """Four pairs: a prompt of 2 tokens, answers of 1 to 6."""
    lengths = np.array([[3, 5], [8, 4], [5, 5], [4, 7]])[..., None]
    columns = np.arange(8)
    mask = (columns < lengths).astype(int)
    tokens = RNG.integers(1, 17, (4, 2, 8))
    tokens[:, :, :2] = tokens[:, :1, :2]
    batch = {"tokens": tokens * mask, "mask": mask, "response_mask": mask * (columns >= 2)}
    return batch | {"ref_logprobs": normal(4, 2) - 10}


@jax.jit
def wanted_logprobs(params, batch):
    """log pi(answer | prompt) [B, 2], chosen and rejected in a pass each."""
    found = []
    for i in (0, 1):
        tokens, mask = batch["tokens"][:, i], batch["mask"][:, i]
        logprobs = jax.nn.log_softmax(dpo.GPT2(CONFIG).apply({"params": params}, tokens, mask))
        of_next = jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        found.append(jnp.sum(of_next * batch["response_mask"][:, i, 1:], axis=1))
    return jnp.stack(found, axis=1)


def test_6_1_sum():
    logprobs = np.float32([[-1, -2, -3, -4], [-1, -1, -1, -1]])
    mask = np.array([[0, 1, 1, 0], [1, 1, 1, 1]])
    found = dpo.response_logprobs(logprobs, mask)
    assert found.shape == (2,), f"one number for each row, [B], found {found.shape}"
    hint = "this is a mean over the tokens: the log-probability of a text is their sum"
    assert not np.allclose(found, [-2.5, -1]), hint
    expect(found, [-5, -4], "the sum over the tokens with mask 1")


def test_6_1_pairs(params):
    batch = random_pairs()
    found = dpo.pair_logprobs(params, batch, CONFIG)
    assert found.shape == (4, 2), f"chosen and rejected of each pair, [B, 2], found {found.shape}"
    wanted = wanted_logprobs(params, batch)
    hint = "chosen first: reshape(-1, 2) keeps the pairs together"
    assert not np.allclose(found, wanted[:, ::-1], atol=1e-4), hint
    everything = batch | {"response_mask": batch["mask"]}
    hint = "the prompt's tokens count, too: use response_mask"
    assert not np.allclose(found, wanted_logprobs(params, everything), atol=1e-4), hint
    hint = "logits[:, :-1] predict tokens[:, 1:], and response_mask[:, 1:] says which count"
    expect(found, wanted, hint, tolerance=1e-4)


PAIRS = [normal(5) for _ in range(4)]  # policy chosen, policy rejected, ref chosen, ref rejected


def margins(beta):
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = PAIRS
    return beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))


def test_6_2_at_the_start():
    logprobs = normal(5), normal(5)
    loss, metrics = both(dpo.dpo_loss(*logprobs, *logprobs, 0.5))
    hint = "policy equal to reference: the loss is log 2, since all implicit rewards are 0"
    expect(loss, np.log(2), hint)
    expect(metrics["rewards/chosen"], 0.0, hint)


def test_6_2_value():
    loss, _ = dpo.dpo_loss(*PAIRS, 0.5)
    wrong = np.mean(np.log1p(np.exp(margins(0.5))))
    assert abs(loss - wrong) > 1e-4, "this favours the rejected answer: mind the sign"
    without = np.mean(np.log1p(np.exp(-0.5 * (PAIRS[0] - PAIRS[1]))))
    assert abs(loss - without) > 1e-4, "the reference takes no part: rewards are beta * log ratios"
    hint = "-log sigmoid(beta * (log ratio of chosen - log ratio of rejected)), mean over pairs"
    expect(loss, np.mean(np.log1p(np.exp(-margins(0.5)))), hint)


def test_6_2_label_smoothing():
    right, wrong = np.log1p(np.exp(-margins(0.5))), np.log1p(np.exp(margins(0.5)))
    loss, _ = dpo.dpo_loss(*PAIRS, 0.5, label_smoothing=0.1)
    hint = "label_smoothing: 0.9 times the loss of the label, 0.1 times that of the opposite one"
    expect(loss, np.mean(0.9 * right + 0.1 * wrong), hint)
    each = np.float32([0.0, 0.1, 0.2, 0.3, 0.4])
    loss, _ = dpo.dpo_loss(*PAIRS, 0.5, label_smoothing=each)
    hint = "label_smoothing may be [B]: weigh each pair before the mean"
    expect(loss, np.mean((1 - each) * right + each * wrong), hint)


def test_6_2_far_apart():
    zero = np.zeros(1, np.float32)
    loss, grad = jax.value_and_grad(lambda x: dpo.dpo_loss(x, zero, zero, zero, 1.0)[0])(zero - 200)
    hint = "a margin of -200 has a loss of 200: jax.nn.log_sigmoid, not log(sigmoid)"
    expect(loss, 200.0, hint)
    expect(grad, [-1.0], hint)
    hint = "a margin of 200: the wrong label's loss is -log_sigmoid(-margin), not log(1 - sigmoid)"
    for smoothing in (0.0, 0.1):
        loss, grad = jax.value_and_grad(
            lambda x, smoothing=smoothing: dpo.dpo_loss(x, zero, zero, zero, 1.0, smoothing)[0]
        )(zero + 200)
        expect(loss, 200 * smoothing, hint)
        expect(grad, [smoothing], hint)


def test_6_2_gradients():
    def loss(chosen, rejected):
        return dpo.dpo_loss(chosen, rejected, *PAIRS[2:], 0.5)[0]

    grads = jax.grad(loss, argnums=(0, 1))(*PAIRS[:2])
    wanted = 0.5 / (1 + np.exp(margins(0.5))) / 5
    hint = "both answers are learned: chosen is pushed up as much as rejected is pushed down"
    expect(grads[0], -wanted, hint)
    expect(grads[1], wanted, hint)


def test_6_2_metrics():
    loss, metrics = dpo.dpo_loss(*PAIRS, 0.5, label_smoothing=0.1)
    assert "loss" in metrics, "metrics lack loss"
    expect(metrics["loss"], loss, 'metrics["loss"] is the loss')
    chosen, rejected = 0.5 * (PAIRS[0] - PAIRS[2]), 0.5 * (PAIRS[1] - PAIRS[3])
    wanted = {"rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()}
    wanted |= {"rewards/accuracies": (chosen > rejected).mean()}
    wanted |= {"rewards/margins": (chosen - rejected).mean()}
    for name, value in wanted.items():
        assert name in metrics, f"metrics lack {name}"
        expect(metrics[name], value, f"{name} is of the implicit rewards, beta * log ratio")


def step(params, batch, **flags):
    optimizer, args = optax.sgd(0.1), dataclasses.replace(ARGS, **flags)
    state = dpo.make_state(params, optimizer)
    return dpo.train_step(state, batch, CONFIG, optimizer, args)


def wanted_loss(params, batch):
    ratios = wanted_logprobs(params, batch) - batch["ref_logprobs"]
    return -jax.nn.log_sigmoid(0.5 * (ratios[:, 0] - ratios[:, 1])).mean()


def test_6_3_update(params):
    batch = random_pairs()
    loss, grads = jax.jit(jax.value_and_grad(wanted_loss))(params, batch)
    state, metrics = step(params, batch)
    expect(metrics["loss"], loss, "the loss of the pairs, with batch['ref_logprobs']", 1e-4)
    moved = np.asarray(state.params["wte"]["embedding"]) - params["wte"]["embedding"]
    hint = "the parameters do not move: take log-probabilities of the params given to loss_fn"
    assert np.abs(moved).max() > 0, hint
    hint = "with plain gradient descent the parameters move by -0.1 times the gradient"
    expect(moved, -0.1 * grads["wte"]["embedding"], hint, tolerance=1e-4)
    assert "grad_norm" in metrics, "metrics lack grad_norm"


def test_6_3_micro_batches(params):
    batch = random_pairs()
    whole, _ = step(params, batch)
    parts, _ = step(params, batch, micro_batch_size=2)
    hint = "micro-batches of 2 give another result: this loss is a mean over pairs, each counts 1"
    one, other = (x.params["wte"]["embedding"] for x in (parts, whole))
    expect(one, other, hint)


def test_6_3_lengths(params):
    batch = random_pairs()
    _, metrics = step(params, batch, loss="ipo")
    lengths = batch["response_mask"].sum(axis=2)
    ratios = (wanted_logprobs(params, batch) - batch["ref_logprobs"]) / lengths
    wanted = np.mean((ratios[:, 0] - ratios[:, 1] - 1) ** 2)  # 1 / (2 beta) = 1
    hint = "--loss ipo divides by the answers' lengths [B, 2]: sum response_mask over its last axis"
    expect(metrics["loss"], wanted, hint, tolerance=1e-4)
