"""Phase 7, GRPO: what your grpo.py does."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from course import expect

import grpo

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], np.float32)
B, R = MASK.shape


def normal(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


@pytest.fixture(scope="module")
def sampled():
    """3 samples to each of 4 prompts: (policy, reference, config, prompts, args, the rollout)."""
    tokenizer = grpo.load_tokenizer(Path(grpo.__file__).parent / "data/reviews/tokenizer")
    eos_id = tokenizer.encode_single_token("<|endoftext|>")
    config = grpo.GPT2Config(vocab_size=tokenizer.n_vocab, n_positions=24, n_embd=8, n_layer=1)
    config = dataclasses.replace(config, n_head=2, eos_token_id=eos_id)
    one = np.ones((1, 1), int)
    init = jax.jit(grpo.GPT2(config).init)
    policy, ref = (init(jax.random.key(i), one, one)["params"] for i in (0, 1))
    row = policy["wte"]["embedding"][eos_id]
    policy["ln_f"]["bias"] = 4 * row / jnp.sum(row**2)  # EOS comes soon in some of them
    args = grpo.Args(max_prompt_length=6, max_completion_length=9, temperature=0.8)
    texts = ["Sadly,", "A very good film", "The", "To my delight,"]
    prompts = [({"prompt": x, "id": i}, [tokenizer.encode(x)]) for i, x in enumerate(texts)]
    models = (policy, ref, config, tokenizer)
    result = grpo.rollout(*models, prompts, num_samples=3, key=jax.random.key(0), args=args)
    assert 0 < np.sum(np.asarray(result[0].ended)) < 12, "some samples should end, and some not"
    return policy, ref, config, prompts, args, result


def test_7_1_groups(sampled):
    *_, prompts, args, (rollout, rows, texts) = sampled
    P = args.max_prompt_length
    assert len(rows) == len(texts) == len(rollout.tokens) == 12, "4 prompts of 3 samples make 12"
    hint = "samples stand group by group, and so must the rows: 0 0 0 1 1 1, not 0 1 2 0 1 2"
    expect([row["id"] for row in rows], np.repeat(np.arange(4), 3), hint)
    for (_, (ids,)), tokens in zip(prompts, np.asarray(rollout.tokens)[::3]):
        expect(tokens[P - len(ids) : P], ids, "prompts are padded on the left to max_prompt_length")


def test_7_1_arrays(sampled):
    policy, ref, config, _, args, (rollout, _, _) = sampled
    P = args.max_prompt_length
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    assert rollout.response_mask.dtype == jnp.float32, "response_mask is float32"
    expect(rollout.response_mask, mask[:, P:], "response_mask is mask after the prompt's P columns")
    ended = (tokens[:, P:] == config.eos_token_id).any(axis=1)
    expect(rollout.ended, ended, "a text has ended if EOS is among its response tokens")
    for name, params, found in (
        ("logprobs are those of the policy", policy, rollout.logprobs),
        ("ref_logprobs are those of the reference", ref, rollout.ref_logprobs),
    ):
        wanted = grpo.policy_logprobs(params, config, tokens, mask, P, 0.8) * mask[:, P:]
        hint = f"{name}, at args.temperature"
        expect(found * mask[:, P:], wanted, hint, tolerance=1e-4)


def test_7_1_rows(sampled):
    *_, (rollout, rows, _) = sampled
    for row, tokens, mask in zip(rows, *map(np.asarray, rollout[:2])):
        ids = tokens[6:][mask[6:] > 0].tolist()
        hint = "completion_ids are the response's ids with mask 1, EOS included, as a list"
        assert row.get("completion_ids") == ids, f"{hint}: {row.get('completion_ids')}, not {ids}"


def scores_of(rewards, ended, penalty=0.5):
    """score() of as many texts as `ended` has; rewards: Rewards."""
    n, args = len(ended), grpo.Args(missing_eos_penalty=penalty)
    empty = np.zeros((n, 1), np.float32)
    rollout = grpo.Rollout(empty, empty, empty, empty, empty, np.array(ended))
    rows = [{"prompt": "p", "length": float(i)} for i in range(n)]
    return grpo.score(rollout, rows, [f"text {i}" for i in range(n)], rewards, args)


def length(prompts, completions, length, **_):
    return length


def odd_rows(prompts, completions, length, **_):
    return [x if x % 2 else None for x in length]


def test_7_1_score():
    functions = [("length", length, 2.0), ("odd_rows", odd_rows, 1.0), ("logged", length, 0.0)]
    found = scores_of(grpo.Rewards(functions, None, length), [True] * 4)
    hint = "the sum of weight times score, over the functions that apply (no NaN)"
    expect(found["reward"], [0, 3, 4, 9], hint)
    expect(found["gold/reward"], [0, 1, 2, 3], "gold is logged alone, as gold/reward")
    assert {"rewards/length", "rewards/odd_rows", "rewards/logged"} <= set(found), "rewards/<name>"


def test_7_1_no_score():
    functions = [("odd_rows", odd_rows, 1.0), ("logged", length, 0.0)]
    found = scores_of(grpo.Rewards(functions, None, None), [True] * 4)["reward"]
    hint = "where no function with a weight applies there is no reward: NaN, not 0"
    assert np.isnan(found[[0, 2]]).all(), f"{hint}; found {found}"
    expect(found[[1, 3]], [1, 3], "where one applies, the others add nothing, and no NaN")


def test_7_1_missing_eos():
    functions = [("length", length, 1.0)]
    found = scores_of(grpo.Rewards(functions, None, None), [True, False, True, False])["reward"]
    expect(found, [0, 0.5, 2, 2.5], "a text that has not ended loses missing_eos_penalty")


REWARDS = np.float32([1, 2, 3, 6, 0, 0, 0, 4])


def test_7_2_value():
    found = grpo.group_relative_advantage(REWARDS, 4)
    assert found.shape == (8,), f"the result is [B] again, found {found.shape}"
    groups = REWARDS.reshape(2, 4)
    centered = groups - groups.mean(axis=1, keepdims=True)
    biased = (centered / (groups.std(axis=1, keepdims=True) + 1e-4)).reshape(-1)
    hint = "the standard deviation has Bessel's correction, ddof=1"
    assert not np.allclose(found, biased, atol=1e-3), hint
    whole = (REWARDS - REWARDS.mean()) / REWARDS.std(ddof=1)
    hint = "this compares with the whole batch: mean and deviation are those of each group of 4"
    assert not np.allclose(found, whole, atol=1e-3), hint
    wanted = centered / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    expect(found, wanted.reshape(-1), "(r - mean of its group) / (std of its group + eps)")


def test_7_2_without_scale():
    found = grpo.group_relative_advantage(REWARDS, 4, scale=False)
    expect(found, [-2, -1, 0, 3, -1, -1, -1, 3], "scale=False: r - mean of its group, no division")


def test_7_2_eps():
    found = grpo.group_relative_advantage(REWARDS, 4, eps=1.0)
    groups = REWARDS.reshape(2, 4)
    wanted = groups - groups.mean(axis=1, keepdims=True)
    wanted /= groups.std(axis=1, ddof=1, keepdims=True) + 1
    expect(found, wanted.reshape(-1), "eps is added to the standard deviation, whatever eps is")


def test_7_2_equal_rewards():
    levels = np.repeat(np.float32([0.7, 123.4]), 7)
    found = np.asarray(grpo.group_relative_advantage(levels, 7))
    hint = "equal rewards teach nothing: exactly 0, so subtract the group's maximum before the mean"
    assert (found == 0).all(), f"{hint}; found {found}"


def test_7_2_no_reward():
    rewards = np.float32([1, 3, np.nan, 5, 5, np.nan])
    found = grpo.group_relative_advantage(rewards, 3, scale=False)
    hint = "a reward of NaN gets the advantage 0, and the others' mean is without it: jnp.nanmean"
    expect(found, [-1, 1, 0, 0, 0, 0], hint)
    found = grpo.group_relative_advantage(rewards, 3)
    first = grpo.group_relative_advantage(np.float32([np.nan, 1, 3]), 3, scale=False)
    expect(first, [0, -1, 1], "NaN in the first place: subtract jnp.nanmax, not the first reward")
    wanted = 1 / (np.sqrt(2) + 1e-4)
    expect(found, [-wanted, wanted, 0, 0, 0, 0], "so is their standard deviation: jnp.nanstd")


CASE = [normal(B, R, scale=0.3) for _ in range(3)]  # logprobs, old, reference
ADVANTAGES = np.float32([1.0, -2.0, 0.5, -1.0])


def token_losses(ratio, kl_coef):
    """[B, R]: what each token loses, before any mean."""
    advantages = ADVANTAGES[:, None]
    clipped = np.clip(ratio, 0.8, 1.3)
    d = CASE[2] - CASE[0]
    return np.maximum(-advantages * ratio, -advantages * clipped) + kl_coef * (np.exp(d) - 1 - d)


def loss_of(aggregation="token", ratio_level="token", kl_coef=0.0, case=CASE, mask=MASK, **more):
    return grpo.grpo_loss(
        *case,
        ADVANTAGES,
        mask,
        clip_low=0.2,
        clip_high=0.3,
        kl_coef=kl_coef,
        aggregation=aggregation,
        ratio_level=ratio_level,
        max_length=7,
        **more,
    )


def test_7_3_policy_loss():
    losses = token_losses(np.exp(CASE[0] - CASE[1]), 0.0)
    loss, metrics = loss_of()
    assert np.ndim(loss) == 0, f"the loss is one number, found the shape {np.shape(loss)}"
    hint = "the larger of -A * ratio and -A * clip(ratio, 1 - clip_low, 1 + clip_high), mean over "
    expect(loss, (losses * MASK).sum() / MASK.sum(), f"{hint}all tokens with mask 1")
    expect(metrics["loss/policy_avg"], loss, 'metrics["loss/policy_avg"] is the loss')


def test_7_3_kl():
    d = CASE[2] - CASE[0]
    k3 = ((np.exp(d) - 1 - d) * MASK).sum() / MASK.sum()
    (with_kl, metrics), (without, _) = loss_of(kl_coef=0.5), loss_of()
    backwards = ((np.exp(-d) - 1 + d) * MASK).sum() / MASK.sum()
    hint = "k3 has d = log pi_ref - log pi: here it is the other way around"
    assert abs(metrics["kl"] - backwards) > 1e-5, hint
    expect(metrics["kl"], k3, "kl is the mean of k3 = exp(d) - 1 - d, over mask 1")
    expect(with_kl - without, 0.5 * k3, "kl_coef * k3 is added to each token's loss")
    near = [np.full((B, R), x, np.float32) for x in (0.0, 0.0, 1e-4)]
    found = loss_of(case=near)[1]["kl"]
    hint = "for d = 1e-4 k3 is 5e-9, and exp(d) - 1 - d rounds it away: jnp.expm1"
    assert 4.5e-9 < found < 5.5e-9, f"{hint}; found {found}"


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_7_3_aggregation(aggregation):
    losses = token_losses(np.exp(CASE[0] - CASE[1]), 0.5) * MASK
    wanted = {
        "sequence": np.mean(losses.sum(axis=1) / MASK.sum(axis=1)),
        "token": losses.sum() / MASK.sum(),
        "constant": losses.sum() / (B * 7),
    }
    hints = {
        "sequence": "the mean over sequences of each sequence's own mean",
        "token": "one mean over all tokens",
        "constant": "the sum divided by B * max_length, whatever the lengths are",
    }
    loss, _ = loss_of(aggregation, kl_coef=0.5)
    expect(loss, wanted[aggregation], f'aggregation "{aggregation}": {hints[aggregation]}')


def test_7_3_sequence_ratio():
    mean = ((CASE[0] - CASE[1]) * MASK).sum(axis=1, keepdims=True) / MASK.sum(axis=1, keepdims=True)
    losses = token_losses(np.exp(mean), 0.0) * MASK
    loss, metrics = loss_of("sequence", "sequence")
    hint = (
        'ratio_level "sequence": exp of the mean log ratio of the sequence\'s tokens, for each of '
    )
    expect(loss, np.mean(losses.sum(axis=1) / MASK.sum(axis=1)), f"{hint}them")
    expect(metrics["val/ratio"], (np.exp(mean) * MASK).sum() / MASK.sum(), "the mean of the ratio")


def test_7_3_padding():
    for aggregation in ("sequence", "token", "constant"):
        value, _ = loss_of(aggregation, kl_coef=0.5)
        far = [np.where(MASK > 0, x, y) for x, y in zip(CASE, (500.0, 0.0, 900.0))]
        hint = f'what stands in padding changes the loss (aggregation "{aggregation}"): mask the '
        expect(loss_of(aggregation, kl_coef=0.5, case=far)[0], value, f"{hint}differences")
    silent = MASK * np.float32([[1], [1], [0], [1]])
    loss, _ = loss_of("sequence", mask=silent)
    assert np.isfinite(loss), "a sequence without a token that counts gives NaN: divide by >= 1"


def test_7_3_clip_metrics():
    ratio = np.exp(CASE[0] - CASE[1])
    _, metrics = loss_of()
    low = ((ratio < 0.8) & (ADVANTAGES[:, None] < 0)) * MASK
    high = ((ratio > 1.3) & (ADVANTAGES[:, None] > 0)) * MASK
    for name, clipped in (("low", low), ("high", high)):
        hint = f"clip_ratio/{name}_mean: clipped where the clip binds, given the advantage's sign"
        expect(metrics[f"clip_ratio/{name}_mean"], clipped.sum() / MASK.sum(), hint)
    expect(metrics["policy/clipfrac_avg"], (low + high).sum() / MASK.sum(), "low and high together")


def test_7_4_value():
    found = grpo.leave_one_out_advantage(REWARDS, 4)
    wanted = [r - (REWARDS.reshape(2, 4)[i // 4].sum() - r) / 3 for i, r in enumerate(REWARDS)]
    hint = "r less the mean of the three others in its group"
    expect(found, wanted, hint)


def test_7_4_no_reward():
    rewards = np.float32([1, 3, np.nan, 5, np.nan, np.nan])
    found = grpo.leave_one_out_advantage(rewards, 3)
    hint = "n is the number of rewards that are not NaN, and a reward alone has nothing to compare"
    expect(found, [-2, 2, 0, 0, 0, 0], hint)
