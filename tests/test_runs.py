"""Runs of the training scripts: what they leave, and that stopping them changes nothing."""

import contextlib
import dataclasses
import functools
import gzip
import itertools
import json
import math
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

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
    """runs(script) -> the folder of a run that was never stopped; beside it what it printed."""

    @functools.cache
    def run(script):
        folder = tmp_path_factory.mktemp(script.__name__)
        with (
            open(folder / "printed", "w", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
        ):
            return train(script, inputs, folder)

    return run


# ------------------------------------------------------------------------------ what a run leaves


@each_of(*SCRIPTS)
def test_a_run_leaves_its_files(script, runs, inputs):
    run = runs(script)
    total = 8 if script in (sft, mixed_precision) else 6
    saved = json.loads((run / "args.json").read_text("utf-8"))
    args = json.loads(json.dumps(vars(small_args(script, inputs, "run"))))
    checksums = saved.pop("checksums").keys()
    assert checksums == {"dataset", "eval_dataset", "model", "tokenizer", "reward_model"} & {
        name for name, value in args.items() if value
    }
    assert saved == {k: v for k, v in args.items() if k not in ("resume", "overwrite")}

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(total + 1))
    evaluated = [row["step"] for row in rows if any(k.startswith("eval/") for k in row)]
    assert evaluated == list(range(0, total + 1, 2))
    for row in rows[1:]:
        assert row["grad_norm"] > 0 and row["perf/tokens_per_second"] > 0 and row["lr"] > 0
    times = [row["perf/time"] for row in rows]
    assert times == sorted(times) and 0 < time.time() - times[0] < 3600

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


def events(run):
    """{tag: {step: value}} of a run's TensorBoard file: the number, or for HParams the proto."""
    (path,) = run.glob("events.out.tfevents.*")
    content, found = path.read_bytes(), {}
    while content:
        (size,) = struct.unpack("Q", content[:8])  # then a checksum, the event, its checksum
        event = Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]
        for value in event.summary.value:
            plugin = value.metadata.plugin_data
            is_hparams = plugin.plugin_name == "hparams"
            read = HParamsPluginData.FromString(plugin.content) if is_hparams else None
            found.setdefault(value.tag, {})[event.step] = read or value.simple_value
    return found


@each_of(sft, grpo)
def test_tensorboard_has_the_flags_and_all_metrics(script, runs, inputs):
    """A metric without a group of its own is in the group train."""
    found, expected = events(runs(script)), {}
    for row in metrics_of(runs(script)):
        for name, value in row.items():
            tag = name if "/" in name else f"train/{name}"
            expected.setdefault(tag, {})[row["step"]] = pytest.approx(value, rel=1e-6)
    del expected["train/step"]
    hparams = {tag: x for tag, x in found.items() if tag.startswith("_hparams_/")}
    rest = {tag: x for tag, x in found.items() if tag not in hparams and tag[:5] != "perf/"}
    assert rest == expected and "perf/tokens_per_second" in found
    start = hparams["_hparams_/session_start_info"][0].session_start_info.hparams
    args = vars(small_args(script, inputs, "run"))
    for name in args.keys() - {"resume", "overwrite", "reward", "reward_weight"}:
        assert start[name].string_value == str(args[name])


