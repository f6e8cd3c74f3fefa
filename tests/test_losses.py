"""The losses of sft.py, reward.py and ppo.py: golden numbers, closed forms, exact enumeration."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpt2
import ppo
import reward
import sft

GOLDENS = Path(__file__).resolve().parent / "goldens"
ROLLOUTS = [  # name in ppo.npz, gamma, lambda
    ("kl_k1_c0.05_whiten0_g1.0_l0.95", 1.0, 0.95),
    ("kl_k3_c0.05_whiten0_g1.0_l0.95", 1.0, 0.95),
    ("kl_k1_c0.05_whiten1_g1.0_l0.95", 1.0, 0.95),
    ("kl_k1_c0.2_whiten0_g0.97_l0.9", 0.97, 0.9),
    ("kl_k1_c0.0_whiten0_g0.99_l1.0", 0.99, 1.0),
    ("kl_k3_c0.1_whiten1_g0.9_l0.0", 0.9, 0.0),
]
LOSSES = [  # name in ppo.npz, clip_eps of the policy, of the critic
    ("loss_clip0.2_vclip0.2_vf1.0", 0.2, 0.2),
    ("loss_clip0.1_vclip0.5_vf0.5", 0.1, 0.5),
]


def value_and_gradients(loss_fn, *arguments, argnums=0):
    """((loss, metrics), gradients) of one of the losses."""
    return jax.value_and_grad(loss_fn, argnums=argnums, has_aux=True)(*arguments)


def global_norm(tree):
    return np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(tree)))


def close(actual, expected, atol=1e-12):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def tiny():
    """(config, params) of the golden language model."""
    return gpt2.load_model(GOLDENS / "gpt2_tiny")


@pytest.fixture(scope="module")
def tiny_reward():
    """(config, params) of the golden reward model."""
    return reward.load_model(GOLDENS / "gpt2_reward_tiny")


# -------------------------------------------------------------------------------- log-probabilities


def test_token_logprobs_equal_golden(goldens, float64):
    golden = goldens("gpt2_forward")
    logits = jnp.asarray(golden["right_logits_f64"])
    tokens, mask = golden["right_input_ids"], golden["right_attention_mask"]
    logprobs = gpt2.token_logprobs(logits[:, :-1], tokens[:, 1:])
    assert logprobs.dtype == jnp.float64
    close(logprobs * mask[:, 1:], golden["right_token_logps_f64"])


def test_gradient_of_token_logprobs_is_one_hot_minus_softmax(float64):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)) * 4)
    tokens = np.array([[0, 4, 2], [1, 1, 3]])
    gradient = jax.grad(lambda x: gpt2.token_logprobs(x, tokens).sum())(logits)
    exponentials = np.exp(np.asarray(logits))
    softmax = exponentials / exponentials.sum(axis=-1, keepdims=True)
    close(gradient, np.eye(5)[tokens] - softmax)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_token_logprobs_of_half_precision_logits_are_float32(dtype):
    """A log-softmax taken in bfloat16 would be off by some hundredths."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 300)) * 3, dtype)
    tokens = np.array([0, 7, 150, 299])
    logprobs = gpt2.token_logprobs(logits, tokens)
    exact = np.asarray(logits, np.float64)
    expected = exact[np.arange(4), tokens] - np.log(np.exp(exact).sum(axis=-1))
    assert logprobs.dtype == jnp.float32
    close(logprobs, expected, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_policy_logprobs_and_entropy_equal_golden(tiny, goldens, temperature):
    """Left-padded prompts, right-padded responses, the temperature inside the softmax."""
    golden = goldens("token_logps")
    tokens, mask = golden["input_ids"], golden["attention_mask"]
    prompt_length = int(golden["prompt_length"])
    static = (tiny[0], prompt_length, temperature)
    logprobs, entropy = jax.jit(
        lambda params: ppo.policy_logprobs(params, static[0], tokens, mask, *static[1:])
    )(tiny[1])
    response = mask[:, prompt_length:]
    close(logprobs * response, golden[f"logps_t{temperature}"], atol=2e-5)
    close(entropy * response, golden[f"entropy_t{temperature}"], atol=2e-5)


# ------------------------------------------------------------------------------------------ sft.py


def test_cross_entropy_loss_by_hand(float64):
    """Two rows of unequal length: -(ln 1/2 + ln 1/4 + ln 1/8) / 3, and two of three likeliest."""
    probabilities = np.array(
        [[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]], [[0.75, 0.125, 0.125], [0.1, 0.1, 0.8]]]
    )
    targets, mask = np.array([[0, 1], [1, 2]]), np.array([[1, 1], [1, 0]])
    logits = jnp.log(probabilities) + 5.0
    (loss, metrics), gradient = value_and_gradients(sft.cross_entropy_loss, logits, targets, mask)
    close(loss, np.log(2) * (1 + 2 + 3) / 3)
    close(metrics["mean_token_accuracy"], 1 / 3)
    expected = (probabilities - np.eye(3)[targets]) * mask[..., None] / 3
    close(gradient, expected)
    assert not np.asarray(gradient)[1, 1].any()  # masked


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.value_and_grad, has_aux=True)
def cross_entropy_of_a_model(params, config, tokens, mask, loss_mask):
    logits = gpt2.GPT2(config).apply({"params": params}, tokens, mask)
    return sft.cross_entropy_loss(logits[:, :-1], tokens[:, 1:], loss_mask[:, 1:])


