"""Phase 5, PPO: what your ppo.py does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from course import both, expect

import ppo

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], np.float32)
B, R = MASK.shape


def normal(*shape, scale=1.0):
    return (scale * RNG.normal(size=shape)).astype(np.float32)


def masked(x):
    return (x * MASK).sum() / MASK.sum()


def test_5_1_kl():
    logprobs, ref_logprobs = np.float32([[-1.0, -2.0]]), np.float32([[-1.5, -1.0]])
    hint = "log pi - log pi_ref of each token: positive where the policy has made it likelier"
    expect(ppo.compute_kl_divergence(logprobs, ref_logprobs), [[0.5, -1.0]], hint)


def test_5_1_penalty():
    kl = normal(B, R)
    found = ppo.compute_rewards(np.zeros(B, np.float32), kl, MASK, 0.3)
    assert found.shape == (B, R), f"a reward for each token, [B, R], found {found.shape}"
    hint = "with scores of 0 a token's reward is -kl_coef * kl: a penalty"
    expect(found * MASK, -0.3 * kl * MASK, hint)
    hint = "tokens after EOS (mask 0) pay the KL penalty: multiply it by the mask"
    expect(found, -0.3 * kl * MASK, hint)


def test_5_1_score():
    scores = np.float32([2.0, 3.0, 4.0])
    found = ppo.compute_rewards(scores, np.zeros((B, R), np.float32), MASK, 0.3)
    expect(found.sum(axis=1), scores, "a row's score is given once, and without a factor")
    wanted = np.zeros((B, R))
    wanted[[0, 1, 2], [2, 4, 0]] = scores
    hint = "the score stands at the last real token, column mask.sum() - 1 of its row"
    expect(found, wanted, hint)


def gae_by_definition(rewards, values, gamma, lam):
    """A_t = sum over k of (gamma * lam)^k delta_{t+k}, within the real tokens of each row."""
    advantages = np.zeros((B, R))
    for b in range(B):
        length = int(MASK[b].sum())
        for t in range(length):
            for k in range(t, length):
                following = values[b, k + 1] if k + 1 < length else 0.0
                delta = rewards[b, k] + gamma * following - values[b, k]
                advantages[b, t] += (gamma * lam) ** (k - t) * delta
    return advantages


def test_5_2_against_the_definition():
    rewards, values = normal(B, R) * MASK, normal(B, R)
    advantages, _ = ppo.compute_gae(rewards, values, MASK, 0.9, 0.8)
    assert advantages.shape == (B, R), f"advantages are [B, R], found {advantages.shape}"
    wanted = gae_by_definition(rewards, values, 0.9, 0.8)
    hint = (
        "A_t = delta_t + gamma * lam * A_{t+1}, delta_t = r_t + gamma * V_{t+1} - V_t; wrong even"
    )
    expect(advantages[1], wanted[1], f"{hint} in the row without padding")
    hint = "what the critic says of padding counts: multiply values by the mask before you shift"
    expect(advantages * MASK, wanted, hint)
    expect(advantages, wanted, "advantages are 0 where the mask is 0")


def test_5_2_limits():
    rewards, values = normal(B, R) * MASK, normal(B, R)
    advantages, _ = ppo.compute_gae(rewards, values, MASK, 1.0, 1.0)
    to_come = np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
    hint = "gamma = lam = 1: what is still to come, minus the value"
    expect(advantages, (to_come - values) * MASK, hint)
    advantages, _ = ppo.compute_gae(rewards, values, MASK, 0.9, 0.0)
    hint = "lam = 0: one step, r_t + gamma * V_{t+1} - V_t"
    expect(advantages, gae_by_definition(rewards, values, 0.9, 0.0), hint)


def test_5_2_rewards_in_padding():
    rewards, values = normal(B, R), normal(B, R)
    found, _ = ppo.compute_gae(rewards, values, MASK, 0.9, 0.8)
    hint = "a reward in padding reaches real tokens: multiply delta by the mask before the scan"
    expect(found, gae_by_definition(rewards, values, 0.9, 0.8), hint)


def test_5_2_returns():
    rewards, values = normal(B, R) * MASK, normal(B, R)
    _, returns = ppo.compute_gae(rewards, values, MASK, 0.9, 0.8)
    hint = "returns, the critic's targets, are advantages + values, 0 where the mask is 0"
    expect(returns, (gae_by_definition(rewards, values, 0.9, 0.8) + values) * MASK, hint)


def test_5_3_value():
    new, old = normal(B, R, scale=0.5), normal(B, R, scale=0.5)
    advantages = normal(B, R)
    ratio = np.exp(new - old)
    gain = np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    loss, metrics = both(ppo.ppo_policy_loss(new, old, advantages, MASK, 0.2))
    assert np.ndim(loss) == 0, f"the loss is one number, found the shape {np.shape(loss)}"
    assert abs(loss - masked(gain)) > 1e-4, "a loss is minimised: minus the gain"
    assert abs(loss + np.mean(gain * MASK)) > 1e-4, "divide by the mask's sum, not by B * R"
    hint = "minus the mean of the smaller of ratio * A and clip(ratio) * A, over mask 1"
    expect(loss, -masked(gain), hint)
    hint = "clipfrac: how often the clipped loss is the larger one"
    clipped = (np.clip(ratio, 0.8, 1.2) * advantages < ratio * advantages).astype(float)
    expect(metrics["policy/clipfrac_avg"], masked(clipped), hint)
    hint = "policy/approxkl_avg: half the mean square of the log ratio"
    expect(metrics["policy/approxkl_avg"], 0.5 * masked((new - old) ** 2), hint)
    expect(metrics["val/ratio"], masked(ratio), "the mean of the ratio, over mask 1")


def test_5_3_padding():
    new, old, advantages = normal(B, R), normal(B, R), normal(B, R)

    def loss(new):
        return ppo.ppo_policy_loss(new, old, advantages, MASK, 0.2)[0]

    value = loss(new)
    changed = np.where(MASK > 0, new, new + 1)
    expect(loss(changed), value, "a token with mask 0 changes the loss")
    far = np.where(MASK > 0, new, 500.0)
    hint = "large numbers in padding give NaN: multiply the log ratio by the mask before exp"
    expect(loss(far), value, hint)
    assert np.isfinite(jax.grad(loss)(far)).all(), hint


def test_5_3_gradient():
    one = np.ones((1, 1), np.float32)

    def slope(log_ratio, advantage, clip_eps=0.2):
        def loss(x):
            return ppo.ppo_policy_loss(x, 0 * one, advantage * one, one, clip_eps)[0]

        return jax.grad(loss)(log_ratio * one)[0, 0]

    expect(slope(0.0, 1.0), -1.0, "at ratio 1 the loss falls as a good token becomes likelier")
    expect(slope(0.5, 1.0), 0.0, "a good token that is 1.65 times as likely has no more to gain")
    expect(slope(-0.5, -1.0), 0.0, "a bad token that is 0.6 times as likely has no more to gain")
    hint = "a bad token that has become likelier is not clipped: the larger loss of the two counts"
    expect(slope(0.5, -1.0), np.exp(0.5), hint)
    hint = "clip to 1 - clip_eps and 1 + clip_eps, not to fixed numbers"
    expect(slope(0.25, 1.0, clip_eps=0.3), -np.exp(0.25), hint)


def test_5_4_value():
    values, old, returns = normal(B, R), normal(B, R), normal(B, R)
    clipped = np.clip(values, old - 0.2, old + 0.2)
    errors, clipped_errors = (values - returns) ** 2, (clipped - returns) ** 2
    loss, metrics = ppo.value_function_loss(values, old, returns, MASK, 0.2)
    assert abs(loss - masked(np.maximum(errors, clipped_errors))) > 1e-4, "a factor 1/2 is missing"
    hint = (
        "half the masked mean of the larger of two squared errors: of the value, and of the value"
    )
    expect(loss, 0.5 * masked(np.maximum(errors, clipped_errors)), f"{hint} clipped to old ± eps")
    hint = "val/clipfrac_avg: how often the clipped error is the larger one"
    larger = (clipped_errors > errors).astype(float)
    expect(metrics["val/clipfrac_avg"], masked(larger), hint)
    expect(metrics["loss/value_avg"], loss, 'metrics["loss/value_avg"] is the loss')


def test_5_4_gradient():
    one = np.ones((1, 1), np.float32)

    def slope(value, old, returned):
        def loss(x):
            return ppo.value_function_loss(x, old * one, returned * one, one, 0.2)[0]

        return jax.grad(loss)(value * one)[0, 0]

    expect(slope(0.0, 0.0, 1.0), -1.0, "near the old value: the slope of 1/2 (V - G)^2")
    hint = "a value that has moved far enough towards its target moves no further"
    expect(slope(0.5, 0.0, 1.0), 0.0, hint)
    hint = "a value that has moved away from its target is not clipped: the larger error counts"
    expect(slope(-0.5, 0.0, 1.0), -1.5, hint)


CONFIG = ppo.GPT2Config(vocab_size=17, n_positions=16, n_embd=8, n_layer=1, n_head=2)
ARGS = ppo.Args(batch_size=4, micro_batch_size=4, epochs=1, num_minibatches=1, temperature=0.7)
ARGS = dataclasses.replace(ARGS, vf_coef=0.5, entropy_coef=0.1)
P, N = 3, 4


@pytest.fixture(scope="module")
def case():
    """(params, batch): 4 rows of 3 + 5 tokens, with responses of 3, 5, 1 and 4 tokens."""
    one = np.ones((1, 1), int)
    policy = jax.jit(ppo.GPT2(CONFIG).init)(jax.random.key(0), one, one)["params"]
    critic = jax.jit(ppo.RewardModel(CONFIG).init)(jax.random.key(1), one, one)["params"]
    params = {"policy": policy, "critic": critic}
    params = jax.tree.map(lambda x: np.asarray(x) + normal(*x.shape, scale=0.2), params)
    mask = (np.arange(P + R) < P + np.array([[3], [5], [1], [4]])).astype(int)
    tokens = RNG.integers(1, 17, (N, P + R)) * mask
    logprobs = ppo.policy_logprobs(params["policy"], CONFIG, tokens, mask, P, ARGS.temperature)
    batch = {"tokens": tokens, "mask": mask, "logprobs": logprobs * mask[:, P:]}
    batch |= {name: normal(N, R) * mask[:, P:] for name in ("values", "advantages", "returns")}
    return params, {name: jnp.asarray(x) for name, x in batch.items()}


def wanted_loss(params, batch, entropy_coef=ARGS.entropy_coef, temperature=ARGS.temperature):
    tokens, mask = batch["tokens"], batch["mask"]
    logits = ppo.GPT2(CONFIG).apply({"params": params["policy"]}, tokens, mask)
    logits = logits[:, P - 1 : -1] / temperature
    kept, chosen = mask[:, P:].astype(jnp.float32), jax.nn.log_softmax(logits)
    logprobs = jnp.take_along_axis(chosen, tokens[:, P:, None], axis=-1)[..., 0]
    loss, _ = ppo.ppo_policy_loss(logprobs, batch["logprobs"], batch["advantages"], kept, 0.2)
    values = ppo.critic_values(params["critic"], CONFIG, tokens, mask, P)
    critic_loss, _ = ppo.value_function_loss(values, batch["values"], batch["returns"], kept, 0.2)
    entropy = -jnp.sum(jnp.exp(chosen) * chosen, axis=-1)
    return loss + 0.5 * critic_loss - entropy_coef * jnp.sum(entropy * kept) / kept.sum()


def step(case, optimizer=None, **flags):
    params, batch = case
    args, optimizer = dataclasses.replace(ARGS, **flags), optimizer or optax.sgd(0.1)
    state = ppo.make_state(params, optimizer, 0.3)
    configs = (CONFIG, CONFIG)
    return ppo.train_step(state, batch, jax.random.key(0), configs, optimizer, args)


def moved(case, state, part):
    new, old = state.params[part]["wte"]["embedding"], case[0][part]["wte"]["embedding"]
    return np.asarray(new) - old


def test_5_5_gradient_of_the_policy(case):
    params, batch = case
    state, metrics = step(case)
    found = moved(case, state, "policy")

    @jax.jit
    def wanted(entropy_coef, temperature):
        grads = jax.grad(wanted_loss)(params, batch, entropy_coef, temperature)
        return -0.1 * grads["policy"]["wte"]["embedding"]

    for hint, entropy_coef, temperature in (
        ("the entropy's sign: a bonus makes the loss smaller", -0.1, 0.7),
        ("logits / args.temperature is what was sampled from", 0.1, 1.0),
        ("the entropy has no effect: args.entropy_coef", 0.0, 0.7),
    ):
        assert not np.allclose(found, wanted(entropy_coef, temperature), atol=1e-6), hint
    hint = "the policy moves by -0.1 times the gradient of: policy loss + vf_coef * critic's loss "
    hint += "- entropy_coef * entropy"
    expect(found, wanted(0.1, 0.7), hint, tolerance=1e-4)
    expect(metrics["val/ratio"], 1.0, "before the first update the ratio is 1", tolerance=1e-4)


def test_5_5_gradient_of_the_critic(case):
    params, batch = case
    grads = jax.jit(jax.grad(lambda x: wanted_loss(x, batch)))(params)
    state, _ = step(case)
    hint = "the critic moves by -0.1 * vf_coef times its own loss's gradient"
    wanted = -0.1 * grads["critic"]["wte"]["embedding"]
    expect(moved(case, state, "critic"), wanted, hint, tolerance=1e-4)


def test_5_5_micro_batches(case):
    whole, _ = step(case)
    parts, _ = step(case, micro_batch_size=2)
    hint = "micro-batches of 2 give another result: counts are the response tokens of each row"
    expect(moved(case, parts, "policy"), moved(case, whole, "policy"), hint)


def test_5_5_counts_and_metrics(case):
    optimizer = optax.adam(1e-3)
    state, metrics = step(case, optimizer, epochs=3, num_minibatches=2, micro_batch_size=2)
    expect(state.updates, 6, "3 epochs of 2 minibatches are 6 updates: state.updates + 1 in each")
    expect(state.opt_state[0].count, 6, "the optimizer's own state must come along")
    expect(state.kl_coef, 0.3, "kl_coef stays")
    names = {"policy/entropy_avg", "grad_norm", "loss/value_avg", "policy/approxkl_avg"}
    assert names <= set(metrics), f"metrics lack {names - set(metrics)}"
    assert metrics["policy/approxkl_avg"] > 0, "the second update starts from the first's result"


def test_5_5_stops(case):
    state, _ = step(case, epochs=3, stop_kl=-1.0)
    hint = "stop_kl: once approxkl of an update is above it, no more updates follow; return "
    hint += "(state, stopped) as the carry"
    expect(state.updates, 1, hint)


def test_5_6_statistics():
    x = normal(B, R) + 2
    found = np.asarray(ppo.whiten(x, MASK))
    expect(found * (1 - MASK), np.zeros((B, R)), "where the mask is 0 the result is 0")
    kept = x[MASK > 0]
    biased = (x - kept.mean()) / kept.std()
    assert not np.allclose(found * MASK, biased * MASK, atol=1e-5), (
        "the variance is the unbiased one: count - 1 in the place of count"
    )
    hint = "mean 0 and variance 1 over the tokens with mask 1 alone"
    expect(found, (x - kept.mean()) / kept.std(ddof=1) * MASK, hint, tolerance=1e-4)


def test_5_6_keeps_the_mean():
    x = normal(B, R) + 2
    kept = x[MASK > 0]
    found = ppo.whiten(x, MASK, shift_mean=False)
    wanted = ((x - kept.mean()) / kept.std(ddof=1) + kept.mean()) * MASK
    hint = "shift_mean=False: the old mean is added back after the division"
    expect(found, wanted, hint, tolerance=1e-4)
