"""What memory the scripts need at GPT-2's sizes: their own jitted functions, compiled, not run.

    python benchmarks/memory.py gpt2-xl
    python benchmarks/memory.py gpt2 --scripts sft ppo --batch-size 8 --micro-batch-size 4
    python benchmarks/memory.py runs/sft/model --measure    # each phase runs once, too, for real
    python benchmarks/memory.py gpt2 gpt2-medium gpt2-large gpt2-xl --write    # into RESULTS.md

The compiler is given shapes alone: no weight is ever made, so the machine need not have the memory
that is asked about. One line for each thing that a script does on the device, in MB (10^6 bytes).
The parts of a line add up to its peak; the largest peak is what the script needs:

    parameters    of all that is trained
    moments       AdamW's two, and the numbers that go with them
    gradients     of the parameters, or their sum over micro-batches
    other models  that lie in memory meanwhile: reference, learned reward
    temporaries   what XLA's memory_analysis() says beyond that (activations, logits, keys and
                  values), and what goes in and comes out

Python, JAX and the compiled programs come on top, in the host's memory: 0.7 GB at 12 layers. A
checkpoint needs the host's memory, too, also where there is another device; it has a line on a CPU
alone. The figures are those of the compiler for the device at hand: for a GPU, run it there.
"""

import dataclasses
import functools
import math
import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

SIZES = {  # layers, heads, width
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
EVALUATED = 256  # prompts of an evaluation with samples
SCRIPTS = ("sft", "reward", "dpo", "ppo", "grpo", "iterative_dpo", "sharded", "mixed_precision")
MARKS = "<!-- benchmarks/memory.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Args:
    models: tyro.conf.Positional[tuple[str, ...]]  # names as above, or folders with a config.json
    scripts: tuple[Literal[SCRIPTS], ...] = SCRIPTS
    # The scripts' own flags; default: what each script has.
    batch_size: int | None = None
    micro_batch_size: int | None = None
    rollout_batch_size: int | None = None
    num_generations: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of mixed_precision.py
    learned_reward: bool = True  # of the model's size; else a function, which needs no memory here
    measure: bool = False  # run each phase in a process of its own; its peak stands beside
    write: bool = False  # the tables into benchmarks/RESULTS.md
    # a TPU that need not be there, such as v5p:2x2x1, to compile for; pip install libtpu
    tpu: str | None = None


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ has a mixed_precision.py

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding
from work import memory

import dpo as dpo_script
import grpo as grpo_script
import iterative_dpo as iterative_dpo_script
import mixed_precision as mixed_precision_script
import ppo as ppo_script
import reward as reward_script
import sft as sft_script
import sharded as sharded_script


class Phase(NamedTuple):
    """A call of a jitted function, and what lies in memory meanwhile; all arrays are shapes."""

    name: str
    function: object  # None: the state is written to a file
    arguments: tuple
    state: NamedTuple  # the script's TrainState
    models: tuple = ()  # parameters of others


def parts(phase, tpu=None):
    """{part: bytes} of a phase."""
    state, trained = size(phase.state), size(phase.state.params)
    gradients = trained if phase.name == "update" else 0  # for XLA they are temporary
    return {
        "parameters": trained,
        "moments": state - trained,
        "gradients": gradients,
        "other models": size(phase.models),
        "temporaries": besides(phase, tpu) - gradients,
    }


def besides(phase, tpu):
    """Bytes that a phase needs besides its state and the other models."""
    if phase.function is None:
        return 2 * size(phase.state)  # the file's content, which safetensors copies once
    analysis = lowered(phase, tpu).compile().memory_analysis()
    resident = {id(x) for x in jax.tree.leaves((phase.state, phase.models))}
    given = [x for x in jax.tree.leaves(phase.arguments) if id(x) not in resident]
    results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return size(given) + results + analysis.temp_size_in_bytes


def size(tree):
    """Bytes of all arrays in a tree; what is no array has none."""
    found = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in found)


# ------------------------------------------------------------- what each script does on the device


def sft(args, model, script=sft_script, more=(), samples=8):
    """The phases of sft.py, in the order of its main; so have all functions below."""
    flags, config = flags_of(script, args, model), script.GPT2Config(**model)
    state, optimizer = new_state(script, flags, parameters(script, config), *more)
    names = ("tokens", "mask", "loss_mask")
    batch, part = (
        {name: ints(rows, length(flags)) for name in names}
        for rows in (flags.batch_size, flags.micro_batch_size)
    )
    yield Phase("update", script.train_step, (state, batch, config, optimizer, flags), state)
    yield Phase("evaluation", script.eval_step, (state.params, part, config), state)
    yield sampling(script, state.params, config, flags, samples, 1, state)