@pytest.mark.parametrize("case", ["completion", "full"])
def test_cross_entropy_loss_and_gradients_equal_golden(tiny, goldens, case):
    """With gpt2_tiny: loss, gradients of parameters under their Hugging Face names, their norm."""
    golden = goldens("sft")
    labels = golden["labels" if case == "completion" else "labels_full"]
    (loss, metrics), grads = cross_entropy_of_a_model(
        tiny[1], tiny[0], golden["input_ids"], golden["attention_mask"], labels != -100
    )
    close(loss, golden[f"{case}_loss_f64"], atol=5e-6)
    close(metrics["mean_token_accuracy"], golden[f"{case}_mean_token_accuracy"], atol=1e-6)
    close(global_norm(grads), golden[f"{case}_grad_norm_f64"], atol=5e-5)
    if case == "full":
        return
    attention = grads["h.0"]["attn"]["c_attn"]
    ours = {
        "wpe.weight": grads["wpe"]["embedding"][:8],
        "wte.weight": grads["wte"]["embedding"][::16],
        "h.0.attn.c_attn.weight": attention["kernel"].reshape(64, 192)[:8],
        "h.0.attn.c_attn.bias": attention["bias"].reshape(192),
        "h.0.ln_1.weight": grads["h.0"]["ln_1"]["scale"],
        "h.1.mlp.c_fc.bias": grads["h.1"]["mlp"]["c_fc"]["bias"],
        "h.1.mlp.c_proj.bias": grads["h.1"]["mlp"]["c_proj"]["bias"],
        "ln_f.weight": grads["ln_f"]["scale"],
        "ln_f.bias": grads["ln_f"]["bias"],
    }
    names = {name.split(":transformer.")[1] for name in golden if ":" in name}
    assert names == set(ours)
    for name in names:
        close(ours[name], golden[f"completion_grad:transformer.{name}"], atol=1e-5)


