"""Puts policies on one reward-KL table: what they gained, and the most that their KL allows.

    python evaluate.py                                            # runs/ppo/model, embedded data
    python evaluate.py --models runs/ppo/model runs/dpo/model --kl-coef 0.15
    python evaluate.py --no-frontier                              # the compact table, in seconds
    python evaluate.py --plot reward_kl.png                       # the same as a plot

The table has each policy's learned reward, gold reward and KL to the reference on held-out prompts.
The frontier is the most that any policy can get at a KL: the optimum of E[r] - beta KL is
pi* ~ pi_ref exp(r / beta), so samples of the reference with weights exp(r / beta) stand for it. The
shares hold each policy's gain against the frontier's gain at the policy's own KL.

KL is the full-vocabulary KL at every sampled position, summed over the response: nats a sequence.
The learned reward is everywhere the score, less --missing-eos-penalty where a completion does not
end. n samples a prompt carry the frontier to a KL of about ln(n) - 2. Past it they hold too few of
the best texts, the frontier is too low and a share too high: such shares are marked with *.
Figures after ± are standard errors: prompts and samples are random, the models are not.
"""

import os
from dataclasses import dataclass

import tyro


@dataclass
class Args:
    models: tuple[str, ...] = ("runs/ppo/model",)  # folders or hub names of the policies
    ref: str = "runs/sft/model"  # the reference, from which KL is measured
    reward_model: str = "runs/reward/model"  # folder of a learned reward; "" for none
    # file.py:function of a ground truth; the embedded data's by default
    gold: str | None = None
    # JSON Lines (or .gz) with prompt; facts.json and preferences_test.jsonl may lie beside it
    dataset: str = "data/reviews/prompts_test.jsonl"
    num_prompts: int = 500  # prompts of the table, the first of the file
    samples_per_prompt: int = 2  # completions to each of them: prompts differ more than these do
    frontier: bool = True  # also estimate the frontier, and the shares of it
    frontier_prompts: int = 64  # prompts of frontier and shares, the first of the file
    frontier_samples: int = 256  # completions of the reference to each of them
    share_samples: int = 32  # completions of each policy to each of them
    # beta of the run, if it was fixed: J = E[learned reward] - beta KL is held against its best
    kl_coef: float | None = None
    missing_eos_penalty: float = 1.0  # taken off the score of a completion that does not end
    temperature: float = 1.0  # of sampling, and of the KL
    max_prompt_length: int = 16  # tokens; a longer prompt is dropped
    max_completion_length: int = 48  # tokens with EOS
    # sequences sampled or scored at once; lower it for a large model or vocabulary
    batch_size: int = 256
    examples: int = 4  # prompts whose completions are printed side by side
    seed: int = 0  # of the samples
    output: str = ""  # JSON file for all figures and the frontier's points
    plot: str = ""  # PNG, PDF or SVG file for reward and gold against KL; needs matplotlib


# Parsed before JAX is imported, so that --help answers at once (linters call it E402).
if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    # What JAX compiles is kept for the next run; JAX_ENABLE_COMPILATION_CACHE=0 turns that off.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import functools
import importlib.util
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ppo
from ppo import fail

# -------------------------------------------------------------------------------------- statistics
# NumPy arrays [P, N]: P prompts, N samples of each.


def mean_and_error(x):
    """Mean of x [P, N] and its standard error, from the spread of the prompts' means."""
    means = x.mean(axis=1)
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means)))


def within_prompt_correlation(x, y):
    """Correlation of x and y [P, N] about their prompts' means, pooled over prompts.

    About the overall means it would mostly show that both know which prompts are sad.
    """
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def known_accuracy(margins, probability):
    """Mean probability [B] of labels that agree with the order by margins [B], chosen - rejected.

    probability: with which each label came out as it did. So the labels' own noise, which an
    accuracy on the labels has, is left out.
    """
    return float(np.where(margins > 0, probability, 1 - probability).mean())


def ngrams(text, n):
    """All runs of n words of a text."""
    words = re.findall(r"[\w']+", text.lower())
    return list(zip(*(words[i:] for i in range(n))))