def mixed_precision(args, model):
    return sft(args, model | {"dtype": args.dtype}, mixed_precision_script, (65536.0,), samples=128)


def reward(args, model, script=reward_script):
    flags, config = flags_of(script, args, model), script.GPT2Config(**model)
    start = parameters(script, config)  # writes the samples that the score is normalised on
    state, optimizer = new_state(script, flags, parameters(script, config, "RewardModel"))
    pairs = ints(flags.batch_size, 2, length(flags))
    batch = {"tokens": pairs, "mask": pairs, "margin": floats(flags.batch_size)}
    updated = (state, batch, config, optimizer, flags)
    yield Phase("update", script.train_step, updated, state, (start,))
    part = ints(flags.micro_batch_size, 2, length(flags))
    scored = (state.params, part, part, config)
    yield Phase("evaluation", script.pair_scores, scored, state, (start,))
    count = 128, flags.num_generations
    yield sampling(script, start, config, flags, *count, state, (start,))
    yield scoring(script, state.params, config, flags, math.prod(count), state, (start,))


def dpo(args, model, script=dpo_script):
    flags, config = flags_of(script, args, model), script.GPT2Config(**model)
    reference = parameters(script, config)
    state, optimizer = new_state(script, flags, reference)
    models = (reference,)
    scored = (reference, pairs(flags, flags.micro_batch_size), config)
    yield Phase("reference of pairs", script.pair_logprobs, scored, state, models)
    batch = pairs(flags, flags.batch_size) | {"ref_logprobs": floats(flags.batch_size, 2)}
    yield Phase("update", script.train_step, (state, batch, config, optimizer, flags), state)
    yield from rollout(script, state.params, config, flags, EVALUATED, 1, state, models)


def iterative_dpo(args, model, script=iterative_dpo_script):
    flags, config = flags_of(script, args, model), script.GPT2Config(**model)
    reference = parameters(script, config)
    models = (reference, *learned_reward(script, config, args))
    state, optimizer = new_state(script, flags, reference)
    count = flags.prompts_per_round, flags.num_generations
    yield from rollout(script, state.params, config, flags, *count, state, models)
    scored = (reference, pairs(flags, flags.micro_batch_size), config)
    yield Phase("reference of pairs", script.pair_logprobs, scored, state, models)
    batch = pairs(flags, flags.batch_size) | {"ref_logprobs": floats(flags.batch_size, 2)}
    updated = (state, batch, config, optimizer, flags)
    yield Phase("update", script.train_step, updated, state, models)


def ppo(args, model, script=ppo_script):
    flags, config = flags_of(script, args, model), script.GPT2Config(**model)
    reference = parameters(script, config)
    models = (reference, *learned_reward(script, config, args))
    trained = {"policy": reference, "critic": parameters(script, config, "RewardModel")}
    state, optimizer = new_state(script, flags, trained, flags.kl_coef)
    policy = state.params["policy"]
    yield from rollout(script, policy, config, flags, flags.batch_size, 1, state, models)
    rest = {"critic_config": config, "args": flags}
    experience = functools.partial(script.make_experience, **rest)
    sampled = (state, sample(script, flags), floats(flags.batch_size))
    yield Phase("values, advantages", experience, sampled, state, models)
    batch, _ = jax.eval_shape(experience, *sampled)
    updated = (state, batch, key(), (config, config), optimizer, flags)
    yield Phase("update", script.train_step, updated, state, models)


def grpo(args, model, script=grpo_script, mesh=()):
    flags, config = flags_of(script, args, model), script.GPT2Config(**model)
    reference = parameters(script, config)
    models = (reference, *learned_reward(script, config, args))
    state, optimizer = new_state(script, flags, reference, False)
    count = flags.batch_size // flags.num_generations, flags.num_generations
    yield from rollout(script, state.params, config, flags, *count, state, models, *mesh)
    experience = functools.partial(script.make_experience, args=flags)
    batch, _ = jax.eval_shape(experience, sample(script, flags), floats(flags.batch_size))
    updated = (state, batch, key(), config, optimizer, flags, *mesh)
    yield Phase("update", script.train_step, updated, state, models)


