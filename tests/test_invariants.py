"""What must not matter does not: padding, micro-batches, a learning rate of 0; and the data."""

import dataclasses
import functools
import itertools
import json
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_runs import REVIEWS, first_rows, make_inputs, metrics_of, small_args, write_jsonl

import dpo
import grpo
import iterative_dpo
import ppo
import reward
import sft

EOS = 7  # of the small vocabulary
SGD = optax.sgd(0.1)  # one object for all tests: what is compiled for it is kept
P, R = 5, 10  # prompt and response of the rollouts here
CONFIG = sft.GPT2Config(
    vocab_size=24, n_positions=32, n_embd=32, n_layer=1, n_head=2, initializer_range=0.2
)


@functools.cache
def make_params(script, model, seed):
    """(config, parameters) of an untrained model; of each script's own classes."""
    one = jnp.ones((1, 1), jnp.int32)
    config = script.GPT2Config(**dataclasses.asdict(CONFIG))
    return config, jax.jit(model(config).init)(jax.random.key(seed), one, one)["params"]


def random_rows(count, *lengths, seed=0):
    """Rows of `len(lengths)` lists of ids of random lengths up to these, without EOS."""
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(8, 24, rng.integers(1, n + 1)).tolist() for n in lengths]
        for _ in range(count)
    ]


def largest_difference(tree, other):
    differences = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), tree, other)
    return max(jax.tree.leaves(differences))


def assert_equal(tree, other):
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), tree, other
    )


@pytest.fixture(autouse=True)
def keep_signals():
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def tokenizer():
    return sft.load_tokenizer(REVIEWS / "tokenizer")


@pytest.fixture(scope="module")
def models():
    """(config, policy, reference, critic) of ppo.py, all different."""
    config, critic = make_params(ppo, ppo.RewardModel, 2)
    policies = []
    for seed in (0, 1):
        params = make_params(ppo, ppo.GPT2, seed)[1]
        toward_eos = params["wte"]["embedding"][EOS]  # a head that ends about half of the rows
        bias = 2 * toward_eos / jnp.sum(toward_eos**2)
        policies.append(params | {"ln_f": params["ln_f"] | {"bias": bias}})
    return config, *policies, critic


def ppo_args(**changes):
    return ppo.Args(**({"epochs": 2, "num_minibatches": 2, "micro_batch_size": 4} | changes))


def sample(config, params, temperature=1.0, rows=16, seed=0):
    """(tokens, mask, logprobs, scores) of a rollout on left-padded prompts of unequal lengths."""
    prompts = [row[0] for row in random_rows(rows, P, seed=seed)]
    tokens, mask = ppo.pad_rows(prompts, P, left=True)
    key = ppo.stream_key(seed, "rollout", 1)
    sampled = ppo.generate(params, config, tokens, mask, key, R, temperature, EOS)
    lengths = np.asarray(sampled[1][:, P:].sum(axis=1))
    assert lengths.min() < R == lengths.max()  # some rows end early, some never
    return *sampled, jnp.asarray(np.random.default_rng(seed).normal(size=rows), jnp.float32)


def train_ppo(models, batch, args, optimizer=SGD, key=0):
    """(parameters, metrics) after ppo.train_step."""
    config, policy, _, critic = models
    state = ppo.make_state({"policy": policy, "critic": critic}, optimizer, 0.1)
    configs = (config, config)
    state, metrics = ppo.train_step(state, batch, jax.random.key(key), configs, optimizer, args)
    return state.params, jax.device_get(metrics)


def rollout_batch(models, sampled, args):
    """ppo.make_experience of a rollout, the parameters being the policy's; its kl_coef is 0.1."""
    config, policy, reference, critic = models
    state = ppo.make_state({"policy": policy, "critic": critic}, SGD, 0.1)
    *sampled, scores = sampled
    tokens, mask, _ = sampled
    ref_logprobs, _ = ppo.policy_logprobs(reference, config, tokens, mask, P, args.temperature)
    return ppo.make_experience(state, *sampled, ref_logprobs, scores, config, args)


GRPO_CONFIG = grpo.GPT2Config(**dataclasses.asdict(CONFIG))
GROUP = 4  # completions to a prompt


def grpo_args(**changes):
    sizes = {"num_generations": GROUP, "num_minibatches": 2, "micro_batch_size": 4}
    return grpo.Args(**({"epochs": 2} | sizes | changes))


GRPO_ARGS = grpo_args(kl_in="loss", ratio_level="sequence", kl_coef=0.5)


def sample_groups(policy, reference, temperature=1.0):
    """What grpo.make_experience takes, of four prompts; scores drawn from N(0, 1)."""
    prompts = [row[0] for row in random_rows(4, P)]
    prompts, mask = grpo.pad_rows(prompts, P, left=True)
    key = grpo.stream_key(0, "rollout", 1)
    sampling = (key, R, temperature, EOS, 0, GROUP)
    tokens, mask, logprobs = grpo.generate(policy, GRPO_CONFIG, prompts, mask, *sampling)
    ended = (np.asarray(tokens)[:, P:] == EOS).any(axis=1)
    assert 1 < ended.sum() < 15
    ref_logprobs, _ = grpo.policy_logprobs(reference, GRPO_CONFIG, tokens, mask, P, temperature)
    scores = np.random.default_rng(0).normal(size=len(tokens)).astype(np.float32)
    return tokens, mask, logprobs, ref_logprobs, scores, ended


@pytest.fixture(scope="module")
def groups(models):
    return sample_groups(*models[1:3])


def train_grpo(policy, batch, args, optimizer=SGD):
    """(parameters, metrics) after grpo.train_step, which leaves the reference alone."""
    state = grpo.make_state(policy, optimizer, ref_moves=True)
    key = jax.random.key(0)
    state, metrics = grpo.train_step(state, batch, key, GRPO_CONFIG, optimizer, args)
    assert_equal(state.ref_params, policy)
    return state.params, jax.device_get(metrics)


DPO_ARGS = dpo.Args(micro_batch_size=4, nll_coef=0.5)


def dpo_batch(script=dpo, rows=8):
    """(config, parameters, rows of [prompt, chosen, rejected], their batch, reference and all)."""
    config, params = make_params(script, script.GPT2, 0)
    rows = random_rows(rows, 5, 12, 9)
    batch = script.make_batch(rows, 20)
    logprobs = np.asarray(script.pair_logprobs(params, batch, config))
    noise = np.random.default_rng(0).normal(size=logprobs.shape).astype(np.float32)
    return config, params, rows, batch | {"ref_logprobs": logprobs + noise}


def train_pairs(script, config, params, batch, args, optimizer=SGD):
    """(parameters, metrics) after train_step of dpo.py or iterative_dpo.py."""
    state = script.make_state(params, optimizer)
    state, metrics = script.train_step(state, batch, config, optimizer, args)
    return state.params, jax.device_get(metrics)


# ------------------------------------------------------------------------------ padding


def junk(tokens, mask, seed=0):
    """Other ids at the places that are masked."""
    ids = np.random.default_rng(seed).integers(0, 24, np.shape(tokens))
    return np.where(np.asarray(mask) > 0, tokens, ids).astype(np.int32)


def test_padding_does_not_matter_to_sft():
    config, params = make_params(sft, sft.GPT2, 0)
    batch = sft.make_batch(random_rows(6, 5, 12), 20)
    assert (batch["mask"] == 0).any()
    optimizer, results = SGD, []
    for tokens in (batch["tokens"], junk(batch["tokens"], batch["mask"])):
        state = sft.make_state(params, optimizer)
        changed, args = batch | {"tokens": tokens}, sft.Args(micro_batch_size=3)
        results.append(sft.train_step(state, changed, config, optimizer, args))
    assert_equal(results[0], results[1])


