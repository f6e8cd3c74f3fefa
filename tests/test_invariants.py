"""What must not matter does not: padding, micro-batches, a learning rate of 0; and the data."""

import dataclasses
import functools
import itertools
import json
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

EOS, P, R = 7, 5, 10  # of the small vocabulary; prompt and response of the rollouts here
GROUP = 4  # completions to a prompt
CONFIG = sft.GPT2Config(
    vocab_size=24, n_positions=32, n_embd=32, n_layer=1, n_head=2, initializer_range=0.2
)
sgd = functools.cache(optax.sgd)  # one object a rate: what is compiled for it is kept
GRPO = {"kl_in": "loss", "kl_coef": 0.5, "mask_truncated_completions": True}
CASES = {  # script, changes of its Args, SGD's rate, how near micro-batches come: params, metrics
    "sft": (sft, {}, 1.0, 3e-6, 1e-5),
    "reward": (reward, {"center_coef": 0.1}, 1.0, 1e-5, 1e-5),
    "dpo": (dpo, {"label_smoothing": 0.1, "nll_coef": 0.7}, 0.3, 1e-5, 1e-4),
    "ipo": (dpo, {"loss": "ipo", "nll_coef": 0.7}, 0.3, 1e-5, 1e-4),
    "hinge": (iterative_dpo, {"loss": "hinge", "nll_coef": 0.7}, 0.3, 1e-5, 1e-4),
    "ppo": (ppo, {}, 0.1, 1e-5, 1e-4),
    "gspo": (
        grpo,
        GRPO | dict.fromkeys(["aggregation", "ratio_level"], "sequence"),
        *(0.1, 1e-5, 1e-4),
    ),
    "grpo-token": (grpo, GRPO | {"aggregation": "token"}, 0.1, 1e-5, 1e-4),
    "grpo-constant": (grpo, GRPO | {"aggregation": "constant"}, 0.1, 1e-5, 1e-4),
}
each_case = pytest.mark.parametrize("name", CASES)
ppo_and_grpo = pytest.mark.parametrize("script", [ppo, grpo], ids=["ppo", "grpo"])


def largest_difference(tree, other):
    differences = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), tree, other)
    return max(jax.tree.leaves(differences))


def assert_equal(tree, other):
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), tree, other
    )


def random_rows(count, *lengths, seed=0):
    """Rows of `len(lengths)` lists of ids of random lengths up to these, without EOS."""
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(8, 24, rng.integers(1, n + 1)).tolist() for n in lengths]
        for _ in range(count)
    ]


@functools.cache
def make_params(model, seed):
    one = jnp.ones((1, 1), jnp.int32)
    return jax.jit(model(CONFIG).init)(jax.random.key(seed), one, one)["params"]


@functools.cache
def policy(seed=0):
    """An untrained language model, whose head ends about half of the completions."""
    params = make_params(sft.GPT2, seed)
    toward_eos = params["wte"]["embedding"][EOS]
    bias = 2 * toward_eos / jnp.sum(toward_eos**2)
    return params | {"ln_f": params["ln_f"] | {"bias": bias}}


def make_start(script):
    """The parameters that training starts from."""
    if script is ppo:
        return {"policy": policy(), "critic": make_params(reward.RewardModel, 2)}
    return make_params(reward.RewardModel, 0) if script is reward else policy()


def make_state(script, optimizer):
    more = {ppo: {"kl_coef": 0.1}, grpo: {"ref_moves": True}}.get(script, {})
    return script.make_state(make_start(script), optimizer, **more)


def make_args(script, **changes):
    sizes = {"micro_batch_size": 8}
    if script in (ppo, grpo):
        sizes |= {"epochs": 2, "num_minibatches": 2}
    if script is grpo:
        sizes |= {"num_generations": GROUP}
    return script.Args(**(sizes | changes))


@functools.cache
def sample(temperature=1.0):
    """(Rollout, scores) of GROUP completions to each of four prompts; the scores are random."""
    prompts, mask = ppo.pad_rows([row[0] for row in random_rows(4, P)], P, left=True)
    rest = (ppo.stream_key(0, "rollout", 1), R, temperature, EOS, GROUP)
    tokens, mask, logprobs = ppo.generate(policy(), CONFIG, prompts, mask, *rest)
    ref_logprobs = ppo.policy_logprobs(policy(1), CONFIG, tokens, mask, P, temperature)
    ended = np.any(np.asarray(tokens)[:, P:] == EOS, axis=1)
    assert 1 < ended.sum() < 15 and (np.asarray(mask)[:, :P] == 0).any()
    scores = np.random.default_rng(0).normal(size=len(tokens)).astype(np.float32)
    response_mask = mask[:, P:].astype(jnp.float32)
    return ppo.Rollout(tokens, mask, response_mask, logprobs, ref_logprobs, ended), scores


def experience(script, args, sampled=None, scores=None):
    """(batch, metrics) of make_experience, of this Rollout and scores or those above."""
    rollout, random_scores = sample(args.temperature)
    sampled, scores = sampled or rollout, random_scores if scores is None else scores
    if script is ppo:
        return ppo.make_experience(make_state(ppo, sgd(0.1)), sampled, scores, CONFIG, args)
    return grpo.make_experience(sampled, scores, args)


def make_batch(script, args):
    if script in (ppo, grpo):
        return experience(script, args)[0]
    if script is sft:
        return sft.make_batch(random_rows(8, 5, 12), 20)
    rows = random_rows(8, 5, 12, 9)
    if script is reward:
        return reward.make_batch(rows, 20, np.linspace(0, 1, 8))
    batch = script.make_batch(rows, 20)
    logprobs = np.asarray(script.pair_logprobs(policy(), batch, CONFIG))
    noise = np.random.default_rng(0).normal(size=logprobs.shape).astype(np.float32)
    return batch | {"ref_logprobs": logprobs + noise}


def train(script, batch, args, optimizer, key=0):
    """(state, metrics) after one train_step from the start."""
    state = make_state(script, optimizer)
    if script in (ppo, grpo):
        config = (CONFIG, CONFIG) if script is ppo else CONFIG
        rest = (jax.random.key(key), config, optimizer, args)
    else:
        rest = (CONFIG, optimizer, args)
    state, metrics = script.train_step(state, batch, *rest)
    return state, jax.device_get(metrics)


@functools.cache
def trained(name):
    """(script, args, optimizer, batch, parameters before, state, metrics) of one of the CASES."""
    script, changes, rate, *_ = CASES[name]
    args = make_args(script, **changes)
    batch, before = make_batch(script, args), jax.tree.map(np.array, make_start(script))
    return script, args, sgd(rate), batch, before, *train(script, batch, args, sgd(rate))


def spoiled(batch):
    """A batch (or Rollout, as a dict) with other ids and numbers wherever its mask is 0."""
    rng, mask = np.random.default_rng(3), np.asarray(batch["mask"])
    assert (mask == 0).any()
    found = dict(batch)
    found["tokens"] = np.where(mask, batch["tokens"], rng.integers(0, 24, mask.shape))
    found["tokens"] = jnp.asarray(found["tokens"], jnp.int32)
    for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns"):
        if mask.ndim == 2 and np.ndim(batch.get(name)) == 2:  # not those of pairs, nor of groups
            noise = rng.normal(size=batch[name].shape).astype(np.float32)
            found[name] = jnp.where(mask[:, P:] > 0, batch[name], noise)
    return found


