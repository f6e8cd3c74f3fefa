"""Puts policies on one reward-KL plot: what they gained, and the most that their KL allows.

    python evaluate.py                                    # runs/ppo/model, embedded data
    python evaluate.py --models runs/ppo/model runs/dpo/model --report runs/report
    python evaluate.py --no-frontier                      # compact tables, in seconds
    python evaluate.py --plot reward_kl.png               # the plot alone

The tables have each policy's learned reward, gold reward, KL to the reference and texts on held-out
prompts; a win is a higher score than the reference's on the same prompt, and a tie is half a win.
The frontier is the most that any policy can get at a KL: the optimum of E[r] - beta KL is
pi* ~ pi_ref exp(r / beta), so samples of the reference with weights exp(r / beta) stand for it. The
shares hold each policy's gain against the frontier's gain at the policy's own KL. The J share does
so for J = E[learned reward] - beta KL, with the beta of the policy's own run.

KL is the full-vocabulary KL at every sampled position, summed over the response: nats a sequence.
The learned reward is everywhere the score, less --missing-eos-penalty where a completion does not
end. The frontier ends where its weights rest on fewer than 5 of a prompt's samples: past that it
would be too low and a share too high. Shares of policies with a higher KL are marked with *.
Figures after ± are half 95 % intervals: prompts and samples are random, the models are not.

--report writes report.md, frontier.png, calibration.png, samples.md and evaluation.jsonl.
--judge asks an OpenAI-compatible endpoint, such as http://localhost:8000/v1, which of two
completions is better, with the key in OPENAI_API_KEY if there is one.
"""

import os
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass
class Args:
    models: tuple[str, ...] = ("runs/ppo/model",)  # folders or hub names of the policies
    # the reference, from which KL is measured
    ref: Annotated[str, tyro.conf.arg(aliases=["--reference"])] = "runs/sft/model"
    reward_model: str = "runs/reward/model"  # folder of a learned reward; "" for none
    # file.py:function of a ground truth; the embedded data's by default
    gold: str | None = None
    dataset: str = "data/reviews/prompts_test.jsonl"  # JSON Lines (or .gz) with prompt
    # held-out pairs for the reward model; default: preferences_test.jsonl beside --dataset, if any
    preferences: str | None = None
    num_prompts: int = 500  # prompts of the tables, the first of the file
    samples_per_prompt: int = 2  # completions to each of them: prompts differ more than these do
    frontier: bool = True  # also estimate the frontier, and the shares of it
    frontier_prompts: int = 64  # prompts of frontier and shares, the first of the file
    frontier_samples: int = 256  # completions of the reference to each of them
    share_samples: int = 32  # completions of each policy to each of them
    # beta in J = E[learned reward] - beta KL; default: that of each policy's own run
    kl_coef: float | None = None
    missing_eos_penalty: float = 1.0  # taken off the score of a completion that does not end
    temperature: float = 1.0  # of sampling, and of the KL
    max_prompt_length: int = 16  # tokens; a longer prompt is dropped
    max_completion_length: int = 48  # tokens with EOS
    # sequences sampled or scored at once; lower it for a large model
    batch_size: int = 256
    examples: int = 4  # prompts whose completions are printed side by side
    seed: int = 0  # of the samples
    judge: str = ""  # URL of an OpenAI-compatible endpoint that judges policies against --ref
    judge_name: str = ""  # the model that it is asked for
    judge_calls: int = 400  # the most requests to it, for all policies together
    judge_model: str = ""  # folder of another reward model that judges, with any tokenizer
    report: str = ""  # folder for report.md and its files; needs matplotlib
    plot: str = ""  # PNG, PDF or SVG file for reward and gold against KL; needs matplotlib


# Parsed before JAX is imported, so that --help answers at once (linters call it E402).
if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    # What JAX compiles is kept for the next run; JAX_ENABLE_COMPILATION_CACHE=0 turns that off.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import dataclasses
import functools
import importlib.util
import json
import math
import random
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import requests

import ppo
from ppo import check

# -------------------------------------------------------------------------------------- statistics
# NumPy arrays [P, N]: P prompts, N samples of each.

Z = 1.96  # standard errors in half a 95 % interval of the normal distribution


def mean_and_interval(x):
    """Mean of x [P] or [P, N] and half its 95 % interval, from the spread of the prompts' means."""
    means = np.reshape(x, (len(x), -1)).mean(axis=1)
    return float(means.mean()), float(Z * means.std(ddof=1) / np.sqrt(len(means)))


def bootstrap(statistic, *arrays, repeats=200):
    """statistic(means over prompts) and half its 95 % interval under drawing the prompts anew.

    The arrays end in an axis of prompts, drawn alike in all: what policy and frontier have in
    common, above all how good a review a prompt lets one write, is no noise in their ratio.
    """
    P = arrays[0].shape[-1]
    draws = np.random.default_rng(0).integers(P, size=(repeats, P))
    values = [statistic(*(x[..., i].mean(axis=-1) for x in arrays)) for i in draws]
    return float(statistic(*(x.mean(axis=-1) for x in arrays))), float(Z * np.std(values))


def win_rate(x, x_ref):
    """Share of the pairs at each prompt in which x [P, N] beats x_ref [P, M], ties half: [P]."""
    difference = x[:, :, None] - x_ref[:, None]  # [P, N, M]
    return ((np.sign(difference) + 1) / 2).mean(axis=(1, 2))


def pass_at_k(right, k):
    """The chance that one of k completions is right, of each prompt: right [P, n], 0 or 1 -> [P].

    1 - C(n - c, k) / C(n, k) with c right ones of n, which is not biased (Chen et al. 2021, eq. 1).
    """
    n = right.shape[1]
    wrong = n - right.sum(axis=1).astype(int)  # [P]
    return np.array([1 - math.comb(w, k) / math.comb(n, k) for w in wrong])


def within_prompt_correlation(x, y):
    """Correlation of x and y [P, N] about their prompts' means, pooled over prompts; its interval.

    About the overall means it would mostly show that both know which prompts are sad.
    """
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)

    def correlation(xx, xy, yy):
        return xy / np.sqrt(xx * yy) if xx * yy > 0 else float("nan")

    return bootstrap(correlation, *((a * b).mean(axis=1) for a, b in ((x, x), (x, y), (y, y))))