@each_of(*SCRIPTS)
def test_what_a_run_prints(script, runs, inputs):
    """What it is; at the end samples, a held-out figure, the model and the next command."""
    run, args = runs(script), small_args(script, inputs, "run")
    text = (run.parent / "printed").read_bytes().decode()
    lines = text.splitlines()
    rows = metrics_of(run)
    assert lines[0] == "nothing to resume in run: the run begins at step 0"
    assert lines[1].startswith("data: ") and args.dataset in lines[1]
    assert lines[1].endswith(f"held out: 12 of {args.eval_dataset}")
    model, where = (next(x for x in lines if x.startswith(word)) for word in ("model:", "run:"))
    assert re.fullmatch(r"model: \S+, [\d,]+ trained parameters; device: 8 cpu \(.*\)", model)
    assert where == f"run: run, steps 0 to {len(rows) - 1}; tensorboard --logdir run"
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == [f"{i}/{len(rows) - 1}" for i in range(len(rows))]
    assert all(re.search(r"  \d+ s left$", line) for line in steps[1:])
    assert max(map(len, steps)) <= 80

    *_, finished, command = (line for line in lines if line)
    found = re.fullmatch(r"finished in \d+ s  (eval/.*); the model is run/model", finished)
    for name, value in re.findall(r"(\S+) (\S+)", found[1]):
        assert value == f"{rows[-1][name]:.4g}", name  # of the last step, not of one before
    assert re.fullmatch(r"next: python \w+\.py .*run/model  # on your data", command)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    text = text[text.index(steps[-1]) :]
    for sample in [x for x in samples if x["step"] == len(rows) - 1][:3]:
        assert all(x in text for x in sample.values() if isinstance(x, str))
        assert all(f"{k} {x:.2f}" in text for k, x in sample.items() if isinstance(x, float))


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


@each_of(ppo, grpo, iterative_dpo)
def test_the_best_model_is_kept_and_resumed(script, runs, inputs, tmp_path, capsys):
    """The highest held-out value before the last step, found without the flag; then with it."""
    best = tmp_path / "run" / "best"
    plain = metrics_of(runs(script))
    held_out = {row["step"]: row for row in plain if "eval/reward" in row}
    name = next(  # of the metrics, one that is best in the midst, after the crash's checkpoint
        (
            name
            for name in held_out[0]
            if name.startswith("eval/") and max(held_out, key=lambda x: held_out[x][name]) == 4
        ),
        "eval/objective/kl",
    )
    step = max(held_out, key=lambda x: held_out[x][name])  # the first of the highest
    changes = {"keep_best": name.removeprefix("eval/")}
    rows, _, _ = run_and_resume(script, inputs, tmp_path, **changes)
    assert rows == plain
    found = json.loads((best.parent / "best.json").read_text())
    assert found == {"metric": name, "step": step, "value": held_out[step][name]}
    for file in ("best.json", *(f"best/{x.name}" for x in best.iterdir())):
        whole = tmp_path / "whole" / "run" / file
        assert (best.parent / file).read_bytes() == whole.read_bytes()
    assert f"best {name} {found['value']:.4g} at step {step}; that model is run/best" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("value", [0.7, 0.2])
def test_keep_best_by_hand(value, inputs, tmp_path, capsys):
    """Of 0.5, 0.7, 0.6, 0.7, then nothing, then the value: the first 0.7."""
    run = SimpleNamespace(path=tmp_path, total_steps=5)
    config, params = grpo.load_model(inputs / "lm")
    args = grpo.Args(model=str(inputs / "lm"), keep_best="gold/reward")
    for step, score in enumerate((0.5, 0.7, 0.6, 0.7, None, value)):
        metrics = {"reward": 1.0} | ({} if score is None else {"gold/reward": score})
        bias = params["ln_f"]["bias"].at[0].set(step)
        state = params | {"ln_f": params["ln_f"] | {"bias": bias}}
        grpo.keep_best(run, step, metrics, config, state, args)
    assert grpo.load_model(tmp_path / "best")[1]["ln_f"]["bias"][0] == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line == f"best eval/gold/reward 0.7 at step 1; that model is {tmp_path / 'best'}"
    assert not list(tmp_path.glob("*.tmp"))


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