def test_only_the_completion_is_learned():
    """Other prompts with the same completions have other losses; a changed target too."""
    rows = [[[8, 9, 10], [11, 12, EOS]], [[13], [14, EOS]]]
    batch = sft.make_batch(rows, 8)
    assert batch["tokens"].tolist() == [[8, 9, 10, 11, 12, EOS], [13, 14, EOS, 0, 0, 0]]
    assert batch["mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]]
    whole = sft.make_batch(rows, 8, train_on_prompt=True)
    assert (whole["loss_mask"] == whole["mask"]).all()
    assert sft.make_batch([rows[0], []], 8)["mask"].sum() == 6  # an empty row counts nothing


def test_padding_does_not_matter_to_reward():
    config, params = make_params(reward, reward.RewardModel, 0)
    batch = reward.make_batch(random_rows(6, 5, 12, 9), 20, [0.0] * 6)
    assert (batch["mask"] == 0).any()
    optimizer, results = SGD, []
    for tokens in (batch["tokens"], junk(batch["tokens"], batch["mask"])):
        state = reward.make_state(params, optimizer)
        changed = batch | {"tokens": tokens}
        args = reward.Args(micro_batch_size=3, center_coef=0.1)
        results.append(
            [
                reward.eval_step(params, tokens, batch["mask"], config),
                reward.train_step(state, changed, config, optimizer, args),
            ]
        )
    assert_equal(results[0], results[1])


def test_a_pair_is_scored_as_its_texts_alone():
    """Two texts of one row, of unequal lengths: each score is that of the unpadded text."""
    config, params = make_params(reward, reward.RewardModel, 0)
    rows = random_rows(2, 5, 12, 9)
    batch = reward.make_batch(rows, 20, [0.0] * 2)
    pairs = reward.eval_step(params, batch["tokens"], batch["mask"], config)
    apply = jax.jit(reward.RewardModel(config).apply)
    for i, (prompt, *answers) in enumerate(rows):
        for answer, scores in zip(answers, pairs):
            text = jnp.array([prompt + answer])
            alone = apply({"params": params}, text, jnp.ones_like(text))
            assert float(scores[i]) == pytest.approx(float(alone[0, -1]), abs=1e-5)


def test_padding_does_not_matter_to_ppo(models):
    args = ppo_args()
    tokens, mask, logprobs, scores = sample(models[0], models[1])
    response_mask = np.asarray(mask)[:, P:]
    assert (np.asarray(mask)[:, :P] == 0).any() and (response_mask == 0).any()
    noise = np.random.default_rng(3).normal(size=logprobs.shape).astype(np.float32)

    def spoil(x):
        return jnp.where(response_mask > 0, x, noise)

    batch, metrics = rollout_batch(models, (tokens, mask, logprobs, scores), args)
    other = (jnp.asarray(junk(tokens, mask)), mask, spoil(logprobs), scores)
    other_batch, other_metrics = rollout_batch(models, other, args)
    assert_equal(metrics, other_metrics)
    for name in ("values", "advantages", "returns"):
        assert_equal(batch[name], other_batch[name])
        assert (np.asarray(batch[name])[response_mask == 0] == 0).all()
    spoiled = other_batch | {
        name: spoil(batch[name]) for name in ("values", "advantages", "returns")
    }
    assert_equal(train_ppo(models, batch, args), train_ppo(models, spoiled, args))


def test_padding_does_not_matter_to_grpo(models, groups):
    """Neither what stands there, nor three more columns of it before the prompts."""
    tokens, mask, logprobs, ref_logprobs, *rest = groups
    response_mask = np.asarray(mask)[:, P:]
    assert (np.asarray(mask)[:, :P] == 0).any() and (response_mask == 0).any()
    noise = np.random.default_rng(3).normal(size=logprobs.shape).astype(np.float32)
    spoiled = [jnp.where(response_mask > 0, x, noise) for x in (logprobs, ref_logprobs)]
    spoiled_tokens = jnp.asarray(junk(tokens, mask))
    for args in (grpo_args(kl_in="reward"), GRPO_ARGS):
        batch, metrics = grpo.make_experience(*groups, args)
        other, other_metrics = grpo.make_experience(spoiled_tokens, mask, *spoiled, *rest, args)
        assert_equal((batch["advantages"], metrics), (other["advantages"], other_metrics))
    results = [train_grpo(models[1], x, GRPO_ARGS) for x in (batch, other)]
    assert_equal(results[0], results[1])
    wider = other | {name: jnp.pad(other[name], ((0, 0), (3, 0))) for name in ("tokens", "mask")}
    results.append(train_grpo(models[1], wider, GRPO_ARGS))
    assert largest_difference(results[0], results[2]) < 1e-5
    assert largest_difference(results[0][0], models[1]) > 1e-3


def test_padding_does_not_matter_to_dpo():
    """Neither what stands there nor how much of it there is."""
    config, params, _, batch = dpo_batch()
    assert (batch["mask"] == 0).any()
    spoiled = batch | {"tokens": junk(batch["tokens"], batch["mask"])}
    results = [train_pairs(dpo, config, params, x, DPO_ARGS) for x in (batch, spoiled)]
    assert_equal(results[0], results[1])
    wider = {name: np.pad(x, ((0, 0), (0, 0), (0, 7))) for name, x in spoiled.items() if x.ndim > 2}
    found = [dpo.pair_logprobs(params, x, config) for x in (batch, wider)]
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)
    assert largest_difference(results[0][0], params) > 1e-3


def test_a_pair_has_the_logprobs_of_its_texts_alone():
    """Of the answer's tokens, EOS among them, and not of the prompt's."""
    config, params, rows, batch = dpo_batch()
    pairs = np.asarray(dpo.pair_logprobs(params, batch, config))
    apply = jax.jit(dpo.GPT2(config).apply)
    for (prompt, *answers), found in zip(rows[:1], pairs):
        for answer, logprob in zip(answers, found):
            text = jnp.array([prompt + answer])
            logits = np.asarray(apply({"params": params}, text, jnp.ones_like(text)), np.float64)
            logits = logits[0, len(prompt) - 1 : -1]  # [length of the answer, V]
            alone = logits[range(len(answer)), answer] - np.log(np.exp(logits).sum(axis=1))
            assert logprob == pytest.approx(alone.sum(), abs=1e-4)


# ------------------------------------------------------------------------------ micro-batches


def test_micro_batches_of_sft_equal_the_whole_batch():
    config, params = make_params(sft, sft.GPT2, 0)
    batch = sft.make_batch(random_rows(8, 5, 12), 20)
    assert len(set(batch["loss_mask"].sum(axis=1))) > 3
    optimizer, results = optax.sgd(1.0), []
    for micro_batch_size in (8, 1):
        state = sft.make_state(params, optimizer)
        args = sft.Args(micro_batch_size=micro_batch_size)
        results.append(sft.train_step(state, batch, config, optimizer, args))
    assert largest_difference(results[0][0].params, results[1][0].params) < 3e-6
    assert largest_difference(results[0][1], results[1][1]) < 1e-5
    assert largest_difference(results[0][0].params, params) > 1e-2


