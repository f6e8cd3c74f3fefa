"""tools/memory.py: its figures are those of arithmetic and of the compiled functions; its plans."""

import collections
import dataclasses
import functools
import json
import math
import shlex
import sys

import jax
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))

import memory

L, H, D, V, N = 1, 2, 32, 300, 64
SIZES = {"n_layer": L, "n_head": H, "n_embd": D, "vocab_size": V, "n_positions": N}
TRUNK = V * D + N * D + L * (12 * D**2 + 13 * D) + 2 * D  # weights, biases and norms of GPT-2
REWARD_MODEL = TRUNK + D
COUNTERS = 2 * 4  # int32: AdamW's steps and the schedule's
LLAMA = {"model_type": "qwen3", "num_hidden_layers": L, "num_attention_heads": 4, "head_dim": 8}
LLAMA |= {"num_key_value_heads": 2, "hidden_size": D, "intermediate_size": 64, "vocab_size": V}
LLAMA |= {"max_position_embeddings": N, "tie_word_embeddings": True}
FEW = "--batch-size 16 --micro-batch-size 4"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{script: the flags that name a tiny model's folder}"""
    found = {}
    for name, sizes in {"gpt2": SIZES | {"model_type": "gpt2"}, "llama": LLAMA}.items():
        found[name] = tmp_path_factory.mktemp(name)
        (found[name] / "config.json").write_text(json.dumps(sizes), "utf-8")
    return {x: f"--model {found['llama' if x == 'grpo_llama' else 'gpt2']}" for x in memory.PHASES}


def run_of(models, script, flags=FEW, **own):
    """(run, the tool's flags) of a command line."""
    args = memory.Args(script=f"{script}.py", **{"device": "gpu"} | own)
    more = " --reward f.py:f" if script == "grpo_llama" else ""
    return memory.first_run(args, shlex.split(f"{models[script]} {flags}{more}")), args


def figures(models, script, title, flags=FEW):
    """(parts of a phase, memory_analysis() of its function as compiled here)."""
    run, args = run_of(models, script, flags)
    phase = next(phase for phase in memory.phases(run, args) if phase.name == title)
    return memory.parts(phase, args), memory.lowered(phase, args).compile().memory_analysis()


def test_a_step_of_sft(models):
    parts, analysis = figures(models, "sft", "update")
    assert parts["parameters"] == parts["gradients"] == 4 * TRUNK
    assert parts["moments"] == 2 * 4 * TRUNK + COUNTERS
    assert parts["other models"] == parts["KV cache"] == 0
    assert parts["logits"] == 4 * 63 * V * 4  # a micro-batch is one block
    # All that the function takes is the state and the batch: nothing else lies in memory.
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # the rest is in place
    whole = analysis.argument_size_in_bytes + new + analysis.temp_size_in_bytes
    assert sum(parts.values()) == whole
    assert parts["activations"] > 0 and analysis.alias_size_in_bytes >= 3 * 4 * TRUNK


@pytest.mark.parametrize("flags", [FEW, f"{FEW} --reward f.py:f"])
def test_the_models_of_ppo(models, flags):
    parts, analysis = figures(models, "ppo", "update", flags)
    trained, learned = TRUNK + REWARD_MODEL, "--reward" not in flags
    assert parts["parameters"] == parts["gradients"] == 4 * trained
    assert parts["moments"] == 2 * 4 * trained + COUNTERS + 2 * 4  # kl_coef and the updates so far
    held = 4 * (TRUNK + learned * REWARD_MODEL)  # no argument of train_step
    assert parts["other models"] == held
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    assert sum(parts.values()) == pytest.approx(
        held + analysis.argument_size_in_bytes + new + analysis.temp_size_in_bytes, abs=64
    )  # a key is counted twice as large in one of them


def test_samples_at_once_are_bounded(models):
    """Eight more of them: their keys and values, 2 L D floats for each of 16 + 48 tokens."""
    found = [
        figures(models, "ppo", "sampling", f"{FEW} --rollout-batch-size {size}")[0]
        for size in (8, 16)
    ]
    caches = [parts["KV cache"] for parts in found]
    assert caches[1] == 2 * caches[0] == 16 * 2 * L * D * 4 * (16 + 48)
    assert sum(found[1].values()) - sum(found[0].values()) >= caches[0]


@pytest.mark.parametrize("script", memory.PHASES)
def test_every_phase_is_a_call_that_the_script_understands(models, script):
    run, args = run_of(models, script, device="cpu")
    names = [phase.name for phase in memory.phases(run, args)]
    for phase in memory.phases(run, args):
        if phase.function:  # none for a checkpoint
            memory.lowered(phase, args)
    assert "update" in names and ("checkpoint" in names) == ("fsdp" not in vars(run.flags))


@pytest.mark.parametrize("script", ["sharded", "grpo_llama"])
def test_eight_devices_hold_an_eighth_of_the_state(models, script):
    for mesh, least, most in (
        ("--data 8", 1, 1),
        ("--fsdp 8", 6, 8),
        ("--fsdp 4 --tensor 2", 6, 8),
    ):
        flags = f"--batch-size 64 --micro-batch-size 8 {mesh}"
        run, args = run_of(models, script, flags, devices=8)
        phase = list(memory.phases(run, args))[-1]
        whole = sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(phase.state))
        assert script != "sharded" or whole == 3 * 4 * TRUNK + COUNTERS
        assert least <= whole / memory.size(phase.state) <= most  # norms and biases stay whole
    if script == "sharded":  # what XLA says that a device gets is what is added up
        taken = memory.lowered(phase, args).compile().memory_analysis().argument_size_in_bytes
        given = [x for x in jax.tree.leaves(phase.arguments) if isinstance(x, jax.ShapeDtypeStruct)]
        assert memory.size(given) == pytest.approx(taken, abs=64)