def test_ctrl_c_lets_a_round_end(runs, inputs, tmp_path, capsys):
    """The policy that drew a round's samples is gone in its midst: no resume can begin there."""
    rollout, calls = iterative_dpo.rollout, itertools.count(1)

    def interrupted(*rest, **options):
        if next(calls) == 2:  # after that of step 0: the first round's
            signal.raise_signal(signal.SIGINT)
        return rollout(*rest, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(iterative_dpo, "rollout", interrupted)
        train(iterative_dpo, inputs, tmp_path)
    assert stop.value.code == 130 and "stopped after step 3" in capsys.readouterr().out
    assert metrics_of(tmp_path / "run")[-1]["step"] == 3
    assert_same_run(train(iterative_dpo, inputs, tmp_path), runs(iterative_dpo))


@pytest.fixture
def start():
    """subprocess.Popen, whose processes do not outlive the test."""
    processes = []

    def popen(*args, **options):
        processes.append(subprocess.Popen(*args, **options))
        return processes[-1]

    yield popen
    for process in processes:
        process.kill()
        process.wait()


def wait_for(happened, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.002)


def test_ctrl_c_sigterm_and_kill_9(inputs, tmp_path, start):
    """A process that is stopped twice, killed, and each time resumed comes to the same end."""
    changes = {"epochs": 50, "save_every": 1, "eval_every": 100}
    whole = train(sft, inputs, tmp_path, **changes)
    run = tmp_path / "again"
    args = small_args(sft, inputs, run, resume=True, **changes)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def lines():
        path = run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for number in (signal.SIGINT, signal.SIGTERM):
        before = lines()
        process = start(command(sft, args), **streams)
        wait_for(lambda before=before: lines() > before + 1, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        with safe_open(run / "checkpoint.safetensors", "np") as file:
            step = int(file.metadata()["step"])
        assert process.returncode == 128 + number and 1 <= step < 200
        assert err == "" and "Traceback" not in out
        last = out.strip().splitlines()[-1]
        assert f"step {step}" in last and "--resume" in last
        assert metrics_of(run)[-1]["step"] == step

    before = lines()
    process = start(command(sft, args), **streams)
    wait_for(lambda: lines() > before, process)
    time.sleep(random.random() / 4)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not (run / "model").exists()

    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 199, "loss": 2.')
    sft.main(args)
    assert_same_run(run, whole)


SLEEPY = """
import pathlib, time

def f(completions, **_):
    pathlib.Path(__file__).with_name("asleep").touch()
    time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_run_at_once(first, inputs, tmp_path, start, error_line):
    """Also inside a reward function that sleeps; and the cursor comes back.

    While the run lives no other process may write in its folder; afterwards it may.
    """
    (tmp_path / "f.py").write_text(SLEEPY)
    changes = {"reward": (f"{tmp_path}/f.py:f",), "reward_model": None, "resume": True}
    args = small_args(grpo, inputs, tmp_path / "run", **changes)
    leader, follower = pty.openpty()
    os.set_blocking(leader, False)
    env, shown = os.environ | {"TERM": "xterm"}, []
    process = start(command(grpo, args), stdout=follower, stderr=follower, env=env)

    def screen():
        with contextlib.suppress(BlockingIOError):
            shown.append(os.read(leader, 100_000))
        return b"".join(shown)

    wait_for((tmp_path / "asleep").exists, process)
    nothing = grpo.TrainState({}, {}, None)
    assert "does another run write there?" in error_line(grpo.RunFolder(args).start, nothing, 6)
    hide, show = b"\x1b[?25l", b"\x1b[?25h"
    assert hide in screen() and show not in screen()
    process.send_signal(first)
    wait_for(lambda: b"once more: at once" in screen(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT
    assert screen().rindex(show) > screen().rindex(hide)
    for descriptor in (leader, follower):
        os.close(descriptor)
    run = grpo.RunFolder(args)
    assert run.start(nothing, 6) == (nothing, 0)
    run.bar.stop()


POOL = """
import multiprocessing

def f(completions, **_):
    with multiprocessing.get_context("fork").Pool(2) as pool:  # its end is terminate()
        return pool.map(len, completions)
"""


@pytest.mark.slow
def test_a_child_that_is_terminated_ends_alone(inputs, tmp_path):
    (tmp_path / "f.py").write_text(POOL)
    changes = {"reward": (f"{tmp_path}/f.py:f",), "reward_model": None, "steps": 2}
    args = small_args(grpo, inputs, tmp_path / "run", **changes)
    options = {"capture_output": True, "text": True, "timeout": 200}
    result = subprocess.run(command(grpo, args), **options)
    assert result.returncode == 0, result.stderr
    assert "stopping" not in result.stdout and "finished" in result.stdout


# ------------------------------------------------------------------------------ a full disk, ruins

dev_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")


@dev_full
def test_a_full_disk_leaves_the_last_checkpoint(runs, inputs, tmp_path, error_line):
    run = train_until(crash_after_a_checkpoint, sft, inputs, tmp_path)
    (run / "checkpoint.safetensors.tmp").symlink_to("/dev/full")
    message = error_line(train, sft, inputs, tmp_path)
    assert "checkpoint.safetensors: OSError: [Errno 28] No space left" in message
    (run / "checkpoint.safetensors.tmp").unlink()
    assert_same_run(train(sft, inputs, tmp_path), runs(sft))


@dev_full
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_full_disk_is_named_where_a_line_is_written(name, inputs, tmp_path, error_line):
    run = sft.RunFolder(small_args(sft, inputs, tmp_path / "run"))
    run.path.mkdir()
    (run.path / name).symlink_to("/dev/full")
    assert f"{name}: OSError: [Errno 28]" in error_line(run.append, name, {"step": 1})


@pytest.mark.slow
def test_a_full_disk_never_hangs_a_run(inputs, tmp_path):
    """TensorBoard's file is the first that gets no room here."""
    changes = {"epochs": 60, "save_every": 1000, "eval_every": 1000}
    args = small_args(sft, inputs, tmp_path / "run", **changes)

    line = ["sh", "-c", 'ulimit -f 80; exec "$@"', "sh", *command(sft, args)]  # 40 kB
    result = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: ")


RUINS = {
    "checkpoint.safetensors": [b"", b"garbage", b"\x08\0\0\0\0\0\0\0{}      "],
    "args.json": [b"", b'{"steps": 6', b"[]", b'{"checksums": 3}', b'{"epochs": "two"}'],
    "metrics.jsonl": [b"garbage\n", b"[]\n", b"\xff\n"],
    "samples.jsonl": [b"{}\n"],
}


@pytest.mark.parametrize("name, content", [(k, x) for k, ruins in RUINS.items() for x in ruins])
def test_a_broken_file_of_a_run_is_named(name, content, runs, inputs, tmp_path, error_line):
    run = tmp_path / "run"
    shutil.copytree(runs(sft), run)
    (run / name).write_bytes(content)
    message = error_line(sft.main, small_args(sft, inputs, run, resume=True, epochs=3))
    assert str(run / name) in message or (name == "args.json" and str(run) in message)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "metrics.jsonl"])
