"""evaluate.py: its estimates against enumeration and closed forms, and one run on tiny models."""

import collections
import dataclasses
import http.server
import importlib.util
import itertools
import json
import math
import random
import re
import threading

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
    found = evaluate.token_measures(policy, ref, tokens)  # [7, 2] each
    found = {name: jnp.sum(x * mask, axis=1) for name, x in found.items()}
    np.testing.assert_allclose(found["k1"], p - q, atol=1e-6)
    means = {name: float(jnp.sum(jnp.exp(p) * x)) for name, x in found.items()}
    kl = float(jnp.sum(jnp.exp(p) * (p - q)))
    assert means["kl"] == pytest.approx(kl, abs=1e-6)
    assert means["entropy"] == pytest.approx(-float(jnp.sum(jnp.exp(p) * p)), abs=1e-6)
    same = evaluate.token_measures(policy, policy, tokens)
    assert not same["kl"].any() and not same["k1"].any()


def test_sequence_measures_agree_with_the_sampled_tokens():
    """Left-padded prompts and responses of many lengths: a shift by one position would show."""
    config = ppo.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.4
    )
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    params, ref_params = (random_params(ppo.GPT2, c, i) for i, c in enumerate((config, untied)))
    prompts = ppo.pad_rows([[3, 4, 5], [6]] * 1024, 4, left=True)
    temperature = 1.5
    sampling = (jax.random.key(2), 6, temperature, 0)
    tokens, mask, logprobs = ppo.generate(params, config, *prompts, *sampling)
    ref_logprobs = ppo.policy_logprobs(ref_params, untied, tokens, mask, 4, temperature)
    k1 = np.asarray(((logprobs - ref_logprobs) * mask[:, 4:]).sum(axis=1))
    models = (params, ref_params, (config, untied))
    found = evaluate.sequence_measures(*models, tokens, mask, 4, temperature)
    kl, entropy = np.asarray(found["kl"]), np.asarray(found["entropy"])
    np.testing.assert_allclose(found["k1"], k1, atol=2e-5)
    assert mask[:, 4:].sum(axis=1).min() == 1 and mask[:, 4:].sum(axis=1).max() == 6
    assert kl.min() > 0 and kl.var() < k1.var()
    error = (kl - k1).std() / math.sqrt(len(kl))
    assert abs((kl - k1).mean()) < 4 * error < 0.2 * kl.mean()
    surprise = -np.asarray(logprobs).sum(axis=1)
    error = (entropy - surprise).std() / math.sqrt(len(kl))
    assert abs((entropy - surprise).mean()) < 4 * error < 0.1 * entropy.mean()


def test_logits_of_two_models_never_stand_whole():
    """A response of 500 tokens of GPT-2's vocabulary: [2, 500, V] of either takes 201 MB."""
    sizes = {"n_positions": 512, "n_embd": 8, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    config, P = ppo.GPT2Config(**sizes), 4
    params, ref_params = (random_params(ppo.GPT2, config, seed) for seed in (0, 1))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, P + 500))
    mask = (np.arange(P + 500) < np.array([[P + 500], [P + 333]])).astype(np.int32)

    @jax.jit
    def whole(params, ref_params):
        logits, ref_logits = (
            ppo.GPT2(config).apply({"params": x}, tokens, mask)[:, P - 1 : -1]
            for x in (params, ref_params)
        )
        found = evaluate.token_measures(logits / 0.7, ref_logits / 0.7, jnp.asarray(tokens[:, P:]))
        return {name: jnp.sum(x * mask[:, P:], axis=1) for name, x in found.items()}

    arguments = (params, ref_params, (config, config), tokens, mask, P, 0.7)
    compiled = evaluate.sequence_measures.lower(*arguments).compile()
    all_at_once = whole.lower(params, ref_params).compile()
    found, expected = compiled(params, ref_params, tokens, mask), all_at_once(params, ref_params)
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-3)
    least, most = (x.memory_analysis().temp_size_in_bytes for x in (compiled, all_at_once))
    assert least < 0.75 * most, (least, most)  # a block is two thirds of the columns


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


