"""Runs of the training scripts: what they leave, and that stopping them changes nothing."""

import dataclasses
import functools
import gzip
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import dpo
import grpo
import iterative_dpo
import mixed_precision
import ppo
import reward
import sft
import sharded

ROOT = Path(__file__).resolve().parent.parent
REVIEWS = ROOT / "data" / "reviews"
SCRIPTS = [sft, reward, ppo, dpo, grpo, iterative_dpo, mixed_precision]
DATA = {sft: "sft", mixed_precision: "sft", reward: "preferences", dpo: "preferences"}
# The checkpoint of sharded.py is a folder, for test_sharded.py, which also says why jax 0.5.0 and
# its cache of compiled programs are no place for these runs on eight devices.
ALL = [*SCRIPTS, sharded] if jax.__version_info__ >= (0, 10) else SCRIPTS
LEAF = "['h.0']['mlp']['c_fc']['kernel']"


def each_of(*scripts):
    """The test is run with each of these as `script`."""
    scripts = [script for script in scripts if script in ALL]
    return pytest.mark.parametrize("script", scripts, ids=lambda script: script.__name__)


class Crash(Exception):
    """Stands for whatever ends a process in the middle of a run."""


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def open_embedded(name):
    """An embedded data file, opened as text."""
    (path,) = REVIEWS.glob(f"{name}.jsonl*")
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")


def first_rows(name, count):
    """The first rows of an embedded data file with short texts: few padded widths to compile."""

    def words(row):
        answers = [len(row[name].split()) for name in ("completion", "chosen") if name in row]
        return len(row["prompt"].split()) + max([*answers, len(row.get("rejected", "").split())])

    with open_embedded(name) as file:
        short = (row for row in map(json.loads, file) if words(row) <= 22)
        return list(itertools.islice(short, count))


def make_inputs(folder):
    """In `folder`: small data files, a language model and a reward model, both untrained."""
    for name, count in (("sft", 32), ("preferences", 24), ("prompts", 24)):
        write_jsonl(folder / f"{name}_train.jsonl", first_rows(f"{name}_train", count))
        write_jsonl(folder / f"{name}_test.jsonl", first_rows(f"{name}_test", 12))
    tokenizer = sft.load_tokenizer(REVIEWS / "tokenizer")
    ids = {"eos_token_id": tokenizer.eot_token, "pad_token_id": tokenizer.eot_token + 1}
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
    config = sft.GPT2Config(vocab_size=tokenizer.n_vocab, **sizes, **ids)
    one = jnp.ones((1, 1), jnp.int32)
    for seed, (name, model) in enumerate((("lm", sft.GPT2), ("scorer", reward.RewardModel))):
        params = model(config).init(jax.random.key(seed), one, one)["params"]
        sft.save_model(folder / name, config, params, REVIEWS / "tokenizer")
    return folder


def small_args(script, inputs, run_dir, **changes):
    """Args of a run that takes a second or two: 6 steps (sft.py: 8), checkpoints at 3 and 6.

    In iterative_dpo.py these are two rounds of three steps.
    """
    kind = DATA.get(script, "prompts")  # those of the others
    model = {"model": str(inputs / "lm")}
    scratch = {"tokenizer": str(inputs / "lm")}
    scratch |= {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 64}
    sampler = model | {"reward_model": str(inputs / "scorer"), "max_completion_length": 8}
    grouped = sampler | {"steps": 6, "num_generations": 2}
    common = {
        "dataset": str(inputs / f"{kind}_train.jsonl"),
        "eval_dataset": str(inputs / f"{kind}_test.jsonl"),
        "run_dir": str(run_dir),
    }
    common |= {"warmup_steps": 2, "log_every": 1, "eval_every": 2, "save_every": 3}
    common |= {"batch_size": 8, "micro_batch_size": 4, "epochs": 2}
    rounds = {"rounds": 2, "prompts_per_round": 24, "epochs": 1, "save_every": 1}
    own = {
        sft: scratch,
        mixed_precision: scratch,
        reward: model | {"num_generations": 2},
        ppo: sampler | {"steps": 6},
        dpo: model,
        grpo: grouped,
        sharded: grouped | {"data": 2, "fsdp": 2, "tensor": 2},  # 4 prompts and 2 heads
        iterative_dpo: sampler | rounds,
    }[script]
    return script.Args(**(common | own | changes))