def distinct_n(texts, n):
    """Distinct n-grams / n-grams over all texts; it falls with the number of texts."""
    found = [ngram for text in texts for ngram in ngrams(text, n)]
    return len(set(found)) / max(len(found), 1)


def repeated_n(texts, n):
    """Share of the n-grams that occurred before in the same text."""
    found = [ngrams(text, n) for text in texts]
    return 1 - sum(len(set(x)) for x in found) / max(sum(len(x) for x in found), 1)


def beta_grid(rewards, points=80):
    """Infinity, then falling betas in units of the rewards' spread within prompts."""
    spread = max(np.sqrt(rewards.var(axis=1).mean()), 1e-8)
    return np.array([np.inf, *np.geomspace(20, 0.02, points) * spread])


def frontier(rewards, betas, *others):
    """The optimum of E[r] - beta KL at each beta, from samples of the reference.

    rewards and others [P, N] belong to the same samples. pi* ~ pi_ref exp(r / beta) gives a
    prompt's sample i the weight w_i ~ exp(r_i / beta), with sum 1. Returns [2 + others, K, P] for K
    betas: KL(pi* || pi_ref) = sum_i w_i log(N w_i), and the means of rewards and others under pi*.
    """
    points = []
    for beta in betas:
        scaled = (rewards - rewards.max(axis=1, keepdims=True)) / beta  # [P, N]
        log_weights = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        log_ratio = log_weights + np.log(rewards.shape[1])
        means = [(np.exp(log_weights) * x).sum(axis=1) for x in (log_ratio, rewards, *others)]
        points.append(means)
    return np.array(points).swapaxes(0, 1)


def optimal_objective(rewards, beta):
    """J* = beta log E_ref[exp(r / beta)] at each prompt, from samples [P, N] of the reference."""
    top = rewards.max(axis=1, keepdims=True)
    return top[:, 0] + beta * np.log(np.exp((rewards - top) / beta).mean(axis=1))


def share_of_gain(x, x_ref, x_best):
    """(x - x_ref) / (x_best - x_ref); nan where there is nothing to gain."""
    return (x - x_ref) / (x_best - x_ref) if x_best > x_ref else float("nan")


def share_of_frontier(x, kl, frontier_x, frontier_kl):
    """The share of the gain at this KL: x, kl numbers; frontier's points [K], the first at KL 0."""
    return share_of_gain(x, frontier_x[0], np.interp(kl, frontier_kl, frontier_x))


def bootstrap(statistic, *arrays, repeats=200):
    """statistic(means over prompts) and its standard error under drawing the prompts anew.

    The arrays end in an axis of prompts, drawn alike in all: what policy and frontier have in
    common, above all how good a review a prompt lets one write, is no noise in their ratio.
    """
    P = arrays[0].shape[-1]
    draws = np.random.default_rng(0).integers(P, size=(repeats, P))
    values = [statistic(*(x[..., i].mean(axis=-1) for x in arrays)) for i in draws]
    return float(statistic(*(x.mean(axis=-1) for x in arrays))), float(np.std(values))


# --------------------------------------------------------------------------------------- measuring


def full_vocabulary_kl(policy_logits, ref_logits, mask):
    """KL(policy || ref) at every position over the whole vocabulary, summed over the response.

    logits [B, R, V], mask [B, R] -> [B]. Over tokens drawn from the policy its mean is the KL of
    whole responses; so is that of the sampled log-ratio (k1), but with more variance.
    """
    assert policy_logits.shape == ref_logits.shape, (policy_logits.shape, ref_logits.shape)
    assert policy_logits.shape[:2] == mask.shape, (policy_logits.shape, mask.shape)
    logprobs, ref_logprobs = jax.nn.log_softmax(policy_logits), jax.nn.log_softmax(ref_logits)
    kl = jnp.sum(jnp.exp(logprobs) * (logprobs - ref_logprobs), axis=-1)  # [B, R]
    return jnp.sum(kl * mask, axis=1)


