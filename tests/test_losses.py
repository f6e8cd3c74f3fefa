"""The losses of all scripts: golden numbers of the peers, closed forms, exact enumeration.

Where optimising them leads is in test_optimum.py.
"""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpo
import gpt2
import grpo
import ppo
import reward
import sft

GOLDENS = Path(__file__).resolve().parent / "goldens"
FIRST = "kl_k1_c0.05_whiten0_g1.0_l0.95"  # the rollout in ppo.npz that its losses are of
ROLLOUTS = [  # name in ppo.npz, gamma, lambda
    (FIRST, 1.0, 0.95),
    ("kl_k3_c0.05_whiten0_g1.0_l0.95", 1.0, 0.95),
    ("kl_k1_c0.05_whiten1_g1.0_l0.95", 1.0, 0.95),
    ("kl_k1_c0.2_whiten0_g0.97_l0.9", 0.97, 0.9),
    ("kl_k1_c0.0_whiten0_g0.99_l1.0", 0.99, 1.0),
    ("kl_k3_c0.1_whiten1_g0.9_l0.0", 0.9, 0.0),
]
AGGREGATIONS = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}  # TRL's loss_type: ours
MODES = list(itertools.product(AGGREGATIONS.values(), ("token", "sequence")))
GRPO_LOSSES = ["b0.0_token_eh0.28", "b0.0_sequence_eh0.28", "b0.04_token_eh0.28"]
GRPO_LOSSES += ["b0.04_sequence_eh0.28", "b0.04_token_eh0.2", "b0.04_token_onpolicy"]
PAIR_LOSSES = {"sigmoid": dpo.dpo_loss, "ipo": dpo.ipo_loss, "hinge": dpo.hinge_loss}

each_mode = pytest.mark.parametrize(("aggregation", "ratio_level"), MODES)


def value_and_gradients(loss_fn, *arguments, argnums=0):
    """((loss, metrics), gradients) of one of the losses, whose first arguments are arrays."""
    is_array = [np.ndim(x) > 0 for x in arguments]  # the others are static

    def function(*arrays):
        rest = iter(arrays)
        return loss_fn(*(next(rest) if array else x for array, x in zip(is_array, arguments)))

    arrays = [x for array, x in zip(is_array, arguments) if array]
    return jax.jit(jax.value_and_grad(function, argnums, has_aux=True))(*arrays)


def by_case(loss_fn, *columns, shape):
    """value_and_gradients of a table of cases, each a batch of this shape, in one call."""
    columns = [jnp.reshape(jnp.asarray(x, float), (-1, *shape)) for x in columns]
    return jax.jit(jax.vmap(jax.value_and_grad(loss_fn, has_aux=True)))(*columns)


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
    golden, (config, params) = goldens("token_logps"), tiny
    tokens, mask = golden["input_ids"], golden["attention_mask"]
    rest = (tokens, mask, int(golden["prompt_length"]), temperature)
    logprobs = ppo.policy_logprobs(params, config, *rest)
    read = functools.partial(ppo.read_response, lambda logits, _: ppo.token_entropies(logits))
    entropy = jax.jit(lambda params: read(params, config, *rest))(params)
    response = mask[:, rest[2] :]
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
    close(gradient, (probabilities - np.eye(3)[targets]) * mask[..., None] / 3)
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
    attention, mlp = grads["h.0"]["attn"]["c_attn"], grads["h.1"]["mlp"]
    ours = {
        "wpe.weight": grads["wpe"]["embedding"][:8],
        "wte.weight": grads["wte"]["embedding"][::16],
        "h.0.attn.c_attn.weight": attention["kernel"].reshape(64, 192)[:8],
        "h.0.attn.c_attn.bias": attention["bias"].reshape(192),
        "h.0.ln_1.weight": grads["h.0"]["ln_1"]["scale"],
        "h.1.mlp.c_fc.bias": mlp["c_fc"]["bias"],
        "h.1.mlp.c_proj.bias": mlp["c_proj"]["bias"],
        "ln_f.weight": grads["ln_f"]["scale"],
        "ln_f.bias": grads["ln_f"]["bias"],
    }
    assert {name.split(":transformer.")[1] for name in golden if ":" in name} == set(ours)
    for name, gradient in ours.items() if case == "completion" else ():
        close(gradient, golden[f"completion_grad:transformer.{name}"], atol=1e-5)


def test_six_steps_of_adamw_equal_golden(tiny, goldens):
    """sft.py's train_step, a row in each micro-batch.

    torch's AdamW decays every parameter, so the optimizer is made here.
    """
    golden = goldens("sft")
    names = {"tokens": "input_ids", "mask": "attention_mask", "loss_mask": "completion_mask"}
    batch = {ours: golden[theirs] for ours, theirs in names.items()}
    adamw = optax.adamw(1e-3, weight_decay=0.01)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    args = sft.Args(micro_batch_size=1)
    state, losses, norms = sft.make_state(tiny[1], optimizer), [], []
    for _ in range(6):
        state, metrics = sft.train_step(state, batch, tiny[0], optimizer, args)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    close(losses, golden["train_losses_f64"], atol=2e-4)
    close(norms, golden["train_grad_norms_f64"], atol=2e-3)
    # Adam divides by the gradient's own size: where that is near 0, float32 shows most.
    close(state.params["ln_f"]["scale"], golden["train_final_ln_f_weight_f64"], atol=1e-4)


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

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    accumulate = jax.jit(sft.accumulate_gradients, static_argnums=(0, 4))
    expected = jax.jit(grad_fn)(params, batch)
    for size in (1, 4):
        actual = accumulate(loss_fn, params, batch, mask.sum(axis=1), size)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(close, actual, expected)
    rows = jax.tree.map(lambda x: x[:, None], batch)
    means = jax.jit(jax.vmap(grad_fn, in_axes=(None, 0)))(params, rows)
    mean_of_means = jax.tree.map(lambda x: x.mean(axis=0), means)
    assert abs(mean_of_means[0][0] - expected[0][0]) > 0.01
    assert np.abs(mean_of_means[1]["w"] - expected[1]["w"]).max() > 0.01