def test_six_steps_of_adamw_equal_golden(tiny, goldens):
    """sft.py's train_step, a row in each micro-batch.

    torch's AdamW decays every parameter, so the optimizer is made here.
    """
    golden = goldens("sft")
    batch = {
        "tokens": golden["input_ids"],
        "mask": golden["attention_mask"],
        "loss_mask": golden["completion_mask"],
    }
    adamw = optax.adamw(1e-3, weight_decay=0.01)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    state, losses, norms = sft.make_state(tiny[1], optimizer), [], []
    for _ in range(6):
        state, metrics = sft.train_step(state, batch, tiny[0], optimizer, 1)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    close(losses, golden["train_losses_f64"], atol=2e-4)
    close(norms, golden["train_grad_norms_f64"], atol=2e-3)
    # Adam divides by the gradient's own size: where that is near 0, float32 shows most.
    close(state.params["ln_f"]["scale"], golden["train_final_ln_f_weight_f64"], atol=1e-4)


# --------------------------------------------------------------------------------------- reward.py


@pytest.mark.parametrize(
    ("case", "with_margin", "center_coef"),
    [
        ("plain", False, 0.0),
        ("margin", True, 0.0),
        ("center", False, 0.01),
        ("margin_center", True, 0.05),
    ],
)
def test_preference_loss_equals_golden(goldens, float64, case, with_margin, center_coef):
    golden = goldens("reward_loss")
    chosen, rejected = (
        jnp.asarray(golden["chosen_rewards"]),
        jnp.asarray(golden["rejected_rewards"]),
    )
    margin = golden["margin"] if with_margin else 0.0
    (loss, metrics), gradients = value_and_gradients(
        reward.preference_loss, chosen, rejected, margin, center_coef, argnums=(0, 1)
    )
    close(loss, golden[f"{case}_loss"])
    close(gradients[0], golden[f"{case}_grad_chosen"])
    close(gradients[1], golden[f"{case}_grad_rejected"])
    close(metrics["rewards/accuracies"], golden[f"{case}_accuracy"], atol=1e-7)
    close(metrics["rewards/chosen"], golden["chosen_rewards"].mean())
    close(metrics["rewards/rejected"], golden["rejected_rewards"].mean())


def test_preference_loss_closed_forms(float64):
    """ln 2 for equal scores; no overflow for scores that lie far apart."""
    scores = jnp.array([1.5, -3.0])
    loss, metrics = reward.preference_loss(scores, scores)
    close(loss, np.log(2))
    assert metrics["rewards/accuracies"] == 0 and metrics["rewards/margins"] == 0
    loss, _ = reward.preference_loss(jnp.array([-900.0]), jnp.array([100.0]))
    close(loss, 1000.0)
    gradient = jax.grad(lambda x: reward.preference_loss(x, jnp.array([100.0]))[0])
    close(gradient(jnp.array([-900.0])), [-1.0])
    close(gradient(jnp.array([1100.0])), [0.0])


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.value_and_grad, has_aux=True)
def preference_loss_of_a_model(params, config, tokens, mask, margin):
    scores = reward.RewardModel(config).apply({"params": params}, tokens, mask)
    scores = reward.sequence_scores(scores, mask)
    return reward.preference_loss(scores[:3], scores[3:], margin)[0], scores


@pytest.mark.parametrize("case", ["model", "model_margin"])
def test_preference_loss_of_a_model_equals_golden(tiny_reward, goldens, case):
    """Loss, scores and gradients with gpt2_reward_tiny, whose rows end at different places."""
    golden = goldens("reward_loss")
    tokens, mask = golden["model_input_ids"], golden["model_attention_mask"]
    margin = golden["model_margin"] * (case == "model_margin")
    (loss, scores), grads = preference_loss_of_a_model(
        tiny_reward[1], tiny_reward[0], tokens, mask, margin
    )
    close(scores, golden["model_rewards_f64"], atol=1e-5)
    close(loss, golden[f"{case}_loss_f64"], atol=1e-5)
    close(grads["score"]["kernel"][:, 0], golden[f"{case}_grad_score_f64"], atol=1e-5)
    np.testing.assert_allclose(global_norm(grads), golden[f"{case}_grad_norm_f64"], rtol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_reward_model_equals_golden(tiny_reward, goldens, side):
    """Row 2 ends in a real token with PAD's id, where Hugging Face reads one token early."""
    golden = goldens("reward_model")
    tokens, mask = golden[f"{side}_input_ids"], golden[f"{side}_attention_mask"]
    apply = jax.jit(lambda p: reward.RewardModel(tiny_reward[0]).apply({"params": p}, tokens, mask))
    scores = apply(tiny_reward[1])
    right_mask = golden["right_attention_mask"] > 0
    expected = golden["right_all_scores_f64"]
    close(np.asarray(scores)[mask > 0], expected[right_mask], atol=2e-5)
    last = expected[np.arange(5), right_mask.sum(axis=1) - 1]
    close(reward.sequence_scores(scores, mask), last, atol=2e-5)
    same = [0, 1, 3, 4]
    close(last[same], golden["right_rewards_f64"][same])
    assert abs(last[2] - golden["right_rewards_f64"][2]) > 0.1


def test_sequence_scores_by_hand():
    scores = jnp.arange(12.0).reshape(3, 4)
    mask = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]])
    close(reward.sequence_scores(scores, mask), [1, 7, 10])


