"""The sums of data/arithmetic.py: files, splits, noise, vocabulary."""

import json
import math
import random
import sys
from collections import Counter

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))

import arithmetic

FOLDER = ROOT / "data" / "arithmetic"
SIZES = {"sft_train": 20_000, "sft_test": 1_000, "prompts_train": 2_000, "prompts_test": 500}


@pytest.fixture(scope="module")
def files():
    """Each committed .jsonl file's rows, by name."""
    return {
        name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").open()] for name in SIZES
    }


@pytest.fixture(scope="module")
def facts():
    return json.loads((FOLDER / "facts.json").read_text())


def numbers(row):
    """'47+85=' -> (47, 85)."""
    assert row["prompt"][2::3] == "+=" and len(row["prompt"]) == 6
    return int(row["prompt"][:2]), int(row["prompt"][3:5])


def errors(rows):
    return Counter(int(row["completion"]) - sum(numbers(row)) for row in rows)


def test_sizes_and_fields(files):
    assert {name: len(rows) for name, rows in files.items()} == SIZES
    for name, rows in files.items():
        fields = {"prompt", "completion" if name.startswith("sft") else "answer"}
        assert all(row.keys() == fields for row in rows)
        assert all(isinstance(value, str) for row in rows for value in row.values())


def test_numbers_have_two_digits_and_stand_in_either_order(files):
    for rows in files.values():
        pairs = [numbers(row) for row in rows]
        assert all(10 <= n <= 99 for pair in pairs for n in pair)
        assert 0.4 < sum(a > b for a, b in pairs) / len(pairs) < 0.6


def test_no_test_pair_is_in_a_train_file_in_either_order(files):
    pairs = {
        split: {frozenset(numbers(row)) for name in SIZES if split in name for row in files[name]}
        for split in ("train", "test")
    }
    assert not pairs["train"] & pairs["test"]
    assert len(pairs["test"]) == 500 and len(pairs["train"]) > 3_000


def test_answers_are_right(files):
    for name in ("prompts_train", "prompts_test"):
        assert all(row["answer"] == str(sum(numbers(row))) for row in files[name])
        assert len({frozenset(numbers(row)) for row in files[name]}) == SIZES[name]


def test_the_stated_share_of_demonstrations_is_wrong(files, facts):
    for split in ("train", "test"):
        counts = errors(files[f"sft_{split}"])
        total = counts.total()
        assert facts[f"sft_{split}_wrong"] == pytest.approx(1 - counts[0] / total, abs=1e-9)
        assert counts.keys() == {0, *arithmetic.ERRORS}
        for error, count in counts.items():
            share = arithmetic.WRONG / 4 if error else 1 - arithmetic.WRONG
            assert abs(count / total - share) < 4 * math.sqrt(share * (1 - share) / total)


def test_a_carry_is_as_often_wrong_as_no_carry(files):
    carries = [row for row in files["sft_train"] if sum(n % 10 for n in numbers(row)) > 9]
    assert 0.4 < len(carries) / SIZES["sft_train"] < 0.6
    assert abs(errors(carries)[0] / len(carries) - (1 - arithmetic.WRONG)) < 0.02


def test_the_floor_is_the_mean_of_minus_log_p(files, facts):
    p = {0: 0.4} | dict.fromkeys((-10, -1, 1, 10), 0.15)
    nats = -sum(n * math.log(p[error]) for error, n in errors(files["sft_test"]).items())
    tokens = sum(len(row["completion"]) + 1 for row in files["sft_test"])
    assert facts["sft_test_floor_nats_per_token"] == pytest.approx(nats / tokens, abs=1e-6)
    assert facts["sft_test_nats_per_answer"] == pytest.approx(nats / 1_000, abs=1e-6)


def test_vocabulary_is_the_bytes_and_two_special_tokens(facts):
    file = json.loads((FOLDER / "tokenizer" / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in file["added_tokens"]}
    assert special.keys() == {"<|endoftext|>", "<|pad|>"}
    assert {*file["model"]["vocab"].values(), *special.values()} == set(range(facts["vocab_size"]))
    assert file["model"]["merges"] == [] and facts["vocab_size"] == 258


def test_the_tokenizer_reads_digits_one_by_one(files, facts):
    import gpt2

    tokenizer = gpt2.load_tokenizer(FOLDER / "tokenizer")
    single = {digit: tokenizer.encode_ordinary(digit) for digit in "0123456789+="}
    assert all(len(ids) == 1 for ids in single.values())
    for row in random.Random(0).sample(files["sft_train"], 200):
        for text in row.values():
            assert tokenizer.encode_ordinary(text) == [i for c in text for i in single[c]]
    text = "Ünïcode 中 <|endoftext|>\n"
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert max(len(row["prompt"]) for row in files["sft_train"]) == facts["prompt_tokens"]
    longest = max(len(row["completion"]) for row in files["sft_train"])
    assert longest + 1 == facts["completion_tokens_with_eos_max"]