# --------------------------------------------------------------------------------------- reward.py


@pytest.mark.parametrize(
    ("case", "center_coef"),
    [("plain", 0.0), ("margin", 0.0), ("center", 0.01), ("margin_center", 0.05)],
)
def test_preference_loss_equals_golden(goldens, float64, case, center_coef):
    golden = goldens("reward_loss")
    scores = [jnp.asarray(golden[f"{name}_rewards"]) for name in ("chosen", "rejected")]
    margin = golden["margin"] if "margin" in case else 0.0
    (loss, metrics), gradients = value_and_gradients(
        reward.preference_loss, *scores, margin, center_coef, argnums=(0, 1)
    )
    close(loss, golden[f"{case}_loss"])
    close(metrics["rewards/accuracies"], golden[f"{case}_accuracy"], atol=1e-7)
    for i, name in enumerate(("chosen", "rejected")):
        close(gradients[i], golden[f"{case}_grad_{name}"])
        close(metrics[f"rewards/{name}"], golden[f"{name}_rewards"].mean())


def test_preference_loss_closed_forms(float64):
    """ln 2 for equal scores; no overflow for scores that lie far apart."""
    scores = jnp.array([1.5, -3.0])
    loss, metrics = reward.preference_loss(scores, scores)
    close(loss, np.log(2))
    assert metrics["rewards/accuracies"] == 0 and metrics["rewards/margins"] == 0
    far = by_case(reward.preference_loss, [-900.0, 1100.0], [100.0, 100.0], shape=(1,))
    (losses, _), gradients = far
    close(losses, [1000.0, 0.0])
    close(gradients, [[-1.0], [0.0]])


@functools.partial(jax.jit, static_argnums=1)
@functools.partial(jax.value_and_grad, has_aux=True)
def preference_loss_of_a_model(params, config, tokens, mask, margin):
    scores = reward.RewardModel(config).apply({"params": params}, tokens, mask)
    scores = reward.sequence_scores(scores, mask)
    return reward.preference_loss(scores[:3], scores[3:], margin)[0], scores


@pytest.mark.parametrize("case", ["model", "model_margin"])
def test_preference_loss_of_a_model_equals_golden(tiny_reward, goldens, case):
    """Loss, scores and gradients with gpt2_reward_tiny, whose rows end at different places."""
    golden, (config, params) = goldens("reward_loss"), tiny_reward
    tokens, mask = golden["model_input_ids"], golden["model_attention_mask"]
    margin = golden["model_margin"] * (case == "model_margin")
    (loss, scores), grads = preference_loss_of_a_model(params, config, tokens, mask, margin)
    close(scores, golden["model_rewards_f64"], atol=1e-5)
    close(loss, golden[f"{case}_loss_f64"], atol=1e-5)
    close(grads["score"]["kernel"][:, 0], golden[f"{case}_grad_score_f64"], atol=1e-5)
    np.testing.assert_allclose(global_norm(grads), golden[f"{case}_grad_norm_f64"], rtol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_reward_model_equals_golden(tiny_reward, goldens, side):
    """Row 2 ends in a real token with PAD's id, where Hugging Face reads one token early."""
    golden, (config, params) = goldens("reward_model"), tiny_reward
    tokens, mask = golden[f"{side}_input_ids"], golden[f"{side}_attention_mask"]
    scores = jax.jit(reward.RewardModel(config).apply)({"params": params}, tokens, mask)
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
    for dtype in (int, float, bool):
        close(reward.sequence_scores(scores, mask.astype(dtype)), [1, 7, 10])


# --------------------------------------------------------------------------- ppo.py: golden numbers


def test_whiten_equals_golden(goldens, float64):
    golden = goldens("ppo")
    x, mask = jnp.asarray(golden["whiten_values"]), golden["whiten_mask"].astype(float)
    for shift_mean, name in ((True, "masked_whiten"), (False, "masked_whiten_noshift")):
        white = ppo.whiten(x, mask, shift_mean)
        close(white, golden[name] * mask, atol=1e-7)
        real, before = white[mask > 0], x[mask > 0]
        close(real.mean(), 0.0 if shift_mean else before.mean())
        close(real.var(ddof=1), 1.0, atol=1e-7)
    rewards, mask = jnp.asarray(golden[f"{FIRST}/rewards"]), ~golden["padding_mask_p1"] + 0.0
    whitened = ppo.whiten(rewards, mask, shift_mean=False)
    close(whitened, golden["kl_k1_c0.05_whiten1_g1.0_l0.95/rewards"], atol=1e-6)


def test_compute_kl_divergence_equals_golden(goldens, float64):
    golden = goldens("ppo")
    logprobs, ref = golden["logprobs_masked"], golden["ref_logprobs_masked"]
    kl = ppo.compute_kl_divergence(jnp.asarray(logprobs), jnp.asarray(ref))
    close(kl, golden[f"{FIRST}/kl"])
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
    whitened = ppo.whiten(advantages, ~golden["padding_mask"] + 0.0)
    close(whitened, golden[f"{case}/advantages"], atol=1e-7)


@pytest.mark.parametrize(
    ("case", "clip_eps", "value_clip_eps", "weight"),
    [
        ("loss_clip0.2_vclip0.2_vf1.0", 0.2, 0.2, 1.0),
        ("loss_clip0.1_vclip0.5_vf0.5", 0.1, 0.5, 0.5),
    ],
)
def test_ppo_losses_equal_golden(goldens, float64, case, clip_eps, value_clip_eps, weight):
    whole = goldens("ppo")
    golden = {name.removeprefix(f"{case}/"): x for name, x in whole.items()}
    mask = ~golden["padding_mask"] + 0.0
    arrays = (golden["logprobs_masked"], golden[f"{FIRST}/advantages"], mask, clip_eps)
    (loss, metrics), gradient = value_and_gradients(
        ppo.ppo_policy_loss, jnp.asarray(golden["new_logprobs"]), *arrays
    )
    close(loss, golden["pg_loss"])
    close(metrics["loss/policy_avg"], golden["pg_loss"])
    close(gradient, golden["grad_new_logprobs"])
    close(metrics["policy/clipfrac_avg"], golden["pg_clipfrac"], atol=1e-7)
    # TRL's mean runs over padding too, where the difference is 0.
    close(metrics["policy/approxkl_avg"] * mask.mean(), golden["approxkl"])
    close(metrics["val/ratio"], (golden["ratio"] * mask).sum() / mask.sum())

    mask = ~golden["padding_mask_p1"] + 0.0
    arrays = (golden["values_masked"], golden[f"{FIRST}/returns"], mask, value_clip_eps)
    (loss, metrics), gradient = value_and_gradients(
        ppo.value_function_loss, jnp.asarray(golden["new_values"]), *arrays
    )
    close(loss, golden["vf_loss"], atol=1e-7)
    close(metrics["loss/value_avg"], golden["vf_loss"], atol=1e-7)
    close(weight * gradient, golden["grad_new_values"], atol=1e-7)
    close(metrics["val/clipfrac_avg"], golden["vf_clipfrac"], atol=1e-7)


# ----------------------------------------------------------------------------- ppo.py: closed forms

LENGTHS = np.array([6, 4, 1, 3])
MASK = (np.arange(6) < LENGTHS[:, None]).astype(float)  # [4, 6]


def normal(seed, *shape, mean=0.0, std=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(mean, std, size=shape))


@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (0.9, 1.0), (1, 1)]
)
def test_gae_equals_its_definition(float64, gamma, lam):
    """A_t is the sum over l of (gamma * lambda)^l * delta_(t + l): eq. 16 of the paper, O(T^2)."""
    rewards, values = normal(1, 2, 4, 6)
    advantages, returns = ppo.compute_gae(rewards, values, jnp.asarray(MASK), gamma, lam)
    expected = np.zeros((4, 6))
    for row, length in enumerate(LENGTHS):
        v = [*np.asarray(values)[row, :length], 0.0]  # nothing is earned after the last token
        delta = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[row, t] = sum((gamma * lam) ** i * delta[t + i] for i in range(length - t))
    close(advantages, expected)
    close(returns, expected + values * MASK)


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


