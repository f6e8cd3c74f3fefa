"""evaluate.py: its estimates against enumeration and closed forms, and one run on tiny models."""

import dataclasses
import importlib.util
import itertools
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import evaluate
import ppo

# A distribution over five texts to each of two prompts, in 40ths, and what they earn.
COUNTS = np.array([[20, 10, 5, 4, 1], [2, 8, 10, 10, 10]])
REWARDS = np.array([[0.0, 1.0, -2.0, 3.0, 5.0], [2.0, -1.0, 0.5, 0.5, -3.0]])
OTHERS = np.array([[0.0, 2.0, -1.0, 2.5, 3.0], [2.0, 0.0, 1.5, 0.0, -1.0]])


def as_samples(values):
    """[2, 5] -> [2, 40]: each text as often as its probability says, so without sampling error."""
    return np.array([np.repeat(row, counts) for row, counts in zip(values, COUNTS)])


def random_params(model, config, seed):
    one = jnp.ones((1, 1), jnp.int32)
    return jax.jit(model(config).init)(jax.random.key(seed), one, one)["params"]


def closed_form(beta):
    """pi* ~ pi_ref exp(r / beta) itself: (KL, E[r], E[other], log Z) at each prompt."""
    ref = COUNTS / 40
    weights = ref * np.exp(REWARDS / beta)
    best = weights / weights.sum(axis=1, keepdims=True)
    kl = (best * np.log(best / ref)).sum(axis=1)
    mean = (best * REWARDS).sum(axis=1)
    return kl, mean, (best * OTHERS).sum(axis=1), np.log(weights.sum(axis=1))


def test_kl_equals_that_of_whole_sequences_by_enumeration():
    """Three tokens, EOS = 0, two steps: seven sequences; those that end at once have no step 2."""
    first, second = jax.random.normal(jax.random.key(0), (2, 2, 3, 3))  # [model, last token, V]
    first = first[:, 0]  # nothing has gone before the first step
    sequences = [(0, 0), *itertools.product((1, 2), range(3))]
    mask = jnp.array([[1, int(a > 0)] for a, _ in sequences])
    policy, ref = (
        jnp.array([[first[m], second[m, a]] for a, _ in sequences]) for m in (0, 1)
    )  # logits [7, 2, 3]
    tokens = jnp.array(sequences)
    p, q = (jnp.sum(ppo.token_logprobs(x, tokens) * mask, axis=1) for x in (policy, ref))
    assert jnp.exp(p).sum() == pytest.approx(1, abs=1e-6)
    estimate = jnp.sum(jnp.exp(p) * evaluate.full_vocabulary_kl(policy, ref, mask))
    assert estimate == pytest.approx(float(jnp.sum(jnp.exp(p) * (p - q))), abs=1e-6)
    assert not evaluate.full_vocabulary_kl(policy, policy, mask).any()


def test_sequence_kl_agrees_with_the_sampled_log_ratio():
    """Left-padded prompts and responses of many lengths: a shift by one position would show."""
    config = ppo.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.4
    )
    params, ref_params = (random_params(ppo.GPT2, config, seed) for seed in (0, 1))
    prompts = ppo.pad_rows([[3, 4, 5], [6]] * 1024, 4, left=True)
    temperature = 1.5
    sampling = (jax.random.key(2), 6, temperature, 0)
    tokens, mask, logprobs = ppo.generate(params, config, *prompts, *sampling)
    ref_logprobs = ppo.policy_logprobs(ref_params, config, tokens, mask, 4, temperature)
    k1 = np.asarray(((logprobs - ref_logprobs) * mask[:, 4:]).sum(axis=1))
    configs = (config, config)
    kl = np.asarray(evaluate.sequence_kl(params, ref_params, configs, tokens, mask, 4, temperature))
    assert mask[:, 4:].sum(axis=1).min() == 1 and mask[:, 4:].sum(axis=1).max() == 6
    assert kl.min() > 0 and kl.var() < k1.var()
    error = (kl - k1).std() / math.sqrt(len(kl))
    assert abs((kl - k1).mean()) < 4 * error < 0.2 * kl.mean()