def known_accuracy(margins, probability):
    """Mean probability [B] of labels that agree with the order by margins [B], chosen - rejected.

    probability: with which each label came out as it did. So the labels' own noise, which an
    accuracy on the labels has, is left out.
    """
    return float(np.where(margins > 0, probability, 1 - probability).mean())


def calibration(margins, bins=10):
    """How sure the model is of a pair's order, and how often it is right, in groups of equal size.

    margins [B], chosen - rejected. Returns (confidence, share right, half its 95 % interval) of
    each group; confidence is the group's mean of sigmoid(|margin|).
    """
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    groups = np.array_split(np.argsort(confidence), min(bins, len(margins)))
    shares = np.array([right[group].mean() for group in groups])
    intervals = Z * np.sqrt(shares * (1 - shares) / [len(group) for group in groups])
    return np.array([confidence[group].mean() for group in groups]), shares, intervals


# ------------------------------------------------------------------------------------------- texts


def ngrams(text, n):
    """All runs of n words of a text."""
    words = re.findall(r"[\w']+", text.lower())
    return list(zip(*(words[i:] for i in range(n))))


def distinct_n(texts, n):
    """Distinct n-grams / n-grams over all texts (Li et al. 2016); more texts have a lower one."""
    found = [ngram for text in texts for ngram in ngrams(text, n)]
    return len(set(found)) / max(len(found), 1)


def repeated_n(texts, n):
    """Share of the n-grams that occurred before in the same text."""
    found = [ngrams(text, n) for text in texts]
    return 1 - sum(len(set(x)) for x in found) / max(sum(len(x) for x in found), 1)


def others_precision(texts, n):
    """BLEU's precision of each text's n-grams, all the others being its references.

    An n-gram counts at most as often as it occurs in any one of the others. No match counts as a
    tenth of one (Chen & Cherry 2014, method 1), as a short text often has none of 4 words.
    """
    counts = [Counter(ngrams(text, n)) for text in texts]
    highest = {}  # of each n-gram: the highest count in a text, and the second highest
    for count in counts:
        for ngram, times in count.items():
            first, second = highest.get(ngram, (0, 0))
            highest[ngram] = (max(first, times), max(second, min(first, times)))
    precisions = []
    for count in counts:
        matches = 0
        for ngram, times in count.items():
            first, second = highest[ngram]
            matches += min(times, second if times == first else first)  # the highest may be its own
        precisions.append((matches or 0.1) / max(count.total(), 1) if matches or n > 1 else 0.0)
    return np.array(precisions)


def self_bleu(texts):
    """Mean BLEU-4 of each text against all others (Zhu et al. 2018): 1 where all are the same.

    More texts have a higher one.
    """
    lengths = [len(ngrams(text, 1)) for text in texts]
    have = Counter(lengths)
    penalties = []
    for length in lengths:
        others = [x for x, texts_of_it in have.items() if x != length or texts_of_it > 1]
        closest = min(others, key=lambda x: (abs(x - length), x), default=0)
        penalties.append(math.exp(min(0.0, 1 - closest / max(length, 1))))
    precisions = np.array([others_precision(texts, n) for n in (1, 2, 3, 4)])  # [4, texts]
    return float(np.mean(penalties * np.prod(precisions, axis=0) ** 0.25))


# ---------------------------------------------------------------------------- frontier and shares

# Effective samples of the median prompt, down to which a frontier is trusted. There the frontier of
# normally distributed rewards is 6 % too low (256 samples; tests/test_evaluate.py).
FEWEST = 5


def beta_grid(rewards, points=80):
    """Infinity, then falling betas in units of the rewards' spread within prompts."""
    spread = max(np.sqrt(rewards.var(axis=1).mean()), 1e-8)
    return np.array([np.inf, *np.geomspace(20, 0.02, points) * spread])


def log_weights(rewards, beta):
    """log w [P, N] of the reference's samples that stand for pi* ~ pi_ref exp(r / beta)."""
    scaled = (rewards - rewards.max(axis=1, keepdims=True)) / beta
    return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))


def frontier(rewards, betas, *others):
    """The optimum of E[r] - beta KL at each beta, from samples of the reference.

    rewards and others [P, N] belong to the same samples. pi* ~ pi_ref exp(r / beta) gives a
    prompt's sample i the weight w_i ~ exp(r_i / beta), with sum 1. Returns [2 + others, K, P] for K
    betas: KL(pi* || pi_ref) = sum_i w_i log(N w_i), and the means of rewards and others under pi*.
    """
    points = []
    for beta in betas:
        weights = log_weights(rewards, beta)  # [P, N]
        log_ratio = weights + np.log(rewards.shape[1])
        points.append([(np.exp(weights) * x).sum(axis=1) for x in (log_ratio, rewards, *others)])
    return np.array(points).swapaxes(0, 1)


def effective_samples(rewards, betas):
    """1 / sum_i w_i^2 of the frontier's weights (Kish 1965): [P, N] -> [K, P], from N down to 1."""
    return np.array([1 / np.exp(2 * log_weights(rewards, b)).sum(axis=1) for b in betas])


def optimal_objective(rewards, beta):
    """J* = beta log E_ref[exp(r / beta)] at each prompt, from samples [P, N] of the reference."""
    top = rewards.max(axis=1, keepdims=True)
    return top[:, 0] + beta * np.log(np.exp((rewards - top) / beta).mean(axis=1))


def best_of_n(rewards, n, *others):
    """Means of rewards and others [P, N] of the best of n samples by reward: arrays [P].

    Over all choices of n of the N samples: the i-th lowest is the best of C(i - 1, n - 1) of them.
    """
    N = rewards.shape[1]
    order = np.argsort(rewards, axis=1, kind="stable")
    weights = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
    return [np.take_along_axis(x, order, axis=1) @ weights for x in (rewards, *others)]


def best_of_n_kl_bound(n):
    """log n - (n - 1) / n: at most this is the KL of the best of n (Beirami et al. 2024)."""
    return math.log(n) - (n - 1) / n


def share_of_gain(x, x_ref, x_best):
    """(x - x_ref) / (x_best - x_ref); nan where there is nothing to gain."""
    return (x - x_ref) / (x_best - x_ref) if x_best > x_ref else float("nan")


def share_of_frontier(x, kl, frontier_x, frontier_kl):
    """The share of the gain at this KL: x, kl numbers; frontier's points [K], the first at KL 0."""
    return share_of_gain(x, frontier_x[0], np.interp(kl, frontier_kl, frontier_x))