def metrics_of(run):
    """The lines of metrics.jsonl without perf/*, which no two runs share."""
    lines = (Path(run) / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def assert_same_run(run, other):
    """Equal metrics, samples, checkpoint (where it is a file) and model: to the last bit."""
    assert metrics_of(run) == metrics_of(other)
    files = ["samples.jsonl", "model/config.json", "model/model.safetensors"]
    if not (run / "checkpoint").is_dir():
        files.append("checkpoint.safetensors")
    for name in files:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def command(script, args):
    """The command line of these Args."""
    line = [sys.executable, str(ROOT / f"{script.__name__}.py")]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value != field.default:
            flag = "--" + field.name.replace("_", "-")
            for item in value if isinstance(value, tuple) else [value]:
                line += [flag] if item is True else [flag, str(item)]
    return line


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


OPTIMIZERS = {script: functools.cache(script.make_optimizer) for script in SCRIPTS}


def train(script, inputs, folder, **changes):
    """The folder of a run, which is folder/run.

    Compiled programs are found by the Args, the folder's name among them, and by the optimizer: so
    both are the same in one test and the next. --resume serves a run's beginning, too.
    """
    args = small_args(script, inputs, "run", **({"resume": True} | changes))
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(script, "make_optimizer", OPTIMIZERS[script])
        script.main(args)
    return folder / "run"


def train_until(crash, script, inputs, folder, **changes):
    """The folder of a run that this crash ends."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash(script, patch)
        train(script, inputs, folder, **changes)
    assert not (folder / "run" / "model").exists()
    return folder / "run"


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """runs(script) -> the folder of a run that was never stopped."""

    @functools.cache
    def run(script):
        return train(script, inputs, tmp_path_factory.mktemp(script.__name__))

    return run


# ------------------------------------------------------------------------------ what a run leaves


@each_of(*SCRIPTS)
def test_a_run_leaves_its_files(script, runs, inputs):
    run = runs(script)
    total = 8 if script in (sft, mixed_precision) else 6
    saved = json.loads((run / "args.json").read_text("utf-8"))
    args = json.loads(json.dumps(vars(small_args(script, inputs, "run"))))
    assert saved == {k: v for k, v in args.items() if k not in ("resume", "overwrite")}

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(total + 1))
    evaluated = [row["step"] for row in rows if any(k.startswith("eval/") for k in row)]
    assert evaluated == list(range(0, total + 1, 2))
    for row in rows[1:]:
        assert row["grad_norm"] > 0 and row["perf/tokens_per_second"] > 0 and row["lr"] > 0
    (events,) = run.glob("events.out.tfevents.*")
    assert b"grad_norm" in events.read_bytes()

    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sorted({sample["step"] for sample in samples}) == evaluated
    assert all(isinstance(sample["prompt"], str) for sample in samples)
    if script in (ppo, grpo, iterative_dpo):  # the score has one name in all of them
        assert all("eval/reward" in rows[step] for step in evaluated)
        assert all("reward" in row for row in [*rows[1:], *samples])
    assert not any(name.endswith("scores") for row in rows for name in row)

    config, params = script.load_model(run / "model")
    assert ("score" in params) == (script is reward)
    assert config.n_layer == 1 and script.load_tokenizer(run / "model").n_vocab <= config.vocab_size
    # The checkpoint holds the state; the model is its parameters.
    prefix = ".params['policy']" if script is ppo else ".params"
    with safe_open(run / "checkpoint.safetensors", "np") as file:
        assert file.metadata()["step"] == str(total)
        names = list(file.keys())
        kernel = file.get_tensor(prefix + LEAF)
    assert (kernel == params["h.0"]["mlp"]["c_fc"]["kernel"]).all()
    assert any(name.startswith(".opt_state") for name in names)
    assert (".kl_coef" in names) == (script is ppo)
    assert not any(name.startswith(".ref_params") for name in names)


@each_of(dpo, iterative_dpo)
def test_training_on_pairs_begins_at_ln_2(script, runs):
    """At the reference no answer is preferred: margins of 0, and a loss of ln 2 beside the NLL."""
    weight = script.Args().nll_coef
    start, first, *_, last = metrics_of(runs(script))
    assert first["loss"] - weight * first["nll_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["rewards/margins"]) < 1e-4 < abs(last["rewards/margins"])
    assert abs(start["eval/objective/kl"]) < 1e-5
    if script is dpo:
        assert start["eval/rewards/margins"] == start["eval/rewards/accuracies"] == 0
        expected = math.log(2) + weight * start["eval/nll_loss"]
        assert start["eval/loss"] == pytest.approx(expected, abs=1e-5)


@each_of(*SCRIPTS)
def test_another_seed_gives_another_run(script, runs, inputs, tmp_path):
    """That one seed gives one run is part of test_resumed_equals_never_stopped."""
    run = train_until(crash_before_the_first_checkpoint, script, inputs, tmp_path, seed=2)
    _, *rows = zip(metrics_of(run), metrics_of(runs(script)))
    assert len(rows) == 2
    for row, other in rows:
        assert row["step"] == other["step"] and row != other


def test_each_step_is_logged_alone(runs, inputs, tmp_path):
    """With log_every 3, a line has the metrics of its own step, not a mean over three."""
    lines = metrics_of(train(sft, inputs, tmp_path, log_every=3, eval_every=6))
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    rows = metrics_of(runs(sft))
    assert all(rows[line["step"]].items() >= line.items() for line in lines)


@each_of(sft, reward)
def test_a_model_keeps_what_is_not_of_the_training(script, inputs, tmp_path):
    """Entries of config.json that are not ours, and the files that generate text or a chat."""
    source = tmp_path / "source"
    shutil.copytree(inputs / "lm", source)
    saved = json.loads((source / "config.json").read_text("utf-8"))
    ours = {"bos_token_id": 7, "task_specific_params": {"x": [1]}, "n_inner": None}
    (source / "config.json").write_text(json.dumps(saved | ours), "utf-8")
    files = {"generation_config.json": '{"top_k": 5}', "chat_template.jinja": "{{ messages }}"}
    for name, text in files.items():
        (source / name).write_text(text, "utf-8")
    config, params = script.load_model(source)
    folder = source
    if script is reward:  # which saves from a copy of the tokenizer, with a pad token of its own
        folder = tmp_path / "tokenizer"
        params, config = reward.add_pad_token(params, config, source, folder)
    script.save_model(tmp_path / "model", config, params, folder, reward_gain=2.0)
    saved = json.loads((tmp_path / "model" / "config.json").read_text("utf-8"))
    assert saved.items() >= (ours | {"reward_gain": 2.0, "vocab_size": config.vocab_size}).items()
    for name, text in files.items():
        assert (tmp_path / "model" / name).read_text("utf-8") == text


# ------------------------------------------------------------------------------ stopped and resumed


def crash_before_the_first_checkpoint(script, patch):
    log = script.RunFolder.log

    def crash(run, step, *rest):
        log(run, step, *rest)
        if step == 2:
            raise Crash

    patch.setattr(script.RunFolder, "log", crash)


def crash_after_a_checkpoint(script, patch):
    """In step 5, whose line in metrics.jsonl is torn; the checkpoint is of step 3."""
    append = script.RunFolder.append

    def crash(run, name, row):
        if name == "metrics.jsonl" and row["step"] == 5:
            with open(run.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(row)[:-7])
            raise Crash
        append(run, name, row)

    patch.setattr(script.RunFolder, "append", crash)


def crash_while_writing(name):
    """Half of the file is there, under the name that it has before it is whole."""

    def set_trap(script, patch):
        replace = os.replace

        def crash(source, target):
            if Path(target).name == name:
                os.truncate(source, os.path.getsize(source) // 2)
                raise Crash
            replace(source, target)

        patch.setattr(os, "replace", crash)

    return set_trap


@each_of(*SCRIPTS)
def test_resumed_equals_never_stopped(script, runs, inputs, tmp_path, monkeypatch):
    """A run that crashes in four ways comes to the same end: each resume begins where it should."""
    begun, start = [], script.RunFolder.start

    def watched_start(*rest):
        state, step = start(*rest)
        begun.append(step)
        return state, step

    monkeypatch.setattr(script.RunFolder, "start", watched_start)
    (tmp_path / "run").mkdir()  # an empty folder is as good as none
    for crash in (
        crash_before_the_first_checkpoint,
        crash_after_a_checkpoint,
        crash_while_writing("checkpoint.safetensors"),  # the second one
        crash_while_writing("model.safetensors"),  # config.json is written, and the last checkpoint
    ):
        train_until(crash, script, inputs, tmp_path)
    run = train(script, inputs, tmp_path)
    assert begun == [0, 0, 3, 3, 8 if script in (sft, mixed_precision) else 6]
    assert_same_run(run, runs(script))
    assert not list(run.rglob("*.tmp"))


def run_and_resume(script, inputs, folder, **changes):
    """(metrics, checkpoint after a crash in step 5, last checkpoint), with bit-equal resuming."""
    whole = train(script, inputs, folder / "whole", **changes)
    run = train_until(crash_after_a_checkpoint, script, inputs, folder, **changes)
    saved = load_file(run / "checkpoint.safetensors")
    train(script, inputs, folder, **changes)
    assert_same_run(run, whole)
    return metrics_of(run), saved, load_file(run / "checkpoint.safetensors")


def test_a_steered_kl_coef_is_resumed(inputs, tmp_path):
    """ppo.py's kl_coef is part of the state, too."""
    (_, *rows), *_ = run_and_resume(ppo, inputs, tmp_path, kl_target=0.01, kl_horizon=100)
    for row, following in itertools.pairwise(rows):
        error = min(max(row["objective/kl"] / 0.01 - 1, -0.2), 0.2)
        expected = row["objective/kl_coef"] * (1 + error * 8 / 100)
        assert following["objective/kl_coef"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["objective/kl_coef"] == pytest.approx(ppo.Args().kl_coef)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_reference_that_moves_is_resumed(share, runs, inputs, tmp_path):
    """grpo.py's reference moves at steps 2, 4 and 6; the run crashes in step 5 and resumes at 3."""
    changes = {"ref_sync_steps": 2, "ref_mixup_alpha": share}
    rows, saved, last = run_and_resume(grpo, inputs, tmp_path, **changes)
    start = grpo.load_model(inputs / "lm")[1]["h.0"]["mlp"]["c_fc"]["kernel"]
    params, reference = saved[".params" + LEAF], saved[".ref_params" + LEAF]
    assert (reference != start).any() and (reference != params).any()
    static = metrics_of(runs(grpo))
    assert rows[1] == static[1] and rows[3] != static[3]  # step 3 is the first with another one
    same = last[".params" + LEAF] == last[".ref_params" + LEAF]
    assert same.all() == (share == 1)


@pytest.mark.parametrize("change", [{"reset_optimizer": True}, {"reference": "previous"}])
def test_rounds_are_resumed(change, runs, inputs, tmp_path):
    """What iterative_dpo.py does anew in each round, it does in a round that a resume redoes."""
    rows, saved, last = run_and_resume(iterative_dpo, inputs, tmp_path, **change)
    plain = metrics_of(runs(iterative_dpo))
    assert {int(x) for name, x in saved.items() if name.endswith(".count")} == {3}
    if "reference" in change:
        assert rows[:4] == plain[:4] and rows[4] != plain[4]  # the first round has the start's
        assert abs(rows[4]["rewards/margins"]) < 1e-4 < abs(plain[4]["rewards/margins"])
    else:
        rates = [row["lr"] for row in rows[1:]]
        assert rates[:3] == rates[3:] and rates[0] < rates[1]
        assert {int(x) for name, x in last.items() if name.endswith(".count")} == {3}


def test_ctrl_c_while_a_round_is_sampled(runs, inputs, tmp_path, capsys):
    """The first round of iterative_dpo.py is kept, the second is done again."""
    rollout, calls = iterative_dpo.rollout, itertools.count(1)

    def interrupted(*rest, **options):
        if next(calls) == 4:  # after those of step 0, of the first round and of step 2
            signal.raise_signal(signal.SIGINT)
        return rollout(*rest, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(iterative_dpo, "rollout", interrupted)
        train(iterative_dpo, inputs, tmp_path)
    assert stop.value.code == 130 and "step 3" in capsys.readouterr().out
    assert metrics_of(tmp_path / "run")[-1]["step"] == 3
    assert_same_run(train(iterative_dpo, inputs, tmp_path), runs(iterative_dpo))


def wait_for(happened, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.002)


def test_ctrl_c_and_kill_9(inputs, tmp_path):
    """A process that is interrupted, resumed, killed and resumed comes to the same end."""
    changes = {"epochs": 50, "save_every": 1, "eval_every": 100}
    whole = train(sft, inputs, tmp_path, **changes)
    run = tmp_path / "again"
    args = small_args(sft, inputs, run, resume=True, **changes)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    process = subprocess.Popen(command(sft, args), **streams)
    wait_for((run / "checkpoint.safetensors").exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    with safe_open(run / "checkpoint.safetensors", "np") as file:
        step = int(file.metadata()["step"])
    assert process.returncode == 130 and 1 <= step < 200
    assert err == "" and "Traceback" not in out
    last = out.strip().splitlines()[-1]
    assert f"step {step}" in last and "--resume" in last

    def lines():
        return (run / "metrics.jsonl").read_bytes().count(b"\n")

    before = lines()
    process = subprocess.Popen(command(sft, args), **streams)
    wait_for(lambda: lines() > before, process)
    time.sleep(random.random() / 4)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not (run / "model").exists()

    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 199, "loss": 2.')
    sft.main(args)
    assert_same_run(run, whole)


# ------------------------------------------------------------------------------ folders


@each_of(*ALL)
def test_a_folder_with_a_run(script, inputs, tmp_path, error_line, capsys):
    """The ways on are named, and what has changed; a finished run says that it is finished."""
    args = small_args(script, inputs, tmp_path / "run")
    content = json.dumps(script.RunFolder(args).args)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "args.json").write_text(content, "utf-8")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    message = error_line(script.main, args)
    assert all(way in message for way in ("--resume", "--overwrite", "--run-dir"))
    args = dataclasses.replace(args, resume=True)
    message = error_line(script.main, dataclasses.replace(args, seed=5, learning_rate=1e-5))
    assert "seed" in message and "learning_rate" in message and "batch_size" not in message
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert out.count("\n") == 1 and "finished" in out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@each_of(*ALL)
def test_a_folder_that_is_no_run_is_refused(script, inputs, tmp_path, error_line):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        message = error_line(script.main, small_args(script, inputs, tmp_path, overwrite=overwrite))
        assert str(tmp_path) in message and "--run-dir" in message
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_overwrite_replaces_a_run_once_the_inputs_are_good(runs, inputs, tmp_path, error_line):
    """A mistyped data file must not cost the run that was there."""
    run = tmp_path / "run"
    shutil.copytree(runs(sft), run)
    (run / "old.txt").write_text("of the run before")
    error_line(sft.main, small_args(sft, inputs, run, overwrite=True, dataset="absent.jsonl"))
    assert_same_run(run, runs(sft))
    assert (run / "old.txt").exists()
    train(sft, inputs, tmp_path, overwrite=True, resume=False)
    assert not (run / "old.txt").exists() and len(list(run.glob("events.out.*"))) == 1
    assert_same_run(run, runs(sft))


def input_in_run(inputs, run, script, name):
    """Changes to the arguments by which the input `name` is read from the folder of the run."""
    (run / "args.json").write_text("{}")
    if name in ("model", "tokenizer", "reward_model"):
        shutil.copytree(inputs / ("scorer" if name == "reward_model" else "lm"), run / "model")
        return {name: str(run / "model")}
    if name in ("dataset", "eval_dataset"):
        write_jsonl(run / "rows.jsonl", first_rows("sft_train", 8))
        return {name: str(run / "rows.jsonl")}
    (run / "f.py").write_text("def f(completions, **_):\n    return [1.0] * len(completions)\n")
    return {name: (f"{run}/f.py:f",) if name == "reward" else f"{run}/f.py:f"}


INPUTS = {
    sft: ["model", "tokenizer", "eval_dataset"],
    reward: ["model", "dataset"],
    ppo: ["reward_model", "reward", "gold"],
    dpo: ["model", "dataset", "gold"],
    grpo: ["reward_model", "reward"],
    iterative_dpo: ["model", "reward", "eval_dataset"],
    sharded: ["reward_model"],
}


@each_of(*INPUTS)
def test_overwrite_never_removes_an_input(script, inputs, tmp_path, error_line):
    for name in INPUTS[script]:
        run = tmp_path / name
        run.mkdir()
        changes = input_in_run(inputs, run, script, name)
        args = small_args(script, inputs, run, overwrite=True, **changes)
        assert "--overwrite" in error_line(script.main, args)
        assert len(list(run.iterdir())) == 2


@each_of(ppo, grpo, iterative_dpo, sharded)
def test_overwrite_never_removes_a_default_input(script, inputs, tmp_path, monkeypatch, error_line):
    """Without --reward-model these read runs/reward/model, so runs/reward must stay."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs / "scorer", "runs/reward/model")
    Path("runs/reward/args.json").write_text("{}")
    args = small_args(script, inputs, "runs/reward", overwrite=True, reward_model=None)
    message = error_line(script.main, args)
    assert "--overwrite" in message and Path("runs/reward/model/config.json").exists()