# --------------------------------------------------------------------------- ppo.py: golden numbers


def test_whiten_equals_golden(goldens, float64):
    golden = goldens("ppo")
    x, mask = jnp.asarray(golden["whiten_values"]), golden["whiten_mask"].astype(float)
    for shift_mean, name in ((True, "masked_whiten"), (False, "masked_whiten_noshift")):
        close(ppo.whiten(x, mask, shift_mean) * mask, golden[name] * mask, atol=1e-7)


def test_compute_kl_divergence_equals_golden(goldens, float64):
    golden = goldens("ppo")
    logprobs, ref = golden["logprobs_masked"], golden["ref_logprobs_masked"]
    kl = ppo.compute_kl_divergence(jnp.asarray(logprobs), jnp.asarray(ref))
    close(kl, golden["kl_k1_c0.05_whiten0_g1.0_l0.95/kl"])
    assert np.abs(kl).max() > 0.1


@pytest.mark.parametrize(("case", "gamma", "lam"), ROLLOUTS)
def test_compute_gae_equals_golden(goldens, float64, case, gamma, lam):
    """With TRL's rewards, values and mask, whose rows are one position longer than ours."""
    golden = goldens("ppo")
    rewards, values = golden[f"{case}/rewards"], golden["values_masked"]
    mask = ~golden["padding_mask_p1"] + 0.0
    advantages, returns = ppo.compute_gae(*map(jnp.asarray, (rewards, values, mask)), gamma, lam)
    close(advantages, golden[f"{case}/advantages_raw"], atol=1e-7)
    close(returns, golden[f"{case}/returns"], atol=1e-7)
    policy_mask = ~golden["padding_mask"] + 0.0
    whitened = ppo.whiten(advantages, policy_mask)
    close(whitened, golden[f"{case}/advantages"], atol=1e-7)


def test_whitened_rewards_equal_golden(goldens, float64):
    golden = goldens("ppo")
    rewards = jnp.asarray(golden["kl_k1_c0.05_whiten0_g1.0_l0.95/rewards"])
    mask = ~golden["padding_mask_p1"] + 0.0
    whitened = ppo.whiten(rewards, mask, shift_mean=False)
    close(whitened, golden["kl_k1_c0.05_whiten1_g1.0_l0.95/rewards"], atol=1e-6)


