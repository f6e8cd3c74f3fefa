"""Bad input to the training scripts: one sentence, exit status 2; and --help."""

import dataclasses
import gzip
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from test_runs import (
    ALL,
    DATA,
    REVIEWS,
    ROOT,
    Crash,
    command,
    each_of,
    first_rows,
    make_inputs,
    metrics_of,
    small_args,
    train,
    write_jsonl,
)

import dpo
import gpt2
import grpo
import iterative_dpo
import mixed_precision
import ppo
import reward
import sft
import sharded

names = [script.__name__ for script in ALL]
each_script = each_of(*ALL)
SAMPLERS = (ppo, grpo, iterative_dpo, sharded)  # those that have their own samples scored
GRPO = (grpo, sharded)
GROUPED = (grpo, iterative_dpo, sharded)
POLICY_GRADIENTS = (ppo, grpo, sharded)
PAIRS = (dpo, iterative_dpo)
REWARDS = """
import functools, sys
import neighbour
def short(completions, **_): return [1.0]
def forgets(completions, **_): len(completions)
def broken(completions, **_): return [1 / 0 for _ in completions]
def nan(completions, **_): return [float("nan")] * len(completions)
def one(completions, **_): return [1.0] * len(completions)
def by_prompt(prompts, **_): return [len(prompt) for prompt in prompts]
def strict(prompts, completions): return [1.0] * len(completions)
def leaves(completions, **_): sys.exit(0)
no_function = {"good"}
class Object:
    def __call__(self, completions, **_): return [len(text) for text in completions]
instance = Object()
def times(completions, by, **_): return [by * len(text) for text in completions]
partial = functools.partial(times, by=1)
def elsewhere(completions, **_): return map(neighbour.length, completions)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Those of a run, and models that do not fit."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    (config, params), (_, scorer) = (sft.load_model(folder / name) for name in ("lm", "scorer"))
    size, table = config.vocab_size - 5, params["wte"]["embedding"]
    fewer = params | {"wte": {"embedding": table[:size]}}
    small = dataclasses.replace(config, vocab_size=size, eos_token_id=None, pad_token_id=None)
    sft.save_model(folder / "few_ids", small, fewer, folder / "lm")
    fewer = scorer | {"wpe": {"embedding": scorer["wpe"]["embedding"][:20]}}
    short = dataclasses.replace(config, n_positions=20)
    sft.save_model(folder / "short", short, fewer, folder / "scorer")
    norm = {"scale": params["ln_f"]["scale"], "bias": params["ln_f"]["bias"].at[0].add(1.0)}
    often = {"embedding": table.at[config.eos_token_id].set(jnp.eye(1, 32)[0] * 3)}
    sft.save_model(folder / "ends", config, params | {"ln_f": norm, "wte": often}, folder / "lm")
    sft.save_model(folder / "llama", config, params, folder / "lm")
    saved = json.loads((folder / "llama" / "config.json").read_text("utf-8"))
    (folder / "llama" / "config.json").write_text(json.dumps(saved | {"model_type": "llama"}))
    sft.save_model(folder / "foreign", config, scorer, folder / "lm")  # its tokenizer lacks a merge
    saved = json.loads((folder / "foreign" / "tokenizer.json").read_text("utf-8"))
    last = saved["model"]["merges"].pop()
    del saved["model"]["vocab"]["".join(last if isinstance(last, list) else last.split(" "))]
    (folder / "foreign" / "tokenizer.json").write_text(json.dumps(saved), "utf-8")
    eos_id, pad_id = config.eos_token_id, config.pad_token_id  # whose PAD is the other's EOS
    swapped = dataclasses.replace(config, eos_token_id=pad_id, pad_token_id=eos_id)
    sft.save_model(folder / "swapped", swapped, scorer, folder / "lm")
    text = (folder / "lm" / "tokenizer.json").read_text("utf-8")
    for token, other in ((eos_id, "x"), (pad_id, eos_id), ("x", pad_id)):
        text = text.replace(f'"id": {token},', f'"id": {other},')
    (folder / "swapped" / "tokenizer.json").write_text(text, "utf-8")
    return folder


@pytest.fixture
def rewards(tmp_path):
    (tmp_path / "neighbour.py").write_text("length = len")
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def refused(inputs, tmp_path, error_line, monkeypatch):
    """refused(script, **changes) -> the line by which the script refuses these arguments."""
    monkeypatch.chdir(tmp_path)

    def call(script, traceback_of=None, **changes):
        changes = {"model": str(inputs / "lm")} | changes
        args = small_args(script, inputs, "run", **changes)
        message = error_line(script.main, args, traceback_of=traceback_of)
        assert not (tmp_path / "run" / "model").exists()
        return message

    return call


# ------------------------------------------------------------------------------ data


def fields_of(script):
    answers = {"sft": ["completion"], "preferences": ["chosen", "rejected"]}
    return ["prompt", *answers.get(DATA.get(script), [])]


def rows_of(script):
    return first_rows(f"{DATA.get(script, 'prompts')}_train", 12)


@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
@each_script
def test_a_file_that_cannot_be_read(script, flag, refused, tmp_path):
    """It is missing, empty, or one of its lines is no object with texts in its fields."""
    path = tmp_path / "rows.jsonl"
    assert str(path) in refused(script, **{flag: str(path)})
    path.write_text("")
    assert f"{path} holds no rows" in refused(script, **{flag: str(path)})

    form = ", ".join(f'"{name}": "…"' for name in fields_of(script))
    lines = [json.dumps(row) for row in rows_of(script)]
    row = json.loads(lines[4])
    bad = [(lines[4][:-9], "JSONDecodeError"), ("7", "is no object")]
    if flag == "dataset":
        bad += [(line, "is no object") for line in ("[1, 2]", '"text"', "null")]
        for name in fields_of(script):
            lacking = {other: text for other, text in row.items() if other != name}
            chat = [{"role": "user", "content": "Hi"}]
            wrong = [lacking, row | {name: chat}, row | {name: None}]
            wrong += [row | {name: ""}] if name != "prompt" else []
            bad += [(json.dumps(row), f'"{name}" is missing, empty or no text') for row in wrong]
    for line, words in bad:
        path.write_text("\n".join([*lines[:4], line, *lines[5:]]) + "\n", "utf-8")
        message = refused(script, **{flag: str(path)})
        assert f"{path}, line 5" in message and words in message
        assert f"wanted: JSON Lines in UTF-8 (or .gz of it), each {{{form}}}" in message


TWO_ROWS = [{"prompt": "né\u2028", "completion": " b"}, {"prompt": "", "completion": " d"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO_ROWS)
ZIPPED = gzip.compress(LINES.encode())
READ = {  # ways to write these rows
    "plain.jsonl": LINES.encode(),
    "byte_order_mark.jsonl": LINES.encode("utf-8-sig"),
    "crlf.jsonl": LINES.replace("\n", "\r\n").encode(),
    "blank_lines.jsonl": ("\n" + LINES.replace("\n", "\n \n") + "\t\n\n").encode(),
    "no_last_newline.jsonl": LINES.rstrip("\n").encode(),
    "zipped.jsonl.gz": ZIPPED,
    "two_members.jsonl.gz": gzip.compress(LINES[:30].encode("utf-8-sig"))
    + gzip.compress(LINES[30:].encode()),
}


@pytest.mark.parametrize("name", READ)
def test_ways_to_write_rows(name, tmp_path):
    (tmp_path / name).write_bytes(READ[name])
    assert sft.read_jsonl(tmp_path / name, ["prompt", "completion"]) == TWO_ROWS


NOT_READ = {
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16_without_a_mark.jsonl": LINES.encode("utf-16-le"),
    "latin1.jsonl": LINES.replace("\u2028", "").encode("latin-1"),
    "table.parquet": b"PAR1\x15\x04\x15\x80\xff" + bytes(range(256)),
    "table.csv": b"prompt,completion\na, b\n",
    "array.json": json.dumps(TWO_ROWS).encode(),
    "indented.json": json.dumps(TWO_ROWS, indent=2).encode(),
    "cut.jsonl.gz": ZIPPED[:-10],
    "plain_text.jsonl.gz": LINES.encode(),
    "damaged.jsonl.gz": ZIPPED[:20] + b"\xff" + ZIPPED[21:],
    "zipped.GZ": ZIPPED,
    "chat.jsonl": b'{"messages": [{"role": "user", "content": "Hi"}]}',
    "dialogues.jsonl": b'{"chosen": "\\n\\nHuman: a", "rejected": "\\n\\nHuman: b"}',
}


@pytest.mark.parametrize("name", NOT_READ)
def test_files_that_are_no_such_rows(name, tmp_path, error_line):
    """The sentence says which file, and what is read instead."""
    (tmp_path / name).write_bytes(NOT_READ[name])
    message = error_line(sft.read_jsonl, tmp_path / name, ["prompt", "completion"])
    assert str(tmp_path / name) in message and "wanted: JSON Lines in UTF-8 (or .gz" in message


@pytest.mark.parametrize(
    "value",
    ["NaN", "-Infinity", "9" * 5000, "[" * 100_000 + "]" * 100_000],
    ids=["NaN", "infinity", "5000 digits", "nested"],
)
def test_values_that_json_does_not_have(value, tmp_path, error_line):
    path = tmp_path / "rows.jsonl"
    path.write_text(LINES + f'{{"prompt": "a", "completion": " b", "margin": {value}}}\n', "utf-8")
    message = error_line(sft.read_jsonl, path, ["prompt", "completion"])
    assert f"{path}, line 3" in message and len(message) < 1000


def test_columns_are_those_of_the_whole_file(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": "7"}, {"prompt": "c", "id": None}]
    read = grpo.read_jsonl(write_jsonl(tmp_path / "rows.jsonl", rows), ["prompt"])
    assert read == [{"prompt": "a", "answer": None, "id": None} | row for row in rows]


@pytest.mark.parametrize("margin", ['"large"', "true", "[1.0]", "1e400"])
def test_a_margin_that_is_no_number(margin, refused, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [row | {"margin": 0.5} for row in rows_of(reward)])
    path.write_text(path.read_text("utf-8").replace("0.5", margin, 1), "utf-8")
    message = refused(reward, dataset=str(path))
    assert "margin" in message and str(path) in message


def test_a_margin_that_some_rows_lack_is_0_there(inputs, tmp_path, monkeypatch):
    rows = rows_of(reward)
    rows[1]["margin"], found, sizes = 0.5, [], {"batch_size": 6, "micro_batch_size": 6}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    make_batch = reward.make_batch

    def watched(rows, max_length, margins):
        if isinstance(margins, np.ndarray):  # held-out pairs have none
            found.extend(margins.tolist())
            if len(found) == 12:
                raise Crash
        return make_batch(rows, max_length, margins)

    monkeypatch.setattr(reward, "make_batch", watched)
    with pytest.raises(Crash):
        reward.main(small_args(reward, inputs, tmp_path / "run", dataset=str(path), **sizes))
    assert sorted(found) == [0.0] * 11 + [0.5]


@each_script
def test_too_few_rows_for_a_batch(script, refused, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(script)[:3])
    words = dict.fromkeys(
        GRPO, "4 prompts (--batch-size / --num-generations * --oversample), --dataset has 3"
    )
    words |= {iterative_dpo: "--prompts-per-round 24 is above the 3 prompts"}
    assert words.get(script, "--batch-size is above the 3") in refused(script, dataset=str(path))


@each_script
def test_rows_that_are_too_long(script, refused, inputs, tmp_path, capsys, monkeypatch):
    """Up to a tenth is dropped and counted, and nothing is shortened; with more the run stops."""
    _, *answers = fields_of(script)
    rows = first_rows(f"{DATA.get(script, 'prompts')}_train", 22)
    long = {"prompt": "word " * 40} | {name: " word" * 100 for name in answers}
    for i, name in zip((3, 7), [*long, "prompt"]):
        rows[i][name] = long[name]
    found, encode_rows = [], script.encode_rows

    def watched(*rest):
        found.append(encode_rows(*rest))
        return found[-1]

    monkeypatch.setattr(script, "encode_rows", watched)
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    paths = {"dataset": path, "eval_dataset": path, "model": str(inputs / "lm")}
    capsys.readouterr()
    with pytest.raises(SystemExit):  # the batch cannot be filled
        script.main(small_args(script, inputs, "run", batch_size=64, **paths))
    count = "dropped: 2 of 22 rows are longer than --max-prompt-length 16 --max-completion-length"
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("dropped")]
    assert len(lines) == 2 and all(line.startswith(count) for line in lines), lines
    decode = sft.load_tokenizer(inputs / "lm").decode
    for kept in found:
        assert [row for row, _ in kept] == [row for i, row in enumerate(rows) if i not in (3, 7)]
        for row, (prompt, *texts) in kept:
            assert decode(prompt) == row["prompt"]
            assert list(map(decode, texts)) == [row[name] + "<|endoftext|>" for name in answers]

    rows[11] = rows[12] | long
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    for flag in ("dataset", "eval_dataset"):
        message = refused(script, **{flag: path})
        assert "3 of 22 rows are longer than --max-prompt-length 16 --max-co" in message
        assert re.search(
            r"; --max-prompt-length \d+ --max-completion-length \d+ keeps 95 %", message
        )


@pytest.mark.parametrize("answers", [[], ["completion"], ["chosen", "rejected"]])
def test_the_lengths_that_are_named_keep_the_rows(answers, error_line):
    """Followed, they keep 95 % of the rows, or all of them."""
    tokenizer = sft.load_tokenizer(REVIEWS / "tokenizer")
    rng = np.random.default_rng(len(answers))
    lengths = rng.lognormal(3, 0.7, (300, 1 + len(answers))).astype(int)
    rows = [dict(zip(["prompt", *answers], ("a" * n for n in row))) for row in lengths]

    def encode(prompt, completion):
        args = SimpleNamespace(max_prompt_length=prompt, max_completion_length=completion)
        return sft.encode_rows(rows, answers, tokenizer, tokenizer.eot_token, args)

    message = error_line(encode, 16, 48 if answers else 1)
    flags = r"--max-prompt-length (\d+) --max-completion-length (\d+)"
    pattern = rf"are longer than {flags}; {flags} keeps 95 % of them, {flags} all\n"
    numbers = list(map(int, re.search(pattern, message).groups()))
    assert 285 <= len(encode(*numbers[2:4])) < 300 and len(encode(*numbers[4:])) == 300
    assert answers or numbers[3] == numbers[5] == 1  # the limit that is no hindrance stays


def test_texts_that_are_read_otherwise_than_one_may_think(capsys):
    """Special tokens that are spelled out, and prompts that end in white space: said, once each."""
    tokenizer = sft.load_tokenizer(REVIEWS / "tokenizer")
    rows = [{"prompt": "Hi ", "completion": "b"}, {"prompt": "x\n", "completion": "c"}]
    rows += [{"prompt": "x", "completion": " the<|endoftext|>"}, {"prompt": "", "completion": "b"}]
    args = SimpleNamespace(max_prompt_length=50, max_completion_length=50)
    encoded = sft.encode_rows(rows, ["completion"], tokenizer, tokenizer.eot_token, args)
    first, second = capsys.readouterr().out.splitlines()
    assert "1 rows spell a special token" in first and "<|endoftext|>" in first
    assert "2 of 4 prompts end in white space" in second
    *ids, last = encoded[2][1][1]
    assert len(ids) > 2 and tokenizer.eot_token not in ids and last == tokenizer.eot_token
    sft.encode_rows(rows[3:], ["completion"], tokenizer, tokenizer.eot_token, args)
    assert capsys.readouterr().out == ""


def test_texts_that_are_too_much_for_tiktoken():
    """A million blanks end the process there; half a character is replaced."""
    tokenizer = sft.load_tokenizer(REVIEWS / "tokenizer")
    text = "the film" + " " * 1_000_000 + "was good"
    assert tokenizer.decode(sft.encode_text(tokenizer, text)) == text
    ((_, (_, ids)),) = sft.encode_texts([{"text": text}], tokenizer, tokenizer.eot_token, 10**7)
    assert tokenizer.decode(ids[:-1]) == text
    assert tokenizer.decode(sft.encode_text(tokenizer, "a\ud800b")) == "a\ufffdb"


@each_script
def test_without_a_held_out_file_it_is_the_end_of_one_s_own(script, inputs, tmp_path, monkeypatch):
    """The last twentieth, never the film reviews; with those it is their test file."""
    fields = fields_of(script)
    rows = [{name: f"{name} {i}" for name in fields} | {"id": i} for i in range(47)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    found = []

    def stop(rows, *_):
        found.append(rows)
        if len(found) == 2:
            raise Crash
        return []

    def read(**changes):
        found.clear()
        paths = {"eval_dataset": None, "model": str(inputs / "lm")} | changes
        with pytest.raises(Crash):
            script.main(small_args(script, inputs, tmp_path / "run", **paths))
        return found

    monkeypatch.setattr(script, "encode_rows", stop)
    assert read(dataset=path) == [rows[:44], rows[44:]]
    assert [len(x) for x in read(dataset=path, eval_dataset=path)] == [47, 47]
    monkeypatch.chdir(ROOT)
    _, held_out = read(dataset=script.Args().dataset)
    test = REVIEWS / f"{DATA.get(script, 'prompts')}_test.jsonl"
    assert held_out == script.read_jsonl(test, fields)


def test_the_held_out_end_has_256_rows_at_most_and_leaves_one(tmp_path, error_line, capsys):
    def read(count):
        rows = [{"prompt": str(i)} for i in range(count)]
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        return grpo.read_data(grpo.Args(dataset=str(path)), ["prompt"])

    for count, held_out in ((2, 1), (20, 1), (21, 2), (6000, 256)):
        assert [len(rows) for rows in read(count)] == [count - held_out, held_out]
        said = capsys.readouterr().out
        assert f"held out: {held_out} of the end of {tmp_path}/rows.jsonl" in said
    assert "--eval-dataset" in error_line(read, 1)


def test_the_embedded_data_are_known_however_their_path_is_spelled(monkeypatch):
    """Only those that have a held-out part; the held-out files alone are as one's own."""
    monkeypatch.chdir(ROOT)
    test = grpo.read_jsonl("data/reviews/prompts_test.jsonl", ["prompt"])
    for path in ("data/../data/reviews/prompts_train.jsonl", REVIEWS / "prompts_train.jsonl"):
        assert grpo.read_data(grpo.Args(dataset=str(path)), ["prompt"])[1] == test
    rows, held_out = grpo.read_data(grpo.Args(dataset=f"{REVIEWS}/prompts_test.jsonl"), ["prompt"])
    assert rows + held_out == test


