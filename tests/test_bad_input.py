"""Bad input to the training scripts: one sentence, exit status 2; and --help."""

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from test_runs import (
    ALL,
    DATA,
    ROOT,
    first_rows,
    make_inputs,
    metrics_of,
    small_args,
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
HELP = ["gpt2", *names, "evaluate"]


def each_of(*scripts):
    """The test is run with each of these as `script`."""
    scripts = [script for script in scripts if script in ALL]
    return pytest.mark.parametrize("script", scripts, ids=[x.__name__ for x in scripts])


each_script = each_of(*ALL)
SAMPLERS = (ppo, grpo, iterative_dpo, sharded)  # those that have their own samples scored
REWARDS = """
def short(completions, **_):
    return [1.0]

def broken(completions, **_):
    return [1 / 0 for _ in completions]

def nan(completions, **_):
    return [float("nan")] * len(completions)

def words(completions, **_):
    return ["good"] * len(completions)

def needs(completions, **_):
    return [1.0] * len(completions) + answer

def strict(prompts, completions):
    return [1.0] * len(completions)

def none(completions, **_):
    return [None] * len(completions)

def one(completions, **_):
    return [1.0] * len(completions)

def index(prompts, completions, number, **_):
    return [n / 10 for n in number]

def by_prompt(prompts, completions, **_):
    return [len(prompt) for prompt in prompts]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def refused(inputs, tmp_path, error_line):
    """refused(script, **changes) -> the line by which the script refuses these arguments."""

    def call(script, **changes):
        message = error_line(script.main, small_args(script, inputs, tmp_path / "run", **changes))
        assert not (tmp_path / "run" / "model").exists()
        return message

    return call


# ------------------------------------------------------------------------------ data


def fields_of(script):
    fields = {"sft": ["completion"], "preferences": ["chosen", "rejected"]}
    return ["prompt", *fields.get(DATA.get(script), [])]


def rows_of(script):
    return first_rows(f"{DATA.get(script, 'prompts')}_train", 12)


@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
@each_script
def test_a_line_that_is_not_json(script, flag, refused, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(script))
    lines = path.read_text("utf-8").splitlines(True)
    path.write_text("".join([*lines[:4], lines[4][:-9] + "\n", *lines[5:]]), "utf-8")
    message = refused(script, **{flag: str(path)})
    assert f"{path}, line 5 " in message and "JSON" in message


@each_script
def test_a_lacking_field(script, refused, tmp_path):
    for name in fields_of(script):
        rows = rows_of(script)
        del rows[6][name]
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        message = refused(script, dataset=str(path))
        assert f"{path}, line 7 " in message and name in message


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "7", "null"])
def test_a_line_that_is_no_object(line, refused, tmp_path):
    (tmp_path / "rows.jsonl").write_text(line + "\n")
    assert "rows.jsonl, line 1 " in refused(sft, dataset=str(tmp_path / "rows.jsonl"))


@each_script
def test_a_field_that_is_not_text(script, refused, tmp_path):
    rows = rows_of(script)
    rows[2]["prompt"] = ["a", "list"]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = refused(script, dataset=str(path))
    assert f"{path}, line 3" in message and '"prompt"' in message


@each_of(sft, reward, dpo)
def test_an_empty_completion(script, refused, tmp_path):
    for name in fields_of(script)[1:]:
        rows = rows_of(script)
        rows[3][name] = ""
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        message = refused(script, dataset=str(path))
        assert f"{path}, line 4" in message and f'"{name}"' in message and "empty" in message


def test_a_margin_that_is_no_number(refused, tmp_path):
    rows = rows_of(reward)
    rows[1]["margin"] = "large"
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert "margin" in refused(reward, dataset=str(path))


@pytest.mark.parametrize("flag", ["dataset", "eval_dataset"])
@each_script
def test_an_empty_or_missing_file(script, flag, refused, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert str(path) in refused(script, **{flag: str(path)})
    path.write_text("")
    assert f"{path} holds no rows" in refused(script, **{flag: str(path)})


@each_script
def test_too_few_rows_for_a_batch(script, refused, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", rows_of(script)[:3])
    message = refused(script, dataset=str(path))
    flag = "--prompts-per-round" if script is iterative_dpo else "--batch-size"
    assert "3 rows" in message and flag in message


@each_of(ppo, grpo, sharded)
def test_prompts_that_are_too_long(script, refused, inputs, tmp_path, capsys):
    """They are dropped and counted; the run stops where none is left."""
    message = refused(script, max_prompt_length=2)
    assert "--max-prompt-length 2" in message
    rows = first_rows("prompts_train", 10)
    rows[3]["prompt"] = rows[7]["prompt"] = "word " * 40
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit):
        script.main(small_args(script, inputs, tmp_path / "run", dataset=str(path), batch_size=32))
    assert "10 prompts: 2 dropped" in capsys.readouterr().out


@each_of(sft, reward, dpo)
def test_completions_that_are_too_long(script, refused, capsys, tmp_path):
    message = refused(script, max_completion_length=2)
    assert "--max-completion-length 2" in message
    rows = rows_of(script)
    rows[0][fields_of(script)[-1]] = " word" * 100
    rows[1]["prompt"] = "word " * 100
    rows[2]["prompt"] = "word " * 100
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    # A batch that cannot be filled ends the run once the rows are counted.
    message = refused(script, dataset=str(path), batch_size=12)
    assert "11 rows" in message


def test_what_is_dropped_and_shortened_is_said(inputs, tmp_path, capsys):
    rows = rows_of(sft)
    rows[0]["completion"] = " word" * 100
    rows[1]["prompt"] = rows[2]["prompt"] = "word " * 100
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = small_args(sft, inputs, tmp_path / "run", dataset=str(path), batch_size=12)
    with pytest.raises(SystemExit):
        sft.main(args)
    assert "12 rows: 1 dropped as too long, 2 prompts shortened" in capsys.readouterr().out


# ------------------------------------------------------------------------------ models


@each_script
def test_a_missing_model_names_the_script_to_run(script, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(script, model="runs/sft/model")
    assert "no model at runs/sft/model" in message and "`python sft.py`" in message
    if script in SAMPLERS:
        message = refused(script, reward_model=None)
        assert "no model at runs/reward/model" in message and "`python reward.py`" in message


@each_script
def test_a_model_that_is_not_gpt2(script, refused, inputs, tmp_path):
    copy_model(inputs / "lm", tmp_path / "other", model_type="llama")
    message = refused(script, model=str(tmp_path / "other"))
    assert "model_type" in message and "llama" in message


def copy_model(source, folder, tokenizer=None, **changes):
    """A copy of a model folder with some entries of config.json changed."""
    config, params = sft.load_model(source)
    sft.save_model(folder, config, params, tokenizer or source)
    file = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(file | changes), "utf-8")


@each_script
def test_token_ids_outside_the_vocabulary(script, refused, inputs, tmp_path):
    config, params = sft.load_model(inputs / "lm")
    size = config.vocab_size - 5
    params = params | {"wte": {"embedding": params["wte"]["embedding"][:size]}}
    config = dataclasses.replace(config, vocab_size=size)
    sft.save_model(tmp_path / "small", config, params, inputs / "lm")
    message = refused(script, model=str(tmp_path / "small"))
    assert str(size) in message and str(size + 4) in message


@each_script
def test_more_tokens_than_positions(script, refused):
    message = refused(script, max_prompt_length=40, max_completion_length=25)
    assert "65 tokens" in message and "64 positions" in message
    assert "--max-prompt-length" in message and "--max-completion-length" in message


@each_of(*SAMPLERS)
def test_a_reward_model_with_too_few_positions(script, refused, inputs, tmp_path):
    """The reward model reads whole sequences, too."""
    config, params = sft.load_model(inputs / "scorer")
    params = params | {"wpe": {"embedding": params["wpe"]["embedding"][:20]}}
    config = dataclasses.replace(config, n_positions=20)
    sft.save_model(tmp_path / "short", config, params, inputs / "scorer")
    message = refused(script, reward_model=str(tmp_path / "short"))
    assert "24 tokens" in message and "20 positions" in message


@each_of(*SAMPLERS)
def test_a_reward_model_without_a_score(script, refused, inputs):
    message = refused(script, reward_model=str(inputs / "lm"))
    assert "is not a reward model" in message and str(inputs / "lm") in message


@each_of(sft, ppo, dpo, grpo, iterative_dpo, sharded)
def test_a_reward_model_as_the_language_model(script, refused, inputs):
    """Its trunk has no language-model head, and what is saved would be a classifier again."""
    message = refused(script, model=str(inputs / "scorer"))
    assert str(inputs / "scorer") in message


@each_of(*SAMPLERS)
def test_a_reward_model_with_another_tokenizer(script, refused, inputs, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    file = json.loads((inputs / "lm" / "tokenizer.json").read_text("utf-8"))
    merges = file["model"]["merges"]
    last = "".join(merges.pop() if isinstance(merges[-1], list) else merges.pop().split(" "))
    del file["model"]["vocab"][last]
    (folder / "tokenizer.json").write_text(json.dumps(file), "utf-8")
    copy_model(inputs / "scorer", tmp_path / "other", tokenizer=folder)
    message = refused(script, reward_model=str(tmp_path / "other"))
    assert "tokenizers" in message and "differ" in message


# ------------------------------------------------------------------------------ flags


@each_script
def test_batch_sizes_that_do_not_divide(script, refused):
    message = refused(script, micro_batch_size=3)
    assert "--micro-batch-size 3" in message and "--batch-size" in message


@each_of(ppo, grpo, sharded)
def test_minibatches_that_do_not_divide(script, refused):
    assert "--num-minibatches 3" in refused(script, num_minibatches=3)


@each_of(ppo, grpo, sharded)
def test_micro_batches_that_do_not_divide_a_minibatch(script, refused):
    message = refused(script, num_minibatches=4)  # minibatches of 2, micro-batches of 4
    assert "--micro-batch-size 4" in message


@each_of(*SAMPLERS, dpo)
def test_a_temperature_of_0_samples_nothing(script, refused):
    assert "--temperature must be above 0" in refused(script, temperature=0.0)


@each_of(grpo, iterative_dpo, sharded)
def test_a_group_of_one_has_nothing_to_compare_with(script, refused):
    assert "--num-generations must be" in refused(script, num_generations=1)


def test_groups_that_do_not_divide_a_batch(refused):
    message = refused(grpo, num_generations=3)
    assert "--num-generations 3" in message and "--batch-size 8" in message


@each_script
def test_sizes_and_intervals_of_0(script, refused):
    flags = {field.name: field.default for field in dataclasses.fields(script.Args)}
    flags = [name for name, default in flags.items() if type(default) is int]
    flags = set(flags) - {"seed", "warmup_steps", "data", "fsdp", "tensor"} | (
        {"ref_sync_steps"} if script in (grpo, sharded) else set()
    )
    assert {"batch_size", "micro_batch_size", "log_every", "eval_every", "save_every"} <= flags
    for name in flags:
        message = refused(script, **{name: 0})
        assert f"--{name.replace('_', '-')} must be at least 1" in message


def test_drawn_labels_are_of_two_completions(refused):
    message = refused(iterative_dpo, num_generations=3, pair="sampled")
    assert "--num-generations" in message and "--pair best-worst" in message


def test_batches_that_do_not_divide_a_round(refused):
    """Pairs that fill no batch would have been sampled and scored for nothing."""
    message = refused(iterative_dpo, prompts_per_round=20)
    assert "--prompts-per-round 20" in message and "--batch-size 8" in message


@pytest.mark.parametrize("loss", ["ipo", "hinge"])
@each_of(dpo, iterative_dpo)
def test_label_smoothing_is_of_one_loss(script, loss, refused):
    message = refused(script, loss=loss, label_smoothing=0.1)
    assert "--label-smoothing" in message and loss in message


@each_of(dpo, iterative_dpo)
def test_numbers_without_a_meaning(script, refused):
    """A beta of 0 has no reference, and labels that are more often wrong than right are others."""
    assert "--beta must be above 0" in refused(script, beta=0.0)
    for value in (-0.1, 0.5):
        assert "--label-smoothing must be" in refused(script, label_smoothing=value)


FAILING = {
    "broken": ["broken", "ZeroDivisionError"],
    "needs": ["needs", "NameError"],
    "short": ["short", "12"],
    "nan": ["nan", "finite"],
    "words": ["words", "ValueError"],
    "absent": ["my_rewards.py", "absent"],
}


@pytest.mark.parametrize("function", FAILING)
def test_reward_functions_that_fail(function, refused, rewards):
    message = refused(ppo, reward=(f"{rewards}:{function}",))
    assert all(word in message for word in FAILING[function])
    if function != "absent":
        message = refused(ppo, gold=f"{rewards}:{function}", overwrite=True)
        assert all(word in message for word in FAILING[function])


@pytest.mark.parametrize("function", ["broken", "short", "nan"])
@each_of(grpo, iterative_dpo, sharded)
def test_reward_functions_that_fail_elsewhere(script, function, refused, rewards):
    message = refused(script, reward=(f"{rewards}:{function}",), reward_model=None)
    assert all(word in message for word in FAILING[function])


@each_of(dpo, grpo, iterative_dpo, sharded)
def test_a_gold_reward_that_fails(script, refused, rewards):
    message = refused(script, gold=f"{rewards}:nan")
    assert all(word in message for word in FAILING["nan"])


def test_a_reward_function_that_refuses_columns(refused, rewards, tmp_path):
    """TRL's rule: a function must accept the columns that it does not use."""
    rows = [row | {"stars": 4} for row in first_rows("prompts_test", 12)]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    message = refused(ppo, reward=(f"{rewards}:strict",), eval_dataset=str(path))
    assert "strict" in message and "stars" in message


@each_of(*SAMPLERS)
def test_a_reward_file_that_fails(script, refused, tmp_path):
    assert "absent.py" in refused(script, reward=(f"{tmp_path}/absent.py:f",))
    assert "file.py:function" in refused(script, reward=("good",))
    (tmp_path / "syntax.py").write_text("def f(:\n")
    assert "syntax.py" in refused(script, reward=(f"{tmp_path}/syntax.py:f",))


@each_of(*SAMPLERS)
def test_reward_weights_and_rewards_differ_in_number(script, refused, rewards):
    message = refused(script, reward=(f"{rewards}:one",), reward_weight=(1.0, 2.0))
    assert "--reward-weight" in message and "1 times" in message and "2 times" in message


@each_of(*SAMPLERS)
def test_rewards_are_weighted_and_none_counts_nothing(script, inputs, rewards, tmp_path):
    """Two functions and the learned reward add up; the data's columns reach the functions."""
    paths = {}
    for field, name, count in (("dataset", "train", 24), ("eval_dataset", "test", 12)):
        rows = first_rows(f"prompts_{name}", count)
        rows = [row | {"number": i} for i, row in enumerate(rows)]
        paths[field] = str(write_jsonl(tmp_path / f"{name}.jsonl", rows))
    functions = tuple(f"{rewards}:{name}" for name in ("index", "none", "one"))
    changes = paths | {"reward_model": None, "missing_eos_penalty": 0.25}
    weights = {"reward": functions, "reward_weight": (3.0, 5.0, 7.0)}
    script.main(small_args(script, inputs, tmp_path / "run", **changes, **weights))
    lines = (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()
    samples = [json.loads(line) for line in lines][:8]  # those of step 0
    bonus = [round(s["score"] - 0.3 * i - 7, 5) for i, s in enumerate(samples)]
    assert set(bonus) <= {0.0, -0.25} and -0.25 in bonus


# ------------------------------------------------------------------------------ the run itself


def poison(script, monkeypatch, name, *calls):
    """In these calls of the script's train_step, or in all, the metric `name` is NaN."""
    numbers, jit_on_mesh = itertools.count(1), sharded.jit_on_mesh

    def poisoned(train_step):
        def call(state, *rest):
            state, metrics = train_step(state, *rest)
            bad = not calls or next(numbers) in calls
            return state, metrics | ({name: jnp.float32("nan")} if bad else {})

        return call

    if script is sharded:  # the last of those that are compiled for the mesh

        def jitted(mesh, states):
            sample, train_step = jit_on_mesh(mesh, states)
            return sample, poisoned(train_step)

        monkeypatch.setattr(script, "jit_on_mesh", jitted)
    else:
        monkeypatch.setattr(script, "train_step", poisoned(script.train_step))


@each_script
def test_a_loss_that_is_not_finite_stops_the_run(script, refused, tmp_path, monkeypatch):
    name = "loss/policy_avg" if script in (ppo, grpo, sharded) else "loss"
    poison(script, monkeypatch, name, 3)
    message = refused(script)
    assert f"{name} is not finite at step 3" in message and "--learning-rate" in message
    rows = metrics_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert math.isfinite(rows[2][name]) and rows[3][name] is None  # JSON knows no NaN


def test_a_learning_rate_that_blows_up_stops_the_run(refused, tmp_path):
    message = refused(sft, learning_rate=1e30, warmup_steps=0)
    step = int(re.search(r"at step (\d+)", message)[1])
    assert metrics_of(tmp_path / "run")[-1]["step"] == step < 8
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_loss_that_is_not_finite_leaves_no_checkpoint(refused, tmp_path):
    """It is found at the next line of metrics.jsonl, which is written before the checkpoint."""
    changes = {"log_every": 4, "eval_every": 100, "save_every": 4}
    message = refused(sft, learning_rate=1e30, warmup_steps=0, **changes)
    assert "not finite at step 4" in message
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


@each_of(ppo, dpo, grpo, iterative_dpo, sharded)
def test_a_step_that_is_saved_is_logged_before(script, refused, tmp_path, monkeypatch):
    """Whatever --log-every is, a checkpoint of a loss that is not finite is never written."""
    poison(script, monkeypatch, "loss")
    message = refused(script, log_every=100, eval_every=100)
    assert "loss is not finite at step 3" in message
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_pairs_of_two_equal_answers(inputs, tmp_path):
    """They teach nothing, and do no harm: the loss is ln 2, and the run goes to its end."""
    rows = [row | {"rejected": row["chosen"]} for row in first_rows("preferences_train", 24)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    dpo.main(small_args(dpo, inputs, tmp_path / "run", dataset=str(path)))
    rows = metrics_of(tmp_path / "run")
    assert rows[-1]["step"] == 6 and (tmp_path / "run" / "model").exists()
    for row in rows[1:]:  # beside what the chosen answer alone teaches
        assert row["loss"] - row["nll_loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert abs(row["rewards/margins"]) < 1e-4


@pytest.mark.parametrize("pair", ["best-worst", "sampled"])
def test_completions_of_equal_scores(pair, inputs, rewards, tmp_path):
    """With best-worst one stands against itself and teaches nothing; else a coin is tossed."""
    changes = {"reward_model": None, "missing_eos_penalty": 0.0, "pair": pair}
    changes |= {"reward": (f"{rewards}:by_prompt",)}
    iterative_dpo.main(small_args(iterative_dpo, inputs, tmp_path / "run", **changes))
    rows = metrics_of(tmp_path / "run")[1:]
    assert [row["pairs/ties"] for row in rows] == [float(pair == "best-worst")] * 6
    for row in rows:
        is_ln_2 = row["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert is_ln_2 or pair == "sampled"
    assert (rows[-1]["grad_norm"] > 1e-3) == (pair == "sampled")


# ------------------------------------------------------------------------------ command line


def run_python(*arguments):
    """A process in the scripts' folder, with nothing set that could import JAX early."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "100"},
        timeout=60,
    )


@pytest.mark.parametrize("name", HELP)
def test_help_names_every_flag_and_does_not_import_jax(name):
    code = """
import runpy, sys
try:
    sys.argv = [sys.argv[1], "--help"]
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = {"jax", "flax", "optax", "numpy", "tiktoken"} & set(sys.modules)
    print("imported:", sorted(heavy), file=sys.stderr)
"""
    result = run_python("-c", code, f"{name}.py")
    assert result.returncode == 0 and result.stderr == "imported: []\n"
    fields = dataclasses.fields(__import__(name).Args)
    for field in fields:
        assert "--" + field.name.replace("_", "-") in result.stdout
    assert len(fields) >= 10 and f"python {name}.py" in result.stdout


@pytest.mark.parametrize("name", HELP)
def test_a_mistyped_flag_suggests_the_right_one(name):
    result = run_python(f"{name}.py", "--temprature", "1.0")
    assert result.returncode == 2 and "--temperature" in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", names)
def test_an_error_in_a_process(name, tmp_path):
    """What the other tests see as SystemExit: one line on stderr, status 2, no run folder left."""
    line = [sys.executable, str(ROOT / f"{name}.py"), "--model", "runs/absent/model"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: no model at runs/absent/model")
    assert result.stderr.count("\n") == 1 and list(Path(tmp_path).iterdir()) == []