def test_micro_batches_of_reward_equal_the_whole_batch():
    config, params = make_params(reward, reward.RewardModel, 0)
    batch = reward.make_batch(random_rows(8, 5, 12, 9), 20, np.linspace(0, 1, 8))
    optimizer, results = optax.sgd(1.0), []
    for micro_batch_size in (8, 1):
        state = reward.make_state(params, optimizer)
        args = reward.Args(micro_batch_size=micro_batch_size, center_coef=0.1)
        results.append(reward.train_step(state, batch, config, optimizer, args))
    assert largest_difference(results[0][0].params, results[1][0].params) < 1e-5
    assert largest_difference(results[0][1], results[1][1]) < 1e-5
    assert largest_difference(results[0][0].params, params) > 1e-2


def test_micro_batches_of_ppo_equal_the_whole_batch(models):
    batch, _ = rollout_batch(models, sample(models[0], models[1]), ppo_args())
    results = [train_ppo(models, batch, ppo_args(micro_batch_size=n)) for n in (8, 1)]
    assert largest_difference(results[0][0], results[1][0]) < 1e-5
    assert largest_difference(results[0][1], results[1][1]) < 1e-4
    start = {"policy": models[1], "critic": models[3]}
    assert largest_difference(results[0][0], start) > 1e-3


@pytest.mark.parametrize(
    "aggregation, ratio_level",
    [("sequence", "sequence"), ("token", "token"), ("constant", "token")],
)
def test_micro_batches_of_grpo_equal_the_whole_batch(models, groups, aggregation, ratio_level):
    """Whatever the loss is a mean over, also where some rows count nothing."""
    changes = {"aggregation": aggregation, "ratio_level": ratio_level, "kl_in": "loss"}
    changes |= {"mask_truncated_completions": True, "kl_coef": 0.5}
    batch, _ = grpo.make_experience(*groups, grpo_args(**changes))
    assert len(set(np.asarray(batch["response_mask"].sum(axis=1)).tolist())) > 3
    results = [
        train_grpo(models[1], batch, grpo_args(micro_batch_size=n, **changes)) for n in (8, 1)
    ]
    assert largest_difference(results[0][0], results[1][0]) < 1e-5
    assert largest_difference(results[0][0], models[1]) > 1e-3
    different = {k: (v, results[1][1][k]) for k, v in results[0][1].items()}
    different = {k: v for k, v in different.items() if abs(v[0] - v[1]) > 1e-4}
    assert not different


@pytest.mark.parametrize(
    "script, loss",
    [(dpo, "sigmoid"), (dpo, "ipo"), (iterative_dpo, "hinge")],
    ids=["sigmoid", "ipo", "iterative-hinge"],
)
def test_micro_batches_of_dpo_equal_the_whole_batch(script, loss):
    config, params, _, batch = dpo_batch(script)
    args = script.Args(loss=loss, nll_coef=0.7, label_smoothing=0.1 if loss == "sigmoid" else 0.0)
    results = []
    for micro_batch_size in (8, 1):
        args = dataclasses.replace(args, micro_batch_size=micro_batch_size)
        results.append(train_pairs(script, config, params, batch, args, optax.sgd(0.3)))
    assert largest_difference(results[0][0], results[1][0]) < 1e-5
    assert largest_difference(results[0][1], results[1][1]) < 1e-4
    assert largest_difference(results[0][0], params) > 1e-2
    assert 0 < results[0][1]["rewards/accuracies"] < 1


# ------------------------------------------------------------------------------ ppo


def test_with_a_learning_rate_of_0_nothing_happens(models, temperature=0.7):
    """Ratio 1 and no KL at every update, so sampling and training see the same probabilities."""
    args = ppo_args(temperature=temperature, learning_rate=0.0, weight_decay=0.1)
    optimizer, _ = ppo.make_optimizer(args, 4)
    batch, _ = rollout_batch(models, sample(models[0], models[1], temperature), args)
    params, metrics = train_ppo(models, batch, args, optimizer)
    assert_equal(params, {"policy": models[1], "critic": models[3]})
    assert metrics["policy/updates"] == 4 and metrics["policy/clipfrac_avg"] == 0
    assert abs(metrics["val/ratio"] - 1) < 1e-5 and metrics["policy/approxkl_avg"] < 1e-10
    assert metrics["grad_norm"] > 0


def test_at_the_reference_there_is_no_kl(models):
    config, policy, _, critic = models
    sampled = sample(config, policy)
    _, metrics = rollout_batch((config, policy, policy, critic), sampled, ppo_args())
    assert abs(metrics["objective/non_score_reward"]) < 1e-5
    assert metrics["objective/rlhf_reward"] == pytest.approx(float(sampled[3].mean()), abs=1e-4)
    _, metrics = rollout_batch(models, sampled, ppo_args())
    # The references of the other tests do differ.
    assert metrics["objective/non_score_reward"] < -0.1 * 0.1
    expected = sampled[3].mean() + metrics["objective/non_score_reward"]
    assert metrics["objective/rlhf_reward"] == pytest.approx(float(expected), abs=1e-5)


def test_logprobs_at_a_temperature_agree_between_sampling_and_training(models):
    config, policy = models[:2]
    tokens, mask, logprobs, _ = sample(config, policy, temperature=0.7)
    real = np.asarray(mask)[:, P:] > 0
    again, entropy = ppo.policy_logprobs(policy, config, tokens, mask, P, 0.7)
    np.testing.assert_allclose(np.asarray(again)[real], np.asarray(logprobs)[real], atol=2e-5)
    other, _ = ppo.policy_logprobs(policy, config, tokens, mask, P, 1.0)
    assert np.abs(np.asarray(other - logprobs)[real]).max() > 0.1
    assert (np.asarray(entropy) > 0).all() and np.asarray(entropy).max() < np.log(24)


@pytest.mark.parametrize("t", [0, 4])
def test_a_value_is_of_what_was_seen_before_its_token(models, t):
    """Response tokens t, t + 1, … changed: values[:, :t + 1] stay, values[:, t + 1] do not."""
    config, policy, _, critic = models
    rng = np.random.default_rng(0)
    tokens = rng.integers(8, 24, (6, P + R))
    mask = np.ones((6, P + R), np.int32)
    mask[:3, :2] = 0
    changed = tokens.copy()
    changed[:, P + t :] = 8 + (tokens[:, P + t :] - 8 + 5) % 16
    values, others = (ppo.critic_values(critic, config, x, mask, P) for x in (tokens, changed))
    assert values.shape == (6, R)
    np.testing.assert_array_equal(values[:, : t + 1], others[:, : t + 1])
    assert (np.abs(values - others)[:, t + 1] > 1e-4).all()
    logprobs, others = (
        ppo.policy_logprobs(policy, config, x, mask, P, 1.0)[0] for x in (tokens, changed)
    )
    np.testing.assert_array_equal(logprobs[:, :t], others[:, :t])
    assert (np.abs(logprobs - others)[:, t] > 1e-4).all()


def test_stop_kl_ends_the_updates_of_a_rollout(models):
    """As if the optimizer had been taken away: the second update finds that the first one moved."""
    args = ppo_args(epochs=2)
    batch, _ = rollout_batch(models, sample(models[0], models[1]), args)
    stopped, metrics = train_ppo(models, batch, ppo_args(stop_kl=1e-8))
    assert metrics["policy/updates"] == 2
    distances = []
    for updates in (1, 2, 3):
        some = optax.scale_by_schedule(lambda i, n=updates: jnp.where(i < n, 1.0, 0.0))
        params, _ = train_ppo(models, batch, args, optax.chain(SGD, some))
        distances.append(largest_difference(params, stopped))
    assert distances[1] < 1e-7 and distances[0] > 1e-5 and distances[2] > 1e-5