# ------------------------------------------------------------------------------ models


@each_script
def test_the_folder_of_a_run_stands_for_its_model(script, tmp_path):
    (tmp_path / "args.json").touch()
    assert script.find_model(tmp_path) == tmp_path / "model"


def test_what_changed_is_seen_in_any_file_of_a_model(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"tokens")
    found = [sft.checksum(tmp_path)]
    for name, content in (("1", b"one"), ("2", b"two"), ("2", b"Two"), ("1", b"One")):
        (tmp_path / f"model-{name}.safetensors").write_bytes(content)
        found.append(sft.checksum(tmp_path))
    assert len(set(found)) == 5 and None not in found
    assert sft.checksum("") is sft.checksum(tmp_path / "absent") is None


@each_script
def test_a_missing_model_names_the_script_to_run(script, refused):
    message = refused(script, model="runs/sft/model")
    assert "no model at runs/sft/model" in message and "`python sft.py`" in message
    if script in SAMPLERS:
        message = refused(script, reward_model=None)
        assert "no model at runs/reward/model" in message and "`python reward.py`" in message


MODELS = {  # folder: flag, words of the message
    "llama": ("model", ["llama: ", "model_type"]),
    "few_ids": ("model", ["1264 ids", "1259 tokens"]),
    "scorer": ("model", ["scorer is a reward model"]),  # what is saved would be one again
    "lm": ("reward_model", ["lm has no score", "not a reward model"]),
    "short": ("reward_model", ["24 tokens", "20 positions"]),  # it reads whole sequences, too
    "foreign": ("reward_model", ["the tokenizers of", "foreign", "differ"]),
    "swapped": ("reward_model", ["the tokenizers of", "swapped", "differ"]),
}