def test_effective_samples_bound_a_curve():
    weights = np.log([[1.0, 3.0], [1.0, 1.0]])  # of 1/4 and 3/4, of 1/2 and 1/2
    found = evaluate.effective_samples(weights, [1.0, np.inf])
    np.testing.assert_allclose(found, [[1 / (1 / 16 + 9 / 16), 2], [2, 2]])
    # Of normal rewards the optimum is known: mean sigma^2 / beta, KL sigma^2 / (2 beta^2).
    rewards = np.random.default_rng(0).normal(size=(64, 256))
    curve = evaluate.make_curve(rewards)
    kl, mean = curve.points.mean(axis=2)
    assert curve.trusted_kl == pytest.approx(math.log(256) - 2, abs=0.5)
    expected = np.sqrt(2 * kl[curve.trusted])
    np.testing.assert_allclose(mean[curve.trusted][1:], expected[1:], rtol=0.07, atol=0.01)
    assert (curve.effective[curve.trusted] >= 5).all() and curve.effective[-1] < 5
    # Of answers that are right or wrong the samples carry the whole curve.
    right = (np.random.default_rng(1).random((64, 256)) < 0.4).astype(float)
    curve = evaluate.make_curve(right)
    assert curve.trusted.all() and curve.trusted_kl == math.inf
    assert curve.points[1].mean(axis=1)[-1] == pytest.approx(1)


def test_best_of_n_is_the_mean_over_all_choices():
    rewards, others = np.random.default_rng(0).normal(size=(2, 3, 6))
    for n in (1, 2, 4, 6):
        chosen = [max(x, key=lambda i: rewards[0, i]) for x in itertools.combinations(range(6), n)]
        found = [x[0] for x in evaluate.best_of_n(rewards, n, others)]
        expected = [x[0, chosen].mean() for x in (rewards, others)]
        np.testing.assert_allclose(found, expected)


def test_the_kl_of_best_of_n_stays_below_its_bound():
    """Its exact KL: outcome i of rising reward has probability F_i^n - F_(i-1)^n."""
    for n in (1, 2, 8, 64):
        bound = evaluate.best_of_n_kl_bound(n)
        for probs in (COUNTS[0] / 40, np.full(20_000, 1 / 20_000)):
            above = np.append(0, probs.cumsum()) ** n
            best = np.maximum(np.diff(above), 1e-300)
            kl = (best * np.log(best / probs)).sum()
            assert kl <= bound + 1e-9
        assert kl == pytest.approx(bound, abs=0.01)  # of many outcomes it comes near
    assert evaluate.best_of_n_kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_win_rate_by_hand():
    x, x_ref = np.array([[1.0, 3.0], [0.0, 0.0]]), np.array([[2.0, 1.0], [0.0, 5.0]])
    # 1 loses and ties, 3 wins twice; 0 ties and loses, twice
    np.testing.assert_allclose(evaluate.win_rate(x, x_ref), [2.5 / 4, 1 / 4])
    np.testing.assert_allclose(evaluate.win_rate(x, x), 0.5)


def test_pass_at_k_is_the_mean_over_all_choices():
    right = np.array([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], float)
    for k in (1, 2, 4, 5):
        choices = list(itertools.combinations(range(5), k))
        expected = [np.mean([row[list(x)].max() for x in choices]) for row in right]
        np.testing.assert_allclose(evaluate.pass_at_k(right, k), expected)


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
        return evaluate.Samples([], reward, gold, kl, kl, kl, kl, kl)

    reward, gold, beta = as_samples(REWARDS), as_samples(OTHERS), 2.0
    ref = samples_with(np.zeros((2, 1)), reward, gold)
    curves = evaluate.make_curves(ref)
    curves = {kind: curve._replace(trusted_kl=1.0) for kind, curve in curves.items()}
    best = [x[0][:, None] for x in evaluate.frontier(reward, [beta], gold)]  # [2, 1] each
    found = evaluate.describe_shares(samples_with(*best), ref, curves, beta)
    for name in ("share_reward", "share_gold_of_best_reward", "share_J"):
        assert found[name][0] == pytest.approx(1, abs=0.02)
        assert found[name][2] is True
    assert found["share_gold"][0] < 1
    assert found["J_best"] == pytest.approx((best[1] - beta * best[0]).mean())
    same = samples_with(np.full((2, 1), 0.5), reward, gold)
    curves = {kind: curve._replace(trusted_kl=0.4) for kind, curve in curves.items()}
    found = evaluate.describe_shares(same, ref, curves, None)
    assert found.keys() == {"share_gold", "share_reward", "share_gold_of_best_reward"}
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