def test_a_large_stop_kl_stops_nothing(models):
    batch, _ = rollout_batch(models, sample(models[0], models[1]), ppo_args())
    params, metrics = train_ppo(models, batch, ppo_args(stop_kl=1e9))
    assert metrics["policy/updates"] == 4
    assert_equal((params, metrics), train_ppo(models, batch, ppo_args()))


def test_metrics_are_means_over_the_updates_that_were_made(models):
    """After one update the policy was never off: the ratio is 1, whatever the others would give."""
    args = ppo_args(stop_kl=-1.0)
    batch, _ = rollout_batch(models, sample(models[0], models[1]), args)
    _, metrics = train_ppo(models, batch, args)
    assert metrics["policy/updates"] == 1
    assert metrics["policy/approxkl_avg"] < 1e-10 and abs(metrics["val/ratio"] - 1) < 1e-5
    _, metrics = train_ppo(models, batch, ppo_args())
    assert metrics["policy/approxkl_avg"] > 1e-7


def test_every_row_is_seen_once_in_an_epoch(models):
    """Linear in the rows: with the whole batch as one minibatch, the key does not matter."""
    batch, _ = rollout_batch(models, sample(models[0], models[1]), ppo_args())
    one = ppo_args(epochs=1, num_minibatches=1)
    first, second = (train_ppo(models, batch, one, key=key)[0] for key in (0, 1))
    assert largest_difference(first, second) < 1e-6
    first, second = (train_ppo(models, batch, ppo_args(), key=key)[0] for key in (0, 1))
    assert largest_difference(first, second) > 1e-5


@pytest.mark.parametrize("script", [sft, reward, ppo, dpo, grpo], ids=lambda x: x.__name__)
def test_a_step_leaves_the_parameters_it_started_from(script, models, groups):
    """train_step gives its state's buffers away; the reference and the start must keep theirs."""
    if script is ppo:
        start = {"policy": models[1], "critic": models[3]}
    elif script is grpo:
        start = models[1]
    else:
        config, start = make_params(script, getattr(script, "RewardModel", script.GPT2), 0)
    before = jax.tree.map(np.array, (start, models[2]))
    if script is ppo:
        batch, _ = rollout_batch(models, sample(models[0], models[1]), ppo_args())
        after, _ = train_ppo(models, batch, ppo_args())
    elif script is grpo:
        batch, _ = grpo.make_experience(*groups, GRPO_ARGS)
        after, _ = train_grpo(start, batch, GRPO_ARGS)
    elif script is dpo:
        after, _ = train_pairs(dpo, config, start, dpo_batch()[3], DPO_ARGS)
    else:
        if script is sft:
            batch = sft.make_batch(random_rows(8, 5, 12), 20)
        else:
            batch = reward.make_batch(random_rows(8, 5, 12, 9), 20, [0.0] * 8)
        state, args = script.make_state(start, SGD), script.Args(micro_batch_size=4)
        after = script.train_step(state, batch, config, SGD, args)[0].params
    assert_equal((start, models[2]), before)
    assert largest_difference(after, start) > 1e-5


def test_next_kl_coef():
    """Proportional to the relative error, which counts for 20 % at most."""
    args = SimpleNamespace(kl_target=6.0, batch_size=50, kl_horizon=1000)
    for kl, factor in ((6.0, 1.0), (6.3, 1.0025), (5.7, 0.9975), (60.0, 1.01), (-9.0, 0.99)):
        assert float(ppo.next_kl_coef(0.1, kl, args)) == pytest.approx(0.1 * factor, rel=1e-5)


@pytest.fixture(scope="module")
def talkative(inputs, tmp_path_factory):
    """A language model that ends about every second completion of 8 tokens."""
    folder = tmp_path_factory.mktemp("talkative") / "model"
    config, params = sft.load_model(inputs / "lm")
    bias = params["ln_f"]["bias"].at[0].set(5.0)
    table = params["wte"]["embedding"].at[config.eos_token_id, 0].set(1.2)
    params = params | {"ln_f": params["ln_f"] | {"bias": bias}, "wte": {"embedding": table}}
    sft.save_model(folder, config, params, inputs / "lm")
    return folder


def test_a_completion_that_does_not_end_pays_for_it(inputs, talkative, tmp_path):
    (tmp_path / "f.py").write_text(
        "def two(completions, **_):\n    return [2.0] * len(completions)\n"
    )
    changes = {"reward": (f"{tmp_path}/f.py:two",), "missing_eos_penalty": 0.75}
    changes |= {"model": str(talkative), "reward_model": None, "kl_coef": 0.0}
    ppo.main(small_args(ppo, inputs, tmp_path / "run", **changes))
    rows = metrics_of(tmp_path / "run")[1:]
    for row in rows:
        expected = 2 - 0.75 * row["completions/clipped_ratio"]
        assert row["objective/scores"] == pytest.approx(expected, abs=1e-5)
    assert any(0 < row["completions/clipped_ratio"] < 1 for row in rows)
    lines = (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["score"] for line in lines} == {2.0, 1.25}


@pytest.mark.parametrize(
    "script, count",  # of rollouts; there are four evaluations, at steps 0, 2, 4 and 6
    [(ppo, 6), (grpo, 6), (iterative_dpo, 2)],
    ids=["ppo", "grpo", "iterative_dpo"],
)
def test_no_two_rollouts_share_a_key(script, count, inputs, tmp_path, monkeypatch):
    keys, sample = [], script.sample

    def watched(params, ref_params, config, tokens, mask, key, sampling):
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return sample(params, ref_params, config, tokens, mask, key, sampling)

    monkeypatch.setattr(script, "sample", watched)
    script.main(small_args(script, inputs, tmp_path / "run"))
    assert len(keys) == len(set(keys)) == count + 4


def test_stream_keys_differ_by_seed_name_and_step():
    streams = [
        (seed, name, step)
        for seed in (0, 1)
        for name in ("rollout", "eval", "init")
        for step in (0, 1, 2)
    ]
    keys = [tuple(np.asarray(jax.random.key_data(ppo.stream_key(*s))).tolist()) for s in streams]
    assert len(set(keys)) == len(streams)
    again = [tuple(np.asarray(jax.random.key_data(sft.stream_key(*s))).tolist()) for s in streams]
    assert keys == again