@pytest.mark.parametrize("beta", [10.0, 1.0, 0.3])
def test_frontier_is_the_closed_form(beta):
    kl, mean, other, log_z = closed_form(beta)
    found = evaluate.frontier(as_samples(REWARDS), [beta], as_samples(OTHERS))
    assert found.shape == (3, 1, 2)
    np.testing.assert_allclose(found[:, 0], [kl, mean, other], atol=1e-12)
    objective = evaluate.optimal_objective(as_samples(REWARDS), beta)
    np.testing.assert_allclose(objective, beta * log_z, atol=1e-12)
    np.testing.assert_allclose(objective, mean - beta * kl, atol=1e-12)


def test_frontier_from_random_samples():
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.choice(5, 20_000, p=counts / 40) for counts in COUNTS])  # [2, N]
    rewards, others = (np.take_along_axis(x, drawn, axis=1) for x in (REWARDS, OTHERS))
    found = evaluate.frontier(rewards, [1.0], others)[:, 0]
    np.testing.assert_allclose(found, closed_form(1.0)[:3], rtol=0.05)


def test_frontier_begins_at_the_reference_and_is_beaten_by_no_policy():
    rewards = as_samples(REWARDS)
    kl, mean = evaluate.frontier(rewards, evaluate.beta_grid(rewards)).mean(axis=2)  # [K] each
    assert kl[0] == pytest.approx(0, abs=1e-12) and mean[0] == pytest.approx(rewards.mean())
    assert (np.diff(kl) > -1e-12).all() and np.diff(kl).max() < 0.2
    assert mean[-1] == pytest.approx(REWARDS.max(axis=1).mean(), abs=1e-6)
    ref = COUNTS / 40
    for policy in np.random.default_rng(1).dirichlet([0.4] * 5, size=(500, 2)):
        policy_kl = (policy * np.log(np.maximum(policy, 1e-300) / ref)).sum(axis=1).mean()
        reward = (policy * REWARDS).sum(axis=1).mean()
        # the straight lines between the points run below the curve by this much at most
        assert reward <= np.interp(policy_kl, kl, mean) + 0.01


def test_shares():
    frontier_kl, frontier_x = np.array([0.0, 1.0, 3.0]), np.array([0.5, 2.5, 4.5])
    for kl, best in [(1.0, 2.5), (0.5, 1.5), (2.0, 3.5), (9.0, 4.5)]:  # by hand, between the points
        assert evaluate.share_of_frontier(best, kl, frontier_x, frontier_kl) == pytest.approx(1)
        assert evaluate.share_of_frontier(0.5, kl, frontier_x, frontier_kl) == 0
    assert evaluate.share_of_frontier(2.0, 2.0, frontier_x, frontier_kl) == pytest.approx(0.5)
    assert math.isnan(evaluate.share_of_frontier(0.5, 0.0, frontier_x, frontier_kl))


def test_share_grammatical():
    """By what the grammar writes itself, by nonsense, and without a grammar."""
    gold = ppo.load_function(str(ROOT / "data" / "reviews.py") + ":sentiment")
    prompts = ["The Quiet Harbor (western). Sadly,", "The Last Street (romance). In the end,"]
    rng, sample = random.Random(0), gold.__globals__["sample"]
    texts = [sample(rng, prompt) for prompt in prompts for _ in range(3)]
    assert evaluate.share_grammatical(gold, prompts, texts) == 1
    texts[1] = " the the was. Good it."
    assert evaluate.share_grammatical(gold, prompts, texts) == pytest.approx(5 / 6)
    assert evaluate.share_grammatical(lambda prompts, completions: [], prompts, texts) is None