class Curve(NamedTuple):
    """A frontier, and how far it is to be trusted."""

    points: np.ndarray  # [2 + others, K, P], as of `frontier`
    effective: np.ndarray  # [K], effective samples of the median prompt
    trusted: np.ndarray  # [K], whether these are FEWEST or more here, and at all lower KLs
    trusted_kl: float  # the highest KL of them; infinity where the whole curve is trusted


def make_curve(rewards, *others):
    """The Curve of rewards [P, N], samples of the reference; and of what it gets in others."""
    betas = beta_grid(rewards)
    points = frontier(rewards, betas, *others)
    effective = np.median(effective_samples(rewards, betas), axis=1)
    trusted = np.logical_and.accumulate(effective >= FEWEST)
    trusted[0] = True
    end = float("inf") if trusted.all() else float(points[0].mean(axis=1)[trusted].max())
    return Curve(points, effective, trusted, end)


# ----------------------------------------------------------------------------------------- samples


def token_measures(logits, ref_logits, tokens):
    """What policy and reference say of drawn tokens: logits [..., V], tokens [...] -> [...] each.

    kl: KL(policy || ref) over the whole vocabulary; k1: the sampled token's log-ratio, whose mean
    over the policy's tokens is the same with more variance; entropy: the policy's.
    """
    assert logits.shape == ref_logits.shape, (logits.shape, ref_logits.shape)
    logprobs, ref_logprobs = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
    probs, log_ratio = jnp.exp(logprobs), logprobs - ref_logprobs
    return {
        "kl": jnp.sum(probs * log_ratio, axis=-1),
        "k1": jnp.take_along_axis(log_ratio, tokens[..., None], axis=-1)[..., 0],
        "entropy": -jnp.sum(probs * logprobs, axis=-1),
    }


class Trunk(nn.Module):
    """GPT-2 without its head."""

    config: ppo.GPT2Config

    @nn.compact
    def __call__(self, tokens, mask):
        """tokens, mask [B, T] -> hidden states [B, T, D]."""
        return ppo.trunk(self.config, tokens, mask)[0]


@functools.partial(jax.jit, static_argnames=("configs", "prompt_length", "temperature"))
def sequence_measures(params, ref_params, configs, tokens, mask, prompt_length, temperature):
    """token_measures summed over each response: tokens, mask [B, P + R] -> {name: [B]}.

    Neither model's logits [B, R, V] ever stand whole: GPT-2's take 200 kB a token.
    """
    response, response_mask = tokens[:, prompt_length:], mask[:, prompt_length:]
    hidden, ref_hidden = (  # [B, R, D] each: what the response tokens were drawn from
        Trunk(c).apply({"params": p}, tokens, mask)[:, prompt_length - 1 : -1]
        for p, c in zip((params, ref_params), configs)
    )
    head, ref_head = (p.get("lm_head", p["wte"])["embedding"] for p in (params, ref_params))

    def read(logits, tokens, ref_hidden):
        ref_logits = ppo.unembed(configs[1], ref_head, ref_hidden)
        return token_measures(logits / temperature, ref_logits / temperature, tokens)

    found = ppo.read_in_blocks(configs[0], head, hidden, read, response, ref_hidden)
    return {name: jnp.sum(x * response_mask, axis=1) for name, x in found.items()}


class Samples(NamedTuple):
    """Completions to P prompts, N each: P * N texts, prompt by prompt, and arrays [P, N]."""

    texts: list
    reward: np.ndarray | None  # learned, less the missing-EOS penalty
    gold: np.ndarray | None
    kl: np.ndarray
    k1: np.ndarray
    entropy: np.ndarray  # nats a sequence
    length: np.ndarray  # tokens with EOS
    ended: np.ndarray  # with EOS, not by --max-completion-length


class Bench(NamedTuple):
    """What policies are measured with."""

    tokenizer: object
    eos_id: int
    ref: tuple  # (config, params)
    reward: tuple | None  # (config, params)
    gold: Callable | None
    rows: list  # [(row, [ids of the prompt])]


