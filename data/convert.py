"""Whatever Hugging Face's `datasets` reads, as the JSON Lines that the scripts read.

    python data/convert.py chats.parquet data/chats
    python data/convert.py HuggingFaceH4/ultrafeedback_binarized data/uf
      --split train_prefs --test-split test_prefs
    python data/convert.py sums.csv data/sums
      --prompt question --completion answer --as-chat

SOURCE is a file (.csv, .tsv, .parquet, .arrow, .json, .jsonl, or .gz of one),
a folder of such files or of save_to_disk, or a hub name. Its columns decide
what is written, as OUT/{sft,preferences,prompts}_{train,test}.jsonl:

    chosen, rejected      preferences, sft (the chosen answers), prompts
    messages              sft (the last turn is the completion), prompts
    prompt, completion    sft, prompts
    prompt                prompts
    text                  sft

Lists of {role, content} become text by --template; the plain one is HH-RLHF's
form, "\\n\\nHuman: ...\\n\\nAssistant: ...". Without a prompt column, chosen and
rejected are whole dialogues (lists, or texts in that form), split before the
last turn. Other texts stay as they are. Prompts keep the source's other
columns, for reward functions; rows that are equal are written once. Rows that
cannot be used are counted by reason.
"""

import collections
import datetime
import gzip
import itertools
import json
import logging
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

ASSISTANT = "\n\nAssistant:"
SPEAKERS = {"user": "Human", "assistant": "Assistant"}
shared_start = os.path.commonprefix  # of any texts, letter by letter
READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
READERS |= {".json": "json", ".jsonl": "json"}
KINDS = {  # columns, and what is made of them; the first that the source has
    ("chosen", "rejected"): ["preferences", "sft", "prompts"],
    ("messages",): ["sft", "prompts"],
    ("prompt", "completion"): ["sft", "prompts"],
    ("prompt",): ["prompts"],
    ("text",): ["sft"],
}


@dataclass(frozen=True)
class Args:
    # a file, a folder, or the name of a data set on the hub
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    # the folder to write to
    out: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
    kind: Literal["sft", "preferences", "prompts"] | None = None  # write only this; default: all
    prompt: str = "prompt"  # the name of the source's column; so the five below
    completion: str = "completion"
    chosen: str = "chosen"
    rejected: str = "rejected"
    messages: str = "messages"
    text: str = "text"
    # plain; a tokenizer's folder, for its chat template; or keep: only prompts, as lists
    template: str = "plain"
    as_chat: bool = False  # a text is a turn too: a prompt the user's, an answer the assistant's
    config: str | None = None  # of a data set on the hub that has several
    split: str = "train"  # the split to read
    test_split: str | None = None  # the held-out split; default: the last rows of --split
    test_rows: int | None = None  # how many of these; default: a twentieth, at most 256
    limit: int | None = None  # read at most so many rows of a split


class Dropped(Exception):
    """Why a row cannot be used."""