def test_describe_shares_of_the_optimum_itself_and_of_the_reference():

    def samples_with(kl, reward, gold):
        return evaluate.Samples([], reward, gold, kl, kl, kl)

    reward, gold, beta = as_samples(REWARDS), as_samples(OTHERS), 2.0
    ref = samples_with(np.zeros((2, 1)), reward, gold)
    curves = {
        "gold": evaluate.frontier(gold, evaluate.beta_grid(gold)),
        "reward": evaluate.frontier(reward, evaluate.beta_grid(reward), gold),
    }
    best = [x[0][:, None] for x in evaluate.frontier(reward, [beta], gold)]  # [2, 1] each
    found = evaluate.describe_shares(samples_with(*best), ref, curves, beta, 1.0)
    for name in ("reward", "gold_of_best_reward", "J"):
        assert found[name][0] == pytest.approx(1, abs=0.02)
        assert found[name][2] is True
    assert found["gold"][0] < 1
    same = samples_with(np.full((2, 1), 0.5), reward, gold)
    found = evaluate.describe_shares(same, ref, curves, None, 0.4)
    assert found.keys() == {"gold", "reward", "gold_of_best_reward"}
    for share, _, trusted in found.values():
        assert share == pytest.approx(0, abs=1e-9) and trusted is False


def test_n_grams_by_hand():
    texts = [" the plot was good. The plot was bad.", " I liked it, the plot!"]
    # words: the 3, plot 3, was 2, good, bad, i, liked, it -> 8 of 13
    assert evaluate.distinct_n(texts, 1) == pytest.approx(8 / 13)
    # bigrams: the plot 3, plot was 2, was good, good the, was bad, i liked, liked it, it the
    assert evaluate.distinct_n(texts, 2) == pytest.approx(8 / 11)
    # trigrams of the first: "the plot was" twice among 6; of the second: 3, none repeated
    assert evaluate.repeated_n(texts, 3) == pytest.approx(1 / 9)
    assert evaluate.distinct_n(["", " ."], 1) == 0


def test_known_accuracy():
    margins, probability = np.array([1.0, -2.0, 0.5]), np.array([0.9, 0.3, 0.4])
    assert evaluate.known_accuracy(margins, probability) == pytest.approx((0.9 + 0.7 + 0.4) / 3)
    best = evaluate.known_accuracy(probability - 0.5, probability)
    assert best == pytest.approx(np.maximum(probability, 1 - probability).mean())


def test_correlation_ignores_what_prompts_have_in_common():
    x, y = np.random.default_rng(0).normal(size=(2, 1, 50))
    expected = np.corrcoef(x[0], y[0])[0, 1]
    assert evaluate.within_prompt_correlation(x, y) == pytest.approx(expected)
    shifts = np.array([[0.0], [100.0], [-7.0]])
    assert evaluate.within_prompt_correlation(x + shifts, y + 3 * shifts) == pytest.approx(expected)


def test_errors_are_those_of_means_over_prompts():
    x = np.random.default_rng(0).normal(size=(400, 4)) + np.arange(400)[:, None] % 5
    mean, error = evaluate.mean_and_error(x)
    assert mean == pytest.approx(x.mean())
    assert error == pytest.approx(x.mean(axis=1).std(ddof=1) / 20)
    value, bootstrapped = evaluate.bootstrap(lambda m: m, x.mean(axis=1), repeats=1000)
    assert value == pytest.approx(mean) and bootstrapped == pytest.approx(error, rel=0.1)
    # what numerator and denominator share is no noise in their ratio
    ratio, error = evaluate.bootstrap(lambda a, b: a / b, 2 * x.mean(axis=1), x.mean(axis=1))
    assert ratio == pytest.approx(2) and error == pytest.approx(0, abs=1e-9)