def test_consecutive_steps_sample_different_texts(models):
    config, policy = models[:2]
    tokens, mask = ppo.pad_rows([[8, 9, 10]] * 8, P, left=True)
    first, second, again = (
        ppo.generate(policy, config, tokens, mask, ppo.stream_key(0, "rollout", i), R, 1.0, EOS)[0]
        for i in (1, 2, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(second)).any(axis=1).all()
    assert len({tuple(row) for row in np.asarray(first).tolist()}) > 1


# ------------------------------------------------------------------------------ grpo


def test_with_a_learning_rate_of_0_grpo_does_nothing(models):
    """At a temperature: sampling, reference and update see the same probabilities.

    At the reference there is no KL, neither k1 in the reward nor k3 in the loss; else there is.
    """
    args = grpo_args(temperature=0.7, kl_in="loss", learning_rate=0.0, weight_decay=0.1)
    optimizer, _ = grpo.make_optimizer(args, 4)
    sampled = sample_groups(*models[1:3], temperature=0.7)
    tokens, mask, logprobs, other_logprobs, scores, ended = sampled
    again, _ = grpo.policy_logprobs(models[1], GRPO_CONFIG, tokens, mask, P, 0.7)
    found = []
    for ref_logprobs in (again, other_logprobs):
        sampled = (tokens, mask, logprobs, ref_logprobs, scores, ended)
        batch, reward_metrics = grpo.make_experience(*sampled, args)
        params, metrics = train_grpo(models[1], batch, args, optimizer)
        assert_equal(params, models[1])
        for name in ("policy/clipfrac_avg", "clip_ratio/low_mean", "clip_ratio/high_mean"):
            assert metrics[name] == 0
        assert abs(metrics["val/ratio"] - 1) < 1e-5 and metrics["policy/approxkl_avg"] < 1e-10
        assert metrics["grad_norm"] > 0 and 0 < metrics["policy/entropy_avg"] < np.log(24)
        found.append((float(reward_metrics["objective/non_score_reward"]), float(metrics["kl"])))
        expected = scores.mean() + found[-1][0]
        assert reward_metrics["objective/rlhf_reward"] == pytest.approx(expected, abs=1e-5)
    assert abs(found[0][0]) < 1e-5 and abs(found[0][1]) < 1e-9
    assert found[1][0] < -0.1 and found[1][1] > 0.01


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("advantage", ["group", "group-std", "leave-one-out"])
def test_advantages_by_hand(groups, advantage, kl_in):
    """The KL of a whole completion is taken off its score before the group is looked at."""
    args = grpo_args(advantage=advantage, kl_in=kl_in, kl_coef=0.7)
    batch, metrics = grpo.make_experience(*groups, args)
    _, mask, logprobs, ref_logprobs, scores, _ = (np.asarray(x, np.float64) for x in groups)
    kl = ((logprobs - ref_logprobs) * mask[:, P:]).sum(axis=1)
    assert kl.std() > 0.5
    expected, spreads = [], []
    for first in range(0, len(scores), GROUP):
        rows = range(first, first + GROUP)
        rewards = [scores[i] - (0.7 * kl[i] if kl_in == "reward" else 0) for i in rows]
        for i, own in enumerate(rewards):
            others = rewards[:i] + rewards[i + 1 :]
            baseline = np.mean(others if advantage == "leave-one-out" else rewards)
            scale = np.std(rewards, ddof=1) + 1e-4 if advantage == "group-std" else 1
            expected.append((own - baseline) / scale)
        spreads.append(np.std([scores[i] for i in rows], ddof=1))
    np.testing.assert_allclose(batch["advantages"], expected, atol=2e-5)
    assert metrics["reward_std"] == pytest.approx(np.mean(spreads), rel=1e-5)
    assert metrics["objective/non_score_reward"] == pytest.approx(-0.7 * kl.mean(), rel=1e-4)
    assert metrics["frac_reward_zero_std"] == 0


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_completions_are_masked_where_asked(groups, masked):
    """They count in their group's mean all the same."""
    _, mask, *_, ended = groups
    args = grpo_args(mask_truncated_completions=masked)
    batch, _ = grpo.make_experience(*groups, args)
    expected = np.asarray(mask)[:, P:] * (ended[:, None] if masked else 1)
    assert_equal(batch["response_mask"], expected.astype(np.float32))
    assert_equal(batch["mask"], mask)  # they are still attended to
    plain, _ = grpo.make_experience(*groups, grpo_args())
    assert_equal(batch["advantages"], plain["advantages"])


def test_a_rollout_of_truncated_completions_teaches_nothing(models, groups):
    """With --mask-truncated-completions: as an untrained model's first rollouts are."""
    args = dataclasses.replace(GRPO_ARGS, mask_truncated_completions=True)
    none = np.zeros(len(groups[0]), bool)
    batch, metrics = grpo.make_experience(*groups[:5], none, args)
    params, update_metrics = train_grpo(models[1], batch, args)
    assert_equal(params, models[1])
    assert all(np.isfinite(float(x)) for x in (metrics | update_metrics).values())


@pytest.mark.parametrize("size", [3, 7, 8])
def test_groups_without_a_spread_are_counted(size):
    """Also where the mean of equal numbers is not quite that number."""
    values = np.array([0.1, 1 / 3, -0.7, 1.9], np.float32)
    zeros = jnp.zeros((len(values) * size, 3))
    tokens = jnp.zeros((len(zeros), 5), jnp.int32)
    shares = []
    for changed in (0, 1, 2):
        scores = values.repeat(size)
        scores[: changed * size : size] += 0.5
        rest = (scores, np.ones(len(scores), bool), grpo_args(num_generations=size))
        shares.append(grpo.make_experience(tokens, tokens, zeros, zeros, *rest)[1])
    found = [float(metrics["frac_reward_zero_std"]) for metrics in shares]
    assert found == [1.0, 0.75, 0.5]


def test_a_group_is_of_one_prompt(inputs, tmp_path, monkeypatch):
    """A reward that depends on the prompt alone gives no advantage, and so no gradient.

    And what stands in a row are the prompt, the completion and the score that belong together.
    """
    path = tmp_path / "f.py"
    path.write_text(
        "def f(prompts, completions, **_):\n    return [len(prompt) for prompt in prompts]\n"
        "def g(prompts, completions, **_):\n    return [len(text) for text in completions]\n"
    )
    seen, make_experience = [], grpo.make_experience
    tokenizer = grpo.load_tokenizer(inputs / "lm")

    def watched(*sampled):
        seen.append(sampled)
        return make_experience(*sampled)

    monkeypatch.setattr(grpo, "make_experience", watched)
    changes = {"reward_model": None, "missing_eos_penalty": 0.0, "kl_coef": 0.0}
    for name in "fg":
        args = small_args(grpo, inputs, tmp_path / name, reward=(f"{path}:{name}",), **changes)
        grpo.main(args)
    for row in metrics_of(tmp_path / "f")[1:]:
        assert row["frac_reward_zero_std"] == 1 and row["reward_std"] == row["grad_norm"] == 0
    for row in metrics_of(tmp_path / "g")[1:]:
        assert row["frac_reward_zero_std"] < 1 and row["grad_norm"] > 0
    for name, (tokens, mask, *_, scores, _, _) in zip(6 * "f" + 6 * "g", seen):
        tokens, mask = np.asarray(tokens), np.asarray(mask)
        width = tokens.shape[1] - 8
        prompts = [
            tokenizer.decode(x[:width][m[:width] > 0].tolist()) for x, m in zip(tokens, mask)
        ]
        completions = grpo.decode_responses(tokenizer, tokens, mask, width, tokenizer.eot_token)
        assert prompts[::2] == prompts[1::2] and len(set(prompts)) == 4
        assert [len(x) for x in (prompts if name == "f" else completions)] == scores.tolist()


@pytest.mark.parametrize("share", [0.25, None])
def test_where_the_reference_stands(share, inputs, tmp_path, monkeypatch):
    """It moves at every second step towards the policy there; without --ref-sync-steps never."""
    saved, used = [], []
    save, sample = grpo.RunFolder.save, grpo.sample

    def watched_save(run, step, state):
        saved.append(jax.tree.map(np.array, (state.params, state.ref_params)))
        save(run, step, state)

    def watched_sample(params, ref_params, *rest):
        used.append(jax.tree.map(np.array, ref_params))
        return sample(params, ref_params, *rest)

    monkeypatch.setattr(grpo.RunFolder, "save", watched_save)
    monkeypatch.setattr(grpo, "sample", watched_sample)
    changes = {"save_every": 1, "eval_every": 100}
    changes |= {} if share is None else {"ref_sync_steps": 2, "ref_mixup_alpha": share}
    grpo.main(small_args(grpo, inputs, tmp_path / "run", **changes))
    start = grpo.load_model(inputs / "lm")[1]
    references = [start, start]  # of the held-out prompts at step 0, and of step 1
    for step, (params, reference) in enumerate(saved, 1):
        expected = references[-1]
        if share is None:
            assert reference is None
        else:
            if step % 2 == 0:
                assert largest_difference(params, expected) > 2e-4
                expected = jax.tree.map(
                    lambda new, old: share * new + (1 - share) * old, params, expected
                )
            assert largest_difference(reference, expected) < 1e-6
        references.append(expected)  # of the next step
    references[-1] = references[-2]  # step 6 is evaluated before the reference moves
    assert len(used) == len(references) == 8
    for found, reference in zip(used, references):
        assert largest_difference(found, reference) < 1e-6


# ------------------------------------------------------------------------------ iterative_dpo


@pytest.mark.parametrize("scores", [(0.3, 1.0), (1.0, -1.0), (0.5, 0.5), (60.0, 0.0)])
def test_drawn_labels_have_the_probability_of_their_scores(scores):
    """The first wins with sigmoid(r1 - r2), within four standard errors."""
    count, rng = 40_000, np.random.default_rng(0)
    pairs = iterative_dpo.make_pairs(np.array([scores] * count), "sampled", rng)
    assert pairs.shape == (count, 2) and (pairs.sum(axis=1) == 1).all() and pairs.min() == 0
    share = (pairs[:, 0] == 0).mean()
    expected = 1 / (1 + np.exp(scores[1] - scores[0]))
    assert abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / count)


