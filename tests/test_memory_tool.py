"""tools/memory.py: its figures are those of arithmetic and of the compiled functions; its plans."""

import json
import shlex
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))

import memory

L, H, D, V, N = 2, 2, 32, 300, 64
SIZES = {"n_layer": L, "n_head": H, "n_embd": D, "vocab_size": V, "n_positions": N}
TRUNK = V * D + N * D + L * (12 * D**2 + 13 * D) + 2 * D  # weights, biases and norms of GPT-2
REWARD_MODEL = TRUNK + D
COUNTERS = 2 * 4  # int32: AdamW's steps and the schedule's
LLAMA = {"model_type": "qwen3", "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
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
    sizes = {}
    for flags in ("--data 8", "--fsdp 8", "--fsdp 4 --tensor 2"):
        flags = f"--batch-size 64 --micro-batch-size 8 {flags}"
        run, args = run_of(models, script, flags, devices=8)
        phase = list(memory.phases(run, args))[-1]
        assert phase.name == "update"
        parts = memory.parts(phase, args)
        # What XLA says that it takes from one device is what the parts have been added up to.
        taken = memory.lowered(phase, args).compile().memory_analysis().argument_size_in_bytes
        held = memory.size(phase.models)
        assert sum(parts.values()) - held >= taken
        sizes[flags[-len("--fsdp 8") :]] = parts["parameters"] + parts["moments"]
    whole, eighth, both = sizes.values()
    assert whole / 8 < eighth < whole / 6 and whole / 8 < both < whole / 6  # norms stay whole


def test_a_plan_that_fits(models, capsys):
    """Each change is kept only where it helps, the cheapest first; the line to type is checked."""
    run, args = run_of(models, "ppo", "--batch-size 16 --micro-batch-size 8 --steps 7")
    _, peaks = memory.table(run, args, [])
    args = memory.Args(script="ppo.py", device="gpu", device_memory=0.4 * max(peaks.values()) / 1e9)
    found, found_peaks = memory.plan(run, args, peaks, 0)
    assert max(found_peaks.values()) <= 1e9 * args.device_memory < max(peaks.values())
    assert found.flags.rollout_batch_size and found.flags.rollout_batch_size <= 16
    given = shlex.split(f"{models['ppo']} --batch-size 16 --micro-batch-size 8 --steps 7")
    line = memory.command(found, given)
    assert line.startswith("python ppo.py") and "--steps 7" in line and "--remat" not in line
    again = memory.first_run(args, shlex.split(line)[2:])
    assert again.flags == found.flags


def test_a_plan_by_lora_and_one_that_fails(models):
    """dpo.py's state does not fit, lora.py's does; in less than the weights nothing fits."""
    for share, script in ((0.5, "lora"), (0.01, None)):
        run, args = run_of(models, "dpo", "--batch-size 2 --micro-batch-size 1")
        peaks = {"update": 10 * 4 * TRUNK}
        args = memory.Args("dpo.py", device="gpu", device_memory=share * 10 * 4 * TRUNK / 1e9)
        found, found_peaks = memory.plan(run, args, peaks, 0)
        assert (memory.excess(found_peaks, args) == 0) == (script is not None)
        assert script is None or found.script in (script, "dpo")


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
