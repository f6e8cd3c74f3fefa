"""Shows that the embedded data expose two quiet bugs: mixed-up groups, and a missing baseline.

    python sft.py && python benchmarks/known_bugs.py

Trains grpo.py with the gold reward itself, as it is and with either bug in its advantages, three
seeds each, and prints gold reward, KL and J = E[gold] - kl_coef * KL on the held-out prompts.
Prompts differ in mean gold reward by about as much as reviews of one prompt do. So whoever compares
a review with those of other prompts, or with none, mostly learns from the prompt.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate
import grpo

KL_COEF = 0.08  # in units of the gold reward: the temperature of the embedded data's labels
BATCH = 32  # four groups of eight: with many, their number makes up for a worse estimate
SEEDS = (1, 2, 3)


def mixed_up(rewards, group_size, scale=True, eps=1e-4):
    """As if the samples of one prompt stood B / G rows apart, not side by side."""
    del scale, eps
    groups = rewards.reshape(group_size, -1)
    return (groups - groups.mean(axis=0)).reshape(-1)


def no_baseline(rewards, group_size, scale=True, eps=1e-4):
    del group_size, scale, eps
    return rewards


def measure(folder, seed):
    """(gold, KL) of a policy on the held-out prompts, 4 completions each."""
    tokenizer, gold = grpo.load_tokenizer(folder), grpo.load_function("data/reviews.py:sentiment")
    (config, params), (_, ref_params) = grpo.load_model(folder), grpo.load_model("runs/sft/model")
    rows = grpo.read_jsonl("data/reviews/prompts_test.jsonl", ["prompt"])
    rows = grpo.encode_rows(rows, [], tokenizer, config.eos_token_id, grpo.Args())
    golds, kls = [], []
    for i in range(0, len(rows), 125):
        asked = [row["prompt"] for row, _ in rows[i : i + 125] for _ in range(4)]
        prompts = grpo.pad_rows([ids[0] for _, ids in rows[i : i + 125]], 16, left=True)
        key, sampling = grpo.stream_key(seed, "", i), (48, 1.0, config.eos_token_id, 4)
        tokens, mask, _ = grpo.generate(params, config, *prompts, key, *sampling)
        texts = grpo.decode_responses(tokenizer, tokens, mask, 16, config.eos_token_id)
        golds.append(gold(asked, texts))
        models = (params, ref_params, (config, config))
        kls.append(evaluate.sequence_measures(*models, tokens, mask, 16, 1.0)["kl"])
    return np.mean(np.concatenate(golds)), np.mean(np.concatenate(kls))


def main():
    right, root = grpo.group_relative_advantage, Path("runs/known_bugs")
    for function in (right, mixed_up, no_baseline):
        grpo.group_relative_advantage = function
        figures = []
        for seed in SEEDS:
            folder = root / f"{function.__name__}_{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            grpo.make_experience.clear_cache()  # compiled code holds its functions
            settings = {"kl_coef": KL_COEF, "batch_size": BATCH, "micro_batch_size": BATCH // 2}
            settings |= {"reward": ("data/reviews.py:sentiment",), "seed": seed}
            grpo.main(grpo.Args(run_dir=str(folder), **settings))
            gold, kl = measure(folder / "model", seed)
            figures.append((gold, kl, gold - KL_COEF * kl))
            print(f"{function.__name__} seed {seed}: gold %.3f  KL %.2f  J %.3f" % figures[-1])
        mean, spread = np.mean(figures, axis=0), np.std(figures, axis=0, ddof=1)
        columns = zip(("gold", "KL", "J"), mean, spread)
        text = "  ".join(f"{name} {m:.3f} ±{s:.3f}" for name, m, s in columns)
        print(f"{function.__name__}: {text}", flush=True)


if __name__ == "__main__":
    main()