def test_the_best_stands_against_the_worst():
    """Of each group, whatever their order; where all are equal one stands against itself."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 5))
    scores[[3, 17]] = 0.25
    scores[8] = [1, 0, 1, 0, 1]  # equal scores among others are no tie
    pairs = iterative_dpo.make_pairs(scores, "best-worst", rng)
    chosen, rejected = np.take_along_axis(scores, pairs, axis=1).T
    assert (chosen == scores.max(axis=1)).all() and (rejected == scores.min(axis=1)).all()
    assert np.flatnonzero(pairs[:, 0] == pairs[:, 1]).tolist() == [3, 17]


def test_a_pair_is_of_one_prompt(inputs, talkative, tmp_path, monkeypatch):
    """From sampling to training: prompt, completions, scores and pairs belong together.

    And the reference of both rounds is the start.
    """
    path = tmp_path / "f.py"
    path.write_text(
        "def f(prompts, completions, **_):\n"
        "    return [len(p) + sum(map(ord, c)) / 1e4 for p, c in zip(prompts, completions)]\n"
    )
    sampled, labelled, learned, references = [], [], [], []
    sample, make_pairs = iterative_dpo.sample, iterative_dpo.make_pairs
    dataset_logprobs = iterative_dpo.dataset_logprobs

    def watched_sample(*rest):
        tokens, mask, *logprobs = sample(*rest)
        if len(tokens) == 48:  # of a round, not of the held-out prompts
            sampled.append((np.asarray(tokens), np.asarray(mask)))
        return tokens, mask, *logprobs

    def watched_pairs(scores, *rest):
        labelled.append(scores)
        return make_pairs(scores, *rest)

    def watched_logprobs(params, config, rows, *rest):
        learned.append(rows)
        references.append(jax.tree.map(np.array, params))
        return dataset_logprobs(params, config, rows, *rest)

    monkeypatch.setattr(iterative_dpo, "sample", watched_sample)
    monkeypatch.setattr(iterative_dpo, "make_pairs", watched_pairs)
    monkeypatch.setattr(iterative_dpo, "dataset_logprobs", watched_logprobs)
    changes = {"reward": (f"{path}:f",), "reward_model": None, "missing_eos_penalty": 0.0}
    changes |= {"model": str(talkative), "pair": "best-worst"}
    iterative_dpo.main(small_args(iterative_dpo, inputs, tmp_path / "run", **changes))
    tokenizer = iterative_dpo.load_tokenizer(talkative)
    eos_id, score_of = tokenizer.eot_token, iterative_dpo.load_function(f"{path}:f")
    assert len(sampled) == len(labelled) == len(learned) == 2
    assert_equal(references, [iterative_dpo.load_model(talkative)[1]] * 2)
    for (tokens, mask), scores, rows in zip(sampled, labelled, learned):
        prompts = [x[m > 0].tolist() for x, m in zip(tokens[:, :-8], mask[:, :-8])]
        answers = [x[m > 0].tolist() for x, m in zip(tokens[:, -8:], mask[:, -8:])]
        assert prompts[::2] == prompts[1::2] and len({tuple(ids) for ids in prompts}) == 24
        assert 5 < sum(ids[-1] == eos_id for ids in answers) < 43
        texts = [tokenizer.decode([x for x in ids if x != eos_id]) for ids in answers]
        found = np.reshape(score_of(list(map(tokenizer.decode, prompts)), texts), (24, 2))
        np.testing.assert_allclose(scores, found, rtol=1e-6)
        assert (found[:, 0] < found[:, 1]).any() and (found[:, 0] > found[:, 1]).any()
        expected = [
            [
                prompts[2 * i],
                answers[2 * i + scores[i].argmax()],
                answers[2 * i + scores[i].argmin()],
            ]
            for i in range(24)
        ]
        assert rows == expected


def test_the_previous_policy_as_reference(inputs, tmp_path, monkeypatch):
    """The one that sampled the round's pairs: the start in the first, then the last round's."""
    saved, used, sampled_by = [], [], []
    save, sample = iterative_dpo.RunFolder.save, iterative_dpo.sample
    dataset_logprobs = iterative_dpo.dataset_logprobs

    def watched_save(run, step, state):
        saved.append(jax.tree.map(np.array, state.params))
        save(run, step, state)

    def watched_sample(params, *rest):
        sampled_by.append(jax.tree.map(np.array, params))
        return sample(params, *rest)

    def watched_logprobs(params, *rest):
        used.append(jax.tree.map(np.array, params))
        return dataset_logprobs(params, *rest)

    monkeypatch.setattr(iterative_dpo.RunFolder, "save", watched_save)
    monkeypatch.setattr(iterative_dpo, "sample", watched_sample)
    monkeypatch.setattr(iterative_dpo, "dataset_logprobs", watched_logprobs)
    changes = {"eval_every": 100, "reference": "previous"}
    iterative_dpo.main(small_args(iterative_dpo, inputs, tmp_path / "run", **changes))
    start = iterative_dpo.load_model(inputs / "lm")[1]
    assert len(saved) == 2 and largest_difference(saved[0], start) > 2e-4
    assert_equal(sampled_by, [start, start, *saved])  # held out, two rounds, held out
    assert_equal(used, [start, saved[0]])


# ------------------------------------------------------------------------------ data


def test_encode_rows(tokenizer, capsys):
    eos_id = tokenizer.eot_token
    rows = [
        {"prompt": "The film was good, and", "a": " it is <|endoftext|>", "b": " no"},
        {"prompt": "", "a": " yes", "b": " " + "very " * 30},
        {"prompt": "", "a": " yes", "b": " no"},
    ]
    kept, encoded = sft.encode_rows(rows, ["a", "b"], tokenizer, eos_id, 3, 20)
    assert kept == [rows[0], rows[2]]
    assert "3 rows: 1 dropped as too long, 1 prompts shortened" in capsys.readouterr().out
    for row, (_, *completions) in zip(kept, encoded):
        for name, ids in zip("ab", completions):
            assert ids[-1] == eos_id and eos_id not in ids[:-1]
            assert tokenizer.decode(ids[:-1]) == row[name]
    assert encoded[0][0] == tokenizer.encode_ordinary(rows[0]["prompt"])[-3:]
    assert encoded[1][0] == [eos_id]


def test_encode_rows_of_prompts_alone(tokenizer, capsys):
    """As iterative_dpo.py reads them: nothing is dropped, a long prompt loses its beginning."""
    rows = [{"prompt": "", "x": 1}, {"prompt": "The film was good, and", "x": 2}]
    ids = tokenizer.encode_ordinary(rows[1]["prompt"])
    rest = ([], tokenizer, tokenizer.eot_token, 3, 1)
    assert iterative_dpo.encode_rows(rows, *rest) == (rows, [[[tokenizer.eot_token]], [ids[-3:]]])
    assert "2 rows: 0 dropped as too long, 1 prompts shortened" in capsys.readouterr().out


def test_a_completion_that_just_fits_is_kept(tokenizer):
    ids = tokenizer.encode_ordinary(" it is a good film")
    row = {"prompt": "x", "completion": " it is a good film"}
    rest = (["completion"], tokenizer, tokenizer.eot_token, 4)
    assert len(sft.encode_rows([row], *rest, len(ids) + 1)[0]) == 1
    with pytest.raises(SystemExit):
        sft.encode_rows([row], *rest, len(ids))


@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_every_token_of_a_text_is_a_target_once(tokenizer, size):
    eos_id = tokenizer.eot_token
    for count in range(1, 12):
        text = " ".join(["film", "was", "good", "the"][i % 4] for i in range(count))
        ids = tokenizer.encode_ordinary(text)
        pieces = sft.encode_texts([{"text": text}], tokenizer, eos_id, size)
        assert list(itertools.chain(*(piece for _, piece in pieces))) == [*ids, eos_id]
        before = list(itertools.chain(*([*context, *piece[:-1]] for context, piece in pieces)))
        assert before == [eos_id, *ids]  # what stands before each target
        assert all(1 <= len(piece) <= size and len(context) == 1 for context, piece in pieces)


def test_texts_are_trained_on(inputs, tmp_path):
    """Rows with "text" and rows with prompt and completion may stand in one file."""
    texts = [{"text": row["prompt"] + row["completion"]} for row in first_rows("sft_train", 16)]
    path = write_jsonl(tmp_path / "rows.jsonl", texts + first_rows("sft_train", 16))
    sft.main(small_args(sft, inputs, tmp_path / "run", dataset=str(path)))
    assert metrics_of(tmp_path / "run")[-1]["step"] == 8


def test_encode_prompts(tokenizer, capsys):
    rows = [{"prompt": "", "x": 1}, {"prompt": "The film", "x": 2}, {"prompt": "a " * 30, "x": 3}]
    encoded = ppo.encode_prompts(rows, tokenizer, tokenizer.eot_token, 8)
    assert encoded == [
        (rows[0], [tokenizer.eot_token]),
        (rows[1], tokenizer.encode_ordinary("The film")),
    ]
    assert "3 prompts: 1 dropped" in capsys.readouterr().out


def test_decoded_responses_are_without_eos_and_padding(tokenizer):
    eos_id = tokenizer.eot_token
    prompt, response = (tokenizer.encode_ordinary(text) for text in ("The film", " was good"))
    row = [*prompt, *response, eos_id, *response]
    mask = [1] * (len(prompt) + len(response) + 1) + [0] * len(response)
    texts = ppo.decode_responses(tokenizer, [row], [mask], len(prompt), eos_id)
    assert texts == [" was good"]


def test_length_batches():
    lengths = np.random.default_rng(0).integers(1, 40, 50)
    batches = sft.length_batches(lengths, 8, 3, 0)
    assert batches.shape == (18, 8)
    epochs = batches.reshape(3, 48)
    left_out = set()
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 48 and set(epoch.tolist()) <= set(range(50))
        left_out |= set(range(50)) - set(epoch.tolist())
        spans = np.sort(
            [(lengths[b].min(), lengths[b].max()) for b in epoch.reshape(-1, 8)], axis=0
        )
        assert (spans[:-1, 1] <= spans[1:, 0]).all()  # the batches of an epoch cut up its lengths
        first = [lengths[b].min() for b in epoch.reshape(-1, 8)]
        assert first != sorted(first)  # but do not come in their order
    assert len(left_out) > 2
    assert not (np.sort(epochs[0]) == np.sort(epochs[1])).all()
    np.testing.assert_array_equal(batches, sft.length_batches(lengths, 8, 3, 0))
    np.testing.assert_array_equal(batches[:6], sft.length_batches(lengths, 8, 1, 0))
    assert (batches != sft.length_batches(lengths, 8, 3, 1)).any()


def test_prompt_batches():
    batches = ppo.prompt_batches(10, 4, 6, 0)
    assert batches.shape == (6, 4)
    flat = batches.ravel()
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert (flat[:10] != flat[10:20]).any() and len(set(flat[20:].tolist())) == 4
    np.testing.assert_array_equal(batches[:3], ppo.prompt_batches(10, 4, 3, 0))
    assert (batches != ppo.prompt_batches(10, 4, 6, 1)).any()
    assert ppo.prompt_batches(3, 8, 1, 0).shape == (1, 8)  # fewer rows than one batch wants


def test_padded_width():
    for limit in (1, 7, 48, 64):
        widths = [sft.padded_width(n, limit) for n in range(1, limit + 1)]
        assert len(set(widths)) <= 4 and widths == sorted(widths)
        assert all(n <= width < n + -(-limit // 4) for n, width in enumerate(widths, 1))


@pytest.mark.parametrize("batch_size", [3, 16])
def test_held_out_loss_is_the_mean_over_tokens(batch_size):
    """Whatever the batches: the mean over all completion tokens."""
    config, params = make_params(sft, sft.GPT2, 0)
    rows = random_rows(7, 5, 12)
    total, right, count = 0.0, 0, 0
    tokens, mask = sft.pad_rows([prompt + completion for prompt, completion in rows], 20)
    logits = jax.jit(sft.GPT2(config).apply)({"params": params}, tokens, mask)
    for (prompt, completion), row in zip(rows, np.asarray(jax.nn.log_softmax(logits))):
        logp = row[len(prompt) - 1 : len(prompt) - 1 + len(completion)]
        total -= logp[np.arange(len(completion)), completion].sum()
        right += (logp.argmax(axis=1) == completion).sum()
        count += len(completion)
    metrics = sft.evaluate(params, config, list(rows), batch_size, 20)
    assert metrics["eval/loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval/mean_token_accuracy"] == pytest.approx(right / count)


@pytest.mark.parametrize("batch_size", [5, 16])
def test_held_out_scores_stand_in_the_order_of_the_rows(batch_size):
    config, params = make_params(reward, reward.RewardModel, 0)
    rows = random_rows(12, 5, 12, 9)
    scores, metrics = reward.evaluate(params, config, rows, batch_size, 20)
    expected = []
    for row in rows:
        batch = reward.make_batch([row], 20, [0.0])
        pair = reward.eval_step(params, batch["tokens"], batch["mask"], config)
        expected.append([float(x[0]) for x in pair])
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    margins = np.diff(expected)[:, 0]
    assert metrics["eval/rewards/accuracies"] == pytest.approx((margins < 0).mean())
    assert metrics["eval/loss"] == pytest.approx(np.log1p(np.exp(margins)).mean(), rel=1e-4)


def test_logprobs_of_pairs_stand_in_the_order_of_the_rows():
    config, params, rows, batch = dpo_batch()
    expected = np.asarray(dpo.pair_logprobs(params, batch, config))
    found = dpo.dataset_logprobs(params, config, rows, 3, 20)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert len({round(float(x), 3) for x in found.ravel()}) == 16


def test_pairs_of_ids_to_arrays():
    """Chosen and rejected of a row stand side by side, each after the prompt."""
    batch = dpo.make_batch([[[8, 9], [10, EOS], [11]], [[12], [13], [14, 15, EOS]]], 8)
    assert batch["tokens"].tolist() == [
        [[8, 9, 10, EOS], [8, 9, 11, 0]],
        [[12, 13, 0, 0], [12, 14, 15, EOS]],
    ]
    assert batch["mask"].tolist() == [[[1] * 4, [1, 1, 1, 0]], [[1, 1, 0, 0], [1] * 4]]
    assert batch["response_mask"].tolist() == [
        [[0, 0, 1, 1], [0, 0, 1, 0]],
        [[0, 1, 0, 0], [0, 1, 1, 1]],
    ]


def test_calibration_error():
    """0 where the share of right answers is the confidence; 1/2 for a sure coin."""
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(size=200_000)) * 2
    right = rng.random(len(size)) < 1 / (1 + np.exp(-size))
    assert reward.calibration_error(np.where(right, size, -size)) < 0.01
    coin = np.where(np.arange(1000) % 2, 50.0, -50.0)
    assert reward.calibration_error(coin) == pytest.approx(0.5, abs=0.05)


# ------------------------------------------------------------------------------ reward's last steps


def test_normalised_scores():
    """The folded model's score is gain * score + shift: mean 0, within-prompt deviation 1."""
    config, params = make_params(reward, reward.RewardModel, 0)
    tokens, mask = reward.pad_rows(
        [[*prompt, *answer] for prompt, answer in random_rows(24, 5, 12)], 20
    )
    raw = np.asarray(reward.score_sequences(params, config, tokens, mask)).reshape(6, 4)
    raw = raw + np.linspace(0, 30, 6)[:, None]  # prompts differ much more than samples
    params = params | {"ln_f": params["ln_f"] | {"bias": params["ln_f"]["bias"] + 0.3}}
    plain = np.asarray(reward.score_sequences(params, config, tokens, mask))
    folded, config = reward.normalise(params, config, raw)
    scores = raw * config.reward_gain + config.reward_shift
    assert abs(scores.mean()) < 1e-4
    within = np.sqrt(np.mean(scores.var(axis=1, ddof=1)))  # as many samples to each prompt
    assert within == pytest.approx(1, rel=1e-5)
    after = np.asarray(reward.score_sequences(folded, config, tokens, mask))
    expected = plain * config.reward_gain + config.reward_shift
    np.testing.assert_allclose(after, expected, atol=1e-4)