def test_ppo_policy_loss_by_hand(float64):
    """slope is the derivative with respect to the log-probability."""
    ratio, advantage, loss, slope = np.array(
        [
            (1.1, 2.0, -2.2, -2.2),  # inside the range: not clipped
            (0.9, -2.0, 1.8, 1.8),
            (1.5, 2.0, -2.4, 0.0),  # good, and already much likelier: clipped at 1.2
            (0.5, -2.0, 1.6, 0.0),  # bad, and already much rarer: clipped at 0.8
            (0.5, 2.0, -1.0, -1.0),  # good, but rarer: the way back is not clipped
            (1.5, -2.0, 3.0, 3.0),  # bad, but likelier: nor is this
        ]
    ).T
    (actual, metrics), gradient = by_case(
        lambda *x: ppo.ppo_policy_loss(*x, jnp.ones((1, 1)), 0.2),
        *(np.log(ratio) - 1.0, 0 * ratio - 1.0, advantage),
        shape=(1, 1),
    )
    close(actual, loss)
    close(gradient[:, 0, 0], slope)
    close(metrics["policy/clipfrac_avg"], slope == 0)
    close(metrics["val/ratio"], ratio)
    close(metrics["policy/approxkl_avg"], 0.5 * np.log(ratio) ** 2)


def test_value_function_loss_by_hand(float64):
    *columns, loss, slope, clipped = np.array(
        [  # value, old value, target; loss, slope, clipped
            (1.1, 1.0, 2.0, 0.405, -0.9, 0),  # within 0.2 of the old value
            (1.5, 1.0, 2.0, 0.32, 0.0, 1),  # towards the target, too far: (1.2 - 2)^2 / 2
            (0.5, 1.0, 2.0, 1.125, -1.5, 0),  # away from the target: the unclipped error is larger
            (2.5, 1.0, 0.0, 3.125, 2.5, 0),
            (0.5, 1.0, 0.0, 0.32, 0.0, 1),  # clipped from below: 0.8^2 / 2
        ]
    ).T
    (actual, metrics), gradient = by_case(
        lambda *x: ppo.value_function_loss(*x, jnp.ones((1, 1)), 0.2), *columns, shape=(1, 1)
    )
    close(actual, loss)
    close(gradient[:, 0, 0], slope)
    close(metrics["val/clipfrac_avg"], clipped)


# ------------------------------------------------------------------------------ masks, all scripts


def grpo_of(aggregation, ratio_level):
    def loss(x, mask):
        bonus, advantages = 0.1 * x[3], jnp.array([1.5, -0.5, -2.0, 1.0])
        static = (0.2, 0.28, 0.1, aggregation, ratio_level, 8, bonus)
        return grpo.grpo_loss(*x[:3], advantages, mask, *static)

    return loss