@functools.partial(jax.jit, static_argnames=("configs", "prompt_length", "temperature"))
def sequence_kl(params, ref_params, configs, tokens, mask, prompt_length, temperature):
    """full_vocabulary_kl of sampled sequences: tokens, mask [B, P + R] -> [B]."""
    logits, ref_logits = (  # [B, R + 1, V] each
        ppo.GPT2(c).apply({"params": p}, tokens, mask, logits_from=prompt_length - 1) / temperature
        for p, c in zip((params, ref_params), configs)
    )
    return full_vocabulary_kl(logits[:, :-1], ref_logits[:, :-1], mask[:, prompt_length:])


def in_batches(rows, batch_size):
    """Equal slices of a list, the last one filled up with its last row: one shape to compile."""
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        yield batch + batch[-1:] * (batch_size - len(batch))


class Samples(NamedTuple):
    """Completions to P prompts, N each: P * N texts, prompt by prompt, and arrays [P, N]."""

    texts: list
    reward: np.ndarray | None  # learned, less the missing-EOS penalty
    gold: np.ndarray | None
    kl: np.ndarray
    length: np.ndarray  # tokens with EOS
    ended: np.ndarray  # with EOS, not by --max-completion-length


def describe_policy(samples, kl_coef):
    """A policy's figures: {name: (mean, standard error) or number}."""
    means = {name: getattr(samples, name) for name in ("reward", "gold", "kl")}
    if kl_coef is not None:
        means["J"] = samples.reward - kl_coef * samples.kl
    return {name: mean_and_error(x) for name, x in means.items() if x is not None} | {
        "length": float(samples.length.mean()),
        "eos": float(samples.ended.mean()),
        "distinct_1": distinct_n(samples.texts, 1),
        "distinct_2": distinct_n(samples.texts, 2),
        "repeated_3": repeated_n(samples.texts, 3),
    }


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


def describe_shares(samples, ref, curves, kl_coef, trusted_kl):
    """A policy's shares of what is best at its KL: {name: (share, standard error, trusted)}.

    samples of the policy and of the reference to the same prompts; curves: {"gold", "reward"}, the
    results of `frontier` for either.
    """
    kl, shares = samples.kl.mean(axis=1), {}
    for name, kind, index in (
        ("gold", "gold", 1),
        ("reward", "reward", 1),
        ("gold_of_best_reward", "reward", 2),  # what the learned reward's own optimum gets in gold
    ):
        if kind in curves and index < len(curves[kind]):
            x = (samples.reward if name == "reward" else samples.gold).mean(axis=1)
            points = (x, kl, curves[kind][index], curves[kind][0])
            share, error = bootstrap(share_of_frontier, *points)
            shares[name] = (share, error, bool(kl.mean() <= trusted_kl))
    if kl_coef is not None:
        J, J_ref = samples.reward.mean(axis=1) - kl_coef * kl, ref.reward.mean(axis=1)
        share, error = bootstrap(share_of_gain, J, J_ref, optimal_objective(ref.reward, kl_coef))
        # Too few samples make the KL of their optimum too low as well; the policy's own KL is not.
        best_kl = max(kl.mean(), frontier(ref.reward, [kl_coef])[0].mean())
        shares["J"] = (share, error, bool(best_kl <= trusted_kl))
    return shares


def describe_reward_model(score, gold, preferences, prompts, seed):
    """What the embedded data know of a reward model; score(prompts, completions) -> [B].

    The accuracy needs the labels' probabilities in the preference file. The correlation with gold,
    on 8 reviews to each of 64 prompts, needs a gold file that can write some: data/reviews.py.
    """
    figures, rows = {}, []
    if preferences.exists():
        rows = ppo.read_jsonl(preferences, ["prompt", "chosen", "rejected"])
    if rows and all("probability" in row for row in rows):
        questions = [row["prompt"] for row in rows]
        chosen, rejected = (score(questions, [r[k] for r in rows]) for k in ("chosen", "rejected"))
        probability = np.array([row["probability"] for row in rows])
        figures["accuracy"] = known_accuracy(chosen - rejected, probability)
        figures["best_accuracy"] = known_accuracy(probability - 0.5, probability)  # gold's order
        figures["share_of_best_accuracy"] = figures["accuracy"] / figures["best_accuracy"]
    module = getattr(gold, "__globals__", {})
    if {"sample", "log_prob"} <= module.keys():
        rng = random.Random(f"evaluate {seed}")
        questions = [prompt for prompt in prompts[:64] for _ in range(8)]
        texts = [module["sample"](rng, prompt) for prompt in questions]
        golds = ppo.call_reward(gold, [{"prompt": q} for q in questions], texts)
        scores = score(questions, texts).reshape(-1, 8)
        figures["correlation_on_data"] = within_prompt_correlation(scores, golds.reshape(-1, 8))
    return figures