# --------------------------------------------------------- padding, micro-batches: for all scripts


@each_case
def test_micro_batches_equal_the_whole_batch(name):
    """Whatever the loss is a mean over, and where rows count unequally or nothing."""
    script, args, optimizer, batch, before, state, metrics = trained(name)
    mask = batch.get("loss_mask", batch["mask"])
    assert len(set(np.asarray(batch.get("response_mask", mask)).sum(axis=-1).ravel())) > 3
    *_, near_params, near_metrics = CASES[name]
    args = dataclasses.replace(args, micro_batch_size=1)
    others = train(script, batch, args, optimizer)
    assert largest_difference(state.params, others[0].params) < near_params
    assert largest_difference(metrics, others[1]) < near_metrics
    least = 1e-3 if script in (ppo, grpo) else 1e-2
    assert largest_difference(state.params, before) > least
    if "logps/chosen" in metrics:
        assert 0 < metrics["rewards/accuracies"] < 1


@each_case
def test_padding_does_not_matter(name):
    """Neither what stands there, to the last bit, nor how much of it there is."""
    script, args, optimizer, batch, _, state, metrics = trained(name)
    other = spoiled(batch)
    assert_equal(train(script, other, args, optimizer), (state, metrics))
    if name not in ("sft", "reward", "dpo", "ppo", "gspo"):
        return  # one case a script: another width is another program to compile
    left = script in (ppo, grpo)
    names = ["tokens", "mask"] if left else ["tokens", "mask", "loss_mask", "response_mask"]
    for name in names:
        if name in other:
            pad = [(0, 0)] * (np.ndim(other[name]) - 1) + [(3, 0) if left else (0, 7)]
            other[name] = jnp.pad(other[name], pad)
    wider = train(script, other, args, optimizer)
    assert largest_difference((wider[0].params, wider[1]), (state.params, metrics)) < 1e-5


@each_case
def test_a_step_leaves_the_parameters_it_started_from(name):
    """train_step gives its state's buffers away; the start, and a reference, must keep theirs."""
    script, *_, before, state, _ = trained(name)
    assert_equal(make_start(script), before)
    if script is grpo:
        assert_equal(state.ref_params, before)


@pytest.mark.parametrize(
    "script, changes", [(ppo, {}), (grpo, {}), (grpo, {"kl_in": "loss"})], ids=str
)
def test_padding_of_a_rollout_does_not_matter(script, changes):
    args = make_args(script, **changes)
    sampled, _ = sample()
    real = np.asarray(sampled.response_mask)
    batch, metrics = experience(script, args)
    other, other_metrics = experience(script, args, ppo.Rollout(**spoiled(sampled._asdict())))
    assert_equal(metrics, other_metrics)
    assert_equal(batch["advantages"], other["advantages"])
    if script is ppo:
        assert_equal(batch["returns"], other["returns"])
        assert_equal(batch["values"] * real, other["values"] * real)
        for name in ("advantages", "returns"):
            assert not np.asarray(batch[name])[real == 0].any()


def test_a_pair_is_read_as_its_texts_alone():
    """Scores, and log-probabilities of the answer's tokens with EOS, are those without padding."""
    rows = [
        [prompt, *([*a, EOS] for a in answers)] for prompt, *answers in random_rows(2, 5, 12, 9)
    ]
    batch = reward.make_batch(rows, 20, [0.0] * 2)
    scores = reward.pair_scores(make_start(reward), batch["tokens"], batch["mask"], CONFIG)
    logprobs = np.asarray(dpo.pair_logprobs(policy(), dpo.make_batch(rows, 20), CONFIG))
    score, read = (jax.jit(model(CONFIG).apply) for model in (reward.RewardModel, dpo.GPT2))
    for i, (prompt, *answers) in enumerate(rows):
        for j, answer in enumerate(answers):
            text = jnp.array([prompt + answer])
            alone = score({"params": make_start(reward)}, text, jnp.ones_like(text))
            assert float(scores[j][i]) == pytest.approx(float(alone[0, -1]), abs=1e-5)
            logits = np.asarray(read({"params": policy()}, text, jnp.ones_like(text)), np.float64)
            logits = logits[0, len(prompt) - 1 : -1]  # [length of the answer, V]
            alone = logits[range(len(answer)), answer] - np.log(np.exp(logits).sum(axis=1))
            assert logprobs[i, j] == pytest.approx(alone.sum(), abs=1e-4)


# ------------------------------------------------------------------------------ ppo and grpo


@ppo_and_grpo
def test_with_a_learning_rate_of_0_nothing_happens(script):
    """At a temperature: sampling, reference and update see the same probabilities.

    At the reference there is no KL, neither k1 in the reward nor k3 in the loss; else there is.
    """
    changes = {"kl_in": "loss"} if script is grpo else {}
    args = make_args(script, temperature=0.7, learning_rate=0.0, weight_decay=0.1, **changes)
    optimizer, _ = script.make_optimizer(args, 4)
    sampled, scores = sample(0.7)
    real, (tokens, mask) = np.asarray(sampled.response_mask) > 0, sampled[:2]
    own, hot = (script.policy_logprobs(policy(), CONFIG, tokens, mask, P, t) for t in (0.7, 1.0))
    np.testing.assert_allclose(own[real], sampled.logprobs[real], atol=2e-5)
    assert np.abs(np.asarray(hot - own)[real]).max() > 0.1
    found = []
    for ref_logprobs in (own, sampled.ref_logprobs):
        batch, metrics = experience(script, args, sampled._replace(ref_logprobs=ref_logprobs))
        state, update_metrics = train(script, batch, args, optimizer)
        assert_equal(state.params, make_start(script))
        metrics |= update_metrics
        assert metrics.get("policy/updates", 4) == 4
        for name in ("policy/clipfrac_avg", "clip_ratio/low_mean", "clip_ratio/high_mean"):
            assert metrics.get(name, 0) == 0
        assert abs(metrics["val/ratio"] - 1) < 1e-5 and metrics["policy/approxkl_avg"] < 1e-10
        assert metrics["grad_norm"] > 0 and 0 < metrics["policy/entropy_avg"] < np.log(24)
        expected = scores.mean() + metrics["objective/non_score_reward"]
        assert metrics["objective/rlhf_reward"] == pytest.approx(float(expected), abs=1e-5)
        found.append((float(metrics["objective/non_score_reward"]), metrics.get("kl", 0)))
    assert abs(found[0][0]) < 1e-5 and abs(found[0][1]) < 1e-9
    assert found[1][0] < (-0.01 if script is ppo else -0.1)
    assert script is ppo or found[1][1] > 0.01