@pytest.mark.parametrize("name", MODELS)
@each_script
def test_a_model_that_does_not_fit(script, name, refused, inputs):
    flag, words = MODELS[name]
    if flag == "model" or script in SAMPLERS:
        message = refused(script, **{flag: str(inputs / name)})
        assert all(word in message for word in words), message


def test_a_pad_token_that_the_tokenizer_has_already_is_taken(inputs, tmp_path):
    """The config names none: [PAD] stands once in what is saved, with the config's id."""
    source = tmp_path / "source"
    shutil.copytree(inputs / "lm", source)
    config, params = reward.load_model(source)
    config = dataclasses.replace(config, vocab_size=config.vocab_size + 1, pad_token_id=None)
    table = jnp.pad(params["wte"]["embedding"], ((0, 1), (0, 0)))
    params = params | {"wte": {"embedding": table}}
    saved = json.loads((source / "tokenizer.json").read_text("utf-8"))
    last = config.vocab_size - 1
    saved["added_tokens"].append(saved["added_tokens"][0] | {"id": last, "content": "[PAD]"})
    (source / "tokenizer.json").write_text(json.dumps(saved), "utf-8")
    more, config = reward.add_pad_token(params, config, source, tmp_path / "tokenizer")
    assert config.pad_token_id == last == len(more["wte"]["embedding"]) - 1
    written = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text("utf-8"))
    assert written["added_tokens"] == saved["added_tokens"]