@pytest.mark.parametrize(("case", "clip_eps", "_"), LOSSES)
def test_ppo_policy_loss_equals_golden(goldens, float64, case, clip_eps, _):
    golden = goldens("ppo")
    rollout = golden["kl_k1_c0.05_whiten0_g1.0_l0.95/advantages"]
    mask = ~golden["padding_mask"] + 0.0
    (loss, metrics), gradient = value_and_gradients(
        ppo.ppo_policy_loss,
        jnp.asarray(golden["new_logprobs"]),
        golden["logprobs_masked"],
        rollout,
        mask,
        clip_eps,
    )
    close(loss, golden[f"{case}/pg_loss"])
    close(metrics["loss/policy_avg"], golden[f"{case}/pg_loss"])
    close(gradient, golden[f"{case}/grad_new_logprobs"])
    close(metrics["policy/clipfrac_avg"], golden[f"{case}/pg_clipfrac"], atol=1e-7)
    # TRL's mean runs over padding too, where the difference is 0.
    close(metrics["policy/approxkl_avg"] * mask.mean(), golden[f"{case}/approxkl"])
    close(metrics["val/ratio"], (golden[f"{case}/ratio"] * mask).sum() / mask.sum())


@pytest.mark.parametrize(("case", "_", "clip_eps"), LOSSES)
def test_value_function_loss_equals_golden(goldens, float64, case, _, clip_eps):
    golden = goldens("ppo")
    mask = ~golden["padding_mask_p1"] + 0.0
    (loss, metrics), gradient = value_and_gradients(
        ppo.value_function_loss,
        jnp.asarray(golden["new_values"]),
        golden["values_masked"],
        golden["kl_k1_c0.05_whiten0_g1.0_l0.95/returns"],
        mask,
        clip_eps,
    )
    weight = float(case.rsplit("vf", 1)[1])
    close(loss, golden[f"{case}/vf_loss"], atol=1e-7)
    close(metrics["loss/value_avg"], golden[f"{case}/vf_loss"], atol=1e-7)
    close(weight * gradient, golden[f"{case}/grad_new_values"], atol=1e-7)
    close(metrics["val/clipfrac_avg"], golden[f"{case}/vf_clipfrac"], atol=1e-7)


# ----------------------------------------------------------------------------- ppo.py: closed forms


@pytest.fixture
def rollout(float64):
    """rewards, values [4, 6] and a mask with rows of 6, 4, 1 and 3 tokens; padding is not 0."""
    rng = np.random.default_rng(1)
    lengths = np.array([6, 4, 1, 3])
    mask = (np.arange(6) < lengths[:, None]).astype(float)
    return rng.normal(size=(4, 6)), rng.normal(size=(4, 6)), mask, lengths


