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


def settings(**changes):
    args = ppo.Args(**({"epochs": 2, "num_minibatches": 2, "micro_batch_size": 4} | changes))
    return ppo.Settings(**{name: getattr(args, name) for name in ppo.Settings._fields})


def sample(config, params, temperature=1.0, rows=16, seed=0):
    """(tokens, mask, logprobs, scores) of a rollout on left-padded prompts of unequal lengths."""
    prompts = [row[0] for row in random_rows(rows, P, seed=seed)]
    tokens, mask = ppo.pad_rows(prompts, P, left=True)
    key = ppo.stream_key(seed, "rollout", 1)
    sampled = ppo.generate(params, config, tokens, mask, key, R, temperature, EOS)
    lengths = np.asarray(sampled[1][:, P:].sum(axis=1))
    assert lengths.min() < R == lengths.max()  # some rows end early, some never
    return *sampled, jnp.asarray(np.random.default_rng(seed).normal(size=rows), jnp.float32)


def train_ppo(models, batch, setting, optimizer=SGD, key=0):
    """(parameters, metrics) after ppo.train_step."""
    config, policy, _, critic = models
    state = ppo.make_state({"policy": policy, "critic": critic}, optimizer, 0.1)
    configs = (config, config)
    state, metrics = ppo.train_step(state, batch, jax.random.key(key), configs, optimizer, setting)
    return state.params, jax.device_get(metrics)


