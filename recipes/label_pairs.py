"""Preference pairs of a policy's own samples, ordered by a reward function.

    python recipes/label_pairs.py --model runs/imdb/sft/model \
        --dataset runs/imdb/data/prompts_train.jsonl --reward recipes/imdb_reward.py:sentiment \
        --out runs/imdb/data/preferences_train.jsonl

Each prompt gets --num-generations completions, and every two of them with different scores are a
pair: 4 completions make 6 pairs, as in the DPO paper's sentiment experiment. Completions that do
not end, or are empty, are left out: a pair's texts get an EOS when they are trained on.
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Args:
    model: str  # folder or hub name of the policy
    dataset: str  # JSON Lines with prompt
    reward: str  # file.py:function, f(prompts, completions, **columns) -> scores
    out: str  # the file to write
    num_prompts: int | None = None  # only the first so many
    num_generations: int = 4  # completions to each prompt
    batch_size: int = 64  # prompts at once
    temperature: float = 1.0
    max_prompt_length: int = 16  # tokens; a longer prompt is dropped
    max_completion_length: int = 48  # tokens with EOS
    seed: int = 0  # of the samples


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

import numpy as np

import ppo


def sample(args):
    """[(row, texts that ended and are not empty)] of each prompt."""
    config, params = ppo.load_model(args.model)
    tokenizer = ppo.load_tokenizer(args.model)
    eos_id = ppo.end_token(config, tokenizer)
    rows = ppo.read_jsonl(args.dataset, ["prompt"])
    rows = ppo.encode_rows(rows[: args.num_prompts], [], tokenizer, eos_id, args)
    ppo.check_sizes(config, tokenizer, args)
    P, N = args.max_prompt_length, args.num_generations
    sampling = (args.max_completion_length, args.temperature, eos_id, N)
    found = []
    for start in range(0, len(rows), args.batch_size):
        part = rows[start : start + args.batch_size]
        full = [part[i % len(part)] for i in range(args.batch_size)]  # one shape to compile
        prompts = ppo.pad_rows([prompt for _, (prompt,) in full], P, left=True)
        key = ppo.stream_key(args.seed, "pairs", start)
        tokens, mask, _ = ppo.generate(params, config, *prompts, key, *sampling)
        texts = ppo.decode_responses(tokenizer, tokens, mask, P, eos_id)
        ended = (np.asarray(tokens)[:, P:] == eos_id).any(axis=1)
        for i, (row, _) in enumerate(part):
            own = range(i * N, (i + 1) * N)
            found.append((row, [texts[j] for j in own if ended[j] and texts[j].strip()]))
    return found


def make_pairs(rows, texts, scores):
    """Pairs of the texts to one prompt: rows, texts, scores [B], those of a prompt side by side."""
    pairs = []
    for _, group in itertools.groupby(zip(rows, texts, scores), key=lambda x: id(x[0])):
        for (row, one, x), (_, other, y) in itertools.combinations(group, 2):
            if x != y:
                better, worse = (one, other) if x > y else (other, one)
                pairs.append({"prompt": row["prompt"], "chosen": better, "rejected": worse})
    return pairs


def main(args):
    ppo.check_flags(args)
    ppo.check(args.num_generations > 1, "--num-generations must be 2 at least: pairs need two")
    reward = ppo.load_function(args.reward)
    found = sample(args)
    rows = [row for row, texts in found for _ in texts]
    texts = [text for _, texts in found for text in texts]
    ppo.check(texts, f"no completion of {args.model} ended: raise --max-completion-length")
    scores = ppo.call_reward(reward, rows, texts)
    unknown = int(np.isnan(scores).sum())
    ppo.check(not unknown, f"{args.reward} says None of {unknown} of {len(texts)} completions")
    pairs = make_pairs(rows, texts, scores)
    ppo.check(pairs, f"no two completions to one prompt got different scores of {args.reward}")
    lines = "".join(json.dumps(pair) + "\n" for pair in pairs)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    ppo.write_file(Path(args.out), lines.encode())
    lost = len(found) * args.num_generations - len(texts)
    print(f"{len(found)} prompts, {len(texts)} completions; {lost} more are empty or do not end")
    print(f"score {scores.mean():.3f} ± {scores.std():.3f}; {args.out}: {len(pairs)} pairs")


if __name__ == "__main__":
    main(args)