MASKED = (
    {  # x: four arrays [4, 6]
        "ppo_policy_loss": lambda x, mask: ppo.ppo_policy_loss(*x[:3], mask, 0.2),
        "value_function_loss": lambda x, mask: ppo.value_function_loss(*x[:3], mask, 0.2),
        "compute_rewards": lambda x, mask: ppo.compute_rewards(jnp.arange(4.0), x[0], mask, 0.1),
        "compute_gae": lambda x, mask: ppo.compute_gae(*x[:2], mask, 0.9, 0.9),
        "whiten": lambda x, mask: ppo.whiten(x[0], mask),
        "whiten-no-shift": lambda x, mask: ppo.whiten(x[0], mask, shift_mean=False),
        "masked_mean": lambda x, mask: ppo.masked_mean(x[0], mask),
        "masked_variance": lambda x, mask: ppo.masked_variance(x[0], mask),
        "response_logprobs": lambda x, mask: dpo.response_logprobs(x[0], mask),
        "cross_entropy_loss": lambda x, mask: sft.cross_entropy_loss(
            jnp.stack(x, axis=-1), np.arange(24).reshape(4, 6) % 4, mask
        ),
    }
    | {f"grpo_loss-{a}-{level}": grpo_of(a, level) for a, level in MODES}
)


@pytest.mark.parametrize("name", MASKED)
def test_masks(float64, name):
    """Whatever stands in padding: the same results, and no gradient.

    And whether a mask is of floats, integers or booleans.
    """
    function, x = MASKED[name], list(normal(1, 4, 4, 6, std=0.3))
    garbage = [jnp.where(MASK > 0, y, 20.0 * (i - 1)) for i, y in enumerate(x)]

    @jax.jit
    def run(x, mask):
        results, back = jax.vjp(lambda first: function([first, *x[1:]], mask), x[0])
        first, *rest = jax.tree.leaves(results)  # the loss, or what else comes first
        ones = [jnp.ones_like(first), *map(jnp.zeros_like, rest)]
        return results, *back(jax.tree.unflatten(jax.tree.structure(results), ones))

    results, gradient = run(x, MASK)
    assert not np.asarray(gradient)[MASK == 0].any()
    # The mean of what whiten returns depends on nothing.
    assert np.asarray(gradient)[MASK > 0].any() or name.startswith("whiten")
    for other in (run(garbage, MASK), run(x, MASK > 0), run(x, (MASK > 0).astype(int))):
        jax.tree.map(close, other, (results, gradient))


def test_losses_of_padding_alone_are_0(float64):
    x = list(normal(1, 4, 4, 6))
    for name, function in MASKED.items():
        if name.endswith("_loss") or name.startswith("grpo_loss"):
            (loss, metrics), gradient = value_and_gradients(
                lambda first, f=function: f([first, *x[1:]], 0 * MASK), x[0]
            )
            assert loss == 0 and not np.asarray(gradient).any() and not any(metrics.values())


# --------------------------------------------------------------------------- dpo.py: golden numbers


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(
    ("case", "label_smoothing"), [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0), ("hinge", 0.0)]
)
def test_losses_of_pairs_equal_golden(goldens, float64, case, beta, label_smoothing):
    """Of given log-probabilities of whole answers: ipo_loss takes them as they are."""
    golden = goldens("dpo_seq")
    key = f"{case}_b{beta}_ls{label_smoothing}"
    pairs = [
        jnp.asarray(golden[f"{model}_{answer}_logps"])
        for model, answer in itertools.product(("policy", "ref"), ("chosen", "rejected"))
    ]
    static = (beta, label_smoothing) if case == "sigmoid" else (beta,)
    (loss, metrics), gradients = value_and_gradients(
        PAIR_LOSSES[case], *pairs, *static, argnums=(0, 1)
    )
    close(loss, golden[f"{key}/losses"].mean())
    close(gradients[0], golden[f"{key}/grad_chosen"])
    close(gradients[1], golden[f"{key}/grad_rejected"])
    close(metrics["loss"], loss)
    args = dpo.Args(loss=case, beta=beta, label_smoothing=label_smoothing, nll_coef=0.0)
    pairs = [jnp.stack(pairs[i : i + 2], axis=1) for i in (0, 2)]  # [B, 2] each
    same_loss, metrics = dpo.pair_loss(*pairs, jnp.ones(pairs[0].shape), args)
    chosen, rejected = golden[f"{key}/chosen_rewards"], golden[f"{key}/rejected_rewards"]
    close([same_loss, metrics["loss"]], loss)
    close(metrics["rewards/chosen"], chosen.mean())
    close(metrics["rewards/rejected"], rejected.mean())
    close(metrics["rewards/margins"], (chosen - rejected).mean())
    close(metrics["rewards/accuracies"], (chosen > rejected).mean(), atol=1e-7)
    if case == "sigmoid":
        alone = dpo.dpo_loss(*pairs[0].T, *pairs[1].T, *static)[1]
        jax.tree.map(close, alone, {name: metrics[name] for name in alone})


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("case", PAIR_LOSSES)
def test_losses_of_tokens_equal_golden(goldens, float64, case, beta):
    """From log-probabilities of tokens: summed over the answer, for ipo divided by its length.

    TRL masks before what is differentiated there, we in response_logprobs.
    """
    golden = goldens("dpo_tok")
    key, args = f"{case}_b{beta}_ls0.0", dpo.Args(loss=case, beta=beta, nll_coef=0.0)
    mask = golden["completion_mask"][:, 1:]
    lengths = mask.sum(axis=1).reshape(2, -1).T  # the first half of the rows is chosen

    def loss_fn(token_logps):
        policy, ref = (
            dpo.response_logprobs(x, mask).reshape(2, -1).T
            for x in (token_logps, jnp.asarray(golden["ref_token_logps"]))
        )
        return dpo.pair_loss(policy, ref, lengths, args)

    (loss, metrics), gradient = value_and_gradients(loss_fn, jnp.asarray(golden["token_logps"]))
    close(loss, golden[f"{key}/loss"])
    close(gradient, golden[f"{key}/grad_token_logps"] * mask)
    if case != "ipo":  # whose rewards TRL logs of the sums, we of what the loss sees
        for name in ("chosen", "rejected", "accuracies", "margins"):
            close(metrics[f"rewards/{name}"], golden[f"{key}/metric_rewards_{name}"], atol=1e-7)