def fail(message):
    """Bad input ends a script with one line and exit status 2, as a wrong flag does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


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


# -------------------------------------------------------------------------------------------- read


def read_json(path):
    """Rows of JSON Lines or of a JSON array. (`datasets` makes a date of a text "2026-01-31".)"""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    content = content.decode("utf-8-sig")
    rows = json.loads(content) if content.lstrip().startswith("[") else []
    for number, line in enumerate([] if rows else content.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError('not all rows are objects {"column": value}')
    return rows


def read_split(args, split):
    """The rows of a split."""
    path = Path(args.source)
    reader = READERS.get(Path(args.source.removesuffix(".gz")).suffix)
    if not path.exists() and (reader or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", args.source)):
        fail(f"no file or folder {path}")  # and no name of a data set on the hub
    if path.is_file() and not reader:
        fail(f"{path} ends in none of {', '.join(READERS)}")
    if path.is_file() and split != "train":
        fail(f'{path} is one file: it has no split "{split}", only "train"')
    try:
        if path.is_file() and reader == "json":
            return read_json(path)[: args.limit]
        import datasets
        import pandas  # datasets brings it

        for name in ("datasets", "huggingface_hub"):  # they log what the exception says, too
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if path.exists():
            datasets.disable_progress_bars()
        if path.is_file() and reader == "csv":  # all as text: "007" is no number, "None" no gap
            options = {"dtype": str, "keep_default_na": False, "nrows": args.limit}
            separator = "\t" if ".tsv" in path.suffixes else ","
            return pandas.read_csv(path, sep=separator, **options).to_dict("records")
        if path.is_file():
            rows = datasets.load_dataset(reader, data_files=args.source, split=split)
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(args.source)
            saved = saved if isinstance(saved, dict) else {"train": saved}
            if split not in saved:
                fail(f'{path} has no split "{split}", but {", ".join(saved)}')
            rows = saved[split]
        else:
            rows = datasets.load_dataset(args.source, args.config, split=split)
        return list(rows.select(range(min(args.limit or len(rows), len(rows)))))
    except ImportError as error:
        fail(f"{error}: run `pip install datasets`")
    except Exception as error:  # each format has its own
        reason = str(error.__cause__ or error) or type(error).__name__
        fail(f"cannot read {args.source}: {' '.join(reason.split())}")


# ---------------------------------------------------------------------------------------- template


def plain_template(messages, add_generation_prompt=False):
    """HH-RLHF's form, for models that know no chat."""
    if not all(isinstance(x.get("content"), str) for x in messages):
        raise Dropped("a message's content is no text")
    turns = [(SPEAKERS.get(x["role"], x["role"].capitalize()), x["content"]) for x in messages]
    text = "".join(f"\n\n{speaker}: {content}" for speaker, content in turns)
    return text + ASSISTANT * add_generation_prompt


def load_template(folder):
    """(the folder's chat template, a function like plain_template; EOS), as in transformers."""
    try:
        import jinja2.ext
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        fail(f"{error}: run `pip install jinja2`")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # jinja2's own escapes for HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    if not Path(folder).is_dir():
        fail(f"no folder {folder}: --template is plain, keep, or a tokenizer's folder")
    try:
        names = "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
        paths = [Path(folder) / name for name in names]
        texts = [path.read_text("utf-8") if path.is_file() else "" for path in paths]
        config, old = (json.loads(text or "{}") for text in texts[:2])
        config |= {} if "added_tokens_decoder" in config else old
        source = texts[2] or config.get("chat_template")
        if isinstance(source, list):
            source = {x["name"]: x["template"] for x in source}.get("default")
        if not source:
            fail(f"{folder} has no chat template, neither in {names[0]} nor as {names[2]}")
        # {% generation %} marks what to train on; only what is in it matters here.
        source = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})", r"\1with\2", source)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals["raise_exception"] = raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        template = environment.from_string(source)
    except (OSError, ValueError, jinja2.TemplateError) as error:
        fail(f"cannot read the chat template of {folder}: {error}")
    known = {x: y.get("content") if isinstance(y, dict) else y for x, y in config.items()}
    known = {x: y for x, y in known.items() if x.endswith("_token") and isinstance(y, str)}
    known |= {"tools": None, "documents": None}

    def render(messages, add_generation_prompt=False):
        flag = {"add_generation_prompt": add_generation_prompt}
        try:
            return template.render(messages=messages, **flag, **known)
        except Exception as error:  # a template is a program
            raise Dropped(f"the template fails: {error}") from error

    return render, known.get("eos_token", "")


# ----------------------------------------------------------------------------------------- convert


def read_field(row, column):
    """A text or a list of messages."""
    value = row.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    messages = value if isinstance(value, list) else []
    good = [isinstance(x, dict) and isinstance(x.get("role"), str) for x in messages]
    if not isinstance(value, str) and not (good and all(good)):
        raise Dropped(f'neither a text nor messages {{role, content}} under "{column}"')
    # A table has None where a message lacks what others have; templates must not see it.
    return [{x: y for x, y in message.items() if y is not None} for message in messages] or value