@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (0.9, 1.0), (1, 1)]
)
def test_gae_equals_its_definition(rollout, gamma, lam):
    """A_t is the sum over l of (gamma * lambda)^l * delta_(t + l): eq. 16 of the paper, O(T^2)."""
    rewards, values, mask, lengths = rollout
    advantages, returns = ppo.compute_gae(*map(jnp.asarray, (rewards, values, mask)), gamma, lam)
    expected = np.zeros((4, 6))
    for row, length in enumerate(lengths):
        v = [*values[row, :length], 0.0]  # nothing is left to be earned after the last token
        delta = [rewards[row, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[row, t] = sum((gamma * lam) ** i * delta[t + i] for i in range(length - t))
    close(advantages, expected)
    close(returns, expected + values * mask)


def test_gae_with_lambda_one_and_zero(rollout):
    """lambda = 1: discounted return minus value; lambda = 0: the one-step error."""
    rewards, values, mask, lengths = rollout
    arrays = tuple(map(jnp.asarray, (rewards, values, mask)))
    _, returns = ppo.compute_gae(*arrays, 0.9, 1.0)
    advantages, _ = ppo.compute_gae(*arrays, 0.9, 0.0)
    for row, length in enumerate(lengths):
        for t in range(length):
            discounted = sum(0.9**i * rewards[row, t + i] for i in range(length - t))
            close(returns[row, t], discounted)
            bootstrap = 0.9 * values[row, t + 1] if t + 1 < length else 0.0
            close(advantages[row, t], rewards[row, t] + bootstrap - values[row, t])
    assert not np.asarray(advantages)[mask == 0].any() and not np.asarray(returns)[mask == 0].any()


def test_the_score_is_paid_at_the_last_real_token(float64):
    """At EOS; at the last position where a row was cut off; KL is charged at every real token."""
    mask = jnp.asarray(np.arange(4) < np.array([2, 4, 1])[:, None]) + 0.0
    scores, kl = jnp.array([3.0, -2.0, 5.0]), jnp.full((3, 4), 0.5)
    rewards = ppo.compute_rewards(scores, kl, mask, 0.1)
    kl_only = [[-0.05, -0.05, 0, 0], [-0.05] * 4, [-0.05, 0, 0, 0]]
    paid = np.array([[0, 3, 0, 0], [0, 0, 0, -2], [5, 0, 0, 0]])
    close(rewards, np.array(kl_only) + paid)
    advantages, _ = ppo.compute_gae(rewards, jnp.zeros((3, 4)), mask, 1.0, 1.0)
    close(advantages[:, 0], [3 - 0.1, -2 - 0.2, 5 - 0.05])  # score minus KL of the whole sequence


def test_whiten_has_mean_0_and_unbiased_variance_1(rollout):
    x, _, mask, _ = rollout
    x = 3.0 + 2.0 * x
    for shift_mean in (True, False):
        white = np.asarray(ppo.whiten(jnp.asarray(x), mask, shift_mean))
        real = white[mask > 0]
        close(real.mean(), 0.0 if shift_mean else x[mask > 0].mean())
        close(real.var(ddof=1), 1.0, atol=1e-7)
        assert not white[mask == 0].any()
        order = np.argsort(x[mask > 0])
        assert (np.diff(real[order]) > 0).all()


def test_ppo_policy_loss_at_the_old_policy(rollout):
    """Ratio 1, nothing clipped, the loss -mean(A), its gradient -A / count: plain REINFORCE."""
    advantages, logprobs, mask, _ = rollout
    (loss, metrics), gradient = value_and_gradients(
        ppo.ppo_policy_loss, jnp.asarray(logprobs), logprobs, advantages, mask, 0.2
    )
    count = mask.sum()
    close(loss, -(advantages * mask).sum() / count)
    close(gradient, -advantages * mask / count)
    close(metrics["val/ratio"], 1.0)
    assert metrics["policy/clipfrac_avg"] == 0 and metrics["policy/approxkl_avg"] == 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.1, 2.0, -2.2, -2.2),  # inside the range: not clipped
        (0.9, -2.0, 1.8, 1.8),
        (1.5, 2.0, -2.4, 0.0),  # good, and already much likelier: clipped at 1.2
        (0.5, -2.0, 1.6, 0.0),  # bad, and already much rarer: clipped at 0.8
        (0.5, 2.0, -1.0, -1.0),  # good, but rarer: the way back is not clipped
        (1.5, -2.0, 3.0, 3.0),  # bad, but likelier: nor is this
    ],
)
def test_ppo_policy_loss_by_hand(float64, ratio, advantage, loss, slope):
    """slope is the derivative with respect to the log-probability."""
    logprobs = jnp.log(jnp.array([[ratio]])) - 1.0
    arrays = jnp.array([[-1.0]]), jnp.array([[advantage]]), jnp.ones((1, 1))
    (actual, metrics), gradient = value_and_gradients(ppo.ppo_policy_loss, logprobs, *arrays, 0.2)
    close(actual, loss)
    close(gradient, [[slope]])
    close(metrics["policy/clipfrac_avg"], float(slope == 0))
    close(metrics["val/ratio"], ratio)
    close(metrics["policy/approxkl_avg"], 0.5 * np.log(ratio) ** 2)


