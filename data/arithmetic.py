"""Sums of two-digit numbers, shown with many wrong answers: a small task with an exact reward.

    prompt "47+85="    completion "132"

The demonstrations are noisy: a share WRONG of them is one off or ten off (as a forgotten carry
is), each of the four errors equally often. Supervised fine-tuning learns the noise as well: on the
test prompts about 45 % of its samples are right, while its likeliest answer nearly always is. A
reward for the right answer (rewards.py:numeric_answer) then makes nearly every sample right, on
sums that were never shown: no test pair of numbers is in a train file, in either order.

Run `python data/arithmetic.py` to write data/arithmetic/ (a second, the same bytes every time):

    sft_{train,test}.jsonl      prompt, completion
    prompts_{train,test}.jsonl  prompt, answer (the right one, as text)
    tokenizer/                  the 256 bytes, so each digit is one token; no merges; two specials
    facts.json                  shares of wrong demonstrations, floor of the SFT loss, lengths

From demonstrations to right answers:

    python sft.py --tokenizer data/arithmetic/tokenizer \\
        --dataset data/arithmetic/sft_train.jsonl --eval-dataset data/arithmetic/sft_test.jsonl \\
        --epochs 5 --learning-rate 1e-3 --max-prompt-length 6 --max-completion-length 4 \\
        --run-dir runs/arithmetic-sft
    python grpo.py --model runs/arithmetic-sft/model --reward rewards.py:numeric_answer \\
        --dataset data/arithmetic/prompts_train.jsonl \\
        --eval-dataset data/arithmetic/prompts_test.jsonl \\
        --steps 150 --batch-size 512 --micro-batch-size 256 --learning-rate 1e-3 --kl-coef 0 \\
        --max-prompt-length 6 --max-completion-length 4 --run-dir runs/arithmetic-grpo
"""

import itertools
import json
import math
import random
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "arithmetic"
VOCAB_SIZE = 258  # the bytes and two special tokens, so that no merge is left to learn
NUMBERS = range(10, 100)
WRONG = 0.6  # share of wrong demonstrations; the right answer is still the commonest
ERRORS = (-10, -1, 1, 10)  # what a wrong answer is off by
TEST_PAIRS = 500  # of the 4095 pairs of numbers


def split_pairs():
    """The pairs (a, b), a <= b, of the train files and those of the test files."""
    pairs = list(itertools.combinations_with_replacement(NUMBERS, 2))
    random.Random("arithmetic pairs").shuffle(pairs)
    return pairs[TEST_PAIRS:], pairs[:TEST_PAIRS]


def make_prompt(rng, pair):
    """'47+85=', the two numbers in random order."""
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    return f"{a}+{b}="


def make_demonstration(rng, pair):
    """A prompt and an answer that is wrong with probability WRONG."""
    error = rng.choice(ERRORS) if rng.random() < WRONG else 0
    return {"prompt": make_prompt(rng, pair), "completion": str(sum(pair) + error)}


def make_rows():
    """All files' rows: name -> list of dicts. Each file has a random stream of its own."""
    files = {}
    train, test = split_pairs()
    for split, pairs, sft_rows, prompt_rows in (
        ("train", train, 20_000, 2_000),
        ("test", test, 1_000, TEST_PAIRS),
    ):
        rng = random.Random(f"arithmetic sft {split}")
        files[f"sft_{split}"] = [
            make_demonstration(rng, rng.choice(pairs)) for _ in range(sft_rows)
        ]
        rng = random.Random(f"arithmetic prompts {split}")
        files[f"prompts_{split}"] = [
            {"prompt": make_prompt(rng, pair), "answer": str(sum(pair))}
            for pair in rng.sample(pairs, prompt_rows)
        ]
    return files


def train_tokenizer(texts, folder):
    """A byte-level BPE vocabulary in GPT-2's manner: 256 bytes, merges in order, two specials."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|pad|>"])  # after the merges, as GPT-2 has it
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GPT2TokenizerFast", "pad_token": "<|pad|>"}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return tokenizer


def error_of(row):
    """How far a demonstration's answer is from the right one."""
    a, b = row["prompt"].rstrip("=").split("+")
    return int(row["completion"]) - int(a) - int(b)


def make_facts(files):
    """What is known about the files. A character is a token, and EOS is one more."""
    test = files["sft_test"]
    nats = [-math.log(WRONG / len(ERRORS) if error_of(row) else 1 - WRONG) for row in test]
    tokens = sum(len(row["completion"]) + 1 for row in test)
    facts = {
        f"sft_{split}_wrong": sum(error_of(row) != 0 for row in rows) / len(rows)
        for split, rows in (("train", files["sft_train"]), ("test", test))
    }
    facts |= {
        "sft_test_floor_nats_per_token": round(sum(nats) / tokens, 6),
        "sft_test_nats_per_answer": round(sum(nats) / len(test), 6),
        "vocab_size": VOCAB_SIZE,
        "prompt_tokens": max(len(row["prompt"]) for row in test),
        "completion_tokens_with_eos_max": max(len(row["completion"]) + 1 for row in test),
    }
    return facts


def main():
    """Write every file of data/arithmetic/."""
    files = make_rows()
    train_tokenizer([], FOLDER / "tokenizer")
    facts = make_facts(files)
    for name, rows in files.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (FOLDER / f"{name}.jsonl").write_text("".join(lines), newline="\n")
    (FOLDER / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