def test_in_batches():
    assert list(evaluate.in_batches([1, 2, 3], 2)) == [[1, 2], [3, 3]]
    assert list(evaluate.in_batches([1, 2], 2)) == [[1, 2]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny random models: reference, its copy, another policy, a reward model."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = ROOT / "data" / "reviews" / "tokenizer"
    sizes = {"vocab_size": 1408, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2}
    eos_id = ppo.load_tokenizer(tokenizer).eot_token
    config = ppo.GPT2Config(**sizes, eos_token_id=eos_id, initializer_range=0.3)
    for name, seed in {"ref": 0, "copy": 0, "policy": 1, "reward": 2}.items():
        model = ppo.RewardModel if name == "reward" else ppo.GPT2
        ppo.save_model(folder / name, config, random_params(model, config, seed), tokenizer)
    other = dataclasses.replace(config, eos_token_id=eos_id + 1)
    ppo.save_model(
        folder / "ends_otherwise", other, ppo.load_model(folder / "reward")[1], tokenizer
    )
    return folder


def small_args(folders, **changes):
    models = {"models": (str(folders / "copy"), str(folders / "policy"))}
    models |= {"ref": str(folders / "ref"), "reward_model": str(folders / "reward")}
    sizes = {"num_prompts": 5, "frontier_prompts": 4, "frontier_samples": 12, "share_samples": 3}
    sizes |= {"batch_size": 16, "max_completion_length": 8}
    return evaluate.Args(**(models | sizes | changes))


def test_a_run(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    output, plot = tmp_path / "new" / "evaluation.json", tmp_path / "reward_kl.png"
    can_plot = importlib.util.find_spec("matplotlib") is not None
    files = {"output": str(output), "plot": str(plot) if can_plot else ""}
    evaluate.main(small_args(folders, kl_coef=0.5, **files))
    assert not can_plot or plot.read_bytes().startswith(b"\x89PNG")
    report, printed = json.loads(output.read_text()), capsys.readouterr().out
    ref, copy, policy = report["table"]
    assert ref["kl"] == [0, 0] and abs(copy["kl"][0]) < 1e-4 and policy["kl"][0] > 0.1
    assert copy["gold"] == ref["gold"] and copy["reward"] == pytest.approx(ref["reward"])
    for row in report["table"]:
        assert row["J"][0] == pytest.approx(row["reward"][0] - 0.5 * row["kl"][0], abs=1e-6)
        assert 0 < row["length"] <= 8 and 0 <= row["eos"] <= 1
    assert report["trusted_kl"] == pytest.approx(math.log(12) - 2)
    names = [row["policy"] for row in report["shares"]]
    assert names == [str(folders / name) for name in ("copy", "policy")]
    assert report["shares"][1]["reward"][2] is False  # past ln(12) - 2
    assert report["J_best"] > report["J_ref"]
    assert 0.5 < report["reward_model"]["best_accuracy"] < 0.9
    assert -1 <= report["reward_model"]["correlation_on_data"] <= 1
    assert set(report["frontier"]["reward"]) == {"kl", "reward", "gold"}
    first = json.loads((ROOT / "data/reviews/prompts_test.jsonl").read_text().splitlines()[0])
    assert first["prompt"] in printed and "*" in printed


def test_gold_alone_without_frontier(folders, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    evaluate.main(small_args(folders, frontier=False, reward_model=""))
    printed = capsys.readouterr().out
    assert "gold" in printed and "reward" not in printed and "most" not in printed


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"temperature": 0.0}, "--temperature"),
        ({"kl_coef": 0.1, "reward_model": ""}, "--kl-coef"),
        ({"num_prompts": 1}, "--num-prompts"),
        ({"reward_model": "{}/ref"}, "not a reward model"),
        ({"reward_model": "", "dataset": "prompts.jsonl"}, "nothing to measure"),
        ({"plot": "x.png", "frontier": False}, "--no-frontier"),
        ({"reward_model": "{}/ends_otherwise"}, "different tokenizers"),
        ({"output": "README.md/x.json"}, "README.md"),  # known before anything is sampled
    ],
)
def test_bad_input(folders, monkeypatch, error_line, changes, word):
    monkeypatch.chdir(ROOT)
    args = small_args(folders, **changes)
    args = dataclasses.replace(args, reward_model=args.reward_model.format(folders))
    assert word in error_line(evaluate.main, args)


def test_numbers_that_make_no_sense(folders, monkeypatch, error_line):
    """Each numeric flag below its range, and not finite."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ppo, "load_tokenizer", lambda _: ppo.fail("it was accepted"))
    defaults, zero = vars(evaluate.Args()), {"seed", "examples", "missing_eos_penalty"}
    for name in [*(k for k, x in defaults.items() if type(x) in (int, float)), "kl_coef"]:
        wrong = [-1] + [0] * (name not in zero)
        wrong += [math.nan, math.inf] * (type(defaults[name]) is not int)
        for value in wrong:
            flag = "--" + name.replace("_", "-")
            message = error_line(evaluate.main, small_args(folders, **{name: value}))
            assert flag in message, (flag, value, message)