def test_self_bleu():
    """Numbers of nltk's sentence_bleu with SmoothingFunction().method1, the others as references.

    By hand for the second of the first two: 2 of its 5 words and 1 of its 4 pairs are in the first,
    0 of 3 and of 2 longer ones, and it is 3 words shorter.
    """
    texts = [" the plot was good. The plot was bad.", " I liked it, the plot!"]
    precisions = 2 / 5 * 1 / 4 * 0.1 / 3 * 0.1 / 2
    second = math.exp(1 - 8 / 5) * precisions**0.25
    first = (2 / 8 * 1 / 7 * 0.1 / 6 * 0.1 / 5) ** 0.25
    assert evaluate.self_bleu(texts) == pytest.approx((first + second) / 2)
    texts += [" the plot was good and the end was good, too"]
    assert evaluate.self_bleu(texts) == pytest.approx(0.2170146266588576)
    texts += [" bad", " the plot was good. The plot was bad indeed"]
    assert evaluate.self_bleu(texts) == pytest.approx(0.4204332731476369)
    assert evaluate.self_bleu([*texts, ""]) == pytest.approx(0.3794562123983871)
    assert evaluate.self_bleu([" a b c d e"] * 3) == pytest.approx(1)


def test_known_accuracy():
    margins, probability = np.array([1.0, -2.0, 0.5]), np.array([0.9, 0.3, 0.4])
    assert evaluate.known_accuracy(margins, probability) == pytest.approx((0.9 + 0.7 + 0.4) / 3)
    best = evaluate.known_accuracy(probability - 0.5, probability)
    assert best == pytest.approx(np.maximum(probability, 1 - probability).mean())


def test_calibration_by_hand():
    margins = np.log([9.0, 9.0, 1 / 9, 9.0, 3.0, 1 / 3, 3.0, 1 / 3])  # sure by 0.9 and by 0.75
    confidence, right, half = evaluate.calibration(margins, bins=2)
    np.testing.assert_allclose(confidence, [0.75, 0.9])
    np.testing.assert_allclose(right, [0.5, 0.75])
    np.testing.assert_allclose(half, [1.96 * 0.25, 1.96 * math.sqrt(0.75 * 0.25 / 4)])


def test_correlation_ignores_what_prompts_have_in_common():
    x, y = np.random.default_rng(0).normal(size=(2, 1, 50))
    expected = np.corrcoef(x[0], y[0])[0, 1]
    assert evaluate.within_prompt_correlation(x, y)[0] == pytest.approx(expected)
    shifts = np.array([[0.0], [100.0], [-7.0]])
    shifted = evaluate.within_prompt_correlation(x + shifts, y + 3 * shifts)
    assert shifted[0] == pytest.approx(expected)
    x, y = np.random.default_rng(1).normal(size=(2, 200, 8))
    _, half = evaluate.within_prompt_correlation(x, y)  # about 1.96 / sqrt(degrees of freedom)
    assert half == pytest.approx(1.96 / math.sqrt(200 * 7), rel=0.2)


def test_intervals_are_those_of_means_over_prompts():
    x = np.random.default_rng(0).normal(size=(400, 4)) + np.arange(400)[:, None] % 5
    mean, half = evaluate.mean_and_interval(x)
    assert mean == pytest.approx(x.mean())
    assert half == pytest.approx(1.96 * x.mean(axis=1).std(ddof=1) / 20)
    value, bootstrapped = evaluate.bootstrap(lambda m: m, x.mean(axis=1), repeats=1000)
    assert value == pytest.approx(mean) and bootstrapped == pytest.approx(half, rel=0.1)
    # what numerator and denominator share is no noise in their ratio
    ratio, error = evaluate.bootstrap(lambda a, b: a / b, 2 * x.mean(axis=1), x.mean(axis=1))
    assert ratio == pytest.approx(2) and error == pytest.approx(0, abs=1e-9)


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