def gradients_by_hand(script, args, batch):
    """{coefficient of the entropy: the gradient of the loss}, in which the ratio is still 1."""
    tokens, mask = batch["tokens"], batch["mask"]
    real = np.asarray(batch.get("response_mask", mask[:, P:]), np.float32)
    if script is ppo or args.aggregation == "token":
        weights = real / real.sum()
    elif args.aggregation == "sequence":
        weights = real / np.maximum(real.sum(axis=1, keepdims=True), 1) / len(real)
    else:
        weights = real / real.size

    def loss(params, coefficient):
        language_model = params["policy"] if script is ppo else params
        logits = sft.GPT2(CONFIG).apply({"params": language_model}, tokens, mask)[:, P - 1 : -1]
        logprobs = jax.nn.log_softmax(logits / args.temperature)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)  # [N, R]
        chosen = jnp.take_along_axis(logprobs, tokens[:, P:, None], axis=-1)[..., 0]
        advantages = jnp.reshape(batch["advantages"], (len(real), -1))
        total = jnp.sum(weights * (-advantages * chosen - coefficient * entropy))
        if script is ppo:
            critic = reward.RewardModel(CONFIG)
            values = critic.apply({"params": params["critic"]}, tokens, mask)[:, P - 1 : -1]
            total += args.vf_coef * 0.5 * jnp.sum(weights * (values - batch["returns"]) ** 2)
        return total, jnp.sum(real * entropy) / real.sum()

    found = jax.jit(jax.grad(loss, has_aux=True))
    return {coefficient: found(make_start(script), coefficient) for coefficient in (0.0, 0.5)}


@pytest.mark.parametrize(
    "script, changes",
    [(ppo, {})] + [(grpo, {"aggregation": x}) for x in ("sequence", "token", "constant")],
    ids=["ppo", "sequence", "token", "constant"],
)
def test_entropy_is_raised_by_its_coefficient(script, changes):
    """The gradient is that of loss - coefficient * mean entropy, and with 0 of the loss alone."""
    changes = changes | {"epochs": 1, "num_minibatches": 1, "temperature": 0.7}
    if script is grpo:
        changes |= {"mask_truncated_completions": True}  # rows that count nothing
    batch = make_batch(script, make_args(script, **changes))
    expected = gradients_by_hand(script, make_args(script, **changes), batch)
    assert largest_difference(expected[0.0][0], expected[0.5][0]) > 1e-2
    start = make_start(script)
    for coefficient, size in ((0.0, 16), (0.5, 16), (0.5, 4)):
        args = make_args(script, **changes, entropy_coef=coefficient, micro_batch_size=size)
        state, metrics = train(script, batch, args, sgd(1.0))
        gradient, entropy = expected[coefficient]
        found = jax.tree.map(jnp.subtract, start, state.params)  # SGD's rate is 1
        assert largest_difference(found, gradient) < 1e-5
        assert metrics["policy/entropy_avg"] == pytest.approx(float(entropy), rel=1e-5)


@functools.cache
def update_by_update():
    """(args, optimizer, batch, [(parameters, metrics, tokens)]): four updates, each by itself."""
    args, optimizer = make_args(ppo), optax.sgd(optax.linear_schedule(0.1, 0.05, 4))
    batch, state = make_batch(ppo, args), make_state(ppo, optimizer)
    keys = jax.random.split(jax.random.key(0), args.epochs)
    order = jnp.concatenate([jax.random.permutation(key, 16) for key in keys]).reshape(4, 8)
    one, key = dataclasses.replace(args, epochs=1, num_minibatches=1), jax.random.key(0)
    again = jnp.argsort(jax.random.permutation(jax.random.split(key, 1)[0], 8))
    found = []
    for rows in order[:, again]:  # so that train_step comes to the same order
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        state, metrics = ppo.train_step(state, part, key, (CONFIG, CONFIG), optimizer, one)
        found.append((jax.tree.map(np.array, state.params), metrics, part["mask"][:, P:].sum()))
    return args, optimizer, batch, found


@pytest.mark.parametrize("stop_kl, updates", [(0.0, 1), (1e-8, 2), (1e9, 4), (None, 4)])
def test_stop_kl_ends_the_updates_of_a_rollout(stop_kl, updates):
    """Those after the stop are neither made nor counted, and the metrics are means of the others.

    Before the first one the policy is off by rounding alone; the second finds that it moved.
    """
    args, optimizer, batch, steps = update_by_update()
    stopped = dataclasses.replace(args, stop_kl=stop_kl)
    state, metrics = train(ppo, batch, stopped, optimizer)
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32]
    assert counts == [updates] and updates == state.updates == metrics.pop("policy/updates")
    for number, (params, _, _) in enumerate(steps, 1):
        difference = largest_difference(state.params, params)
        # They are two programs, which XLA may round otherwise; an update moves far more.
        assert difference < 1e-6 if number == updates else difference > 1e-5
    _, parts, weights = zip(*steps[:updates])
    for name, value in metrics.items():
        expected = np.average([part[name] for part in parts], weights=weights)
        assert value == pytest.approx(expected, rel=1e-5, abs=1e-7)
    if updates == 1:
        assert metrics["policy/approxkl_avg"] < 1e-10 and abs(metrics["val/ratio"] - 1) < 1e-5
    else:
        assert metrics["policy/approxkl_avg"] > 1e-7


def test_a_large_stop_kl_stops_nothing():
    """Two programs again: equal but for rounding, of numbers that are up to 1."""
    args, optimizer, batch, _ = update_by_update()
    large = train(ppo, batch, dataclasses.replace(args, stop_kl=1e9), optimizer)
    none = train(ppo, batch, args, optimizer)
    assert jax.tree.structure(large) == jax.tree.structure(none)
    assert largest_difference(large, none) < 1e-6


@pytest.mark.parametrize("t", [0, 4])
def test_a_value_is_of_what_was_seen_before_its_token(t):
    """Response tokens t, t + 1, … changed: values[:, :t + 1] stay, values[:, t + 1] do not."""
    tokens, mask = np.random.default_rng(0).integers(8, 24, (6, P + R)), np.ones((6, P + R), int)
    mask[:3, :2] = 0
    changed = tokens.copy()
    changed[:, P + t :] = 8 + (tokens[:, P + t :] - 8 + 5) % 16
    critic = make_start(ppo)["critic"]
    values, others = (ppo.critic_values(critic, CONFIG, x, mask, P) for x in (tokens, changed))
    assert values.shape == (6, R)
    np.testing.assert_array_equal(values[:, : t + 1], others[:, : t + 1])
    assert (np.abs(values - others)[:, t + 1] > 1e-4).all()
    logprobs, others = (
        ppo.policy_logprobs(policy(), CONFIG, x, mask, P, 1.0) for x in (tokens, changed)
    )
    np.testing.assert_array_equal(logprobs[:, :t], others[:, :t])
    assert (np.abs(logprobs - others)[:, t] > 1e-4).all()


def test_every_row_is_seen_once_in_an_epoch():
    """Linear in the rows: with the whole batch as one minibatch, the key does not matter."""
    args = make_args(ppo)
    batch, one = make_batch(ppo, args), dataclasses.replace(args, epochs=1, num_minibatches=1)
    for sizes, low, high in ((one, 0, 1e-6), (args, 1e-5, 1)):
        first, second = (train(ppo, batch, sizes, sgd(0.1), key)[0].params for key in (0, 1))
        assert low <= largest_difference(first, second) < high


def test_next_kl_coef():
    """Proportional to the relative error, which counts for 20 % at most."""
    args = SimpleNamespace(kl_target=6.0, batch_size=50, kl_horizon=1000)
    for kl, factor in ((6.0, 1.0), (6.3, 1.0025), (5.7, 0.9975), (60.0, 1.01), (-9.0, 0.99)):
        assert float(ppo.next_kl_coef(0.1, kl, args)) == pytest.approx(0.1 * factor, rel=1e-5)