@pytest.fixture(scope="module")
def pairs_of_a_model(tiny, goldens):
    """Log-probabilities [3, 2] under gpt2_tiny and a reference made of it, lengths, a gradient."""
    golden, (config, params) = goldens("dpo_model"), tiny
    names = {"tokens": "input_ids", "mask": "attention_mask", "response_mask": "completion_mask"}
    batch = {  # [chosen; rejected], [2B, T] -> [B, 2, T]
        ours: np.swapaxes(golden[theirs].reshape(2, 3, -1), 0, 1) for ours, theirs in names.items()
    }
    ref_params = params | {
        "ln_f": params["ln_f"] | {"scale": params["ln_f"]["scale"] * 0.7},
        "wpe": {"embedding": params["wpe"]["embedding"] * 0.5},
    }
    ref_logprobs = dpo.pair_logprobs(ref_params, batch, config)
    logprobs, gradient_of = jax.vjp(lambda x: dpo.pair_logprobs(x, batch, config), params)
    return logprobs, ref_logprobs, batch["response_mask"].sum(axis=2), jax.jit(gradient_of)


@pytest.mark.parametrize(
    ("case", "beta"), [("sigmoid", 0.1), ("sigmoid", 0.5), ("ipo", 0.1), ("hinge", 0.1)]
)
def test_loss_of_pairs_of_a_model_equals_golden(pairs_of_a_model, goldens, case, beta):
    golden, (logprobs, ref_logprobs, lengths, gradient_of) = goldens("dpo_model"), pairs_of_a_model
    for ours, theirs in ((logprobs, "policy"), (ref_logprobs, "ref")):
        sums = golden[f"{theirs}_token_logps_f64"].sum(axis=1).reshape(2, 3).T
        close(ours, sums, atol=2e-5)
    args = dpo.Args(loss=case, beta=beta, nll_coef=0.0)
    (loss, _), slopes = value_and_gradients(dpo.pair_loss, logprobs, ref_logprobs, lengths, args)
    (grads,) = gradient_of(slopes)
    found = {"loss": loss, "grad_ln_f_weight": grads["ln_f"]["scale"]}
    for name, actual in (found | {"grad_norm": global_norm(grads)}).items():
        expected = golden[f"{case}_b{beta}/{name}_f64"]
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-5)


# ----------------------------------------------------------------------------- dpo.py: closed forms


@pytest.fixture
def answers(float64):
    """Policy's and reference's log-probabilities of five chosen and rejected answers, [5] each."""
    return list(normal(4, 4, 5, mean=-20, std=3))


def test_dpo_of_answers_that_lie_far_apart():
    """No overflow: the loss is the margin itself, the gradient -beta or 0."""
    zeros = [[0.0, 0.0]] * 3
    (losses, _), gradients = by_case(
        lambda *x: dpo.dpo_loss(*x, 0.5), [-2000.0, 2000.0], *zeros, shape=(1,)
    )
    close(losses, [1000.0, 0.0])
    close(gradients, [[-0.5], [0.0]])


def test_label_smoothing(answers):
    """A number, or one for each pair; 1 turns the pair round, 1/2 teaches nothing at margin 0."""
    eps = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    chosen, rejected, ref_chosen, ref_rejected = answers
    for number in (0.0, 0.1):  # at the reference: ln 2, and all answers are moved alike
        (loss, metrics), gradients = value_and_gradients(
            dpo.dpo_loss, *(chosen, rejected) * 2, 0.3, number, argnums=(0, 1)
        )
        close(loss, np.log(2))
        close(np.array(gradients) / [[-1], [1]], np.full((2, 5), 0.3 * (0.5 - number) / 5))
        assert metrics["rewards/margins"] == 0 and metrics["rewards/accuracies"] == 0
    turned = rejected, chosen, ref_rejected, ref_chosen
    for number in eps:
        scalar, array = (dpo.dpo_loss(*answers, 0.3, x)[0] for x in (number, np.full(5, number)))
        close(array, scalar)
        close(dpo.dpo_loss(*turned, 0.3, 1 - number)[0], scalar)
    losses = [dpo.dpo_loss(*(x[i : i + 1] for x in answers), 0.3, eps[i])[0] for i in range(5)]
    close(dpo.dpo_loss(*answers, 0.3, jnp.asarray(eps))[0], np.mean(losses))
    margin = 0.3 * np.asarray(chosen - ref_chosen - rejected + ref_rejected)
    expected = np.log1p(np.exp(-margin)) + 0.1 * margin  # -log sigmoid(m), eps * m more
    close(dpo.dpo_loss(*answers, 0.3, 0.1)[0], expected.mean())