def test_a_run_normalises_on_samples_of_its_start(inputs, tmp_path):
    reward.main(small_args(reward, inputs, tmp_path / "run"))
    config, params = reward.load_model(tmp_path / "run" / "model")
    assert config.reward_gain > 0 and config.reward_gain != 1 and config.reward_shift != 0
    before = json.loads((tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()[-1])
    tokenizer = reward.load_tokenizer(tmp_path / "run" / "model")
    ids = [tokenizer.encode_ordinary(before[name]) for name in ("prompt", "chosen")]
    tokens, mask = reward.pad_rows([[*ids[0], *ids[1], tokenizer.eot_token]], 64)
    score = float(reward.score_sequences(params, config, tokens, mask)[0])
    expected = config.reward_gain * before["chosen_score"] + config.reward_shift
    assert score == pytest.approx(expected, abs=1e-3 * config.reward_gain)


def test_a_pad_token_keeps_the_scores(inputs, tmp_path):
    config, params = reward.load_model(inputs / "scorer")
    config = dataclasses.replace(config, pad_token_id=config.eos_token_id)
    tokens, mask = reward.pad_rows(
        [[*prompt, *answer] for prompt, answer in random_rows(6, 5, 12)], 20
    )
    before = reward.score_sequences(params, config, tokens, mask)
    padded, new = reward.add_pad_token(params, config, inputs / "scorer", tmp_path / "tokenizer")
    assert new.pad_token_id == config.vocab_size == new.vocab_size - 1
    np.testing.assert_array_equal(before, reward.score_sequences(padded, new, tokens, mask))
    reward.save_model(tmp_path / "model", new, padded, tmp_path / "tokenizer")
    old, tokenizer = (reward.load_tokenizer(f) for f in (inputs / "scorer", tmp_path / "model"))
    assert tokenizer._special_tokens["[PAD]"] == new.pad_token_id
    assert tokenizer.encode_ordinary(" [PAD] it is") == old.encode_ordinary(" [PAD] it is")
    assert tokenizer.token_byte_values() == old.token_byte_values()
    again = reward.score_sequences(*reward.load_model(tmp_path / "model")[::-1], tokens, mask)
    np.testing.assert_array_equal(before, again)


def test_a_model_without_a_pad_token_gets_one_in_a_run(inputs, tmp_path):
    config, params = sft.load_model(inputs / "lm")
    config = dataclasses.replace(config, pad_token_id=None)
    sft.save_model(tmp_path / "lm", config, params, inputs / "lm")
    reward.main(small_args(reward, inputs, tmp_path / "run", model=str(tmp_path / "lm")))
    saved, params = reward.load_model(tmp_path / "run" / "model")
    assert saved.pad_token_id == config.vocab_size == len(params["wte"]["embedding"]) - 1


# ------------------------------------------------------------------------------ optimizer


def test_learning_rate_schedule():
    """1/4, …, 4/4 of the peak in four steps, then linear to 0 at step 12."""
    found = [float(sft.learning_rate_at(step, 0.8, 4, 12)) for step in range(13)]
    expected = [0.2, 0.4, 0.6, 0.8, *(0.8 * (12 - step) / 8 for step in range(4, 13))]
    assert found == pytest.approx(expected, abs=1e-7)
    without_warmup = [float(sft.learning_rate_at(step, 0.8, 0, 4)) for step in range(5)]
    assert without_warmup == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-7)