def test_a_run_that_cannot_go_on_keeps_what_it_has(name, runs, inputs, tmp_path, error_line):
    """Its model and its args.json, which a run that is prolonged writes anew."""
    run = tmp_path / "run"
    shutil.copytree(runs(sft), run)
    (run / name).write_bytes(b"garbage\n")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    error_line(sft.main, small_args(sft, inputs, run, resume=True, epochs=3))
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after.items() >= before.items()


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
    assert "seed 0, now 5" in message and "learning_rate" in message
    assert "batch_size" not in message
    length = next(name for name in ("rounds", "steps", "epochs") if hasattr(args, name))
    fewer = getattr(args, length) - 1
    message = error_line(script.main, dataclasses.replace(args, **{length: fewer}))
    assert f"{length} {fewer + 1}, now {fewer}" in message
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert f"is finished: its model is {tmp_path / 'run' / 'model'}" in out.splitlines()[-1]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


LONGER = {sft: ("epochs", 1, 2), ppo: ("steps", 3, 6), iterative_dpo: ("rounds", 1, 2)}


@each_of(*LONGER)
def test_a_finished_run_is_prolonged(script, inputs, tmp_path, monkeypatch, capsys):
    """What it is trained on, and at what learning rate, is as if it had been this long at once."""
    length, short, long = LONGER[script]
    name = "make_batch" if script is sft else "rollout"
    function, seen = getattr(script, name), []

    def watched(*given, **rest):
        rows = given[0] if script is sft else [ids for _, ids in given[4]]  # prompts
        seen[-1].append(rows)
        return function(*given, **rest)

    monkeypatch.setattr(script, name, watched)
    runs = []
    for folder, count in (("whole", long), ("run", short), ("run", long)):
        seen.append([])
        changes = {length: count, "eval_every": 100, "save_every": 1}
        runs.append(train(script, inputs, tmp_path / folder, **changes))
        rows = metrics_of(runs[-1])
    assert f"run goes on to {length} {long}, from {short}" in capsys.readouterr().out
    whole, first, second = seen
    evaluation = len(first) + len(second) - len(whole)  # calls of the one at the old end
    assert 0 < evaluation < len(second) and first[:-evaluation] + second == whole
    begun = len(rows) // 2 + 1
    rates = [[row.get("lr") for row in metrics_of(run)[begun:]] for run in runs[1:]]
    assert rates[0] == [row["lr"] for row in metrics_of(tmp_path / "whole" / "run")[begun:]]
    assert json.loads((runs[1] / "args.json").read_text())[length] == long
    assert (runs[1] / "model" / "model.safetensors").exists()