def read_dialogue(text):
    """The messages of a text in HH-RLHF's form."""
    start, *turns = re.split(r"\n\n(Human|Assistant):", text)
    if start.strip() or not turns:
        raise Dropped("not of the form Human: ... Assistant: ...")
    roles = {speaker: role for role, speaker in SPEAKERS.items()}
    return [{"role": roles[x], "content": y.strip()} for x, y in zip(turns[::2], turns[1::2])]


def last_turn(dialogue):
    """(what comes before the assistant's last turn, that turn) of a text or a list of messages."""
    if isinstance(dialogue, str):
        if ASSISTANT not in dialogue:
            raise Dropped("no assistant turn")
        end = dialogue.rfind(ASSISTANT) + len(ASSISTANT)
        return dialogue[:end], dialogue[end:]
    if dialogue[-1]["role"] != "assistant":
        raise Dropped("the last turn is not the assistant's")
    return dialogue[:-1], dialogue[-1:]


def split_row(row, form, columns, args):
    """(prompt, answers), each a text or a list of messages."""
    fields = {name: read_field(row, columns[name]) for name in form}
    prompt, answers = fields.pop("prompt", None), list(fields.values())
    whole = [isinstance(x, list) and x[0]["role"] != "assistant" for x in answers]
    if prompt is None or any(whole):
        if args.as_chat or args.template != "plain":
            answers = [read_dialogue(x) if isinstance(x, str) else x for x in answers]
        last = answers[0][-1] if whole[0] else {"role": "assistant"}
        if args.kind == "prompts" and form == ("messages",) and last["role"] != "assistant":
            return answers[0], []  # not answered yet
        halves = [last_turn(x) for x in answers]
        if halves[0][0] != halves[-1][0]:
            raise Dropped("the two dialogues differ before the last turn")
        prompt, answers = halves[0][0], [answer for _, answer in halves]
    contents = [x if isinstance(x, str) else x[-1].get("content") for x in answers]
    if any(isinstance(x, str) and not x.strip() for x in contents):
        raise Dropped("empty answer")
    return prompt, answers


def render_row(prompt, answers, template, eos, as_chat):
    """[prompt, *answers] as texts."""
    row = [prompt, *answers]
    if not as_chat and all(isinstance(x, str) for x in row):
        return row
    roles = ["user", "assistant", "assistant"]
    row = [[{"role": y, "content": x}] if isinstance(x, str) else x for x, y in zip(row, roles)]
    prompt, *answers = row
    if not prompt or prompt[-1]["role"] in ("assistant", "system"):
        raise Dropped("the prompt's last turn is not the user's")
    if template is None:
        return row
    # What a template makes of an answer may depend on the prompt, so dialogues are rendered whole.
    asked = template(prompt, add_generation_prompt=True)
    whole = [template(prompt + answer) for answer in answers]
    start = shared_start([asked, *whole])  # as in TRL: DeepSeek-R1's asks for more than it keeps
    if len(start) < len(shared_start([asked, template(prompt)])):
        raise Dropped("the template changes a prompt that has an answer")
    # The scripts put EOS after a completion, so a template's own one is cut off.
    end = re.compile(rf"{re.escape(eos)}\s*$" if eos else "(?!)")
    return [start, *(end.sub("", text[len(start) :]) for text in whole)]


def find_form(rows, args):
    """(the fields that a row is made of, {field: its column}, the kinds to write)."""
    present = {name for row in rows for name in row}
    columns = {x: getattr(args, x) for x in dict.fromkeys(itertools.chain(*KINDS))}
    for name, column in columns.items():
        if column not in {name, *present}:
            fail(f"--{name} {column}: there are only {', '.join(sorted(present))}")
    form = next((x for x in KINDS if present.issuperset(columns[y] for y in x)), None)
    if form is None:
        flags = ", ".join(f"--{name}" for name in columns)
        fail(f"what are the columns {', '.join(sorted(present))}? Name them with {flags}")
    kinds = [x for x in KINDS[form] if args.kind in (None, x)]
    if args.template == "keep":  # lists are read as prompts only
        kinds = [x for x in kinds if x == "prompts"]
    if not kinds:
        fail(f"the columns {', '.join(columns[x] for x in form)} give {', '.join(KINDS[form])}")
    if "chosen" in form and columns["prompt"] in present:
        form = ("prompt", *form)
    return form, columns, kinds