# ------------------------------------------------------------------------------ flags


# Numeric flags for which 0 means something, and those for which a number below 0 does.
FROM_0 = {"seed", "warmup_steps", "process_id", "learning_rate", "weight_decay", "temperature"}
FROM_0 |= {"kl_coef", "vf_coef", "entropy_coef", "center_coef", "nll_coef", "missing_eos_penalty"}
FROM_0 |= {"label_smoothing", "clip_eps", "clip_eps_high", "value_clip_eps", "gamma", "lam"}
FROM_0 |= {"top_k"}
ANY = {"reward_weight", "data", "fsdp", "tensor"}  # the last three: make_mesh
TO_1 = {"gamma", "lam", "ref_mixup_alpha", "top_p"}


@pytest.mark.parametrize("script", [gpt2, *ALL], ids=lambda script: script.__name__)
def test_numbers_that_make_no_sense(script, error_line):
    """For each numeric flag: out of its range, not finite, or more than an int32 holds."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(script.Args)}
    kinds = {name: re.search(r"\b(int|float)\b", kind) for name, kind in fields.items()}
    kinds = {name: kind.group() for name, kind in kinds.items() if kind}
    assert len(kinds) >= 7 and {"seed", "temperature", "batch_size"} <= kinds.keys()
    for name, kind in kinds.items():
        wrong = [2**31, 10**400] if kind == "int" else [math.inf, -math.inf, math.nan]
        wrong += [-1] * (name not in ANY) + [0] * (name not in FROM_0 | ANY) + [2] * (name in TO_1)
        right = [0] * (name in FROM_0) + [1] + [-1] * (name in ANY)
        for value in [*wrong, *right]:
            given = value if kind == "int" else float(value)  # as tyro hands it over
            given = (1.0, given) if name == "reward_weight" else given
            args = script.Args(**{name: given})
            if value in right:
                script.check_flags(args)
            else:
                message = error_line(script.check_flags, args)
                assert message.startswith(f"error: --{name.replace('_', '-')} must be from ")
                assert len(message) < 600
    script.check_flags(script.Args())


@pytest.mark.parametrize("script", [gpt2, *ALL], ids=lambda script: script.__name__)
def test_64_bit_floats_are_refused(script, error_line, float64):
    assert "JAX_ENABLE_X64" in error_line(script.check_flags, script.Args())


@each_script
def test_a_number_out_of_its_range_ends_the_script(script, refused):
    for name, value in (("max_grad_norm", 0.0), ("learning_rate", -1.0), ("seed", -1)):
        assert f"--{name.replace('_', '-')} must be from " in refused(script, **{name: value})


LONG = {"max_prompt_length": 40, "max_completion_length": 25}
LOGGED = {"reward": (f"{ROOT}/rewards.py:repetition_penalty",), "reward_weight": (0.0,)}
FLAGS = [  # scripts, changes, what the message says
    (ALL, {"micro_batch_size": 3}, "--micro-batch-size.* does not divide --batch-size 8"),
    (ALL, LONG, "--max-prompt-length .*--max-completion-length.* 65 tokens.* 64 positions"),
    (ALL, {"temperature": 0.0}, "--temperature must be above 0"),
    ((sft, mixed_precision), {"n_head": 3, "model": ""}, "--n-head does not divide --n-embd"),
    (POLICY_GRADIENTS, {"num_minibatches": 3}, "--num-minibatches 3"),
    (POLICY_GRADIENTS, {"num_minibatches": 4}, "--micro-batch-size 4"),  # minibatches of 2
    # One alone has nothing to be compared with, and no spread.
    ((*GROUPED, reward), {"num_generations": 1}, "--num-generations must be"),
    (
        GROUPED,
        {"rollout_batch_size": 1},
        "--num-generations.* does not divide --rollout-batch-size",
    ),
    ([ppo], {"rollout_batch_size": 3}, "--rollout-batch-size does not divide --batch-size 8"),
    (GRPO, {"num_generations": 3}, "--num-generations 3 .*--batch-size 8"),
    (GRPO, {"oversample": 0}, "--oversample must be from 1"),
    (GRPO, {"oversample": 7}, "takes 28 prompts .*--oversample.*has 24"),
    (GRPO, {"eval_generations": 0}, "--eval-generations must be from 1"),
    (
        GRPO,
        {"eval_generations": 3, "rollout_batch_size": 8},
        "--eval-generations 3 does not divide --rollout-batch-size 8",
    ),
    # Drawn labels are of two; pairs that fill no batch would have been sampled for nothing.
    ([iterative_dpo], {"num_generations": 3}, "--num-generations must be 2.*--pair best-worst"),
    ([iterative_dpo], {"prompts_per_round": 20}, "--batch-size .*--prompts-per-round 20"),
    # Labels that are more often wrong than right are others.
    (PAIRS, {"label_smoothing": 0.5}, "--label-smoothing must be .*below 0.5"),
    (PAIRS, {"loss": "ipo", "label_smoothing": 0.1}, "--label-smoothing .*--loss sigmoid"),
    (PAIRS, {"loss": "hinge", "label_smoothing": 0.1}, "--label-smoothing .*--loss sigmoid"),
    ([ppo], {"kl_target": 0.1, "kl_coef": 0.0}, "--kl-coef"),  # which the steering multiplies
    (SAMPLERS, {"reward": ("absent.py:f",)}, "absent.py"),
    (SAMPLERS, {"reward": ("good",)}, "good: a reward is given as file.py:function"),
    (SAMPLERS, {"reward": (f"{ROOT}/README.md:f",)}, "README.md:f: a reward is given as file.py"),
    (SAMPLERS, {"reward": (f"{ROOT}/rewards.py:GOOD",)}, "rewards.py has no function GOOD"),
    (SAMPLERS, {"reward_weight": (1.0,)}, "0 times --reward, but 1 times --reward-weight"),
    (SAMPLERS, {"reward_model": None} | LOGGED, "every --reward-weight is 0"),
    # Known with the first evaluation, when the run has begun: so this is the last.
    (SAMPLERS, {"keep_best": "gold/rewards"}, "--keep-best must be one of reward, .*objective/kl"),
]


@each_script
def test_flags_that_do_not_fit(script, refused):
    for scripts, changes, words in FLAGS:
        if script in scripts:
            message = refused(script, **changes)
            assert re.search(words, message), (changes, message)


def answers(value):
    """A reward function that returns this."""
    return lambda prompts, completions, **_: value


@pytest.mark.parametrize(
    "value",
    [
        [1.0],
        1.0,
        None,
        {0: 1.0, 1: 2.0, 2: 3.0},
        ["1.5"] * 3,
        ["good"] * 3,
        [[1.0]] * 3,
        [[1.0], 2.0, 3.0],
        [1.0, float("nan"), 2.0],
        [1.0, np.nan, None],
        np.array([1.0, np.nan, 2.0]),
        [math.inf] * 3,
        [1j] * 3,
        [10**400] * 3,
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_list_of_scores(value, capsys):
    """The right number of finite numbers, or None: else the line names the function."""
    with pytest.raises(SystemExit) as stop:
        ppo.call_reward(answers(value), [{"prompt": "a"}] * 3, ["b"] * 3)
    message = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert message.startswith("error: the reward function <lambda> ") and len(message) < 500


@pytest.mark.parametrize(
    "value",
    [
        (1, True, None),
        iter([1, 1.0, None]),
        np.array([1, 1, None]),
        [jnp.float32(1), np.int64(1), None],
    ],
    ids=["tuple", "iterator", "array", "numbers of other libraries"],
)
def test_what_is_a_list_of_scores(value):
    found = ppo.call_reward(answers(value), [{"prompt": "a"}] * 3, ["b"] * 3)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [1, 1, np.nan])


FAILING = {  # function: words of the message, and of the traceback before it
    "broken": ("broken raised ZeroDivisionError", "my_rewards.py"),
    "strict": ("strict raised TypeError.*stars", "strict()"),  # TRL's rule: it accepts columns
    "leaves": ("leaves raised SystemExit", "my_rewards.py"),  # status 0 would say that all is well
    "absent": ("my_rewards.py has no function absent", None),
    "no_function": ("my_rewards.py has no function no_function", None),
    "short": ("short must return 12 numbers, not .1.0.", None),
    "nan": ("nan returned .nan.: no finite number", None),
    "forgets": ("forgets must return 12 numbers, not None", None),
}


@pytest.mark.parametrize("function", FAILING)
def test_reward_functions_that_fail(function, refused, rewards, tmp_path):
    rows = [row | {"stars": 4} for row in first_rows("prompts_test", 12)]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    words, traceback = FAILING[function]
    changes = {"reward": (f"{rewards}:{function}",), "eval_dataset": str(path)}
    message = refused(ppo, traceback_of=traceback, **changes)
    assert re.search(words, message), message


@each_of(*SAMPLERS, dpo)
def test_reward_functions_that_fail_elsewhere(script, refused, rewards):
    changes = [{"gold": f"{rewards}:leaves"}]
    if script is not dpo:
        changes += [{"reward": (f"{rewards}:leaves",), "reward_model": None}]
    for change in changes:
        message = refused(script, traceback_of=rewards, overwrite=True, **change)
        assert "leaves raised SystemExit" in message


@pytest.mark.parametrize("text", ["def f(:", "import no_such_module", "import sys; sys.exit(0)"])
def test_a_reward_file_that_fails(text, refused, tmp_path):
    path = tmp_path / "failing.py"
    path.write_text(text)
    message = refused(ppo, traceback_of=path, reward=(f"{path}:f",))
    assert f"{path} cannot be imported" in message


@pytest.mark.parametrize("name", ["one", "instance", "partial", "elsewhere"])
def test_what_can_be_called_is_a_reward(name, rewards):
    """A function, an object, a functools.partial, and one that imports its neighbour."""
    found = ppo.call_reward(ppo.load_function(f"{rewards}:{name}"), [{"prompt": ""}], ["a"])
    assert found.tolist() == [1.0]


WITH_CLASSES = """
from __future__ import annotations
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
import multiprocessing
@dataclass
class Weights:
    length: float = 0.5
