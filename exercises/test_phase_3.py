"""Phase 3, supervised fine-tuning: what your sft.py does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from course import both, expect

import sft

RNG = np.random.default_rng(0)
CONFIG = sft.GPT2Config(vocab_size=17, n_positions=16, n_embd=8, n_layer=1, n_head=2)
ARGS = sft.Args(batch_size=4, micro_batch_size=4)


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def random_case():
    """logits [3, 4, 5], targets, mask: rows with 4, 1 and 2 tokens that count."""
    logits = RNG.normal(size=(3, 4, 5)).astype(np.float32)
    targets = RNG.integers(0, 5, (3, 4))
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0]])
    return logits, targets, mask


def test_3_1_value():
    logits, targets, mask = random_case()
    logprobs = log_softmax(logits)
    losses = [-logprobs[b, t, targets[b, t]] for b, t in zip(*np.nonzero(mask))]
    loss, metrics = both(sft.cross_entropy_loss(logits, targets, mask))
    assert np.ndim(loss) == 0, f"the loss is one number, found the shape {np.shape(loss)}"
    assert loss > 0, "a negative log-likelihood is positive: mind the sign"
    rows = [
        np.mean([-logprobs[b, t, targets[b, t]] for t in range(4) if mask[b, t]]) for b in range(3)
    ]
    hint = "this is the mean of the rows' means; the mean is over all tokens that count"
    assert abs(loss - np.mean(rows)) > 1e-4, hint
    hint = "the sum of -log p over the tokens with mask 1, divided by how many they are"
    expect(loss, np.mean(losses), hint)
    expect(metrics["loss"], loss, 'metrics["loss"] is the loss')


def test_3_1_what_is_masked_does_not_count():
    logits, targets, mask = random_case()
    loss, metrics = sft.cross_entropy_loss(logits, targets, mask)
    likeliest = logits.argmax(axis=-1)
    other = np.where(
        mask > 0, targets, np.where(likeliest == targets, (targets + 1) % 5, likeliest)
    )
    changed, changed_metrics = sft.cross_entropy_loss(logits, other, mask)
    expect(changed, loss, "a target with mask 0 changes the loss: multiply by the mask")
    hint = "a target with mask 0 changes the accuracy"
    name = "mean_token_accuracy"
    expect(changed_metrics[name], metrics[name], hint)
    more = (np.pad(x, ((0, 0), (0, 3)) + ((0, 0),) * (x.ndim - 2)) for x in (logits, targets, mask))
    hint = "three more columns of padding change the loss: divide by mask.sum(), not by the size"
    expect(sft.cross_entropy_loss(*more)[0], loss, hint)


def test_3_1_accuracy():
    logits, targets, mask = random_case()
    right = (logits.argmax(axis=-1) == targets)[mask > 0].mean()
    found = sft.cross_entropy_loss(logits, targets, mask)[1]["mean_token_accuracy"]
    expect(found, right, "the share of counted targets that are the likeliest token")


def test_3_1_nothing_counts():
    logits, targets, mask = random_case()
    loss, _ = sft.cross_entropy_loss(logits, targets, 0 * mask)
    expect(loss, 0.0, "where nothing counts the loss is 0, not NaN: divide by at least 1")


@pytest.fixture(scope="module")
def params():
    one = np.ones((1, 1), int)
    params = jax.jit(sft.GPT2(CONFIG).init)(jax.random.key(0), one, one)["params"]
    return jax.tree.map(lambda x: np.asarray(x) + RNG.normal(0, 0.2, x.shape), params)


def random_batch():
    """Four rows of different lengths: prompts of 2 tokens, completions of 1 to 6."""
    lengths = np.array([[3], [8], [5], [4]])
    columns = np.arange(8)
    tokens = np.where(columns < lengths, RNG.integers(1, 17, (4, 8)), 0)
    mask = (columns < lengths).astype(int)
    return {"tokens": tokens, "mask": mask, "loss_mask": mask * (columns >= 2)}


@jax.jit
def wanted_loss(params, batch):
    """The mean of -log p of each completion token: the position before it predicts it."""
    logits = sft.GPT2(CONFIG).apply({"params": params}, batch["tokens"], batch["mask"])
    logprobs = jax.nn.log_softmax(logits)[:, :-1]
    of_next = jnp.take_along_axis(logprobs, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    counted = batch["loss_mask"][:, 1:]
    return -jnp.sum(of_next * counted) / counted.sum()


def step(params, batch, **flags):
    """(what train_step made of params with plain gradient descent, metrics)."""
    optimizer = optax.sgd(0.1)
    args = dataclasses.replace(ARGS, **flags)
    state, metrics = sft.train_step(
        sft.make_state(params, optimizer), batch, CONFIG, optimizer, args
    )
    return state, metrics


def test_3_2_loss(params):
    batch = random_batch()
    _, metrics = step(params, batch)
    shifted = {**batch, "loss_mask": batch["mask"] * (np.arange(8) >= 1)}
    hint = "the prompt's tokens count, too: use batch['loss_mask'], not batch['mask']"
    assert abs(metrics["loss"] - wanted_loss(params, shifted)) > 1e-4, hint
    hint = "logits at t predict the token at t + 1: logits[:, :-1], tokens[:, 1:], loss_mask[:, 1:]"
    expect(metrics["loss"], wanted_loss(params, batch), hint, tolerance=1e-4)


def test_3_2_update(params):
    batch = random_batch()
    grads = jax.jit(jax.grad(wanted_loss))(params, batch)
    state, metrics = step(params, batch)
    moved = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(moved))
    assert largest > 0, "the parameters of the new state are the old ones"
    hint = "with plain gradient descent the parameters move by -0.1 times the loss's gradient"
    wanted = -0.1 * grads["wte"]["embedding"]
    expect(moved["wte"]["embedding"], wanted, hint, tolerance=1e-4)
    hint = 'metrics["grad_norm"] is optax.tree.norm of the gradients'
    assert "grad_norm" in metrics, hint
    squares = sum(np.sum(np.square(x)) for x in jax.tree.leaves(grads))
    expect(metrics["grad_norm"], np.sqrt(squares), hint, tolerance=1e-3)


def test_3_2_micro_batches(params):
    batch = random_batch()
    whole, metrics = step(params, batch)
    parts, part_metrics = step(params, batch, micro_batch_size=2)
    hint = "micro-batches of 2 give another result than the whole batch: counts [B] are the tokens "
    hint += "of each row that count in the loss, as it was shifted; else it is a mean of means"
    expect(part_metrics["loss"], metrics["loss"], hint, tolerance=1e-5)
    one, other = (x.params["wte"]["embedding"] for x in (parts, whole))
    expect(one, other, hint, tolerance=1e-5)


def test_3_2_optimizer_state(params):
    batch, optimizer = random_batch(), optax.adam(1e-3)
    state = sft.make_state(params, optimizer)
    state, _ = sft.train_step(state, batch, CONFIG, optimizer, ARGS)
    count = state.opt_state[0].count
    expect(count, 1, "the optimizer's own state must be updated, too: return the new opt_state")


def test_3_3_metrics_and_count(params):
    batch = random_batch()
    metrics, count = sft.eval_step(params, batch, CONFIG)
    hint = "the loss of held-out completions: shifted as in training, with loss_mask"
    expect(metrics["loss"], wanted_loss(params, batch), hint, tolerance=1e-4)
    hint = "the second result is over how many tokens the loss is a mean"
    expect(count, batch["loss_mask"].sum(), hint)


def test_3_3_first_token(params):
    batch = random_batch()
    batch["loss_mask"] = batch["mask"]  # no prompt: but nothing predicts the first token
    metrics, count = sft.eval_step(params, batch, CONFIG)
    hint = "the first token of a row is predicted by nothing: count the shifted mask"
    expect(count, batch["mask"][:, 1:].sum(), hint)
    shifted = {**batch, "loss_mask": batch["mask"] * (np.arange(8) >= 1)}
    expect(metrics["loss"], wanted_loss(params, shifted), hint, tolerance=1e-4)


def test_3_3_parts_add_up(params):
    batch = random_batch()
    total = count = 0
    for rows in (slice(0, 1), slice(1, 4)):
        metrics, n = sft.eval_step(params, {k: x[rows] for k, x in batch.items()}, CONFIG)
        total, count = total + metrics["loss"] * n, count + n
    hint = "batches of different sizes, each weighted by its count, give the mean over all tokens"
    expect(total / count, wanted_loss(params, batch), hint, tolerance=1e-4)