def rollout_batch(models, sampled, setting):
    """ppo.make_batch of a rollout, the parameters being the policy's."""
    config, policy, reference, critic = models
    state = ppo.make_state({"policy": policy, "critic": critic}, SGD, 0.1)
    return ppo.make_batch(state, reference, *sampled, (config, config), setting)


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
        results.append(sft.train_step(state, batch | {"tokens": tokens}, config, optimizer, 3))
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
        results.append(
            [
                reward.eval_step(params, tokens, batch["mask"], config),
                reward.train_step(state, changed, config, optimizer, 3, 0.1),
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
    setting = settings()
    tokens, mask, logprobs, scores = sample(models[0], models[1])
    response_mask = np.asarray(mask)[:, P:]
    assert (np.asarray(mask)[:, :P] == 0).any() and (response_mask == 0).any()
    noise = np.random.default_rng(3).normal(size=logprobs.shape).astype(np.float32)

    def spoil(x):
        return jnp.where(response_mask > 0, x, noise)

    batch, metrics = rollout_batch(models, (tokens, mask, logprobs, scores), setting)
    other = (jnp.asarray(junk(tokens, mask)), mask, spoil(logprobs), scores)
    other_batch, other_metrics = rollout_batch(models, other, setting)
    assert_equal(metrics, other_metrics)
    for name in ("values", "advantages", "returns"):
        assert_equal(batch[name], other_batch[name])
        assert (np.asarray(batch[name])[response_mask == 0] == 0).all()
    spoiled = other_batch | {
        name: spoil(batch[name]) for name in ("values", "advantages", "returns")
    }
    assert_equal(train_ppo(models, batch, setting), train_ppo(models, spoiled, setting))


# ------------------------------------------------------------------------------ micro-batches


def test_micro_batches_of_sft_equal_the_whole_batch():
    config, params = make_params(sft, sft.GPT2, 0)
    batch = sft.make_batch(random_rows(8, 5, 12), 20)
    assert len(set(batch["loss_mask"].sum(axis=1))) > 3
    optimizer, results = optax.sgd(1.0), []
    for micro_batch_size in (8, 1):
        state = sft.make_state(params, optimizer)
        results.append(sft.train_step(state, batch, config, optimizer, micro_batch_size))
    assert largest_difference(results[0][0].params, results[1][0].params) < 3e-6
    assert largest_difference(results[0][1], results[1][1]) < 1e-5
    assert largest_difference(results[0][0].params, params) > 1e-2


def test_micro_batches_of_reward_equal_the_whole_batch():
    config, params = make_params(reward, reward.RewardModel, 0)
    batch = reward.make_batch(random_rows(8, 5, 12, 9), 20, np.linspace(0, 1, 8))
    optimizer, results = optax.sgd(1.0), []
    for micro_batch_size in (8, 1):
        state = reward.make_state(params, optimizer)
        results.append(reward.train_step(state, batch, config, optimizer, micro_batch_size, 0.1))
    assert largest_difference(results[0][0].params, results[1][0].params) < 1e-5
    assert largest_difference(results[0][1], results[1][1]) < 1e-5
    assert largest_difference(results[0][0].params, params) > 1e-2


def test_micro_batches_of_ppo_equal_the_whole_batch(models):
    batch, _ = rollout_batch(models, sample(models[0], models[1]), settings())
    results = [train_ppo(models, batch, settings(micro_batch_size=n)) for n in (8, 1)]
    assert largest_difference(results[0][0], results[1][0]) < 1e-5
    assert largest_difference(results[0][1], results[1][1]) < 1e-4
    start = {"policy": models[1], "critic": models[3]}
    assert largest_difference(results[0][0], start) > 1e-3


# ------------------------------------------------------------------------------ ppo


def test_with_a_learning_rate_of_0_nothing_happens(models, temperature=0.7):
    """Ratio 1 and no KL at every update, so sampling and training see the same probabilities."""
    setting = settings(temperature=temperature)
    args = ppo.Args(learning_rate=0.0, weight_decay=0.1)
    optimizer, _ = ppo.make_optimizer(args, 4)
    batch, _ = rollout_batch(models, sample(models[0], models[1], temperature), setting)
    params, metrics = train_ppo(models, batch, setting, optimizer)
    assert_equal(params, {"policy": models[1], "critic": models[3]})
    assert metrics["policy/updates"] == 4 and metrics["policy/clipfrac_avg"] == 0
    assert abs(metrics["val/ratio"] - 1) < 1e-5 and metrics["policy/approxkl_avg"] < 1e-10
    assert metrics["grad_norm"] > 0


def test_at_the_reference_there_is_no_kl(models):
    config, policy, _, critic = models
    sampled = sample(config, policy)
    _, metrics = rollout_batch((config, policy, policy, critic), sampled, settings())
    assert abs(metrics["objective/kl"]) < 1e-4
    assert metrics["objective/rlhf_reward"] == pytest.approx(float(sampled[3].mean()), abs=1e-4)
    _, metrics = rollout_batch(models, sampled, settings())
    assert metrics["objective/kl"] > 0.1  # the references of the other tests do differ
    reward_and_penalty = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    assert metrics["objective/rlhf_reward"] == pytest.approx(float(reward_and_penalty), abs=1e-5)


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
    setting = settings(epochs=2)
    batch, _ = rollout_batch(models, sample(models[0], models[1]), setting)
    stopped, metrics = train_ppo(models, batch, setting._replace(stop_kl=1e-8))
    assert metrics["policy/updates"] == 2
    distances = []
    for updates in (1, 2, 3):
        some = optax.scale_by_schedule(lambda i, n=updates: jnp.where(i < n, 1.0, 0.0))
        params, _ = train_ppo(models, batch, setting, optax.chain(SGD, some))
        distances.append(largest_difference(params, stopped))
    assert distances[1] < 1e-7 and distances[0] > 1e-5 and distances[2] > 1e-5


def test_a_large_stop_kl_stops_nothing(models):
    batch, _ = rollout_batch(models, sample(models[0], models[1]), settings())
    params, metrics = train_ppo(models, batch, settings(stop_kl=1e9))
    assert metrics["policy/updates"] == 4
    assert_equal((params, metrics), train_ppo(models, batch, settings()))


def test_metrics_are_means_over_the_updates_that_were_made(models):
    """After one update the policy was never off: the ratio is 1, whatever the others would give."""
    setting = settings(stop_kl=-1.0)
    batch, _ = rollout_batch(models, sample(models[0], models[1]), setting)
    _, metrics = train_ppo(models, batch, setting)
    assert metrics["policy/updates"] == 1
    assert metrics["policy/approxkl_avg"] < 1e-10 and abs(metrics["val/ratio"] - 1) < 1e-5
    _, metrics = train_ppo(models, batch, settings())
    assert metrics["policy/approxkl_avg"] > 1e-7


def test_every_row_is_seen_once_in_an_epoch(models):
    """Linear in the rows: with the whole batch as one minibatch, the key does not matter."""
    batch, _ = rollout_batch(models, sample(models[0], models[1]), settings())
    one = settings(epochs=1, num_minibatches=1)
    first, second = (train_ppo(models, batch, one, key=key)[0] for key in (0, 1))
    assert largest_difference(first, second) < 1e-6
    first, second = (train_ppo(models, batch, settings(), key=key)[0] for key in (0, 1))
    assert largest_difference(first, second) > 1e-5


@pytest.mark.parametrize("script", [sft, reward, ppo], ids=["sft", "reward", "ppo"])
def test_a_step_leaves_the_parameters_it_started_from(script, models):
    """train_step gives its state's buffers away; the reference and the start must keep theirs."""
    optimizer = SGD
    if script is ppo:
        start, setting = {"policy": models[1], "critic": models[3]}, settings()
        before = jax.tree.map(np.array, (start, models[2]))
        batch, _ = rollout_batch(models, sample(models[0], models[1]), setting)
        train_ppo(models, batch, setting, optimizer)
        assert_equal((start, models[2]), before)
        return
    model = {sft: sft.GPT2}.get(script, script.RewardModel if script is reward else None)
    config, start = make_params(script, model, 0)
    before = jax.tree.map(np.array, start)
    if script is sft:
        batch, rest = sft.make_batch(random_rows(8, 5, 12), 20), (4,)
    else:
        batch, rest = reward.make_batch(random_rows(8, 5, 12, 9), 20, [0.0] * 8), (4, 0.0)
    state = script.make_state(start, optimizer)
    state, _ = script.train_step(state, batch, config, optimizer, *rest)
    assert_equal(start, before)
    assert largest_difference(state.params, start) > 1e-5


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


def test_no_two_rollouts_share_a_key(inputs, tmp_path, monkeypatch):
    keys, generate = [], ppo.generate

    def watched(params, config, tokens, mask, key, *rest):
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return generate(params, config, tokens, mask, key, *rest)

    monkeypatch.setattr(ppo, "generate", watched)
    ppo.main(small_args(ppo, inputs, tmp_path / "run"))
    assert len(keys) == len(set(keys)) == 6 + 4  # six steps, evaluations at 0, 2, 4 and 6


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