@pytest.mark.parametrize(
    ("value", "old_value", "target", "loss", "slope", "clipped"),
    [
        (1.1, 1.0, 2.0, 0.405, -0.9, 0),  # within 0.2 of the old value
        (1.5, 1.0, 2.0, 0.32, 0.0, 1),  # towards the target, too far: (1.2 - 2)^2 / 2
        (0.5, 1.0, 2.0, 1.125, -1.5, 0),  # away from the target: the unclipped error is larger
        (2.5, 1.0, 0.0, 3.125, 2.5, 0),
        (0.5, 1.0, 0.0, 0.32, 0.0, 1),  # clipped from below: 0.8^2 / 2
    ],
)
def test_value_function_loss_by_hand(float64, value, old_value, target, loss, slope, clipped):
    arrays = [jnp.array([[x]]) for x in (value, old_value, target, 1.0)]
    (actual, metrics), gradient = value_and_gradients(ppo.value_function_loss, *arrays, 0.2)
    close(actual, loss)
    close(gradient, [[slope]])
    close(metrics["val/clipfrac_avg"], clipped)


def test_masked_positions_change_nothing(rollout):
    """Whatever stands in padding: the same loss, and no gradient."""
    first, second, mask, _ = rollout
    third, fourth = first[::-1] * 0.5, second[::-1] + 0.3
    padding = mask == 0
    garbage = [np.where(padding, x + 20.0 * (i + 1), x) for i, x in enumerate((first, second))]
    cases = [(ppo.ppo_policy_loss, (third, fourth)), (ppo.value_function_loss, (third, fourth))]
    for loss_fn, others in cases:
        results = []
        for x, y in ((first, second), garbage):
            spoilt = [np.where(padding, 9.0, z) if x is garbage[0] else z for z in others]
            arguments = (jnp.asarray(x), y, spoilt[0], mask, 0.2)
            results.append(value_and_gradients(loss_fn, *arguments))
        (loss, metrics), gradient = results[0]
        (other_loss, other_metrics), other_gradient = results[1]
        close(loss, other_loss)
        close(gradient, other_gradient)
        for name, metric in metrics.items():
            close(metric, other_metrics[name])
        assert not np.asarray(other_gradient)[padding].any()
        assert np.asarray(gradient)[~padding].any()
    for function in (
        lambda x, y: ppo.compute_gae(x, y, mask, 0.9, 0.9),
        lambda x, y: ppo.compute_rewards(jnp.arange(4.0), x, mask, 0.1),
        lambda x, y: ppo.whiten(x, mask),
    ):
        clean = function(jnp.asarray(first), jnp.asarray(second))
        dirty = function(*map(jnp.asarray, garbage))
        jax.tree.map(close, clean, dirty)


# ------------------------------------------------------------------------ KL, by exact enumeration


@pytest.fixture
def categorical(float64):
    """Logits of a policy with probabilities .1 .2 .3 .15 .25, a reference, all five log-probs."""
    probabilities = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    ref = jax.nn.log_softmax(jnp.array([0.3, -1.0, 0.5, 1.2, -0.4]))
    return jnp.log(probabilities) + 0.7, probabilities, ref


def kl(logits, ref):
    """KL(pi || ref), summed over the five tokens."""
    logprobs = jax.nn.log_softmax(logits)
    return jnp.sum(jnp.exp(logprobs) * (logprobs - ref))


def test_k1_and_k3_have_the_mean_kl(categorical):
    logits, probabilities, ref = categorical
    k1 = ppo.compute_kl_divergence(jax.nn.log_softmax(logits), ref)
    k3 = jnp.expm1(-k1) + k1
    close((probabilities * k1).sum(), kl(logits, ref))
    close((probabilities * k3).sum(), kl(logits, ref))
    assert k3.min() > 0 > k1.min()


def test_k1_in_the_reward_has_the_gradient_of_kl(categorical):
    """E[k1 * grad log pi] with k1 held fixed is the gradient of KL; with k3 it is not."""
    logits, probabilities, ref = categorical
    k1 = ppo.compute_kl_divergence(jax.nn.log_softmax(logits), ref)

    def policy_gradient(penalty):
        return jax.grad(lambda x: jnp.sum(probabilities * penalty * jax.nn.log_softmax(x)))(logits)

    exact = jax.grad(kl)(logits, ref)
    close(policy_gradient(k1), exact)
    assert np.abs(policy_gradient(jnp.expm1(-k1) + k1) - exact).max() > 0.05


