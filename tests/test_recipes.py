"""recipes/: the shell scripts call real scripts with real flags; their helpers do what they say."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest
import tyro
from conftest import ROOT

import gpt2
import sft

RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.sh"))
RECORDER = """#!/usr/bin/env bash
printf '%s\\0' "$0" "$@" >> "$RECORD"; printf '\\n\\0' >> "$RECORD"
"""
ENVIRONMENT = {"DATA": "some/data", "OUT": "some/out"}  # nothing is downloaded


@functools.cache
def module(path):
    """The module of a file of the repository, by its path there."""
    if "/" not in path:
        return importlib.import_module(path.removesuffix(".py"))
    name = path.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    found = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def recorded(tmp_path):
    """recorded(recipe) -> the commands that it runs, [[name, argument, …], …]; none is run."""

    def run(recipe):
        for name in ("python", "make", "curl"):
            (tmp_path / name).write_text(RECORDER)
            (tmp_path / name).chmod(0o755)
        record = tmp_path / "record"
        variables = ENVIRONMENT | {"OUT": str(tmp_path / "out"), "RECORD": str(record)}
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        subprocess.run(
            ["bash", ROOT / "recipes" / recipe], check=True, env={**variables, "PATH": path}
        )
        calls = [x.split("\0")[:-1] for x in record.read_text().split("\n\0")[:-1]]
        return [[name.rpartition("/")[2], *rest] for name, *rest in calls]

    return run


def flags_of(script, given):
    """The Args that a command line makes; without tyro: whether the script knows its flags."""
    source = (ROOT / script).read_text("utf-8")
    names = [x.name for x in ast.parse(source).body if isinstance(x, ast.ClassDef)]
    if "Args" in names:
        return tyro.cli(module(script).Args, args=given)
    known = [flag for flag in given if flag.startswith("--")]
    assert all(f'"{flag}"' in source for flag in known), known
    return None


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_command_is_one_that_the_scripts_understand(recipe, recorded, capsys):
    trained, seen = set(), 0
    for command, *rest in recorded(recipe):
        if command == "make":
            assert rest == ["all"]
        if command != "python" or rest[0] == "-c":
            continue
        script, *given = rest
        args = flags_of(script, given)
        seen += 1
        if not dataclasses.is_dataclass(args):
            continue
        # What a stage starts from, another one before it has written.
        names = ("model", "ref", "reward_model", "models")
        values = [value for name in names if (value := getattr(args, name, None))]
        folders = itertools.chain(*([x] if isinstance(x, str) else x for x in values))
        for folder in folders:
            assert "/out/" not in folder or folder in trained, f"{script}: {folder}"
        if hasattr(args, "run_dir"):
            assert f"{args.run_dir}/model" not in trained
            trained.add(f"{args.run_dir}/model")
            updated = args.batch_size // getattr(args, "num_minibatches", 1)
            assert updated % args.micro_batch_size == 0
        for function in [*getattr(args, "reward", []), getattr(args, "gold", None)]:
            path, _, name = (function or "").partition(":")
            assert not path or len(path) == 1 or hasattr(module(path), name)
    assert seen or recipe == "embedded.sh"


def test_a_wrong_flag_is_noticed():
    with pytest.raises(SystemExit):
        flags_of("dpo.py", ["--betta", "0.1"])
    with pytest.raises(AssertionError):
        flags_of("data/hh_rlhf.py", ["in", "out", "--test-row", "3"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_stop_at_the_first_error(recipe):
    path = ROOT / "recipes" / recipe
    assert os.access(path, os.X_OK) and "\nset -euo pipefail\n" in path.read_text("utf-8")
    subprocess.run(["bash", "-n", path], check=True)


# ------------------------------------------------------------------------------------------ helpers

REVIEW = "The Quiet Harbor. I loved it!<br /><br />The acting is superb. And the plot is never dull"


@pytest.mark.parametrize("length", range(2, 9))
def test_a_review_is_a_prompt_and_whole_sentences(length):
    tokenizer = gpt2.load_tokenizer(ROOT / "data" / "reviews" / "tokenizer")
    split = module("recipes/imdb_data.py").split_review
    plain = REVIEW.replace("<br /><br />", " ")
    for limit in (24, 48):
        prompt, completion = split(REVIEW, length, tokenizer, limit)
        assert len(sft.encode_text(tokenizer, prompt)) == length
        assert plain.startswith(prompt + completion) and completion[-1] in ".!"
        assert len(sft.encode_text(tokenizer, completion)) + 1 <= limit  # EOS comes on top
    assert split("It has no end of a sentence at all", length, tokenizer, 48) is None


def test_pairs_of_four_completions():
    make_pairs = module("recipes/label_pairs.py").make_pairs
    rows = [{"prompt": "a"}, {"prompt": "a"}]  # the same text twice is two prompts
    groups = [rows[0]] * 4 + [rows[1]] * 3
    texts = [f" {i}" for i in range(7)]
    scores = [0.1, 0.4, 0.3, 0.2, 0.5, 0.5, 0.6]
    pairs = make_pairs(groups, texts, scores)
    assert len(pairs) == 6 + 2  # two of the second prompt's are a tie
    by_text = dict(zip(texts, scores))
    for pair in pairs:
        assert by_text[pair["chosen"]] > by_text[pair["rejected"]]
        assert (pair["chosen"] in texts[:4]) == (pair["rejected"] in texts[:4])


def test_gsm8k_becomes_dialogues(tmp_path):
    chats = module("recipes/gsm8k_chat.py")
    for split in ("train", "test"):
        row = {"prompt": "Question: How many?\nAnswer:", "answer": "72"}
        (tmp_path / f"prompts_{split}.jsonl").write_text(json.dumps(row) + "\n")
    chats.main(chats.Args(str(tmp_path)))
    row = json.loads((tmp_path / "chat_test.jsonl").read_text())
    (message,) = row["prompt"]
    assert message["role"] == "user" and message["content"].startswith("How many?\n")
    assert row["answer"] == "72" and row["chat_template_kwargs"] == {"enable_thinking": False}
    said = [[{"role": "assistant", "content": text}] for text in ("So\n#### 72", "71", "")]
    assert chats.right([row["prompt"]] * 3, said, ["72"] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parity
def test_sentiment_is_the_classifiers_probability(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data" / "reviews" / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "vocab_size": len(tokenizer)}
    labels = {"id2label": {0: "POSITIVE", 1: "NEGATIVE"}}  # the other way round than the default's
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, **labels, initializer_range=1.0)
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recipe = module("recipes/imdb_reward.py")
    monkeypatch.setattr(recipe, "CLASSIFIER", str(tmp_path))
    monkeypatch.setattr(recipe, "BATCH_SIZE", 2)  # rows of different lengths, in two parts
    prompts, completions = ["The plot", "I", "It is"], [" is superb.", " hated it, all of it.", ""]
    expected = []
    for prompt, completion in zip(prompts, completions):
        ids = torch.tensor([tokenizer(prompt + completion)["input_ids"]])
        with torch.no_grad():
            expected.append(float(model(ids).logits.softmax(-1)[0, 0]))
    assert recipe.sentiment(prompts, completions) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.05
