"""What bounds memory changes no number: logits in blocks, rollouts and scoring in parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_invariants import CONFIG, EOS, P, R, assert_equal, policy, random_rows, sample

import dpo
import gpt2
import grpo
import iterative_dpo
import mixed_precision
import ppo
import sft

# 2 * 500 tokens of GPT-2's vocabulary: logits of 201 MB, two blocks.
LARGE = gpt2.GPT2Config(n_positions=512, n_embd=8, n_layer=1, n_head=2)
LOGITS = 2 * 500 * LARGE.vocab_size * 4  # bytes


@functools.cache
def large():
    """(parameters, tokens, mask, targets) of LARGE; one row ends early."""
    one = jnp.ones((1, 1), jnp.int32)
    params = jax.jit(gpt2.GPT2(LARGE).init)(jax.random.key(0), one, one)["params"]
    tokens = np.random.default_rng(0).integers(0, LARGE.vocab_size, (2, 501))
    mask = np.arange(501) < np.array([[501], [333]])
    return params, tokens[:, :-1], mask[:, :-1].astype(np.int32), tokens[:, 1:]


def whole(read, params, tokens, mask, *arrays):
    """What read says of all logits at once."""
    return read(gpt2.GPT2(LARGE).apply({"params": params}, tokens, mask), *arrays)


def in_blocks(read, params, tokens, mask, *arrays):
    return gpt2.GPT2(LARGE).apply({"params": params}, tokens, mask, read=(read, *arrays))


def entropies_and_logprobs(logits, targets):
    return ppo.token_entropies(logits), gpt2.token_logprobs(logits, targets)


def test_logits_in_blocks_give_the_same_values_and_gradients():
    """Of log-probabilities and entropies; the last block is not full."""
    params, tokens, mask, targets = large()
    weights = np.random.default_rng(1).normal(size=(2, *targets.shape)).astype(np.float32)

    def total(how, params):
        found = how(entropies_and_logprobs, params, tokens, mask, targets)
        assert found[0].shape == found[1].shape == targets.shape
        return sum(jnp.sum(w * x) for w, x in zip(weights, found)), found

    results = []
    for how in (whole, in_blocks):
        step = jax.jit(jax.value_and_grad(functools.partial(total, how), has_aux=True))
        compiled = step.lower(params).compile()
        results.append((compiled(params), compiled.memory_analysis().temp_size_in_bytes))
    ((_, expected), gradient), most = results[0]
    ((_, found), own_gradient), least = results[1]
    for x, y in zip(found, expected):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=2e-6)
    for x, y in zip(jax.tree.leaves(own_gradient), jax.tree.leaves(gradient)):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * float(jnp.abs(y).max()))
    assert least < most - LOGITS / 2, (least, most)  # a block is two thirds of them


@pytest.mark.parametrize("script", [sft, mixed_precision], ids=lambda script: script.__name__)
def test_the_loss_read_token_by_token_is_the_loss_of_all(script):
    """cross_entropy_loss of each token, then their mean, against all tokens at once."""
    rows = [*random_rows(8, 5, 12), []]
    batch = script.make_batch(rows, 20)
    model = script.GPT2(script.GPT2Config(**vars(CONFIG)))
    logits = model.apply({"params": policy()}, batch["tokens"], batch["mask"])[:, :-1]
    rest = batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]
    loss, metrics = script.cross_entropy_loss(logits, *rest)
    own_loss, own_metrics = script.batch_loss(policy(), model.config, batch)
    assert own_loss == pytest.approx(float(loss), rel=1e-6)
    assert own_metrics.keys() == metrics.keys() and metrics["mean_token_accuracy"] > 0
    for name, value in metrics.items():
        assert own_metrics[name] == pytest.approx(float(value), rel=1e-6), name


@pytest.mark.parametrize(
    "step", ["sft", "dpo", "ppo", "grpo", "iterative_dpo", "mixed_precision", "policy_logprobs"]
)
def test_no_step_holds_all_logits(step):
    """The working memory that XLA plans is smaller than the logits of the micro-batch alone.

    The model is so small that little else is in it: 16 rows of 256 tokens have 823 MB of logits.
    """
    rows, length = 16, 256
    script = {"policy_logprobs": ppo}.get(step) or globals()[step]
    config = script.GPT2Config(**vars(LARGE))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    reals = jax.ShapeDtypeStruct((rows, length // 2), jnp.float32)
    params, *_ = large()
    optimizer = optax.sgd(0.1)
    sizes = {"batch_size": rows, "micro_batch_size": rows}
    if step == "policy_logprobs":
        lowered = ppo.policy_logprobs.lower(params, config, ids, ids, length // 2, 1.0)
    elif script in (sft, mixed_precision):
        batch = dict.fromkeys(["tokens", "mask", "loss_mask"], ids)
        more = (1.0,) if script is mixed_precision else ()
        state = script.make_state(params, optimizer, *more)
        lowered = script.train_step.lower(state, batch, config, optimizer, script.Args(**sizes))
    elif script in (dpo, iterative_dpo):
        sizes = {"batch_size": rows // 2, "micro_batch_size": rows // 2}
        pairs = jax.ShapeDtypeStruct((rows // 2, 2, length), jnp.int32)
        batch = dict.fromkeys(["tokens", "mask", "response_mask"], pairs)
        batch["ref_logprobs"] = jax.ShapeDtypeStruct((rows // 2, 2), jnp.float32)
        state = script.make_state(params, optimizer)
        lowered = script.train_step.lower(state, batch, config, optimizer, script.Args(**sizes))
    else:
        names = ["logprobs", "ref_logprobs", "response_mask", "values", "advantages", "returns"]
        batch = {"tokens": ids, "mask": ids} | dict.fromkeys(names, reals)
        args = script.Args(**sizes, num_minibatches=1, epochs=1)
        if script is grpo:
            batch["advantages"] = jax.ShapeDtypeStruct((rows,), jnp.float32)
            state, models = script.make_state(params, optimizer, False), config
        else:
            critic = {name: x for name, x in params.items()} | {
                "score": {"kernel": jnp.zeros((config.n_embd, 1))}
            }
            state = script.make_state({"policy": params, "critic": critic}, optimizer, 0.1)
            models = (config, config)
        rest = (jax.random.key(0), models, optimizer, args)
        lowered = script.train_step.lower(state, batch, *rest)
    response = length if script in (sft, dpo, iterative_dpo, mixed_precision) else length // 2
    logits = rows * response * config.vocab_size * 4
    most = 4 * 2**27 + 2**26  # a block of 128 MB: logits, their exponentials, their gradient
    assert most < logits * (2 if response < length else 1)
    taken = lowered.compile().memory_analysis().temp_size_in_bytes
    assert taken < most, (taken, logits)


def args_of(script, size, **more):
    lengths = {"max_prompt_length": P, "max_completion_length": R}
    return script.Args(rollout_batch_size=size, **lengths, **more)


class Tokenizer:
    """As much of one as decode_responses asks for."""

    def token_byte_values(self):
        return []

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.mark.parametrize("script", [ppo, grpo, dpo, iterative_dpo], ids=lambda x: x.__name__)
@pytest.mark.parametrize("size", [None, 4, 6, 100])
def test_rollouts_in_parts(script, size):
    """Seven prompts, two samples each; 4 and 6 completions are parts that 14 does not fill."""
    prompts = [({"prompt": "", "number": i}, row) for i, row in enumerate(random_rows(7, P))]
    config = dataclasses.replace(CONFIG, eos_token_id=EOS)
    models = (policy(), policy(1), config, Tokenizer(), prompts)
    key = jax.random.key(3)
    sampled, rows, texts = script.rollout(*models, 2, key=key, args=args_of(script, size))
    assert len(rows) == len(texts) == len(sampled.tokens) == 14
    assert [row["number"] for row in rows] == [i for i in range(7) for _ in range(2)]
    expected, expected_mask = ppo.pad_rows([ids[0] for _, ids in prompts], P, left=True)
    np.testing.assert_array_equal(sampled.tokens[:, :P], np.repeat(expected, 2, axis=0))
    np.testing.assert_array_equal(sampled.mask[:, :P], np.repeat(expected_mask, 2, axis=0))
    rest = (config, sampled.tokens, sampled.mask, P, 1.0)
    for params, logprobs in ((policy(), sampled.logprobs), (policy(1), sampled.ref_logprobs)):
        again = ppo.policy_logprobs(params, *rest) * sampled.response_mask
        np.testing.assert_allclose(logprobs * sampled.response_mask, again, atol=1e-5)
    completions = {tuple(x) for x in np.asarray(sampled.tokens[:, P:]).tolist()}
    assert len(completions) > 7  # no part repeats another's random numbers


@pytest.mark.parametrize("size", [1, 4, 16])
def test_ppo_scores_in_parts(size):
    """The critic's values, and all that comes of them, are those of one forward pass."""
    sampled, scores = sample()
    critic = dict(policy(), score={"kernel": jnp.ones((CONFIG.n_embd, 1))})
    state = ppo.make_state({"policy": policy(), "critic": critic}, optax.sgd(0.1), 0.1)
    rest = (state, sampled, scores, CONFIG)
    expected, _ = ppo.make_experience(*rest, args_of(ppo, None))
    found, _ = ppo.make_experience(*rest, args_of(ppo, size))
    assert np.abs(np.asarray(expected["values"])).max() > 0.1
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), found, expected)


@pytest.mark.parametrize("size", [None, 3, 5, 16, 99])
def test_in_parts(size):
    """Rows in order, each once, whatever does not divide; a part has at most `size` of them."""
    seen = []

    def double_each(x, y):
        seen.append(len(x))
        return jnp.repeat(x + y, 2, axis=0), jnp.repeat(y, 2, axis=0)

    x, y = np.arange(16.0), np.arange(16.0) ** 2
    found = ppo.in_parts(double_each, size, x, y)
    assert_equal(found, (np.repeat(x + y, 2), np.repeat(y, 2)))
    assert set(seen) == {min(size or 16, 16)}