@pytest.fixture
def run_folder(tmp_path, folders):
    """A run's folder with the tiny policy as its model, and what its args.json would say."""
    run = tmp_path / "a run"
    (run / "model").mkdir(parents=True)
    for file in (folders / "policy").iterdir():
        (run / "model" / file.name).write_bytes(file.read_bytes())
    saved = {"reward_model": "runs/elsewhere/model", "reward": [], "kl_coef": 0.25, "gamma": 1.0}
    saved |= {"kl_target": None, "temperature": 1.0, "missing_eos_penalty": 1.0}
    saved["checksums"] = {"reward_model": ppo.checksum(str(folders / "reward"))}
    (run / "args.json").write_text(json.dumps(saved))
    return run, saved


def test_the_coefficient_is_that_of_the_run(folders, run_folder):
    run, saved = run_folder
    args = small_args(folders)
    assert evaluate.run_kl_coef(run / "model", args) == evaluate.run_kl_coef(run, args) == 0.25
    assert evaluate.run_kl_coef(folders / "policy", args) is None
    moved = {k: x for k, x in saved.items() if k != "kl_coef"} | {"beta": 0.1}
    cases = [(moved, 0.1), (saved | {"kl_target": 3.0}, None), (saved | {"gamma": 0.9}, None)]
    cases += [(saved | {"reward": ["rewards.py:f"]}, None), (saved | {"temperature": 0.7}, None)]
    cases += [(saved | {"checksums": {}}, None), (saved | {"kl_coef": 0.0}, None)]
    cases += [(saved | {"checksums": {}, "reward_model": str(folders / "reward")}, 0.25)]
    for changed, expected in cases:
        (run / "args.json").write_text(json.dumps(changed))
        assert evaluate.run_kl_coef(run, args) == expected, changed


def test_the_held_out_loss_is_known_of_the_embedded_data(tmp_path):
    facts = json.loads((ROOT / "data/reviews/facts.json").read_text())
    floor = facts["sft_test_floor_nats_per_token"]
    (tmp_path / "metrics.jsonl").write_text('{"eval/loss": 3}\n{"eval/loss": 2}\n{"loss": 1}\n')
    dataset, model = ROOT / "data/reviews/prompts_test.jsonl", tmp_path / "model"
    for name, known in {"sft_train_more.jsonl.gz": True, "preferences_train.jsonl": False}.items():
        flags = {"dataset": str(ROOT / "data/reviews" / name), "eval_dataset": None}
        (tmp_path / "args.json").write_text(json.dumps(flags))
        found = evaluate.describe_sft(str(model), str(dataset))
        assert found.get("gap") == (pytest.approx(2 - floor) if known else None)