def test_ipo_and_hinge_by_hand(float64):
    """beta = 1/2; given are log-ratios to the reference, and derivatives for the chosen one."""
    chosen, rejected, *expected = np.array(
        [  # chosen, rejected; ipo, its slope; hinge, its slope
            (0.0, 0.0, 1.0, -2.0, 1.0, -0.5),  # h = 0: (0 - 1)^2, and 1 - 0
            (1.0, 0.0, 0.0, 0.0, 0.5, -0.5),  # h = 1 = 1 / (2 beta), where IPO wants it
            (3.0, 0.0, 4.0, 4.0, 0.0, 0.0),  # IPO goes back, the hinge rests once beta * h is 1
            (0.5, 1.5, 4.0, -4.0, 1.5, -0.5),
        ]
    ).T
    pairs = (chosen - 7.0, rejected - 9.0, 0 * chosen - 7.0, 0 * chosen - 9.0)
    for case, loss, slope in (("ipo", *expected[:2]), ("hinge", *expected[2:])):
        args, ones = dpo.Args(loss=case, beta=0.5, nll_coef=0.0), jnp.ones((1, 2))

        def by_pair_loss(x, args=args, ones=ones):
            return dpo.pair_loss(x[None, :2], x[None, 2:], ones, args)

        (actual, _), gradients = by_case(
            lambda *x, f=PAIR_LOSSES[case]: f(*x, 0.5), *pairs, shape=(1,)
        )
        close(actual, loss)
        close(gradients[:, 0], slope)
        (actual, metrics), gradients = by_case(by_pair_loss, np.stack(pairs, axis=1), shape=(4,))
        close(actual, loss)
        close(gradients, slope[:, None] * [1, -1, -1, 1])
        close(metrics["rewards/margins"], 0.5 * (chosen - rejected))


def test_pair_loss(answers):
    """The chosen --loss, plus nll_coef times the chosen answers' mean loss a token."""
    policy, ref = jnp.stack(answers[:2], axis=1), jnp.stack(answers[2:], axis=1)
    lengths = np.array([[3, 9], [1, 2], [7, 7], [4, 1], [10, 5]])
    args = dpo.Args(beta=0.3, label_smoothing=0.1, nll_coef=0.0)
    loss, metrics = dpo.pair_loss(policy, ref, lengths, args)
    close(loss, dpo.dpo_loss(*answers, 0.3, 0.1)[0])
    close(metrics["logps/chosen"], answers[0].mean())
    close(metrics["logps/rejected"], answers[1].mean())
    more, metrics = dpo.pair_loss(policy, ref, lengths, dataclasses.replace(args, nll_coef=2.0))
    nll = -np.mean(np.asarray(answers[0]) / lengths[:, 0])
    close(metrics["nll_loss"], nll)
    close(more, loss + 2 * nll)
    close(metrics["loss"], more)
    args = dpo.Args(loss="ipo", beta=0.3, nll_coef=0.0)
    a_token = [x / lengths[:, i % 2] for i, x in enumerate(answers)]
    close(dpo.pair_loss(policy, ref, lengths, args)[0], dpo.ipo_loss(*a_token, 0.3)[0])


# -------------------------------------------------------------------------- grpo.py: golden numbers


def test_group_relative_advantage_equals_golden(goldens, float64):
    """Of one reward, and of two with weights; the first group's rewards are all the same."""
    golden = goldens("grpo")
    rewards, size = jnp.asarray(golden["rewards_per_func"]), int(golden["num_generations"])
    weighted = rewards @ golden["reward_weights"]
    for scale, name in ((True, "group"), (False, "none")):
        single = grpo.group_relative_advantage(rewards[:, 0], size, scale)
        close(single, golden[f"advantages_single/{name}"], atol=1e-7)
        both = grpo.group_relative_advantage(weighted, size, scale)
        close(both, golden[f"advantages/{name}/sum_then_normalize"], atol=1e-7)


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
@pytest.mark.parametrize("case", GRPO_LOSSES)
def test_grpo_loss_equals_golden(goldens, float64, loss_type, case):
    """Plain, and under jit as its docstring says."""
    golden, key = goldens("grpo"), f"{loss_type}_{case}"
    kl_coef, ratio_level, clip_high = case.split("_")
    onpolicy = clip_high == "onpolicy"
    logprobs = jnp.asarray(golden["token_logps"])
    arguments = {
        "logprobs": logprobs,
        "old_logprobs": logprobs if onpolicy else golden["old_token_logps"],
        "ref_logprobs": golden["ref_token_logps"],
        "advantages": golden["advantages"],
        "mask": golden["completion_mask"] + 0.0,
        "clip_low": 0.2,
        "clip_high": 0.28 if onpolicy else float(clip_high[2:]),
        "kl_coef": float(kl_coef[1:]),
        "aggregation": AGGREGATIONS[loss_type],
        "ratio_level": ratio_level,
        "max_length": int(golden["max_completion_length"]),
    }
    (loss, metrics), gradient = value_and_gradients(grpo.grpo_loss, *arguments.values())
    close(loss, golden[f"{key}/loss"])
    close(gradient, golden[f"{key}/grad_token_logps"])
    if kl_coef != "b0.0":
        close(metrics["kl"], golden[f"{key}/metric_kl"], atol=1e-7)
    if ratio_level == "sequence":  # the geometric mean of the tokens' ratios
        _, old, _, _, mask = list(arguments.values())[:5]
        means = ((logprobs - old) * mask).sum(axis=1) / mask.sum(axis=1)
        close(metrics["val/ratio"], np.average(np.exp(means), weights=mask.sum(axis=1)))
    else:
        low, high = metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]
        close(low, golden[f"{key}/metric_clip_ratio_low_mean"], atol=1e-7)
        close(high, golden[f"{key}/metric_clip_ratio_high_mean"], atol=1e-7)
        close(metrics["policy/clipfrac_avg"], low + high)
    jitted = jax.jit(grpo.grpo_loss, static_argnames=("aggregation", "ratio_level"))
    for function in (jitted, grpo.grpo_loss):
        jax.tree.map(close, function(**arguments), (loss, metrics))


# ---------------------------------------------------------------------------- grpo.py: closed forms


