"""IMDb's reviews as prompts and demonstrations, for recipes/imdb_gpt2.sh.

    python data/convert.py stanfordnlp/imdb runs/imdb/texts --kind sft --test-split test
    python recipes/imdb_data.py runs/imdb/texts runs/imdb/data --model gpt2-large

A prompt is the first 2 to 8 tokens of a review of more than 200 letters, as in TRL's example that
the DPO paper followed. The completion is what comes next, up to the last end of a sentence within
--max-completion-length tokens, so that the policy learns to end; a review without one is dropped.
Writes sft_{train,test}.jsonl and prompts_{train,test}.jsonl, in an order that mixes good reviews
and bad ones: IMDb's own has all bad ones first.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Args:
    texts: tyro.conf.Positional[str]  # folder with sft_{train,test}.jsonl, rows {"text"}
    out: tyro.conf.Positional[str]  # folder to write to
    model: str = "gpt2-large"  # folder or hub name, for its tokenizer
    max_completion_length: int = 48  # tokens with EOS
    test_rows: int = 2000  # of the test split, the first of its random order
    seed: int = 0  # of the prompts' lengths and the order


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

import gpt2
import sft

SENTENCE_END = re.compile(r"""[.!?]["')]*(?=\s|$)""")


def split_review(text, length, tokenizer, max_completion_length):
    """(prompt of `length` tokens, completion) of a review, or None where it gives none."""
    text = re.sub(r"\s*(<br />\s*)+", " ", text).strip()
    ids = sft.encode_text(tokenizer, text[:2000])  # more than is ever read
    prompt = tokenizer.decode(ids[:length])
    rest = tokenizer.decode(ids[length : length + max_completion_length - 1])
    ends = [match.end() for match in SENTENCE_END.finditer(rest)]
    completion = rest[: ends[-1]] if ends else ""
    # A text cut inside a letter has other tokens than the review.
    same = len(sft.encode_text(tokenizer, prompt)) == length
    fits = len(sft.encode_text(tokenizer, completion)) < max_completion_length
    return (prompt, completion) if same and fits and completion.strip() else None


def main(args):
    tokenizer, rng = gpt2.load_tokenizer(args.model), random.Random(args.seed)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        texts = [row["text"] for row in sft.read_jsonl(f"{args.texts}/sft_{split}.jsonl", ["text"])]
        texts = [text for text in texts if len(text) > 200]
        rng.shuffle(texts)
        texts = texts[: args.test_rows] if split == "test" else texts
        found = [
            split_review(text, rng.randint(2, 8), tokenizer, args.max_completion_length)
            for text in texts
        ]
        found = [pair for pair in found if pair]
        sft.check(found, f"{args.texts}/sft_{split}.jsonl has no review that can be used")
        print(f"{split}: {len(found)} of {len(texts)} reviews of more than 200 letters")
        rows = {"sft": [{"prompt": prompt, "completion": rest} for prompt, rest in found]}
        rows["prompts"] = [{"prompt": prompt} for prompt, _ in found]
        for name, part in rows.items():
            lines = "".join(json.dumps(row) + "\n" for row in part)
            sft.write_file(Path(args.out) / f"{name}_{split}.jsonl", lines.encode())


if __name__ == "__main__":
    main(args)