@pytest.mark.slow
def test_a_plan_is_compiled_and_its_line_typed(models):
    given = shlex.split(f"{models['ppo']} --batch-size 16 --micro-batch-size 8 --steps 7")
    run, args = run_of(models, "ppo", "--batch-size 16 --micro-batch-size 8 --steps 7")
    peaks = {x.name: sum(memory.parts(x, args).values()) for x in memory.phases(run, args)}
    args = dataclasses.replace(args, device_memory=0.6 * max(peaks.values()) / 1e9)
    found, found_peaks = memory.plan(run, args, peaks, 0)
    assert max(found_peaks.values()) <= 1e9 * args.device_memory < max(peaks.values())
    line = memory.command(found, given)
    assert "--steps 7" in line and "--rollout-batch-size" in line and "--remat" not in line
    assert memory.first_run(args, shlex.split(line)[2:]).flags == found.flags


def fake_peaks(monkeypatch, needs):
    """phases and parts of memory.py as needs(flags), {phase: GB}, says."""
    phase = collections.namedtuple("phase", "name size")
    found = lambda run, _: [phase(*x) for x in needs(run.script, run.flags).items()]  # noqa: E731
    monkeypatch.setattr(memory, "phases", found)
    monkeypatch.setattr(memory, "parts", lambda phase, _: {"all": 1e9 * phase.size})


def planned(models, monkeypatch, needs, script, limit, flags="", **own):
    """(the line of the plan, whether it fits)"""
    run, args = run_of(models, script, flags, device_memory=limit, **own)
    fake_peaks(monkeypatch, needs)
    peaks = {x.name: 1e9 * x.size for x in memory.phases(run, args)}
    found, found_peaks = memory.plan(run, args, peaks, 0)
    return memory.command(found, []), memory.excess(found_peaks, args) == 0


def test_plans_keep_only_what_helps_and_stop_when_it_fits(models, monkeypatch):
    def needs(script, flags):
        state = 1 if script == "lora" else 8
        size = flags.rollout_batch_size or 256
        return {
            "update": state + flags.micro_batch_size * (0.2 if flags.remat else 0.5),
            "sampling": state + size / 64,
        }

    plan = functools.partial(planned, models, monkeypatch, needs, "dpo")
    assert plan(20) == ("python dpo.py", True)
    assert plan(12.5) == ("python dpo.py --micro-batch-size 8", True)
    assert plan(10.5) == ("python dpo.py --micro-batch-size 4 --rollout-batch-size 128", True)
    line = "python dpo.py --micro-batch-size 1 --rollout-batch-size 16 --remat"
    assert plan(8.25) == (line, True)
    line, fits = plan(7)
    assert line.startswith("python lora.py --micro-batch-size 1 --rollout") and fits
    line, fits = plan(1)
    assert line.startswith("python lora.py") and not fits


def test_plans_over_devices(models, monkeypatch):
    def needs(script, flags):
        split = vars(flags).get("fsdp", 1) * vars(flags).get("tensor", 1)
        return {"update": 40 / split + 0.1 * vars(flags).get("fsdp", 1)}

    line, fits = planned(models, monkeypatch, needs, "grpo", 6, devices=8)
    assert fits and line == "python sharded.py --data 1 --fsdp 8 --tensor 1"
    assert not planned(models, monkeypatch, needs, "ppo", 6, devices=8)[1]


@pytest.mark.parametrize(
    "line, words",
    [
        ("gpt2.py", "pass one of sft.py"),
        (
            "sft.py --model gpt2 --batch-size 15 --micro-batch-size 4",
            "micro-batch-size 4 does not",
        ),
        ("sft.py --model gpt2 --max-prompt-length 2000", "the model has 1024 positions"),
        ("sharded.py --model gpt2 --fsdp 3", "make no mesh"),
    ],
)
def test_mistakes_are_one_sentence(line, words, capsys):
    script, *flags = shlex.split(line)
    with pytest.raises(SystemExit) as error:
        memory.first_run(memory.Args(script=script), flags)
    assert error.value.code == 2 and words in capsys.readouterr().err