def test_stream_keys_differ_by_seed_name_and_step():
    streams = list(itertools.product((0, 1), ("rollout", "eval", "init"), (0, 1, 2)))
    keys, again = (
        [tuple(np.asarray(jax.random.key_data(f(*stream))).tolist()) for stream in streams]
        for f in (ppo.stream_key, sft.stream_key)
    )
    assert len(set(keys)) == len(streams) and keys == again


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("advantage", ["group", "group-std", "leave-one-out"])
def test_advantages_by_hand(advantage, kl_in):
    """The KL of a whole completion is taken off its score before the group is looked at."""
    batch, metrics = experience(
        grpo, make_args(grpo, advantage=advantage, kl_in=kl_in, kl_coef=0.7)
    )
    sampled, scores = sample()
    own, ref, real = (np.asarray(x, np.float64) for x in (sampled[3], sampled[4], sampled[2]))
    kl = ((own - ref) * real).sum(axis=1)
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


def test_truncated_completions_are_masked_where_asked():
    """They are as those without a score: in no group's mean, but attended to all the same."""
    sampled, scores = sample()
    plain, masked = (
        experience(grpo, make_args(grpo, mask_truncated_completions=x))[0] for x in (False, True)
    )
    unscored = np.where(sampled.ended, scores, np.nan)
    assert_equal(masked, experience(grpo, make_args(grpo), scores=unscored)[0])
    assert_equal(plain["response_mask"], sampled.response_mask)
    assert_equal(masked["response_mask"], sampled.response_mask * sampled.ended[:, None])
    assert_equal(plain["mask"], sampled.mask)
    assert_equal(masked["mask"], sampled.mask)


WITHOUT = [1, 8, 9, 10, 11]  # one of the first group, and the whole third
SCORED = [i for i in range(16) if i not in WITHOUT]