@each_mode
def test_grpo_loss_by_hand(float64, aggregation, ratio_level):
    """One token, clipped at 0.8 and 1.28; slope is the derivative for its log-probability."""
    ratio, advantage, loss, slope, low, high = np.array(
        [
            (1.25, 2.0, -2.5, -2.5, 0, 0),  # within 0.28 upwards, though not within 0.2
            (1.4, 2.0, -2.56, 0.0, 0, 1),  # good, and already much likelier: clipped at 1.28
            (1.4, -2.0, 2.8, 2.8, 0, 0),  # bad, but likelier: the way back is not clipped
            (0.9, -2.0, 1.8, 1.8, 0, 0),
            (0.75, -2.0, 1.6, 0.0, 1, 0),  # bad, and already rarer: clipped at 0.8, not at 0.72
            (0.5, 2.0, -1.0, -1.0, 0, 0),
        ]
    ).T

    def loss_fn(x, old, advantages):
        static = (jnp.ones((1, 1)), 0.2, 0.28, 0.0, aggregation, ratio_level, 1)
        return grpo.grpo_loss(x, old, old, advantages[0], *static)

    columns = (np.log(ratio) - 1.0, 0 * ratio - 1.0, advantage)
    (actual, metrics), gradient = by_case(loss_fn, *columns, shape=(1, 1))
    close(actual, loss)
    close(gradient[:, 0, 0], slope)
    close(metrics["clip_ratio/low_mean"], low)
    close(metrics["clip_ratio/high_mean"], high)
    close(metrics["policy/clipfrac_avg"], low + high)
    close(metrics["val/ratio"], ratio)


@pytest.mark.parametrize("difference", [1e-2, 1e-3, -1e-3])
def test_kl_of_grpo_loss_is_accurate_near_0(difference):
    """In float32: exp(d) - 1 - d for d = 0.001 would be off by a tenth."""
    ref = jnp.full((1, 1), difference, jnp.float32)
    zeros, mask = jnp.zeros((1, 1)), jnp.ones((1, 1))
    loss, _ = grpo.grpo_loss(
        zeros, zeros, ref, jnp.zeros(1), mask, 0.2, 0.2, 1.0, "token", "token", 1
    )
    expected = np.expm1(np.float64(difference)) - difference
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-3)


def test_kl_of_grpo_loss_does_not_overflow():
    """A token that the policy all but excludes: exp(200) is no float32; above 20 k3 is constant."""
    ref, zeros, mask = jnp.array([[-1.0, -1.0]]), jnp.zeros((1, 2)), jnp.ones((1, 2))

    def loss(logprobs):
        rest = (jnp.zeros(1), mask, 0.2, 0.2, 1.0, "token", "token", 2)
        return grpo.grpo_loss(logprobs, zeros, ref, *rest)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.array([[-201.0, -2.0]]))
    assert float(value) == pytest.approx((np.expm1(20.0) - 20 + np.expm1(1.0) - 1) / 2, rel=1e-5)
    np.testing.assert_allclose(gradient, [[0.0, -np.expm1(1.0) / 2]], rtol=1e-5)


@pytest.mark.parametrize("missing", [[], [4, 6, 7, 8, 9, 10]])
@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_advantages_by_a_loop(float64, group_size, missing):
    """A group of equal rewards has none, also after rounding; nor has one without a reward.

    Such a one, NaN, is in no mean and no deviation; what is alone in its group has none either.
    """
    rewards = np.random.default_rng(6).normal(size=12)
    rewards[:group_size] = 0.1
    rewards[missing] = np.nan
    expected = np.zeros((3, 12))
    for i in set(range(12)) - set(missing):
        first = i - i % group_size
        members = set(range(first, first + group_size)) - set(missing)
        group, others = (rewards[sorted(x)] for x in (members, members - {i}))
        if len(others):
            difference = rewards[i] - np.mean(group)
            expected[:2, i] = difference, difference / (np.std(group, ddof=1) + 1e-4)
            expected[2, i] = rewards[i] - np.mean(others)
    found = [
        grpo.group_relative_advantage(jnp.asarray(rewards), group_size, scale=False),
        grpo.group_relative_advantage(jnp.asarray(rewards), group_size),
        grpo.leave_one_out_advantage(jnp.asarray(rewards), group_size),
    ]
    close(found, expected)
    assert not np.array(found)[:, :group_size].any()


NONE = np.nan
GROUPS = [  # six of two, the rows of the three to learn from, how many are replaced, and left flat
    ([[0, 1], [1, 1], [0, 2], [3, 0], [0, 1], [1, 0]], [0, 1, 4, 5, 6, 7], 1, 0),
    ([[0, 0], [1, 1], [0, 0], [3, 3], [0, 1], [1, 1]], [0, 1, 2, 3, 8, 9], 1, 2),
    ([[0, 1], [1, 0], [0, 2], [3, 0], [0, 1], [1, 0]], [0, 1, 2, 3, 4, 5], 0, 0),
    ([[0, NONE], [NONE, NONE], [0, 2], [3, 0], [2, 2], [1, 0]], [4, 5, 6, 7, 10, 11], 2, 0),
]


