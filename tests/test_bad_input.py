"""Bad input to the training scripts: one sentence, exit status 2; and --help."""

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from test_runs import (
    ALL,
    DATA,
    ROOT,
    Crash,
    each_of,
    first_rows,
    make_inputs,
    metrics_of,
    small_args,
    train,
    write_jsonl,
)

import dpo
import grpo
import iterative_dpo
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
def short(completions, **_): return [1.0]
def broken(completions, **_): return [1 / 0 for _ in completions]
def nan(completions, **_): return [float("nan")] * len(completions)
def words(completions, **_): return ["good"] * len(completions)
def needs(completions, **_): return [1.0] * len(completions) + answer
def none(completions, **_): return [None] * len(completions)
def one(completions, **_): return [1.0] * len(completions)
def index(completions, number, **_): return [n / 10 for n in number]
def by_prompt(prompts, **_): return [len(prompt) for prompt in prompts]
def strict(prompts, completions): return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Those of a run, and models that do not fit."""
    folder = make_inputs(tmp_path_factory.mktemp("inputs"))
    (config, params), (_, scorer) = (sft.load_model(folder / name) for name in ("lm", "scorer"))
    size, table = config.vocab_size - 5, params["wte"]["embedding"]
    fewer = params | {"wte": {"embedding": table[:size]}}
    small = dataclasses.replace(config, vocab_size=size)
    sft.save_model(folder / "few_ids", small, fewer, folder / "lm")
    fewer = scorer | {"wpe": {"embedding": scorer["wpe"]["embedding"][:20]}}
    short = dataclasses.replace(config, n_positions=20)
    sft.save_model(folder / "short", short, fewer, folder / "scorer")
    sft.save_model(folder / "llama", config, params, folder / "lm")
    saved = json.loads((folder / "llama" / "config.json").read_text("utf-8"))
    (folder / "llama" / "config.json").write_text(json.dumps(saved | {"model_type": "llama"}))
    sft.save_model(folder / "foreign", config, scorer, folder / "lm")  # its tokenizer lacks a merge
    saved = json.loads((folder / "foreign" / "tokenizer.json").read_text("utf-8"))
    last = saved["model"]["merges"].pop()
    del saved["model"]["vocab"]["".join(last if isinstance(last, list) else last.split(" "))]
    (folder / "foreign" / "tokenizer.json").write_text(json.dumps(saved), "utf-8")
    return folder


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def refused(inputs, tmp_path, error_line, monkeypatch):
    """refused(script, **changes) -> the line by which the script refuses these arguments."""
    monkeypatch.chdir(tmp_path)

    def call(script, **changes):
        changes = {"model": str(inputs / "lm")} | changes
        message = error_line(script.main, small_args(script, inputs, "run", **changes))
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

    lines = [json.dumps(row) for row in rows_of(script)]
    row = json.loads(lines[4])
    bad = [(lines[4][:-9], "not JSON"), ("7", "not an object")]
    if flag == "dataset":
        bad += [(line, "not an object") for line in ("[1, 2]", '"text"', "null")]
        for name in fields_of(script):
            lacking = {other: text for other, text in row.items() if other != name}
            wrong = [lacking, row | {name: ["a", "list"]}]
            wrong += [row | {name: ""}] if name != "prompt" else []
            bad += [(json.dumps(row), f'"{name}" is missing, empty or not') for row in wrong]
    for line, words in bad:
        path.write_text("\n".join([*lines[:4], line, *lines[5:]]) + "\n", "utf-8")
        message = refused(script, **{flag: str(path)})
        assert f"{path}, line 5" in message and words in message


def test_a_margin_that_is_no_number(refused, tmp_path):
    rows = rows_of(reward)
    rows[1]["margin"] = "large"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = refused(reward, dataset=str(path))
    assert "margin" in message and str(path) in message


@each_script
def test_too_few_rows_for_a_batch(script, refused, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(script)[:3])
    words = dict.fromkeys(GRPO, "4 prompts (--batch-size / --num-generations), --dataset has 3")
    words |= {iterative_dpo: "--prompts-per-round is above the 3 prompts"}
    assert words.get(script, "--batch-size is above the 3") in refused(script, dataset=str(path))


@each_script
def test_rows_that_are_too_long_are_dropped(script, refused, inputs, tmp_path, capsys, monkeypatch):
    """They are counted, and nothing is shortened; the run stops where none is left."""
    for flag in ["max_prompt_length", "max_completion_length"][: len(fields_of(script))]:
        assert f"--{flag.replace('_', '-')} 2" in refused(script, **{flag: 2})

    _, *answers = fields_of(script)
    rows = rows_of(script)
    rows[3]["prompt"] = rows[7]["prompt"] = "word " * 40
    for i, name in enumerate(answers):
        rows[i][name] = " word" * 100
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found, encode_rows = [], script.encode_rows

    def watched(*rest):
        found.append(encode_rows(*rest))
        return found[-1]

    monkeypatch.setattr(script, "encode_rows", watched)
    paths = {"dataset": str(path), "eval_dataset": str(path), "model": str(inputs / "lm")}
    capsys.readouterr()
    with pytest.raises(SystemExit):  # the batch cannot be filled
        script.main(small_args(script, inputs, "run", batch_size=32, **paths))
    fitting = [row for i, row in enumerate(rows) if i >= len(answers) and i not in (3, 7)]
    count = f"{12 - len(fitting)} of 12 rows dropped: longer than --max-prompt-length 16 or --max-c"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith(count) for line in lines), lines
    decode = sft.load_tokenizer(inputs / "lm").decode
    for kept in found:
        assert [row for row, _ in kept] == fitting
        for row, (prompt, *texts) in kept:
            assert decode(prompt) == row["prompt"]
            assert list(map(decode, texts)) == [row[name] + "<|endoftext|>" for name in answers]


# ------------------------------------------------------------------------------ models


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
}


@pytest.mark.parametrize("name", MODELS)
@each_script
def test_a_model_that_does_not_fit(script, name, refused, inputs):
    flag, words = MODELS[name]
    if flag == "model" or script in SAMPLERS:
        message = refused(script, **{flag: str(inputs / name)})
        assert all(word in message for word in words), message


# ------------------------------------------------------------------------------ flags


@dataclasses.dataclass(frozen=True)
class Flags:
    seed: int = 0
    warmup_steps: int = 8
    steps: int = 3
    every: int | None = None
    resume: bool = False
    rate: float = 1.0


def test_an_int_whose_default_is_0_may_be_0(error_line):
    sft.check_ranges(Flags())
    sft.check_ranges(Flags(seed=0, warmup_steps=0, steps=1, every=1, rate=0.0))
    for name, value in ("seed", -1), ("warmup_steps", -1), ("steps", 0), ("every", 0):
        message = error_line(sft.check_ranges, Flags(**{name: value}))
        assert message == f"error: --{name.replace('_', '-')} must be at least {value + 1}\n"


@each_script
def test_sizes_and_intervals_of_0(script, refused):
    flags = {field.name for field in dataclasses.fields(script.Args) if type(field.default) is int}
    flags -= {"seed", "warmup_steps", "data", "fsdp", "tensor"}
    flags |= {"ref_sync_steps"} if script in (grpo, sharded) else set()
    assert {"batch_size", "micro_batch_size", "log_every", "eval_every", "save_every"} <= flags
    for name in flags:
        message = refused(script, **{name: 0})
        assert f"--{name.replace('_', '-')} must be at least 1" in message


@each_script
def test_the_defaults_are_allowed(script):
    script.check_ranges(script.Args())


LONG = {"max_prompt_length": 40, "max_completion_length": 25}
FLAGS = [  # scripts, changes, what the message says
    (ALL, {"micro_batch_size": 3}, "--micro-batch-size.* does not divide --batch-size 8"),
    (ALL, LONG, "--max-prompt-length .*--max-completion-length.* 65 tokens.* 64 positions"),
    (ALL, {"temperature": 0.0}, "--temperature must be above 0"),
    (POLICY_GRADIENTS, {"num_minibatches": 3}, "--num-minibatches 3"),
    (POLICY_GRADIENTS, {"num_minibatches": 4}, "--micro-batch-size 4"),  # minibatches of 2
    (GROUPED, {"num_generations": 1}, "--num-generations must be"),  # nothing to compare with
    (GRPO, {"num_generations": 3}, "--num-generations 3 .*--batch-size 8"),
    # Drawn labels are of two; pairs that fill no batch would have been sampled for nothing.
    ([iterative_dpo], {"num_generations": 3}, "--num-generations must be 2.*--pair best-worst"),
    ([iterative_dpo], {"prompts_per_round": 20}, "--batch-size .*--prompts-per-round 20"),
    # A beta of 0 has no reference, and labels that are more often wrong than right are others.
    (PAIRS, {"beta": 0.0}, "--beta must be above 0"),
    (PAIRS, {"label_smoothing": -0.1}, "--label-smoothing must be at least 0"),
    (PAIRS, {"label_smoothing": 0.5}, "--label-smoothing must be .*below 0.5"),
    (PAIRS, {"loss": "ipo", "label_smoothing": 0.1}, "--label-smoothing .*--loss sigmoid"),
    (PAIRS, {"loss": "hinge", "label_smoothing": 0.1}, "--label-smoothing .*--loss sigmoid"),
    ([ppo], {"kl_target": 0.0}, "--kl-target must be above 0"),
    (GRPO, {"ref_mixup_alpha": 0.0}, "--ref-mixup-alpha must be above 0"),
    (SAMPLERS, {"reward": ("absent.py:f",)}, "absent.py"),
    (SAMPLERS, {"reward": ("good",)}, "good: a reward is given as file.py:function"),
    (SAMPLERS, {"reward_weight": (1.0,)}, "0 times --reward, but 1 times --reward-weight"),
]


@each_script
def test_flags_that_do_not_fit(script, refused):
    for scripts, changes, words in FLAGS:
        if script in scripts:
            message = refused(script, **changes)
            assert re.search(words, message), (changes, message)


FAILING = {
    "broken": ["broken", "ZeroDivisionError"],
    "short": ["short", "12"],
    "nan": ["nan", "finite"],
    "needs": ["needs", "NameError"],
    "words": ["words", "ValueError"],
    "absent": ["my_rewards.py", "absent"],
    "strict": ["strict", "stars"],  # TRL's rule: a function accepts the columns it does not use
}


@pytest.mark.parametrize("function", FAILING)
def test_reward_functions_that_fail(function, refused, rewards, tmp_path):
    rows = [row | {"stars": 4} for row in first_rows("prompts_test", 12)]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    message = refused(ppo, reward=(f"{rewards}:{function}",), eval_dataset=str(path))
    assert all(word in message for word in FAILING[function])


@each_of(*SAMPLERS, dpo)
def test_reward_functions_that_fail_elsewhere(script, refused, rewards):
    changes = [{"gold": f"{rewards}:nan"}]
    if script is not dpo:
        changes += [{"reward": (f"{rewards}:nan",), "reward_model": None}]
    for change in changes:
        message = refused(script, overwrite=True, **change)
        assert all(word in message for word in FAILING["nan"])


def test_a_reward_file_that_fails(refused, tmp_path):
    (tmp_path / "syntax.py").write_text("def f(:\n")
    assert "syntax.py" in refused(ppo, reward=(f"{tmp_path}/syntax.py:f",))


@each_of(*SAMPLERS)
def test_rewards_are_weighted_and_none_counts_nothing(
    script, inputs, rewards, tmp_path, monkeypatch
):
    """Three functions add up, and get the data's columns. The run ends after the first samples."""

    def crash(*_):
        raise Crash

    monkeypatch.setattr(script.RunFolder, "log", crash)
    rows = [row | {"number": i} for i, row in enumerate(first_rows("prompts_test", 12))]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    changes = {"eval_dataset": str(path), "reward_model": None, "missing_eos_penalty": 0.25}
    functions = tuple(f"{rewards}:{name}" for name in ("index", "none", "one"))
    weights = {"reward": functions, "reward_weight": (3.0, 5.0, 7.0)}
    with pytest.raises(Crash):
        script.main(small_args(script, inputs, tmp_path / "run", **changes, **weights))
    samples = map(json.loads, (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines())
    bonus = [round(sample["reward"] - 0.3 * i - 7, 5) for i, sample in enumerate(samples)]
    assert len(bonus) == 8 and set(bonus) <= {0.0, -0.25} and -0.25 in bonus


# ------------------------------------------------------------------------------ the run itself


def poison(script, monkeypatch, name, call):
    """In this call of the script's train_step the metric `name` is NaN."""
    train_step, numbers = script.train_step, itertools.count(1)

    def poisoned(*rest):
        state, metrics = train_step(*rest)
        return state, metrics | ({name: jnp.float32("nan")} if next(numbers) == call else {})

    monkeypatch.setattr(script, "train_step", poisoned)


@each_script
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
    "name", [names[0], *(pytest.param(name, marks=pytest.mark.slow) for name in names[1:])]
)
def test_an_error_in_a_process(name, tmp_path):
    """What the other tests see as SystemExit: one line on stderr, status 2, no run folder left."""
    line = [sys.executable, str(ROOT / f"{name}.py"), "--model", "runs/absent/model"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: no model at runs/absent/model")
    assert result.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