@pytest.mark.parametrize(
    "script, changes",
    [
        (ppo, {}),
        (ppo, {"whiten_rewards": True}),
        (grpo, {"aggregation": "token", "kl_in": "loss"}),
        (grpo, {"aggregation": "token", "advantage": "leave-one-out", "kl_in": "reward"}),
        (grpo, {"aggregation": "sequence", "advantage": "group"}),
        (grpo, {"aggregation": "constant", "advantage": "group"}),
    ],
    ids=str,
)
def test_a_completion_without_a_score_changes_nothing_for_the_others(script, changes):
    """Advantages and gradient are those of the same batch without it.

    Where the loss is a sum over the number of sequences, it counts as one with nothing in it.
    """
    changes = changes | {"epochs": 1, "num_minibatches": 1, "entropy_coef": 0.1}
    args = make_args(script, **changes)
    sampled, scores = sample()
    scores = scores.copy()
    scores[WITHOUT] = np.nan
    batch, metrics = experience(script, args, scores=scores)
    rest = jax.tree.map(lambda x: x[np.array(SCORED)], sampled)
    if script is ppo:
        alone, alone_metrics = experience(ppo, args, rest, scores[SCORED])
    else:  # groups of three and of four: one by one
        alone = jax.tree.map(lambda x: x[np.array(SCORED)], batch)
        penalty = np.sum((rest.logprobs - rest.ref_logprobs) * rest.response_mask, axis=1)
        penalty *= args.kl_coef * (args.kl_in == "reward")
        parts = np.split(scores[SCORED] - np.asarray(penalty), [3, 7])
        if args.advantage == "leave-one-out":
            parts = [grpo.leave_one_out_advantage(x, len(x)) for x in parts]
        else:
            scaled = args.advantage == "group-std"
            parts = [grpo.group_relative_advantage(x, len(x), scaled) for x in parts]
        np.testing.assert_allclose(alone["advantages"], np.concatenate(parts), atol=1e-5)
        assert not np.asarray(batch["advantages"])[WITHOUT].any()
        alone_metrics = {}
    for name, x in alone.items():
        np.testing.assert_allclose(np.asarray(batch[name])[SCORED], x, atol=1e-5)
    # Without a score or cut off: the batch's rows are as many as before, or fewer.
    start, updated = make_start(script), []
    for part, size in ((batch, 16), (alone, 11)):
        state, found = train(script, part, dataclasses.replace(args, micro_batch_size=size), sgd(1))
        updated.append(jax.tree.map(lambda x, y: x - y, state.params, start))
        updated[-1] = (updated[-1], found)
    share = 1 if script is ppo or args.aggregation == "token" else 11 / 16
    expected = jax.tree.map(lambda x: x * share, updated[1][0])
    assert largest_difference(updated[0][0], expected) < 2e-6
    assert max(np.abs(x).max() for x in jax.tree.leaves(expected)) > 1e-3
    for name, value in alone_metrics.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    for name, value in updated[1][1].items():
        factor = share if name in ("grad_norm", "loss/policy_avg") else 1
        assert updated[0][1][name] == pytest.approx(float(value) * factor, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("script, how", [(grpo, "cut off"), (grpo, "no score"), (ppo, "no score")])
def test_a_rollout_without_rewards_teaches_nothing(script, how):
    """Cut off, with --mask-truncated-completions, as an untrained model's first rollouts are."""
    args = make_args(script, **(GRPO if script is grpo else {}))
    sampled, scores = sample()
    if how == "cut off":
        sampled = sampled._replace(ended=np.zeros(16, bool))
    else:
        scores = np.full(16, np.nan, np.float32)
    batch, metrics = experience(script, args, sampled, scores)
    state, update_metrics = train(script, batch, args, sgd(0.1))
    assert_equal(state.params, make_start(script))
    assert all(np.isfinite(float(x)) for x in (metrics | update_metrics).values())


@pytest.mark.parametrize("size", [3, 7, 8])
def test_groups_without_a_spread_are_counted(size):
    """Also where the mean of equal numbers is not quite that number."""
    values = np.array([0.1, 1 / 3, -0.7, 1.9], np.float32)
    zeros = jnp.zeros((len(values) * size, 3))
    tokens = jnp.zeros((len(zeros), 5), jnp.int32)
    sampled = grpo.Rollout(tokens, tokens, zeros, zeros, zeros, np.ones(len(zeros), bool))
    for changed, share in ((0, 1.0), (1, 0.75), (2, 0.5)):
        scores = values.repeat(size)
        scores[: changed * size : size] += 0.5
        metrics = grpo.make_experience(sampled, scores, make_args(grpo, num_generations=size))[1]
        assert metrics["frac_reward_zero_std"] == share


@pytest.mark.parametrize("masked", [False, True])
def test_of_an_oversampled_rollout_the_groups_with_a_spread_are_trained_on(masked):
    """The same rows of the same batch, and metrics of all of it. The last group's spread is one of
    completions that are cut off: where these are masked it counts for none."""
    sampled, scores = sample()
    scores = scores.copy()
    scores[:GROUP] = 0.5
    scores[-GROUP:] = [1, 0, 0, 0]
    sampled = sampled._replace(ended=np.arange(16) != 12)
    changes = {"mask_truncated_completions": masked, "batch_size": 3 * GROUP}
    whole, metrics = experience(grpo, make_args(grpo, **changes), sampled, scores)
    args = make_args(grpo, **changes, oversample=2)
    batch, found = experience(grpo, args, sampled, scores)
    rows = slice(0, 12) if masked else slice(4, 16)  # masked, two are flat, and the first stays
    assert_equal(batch, jax.tree.map(lambda x: x[rows], whole))
    assert found.pop("groups/replaced") == 1 - masked and found.pop("groups/zero_std") == masked
    assert_equal(found, metrics)


# ------------------------------------------------------------------------------ iterative_dpo


def numbered(count, size):
    """(prompts, Rollout) of groups whose answers are their numbers, 0 to size - 1, of two tokens.

    The second token is masked in the odd ones.
    """
    answers = np.tile(np.arange(size), count)
    tokens = np.stack([np.full(len(answers), 9), answers, answers], axis=1)
    mask = np.stack([np.ones_like(answers), 1 - answers % 2], axis=1)
    rest = [None, mask, mask + 0.0, None, np.ones(len(answers), bool)]
    return [({}, [[9, i]]) for i in range(count)], iterative_dpo.Rollout(tokens, *rest)


@pytest.mark.parametrize("scores", [(0.3, 1.0), (1.0, -1.0), (0.5, 0.5), (60.0, 0.0)])
def test_drawn_labels_have_the_probability_of_their_scores(scores):
    """The first wins with sigmoid(r1 - r2), within four standard errors."""
    count, rng = 40_000, np.random.default_rng(0)
    rows, ties = iterative_dpo.make_pairs(
        *numbered(count, 2), np.tile(scores, count), "sampled", rng
    )
    assert ties == (scores[0] == scores[1]) and [row[0] for row in rows[:3]] == [
        [9, 0],
        [9, 1],
        [9, 2],
    ]
    first_wins = [row[1:] == [[0, 0], [1]] for row in rows]
    assert all(first or row[1:] == [[1], [0, 0]] for first, row in zip(first_wins, rows))
    expected = 1 / (1 + np.exp(scores[1] - scores[0]))
    error = np.sqrt(expected * (1 - expected) / count)
    assert len(rows) == count and abs(np.mean(first_wins) - expected) <= 4 * error


def test_the_best_stands_against_the_worst():
    """Of each group, whatever their order; where all are equal one stands against itself."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 5))
    scores[[3, 17]] = 0.25
    scores[8] = [1, 0, 1, 0, 1]  # equal scores among others are no tie
    rows, ties = iterative_dpo.make_pairs(*numbered(50, 5), scores.ravel(), "best-worst", rng)
    pairs = np.array([[answer[0] for answer in answers] for _, *answers in rows])
    chosen, rejected = np.take_along_axis(scores, pairs, axis=1).T
    assert (chosen == scores.max(axis=1)).all() and (rejected == scores.min(axis=1)).all()
    assert np.flatnonzero(pairs[:, 0] == pairs[:, 1]).tolist() == [3, 17] and ties == 2 / 50


@pytest.mark.parametrize("pair", ["best-worst", "sampled"])
def test_answers_without_a_score_are_in_no_preference(pair):
    """Where fewer than two have one, an answer stands against itself: its margin is always 0."""
    nan = np.nan
    scores = [[nan, 1.0], [0.5, nan], [nan, nan], [60.0, 0.0]]
    if pair == "best-worst":
        scores = [[nan, 2, 1, nan, 3], [nan, nan, 1, nan, nan], [nan] * 5, [0, nan, 60, 1, 1]]
    scores = np.array(scores)
    prompts, sampled = numbered(*scores.shape)
    rows, _ = iterative_dpo.make_pairs(
        prompts, sampled, scores.ravel(), pair, np.random.default_rng(0)
    )
    pairs = [[answer[0] for answer in answers] for _, *answers in rows]
    if pair == "best-worst":
        assert pairs[0] == [4, 2] and pairs[1] == [2, 2] and pairs[3] == [2, 0]
    else:
        assert pairs[3] == [0, 1]
        assert all(chosen == rejected for chosen, rejected in pairs[:2])
    assert pairs[2][0] == pairs[2][1]


@pytest.mark.parametrize("script", [ppo, grpo, iterative_dpo], ids=lambda script: script.__name__)
def test_functions_that_say_none_take_no_part(script):
    """In no sum, mean or deviation; a function of weight 0 is only logged."""
    answers = {
        "a": [1.0, None, 3.0, None],
        "b": [10.0, 20.0, None, None],
        "logged": [None, 5.0, 7.0, 9.0],
        "silent": [None] * 4,
    }
    functions = [
        (name, lambda name=name, **_: answers[name], 0.0 if name == "logged" else 2.0)
        for name in answers
    ]
    zeros, ended = jnp.zeros((4, 2)), jnp.array([True, True, True, False])
    sampled = script.Rollout(None, None, jnp.ones((4, 2)), zeros, zeros, ended)
    rows = [{"prompt": "p"}] * 4
    args = script.Args(missing_eos_penalty=1.5)
    scores = script.score(sampled, rows, list("wxyz"), script.Rewards(functions, None, None), args)
    np.testing.assert_array_equal(scores["reward"], [22.0, 40.0, 6.0, np.nan])
    metrics, samples = script.describe(sampled, rows, list("wxyz"), scores)
    assert metrics["reward"] == pytest.approx(68 / 3) and "rewards/silent/mean" not in metrics
    assert (metrics["rewards/a/mean"], metrics["rewards/a/std"]) == (2.0, 1.0)
    assert (metrics["rewards/b/mean"], metrics["rewards/b/std"]) == (15.0, 5.0)
    assert metrics["rewards/logged/mean"] == 7.0
    assert samples[3].items() >= {"reward": None, "rewards/a": None, "rewards/logged": 9.0}.items()


# ------------------------------------------------------------------------------ runs, watched


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def tokenizer():
    return sft.load_tokenizer(REVIEWS / "tokenizer")


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


@pytest.fixture
def watch(monkeypatch):
    """watch(owner, names) -> {name: the calls that a run makes}, copied: states are given away."""

    def copy(tree):
        return jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, tree)

    def watched(function, calls):
        def call(*args, **named):
            before = copy((args, named))
            calls.append(SimpleNamespace(given=before[0], result=None, **before[1]))
            calls[-1].result = function(*args, **named)
            return calls[-1].result

        return call

    def watch(owner, *names):
        calls = {name: [] for name in names}
        for name in names:
            monkeypatch.setattr(owner, name, watched(getattr(owner, name), calls[name]))
        return calls

    return watch


def reward_file(path, expression):
    """The --reward of a file with f(prompts, completions), one number for each p, c."""
    path.write_text(
        "def f(prompts, completions, **_):\n"
        f"    return [{expression} for p, c in zip(prompts, completions)]\n"
    )
    return f"{path}:f"


def assert_keys_differ(rollouts, count):
    keys = {tuple(np.asarray(jax.random.key_data(call.key)).tolist()) for call in rollouts}
    assert len(keys) == len(rollouts) == count


def test_a_run_of_ppo(inputs, talkative, tmp_path, watch):
    """No two rollouts share a key; a completion that does not end pays for it.

    And where --stop-kl ends each rollout after two of its four updates, the counts of Adam, of the
    schedule and of the state are of those that were made.
    """
    changes = {"reward": (reward_file(tmp_path / "f.py", "2.0"),), "missing_eos_penalty": 0.75}
    changes |= {"model": str(talkative), "reward_model": None, "kl_coef": 0.0, "stop_kl": 1e-6}
    calls = watch(ppo, "rollout") | watch(ppo.RunFolder, "save")
    args = small_args(ppo, inputs, tmp_path / "run", **changes)
    ppo.main(args)
    assert_keys_differ(calls["rollout"], 6 + 4)
    schedule, made = ppo.make_optimizer(args, 6 * 4)[1], 0
    _, *rows = metrics_of(tmp_path / "run")
    for row in rows:
        expected = 2 - 0.75 * row["completions/clipped_ratio"]
        assert row["reward"] == pytest.approx(expected, abs=1e-5)
        assert row["lr"] == pytest.approx(float(schedule(made)), rel=1e-6)
        made += row["policy/updates"]
    assert any(0 < row["completions/clipped_ratio"] < 1 for row in rows)
    state = calls["save"][-1].given[2]
    counts = [x for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32]
    assert made == 12 and {int(x) for x in counts} == {int(state.updates)} == {12}
    lines = (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["reward"] for line in lines} == {2.0, 1.25}


@pytest.mark.parametrize("expression, share", [("len(p)", None), ("len(c)", 0.25)])
def test_a_run_of_grpo(expression, share, inputs, tmp_path, watch):
    """A group is of one prompt: a reward of the prompt alone gives no advantage, so no gradient.

    What stands in a row are the prompt, the completion and the score that belong together. The
    reference moves at every second step towards the policy there; without --ref-sync-steps never.
    """
    changes = {"reward": (reward_file(tmp_path / "f.py", expression),), "reward_model": None}
    changes |= {"missing_eos_penalty": 0.0, "kl_coef": 0.0, "eval_every": 100}
    changes |= {"save_every": 100, "learning_rate": 1e-3}
    changes |= {} if share is None else {"ref_sync_steps": 2, "ref_mixup_alpha": share}
    calls = watch(grpo, "rollout", "make_experience") | watch(grpo.RunFolder, "save")
    grpo.main(small_args(grpo, inputs, tmp_path / "run", **changes))
    for row in metrics_of(tmp_path / "run")[1:]:
        if share is None:
            assert row["frac_reward_zero_std"] == 1 and row["reward_std"] == row["grad_norm"] == 0
        else:
            assert row["frac_reward_zero_std"] < 1 and row["grad_norm"] > 0

    tokenizer = grpo.load_tokenizer(inputs / "lm")
    assert_keys_differ(calls["rollout"], 6 + 2)
    for call, given in zip(calls["rollout"][1:-1], calls["make_experience"]):
        sampled, rows, texts = call.result
        tokens, mask = np.asarray(sampled.tokens), np.asarray(sampled.mask) > 0
        prompts, completions = (
            [tokenizer.decode(x[m & (x != tokenizer.eot_token)].tolist()) for x, m in zip(*part)]
            for part in ((tokens[:, :-8], mask[:, :-8]), (tokens[:, -8:], mask[:, -8:]))
        )
        assert prompts == [row["prompt"] for row in rows] and completions == texts
        assert prompts[::2] == prompts[1::2] and len(set(prompts)) == 4
        assert_equal(given.given[0].tokens, tokens)
        assert [len(x) for x in (texts if share else prompts)] == given.given[1].tolist()

    reference = grpo.load_model(inputs / "lm")[1]
    (last,) = calls["save"]
    policies = [call.given[0] for call in calls["rollout"]] + [last.given[2].params]
    # Held out at step 0, steps 1 to 6, and held out at 6, before the reference moves once more.
    for number, call in enumerate(calls["rollout"]):
        assert largest_difference(call.given[1], reference) < 1e-6
        if share and number in (2, 4, 7):  # after this rollout's step, number, or at the end
            moved = policies[number + 1]
            assert largest_difference(moved, reference) > 2e-4
            reference = jax.tree.map(
                lambda new, old: share * new + (1 - share) * old, moved, reference
            )
    if share is None:
        assert last.given[2].ref_params is None
    else:
        assert largest_difference(last.given[2].ref_params, reference) < 1e-6


@pytest.mark.parametrize("reference", ["start", "previous"])
def test_a_run_of_iterative_dpo(reference, inputs, talkative, tmp_path, watch):
    """A pair is of one prompt: prompt, completions, scores and pairs belong together.

    The reference of both rounds is the start, or the policy that sampled the round's pairs.
    """
    function = reward_file(tmp_path / "f.py", "len(p) + sum(map(ord, c)) / 1e4")
    changes = {"reward": (function,), "reward_model": None, "missing_eos_penalty": 0.0}
    changes |= {"model": str(talkative), "pair": "best-worst", "reference": reference}
    calls = watch(iterative_dpo, "rollout", "make_pairs", "dataset_logprobs")
    calls |= watch(iterative_dpo.RunFolder, "save")
    args = small_args(iterative_dpo, inputs, tmp_path / "run", eval_every=100, **changes)
    iterative_dpo.main(args)
    assert_keys_differ(calls["rollout"], 2 + 2)
    start = iterative_dpo.load_model(talkative)[1]
    saved = [call.given[2].params for call in calls["save"]]
    assert largest_difference(saved[0], start) > 2e-4
    sampled_by = [call.given[0] for call in calls["rollout"]]
    assert_equal(sampled_by, [start, start, *saved])  # held out, two rounds, held out
    used = [call.given[0] for call in calls["dataset_logprobs"]]
    assert_equal(used, [start, start if reference == "start" else saved[0]])

    tokenizer = iterative_dpo.load_tokenizer(talkative)
    eos_id, score_of = tokenizer.eot_token, iterative_dpo.load_function(function)
    rounds = calls["rollout"][1:3], calls["make_pairs"], calls["dataset_logprobs"]
    for call, pairs, learned in zip(*rounds):
        tokens, mask = np.asarray(call.result[0].tokens), np.asarray(call.result[0].mask)
        prompts = [x[m > 0].tolist() for x, m in zip(tokens[:, :-8], mask[:, :-8])]
        answers = [x[m > 0].tolist() for x, m in zip(tokens[:, -8:], mask[:, -8:])]
        assert prompts[::2] == prompts[1::2] and len({tuple(ids) for ids in prompts}) == 24
        assert 5 < sum(ids[-1] == eos_id for ids in answers) < 43
        texts = [tokenizer.decode([x for x in ids if x != eos_id]) for ids in answers]
        found = np.reshape(score_of(list(map(tokenizer.decode, prompts)), texts), (24, 2))
        np.testing.assert_allclose(np.reshape(pairs.given[2], (24, 2)), found, rtol=1e-6)
        assert (found[:, 0] < found[:, 1]).any() and (found[:, 0] > found[:, 1]).any()
        expected = [
            [prompts[2 * i], answers[2 * i + x.argmax()], answers[2 * i + x.argmin()]]
            for i, x in enumerate(found)
        ]
        assert learned.given[2] == expected


def test_texts_are_trained_on(inputs, tmp_path):
    """Rows with "text" and rows with prompt and completion may stand in one file."""
    texts = [{"text": row["prompt"] + row["completion"]} for row in first_rows("sft_train", 16)]
    path = write_jsonl(tmp_path / "rows.jsonl", texts + first_rows("sft_train", 16))
    sft.main(small_args(sft, inputs, tmp_path / "run", dataset=str(path)))
    assert metrics_of(tmp_path / "run")[-1]["step"] == 8


def test_a_run_of_reward_normalises_and_adds_a_pad_token(inputs, tmp_path):
    """The gain and the shift that config.json names are in the weights; [PAD] changes no score."""
    config, params = sft.load_model(inputs / "lm")
    config = dataclasses.replace(config, pad_token_id=None)
    sft.save_model(tmp_path / "lm", config, params, inputs / "lm")
    reward.main(small_args(reward, inputs, tmp_path / "run", model=str(tmp_path / "lm")))
    model = tmp_path / "run" / "model"
    config_of_run, params = reward.load_model(model)
    assert config_of_run.pad_token_id == config.vocab_size == len(params["wte"]["embedding"]) - 1
    saved = json.loads((model / "config.json").read_text("utf-8"))
    gain, shift = saved["reward_gain"], saved["reward_shift"]
    assert gain > 0 and gain != 1 and shift != 0
    before = json.loads((tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()[-1])
    tokenizer = reward.load_tokenizer(model)
    ids = [tokenizer.encode_ordinary(before[name]) for name in ("prompt", "chosen")]
    tokens, mask = reward.pad_rows([[*ids[0], *ids[1], tokenizer.eot_token]], 64)
    score = float(reward.learned_rewards(params, config_of_run, tokens, mask)[0])
    assert score == pytest.approx(gain * before["chosen_score"] + shift, abs=1e-3 * gain)


# ------------------------------------------------------------------------------ data


def limits(prompt, completion):
    return SimpleNamespace(max_prompt_length=prompt, max_completion_length=completion)


def test_encode_rows(tokenizer, capsys, error_line):
    """A row whose prompt or answer is too long is dropped, one that just fits is not.

    Of ten rows one may go; of three it may not.
    """
    eos_id, ids = tokenizer.eot_token, tokenizer.encode_ordinary
    rows = [
        {"prompt": "The film was good, and", "a": " it is <|endoftext|>", "b": " no"},
        {"prompt": "", "a": " yes", "b": " " + "very " * 30},
        {"prompt": "", "a": " yes", "b": " no"},
    ]
    prompt, answer = (len(ids(rows[0][name])) for name in ("prompt", "a"))
    assert answer + 1 <= 20
    many = [*rows, *rows[2:] * 7]
    encoded = sft.encode_rows(many, ["a", "b"], tokenizer, eos_id, limits(prompt, 20))
    out = capsys.readouterr().out
    assert f"dropped: 1 of 10 rows are longer than --max-prompt-length {prompt}" in out
    assert len(encoded) == 9 and encoded[1:-1] == encoded[2:]
    encoded = encoded[:2]
    assert encoded == [
        (row, [ids(row["prompt"]) or [eos_id], [*ids(row["a"]), eos_id], [*ids(row["b"]), eos_id]])
        for row in (rows[0], rows[2])
    ]
    assert eos_id not in encoded[0][1][1][:-1]  # a text that looks like a special token is none
    assert tokenizer.decode(encoded[0][1][1][:-1]) == rows[0]["a"]
    many = [rows[0], *rows[2:] * 9]
    for size, kept in (((prompt, answer + 1), 10), ((prompt, answer), 9), ((prompt - 1, 20), 9)):
        found = sft.encode_rows(many, ["a", "b"], tokenizer, eos_id, limits(*size))
        assert [row for row, _ in found] == many[-kept:]
    alone = iterative_dpo.encode_rows(rows, [], tokenizer, eos_id, limits(prompt, 1))
    assert alone == [(row, [ids(row["prompt"]) or [eos_id]]) for row in rows]
    message = error_line(sft.encode_rows, rows, ["a", "b"], tokenizer, eos_id, limits(prompt, 20))
    longest = len(ids(rows[1]["b"])) + 1
    assert "1 of 3 rows" in message and f"--max-completion-length {longest} keeps 95 %" in message


@pytest.mark.parametrize("size", [1, 4, 7, 50])
def test_every_token_of_a_text_is_a_target_once(tokenizer, size):
    eos_id = tokenizer.eot_token
    for count in range(1, 12):
        row = {"text": " ".join(["film", "was", "good", "the"][i % 4] for i in range(count))}
        ids = tokenizer.encode_ordinary(row["text"])
        rows, pieces = zip(*sft.encode_texts([row], tokenizer, eos_id, size))
        assert list(rows) == [row] * len(pieces)
        assert list(itertools.chain(*(piece for _, piece in pieces))) == [*ids, eos_id]
        before = list(itertools.chain(*([*context, *piece[:-1]] for context, piece in pieces)))
        assert before == [eos_id, *ids]  # what stands before each target
        assert all(1 <= len(piece) <= size and len(context) == 1 for context, piece in pieces)


def test_decoded_responses_are_without_eos_and_padding(tokenizer):
    eos_id = tokenizer.eot_token
    prompt, response = (tokenizer.encode_ordinary(text) for text in ("The film", " was good"))
    row = [*prompt, *response, eos_id, *response]
    mask = [1] * (len(prompt) + len(response) + 1) + [0] * len(response)
    texts = ppo.decode_responses(tokenizer, [row], [mask], len(prompt), eos_id)
    assert texts == [" was good"]


def test_rows_of_ids_to_arrays():
    """Where prompt and completion stand, what is learned of them, and pairs side by side."""
    rows = [[[8, 9, 10], [11, 12, EOS]], [[13], [14, EOS]]]
    batch = sft.make_batch(rows, 8)
    assert batch["tokens"].tolist() == [[8, 9, 10, 11, 12, EOS], [13, 14, EOS, 0, 0, 0]]
    assert batch["mask"].tolist() == [[1] * 6, [1, 1, 1, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]]
    whole = sft.make_batch(rows, 8, train_on_prompt=True)
    assert (whole["loss_mask"] == whole["mask"]).all()
    assert sft.make_batch([rows[0], []], 8)["mask"].sum() == 6  # an empty row counts nothing
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


def test_length_batches():
    lengths = np.random.default_rng(0).integers(1, 40, 50)
    batches = sft.length_batches(lengths, 8, 3, 0)
    assert batches.shape == (18, 8)
    epochs = batches.reshape(3, 48)
    left_out = set()
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 48 and set(epoch.tolist()) <= set(range(50))
        left_out |= set(range(50)) - set(epoch.tolist())
        first, last = np.array([np.sort(lengths[b])[[0, -1]] for b in epoch.reshape(-1, 8)]).T
        # The batches of an epoch cut up its lengths, but do not come in their order.
        assert (np.sort(last)[:-1] <= np.sort(first)[1:]).all()
        assert first.tolist() != sorted(first)
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
    rows, total, right, count = random_rows(7, 5, 12), 0.0, 0, 0
    tokens, mask = sft.pad_rows([prompt + completion for prompt, completion in rows], 20)
    logits = jax.jit(sft.GPT2(CONFIG).apply)({"params": policy()}, tokens, mask)
    for (prompt, completion), row in zip(rows, np.asarray(jax.nn.log_softmax(logits))):
        logp = row[len(prompt) - 1 : len(prompt) - 1 + len(completion)]
        total -= logp[np.arange(len(completion)), completion].sum()
        right += (logp.argmax(axis=1) == completion).sum()
        count += len(completion)
    metrics = sft.evaluate(policy(), CONFIG, list(rows), batch_size, 20)
    assert metrics["eval/loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["eval/mean_token_accuracy"] == pytest.approx(right / count)


@pytest.mark.parametrize("batch_size", [5, 16])
def test_held_out_pairs_stand_in_the_order_of_the_rows(batch_size):
    """Scores of reward.py and log-probabilities of dpo.py, computed by length."""
    rows, params = random_rows(12, 5, 12, 9), make_start(reward)
    scores, metrics = reward.evaluate(params, CONFIG, rows, batch_size, 20)
    batch = reward.make_batch(rows, 20, [0.0] * 12)  # that rows do not mix is shown above
    expected = np.stack(reward.pair_scores(params, batch["tokens"], batch["mask"], CONFIG), axis=1)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    margins = -np.diff(expected)[:, 0]
    assert metrics["eval/rewards/accuracies"] == pytest.approx((margins > 0).mean())
    assert metrics["eval/loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)
    logprobs = dpo.dataset_logprobs(policy(), CONFIG, rows, batch_size, 20)
    expected = dpo.pair_logprobs(policy(), dpo.make_batch(rows, 20), CONFIG)
    np.testing.assert_allclose(logprobs, expected, atol=2e-5)
    for found in (scores, logprobs):
        assert len({round(float(x), 3) for x in found.ravel()}) > 20


def test_calibration_error():
    """0 where the share of right answers is the confidence; 1/2 for a sure coin."""
    rng = np.random.default_rng(0)
    size = np.abs(rng.normal(size=200_000)) * 2
    right = rng.random(len(size)) < 1 / (1 + np.exp(-size))
    assert reward.calibration_error(np.where(right, size, -size)) < 0.01
    coin = np.where(np.arange(1000) % 2, 50.0, -50.0)
    assert reward.calibration_error(coin) == pytest.approx(0.5, abs=0.05)


def test_normalised_scores():
    """The folded model's score is gain * score + shift: mean 0, within-prompt deviation 1."""
    rows = [[*prompt, *answer] for prompt, answer in random_rows(24, 5, 12)]
    tokens, mask = reward.pad_rows(rows, 20)
    params = make_start(reward)
    raw = np.asarray(reward.learned_rewards(params, CONFIG, tokens, mask)).reshape(6, 4)
    raw = raw + np.linspace(0, 30, 6)[:, None]  # prompts differ much more than samples
    params = params | {"ln_f": params["ln_f"] | {"bias": params["ln_f"]["bias"] + 0.3}}
    plain = np.asarray(reward.learned_rewards(params, CONFIG, tokens, mask))
    folded, gain, shift = reward.normalise(params, raw)
    scores = raw * gain + shift
    assert abs(scores.mean()) < 1e-4
    within = np.sqrt(np.mean(scores.var(axis=1, ddof=1)))  # as many samples to each prompt
    assert within == pytest.approx(1, rel=1e-5)
    after = np.asarray(reward.learned_rewards(folded, CONFIG, tokens, mask))
    np.testing.assert_allclose(after, plain * gain + shift, atol=1e-4)


def test_a_pad_token_keeps_the_scores(inputs, tmp_path):
    config, params = reward.load_model(inputs / "scorer")
    config = dataclasses.replace(config, pad_token_id=config.eos_token_id)
    rows = [[*prompt, *answer] for prompt, answer in random_rows(6, 5, 12)]
    tokens, mask = reward.pad_rows(rows, 20)
    before = reward.learned_rewards(params, config, tokens, mask)
    padded, new = reward.add_pad_token(params, config, inputs / "scorer", tmp_path / "tokenizer")
    assert new.pad_token_id == config.vocab_size == new.vocab_size - 1
    np.testing.assert_array_equal(before, reward.learned_rewards(padded, new, tokens, mask))
    reward.save_model(tmp_path / "model", new, padded, tmp_path / "tokenizer")
    old, tokenizer = (reward.load_tokenizer(f) for f in (inputs / "scorer", tmp_path / "model"))
    assert tokenizer._special_tokens["[PAD]"] == new.pad_token_id
    assert tokenizer.encode_ordinary(" [PAD] it is") == old.encode_ordinary(" [PAD] it is")
    assert tokenizer.token_byte_values() == old.token_byte_values()
    again = reward.learned_rewards(*reward.load_model(tmp_path / "model")[::-1], tokens, mask)
    np.testing.assert_array_equal(before, again)


# ------------------------------------------------------------------------------ optimizer


def optimizer_args(warmup_steps, weight_decay=0.0):
    rest = {"learning_rate": 0.8, "max_grad_norm": 1.0}
    return SimpleNamespace(warmup_steps=warmup_steps, weight_decay=weight_decay, **rest)


@pytest.mark.parametrize("warmup, total", [(4, 12), (1, 4), (0, 4), (12, 13), (100, 300)])
def test_learning_rate_schedule(warmup, total):
    """Steps 0, 1, … have 1/n, 2/n, … of the peak, step n - 1 all of it, step total none.

    n = 0 counts as 1.
    """
    _, schedule = ppo.make_optimizer(optimizer_args(warmup), total)
    warmup = max(warmup, 1)
    rise = [0.8 * (step + 1) / warmup for step in range(warmup)]
    fall = [0.8 * (total - step) / (total - warmup) for step in range(warmup, total + 1)]
    found = jax.vmap(schedule)(jnp.arange(total + 1))
    np.testing.assert_allclose(found, rise + fall, rtol=0, atol=2e-7)
    assert float(schedule(warmup)) == pytest.approx(0.8, abs=1e-7)  # as it is logged


def test_optimizer_follows_its_schedule_and_decays_matrices_only():
    optimizer, schedule = sft.make_optimizer(optimizer_args(2, weight_decay=0.5), 4)
    params = jax.tree.map(jnp.ones_like, policy())
    zeros = jax.tree.map(jnp.zeros_like, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(3):
        updates, state = update(zeros, state, params)
        expected = -float(schedule(step)) * 0.5
        assert float(updates["wte"]["embedding"][0, 0]) == pytest.approx(expected, rel=1e-4)
        kernel = updates["h.0"]["attn"]["c_attn"]["kernel"]
        assert float(kernel.mean()) == pytest.approx(expected, rel=1e-4)
        for leaf in (updates["ln_f"]["scale"], updates["h.0"]["mlp"]["c_fc"]["bias"]):
            assert (np.asarray(leaf) == 0).all()


def test_gradients_are_clipped_by_their_global_norm():
    """Adam does not see the gradient's scale, but two steps see how it changed."""
    params, (optimizer, _) = {"kernel": jnp.zeros(2)}, sft.make_optimizer(optimizer_args(0), 10)
    update = jax.jit(optimizer.update)

    def second_update(scale):
        _, state = update({"kernel": jnp.array([0.6, 0.8])}, optimizer.init(params), params)
        return update({"kernel": scale * jnp.array([0.6, -0.8])}, state, params)[0]

    assert_equal(second_update(1.0), second_update(64.0))
    assert largest_difference(second_update(1.0), second_update(0.1)) > 1e-3