def convert(rows, form, columns, template, eos, args):
    """({kind: its rows}, how many rows were dropped for each reason)."""
    found, dropped = collections.defaultdict(list), collections.Counter()
    rendered = {columns[name] for name in ("prompt", "messages", "chosen", "rejected")}
    for row in rows:
        try:
            if form == ("text",):
                if not isinstance(row.get(columns["text"]), str) or not row[columns["text"]]:
                    raise Dropped("no text")
                found["sft"].append({"text": row[columns["text"]]})
                continue
            prompt, answers = split_row(row, form, columns, args)
            prompt, *answers = render_row(prompt, answers, template, eos, args.as_chat)
            margin = row.get("margin") if len(answers) == 2 else None  # reward.py reads it
            margin = {} if margin in (None, "") else {"margin": float(margin)}
        except (Dropped, ValueError) as reason:
            dropped[str(reason)] += 1
            continue
        prompt = {"prompt": prompt}
        found["prompts"].append(prompt | {x: y for x, y in row.items() if x not in rendered})
        if answers:
            found["sft"].append(prompt | {"completion": answers[0]})
        if len(answers) == 2:
            pair = {"chosen": answers[0], "rejected": answers[1]}
            found["preferences"].append(prompt | pair | margin)
    # What JSON lacks becomes text (dates) or null (NaN).
    once = dict.fromkeys(json.dumps(row, default=str) for row in found["prompts"])
    found["prompts"] = [json.loads(text, parse_constant=lambda _: None) for text in once]
    return found, dropped


def print_commands(out, kinds, template):
    """What comes next. The lengths depend on the model's tokens: the scripts name them."""
    model = "gpt2" if template != "keep" else "FOLDER"
    for kind, script in (
        ("sft", "sft.py --learning-rate 2e-5"),
        ("preferences", "dpo.py --learning-rate 1e-6 --nll-coef 0"),
        ("prompts", "grpo.py --learning-rate 1e-6 --reward FILE.py:FUNCTION"),
    ):
        if kind in kinds:
            files = f"--dataset {out}/{kind}_train.jsonl --eval-dataset {out}/{kind}_test.jsonl"
            script = script if template != "keep" else script.replace("grpo", "grpo_llama")
            print(f"python {script} --model {model} {files} --run-dir runs/{Path(out).name}_{kind}")
            model = f"runs/{Path(out).name}_sft/model" if "sft" in kinds else model


def main(args):
    """Reads the splits, converts them, writes a file for each kind and split."""
    for flag, value in (("--limit", args.limit), ("--test-rows", args.test_rows)):
        if value is not None and value < 1:
            fail(f"{flag} should be at least 1")
    if args.test_split and args.test_rows:
        fail("--test-rows are the last of --split: leave it out, or --test-split")
    template, eos = (plain_template if args.template == "plain" else None), ""
    if args.template not in ("plain", "keep"):
        template, eos = load_template(args.template)
    rows = read_split(args, args.split)
    if args.test_split:
        parts = {"train": rows, "test": read_split(args, args.test_split)}
    else:
        count = args.test_rows or min(256, -(-len(rows) // 20))
        parts = {"train": rows[:-count], "test": rows[-count:]}
    if not all(parts.values()):
        fail(f"{args.source}: {len(rows)} rows leave none to train on, or none to hold out")
    form, columns, kinds = find_form(rows, args)
    for split, part in parts.items():
        found, dropped = convert(part, form, columns, template, eos, args)
        for reason, count in sorted(dropped.items()):
            print(f"{split}: {count} of {len(part)} rows dropped: {reason}")
        if sum(dropped.values()) == len(part):
            fail(f"{args.source}: no row of the {split} split can be used")
        for kind in kinds:
            write_rows(args.out, f"{kind}_{split}", found[kind])
    print_commands(args.out, kinds, args.template)


if __name__ == "__main__":
    main(tyro.cli(Args, description=textwrap.indent(__doc__, " ")))
