"""GSM8K, school mathematics in words, as prompts with worked answers.

The prompt is "Question: ...\\nAnswer:", the completion the whole worked answer, which ends in
"#### 72". Prompt files also have "answer", that last number as text without commas, for a reward
function to compare with.

Run `python data/gsm8k.py FOLDER data/math`, where FOLDER holds train.jsonl and test.jsonl from
https://github.com/openai/grade-school-math (MIT licence). It writes sft_{train,test}.jsonl and
prompts_{train,test}.jsonl.
"""

import argparse
import gzip
import json
import re
import sys
from pathlib import Path


def fail(message):
    """Bad input ends a script with one line and exit status 2, as a wrong flag does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_rows(path, fields):
    """The rows of a JSON Lines file, plain or .gz: dicts in which each of `fields` is a string."""
    rows = []
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        fail(f"no file {path}")
    except (OSError, EOFError) as error:
        fail(f"cannot read {path}: {error}")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            fail(f"{path}, line {number} is not JSON: {error}")
        for field in fields:
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                fail(f'{path}, line {number}: no text under "{field}"')
        rows.append(row)
    return rows or fail(f"{path} holds no rows")


def write_rows(folder, name, rows):
    """Writes folder/name.jsonl and says how many rows it has."""
    path = Path(folder) / f"{name}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as error:
        fail(f"cannot write {path}: {error}")
    print(f"{path}: {len(rows)} rows")


def final_answer(text):
    """The number after the last "####", without commas; None where there is none."""
    match = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)\s*$", text)
    return match[1].replace(",", "") if match else None


def main(arguments=None):
    """Reads both splits, writes four files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="the folder with GSM8K's train.jsonl and test.jsonl")
    parser.add_argument("output", help="the folder to write to")
    args = parser.parse_args(arguments)
    for split in ("train", "test"):
        path = Path(args.input) / f"{split}.jsonl"
        sft, prompts = [], []
        for number, row in enumerate(read_rows(path, ("question", "answer")), 1):
            answer = final_answer(row["answer"])
            if answer is None:
                fail(f'{path}, line {number}: "answer" does not end in #### and a number')
            prompt = f"Question: {row['question']}\nAnswer:"
            sft.append({"prompt": prompt, "completion": " " + row["answer"]})
            prompts.append({"prompt": prompt, "answer": answer})
        write_rows(args.output, f"sft_{split}", sft)
        write_rows(args.output, f"prompts_{split}", prompts)


if __name__ == "__main__":
    main()