def describe_sft(ref, dataset):
    """The reference's last held-out loss and its floor, where its run and the data's facts are."""
    run, facts = Path(ref).parent, Path(dataset).with_name("facts.json")
    if not all(path.exists() for path in (run / "metrics.jsonl", run / "args.json", facts)):
        return {}
    flags = ppo.read_json(run / "args.json")
    used = Path(flags["eval_dataset"] or flags["dataset"].replace("train", "test"))
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    if not losses or used.resolve() != facts.with_name("sft_test.jsonl").resolve():
        return {}  # the floor is that of this one file
    floor = json.loads(facts.read_text())["sft_test_floor_nats_per_token"]
    return {"heldout_loss": losses[-1], "floor": floor, "gap": losses[-1] - floor}


# ---------------------------------------------------------------------------------------- printing


def print_table(title, rows):
    """Dicts of the same keys, the first a name: numbers, (x, error) or (x, error, trusted)."""

    def cell(x):
        if isinstance(x, tuple):
            return f"{x[0]:.3f} ±{x[1]:.3f}" + ("" if all(x[2:]) else "*")
        return x if isinstance(x, str) else f"{x:.3f}"

    lines = [list(rows[0]), *([cell(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{title}")
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(x.rjust(w) for x, w in zip(others, widths[1:]))]
        print("  " + "  ".join(cells))


def print_frontier(curves, trusted_kl):
    """The frontiers at round KLs, as far as they are to be trusted."""
    kls = np.arange(0, max(trusted_kl, 0) + 1e-9, 0.5)
    columns = {"KL": [f"{kl:.1f}" for kl in kls]}
    for kind, names in (("gold", ["gold"]), ("reward", ["reward", "gold_of_best_reward"])):
        for name, values in zip(names, curves.get(kind, [])[1:]):
            columns[name] = np.interp(kls, curves[kind][0].mean(axis=1), values.mean(axis=1))
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    print_table(f"the most at each KL, to be trusted up to {trusted_kl:.1f}", rows)


def print_examples(names, questions, drawn):
    """The first completion of every policy to each question, with its scores."""
    for i, question in enumerate(questions):
        print(f"\n{question}")
        for name, samples in zip(names, drawn):
            both = (("reward", samples.reward), ("gold", samples.gold))
            scores = "  ".join(f"{title} {x[i, 0]:5.2f}" for title, x in both if x is not None)
            text = samples.texts[i * samples.kl.shape[1]]
            print(f"  {name.ljust(max(map(len, names)))}  {scores} {text}")


def draw(path, names, drawn, curves, trusted_kl):
    """Reward and gold against KL: a point for each policy, with standard errors, and the frontiers.

    drawn: Samples of the policies on the frontier's prompts; the curves end at the trusted KL.
    """
    import matplotlib.pyplot as plt  # here: nothing else needs it

    best = "the learned reward's own optimum"
    lines = {
        "reward": [("reward", 1, "the most there is")],
        "gold": [("gold", 1, "the most there is"), ("reward", 2, best)],
    }
    titles = {"reward": "learned reward", "gold": "gold reward"}
    panels = [x for x in titles if getattr(drawn[0], x) is not None]
    size = (5 * len(panels) + 2.5, 4.5)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels):
        for style, (kind, index, label) in zip(("k-", "k--"), lines[panel]):
            if kind in curves and index < len(curves[kind]):
                kl, y = curves[kind][[0, index]].mean(axis=2)
                axis.plot(kl[kl <= trusted_kl], y[kl <= trusted_kl], style, lw=1, label=label)
        for name, samples in zip(names, drawn):
            (kl, kl_error), (y, error) = map(mean_and_error, (samples.kl, getattr(samples, panel)))
            axis.errorbar(kl, y, error, kl_error, "o", capsize=2, label=name)
        axis.set(xlabel="KL to the reference, nats a sequence", ylabel=titles[panel])
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=150)


# -------------------------------------------------------------------------------------------- main


def main(args):
    ppo.check_flags(args)
    if min(args.num_prompts, args.frontier_prompts) < 2:
        fail("--num-prompts and --frontier-prompts must be 2 at least: errors are over prompts")
    if args.temperature <= 0:
        fail("--temperature must be above 0: there is no KL from a policy that takes one token")
    if args.kl_coef is not None and not (args.kl_coef > 0 and args.reward_model):
        fail("--kl-coef must be above 0, and needs --reward-model: J is that of the learned reward")
    if args.plot and not args.frontier:
        fail("--plot draws the frontier, too: leave --no-frontier out")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        fail("--plot needs matplotlib: pip install matplotlib")
    for place in filter(None, (args.output, args.plot)):
        with ppo.file_access(place):
            Path(place).parent.mkdir(parents=True, exist_ok=True)
    gold = ppo.load_gold(args.gold, args.dataset)
    if not gold and not args.reward_model:
        fail("nothing to measure: give --reward-model or --gold")
    tokenizer = ppo.load_tokenizer(args.ref)
    prompt_length = args.max_prompt_length
    width = prompt_length + args.max_completion_length

    def load(folder):
        """A model that reads the reference's tokens."""
        config, params = ppo.load_model(folder)
        own = ppo.load_tokenizer(folder)
        same = ppo.token_ids(own) == ppo.token_ids(tokenizer)
        if not same or ppo.end_token(config, own) != eos_id:
            fail(f"{folder} and {args.ref} have different tokenizers")
        ppo.check_sizes(config, tokenizer, args)
        return config, params

    eos_id = ppo.end_token(ppo.load_config(ppo.find_model(args.ref)), tokenizer)
    ref_config, ref_params = load(args.ref)
    reward_config, reward_params = load(args.reward_model) if args.reward_model else (None, {})
    if args.reward_model and "score" not in reward_params:
        fail(f"{args.reward_model} is not a reward model: it has no score.weight")
    rows = ppo.read_jsonl(args.dataset, ["prompt"])
    rows = ppo.encode_rows(rows, [], tokenizer, eos_id, args)  # [(row, [token ids])]
    prompts = [row["prompt"] for row, _ in rows]

    def measure(config, params, num_prompts, num_samples, stream):
        """Samples of a policy to the first prompts."""
        pairs = [pair for pair in rows[:num_prompts] for _ in range(num_samples)]
        asked, ids = [row for row, _ in pairs], [prompt for _, (prompt,) in pairs]
        sampling = (args.max_completion_length, args.temperature, eos_id)
        texts, columns = [], []
        for i, batch in enumerate(in_batches(ids, args.batch_size)):
            padded, key = ppo.pad_rows(batch, prompt_length, left=True), (args.seed, stream, i)
            tokens, mask, _ = ppo.generate(params, config, *padded, ppo.stream_key(*key), *sampling)
            kl = reward = np.zeros(len(batch))
            if params is not ref_params:
                both = (params, ref_params, (config, ref_config))
                kl = sequence_kl(*both, tokens, mask, prompt_length, args.temperature)
            ended = (tokens[:, prompt_length:] == eos_id).any(axis=1)
            if args.reward_model:
                reward = ppo.learned_rewards(reward_params, reward_config, tokens, mask)
                reward -= args.missing_eos_penalty * ~ended
            columns.append([kl, reward, mask[:, prompt_length:].sum(axis=1), ended])
            texts += ppo.decode_responses(tokenizer, tokens, mask, prompt_length, eos_id)
        columns = np.concatenate(columns, axis=1, dtype=np.float64)[:, : len(asked)]
        kl, reward, length, ended = columns.reshape(4, -1, num_samples)
        texts, golds = texts[: len(asked)], None
        if gold:
            golds = ppo.call_reward(gold, asked, texts)
            golds = golds.astype(np.float64).reshape(-1, num_samples)
        return Samples(texts, reward if args.reward_model else None, golds, kl, length, ended)

    names, drawn, share_drawn = [args.ref, *args.models], [], []
    for name in names:
        config, params = (ref_config, ref_params) if name == args.ref else load(name)
        if config.vocab_size != ref_config.vocab_size:
            fail(f"{name} and {args.ref} have vocabularies of different sizes: no KL")
        # The same random numbers for all: where a policy is the reference, so are its figures.
        drawn.append(measure(config, params, args.num_prompts, args.samples_per_prompt, "table"))
        if args.frontier:
            # Policy and frontier on the same prompts: other prompts for either would put into the
            # share how much prompts differ, which is as much as a policy gains.
            samples = args.share_samples if share_drawn else args.frontier_samples
            share_drawn.append(measure(config, params, args.frontier_prompts, samples, "shares"))

    report = {"args": vars(args)}
    figures = [{"policy": n} | describe_policy(x, args.kl_coef) for n, x in zip(names, drawn)]
    for row, samples in zip(figures, drawn):
        share = share_grammatical(gold, prompts[: args.num_prompts], samples.texts)
        row |= {} if share is None else {"grammatical": share}
    size = f"{len(drawn[0].kl)} prompts x {args.samples_per_prompt} completions"
    print_table(f"{args.dataset}, {size}", figures)
    report["table"] = figures

    if args.reward_model:

        def score(questions, texts):
            encode = tokenizer.encode_ordinary
            ids = [[*(encode(q) or [eos_id]), *encode(t), eos_id] for q, t in zip(questions, texts)]
            longest = max(width, *map(len, ids))
            batches = (ppo.pad_rows(x, longest) for x in in_batches(ids, args.batch_size))
            found = [ppo.learned_rewards(reward_params, reward_config, *x) for x in batches]
            return np.concatenate(found)[: len(ids)]

        found = {"reward model": args.reward_model}
        preferences = Path(args.dataset).with_name("preferences_test.jsonl")
        found |= describe_reward_model(score, gold, preferences, prompts, args.seed)
        ref = (share_drawn or drawn)[0]
        if gold and ref.kl.shape[1] >= 8:  # with fewer, the prompts' means are mostly noise
            found["correlation_on_ref"] = within_prompt_correlation(ref.reward, ref.gold)
        print_table("held-out order of pairs, and correlation with gold within prompts", [found])
        report["reward_model"] = found
    if sft := describe_sft(args.ref, args.dataset):
        report["sft"] = {"reference": args.ref} | sft
        print_table("held-out loss in nats a token", [report["sft"]])

    if args.frontier:
        ref, *policies = share_drawn
        trusted_kl = float(np.log(args.frontier_samples) - 2)
        curves = {}
        if gold:
            curves["gold"] = frontier(ref.gold, beta_grid(ref.gold))
        if args.reward_model:
            others = [ref.gold] if gold else []
            curves["reward"] = frontier(ref.reward, beta_grid(ref.reward), *others)
        print_frontier(curves, trusted_kl)
        shares = []
        for name, samples in zip(args.models, policies):
            found = describe_shares(samples, ref, curves, args.kl_coef, trusted_kl)
            shares.append({"policy": name, "kl": float(samples.kl.mean())} | found)
        size = f"{len(ref.kl)} prompts x {args.share_samples} completions"
        print_table(
            f"share of the most at its KL, {size}; *: past the trusted KL, too high", shares
        )
        report |= {"shares": shares, "trusted_kl": trusted_kl}
        if args.plot:
            draw(args.plot, names, share_drawn, curves, trusted_kl)
        points = {kind: curve.mean(axis=2).tolist() for kind, curve in curves.items()}
        report["frontier"] = {k: dict(zip(("kl", k, "gold"), x)) for k, x in points.items()}
        if args.kl_coef is not None:
            best = {"J_ref": float(ref.reward.mean())}
            best["J_best"] = float(optimal_objective(ref.reward, args.kl_coef).mean())
            best["kl_of_best"] = float(frontier(ref.reward, [args.kl_coef])[0].mean())
            print("  " + ", ".join(f"{name} {x:.3f}" for name, x in best.items()))
            report |= best

    print_examples(names, prompts[: args.examples], drawn)
    if args.output:
        ppo.write_file(Path(args.output), json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    main(args)