def one(text): return Weights().length * len(text)
def score(prompts, completions, **_):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return list(pool.map(one, completions))
again = score
"""


def test_a_reward_file_with_dataclasses_and_processes(tmp_path):
    """Both want the module in sys.modules, which is one for two functions of a file."""
    path = tmp_path / "rewards_in_processes.py"
    path.write_text(WITH_CLASSES)
    for name in ("score", "again"):
        function = ppo.load_function(f"{path}:{name}")
        found = ppo.call_reward(function, [{"prompt": ""}] * 3, ["a", "bc", "def"])
        assert found.tolist() == [0.5, 1.0, 1.5]


ROUND = """
import json, pathlib
def index(completions, number, **_): return [n / 10 for n in number]
def some(completions, number, **_): return [None if n % 2 else 1.0 for n in number]
def never(completions, **_): return [None] * len(completions)
def looks(**columns):
    pathlib.Path(__file__).with_name("seen.json").write_text(json.dumps(columns))
    return [100.0] * len(columns["prompts"])
"""


@each_of(*SAMPLERS)
def test_rewards_of_a_run(script, inputs, tmp_path, monkeypatch):
    """They add up by their weights and get the data's columns; each is logged by its name.

    A column that is named as what the trainer passes does not come in its place. A weight of 0 only
    logs. The run ends after the first samples.
    """
    logged = []

    def stop(run, step, metrics, *_):
        logged.append(metrics)
        raise Crash

    monkeypatch.setattr(script.RunFolder, "log", stop)
    names = {"prompts": "x", "completions": "y", "completion_ids": "z", "completion": "w"}
    rows = [row | names | {"number": i} for i, row in enumerate(first_rows("prompts_test", 12))]
    del rows[5]["completion"]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    (tmp_path / "f.py").write_text(ROUND)
    functions = tuple(f"{tmp_path}/f.py:{name}" for name in ("index", "some", "never", "looks"))
    changes = {"reward": functions, "reward_weight": (3.0, 5.0, 7.0, 0.0), "reward_model": None}
    changes |= {"eval_dataset": str(path), "missing_eos_penalty": 0.25}
    changes |= {"model": str(inputs / "ends")}
    with pytest.raises(Crash):
        script.main(small_args(script, inputs, tmp_path / "run", **changes))
    count = len(rows)
    samples = map(json.loads, (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines())
    samples = list(samples)
    bonus = [sample["reward"] - 0.3 * i - 5.0 * (i % 2 == 0) for i, sample in enumerate(samples)]
    assert len(bonus) == 8 and {round(x, 5) for x in bonus} == {0.0, -0.25}
    assert [x["rewards/some"] for x in samples] == [1.0, None] * 4
    assert all(x["rewards/never"] is None and x["rewards/looks"] == 100 for x in samples)

    (metrics,) = logged
    numbers = np.arange(count) / 10
    expected = {"index/mean": numbers.mean(), "index/std": numbers.std(), "some/mean": 1.0}
    expected |= {"some/std": 0.0, "looks/mean": 100.0, "looks/std": 0.0}
    found = {k.split("rewards/")[1]: x for k, x in metrics.items() if "rewards/" in k}
    assert found == pytest.approx(expected, rel=1e-5)

    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["prompts"] == [row["prompt"] for row in rows[:count]]
    assert seen["completions"][:8] == [sample["completion"] for sample in samples]
    assert seen["completion"] == ["w"] * 5 + [None] + ["w"] * (count - 6)
    tokenizer = script.load_tokenizer(inputs / "lm")
    eos_id = tokenizer.eot_token
    for ids, text in zip(seen["completion_ids"], seen["completions"]):
        assert eos_id not in ids[:-1] and 1 <= len(ids) <= 8
        assert len(ids) == 8 or ids[-1] == eos_id
        ids = [i for i in ids if i < eos_id]  # special tokens are no text
        assert tokenizer.decode(ids) == text


def test_two_functions_of_one_name_are_two_columns(tmp_path):
    """One is not written over by the other."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("def score(completions, **_): return [1.0]")
    args = grpo.Args(reward=(f"{tmp_path}/a.py:score", f"{tmp_path}/b.py:score"))
    rewards = grpo.load_rewards(args, None, 0)
    assert len({name for name, *_ in rewards.functions}) == 2


