"""Runs of the training scripts: what they leave, and that stopping them changes nothing."""

import dataclasses
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
names = [script.__name__ for script in SCRIPTS]
# The checkpoint of sharded.py is a folder, for test_sharded.py, which also says why jax 0.5.0 and
# its cache of compiled programs are no place for these runs on eight devices.
ALL = [*SCRIPTS, sharded] if jax.__version_info__ >= (0, 10) else SCRIPTS
all_names = [script.__name__ for script in ALL]


class Crash(Exception):
    """Stands for whatever ends a process in the middle of a run."""


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def first_rows(name, count):
    """The first rows of an embedded data file with short texts: few padded widths to compile."""

    def words(row):
        answers = [len(row[name].split()) for name in ("completion", "chosen") if name in row]
        return len(row["prompt"].split()) + max([*answers, len(row.get("rejected", "").split())])

    with open(REVIEWS / f"{name}.jsonl", encoding="utf-8") as file:
        short = (row for row in map(json.loads, file) if words(row) <= 22)
        return list(itertools.islice(short, count))


def make_inputs(folder):
    """In `folder`: small data files, a language model and a reward model, both untrained."""
    for name, count in (("sft", 32), ("preferences", 24), ("prompts", 24)):
        write_jsonl(folder / f"{name}_train.jsonl", first_rows(f"{name}_train", count))
        write_jsonl(folder / f"{name}_test.jsonl", first_rows(f"{name}_test", 12))
    tokenizer = sft.load_tokenizer(REVIEWS / "tokenizer")
    config = sft.GPT2Config(
        vocab_size=tokenizer.n_vocab,
        n_positions=64,
        n_embd=32,
        n_layer=1,
        n_head=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eot_token,
        pad_token_id=tokenizer._special_tokens.get("<|pad|>"),
    )
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
    scratch = {
        "tokenizer": str(inputs / "lm"),
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 32,
        "n_positions": 64,
    }
    grouped = {
        "model": str(inputs / "lm"),
        "reward_model": str(inputs / "scorer"),
        "steps": 6,
        "num_generations": 2,
        "max_completion_length": 8,
    }
    common = {
        "dataset": str(inputs / f"{kind}_train.jsonl"),
        "eval_dataset": str(inputs / f"{kind}_test.jsonl"),
        "run_dir": str(run_dir),
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 2,
        "save_every": 3,
        "batch_size": 8,
        "micro_batch_size": 4,
        "epochs": 2,
    }
    own = {
        sft: scratch,
        mixed_precision: scratch,
        reward: {"model": str(inputs / "lm"), "num_generations": 2},
        ppo: {
            "model": str(inputs / "lm"),
            "reward_model": str(inputs / "scorer"),
            "steps": 6,
            "max_completion_length": 8,
        },
        dpo: {"model": str(inputs / "lm")},
        grpo: grouped,
        sharded: grouped | {"data": 2, "fsdp": 2, "tensor": 2},  # 4 prompts and 2 heads
        iterative_dpo: {
            "model": str(inputs / "lm"),
            "reward_model": str(inputs / "scorer"),
            "rounds": 2,
            "prompts_per_round": 24,
            "epochs": 1,
            "save_every": 1,
            "max_completion_length": 8,
        },
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


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """{script: folder of a run that was never stopped}."""
    folders = {script: tmp_path_factory.mktemp("runs") / script.__name__ for script in ALL}
    handler = signal.getsignal(signal.SIGINT)
    for script, folder in folders.items():
        script.main(small_args(script, inputs, folder))
    signal.signal(signal.SIGINT, handler)
    return folders


# ------------------------------------------------------------------------------ what a run leaves


@pytest.mark.parametrize("script", SCRIPTS, ids=names)
def test_a_run_leaves_its_files(script, runs, inputs):
    run = runs[script]
    total = 8 if script in (sft, mixed_precision) else 6
    saved = json.loads((run / "args.json").read_text("utf-8"))
    args = json.loads(json.dumps(vars(small_args(script, inputs, run))))
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
    with safe_open(run / "checkpoint.safetensors", "np") as file:
        assert file.metadata()["step"] == str(total)
    assert not list(run.rglob("*.tmp"))

    config, params = script.load_model(run / "model")
    assert ("score" in params) == (script is reward)
    assert config.n_layer == 1 and script.load_tokenizer(run / "model").n_vocab <= config.vocab_size


@pytest.mark.parametrize("script", SCRIPTS, ids=names)
def test_a_checkpoint_holds_the_state_and_the_model_is_its_parameters(script, runs):
    _, params = script.load_model(runs[script] / "model")
    prefix = ".params['policy']" if script is ppo else ".params"
    with safe_open(runs[script] / "checkpoint.safetensors", "np") as file:
        kernel = file.get_tensor(prefix + "['h.0']['mlp']['c_fc']['kernel']")
        assert any(key.startswith(".opt_state") for key in file.keys())  # noqa: SIM118
        assert (".kl_coef" in file.keys()) == (script is ppo)  # noqa: SIM118
        assert not any(key.startswith(".ref_params") for key in file.keys())  # noqa: SIM118
    assert (kernel == params["h.0"]["mlp"]["c_fc"]["kernel"]).all()


@pytest.mark.parametrize("script", [dpo, iterative_dpo], ids=["dpo", "iterative_dpo"])
def test_training_on_pairs_begins_at_ln_2(script, runs):
    """At the reference no answer is preferred: margins of 0, and a loss of ln 2 beside the NLL."""
    weight = script.Args().nll_coef
    start, first, *_, last = metrics_of(runs[script])
    assert first["loss"] - weight * first["nll_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(first["rewards/margins"]) < 1e-4 < abs(last["rewards/margins"])
    assert abs(start["eval/objective/kl"]) < 1e-5
    if script is dpo:
        assert start["eval/rewards/margins"] == start["eval/rewards/accuracies"] == 0
        expected = math.log(2) + weight * start["eval/nll_loss"]
        assert start["eval/loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("script", ALL, ids=all_names)
def test_one_seed_gives_one_run(script, runs, inputs, tmp_path):
    script.main(small_args(script, inputs, tmp_path / "same"))
    assert_same_run(tmp_path / "same", runs[script])
    script.main(small_args(script, inputs, tmp_path / "other", seed=2))
    for row, other in zip(metrics_of(tmp_path / "other"), metrics_of(runs[script])):
        assert row["step"] == other["step"] and (row["step"] == 0 or row != other)


def test_each_step_is_logged_alone(runs, inputs, tmp_path):
    """With log_every 3, a line has the metrics of its own step, not a mean over three."""
    sft.main(small_args(sft, inputs, tmp_path / "run", log_every=3, eval_every=6))
    rows = {row["step"]: row for row in metrics_of(runs[sft])}
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    for line in lines:
        assert {k: v for k, v in rows[line["step"]].items() if k in line} == line


# ------------------------------------------------------------------------------ stopped and resumed


def crash_before_the_first_checkpoint(script, patch):
    log = script.RunFolder.log

    def crash(run, step, *rest):
        log(run, step, *rest)
        if step == 2:
            raise Crash

    patch.setattr(script.RunFolder, "log", crash)


def crash_while_writing_a_checkpoint(script, patch):
    """The second one: half of its file is written."""
    save_file, calls = script.save_file, itertools.count(1)

    def crash(tensors, path, header):
        save_file(tensors, path, header)
        if "step" in header and next(calls) == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            raise Crash

    patch.setattr(script, "save_file", crash)


def crash_after_a_checkpoint(script, patch):
    """In step 5, whose line in metrics.jsonl is torn; the checkpoint is of step 3."""
    append = script.RunFolder.append

    def crash(run, name, row):
        if name == "metrics.jsonl" and row["step"] == 5:
            run.files[name].write(json.dumps(row)[:-7])
            run.files[name].flush()
            raise Crash
        append(run, name, row)

    patch.setattr(script.RunFolder, "append", crash)


def crash_while_writing_the_model(script, patch):
    """After the last checkpoint; config.json is written, model.safetensors is not."""
    save_file = script.save_file

    def crash(tensors, path, header):
        if "step" not in header:
            raise Crash
        save_file(tensors, path, header)

    patch.setattr(script, "save_file", crash)


CRASHES = [  # how, and the step of the checkpoint that it leaves
    (crash_before_the_first_checkpoint, 0),
    (crash_while_writing_a_checkpoint, 3),
    (crash_after_a_checkpoint, 3),
    (crash_while_writing_the_model, None),
]


@pytest.mark.parametrize("crash, step", CRASHES, ids=[c.__name__ for c, _ in CRASHES])
@pytest.mark.parametrize("script", SCRIPTS, ids=names)
def test_resumed_equals_never_stopped(script, crash, step, runs, inputs, tmp_path):
    args = small_args(script, inputs, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash(script, patch)
        script.main(args)
    assert not (tmp_path / "run" / "model").exists()
    resumed_from = []
    with pytest.MonkeyPatch.context() as patch:
        start = script.RunFolder.start

        def watched_start(*rest):
            resumed_from.append(start(*rest)[1])
            return start(*rest)

        patch.setattr(script.RunFolder, "start", watched_start)
        script.main(dataclasses.replace(args, resume=True))
    total = 8 if script in (sft, mixed_precision) else 6
    assert resumed_from == [total if step is None else step]
    assert_same_run(tmp_path / "run", runs[script])


def test_a_steered_kl_coef_is_resumed(inputs, tmp_path):
    """ppo.py's kl_coef is part of the state, too."""
    changes = {"kl_target": 0.01, "kl_horizon": 100}
    ppo.main(small_args(ppo, inputs, tmp_path / "whole", **changes))
    args = small_args(ppo, inputs, tmp_path / "run", **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_after_a_checkpoint(ppo, patch)
        ppo.main(args)
    ppo.main(dataclasses.replace(args, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    rows = metrics_of(tmp_path / "run")[1:]
    for row, following in itertools.pairwise(rows):
        error = min(max(row["objective/kl"] / 0.01 - 1, -0.2), 0.2)
        expected = row["objective/kl_coef"] * (1 + error * 8 / 100)
        assert following["objective/kl_coef"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["objective/kl_coef"] == pytest.approx(args.kl_coef)


def run_and_resume(script, inputs, folder, **changes):
    """(a run never stopped, one that crashed in step 5 and was resumed, its checkpoint then)."""
    script.main(small_args(script, inputs, folder / "whole", **changes))
    args = small_args(script, inputs, folder / "run", **changes)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        crash_after_a_checkpoint(script, patch)
        script.main(args)
    saved = load_file(folder / "run" / "checkpoint.safetensors")
    script.main(dataclasses.replace(args, resume=True))
    return folder / "whole", folder / "run", saved


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_reference_that_moves_is_resumed(share, runs, inputs, tmp_path):
    """grpo.py's reference moves at steps 2, 4 and 6; the run crashes in step 5 and resumes at 3."""
    changes = {"ref_sync_steps": 2, "ref_mixup_alpha": share}
    whole, run, saved = run_and_resume(grpo, inputs, tmp_path, **changes)
    assert_same_run(run, whole)
    leaf = "['h.0']['mlp']['c_fc']['kernel']"
    start = grpo.load_model(inputs / "lm")[1]["h.0"]["mlp"]["c_fc"]["kernel"]
    params, reference = saved[".params" + leaf], saved[".ref_params" + leaf]
    assert (reference != start).any() and (reference != params).any()
    rows, static = metrics_of(run), metrics_of(runs[grpo])
    assert rows[1] == static[1] and rows[3] != static[3]  # step 3 is the first with another one
    at_the_end = load_file(run / "checkpoint.safetensors")
    same = at_the_end[".params" + leaf] == at_the_end[".ref_params" + leaf]
    assert same.all() == (share == 1)


@pytest.mark.parametrize("change", [{"reset_optimizer": True}, {"reference": "previous"}])
def test_rounds_are_resumed(change, runs, inputs, tmp_path):
    """What iterative_dpo.py does anew in each round, it does in a round that a resume redoes."""
    whole, run, saved = run_and_resume(iterative_dpo, inputs, tmp_path, **change)
    assert_same_run(run, whole)
    rows, plain = metrics_of(run), metrics_of(runs[iterative_dpo])
    (count,) = {int(x) for name, x in saved.items() if name.endswith(".count")}
    assert count == 3
    if "reference" in change:
        assert rows[:4] == plain[:4] and rows[4] != plain[4]  # the first round has the start's
        assert abs(rows[4]["rewards/margins"]) < 1e-4 < abs(plain[4]["rewards/margins"])
    else:
        rates = [row["lr"] for row in rows[1:]]
        assert rates[:3] == rates[3:] and rates[0] < rates[1]
        at_the_end = load_file(run / "checkpoint.safetensors")
        assert {int(x) for name, x in at_the_end.items() if name.endswith(".count")} == {3}


def test_ctrl_c_while_a_round_is_sampled(runs, inputs, tmp_path, capsys):
    """The first round of iterative_dpo.py is kept, the second is done again."""
    args = small_args(iterative_dpo, inputs, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        sample, calls = iterative_dpo.sample, itertools.count(1)

        def interrupted(*rest):
            if next(calls) == 4:  # after those of step 0, of the first round and of step 2
                signal.raise_signal(signal.SIGINT)
            return sample(*rest)

        patch.setattr(iterative_dpo, "sample", interrupted)
        iterative_dpo.main(args)
    assert stop.value.code == 130 and "step 3," in capsys.readouterr().out
    assert metrics_of(tmp_path / "run")[-1]["step"] == 3
    iterative_dpo.main(dataclasses.replace(args, resume=True))
    assert_same_run(tmp_path / "run", runs[iterative_dpo])


def wait_for(path, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.002)


def test_ctrl_c_and_kill_9(inputs, tmp_path):
    """A process that is interrupted, resumed, killed and resumed comes to the same end."""
    changes = {"epochs": 50, "save_every": 1, "eval_every": 100}
    sft.main(small_args(sft, inputs, tmp_path / "whole", **changes))
    run = tmp_path / "run"
    args = small_args(sft, inputs, run, **changes)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    process = subprocess.Popen(command(sft, args), **streams)
    wait_for(run / "checkpoint.safetensors", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    with safe_open(run / "checkpoint.safetensors", "np") as file:
        step = int(file.metadata()["step"])
    assert process.returncode == 130 and 1 <= step < 200
    assert err == "" and "Traceback" not in out
    last = out.strip().splitlines()[-1]
    assert f"step {step}," in last and "--resume" in last

    process = subprocess.Popen(command(sft, dataclasses.replace(args, resume=True)), **streams)
    lines = len((run / "metrics.jsonl").read_text().splitlines())
    while len((run / "metrics.jsonl").read_text().splitlines()) <= lines:
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(random.random() / 4)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not (run / "model").exists()

    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 199, "loss": 2.')
    sft.main(dataclasses.replace(args, resume=True))
    assert_same_run(run, tmp_path / "whole")


def test_resume_where_nothing_is(runs, inputs, tmp_path):
    """One command line with --resume serves a run's beginning, too."""
    sft.main(small_args(sft, inputs, tmp_path / "run", resume=True))
    assert_same_run(tmp_path / "run", runs[sft])


@pytest.mark.parametrize("script", ALL, ids=all_names)
def test_resuming_a_finished_run_says_so(script, runs, inputs, capsys):
    before = {path: path.stat().st_mtime_ns for path in runs[script].rglob("*")}
    with pytest.raises(SystemExit) as stop:
        script.main(small_args(script, inputs, runs[script], resume=True))
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert out.count("\n") == 1 and "finished" in out
    assert before == {path: path.stat().st_mtime_ns for path in runs[script].rglob("*")}


@pytest.mark.parametrize("script", ALL, ids=all_names)
def test_resuming_with_changed_arguments_names_them(script, runs, inputs, error_line):
    changes = {"seed": 5, "learning_rate": 1e-5, "resume": True}
    message = error_line(script.main, small_args(script, inputs, runs[script], **changes))
    assert "seed" in message and "learning_rate" in message and "batch_size" not in message


# ------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("script", ALL, ids=all_names)
def test_a_folder_with_a_run_names_the_ways_on(script, runs, inputs, error_line):
    message = error_line(script.main, small_args(script, inputs, runs[script]))
    assert all(way in message for way in ("--resume", "--overwrite", "--run-dir"))
    assert (runs[script] / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("script", ALL, ids=all_names)
def test_a_folder_that_is_no_run_is_refused(script, overwrite, inputs, tmp_path, error_line):
    (tmp_path / "thesis.tex").write_text("years of work")
    message = error_line(script.main, small_args(script, inputs, tmp_path, overwrite=overwrite))
    assert str(tmp_path) in message and "--run-dir" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_as_good_as_none(runs, inputs, tmp_path):
    sft.main(small_args(sft, inputs, tmp_path))
    assert_same_run(tmp_path, runs[sft])


def test_overwrite_replaces_a_run(runs, inputs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[sft], run)
    (run / "old.txt").write_text("of the run before")
    sft.main(small_args(sft, inputs, run, overwrite=True))
    assert not (run / "old.txt").exists() and len(list(run.glob("events.out.*"))) == 1
    assert_same_run(run, runs[sft])


def test_overwrite_waits_until_the_inputs_are_good(runs, inputs, tmp_path, error_line):
    """A mistyped data file must not cost the run that was there."""
    run = tmp_path / "run"
    shutil.copytree(runs[sft], run)
    error_line(sft.main, small_args(sft, inputs, run, overwrite=True, dataset="absent.jsonl"))
    assert_same_run(run, runs[sft])


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


INPUTS = [
    (sft, "model"),
    (sft, "tokenizer"),
    (sft, "eval_dataset"),
    (reward, "model"),
    (reward, "dataset"),
    (ppo, "reward_model"),
    (ppo, "reward"),
    (ppo, "gold"),
    (dpo, "model"),
    (dpo, "dataset"),
    (dpo, "gold"),
    (grpo, "reward_model"),
    (grpo, "reward"),
    (iterative_dpo, "model"),
    (iterative_dpo, "reward"),
    (iterative_dpo, "eval_dataset"),
    (sharded, "reward_model"),
]


@pytest.mark.parametrize("script, name", INPUTS, ids=[f"{s.__name__}-{n}" for s, n in INPUTS])
def test_overwrite_never_removes_an_input(script, name, inputs, tmp_path, error_line):
    run = tmp_path / "run"
    run.mkdir()
    changes = input_in_run(inputs, run, script, name)
    message = error_line(script.main, small_args(script, inputs, run, overwrite=True, **changes))
    assert "--overwrite" in message and len(list(run.iterdir())) == 2


@pytest.mark.parametrize("script", [ppo, grpo, iterative_dpo, sharded], ids=lambda x: x.__name__)
def test_overwrite_never_removes_a_default_input(script, inputs, tmp_path, monkeypatch, error_line):
    """Without --reward-model these read runs/reward/model, so runs/reward must stay."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs / "scorer", "runs/reward/model")
    Path("runs/reward/args.json").write_text("{}")
    args = small_args(script, inputs, "runs/reward", overwrite=True, reward_model=None)
    message = error_line(script.main, args)
    assert "--overwrite" in message and Path("runs/reward/model/config.json").exists()