FILES = [(sft, "dataset"), (sft, "eval_dataset"), (sft, "tokenizer"), (dpo, "model")]
FILES += [(grpo, "reward_model"), (grpo, "reward"), (grpo, "gold")]


def begun(script, flag, inputs, folder):
    """args(inputs, run) -> Args, with which a run has begun in folder/run, from folder/inputs."""
    shutil.copytree(inputs, folder / "inputs")
    shutil.copytree(REVIEWS / "tokenizer", folder / "inputs" / "tokenizer")
    (folder / "inputs" / "f.py").write_text("def f(completions, **_):\n    return []\n")

    def args(where, run):
        values = vars(small_args(script, Path(where), run)) | {"tokenizer": f"{where}/tokenizer"}
        values |= {"gold": f"{where}/f.py:f", "reward": (f"{where}/f.py:f",)}
        return small_args(script, inputs, run, resume=True, **{flag: values[flag]})

    content = script.RunFolder(args(folder / "inputs", folder / "run")).args
    (folder / "run").mkdir()
    (folder / "run" / "args.json").write_text(json.dumps(content))
    return args


@pytest.mark.parametrize("script, flag", FILES, ids=lambda x: getattr(x, "__name__", x))
def test_where_a_file_lies_is_no_setting(script, flag, inputs, tmp_path, monkeypatch):
    """Nor is how its path is spelled: a run that moved with its files goes on."""
    args = begun(script, flag, inputs, tmp_path)
    (tmp_path / "inputs").rename(tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    for where in ("moved", "./moved/../moved", tmp_path / "moved"):
        script.RunFolder(args(where, "other"))  # exits where it refuses


@pytest.mark.parametrize(
    "script, flag", [FILES[i] for i in (0, 1, 3, 4)], ids=lambda x: getattr(x, "__name__", x)
)
def test_a_file_with_another_content_is_named(script, flag, inputs, tmp_path, error_line):
    args = begun(script, flag, inputs, tmp_path)(tmp_path / "inputs", tmp_path / "run")
    path = Path(getattr(args, flag))
    path = path / "model.safetensors" if path.is_dir() else path
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\n" + content[-1:])  # as long as before
    message = error_line(script.RunFolder, args)
    assert f"{flag} {getattr(args, flag)}" in message and "seed" not in message


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
