"""Writes preference pairs drawn from the SFT policy instead of from the grammar.

    python sft.py && python benchmarks/sft_pairs.py && python dpo.py \\
        --dataset runs/sft_pairs/preferences_train.jsonl --run-dir runs/dpo_sft_pairs

The prompts are those of data/reviews/preferences_train.jsonl, in its order; the labels are drawn
as data/reviews.py draws them: what differs is who wrote the answers (and a few rows are left out,
where an answer is empty or does not end).
"""

import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dpo
from data import reviews


def main():
    model, source = "runs/sft/model", "data/reviews/preferences_train.jsonl"
    tokenizer, (config, params) = dpo.load_tokenizer(model), dpo.load_model(model)
    rows = dpo.read_jsonl(source, ["prompt", "chosen", "rejected"])
    rows = dpo.encode_rows(rows, [], tokenizer, config.eos_token_id, dpo.Args())
    rng, folder = random.Random(0), Path("runs/sft_pairs")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "preferences_train.jsonl").open("w", encoding="utf-8") as file:
        for i in range(0, len(rows), 125):
            prompts = dpo.pad_rows([ids[0] for _, ids in rows[i : i + 125]], 16, left=True)
            key, sampling = dpo.stream_key(0, "pairs", i), (48, 1.0, config.eos_token_id, 2)
            tokens, mask, _ = dpo.generate(params, config, *prompts, key, *sampling)
            texts = dpo.decode_responses(tokenizer, tokens, mask, 16, config.eos_token_id)
            for (row, _), answers in zip(rows[i : i + 125], zip(texts[::2], texts[1::2])):
                if not all(answers):
                    continue
                first, second = reviews.sentiment([row["prompt"]] * 2, answers)
                if rng.random() >= 1 / (1 + math.exp((second - first) / reviews.TAU)):
                    answers = answers[::-1]
                pair = {"prompt": row["prompt"], "chosen": answers[0], "rejected": answers[1]}
                file.write(json.dumps(pair) + "\n")


if __name__ == "__main__":
    main()