def sharded(args, model):
    """On one device; on many: benchmarks/sharding.py."""
    one = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return grpo(args, model, sharded_script, (Mesh(one, ("data", "fsdp", "tensor")),))


BUILDERS = dict(
    zip(SCRIPTS, (sft, reward, dpo, ppo, grpo, iterative_dpo, sharded, mixed_precision))
)


def rollout(script, params, config, flags, prompts, samples, state, models, *mesh):
    """Samples, their log-probabilities under the reference, and a learned reward.

    Of a step or of an evaluation, whichever has more of them; --rollout-batch-size at once.
    """
    if prompts * samples < EVALUATED:
        prompts, samples = EVALUATED, 1
    if flags.rollout_batch_size:
        prompts = min(prompts, flags.rollout_batch_size // samples)
    count = prompts * samples
    if mesh:
        given = (ints(prompts, flags.max_prompt_length),) * 2
        numbers = (flags.max_completion_length, flags.temperature, -1, samples)
        given = (params, models[0], config, *given, key(), numbers, *mesh)
        yield Phase("sampling, reference", script.sample_on_mesh, given, state, models)
    else:
        yield sampling(script, params, config, flags, prompts, samples, state, models)
        given = (models[0], config, *(ints(count, length(flags)),) * 2)
        given = (*given, flags.max_prompt_length, flags.temperature)
        yield Phase("reference", script.policy_logprobs, given, state, models)
    if len(models) > 1:
        yield scoring(script, models[1], config, flags, count, state, models)


def sampling(script, params, config, flags, prompts, samples, state, models=()):
    texts = (ints(prompts, flags.max_prompt_length),) * 2
    numbers = (flags.max_completion_length, flags.temperature, -1, samples)  # no row ends early
    given = (params, config, *texts, key(), *numbers)
    return Phase("sampling", script.generate, given, state, models)


def scoring(script, params, config, flags, count, state, models):
    texts = (ints(count, length(flags)),) * 2
    return Phase("learned reward", script.learned_rewards, (params, config, *texts), state, models)


def sample(script, flags):
    """The Rollout of one step."""
    (N, R), T = (flags.batch_size, flags.max_completion_length), length(flags)
    ended = jax.ShapeDtypeStruct((N,), bool)
    return script.Rollout(ints(N, T), ints(N, T), *(floats(N, R) for _ in range(3)), ended)


def pairs(flags, count):
    """Pairs as make_batch of dpo.py gives them."""
    names = ("tokens", "mask", "response_mask")
    return {name: ints(count, 2, length(flags)) for name in names}


# -------------------------------------------------------------------------------------- machinery


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def key():
    return jax.eval_shape(lambda: jax.random.key(0))


def flags_of(script, args, model):
    """The script's Args: its own defaults, but for what was given here; micro-batches that fit."""
    names = {x.name for x in dataclasses.fields(script.Args)} & set(vars(args))
    given = {name: getattr(args, name) for name in names}
    flags = script.Args(**{name: value for name, value in given.items() if value is not None})
    size = flags.batch_size // getattr(flags, "num_minibatches", 1)
    micro = args.micro_batch_size or min(flags.micro_batch_size, size)
    minibatch = f"a minibatch of {script.__name__}.py, {size} sequences or pairs"
    script.check(size % micro == 0, f"--micro-batch-size {micro} does not divide {minibatch}")
    tokens, positions = length(flags), model.get("n_positions", 1024)
    script.check(tokens <= positions, f"{tokens} tokens, but the model has {positions} positions")
    return dataclasses.replace(flags, micro_batch_size=micro)


def length(flags):
    return flags.max_prompt_length + flags.max_completion_length


def parameters(script, config, module="GPT2"):
    """The shapes of a model's parameters: objects of its own, by which `parts` knows them."""
    one = jnp.ones((1, 1), jnp.int32)
    init = getattr(script, module)(config).init
    return jax.eval_shape(lambda: init(jax.random.key(0), one, one))["params"]


def learned_reward(script, config, args):
    return (parameters(script, config, "RewardModel"),) if args.learned_reward else ()


def new_state(script, flags, params, *more):
    """(the shapes of the TrainState, optimizer)"""
    optimizer, _ = script.make_optimizer(flags, 10_000)
    return jax.eval_shape(lambda x: script.make_state(x, optimizer, *more), params), optimizer


def lowered(phase, tpu):
    """The phase's program before XLA, for a device here, or for a TPU that need not be there."""
    function, given = phase.function, phase.arguments
    if tpu:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is none of Google's
        device = topologies.get_topology_desc(tpu, "tpu").devices[0]
        given = jax.tree.map(functools.partial(placed, SingleDeviceSharding(device)), given)
    if isinstance(function, functools.partial):
        return function.func.lower(*given, **function.keywords)
    return function.lower(*given)


def placed(sharding, x):
    is_array = isinstance(x, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if is_array else x


def phases(args, name, script):
    """[(name in the table, Phase)]: an update also with --remat; a checkpoint in host memory."""
    if name in SIZES:
        model = dict(zip(("n_layer", "n_head", "n_embd"), SIZES[name]))
    else:
        config = sft_script.load_config(sft_script.find_model(name))
        model = vars(config) | {"eos_token_id": -1}
    build = BUILDERS[script]
    found = [(phase.name, phase) for phase in build(args, model)]
    again = [x for x in build(args, model | {"remat": True}) if x.name == "update"]
    found += [("update, --remat", phase) for phase in again]
    if jax.default_backend() == "cpu" and not args.tpu and script != "sharded":  # which has Orbax
        state, models = again[0].state, again[0].models
        found.append(("checkpoint", Phase("checkpoint", None, (), state, models)))
    return found


def run(args, name, script, title):
    """The peak in bytes of one real call: the device's, or this process's without its start."""
    phase = dict(phases(args, name, script))[title]
    program = phase.function and lowered(phase, None).compile()
    before = memory("VmRSS")
    shapes = [x for x in jax.tree.leaves(phase[2:]) if isinstance(x, jax.ShapeDtypeStruct)]
    real = {id(x): real_array(x) for x in shapes}
    if program:
        given = jax.tree.map(lambda x: real.get(id(x), x), phase.arguments)
        given = [x for x, shape in zip(given, phase.arguments) if size(shape)]  # no static ones
        jax.block_until_ready(program(*given))
    else:
        tensors = {str(i): real[id(x)] for i, x in enumerate(jax.tree.leaves(phase.state))}
        safetensors.flax.save(tensors)
    statistics = jax.devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] if statistics else 1e6 * (memory("VmHWM") - before)


def real_array(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jnp.ones(x.shape, x.dtype)


def table(args, name):
    """Prints a line for each phase as it comes; returns ({(script, phase): peak}, all lines)."""
    head = ["script", "phase", "parameters", "moments", "gradients", "other models", "temporaries"]
    head += ["peak", *["measured"] * args.measure]
    peaks, lines = {}, [row(head), "|---" * len(head) + "|"]
    print(f"{name}, MB:", *lines, sep="\n", flush=True)
    for script in args.scripts:
        for title, phase in phases(args, name, script):
            found = parts(phase, args.tpu)
            peaks[script, title] = sum(found.values())
            cells = [script, title, *(f"{x / 1e6:.0f}" for x in found.values())]
            cells.append(f"{peaks[script, title] / 1e6:.0f}")
            if args.measure:
                with multiprocessing.get_context("spawn").Pool(1) as process:
                    cells.append(f"{process.apply(run, (args, name, script, title)) / 1e6:.0f}")
            lines.append(row(cells))
            print(lines[-1], flush=True)
    return peaks, lines


def row(cells):
    return f"| {' | '.join(cells)} |"


def largest(peaks, script):
    """The peak of a script in GB, and the phase that has it."""
    own = {title: x for (name, title), x in peaks.items() if name == script}
    title = max(own, key=own.get)
    return f"{own[title] / 1e9:.1f} ({title})"


def main(args):
    tables = {name: table(args, name) for name in args.models}
    names = [f"{name}, GB" for name in tables]
    summary = [row(["script", *names]), "|---" * (len(names) + 1) + "|"]
    for script in args.scripts:
        summary.append(row([script, *(largest(peaks, script) for peaks, _ in tables.values())]))
    print(*summary, sep="\n")
    if args.write:
        path = Path(__file__).with_name("RESULTS.md")
        before, found, rest = path.read_text("utf-8").partition(MARKS[0])
        assert found and MARKS[1] in rest, f"{path} lacks the two comments that the tables replace"
        parts = [f"{name}, MB:\n\n" + "\n".join(lines) for name, (_, lines) in tables.items()]
        text = "\n\n".join(["\n".join(summary), *parts])
        path.write_text(before + MARKS[0] + text + "\n" + MARKS[1] + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main(args)