@pytest.mark.parametrize("groups, rows, replaced, flat", GROUPS)
def test_dynamic_sampling_by_hand(groups, rows, replaced, flat):
    """A group with one score, or with none, has no spread."""
    scores = np.array(groups, np.float32).reshape(-1)
    found, counts = grpo.dynamic_sampling(scores, group_size=2, num_groups=3)
    assert found.tolist() == rows
    assert counts == {"groups/replaced": replaced, "groups/zero_std": flat}


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    right = np.array([[0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    for k in range(1, 6):
        chosen = [right[:, list(x)].any(axis=1) for x in itertools.combinations(range(5), k)]
        assert grpo.pass_at_k(right, k).mean() == pytest.approx(np.mean(chosen))
    # As many as in the paper, where factorials would overflow: 1 - C(150, 100) / C(200, 100).
    right = np.arange(200)[None] < 50
    expected = 1 - math.prod((150 - i) / (200 - i) for i in range(100))
    assert grpo.pass_at_k(right, 100).mean() == pytest.approx(expected, abs=1e-12)


def test_pass_rates_are_of_scores_of_0_and_1():
    """One prompt has no score, one has one right completion of five, one has two."""
    right = [None] * 5 + [0.0, 0.0, 1.0, 0.0, 0.0] + [1.0, 0.0, 0.0, 1.0, 0.0]
    samples = [
        {"prompt": "0", "completion": "1", "reward": x, "rewards/f": x, "gold/reward": 0.5}
        for x in right
    ]
    found = grpo.pass_rates(samples, 5)
    # One of five: 4 of the 10 pairs have it. Two: 3 of 10 pairs miss both, and 0 of 5 fours.
    assert found == pytest.approx({"rewards/f/pass@2": (0.4 + 0.7) / 2, "rewards/f/pass@4": 0.9})
    assert grpo.pass_rates(samples, 1) == {}


@each_mode
def test_a_row_without_tokens_counts_its_0_in_grpo_loss(float64, aggregation, ratio_level):
    x, advantages = normal(2, 3, 4, 6, mean=-2, std=0.3), jnp.array([1.5, -0.5, -2.0, 1.0])
    rows, static = np.array([0, 1, 3]), (0.2, 0.28, 0.1, aggregation, ratio_level, 8)
    mask = MASK * np.array([1, 1, 0, 1])[:, None]
    loss_fn = jax.jit(grpo.grpo_loss, static_argnames=("aggregation", "ratio_level"))
    loss, _ = loss_fn(*x, advantages, mask, *static)
    loss_of_others, _ = loss_fn(*x[:, rows], advantages[rows], mask[rows], *static)
    assert loss != 0
    close(loss, loss_of_others * (1 if aggregation == "token" else 3 / 4))


def test_wrong_shapes_are_refused():
    """[B, 1] and [B] would broadcast to [B, B] without a word."""
    static = (0.2, 0.2, 0.1, "token", "token", 6)
    row, column, x = jnp.arange(4.0), jnp.arange(4.0)[:, None], jnp.ones((4, 6))
    two, ipo, hinge = jnp.ones((4, 2)), dpo.Args(loss="ipo"), dpo.Args(loss="hinge")
    for function, *arguments in (
        (grpo.grpo_loss, x, x, x, column, x, *static),
        (grpo.grpo_loss, x, x, x, x, x, *static),
        (grpo.grpo_loss, x, x[:, :1], x, row, x, *static),
        (grpo.grpo_loss, x, x, x[:1], row, x, *static),
        (grpo.grpo_loss, x, x, x, row, x[:, :5], *static),
        (grpo.group_relative_advantage, column, 2),
        (grpo.group_relative_advantage, row, 1),
        (grpo.leave_one_out_advantage, row, 1),
        (dpo.response_logprobs, x, x[:, :5]),
        (dpo.response_logprobs, row, row),
        (dpo.dpo_loss, column, row, row, row, 0.1),
        (dpo.dpo_loss, row, row, row, row[:3], 0.1),
        (dpo.dpo_loss, column, column, column, column, 0.1),
        *(
            (loss, row, row, row, column, 0.1)
            for loss in (dpo.dpo_loss, dpo.ipo_loss, dpo.hinge_loss)
        ),
        (dpo.pair_loss, two, two[:1], two[:1], ipo),
        (dpo.pair_loss, two[:1], two, two[:1], hinge),
    ):
        with pytest.raises(AssertionError):
            function(*arguments)


# ------------------------------------------------------------------------ KL, by exact enumeration


def test_kl_estimators(float64):
    """Of a policy with five tokens, whose expectations are sums.

    k1 and k3 both have the mean KL(pi || ref). E[k1 * grad log pi] with k1 held fixed, as in a
    reward, is the gradient of KL; with k3 it is not. As a loss, k1 has no gradient, and k3 that of
    the other direction, KL(ref || pi).
    """
    probabilities = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    logits = jnp.log(probabilities) + 0.7
    ref = jax.nn.log_softmax(jnp.array([0.3, -1.0, 0.5, 1.2, -0.4]))

    def k1(x):
        return ppo.compute_kl_divergence(jax.nn.log_softmax(x), ref)

    def k3(x):
        return jnp.expm1(-k1(x)) + k1(x)

    def policy_gradient(penalty):
        return jax.grad(lambda x: jnp.sum(probabilities * penalty * jax.nn.log_softmax(x)))(logits)

    kl, gradient = jax.value_and_grad(lambda x: jnp.sum(jax.nn.softmax(x) * k1(x)))(logits)
    close([(probabilities * k(logits)).sum() for k in (k1, k3)], kl)
    assert k3(logits).min() > 0 > k1(logits).min()
    close(policy_gradient(k1(logits)), gradient)
    assert np.abs(policy_gradient(k3(logits)) - gradient).max() > 0.05
    as_loss = [jax.grad(lambda x, k=k: jnp.sum(probabilities * k(x)))(logits) for k in (k1, k3)]
    close(as_loss[0], np.zeros(5))
    forward = jax.grad(lambda x: jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(x))))(logits)
    close(as_loss[1], forward)
    assert np.abs(forward).max() > 0.05

    # The policy's loss with -k1 as advantages: twenty tokens in the policy's proportions.
    tokens = np.repeat(np.arange(5), np.round(20 * probabilities).astype(int)).reshape(4, 5)
    old, advantages = jax.nn.log_softmax(logits)[tokens], -k1(logits)[tokens]

    def loss(x):
        logprobs = jax.nn.log_softmax(x)[tokens]
        return ppo.ppo_policy_loss(logprobs, old, advantages, jnp.ones((4, 5)), 0.2)[0]

    close(jax.grad(loss)(logits), gradient)