# ------------------------------------------------------------------------------ the run itself


def poison(script, monkeypatch, name, call):
    """In this call of the script's train_step the metric `name` is NaN."""
    train_step, numbers = script.train_step, itertools.count(1)

    def poisoned(*rest):
        state, metrics = train_step(*rest)
        return state, metrics | ({name: jnp.float32("nan")} if next(numbers) == call else {})

    monkeypatch.setattr(script, "train_step", poisoned)


OFTEN, SELDOM = (sft, ppo), [script for script in ALL if script not in (sft, ppo)]


@pytest.mark.parametrize(
    "script",
    [*OFTEN, *(pytest.param(script, marks=pytest.mark.long) for script in SELDOM)],
    ids=lambda script: script.__name__,
)
def test_a_loss_that_is_not_finite_stops_the_run(script, refused, tmp_path, monkeypatch):
    """Whatever --log-every is, a step is logged before it is saved, so no checkpoint has it."""
    name = "loss/policy_avg" if script in POLICY_GRADIENTS else "loss"
    poison(script, monkeypatch, name, 3)
    message = refused(script, log_every=2, eval_every=100)
    assert f"{name} is not finite at step 3" in message and "--learning-rate" in message
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 2, 3]
    assert math.isfinite(rows[1][name]) and rows[2][name] is None  # JSON knows no NaN
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()
    assert not list(tmp_path.glob("run/checkpoint/*"))