def test_a_run(folders, tmp_path, monkeypatch, capsys, run_folder):
    monkeypatch.chdir(ROOT)
    place, plot = tmp_path / "new" / "report", tmp_path / "reward_kl.png"
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    run, _ = run_folder
    models = (str(folders / "copy"), str(run / "model"))
    judge = {"judge_model": str(folders / "reward")}
    args = small_args(folders, report=str(place), plot=str(plot), models=models, **judge)
    evaluate.main(args)
    for picture in (plot, place / "frontier.png", place / "calibration.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    page, printed = (place / "report.md").read_text(), capsys.readouterr().out
    shown = (place / "samples.md").read_text()
    lines = [json.loads(x) for x in (place / "evaluation.jsonl").read_text().splitlines()]
    kinds = collections.defaultdict(list)
    for line in lines:
        kinds[line.pop("kind")].append(line)
    assert kinds["args"][0]["num_prompts"] == 5
    ref, copy, policy = kinds["policy"]
    assert [x["policy"] for x in kinds["policy"]] == [str(folders / "ref"), *models]
    assert ref["kl"] == ref["k1"] == 0 and abs(copy["kl"]) < 1e-4 and policy["kl"] > 0.1
    assert copy["gold"] == ref["gold"] and copy["reward"] == pytest.approx(ref["reward"])
    assert ref["win_gold"] == copy["win_gold"] == 0.5 and 0 <= policy["win_reward"] <= 1
    # The judge is the reward model, but does not know which completions did not end.
    assert ref["entropy"] > 0 and policy["win_judge_model"] != 0.5
    assert policy["kl_coef"] == 0.25 and "kl_coef" not in copy and "J" not in copy
    assert policy["J"] == pytest.approx(policy["reward"] - 0.25 * policy["kl"], abs=1e-6)
    for row in kinds["policy"]:
        assert 0 < row["length"] <= 8 and 0 <= row["ended"] <= 1
    assert policy["share_reward_trusted"] is False  # 12 samples do not carry that far
    assert policy["J_best"] > policy["J_ref"]
    assert {row["of"] for row in kinds["frontier"]} == {"gold", "reward"}
    assert all(row["effective"] >= 5 for row in kinds["frontier"])
    assert [row["n"] for row in kinds["best_of_n"]] == [1, 2, 4, 8]
    assert kinds["best_of_n"][0]["gold"] == pytest.approx(kinds["frontier"][0]["gold"])
    (found,) = kinds["reward_model"]
    assert 0.5 < found["best_accuracy"] < 0.9 and 0 < found["accuracy"] < 1
    assert -1 <= found["correlation_on_data"] <= 1 and len(kinds["calibration"]) == 10
    first = json.loads((ROOT / "data/reviews/prompts_test.jsonl").read_text().splitlines()[0])
    assert first["prompt"] in printed and "*" in printed
    assert first["prompt"] in shown and shown.count("| policy |") == 5
    assert evaluate.command_line(args) in page and "--num-prompts 5" in page
    for word in ("win_gold", "k1", "self_bleu", "kl_bound", "share_J", "frontier.png", "effective"):
        assert word in page, word


def test_right_and_wrong_answers(folders, tmp_path, monkeypatch, capsys):
    """pass@k where the reward is 0 or 1; and a reward that does not apply is not averaged."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "gold.py").write_text(
        "def long(prompts, completions, **_):\n"
        "    return [float(len(x) > 20) for x in completions]\n"
        "def none(prompts, completions, **_):\n    return [None] * len(completions)\n"
    )
    changes = {"reward_model": "", "samples_per_prompt": 4}
    args = small_args(folders, gold=f"{tmp_path}/gold.py:long", **changes)
    evaluate.main(args)
    printed = capsys.readouterr().out
    assert all(f"pass@{k} " in printed or f"pass@{k}\n" in printed for k in (1, 2, 4))
    with pytest.raises(SystemExit):
        evaluate.main(dataclasses.replace(args, gold=f"{tmp_path}/gold.py:none"))
    assert "--gold says None of 20 of 20 completions" in capsys.readouterr().err


def test_gold_alone_without_frontier(folders, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    evaluate.main(small_args(folders, frontier=False, reward_model=""))
    printed = capsys.readouterr().out
    columns = printed.splitlines()[2].split()
    assert {"gold", "win_gold"} <= {*columns} and "reward" not in columns and "most" not in printed


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
        ({"report": "README.md/x"}, "README.md"),  # known before anything is sampled
        ({"models": ("{}/reward",)}, "is a reward model"),
        ({"judge": "http://127.0.0.1:9/v1"}, "--judge-name"),
        ({"judge": "localhost:9", "judge_name": "x"}, "must be a URL"),
        ({"judge_model": "{}/ref"}, "not a reward model"),
    ],
)
def test_bad_input(folders, monkeypatch, error_line, changes, word):
    monkeypatch.chdir(ROOT)
    args = small_args(folders, **changes)
    for name in ("reward_model", "judge_model"):
        args = dataclasses.replace(args, **{name: getattr(args, name).format(folders)})
    args = dataclasses.replace(args, models=tuple(x.format(folders) for x in args.models))
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


# ------------------------------------------------------------------------------------------- judge


@pytest.fixture
def endpoint(monkeypatch):
    """endpoint(reply) -> (URL, requests) of a local server; reply(a, b) -> (status, text)."""
    servers = []
    monkeypatch.setattr(evaluate.Judge, "wait", 0.001)
    monkeypatch.setenv("OPENAI_API_KEY", "a key")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def start(reply):
        seen = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append((self.path, self.headers["Authorization"], body["model"]))
                question = body["messages"][0]["content"]
                answers = re.search(r"Answer A]\n(.*)\n\n\[Answer B]\n(.*)\n\nJudge", question)
                status, text = reply(*answers.groups())
                choice = {"message": {"role": "assistant", "content": text}}
                content = json.dumps({"choices": [choice]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def by_length(a, b):
    verdict = "TIE" if len(a) == len(b) else "A" if len(a) > len(b) else "B"
    return 200, f"Answer A is [[A]] or [[B]]? My verdict: [[{verdict}]]"


PROMPTS, TEXTS = ["p", "q", "r", "s"], ["long one", "no", "same", "four"]
REF_TEXTS = ["short", "longer", "same", "five"]  # a win, a loss, a tie unasked, and a tie


def test_a_judge_of_both_orders(endpoint):
    url, seen = endpoint(by_length)
    judge = evaluate.Judge(url + "/", "a model", 100)
    found = evaluate.judge_by_endpoint(judge, PROMPTS, TEXTS, REF_TEXTS)
    assert found["win_judge"][0] == 0.5 and found["judge_ties"] == 0.5
    assert (found["judged"], found["unclear"], found["order_agrees"]) == (4, 0, 1)
    assert seen == [("/v1/chat/completions", "Bearer a key", "a model")] * 6
    # Two completions to a prompt: the first is judged.
    twice = evaluate.judge_by_endpoint(judge, ["p", "q"], ["aa", "", "bb", ""], ["a", "", "b", ""])
    assert twice["win_judge"] == (1, 0)


def test_a_judge_that_prefers_a_place_says_nothing(endpoint):
    url, _ = endpoint(lambda a, b: (200, "A"))
    judge = evaluate.Judge(url, "x", 100)
    found = evaluate.judge_by_endpoint(judge, PROMPTS, TEXTS, REF_TEXTS)
    assert found["win_judge"] == (0.5, 0) and found["judge_ties"] == 1
    assert found["prefers_first"] == 1 and found["order_agrees"] == 0


def test_a_busy_judge_is_asked_again_but_not_for_ever(endpoint, capsys):
    states = itertools.cycle([429, 503, 200])
    url, seen = endpoint(lambda a, b: (next(states), by_length(a, b)[1]))
    found = evaluate.judge_by_endpoint(evaluate.Judge(url, "x", 100), PROMPTS, TEXTS, REF_TEXTS)
    assert found["judged"] == 4 and len(seen) == 18
    # One pair takes 6 calls here, and one call is not enough for another pair.
    for calls, asked in ((8, 8), (7, 6)):
        seen.clear()
        states = itertools.cycle([429, 503, 200])
        judge = evaluate.Judge(url, "x", calls)
        found = evaluate.judge_by_endpoint(judge, PROMPTS, TEXTS, REF_TEXTS)
        assert found["judged"] == 1 and len(seen) == asked
    assert "note: after 1 pairs, --judge-calls are used up" in capsys.readouterr().out
    for status, asked in ((503, 5), (401, 1)):
        url, seen = endpoint(lambda a, b, status=status: (status, ""))
        found = evaluate.judge_by_endpoint(evaluate.Judge(url, "x", 99), PROMPTS, TEXTS, REF_TEXTS)
        assert found == {"judged": 0, "unclear": 0} and len(seen) == asked
        assert f"status {status}" in capsys.readouterr().out


def test_a_judge_without_a_verdict_and_one_that_is_absent(endpoint, capsys):
    url, _ = endpoint(lambda a, b: (200, "Both have their merits."))
    found = evaluate.judge_by_endpoint(evaluate.Judge(url, "x", 9), PROMPTS, TEXTS, REF_TEXTS)
    assert (found["judged"], found["unclear"]) == (1, 3) and "win_judge" not in found
    judge = evaluate.Judge("http://127.0.0.1:9/v1", "x", 9)
    assert evaluate.judge_by_endpoint(judge, PROMPTS, TEXTS, REF_TEXTS)["judged"] == 0
    assert "(ConnectionError)" in capsys.readouterr().out