def test_optimizer_follows_its_schedule_and_decays_matrices_only():
    args = SimpleNamespace(learning_rate=0.1, warmup_steps=2, weight_decay=0.5, max_grad_norm=1.0)
    optimizer, schedule = sft.make_optimizer(args, 4)
    params = make_params(sft, sft.GPT2, 0)[1]
    params = jax.tree.map(jnp.ones_like, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = optimizer.init(params)
    for step in range(3):
        updates, state = optimizer.update(zeros, state, params)
        expected = -float(schedule(step)) * 0.5
        assert float(updates["wte"]["embedding"][0, 0]) == pytest.approx(expected, rel=1e-4)
        kernel = updates["h.0"]["attn"]["c_attn"]["kernel"]
        assert float(kernel.mean()) == pytest.approx(expected, rel=1e-4)
        for leaf in (updates["ln_f"]["scale"], updates["h.0"]["mlp"]["c_fc"]["bias"]):
            assert (np.asarray(leaf) == 0).all()


def test_gradients_are_clipped_by_their_global_norm():
    """Adam does not see the gradient's scale, but two steps see how it changed."""
    args = SimpleNamespace(learning_rate=0.1, warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0)
    params = {"kernel": jnp.zeros(2)}

    def second_update(scale):
        optimizer, _ = sft.make_optimizer(args, 10)
        state = optimizer.init(params)
        _, state = optimizer.update({"kernel": jnp.array([0.6, 0.8])}, state, params)
        return optimizer.update({"kernel": scale * jnp.array([0.6, -0.8])}, state, params)[0]

    assert_equal(second_update(1.0), second_update(64.0))
    assert largest_difference(second_update(1.0), second_update(0.1)) > 1e-3
