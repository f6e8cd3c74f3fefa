"""Anthropic's HH-RLHF dialogues as prompts, completions and preference pairs.

Each row of the source holds two whole dialogues, {"chosen", "rejected"}, meant to differ in
the assistant's last turn only. That turn is the completion (it keeps its leading space), and all
before it, up to and including its "\\n\\nAssistant:", is the prompt. Rows where this does not work
are dropped, and counted by reason.

Run `python data/hh_rlhf.py harmless-base-test.jsonl.gz data/hh` (plain or .gz; from
https://github.com/anthropics/hh-rlhf, MIT licence; the content is offensive). It writes
preferences_{train,test}.jsonl, sft_{train,test}.jsonl (the chosen completion) and
prompts_{train,test}.jsonl (each prompt once). The last rows of the source are the test split.
"""

import argparse
import collections
import gzip
import json
import sys
from pathlib import Path

ASSISTANT = "\n\nAssistant:"


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


def split_dialogue(text):
    """(the prompt, up to and including the last "\n\\nAssistant:", and what follows it)."""
    end = text.rfind(ASSISTANT) + len(ASSISTANT)
    return text[:end], text[end:]


def convert(row):
    """One row as {"prompt", "chosen", "rejected"}, or as text the reason why it cannot be used."""
    if ASSISTANT not in row["chosen"] or ASSISTANT not in row["rejected"]:
        return "no assistant turn"
    prompt, chosen = split_dialogue(row["chosen"])
    rejected_prompt, rejected = split_dialogue(row["rejected"])
    if prompt != rejected_prompt:
        return "the two dialogues differ before the last turn"
    if not chosen.strip() or not rejected.strip():
        return "empty last turn"
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def convert_all(rows):
    """The rows that can be used, and how many cannot for each reason."""
    converted = [convert(row) for row in rows]
    dropped = collections.Counter(row for row in converted if isinstance(row, str))
    return [row for row in converted if isinstance(row, dict)], dropped


def main(arguments=None):
    """Reads the source, converts both splits, writes six files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="a .jsonl or .jsonl.gz file of HH-RLHF")
    parser.add_argument("output", help="the folder to write to")
    parser.add_argument(
        "--test-rows",
        type=int,
        default=312,
        help="how many of the source's last rows make the test split (default: %(default)s)",
    )
    args = parser.parse_args(arguments)
    rows = read_rows(args.input, ("chosen", "rejected"))
    if not 0 < args.test_rows < len(rows):
        fail(
            f"--test-rows {args.test_rows} should be at least 1 and less than {len(rows)}, all rows"
        )
    for split, part in (("train", rows[: -args.test_rows]), ("test", rows[-args.test_rows :])):
        pairs, dropped = convert_all(part)
        for reason, count in sorted(dropped.items()):
            print(f"{split}: {count} of {len(part)} rows dropped: {reason}")
        if not pairs:
            fail(f"{args.input}: no row of the {split} split can be used")
        sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
        prompts = [{"prompt": prompt} for prompt in dict.fromkeys(row["prompt"] for row in pairs)]
        write_rows(args.output, f"preferences_{split}", pairs)
        write_rows(args.output, f"sft_{split}", sft)
        write_rows(args.output, f"prompts_{split}", prompts)


if __name__ == "__main__":
    main()