def test_a_learning_rate_that_blows_up_leaves_no_checkpoint(refused, tmp_path):
    changes = {"log_every": 4, "eval_every": 100, "save_every": 4}
    message = refused(sft, learning_rate=1e30, warmup_steps=0, **changes)
    assert "not finite at step 4" in message
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_pairs_of_two_equal_answers(inputs, tmp_path):
    """They teach nothing, and do no harm: the loss is ln 2, and the run goes to its end."""
    rows = [row | {"rejected": row["chosen"]} for row in first_rows("preferences_train", 24)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    run = train(dpo, inputs, tmp_path, dataset=str(path))
    _, *rows = metrics_of(run)
    assert rows[-1]["step"] == 6 and (run / "model").exists()
    for row in rows:  # beside what the chosen answer alone teaches
        assert row["loss"] - row["nll_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(row["rewards/margins"]) < 1e-4


@pytest.mark.parametrize("pair", ["best-worst", "sampled"])
def test_completions_of_equal_scores(pair, inputs, rewards, tmp_path):
    """With best-worst one stands against itself and teaches nothing; else a coin is tossed."""
    changes = {"reward_model": None, "missing_eos_penalty": 0.0, "pair": pair}
    _, *rows = metrics_of(
        train(iterative_dpo, inputs, tmp_path, reward=(f"{rewards}:by_prompt",), **changes)
    )
    assert [row["pairs/ties"] for row in rows] == [1.0] * 6
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6) or pair == "sampled"
    assert (rows[-1]["grad_norm"] > 1e-3) == (pair == "sampled")


# ------------------------------------------------------------------------------ command line


@pytest.mark.parametrize("name", ["gpt2", *names, "evaluate"])
def test_help_and_a_mistyped_flag(name):
    """Every flag is named, the right one suggested, and JAX is not imported for that."""
    code = """
import runpy, sys
name = sys.argv[1]
for flags in ["--help"], ["--temprature", "1.0"]:
    sys.argv = [name, *flags]
    try:
        runpy.run_path(name, run_name="__main__")
    except SystemExit as stop:
        print("status", stop.code)
print("imported", sorted({"jax", "flax", "optax", "numpy", "tiktoken"} & set(sys.modules)))
"""
    line = [sys.executable, "-c", code, f"{name}.py"]
    environment = {"PATH": "/usr/bin:/bin", "COLUMNS": "100"}  # nothing that imports JAX early
    result = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60
    )
    shown, refusal = result.stdout.split("status 0\n")
    fields = dataclasses.fields(__import__(name).Args)
    assert len(fields) >= 10 and f"python {name}.py" in shown
    assert all("--" + field.name.replace("_", "-") in shown for field in fields)
    assert refusal.endswith("status 2\nimported []\n")
    assert "--temperature" in refusal + result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "name", [names[0], *(pytest.param(name, marks=pytest.mark.long) for name in names[1:])]
)
def test_an_error_in_a_process(name, tmp_path):
    """What the other tests see as SystemExit: one line on stderr, status 2, no run folder left."""
    line = [sys.executable, str(ROOT / f"{name}.py"), "--model", "runs/absent/model"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: no model at runs/absent/model")
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_console_that_knows_no_other_characters(inputs, tmp_path):
    """What it cannot print, half characters too, is replaced: the model is there in the end."""
    rows = [{"prompt": "映画\ud800", "completion": " 😀"}] * 8
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = {"dataset": str(path), "eval_dataset": str(path)}
    args = small_args(sft, inputs, tmp_path / "run", epochs=1, n_embd=8, **data)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    line = command(sft, args)
    result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, timeout=200)
    assert result.returncode == 0, result.stderr[-2000:]
    assert b"??" in result.stdout and (tmp_path / "run" / "model").is_dir()