def draw_samples(policy, bench, num_prompts, num_samples, stream, args):
    """Samples of a policy, (config, params), to the first prompts."""
    (config, params), (ref_config, ref_params) = policy, bench.ref
    P, sampling = args.max_prompt_length, (args.max_completion_length, args.temperature)
    pairs = [pair for pair in bench.rows[:num_prompts] for _ in range(num_samples)]

    def sample(tokens, mask, numbers):
        # The same keys for all policies: where one is the reference, so are its figures.
        key = ppo.stream_key(args.seed, stream, int(numbers[0]) // args.batch_size)
        tokens, mask, _ = ppo.generate(params, config, tokens, mask, key, *sampling, bench.eos_id)
        models = (params, ref_params, (config, ref_config))
        found = sequence_measures(*models, tokens, mask, P, args.temperature)
        if bench.reward:
            found["reward"] = ppo.learned_rewards(*bench.reward[::-1], tokens, mask)
        return tokens, mask, found

    padded = ppo.pad_rows([prompt for _, (prompt,) in pairs], P, left=True)
    found = ppo.in_parts(sample, args.batch_size, *padded, np.arange(len(pairs)))
    tokens, mask, columns = jax.device_get(found)
    ended = (tokens[:, P:] == bench.eos_id).any(axis=1)
    columns |= {"length": mask[:, P:].sum(axis=1), "ended": ended}
    if bench.reward:
        columns["reward"] = columns["reward"] - args.missing_eos_penalty * ~ended
    texts = ppo.decode_responses(bench.tokenizer, tokens, mask, P, bench.eos_id)
    if bench.gold:
        columns["gold"] = ppo.call_reward(bench.gold, [row for row, _ in pairs], texts)
        unknown = int(np.isnan(columns["gold"]).sum())
        check(not unknown, f"--gold says None of {unknown} of {len(texts)} completions")
    columns = {k: x.astype(np.float64).reshape(-1, num_samples) for k, x in columns.items()}
    return Samples(texts, **({"reward": None, "gold": None} | columns))


# --------------------------------------------------------------------------- figures of a policy
# {name: number, (mean, half its 95 % interval), or (share, half its interval, trusted)}


def describe_policy(samples, ref, kl_coef):
    """A policy's figures on the tables' prompts; ref: the reference's Samples to the same."""
    figures = {}
    for name in ("reward", "gold"):
        x, x_ref = getattr(samples, name), getattr(ref, name)
        if x is not None:
            figures[name] = mean_and_interval(x)
            figures[f"win_{name}"] = mean_and_interval(win_rate(x, x_ref))
    if kl_coef is not None:
        figures["J"] = mean_and_interval(samples.reward - kl_coef * samples.kl)
    for name in ("kl", "k1", "entropy", "length", "ended"):
        figures[name] = mean_and_interval(getattr(samples, name))
    figures |= {f"distinct_{n}": distinct_n(samples.texts, n) for n in (1, 2, 3)}
    figures |= {"self_bleu": self_bleu(samples.texts), "repeated_3": repeated_n(samples.texts, 3)}
    if samples.gold is not None and np.isin(samples.gold, (0, 1)).all():
        N = samples.gold.shape[1]
        ks = [2**i for i in range(N.bit_length())]  # 1, 2, 4, … up to N
        figures |= {f"pass@{k}": mean_and_interval(pass_at_k(samples.gold, k)) for k in ks}
    return figures


def describe_shares(samples, ref, curves, kl_coef):
    """A policy's shares of what is best at its KL.

    samples of the policy and of the reference to the same prompts; curves: {"gold", "reward"}, the
    Curve of either.
    """
    kl, shares = samples.kl.mean(axis=1), {}
    for name, kind, index in (
        ("gold", "gold", 1),
        ("reward", "reward", 1),
        ("gold_of_best_reward", "reward", 2),  # what the learned reward's own optimum gets in gold
    ):
        if kind in curves and index < len(curves[kind].points):
            x = (samples.reward if name == "reward" else samples.gold).mean(axis=1)
            points = curves[kind].points
            share, half = bootstrap(share_of_frontier, x, kl, points[index], points[0])
            shares[f"share_{name}"] = (share, half, bool(kl.mean() <= curves[kind].trusted_kl))
    if kl_coef is not None:
        J, J_ref = samples.reward.mean(axis=1) - kl_coef * kl, ref.reward.mean(axis=1)
        J_best = optimal_objective(ref.reward, kl_coef)
        share, half = bootstrap(share_of_gain, J, J_ref, J_best)
        # Too few samples make the KL of their optimum too low as well; the policy's own KL is not.
        best_kl = float(frontier(ref.reward, [kl_coef])[0].mean())
        trusted = bool(max(kl.mean(), best_kl) <= curves["reward"].trusted_kl)
        shares["share_J"] = (share, half, trusted)
        shares |= {"J_ref": float(J_ref.mean()), "J_best": float(J_best.mean())}
        shares["kl_of_best_J"] = best_kl
    return shares


def share_grammatical(gold, prompts, texts):
    """Share of the texts that a gold file's own grammar can write, or None where it has none.

    prompts: P of them, texts: N to each, prompt by prompt. data/reviews.py is such a file.
    """
    log_prob = getattr(gold, "__globals__", {}).get("log_prob")
    if log_prob is None:
        return None
    asked = [prompt for prompt in prompts for _ in range(len(texts) // len(prompts))]
    try:
        return float(np.mean([log_prob(*pair) > -np.inf for pair in zip(asked, texts)]))
    except ValueError:  # prompts that are not of this grammar
        return None


def run_kl_coef(folder, args):
    """The KL coefficient of a policy's own run, from the args.json beside it; None without one.

    None, too, where the run did not seek J as it is defined here: another reward, a coefficient
    that changed, a discount, rewards divided by their spread, a reference that moved.
    """
    path = ppo.find_model(folder).parent / "args.json"
    if not path.exists() or not args.reward_model:
        return None
    saved = ppo.read_json(path)
    wanted = {"reward": [], "gamma": 1.0, "kl_target": None, "whiten_rewards": False}
    wanted |= {"reference": "start", "temperature": args.temperature}
    wanted |= {"missing_eos_penalty": args.missing_eos_penalty}
    same_reward = saved.get("reward_model") == args.reward_model
    known = saved.get("checksums", {}).get("reward_model")
    if known:  # wherever it lay then, and lies now
        same_reward = known == ppo.checksum(str(ppo.find_model(args.reward_model)))
    if not same_reward or any(saved.get(name, x) != x for name, x in wanted.items()):
        return None
    return saved.get("kl_coef", saved.get("beta")) or None  # 0 bounds nothing


# -------------------------------------------------------------------------------------------- main


def main(args):
    check_args(args)
    bench = load_bench(args)
    judge_scorer = args.judge_model and load_scorer(args.judge_model, args.batch_size)
    names, figures, drawn, share_drawn = [args.ref, *args.models], [], [], []
    prompts = [row["prompt"] for row, _ in bench.rows[: args.num_prompts]]
    for name in names:
        policy = load_policy(name, bench, args) if figures else bench.ref
        samples = draw_samples(policy, bench, len(prompts), args.samples_per_prompt, "table", args)
        drawn.append(samples)
        kl_coef = args.kl_coef
        if kl_coef is None and figures:
            kl_coef = run_kl_coef(name, args)
        row = {"policy": name} | ({} if kl_coef is None else {"kl_coef": kl_coef})
        row |= describe_policy(samples, drawn[0], kl_coef)
        share = share_grammatical(bench.gold, prompts, samples.texts)
        row |= {} if share is None else {"grammatical": share}
        figures.append(row)
        if args.frontier:
            # Policy and frontier on the same prompts: other prompts for either would put into the
            # share how much prompts differ, which is as much as a policy gains.
            count = args.share_samples if share_drawn else args.frontier_samples
            sizes = (args.frontier_prompts, count, "shares")
            share_drawn.append(draw_samples(policy, bench, *sizes, args))

    curves, points = {}, []
    if args.frontier:
        curves = make_curves(share_drawn[0])
        points = describe_best_of_n(share_drawn[0])
        for row, samples in zip(figures[1:], share_drawn[1:]):
            row["share_kl"] = float(samples.kl.mean())
            row |= describe_shares(samples, share_drawn[0], curves, row.get("kl_coef"))
    for row, samples in zip(figures[1:], drawn[1:]):
        if args.judge_model:
            row |= judge_by_model(judge_scorer, prompts, samples.texts, drawn[0].texts)
        if args.judge:
            judge = Judge(args.judge, args.judge_name, args.judge_calls // len(args.models))
            row |= judge_by_endpoint(judge, prompts, samples.texts, drawn[0].texts)

    reward_model, bins = {}, None
    if args.reward_model:
        ref = (share_drawn or drawn)[0]
        reward_model, bins = describe_reward_model(bench, ref, args)
    found = (curves, points, reward_model, bins, describe_sft(args.ref, args.dataset))
    results = Results(args, names, prompts, figures, drawn, share_drawn, *found)
    for title, rows in make_tables(results):
        print_table(title, rows)
    print_examples(results)
    if args.plot:
        draw_frontier(args.plot, results)
    if args.report:
        write_report(Path(args.report), results)


def make_curves(ref):
    """{"gold", "reward"}: the Curve of each, as far as there are such rewards."""
    curves = {}
    if ref.gold is not None:
        curves["gold"] = make_curve(ref.gold)
    if ref.reward is not None:
        curves["reward"] = make_curve(ref.reward, *([] if ref.gold is None else [ref.gold]))
    return curves


def describe_best_of_n(ref):
    """Rows of the best of n = 1, 2, 4, … of the reference's samples, by gold and by reward."""
    N, rows = ref.kl.shape[1], []
    for n in (2**i for i in range(N.bit_length())):
        row = {"n": n, "kl_bound": best_of_n_kl_bound(n)}
        if ref.gold is not None:
            row["gold"] = mean_and_interval(best_of_n(ref.gold, n)[0])
        if ref.reward is not None:
            others = [] if ref.gold is None else [ref.gold]
            found = map(mean_and_interval, best_of_n(ref.reward, n, *others))
            row |= dict(zip(("reward", "gold_of_best_reward"), found))
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------- loading


def check_args(args):
    """Fails on flags that do not go together, before anything is loaded."""
    ppo.check_flags(args)
    enough = min(args.num_prompts, args.frontier_prompts) >= 2
    check(enough, "--num-prompts and --frontier-prompts must be 2 at least: intervals need them")
    one_token = "--temperature must be above 0: there is no KL from a policy that takes one token"
    check(args.temperature > 0, one_token)
    has_J = args.kl_coef is None or (args.kl_coef > 0 and args.reward_model)
    check(has_J, "--kl-coef must be above 0, and needs --reward-model: J is of the learned reward")
    check(args.frontier or not args.plot, "--plot draws the frontier, too: drop --no-frontier")
    check(not args.judge or args.judge_name, "--judge needs --judge-name, the model to ask for")
    url = not args.judge or re.match("https?://", args.judge)
    check(url, f"--judge must be a URL such as http://localhost:8000/v1, not {args.judge}")
    for place in filter(None, (args.plot, args.report and f"{args.report}/report.md")):
        with ppo.file_access(place):
            Path(place).parent.mkdir(parents=True, exist_ok=True)
    drawing = args.plot or args.report
    there = not drawing or importlib.util.find_spec("matplotlib") is not None
    check(there, "--plot and --report need matplotlib: pip install matplotlib")


def load_bench(args):
    """The Bench that the flags name."""
    gold = ppo.load_gold(args.gold, args.dataset)
    check(gold or args.reward_model, "nothing to measure: give --reward-model or --gold")
    tokenizer, ref = ppo.load_tokenizer(args.ref), ppo.load_model(args.ref)
    eos_id = ppo.end_token(ref[0], tokenizer)
    rows = ppo.read_jsonl(args.dataset, ["prompt"])
    rows = ppo.encode_rows(rows, [], tokenizer, eos_id, args)
    check(len(rows) >= 2, f"{args.dataset} has one prompt: intervals are over prompts")
    bench = Bench(tokenizer, eos_id, ref, None, gold, rows)
    check_model(args.ref, *ref, bench, args)
    if args.reward_model:
        reward = ppo.load_model(args.reward_model)
        check_model(args.reward_model, *reward, bench, args, is_reward_model=True)
        bench = bench._replace(reward=reward)
    return bench


def load_policy(name, bench, args):
    """(config, params) of a policy that has the reference's tokens."""
    config, params = ppo.load_model(name)
    check_model(name, config, params, bench, args)
    same = config.vocab_size == bench.ref[0].vocab_size
    check(same, f"{name} and {args.ref} have vocabularies of different sizes: no KL")
    return config, params


def check_model(name, config, params, bench, args, is_reward_model=False):
    """Fails unless a model is of this kind and reads the reference's tokens."""
    kinds = ("is a reward model, not a policy", "is not a reward model: it has no score.weight")
    check(("score" in params) == is_reward_model, f"{name} {kinds[is_reward_model]}")
    own = ppo.load_tokenizer(name)
    same = ppo.token_ids(own) == ppo.token_ids(bench.tokenizer)
    same = same and ppo.end_token(config, own) == bench.eos_id
    check(same, f"{name} and {args.ref} have different tokenizers")
    ppo.check_sizes(config, bench.tokenizer, args)


# ------------------------------------------------------------------------------------ reward model


def score_ids(model, batch_size, ids):
    """A reward model's scores [B] of B lists of token ids."""
    config, params = model
    padded = ppo.pad_rows(ids, max(map(len, ids)))
    score = functools.partial(ppo.learned_rewards, params, config)
    return np.asarray(ppo.in_parts(score, batch_size, *padded), np.float64)


def encode_sequences(tokenizer, eos_id, prompts, texts):
    """Token ids of prompts with their completions, EOS behind them."""
    encode = functools.partial(ppo.encode_text, tokenizer)
    return [[*(encode(q) or [eos_id]), *encode(t), eos_id] for q, t in zip(prompts, texts)]


def read_pairs(path, bench):
    """(rows, ids of chosen and rejected by turns) of the pairs that the reward model can hold."""
    rows = ppo.read_jsonl(path, ["prompt", "chosen", "rejected"])
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    answers = [row[name] for row in rows for name in ("chosen", "rejected")]
    ids = encode_sequences(bench.tokenizer, bench.eos_id, prompts, answers)
    limit = bench.reward[0].n_positions
    fits = [max(map(len, ids[2 * i : 2 * i + 2])) <= limit for i in range(len(rows))]
    longer = f"{fits.count(False)} of {len(rows)} pairs of {path} are longer than {limit} tokens"
    check(any(fits), f"{longer}, the reward model's positions")
    if not all(fits):
        print(f"dropped: {longer}")
    ids = [x for i, x in enumerate(ids) if fits[i // 2]]
    return [row for row, kept in zip(rows, fits) if kept], ids


def describe_reward_model(bench, ref, args):
    """(figures of the reward model, bins of its calibration): what the data let one know of it.

    ref: Samples of the reference. expected_accuracy and best_accuracy need the labels'
    probabilities in the preference file. correlation_on_data, on 8 reviews to each of 64 prompts,
    needs a gold file that can write some: data/reviews.py.
    """
    figures, bins = {"reward model": args.reward_model}, None
    score = functools.partial(score_ids, bench.reward, args.batch_size)
    beside = Path(args.dataset).with_name("preferences_test.jsonl")
    if args.preferences or beside.exists():
        rows, ids = read_pairs(args.preferences or beside, bench)
        chosen, rejected = score(ids).reshape(-1, 2).T
        margins = chosen - rejected
        if len(rows) > 1:
            figures["accuracy"] = mean_and_interval((np.sign(margins) + 1) / 2)
        probability = [row.get("probability") for row in rows]
        if None not in probability:
            probability = np.array(probability)
            figures["expected_accuracy"] = known_accuracy(margins, probability)
            best = known_accuracy(probability - 0.5, probability)  # gold's order
            figures["best_accuracy"] = best
            figures["share_of_best_accuracy"] = figures["expected_accuracy"] / best
        # reward.py has multiplied the scores so that a policy's samples have spread 1.
        saved = ppo.read_json(ppo.find_model(args.reward_model) / "config.json")
        bins = calibration(margins / saved.get("reward_gain", 1.0))
        figures["calibration_error"] = float(np.abs(bins[0] - bins[1]).mean())
    module = getattr(bench.gold, "__globals__", {})
    if {"sample", "log_prob"} <= module.keys():
        rng = random.Random(f"evaluate {args.seed}")
        prompts = [row["prompt"] for row, _ in bench.rows[:64] for _ in range(8)]
        texts = [module["sample"](rng, prompt) for prompt in prompts]
        golds = ppo.call_reward(bench.gold, [{"prompt": q} for q in prompts], texts)
        scores = score(encode_sequences(bench.tokenizer, bench.eos_id, prompts, texts))
        pair = scores.reshape(-1, 8), golds.astype(np.float64).reshape(-1, 8)
        figures["correlation_on_data"] = within_prompt_correlation(*pair)
    if bench.gold and ref.kl.shape[1] >= 8:  # with fewer, the prompts' means are mostly noise
        figures["correlation_on_ref"] = within_prompt_correlation(ref.reward, ref.gold)
    return figures, bins


def describe_sft(ref, dataset):
    """The reference's last held-out loss and its floor, where its run and the data's facts are."""
    run, facts = Path(ref).parent, Path(dataset).with_name("facts.json")
    if not all(path.exists() for path in (run / "metrics.jsonl", run / "args.json", facts)):
        return {}
    flags = ppo.read_json(run / "args.json")
    trained_on = Path(flags["dataset"])
    own = trained_on.with_name(trained_on.name.partition("_train")[0] + "_test.jsonl")
    used = Path(flags.get("eval_dataset") or own)
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    if not losses or used.resolve() != facts.with_name("sft_test.jsonl").resolve():
        return {}  # the floor is that of this one file
    floor = json.loads(facts.read_text())["sft_test_floor_nats_per_token"]
    return {"reference": ref, "heldout_loss": losses[-1], "floor": floor, "gap": losses[-1] - floor}


# ------------------------------------------------------------------------------------------- judge


def load_scorer(folder, batch_size):
    """score(prompts, texts) -> [B] by a reward model with a tokenizer of its own.

    What is longer than its positions loses its beginning.
    """
    config, params = ppo.load_model(folder)
    check("score" in params, f"{folder} is not a reward model: it has no score.weight")
    tokenizer = ppo.load_tokenizer(folder)
    eos_id = ppo.end_token(config, tokenizer)

    def score(prompts, texts):
        ids = encode_sequences(tokenizer, eos_id, prompts, texts)
        return score_ids((config, params), batch_size, [x[-config.n_positions :] for x in ids])

    return score


def judge_by_model(score, prompts, texts, ref_texts):
    """Wins by another reward model's scores: all pairs of completions to the same prompt."""
    asked = [prompt for prompt in prompts for _ in range(len(texts) // len(prompts))]
    x, x_ref = (score(asked, found).reshape(len(prompts), -1) for found in (texts, ref_texts))
    return {"win_judge_model": mean_and_interval(win_rate(x, x_ref))}


QUESTION = """Which of two answers to the same prompt is better?

[Prompt]
{prompt}

[Answer A]
{a}

[Answer B]
{b}

Judge by how well each does what the prompt asks for, not by its length or by which stands first.
End with your verdict: [[A]], [[B]], or [[TIE]] if neither is better."""


class JudgeGaveUp(Exception):
    """The endpoint refused or did not answer, or no call is left; what was judged before counts."""


class Judge:
    """An OpenAI-compatible endpoint that says which of two answers is better."""

    attempts, wait, timeout = 5, 1.0, 120  # the wait doubles after each attempt; seconds

    def __init__(self, url, name, calls):
        self.url, self.name, self.calls = f"{url.rstrip('/')}/chat/completions", name, calls
        key = os.environ.get("OPENAI_API_KEY")
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def request(self, content):
        """The reply to a message; a busy or absent server is asked again."""
        message = {"role": "user", "content": content}
        body = {"model": self.name, "messages": [message], "temperature": 0}
        reason = ""
        for attempt in range(self.attempts):
            time.sleep(self.wait * 2 ** (attempt - 1) if attempt else 0)
            if self.calls == 0:
                raise JudgeGaveUp(f"--judge-calls are used up {reason}".strip())
            self.calls -= 1
            try:
                reply = requests.post(
                    self.url, json=body, headers=self.headers, timeout=self.timeout
                )
                if reply.ok:
                    return reply.json()["choices"][0]["message"]["content"] or ""
                reason = f"(status {reply.status_code}: {' '.join(reply.text.split())[:200]})"
                if reply.status_code != 429 and reply.status_code < 500:
                    break
            except (ValueError, KeyError, IndexError, TypeError):
                reason = "(no chat completion came back)"
                break
            except requests.RequestException as error:  # no connection, no answer in time
                reason = f"({type(error).__name__})"
        raise JudgeGaveUp(f"{self.url} does not judge {reason}")

    def ask(self, prompt, a, b):
        """1 where it prefers answer a, 0 where b, 0.5 for a tie; None without a clear verdict."""
        reply = self.request(QUESTION.format(prompt=prompt, a=a, b=b))
        verdicts = re.findall(r"\[\[(A|B|TIE)\]\]", reply) or [reply.strip(" \n.[]").upper()]
        return {"A": 1.0, "B": 0.0, "TIE": 0.5}.get(verdicts[-1])


def judge_by_endpoint(judge, prompts, texts, ref_texts):
    """Wins of the first completion to each prompt, as long as calls are left.

    Each pair is shown in both orders, because judges prefer a place; the mean counts, so that a
    verdict that changes with the order is a tie. The same text twice is one without being asked.
    """
    wins, orders, unclear = [], [], 0
    step = len(texts) // len(prompts)
    try:
        for i, prompt in enumerate(prompts):
            text, ref_text = texts[i * step], ref_texts[i * step]
            if text == ref_text:
                wins.append(0.5)
                continue
            if judge.calls < 2:
                break
            first, second = judge.ask(prompt, text, ref_text), judge.ask(prompt, ref_text, text)
            if first is None or second is None:
                unclear += 1
            else:
                wins.append((first + 1 - second) / 2)
                orders.append((first, second))
    except JudgeGaveUp as error:
        print(f"note: after {len(wins)} pairs, {error}")
    figures = {"judged": len(wins), "unclear": unclear}
    if len(wins) > 1:
        figures["win_judge"] = mean_and_interval(wins)
        figures["judge_ties"] = float(np.mean([win == 0.5 for win in wins]))
    if orders:
        figures["order_agrees"] = float(np.mean([a == 1 - b for a, b in orders]))
        figures["prefers_first"] = float(np.mean(orders))
    return figures


# ------------------------------------------------------------------------------------------ report


class Results(NamedTuple):
    """All that was found; lists over the reference and the policies, in this order."""

    args: Args
    names: list
    prompts: list
    figures: list  # rows {"policy": name, figures}
    drawn: list  # Samples of the tables
    share_drawn: list  # Samples of the frontier's prompts
    curves: dict
    best_of_n: list  # rows
    reward_model: dict
    bins: tuple | None  # of the reward model's calibration
    sft: dict


TABLES = {
    "reward": ["reward", "gold", "win_reward", "win_gold", "win_judge_model", "J"],
    "right answers: pass@k": [f"pass@{2**i}" for i in range(31)],
    "distance from the reference, and length": ["kl", "k1", "entropy", "length", "ended"],
    "texts": ["distinct_1", "distinct_2", "distinct_3", "self_bleu", "repeated_3", "grammatical"],
    "judge": ["win_judge", "judge_ties", "judged", "unclear", "order_agrees", "prefers_first"],
}
SHARES = ["share_kl", "share_gold", "share_reward", "share_gold_of_best_reward"]
OBJECTIVE = ["kl_coef", "share_J", "J_ref", "J_best", "kl_of_best_J"]


def make_tables(results):
    """[(title, rows)] of all that is printed, and written to report.md."""
    args, tables = results.args, []
    size = f"{len(results.drawn[0].kl)} prompts x {args.samples_per_prompt} completions"

    def add(title, columns, rows):
        columns = [name for name in columns if any(name in row for row in rows)]
        if columns:
            rows = [row for row in rows if any(name in row for name in columns)]
            kept = [{name: row.get(name, "") for name in ["policy", *columns]} for row in rows]
            tables.append((title, kept))

    for title, columns in TABLES.items():
        add(f"{title}; {args.dataset}, {size}", columns, results.figures)
    if results.share_drawn:
        size = f"{len(results.share_drawn[0].kl)} prompts x {args.share_samples} completions"
        add(f"share of the most at its KL, {size}; *: too high", SHARES, results.figures)
        add(f"share of the best J = reward - kl_coef KL, {size}", OBJECTIVE, results.figures)
        tables += frontier_tables(results.curves)
        title = "best of n of the reference; kl_bound: at most this is its KL"
        tables.append((title, results.best_of_n))
    if len(results.reward_model) > 1:
        title = "reward model: held-out pairs, and correlation with gold within prompts"
        tables.append((title, [results.reward_model]))
    if results.sft:
        tables.append(("held-out loss of the reference, nats a token", [results.sft]))
    return tables


def frontier_tables(curves):
    """The frontiers at round KLs, as far as they are trusted."""
    tables = []
    for kind, curve in curves.items():
        kl, *values = curve.points.mean(axis=2)  # [K] each
        kls = [x for x in (0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8) if x <= kl[curve.trusted].max()]
        columns = {"KL": [f"{x}" for x in kls]}
        for name, value in zip((kind, "gold_of_best_reward"), values):
            columns[name] = np.interp(kls, kl, value).tolist()
        columns["effective"] = [f"{x:.0f}" for x in np.interp(kls, kl, curve.effective)]
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        end = f"trusted up to {kl[curve.trusted].max():.1f}"
        tables.append((f"the most {kind} at each KL, {end}; effective samples a prompt", rows))
    return tables


def cells(rows):
    """Rows of the same keys as lists of texts, a head first."""

    def cell(x):
        if isinstance(x, tuple):
            return f"{x[0]:.3f} ±{x[1]:.3f}" + ("" if all(x[2:]) else "*")
        return f"{x:.3f}" if isinstance(x, float) else str(x)

    return [list(rows[0]), *([cell(x) for x in row.values()] for row in rows)]


def print_table(title, rows):
    """Rows in columns, the first to the left, numbers to the right."""
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for first, *others in lines:
        shown = [first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(others, widths[1:]))]
        print("  " + "  ".join(shown).rstrip())


def markdown_table(lines):
    """Lists of texts, a head first, as a table of GitHub's Markdown."""
    head, *rest = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|---" * len(lines[0]) + "|", *rest])


def escape(text):
    """A text that Markdown shows as it is; lines are joined by <br>, which a table can hold."""
    return "<br>".join(re.sub(r"([\\`*_|<>\[\]#~&$])", r"\\\1", text.strip()).splitlines())


def samples_of_prompt(results, i):
    """[(policy, {"reward", "gold"}, text)]: the first completion of each to prompt i."""
    found = []
    for name, samples in zip(results.names, results.drawn):
        both = {"reward": samples.reward, "gold": samples.gold}
        scores = {k: f"{x[i, 0]:.2f}" for k, x in both.items() if x is not None}
        found.append((name, scores, samples.texts[i * samples.kl.shape[1]]))
    return found


def print_examples(results):
    """The first completion of every policy to the first prompts, with its scores."""
    args, width = results.args, max(map(len, results.names))
    for i, prompt in enumerate(results.prompts[: args.examples]):
        print(f"\n{prompt}")
        for name, scores, text in samples_of_prompt(results, i):
            shown = "  ".join(f"{title} {x:>5}" for title, x in scores.items())
            print(f"  {name.ljust(width)}  {shown} {text}")


def draw_frontier(path, results):
    """Reward and gold against KL: policies with 95 % intervals, frontiers, and the best of n.

    The frontiers end where they are no longer trusted; best of n stands at the bound of its KL.
    """
    from matplotlib.figure import Figure  # here: nothing else needs it

    best = "the learned reward's own optimum"
    lines = {  # (kind of curve, index in it, column of best_of_n, line, marker, label)
        "reward": [("reward", 1, "reward", "k-", "kv", "the most there is")],
        "gold": [
            ("gold", 1, "gold", "k-", "kv", "the most there is"),
            ("reward", 2, "gold_of_best_reward", "k--", "k1", best),
        ],
    }
    titles = {"reward": "learned reward", "gold": "gold reward"}
    panels = [x for x in titles if getattr(results.share_drawn[0], x) is not None]
    figure = Figure(figsize=(5 * len(panels) + 2.8, 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels):
        for kind, index, column, style, marker, label in lines[panel]:
            curve = results.curves.get(kind)
            if curve and index < len(curve.points):
                kl, y = curve.points[[0, index]].mean(axis=2)
                axis.plot(kl[curve.trusted], y[curve.trusted], style, lw=1, label=label)
                points = [(x["kl_bound"], x[column][0]) for x in results.best_of_n]
                points = [point for point in points if point[0] <= kl[curve.trusted].max()]
                chosen = {"gold": "gold", "reward": "learned reward"}[kind]
                label = f"best of n by {chosen}, KL at most"
                axis.plot(*zip(*points), marker, ms=5, mfc="none", alpha=0.5, label=label)
        for name, samples in zip(results.names, results.share_drawn):
            kl, y = mean_and_interval(samples.kl), mean_and_interval(getattr(samples, panel))
            short = name.removeprefix("runs/").removesuffix("/model")
            axis.errorbar(kl[0], y[0], y[1], kl[1], "o", ms=4, capsize=2, label=short)
        axis.set(xlabel="KL to the reference, nats a sequence", ylabel=titles[panel])
    figure.legend(*axes[-1].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=150)


def draw_calibration(path, bins):
    """How often the reward model's order of a pair is the label's, against how sure it is."""
    from matplotlib.figure import Figure

    confidence, right, half = bins
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0.5, 1], [0.5, 1], "k-", lw=1, label="calibrated")
    axis.errorbar(confidence, right, half, fmt="o-", ms=4, capsize=2, label="reward model")
    axis.set(xlabel="sigmoid of the margin, before normalisation", ylabel="share in label's order")
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def command_line(args):
    """The command that makes this evaluation: flags that are not at their default."""
    words = ["python", "evaluate.py"]
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), field.name.replace("_", "-")
        if value != field.default:
            values = value if isinstance(value, tuple) else [value]
            words += [f"--no-{flag}"] if value is False else [f"--{flag}", *map(str, values)]
    return shlex.join(words)


def write_report(folder, results):
    """report.md with its pictures, samples.md and evaluation.jsonl, in this folder."""
    device = f"{jax.default_backend()} ({jax.devices()[0].device_kind}), jax {jax.__version__}"
    page = ["# Evaluation", f"    {command_line(results.args)}"]
    page += [f"{time.strftime('%Y-%m-%d')}, {device}. What the figures are: `evaluate.py --help`."]
    if results.curves:
        draw_frontier(folder / "frontier.png", results)
        page.append("![Learned and gold reward against KL: policies and frontiers](frontier.png)")
    for title, rows in make_tables(results):
        page += [f"## {title[0].upper()}{title[1:]}", markdown_table(cells(rows))]
    if results.bins:
        draw_calibration(folder / "calibration.png", results.bins)
        page += ["## Calibration of the reward model", "![Calibration](calibration.png)"]
    page.append("Completions side by side: [samples.md](samples.md).")
    pages = {"report.md": page, "samples.md": ["# Completions side by side"]}
    for i, prompt in enumerate(results.prompts[:SHOWN]):
        found = samples_of_prompt(results, i)
        lines = [[name, *scores.values(), escape(text)] for name, scores, text in found]
        head = ["policy", *found[0][1], "completion"]
        pages["samples.md"] += [f"**{i + 1}.** {escape(prompt)}", markdown_table([head, *lines])]
    for name, parts in pages.items():
        ppo.write_file(folder / name, ("\n\n".join(parts) + "\n").encode(errors="replace"))
    rows = "".join(json.dumps(row) + "\n" for row in json_rows(results))
    ppo.write_file(folder / "evaluation.jsonl", rows.encode())
    print(f"\nreport: {folder / 'report.md'}")


SHOWN = 32  # prompts in samples.md


def json_rows(results):
    """The lines of evaluation.jsonl: {"kind", figures}; <name>_ci is half a 95 % interval."""

    def flat(row):
        plain = {}
        for name, x in row.items():
            parts = x if isinstance(x, tuple) else (x,)
            plain |= dict(zip((name, f"{name}_ci", f"{name}_trusted"), parts))
        bad = [k for k, x in plain.items() if isinstance(x, float) and not math.isfinite(x)]
        return plain | dict.fromkeys(bad)  # JSON has no NaN

    yield {"kind": "args", **vars(results.args)}
    yield from ({"kind": "policy", **flat(row)} for row in results.figures)
    for kind, curve in results.curves.items():
        columns = ("kl", kind, "gold_of_best_reward")
        for point, effective in zip(curve.points.mean(axis=2).T[curve.trusted], curve.effective):
            row = dict(zip(columns, point.tolist()))
            yield {"kind": "frontier", "of": kind, **row, "effective": float(effective)}
    yield from ({"kind": "best_of_n", **flat(row)} for row in results.best_of_n)
    if results.reward_model:
        yield {"kind": "reward_model", **flat(results.reward_model)}
    for row in zip(*map(np.ndarray.tolist, results.bins)) if results.bins else ():
        yield {"kind": "calibration", **dict(zip(("confidence", "right", "right_ci"), row))}
    if results.sft:
        yield {"kind": "sft", **flat(results.sft)}


if __name__ == "__main__":
    main(args)