def test_k1_as_a_loss_has_no_gradient_and_k3_that_of_the_forward_kl(categorical):
    logits, probabilities, ref = categorical

    def mean_of(estimator):
        def loss(x):
            k1 = ppo.compute_kl_divergence(jax.nn.log_softmax(x), ref)
            return jnp.sum(probabilities * estimator(k1))

        return jax.grad(loss)(logits)

    close(mean_of(lambda k1: k1), np.zeros(5))
    forward_kl = jax.grad(lambda x: jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(x))))
    close(mean_of(lambda k1: jnp.expm1(-k1) + k1), forward_kl(logits))
    assert np.abs(forward_kl(logits)).max() > 0.05


def test_ppo_policy_loss_with_k1_as_reward_descends_kl(categorical):
    """Twenty tokens in the proportions of the policy, so that their mean is the expectation."""
    logits, probabilities, ref = categorical
    tokens = np.repeat(np.arange(5), np.round(20 * probabilities).astype(int)).reshape(4, 5)
    mask = jnp.ones((4, 5))
    old = jax.nn.log_softmax(logits)[tokens]
    advantages = -ppo.compute_kl_divergence(old, ref[tokens])

    def loss(x):
        logprobs = jax.nn.log_softmax(x)[tokens]
        return ppo.ppo_policy_loss(logprobs, old, advantages, mask, 0.2)[0]

    close(jax.grad(loss)(logits), jax.grad(kl)(logits, ref))


# ---------------------------------------------------------------------------- gradient accumulation


def test_accumulated_gradients_are_those_of_the_whole_batch(float64):
    """Rows with 1 to 8 tokens that count, in micro-batches of 1 and 4.

    The mean of the micro-batches' means is another number.
    """
    rng = np.random.default_rng(0)
    mask = np.arange(8) < np.array([1, 8, 2, 7, 3, 6, 1, 8])[:, None]
    batch = {
        "x": jnp.asarray(rng.normal(size=(8, 8, 3))),
        "targets": jnp.asarray(rng.integers(0, 5, size=(8, 8))),
        "mask": jnp.asarray(mask + 0.0),
    }
    params = {"w": jnp.asarray(rng.normal(size=(3, 5))), "b": jnp.zeros(5)}

    def loss_fn(params, batch):
        logits = batch["x"] @ params["w"] + params["b"]
        return sft.cross_entropy_loss(logits, batch["targets"], batch["mask"])

    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    accumulate = jax.jit(sft.accumulate_gradients, static_argnums=(0, 4))
    expected = grad_fn(params, batch)
    for size in (1, 4):
        actual = accumulate(loss_fn, params, batch, mask.sum(axis=1), size)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(close, actual, expected)
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(8)]
    means = [grad_fn(params, row) for row in rows]
    mean_of_means = jax.tree.map(lambda *x: sum(x) / 8, *means)
    assert abs(mean_of_means[0][0] - expected[0][0]) > 0.01
    assert np.abs(mean_of_means[1]["w"] - expected[1]["w"]).max() > 0.01


def test_accumulated_gradients_weigh_sequences_equally_when_told_so():
    """With counts of 1 a row, as in reward.py, it is the plain mean over rows."""
    chosen, rejected = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)))
    batch = {"chosen": chosen, "rejected": rejected}

    def loss_fn(scale, batch):
        return reward.preference_loss(scale * batch["chosen"], scale * batch["rejected"])

    expected = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(1.7, batch)
    actual = reward.accumulate_gradients(loss_fn, jnp.float32(1.7), batch, jnp.ones(8), 2)
    jax.tree.map(functools.partial(close, atol=1e-6), actual, expected)
