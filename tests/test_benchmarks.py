"""benchmarks/memory.py: the figures are those of arithmetic and of the compiled functions."""

import dataclasses
import json
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import memory

L, H, D, V, N = 2, 2, 32, 300, 64
SIZES = {"n_layer": L, "n_head": H, "n_embd": D, "vocab_size": V, "n_positions": N}
TRUNK = V * D + N * D + L * (12 * D**2 + 13 * D) + 2 * D  # weights, biases and norms of GPT-2
REWARD_MODEL = TRUNK + D
COUNTERS = 2 * 4  # int32: AdamW's steps and the schedule's


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """The tool's flags, for a tiny model's folder."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": "gpt2"}), "utf-8")
    sizes = {"batch_size": 16, "micro_batch_size": 4}
    return memory.Args(models=(str(folder),), **sizes)


def figures(args, script, title):
    """(parts of a phase, memory_analysis() of its function as compiled here)."""
    phase = dict(memory.phases(args, args.models[0], script))[title]
    analysis = memory.lowered(phase, tpu=None).compile().memory_analysis()
    return memory.parts(phase), analysis


def test_a_step_of_sft(args):
    parts, analysis = figures(args, "sft", "update")
    assert parts["parameters"] == parts["gradients"] == 4 * TRUNK
    assert parts["moments"] == 2 * 4 * TRUNK + COUNTERS
    assert parts["other models"] == 0
    # All that the function takes is the state and the batch: nothing else lies in memory.
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes  # the rest is in place
    whole = analysis.argument_size_in_bytes + new + analysis.temp_size_in_bytes
    assert sum(parts.values()) == whole
    batch = 3 * 16 * (16 + 48) * 4  # tokens and two masks, int32
    assert parts["temporaries"] > batch and analysis.alias_size_in_bytes >= 3 * 4 * TRUNK


@pytest.mark.parametrize("learned", [True, False])
def test_the_models_of_ppo(args, learned):
    args = dataclasses.replace(args, learned_reward=learned)
    parts, analysis = figures(args, "ppo", "update")
    trained = TRUNK + REWARD_MODEL
    assert parts["parameters"] == parts["gradients"] == 4 * trained
    assert parts["moments"] == 2 * 4 * trained + COUNTERS + 2 * 4  # kl_coef and the updates so far
    assert parts["other models"] == 4 * (TRUNK + learned * REWARD_MODEL)
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    held = 4 * (TRUNK + learned * REWARD_MODEL)  # no argument of train_step
    assert sum(parts.values()) == pytest.approx(
        held + analysis.argument_size_in_bytes + new + analysis.temp_size_in_bytes, abs=64
    )  # a key is counted twice as large in one of them


def test_samples_at_once_are_bounded(args):
    """Eight more of them: their keys and values, 2 L D floats for each of 16 + 48 tokens."""
    caches = []
    for size in (8, 16):
        bounded = dataclasses.replace(args, rollout_batch_size=size, max_completion_length=48)
        caches.append(figures(bounded, "ppo", "sampling")[0]["temporaries"])
    assert caches[1] - caches[0] >= 8 * 2 * L * D * 4 * (16 + 48)


@pytest.mark.parametrize("script", memory.SCRIPTS)
def test_every_phase_is_a_call_that_the_script_understands(args, script):
    names = []
    for title, phase in memory.phases(args, args.models[0], script):
        if phase.function:  # none for a checkpoint
            memory.lowered(phase, tpu=None)
        names.append(title)
    assert {"update", "update, --remat"} < set(names)
