"""What memory a script needs, before it runs, and which flags make it fit.

    python tools/memory.py ppo.py --model gpt2-xl --device-memory 80
    python tools/memory.py sharded.py --model gpt2-xl --devices 8 --device-memory 24 --fsdp 8
    python tools/memory.py grpo_llama.py --model Qwen/Qwen3-0.6B --reward my.py:f --device gpu
    python tools/memory.py sft.py --model gpt2 --measure    # each phase runs once, too, for real

All flags but those below are the script's own. Its jitted functions are
compiled from shapes alone: no weight is ever made or loaded, so the machine
need not have the memory that is asked about. One line for each thing that the
script does on the device, in MB (10^6 bytes). The parts of a line add up to
its peak; the largest peak is what the script needs:

    parameters    of all that is trained
    moments       AdamW's two, and the numbers that go with them
    other models  that lie in memory meanwhile: reference, learned reward
    gradients     of the parameters, or their sum over micro-batches
    KV cache      keys and values of all samples
    logits        of one block of tokens, as the scripts hold them
    activations   and all else that XLA's memory_analysis() finds

The last three and the gradients lie in the memory that XLA plans as a whole;
its size is XLA's, the three in front are computed, the activations are what is
left. With --device-memory changes are compiled, cheapest first, until it fits.
"""

import contextlib
import dataclasses
import functools
import importlib
import io
import math
import multiprocessing
import os
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro


@dataclass(frozen=True)
class Args:
    script: tyro.conf.Positional[str]  # such as ppo.py
    device_memory: float | None = None  # of one device, in GB (10^9 bytes): what it must fit into
    devices: int = 1  # as many are simulated where there are fewer
    # cpu: its memory also holds Python, JAX and, while one is written, a checkpoint; default: cpu
    # where JAX finds nothing else
    device: Literal["cpu", "gpu"] | None = None
    measure: bool = False  # run each phase in a process of its own; its peak stands beside
    write: bool = False  # put the script's lines into benchmarks/RESULTS.md
    # a TPU that need not be there, such as v5e:2x2, to compile for; pip install libtpu
    tpu: str | None = None


# Parsed before JAX is imported, so that --help answers at once (linters call it E402). Indented,
# because tyro joins lines that begin with a letter.
if __name__ == "__main__":
    description = textwrap.indent(__doc__, " ")
    args, own_flags = tyro.cli(Args, description=description, return_unknown_args=True)

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

SIZES = {  # layers, heads, width of a GPT-2
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
LLAMA_SIZES = {  # family, vocabulary, width, MLP, layers, heads, key-value heads, head, tied
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 49152, 576, 1536, 30, 9, 3, 64, True),
    "Qwen/Qwen3-0.6B": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True),
    "Qwen/Qwen3-8B": ("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
    "meta-llama/Llama-3.2-1B": ("llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
}
EVALUATED = 256  # prompts of an evaluation with samples
MARKS = "<!-- tools/memory.py -->\n", "<!-- end -->\n"


def main(args, own_flags):
    simulate(args.devices)
    run = first_run(args, own_flags)
    print(f"{command(run, own_flags)}, compiled for {place(args)}\n")
    lines, peaks = table(run, args, own_flags)
    if args.write:
        write(run, lines)
    if args.device_memory is None:
        return 0
    print(f"\nTo fit into {args.device_memory:g} GB, in GB:")
    run, peaks = plan(run, args, peaks, overhead(args))
    shown = command(run, own_flags)
    if excess(peaks, args) == 0:
        print(f"\nFits ({largest(peaks)}):\n    {shown}")
        return 0
    print(f"\nDoes not fit; the nearest is {largest(peaks)}:\n    {shown}")
    print(f"What is left: a smaller --model, shorter completions{more_devices_advice(run, args)}.")
    return 1


# ------------------------------------------------------------ what each script does on the device


class Phase(NamedTuple):
    """A call of a jitted function, and what lies in memory meanwhile; all arrays are shapes."""

    name: str
    function: object  # None: the state is written to a file
    arguments: tuple
    state: NamedTuple  # the script's TrainState
    models: dict  # {name: parameters} of others
    cache: int = 0  # bytes of keys and values
    logits: int = 0  # bytes of a block of them


class Setup(NamedTuple):
    """A script with its flags and the configs of its models."""

    script: object  # the module
    flags: object  # the script's Args
    config: object  # of the policy
    reward_config: object  # of the learned reward, or None
    mesh: Mesh | None


def sft(s, samples=8, more=()):
    """The phases of sft.py, in the order of its main; so have all functions below."""
    state, optimizer = new_state(s, parameters(s, s.config), *more)
    names = ("tokens", "mask", "loss_mask")
    batch, part = (
        {name: ints(rows, length(s)) for name in names}
        for rows in (s.flags.batch_size, s.flags.micro_batch_size)
    )
    logits = logits_size(s, s.flags.micro_batch_size, length(s) - 1)
    given = (state, batch, s.config, optimizer, s.flags)
    yield Phase("update", s.script.train_step, given, state, {}, logits=logits)
    given = (state.params, part, s.config)
    yield Phase("evaluation", s.script.eval_step, given, state, {}, logits=logits)
    yield sampling(s, state.params, samples, 1, state, {})


def mixed_precision(s):
    return sft(s, samples=128, more=(float(s.flags.loss_scale),))


def reward(s):
    models = {"start": parameters(s, s.config)}  # which writes samples to normalise the score
    state, optimizer = new_state(s, parameters(s, s.config, "RewardModel"))
    pairs = ints(s.flags.batch_size, 2, length(s))
    batch = {"tokens": pairs, "mask": pairs, "margin": floats(s.flags.batch_size)}
    given = (state, batch, s.config, optimizer, s.flags)
    yield Phase("update", s.script.train_step, given, state, models)
    part = ints(s.flags.micro_batch_size, 2, length(s))
    given = (state.params, part, part, s.config)
    yield Phase("evaluation", s.script.pair_scores, given, state, models)
    yield sampling(s, models["start"], 128, s.flags.num_generations, state, models)
    count = 128 * s.flags.num_generations
    yield scoring(s, state.params, s.config, count, state, models)


def dpo(s):
    models = {"reference": parameters(s, s.config)}
    state, optimizer = new_state(s, models["reference"])
    yield pair_reference(s, models["reference"], state, models)
    given = (state, pairs(s), s.config, optimizer, s.flags)
    yield Phase("update", s.script.train_step, given, state, {}, logits=pair_logits(s))
    yield from rollout(s, state.params, EVALUATED, 1, state, models)


def lora(s):
    base = parameters(s, s.config)
    adapter = jax.eval_shape(functools.partial(s.script.init_adapter, args=s.flags), base)
    models = {"reference": joined(base, adapter)}  # the model without an adapter: B is 0
    state, optimizer = new_state(s, adapter)
    yield pair_reference(s, models["reference"], state, models)
    given = (state, pairs(s), models["reference"], s.config, optimizer, s.flags)
    yield Phase("update", s.script.train_step, given, state, models, logits=pair_logits(s))
    policy = joined(models["reference"], state.params)
    yield from rollout(s, policy, EVALUATED, 1, state, models)


def iterative_dpo(s):
    models = {"reference": parameters(s, s.config), **learned_reward(s)}
    state, optimizer = new_state(s, models["reference"])
    count = s.flags.prompts_per_round, s.flags.num_generations
    yield from rollout(s, state.params, *count, state, models)
    yield pair_reference(s, models["reference"], state, models)
    given = (state, pairs(s), s.config, optimizer, s.flags)
    yield Phase("update", s.script.train_step, given, state, models, logits=pair_logits(s))


def ppo(s):
    models = {"reference": parameters(s, s.config), **learned_reward(s)}
    critic_config = s.config if s.reward_config is None else s.reward_config
    critic_config = dataclasses.replace(critic_config, remat=s.flags.remat)
    critic = parameters(s, critic_config, "RewardModel")
    trained = {"policy": models["reference"], "critic": critic}
    state, optimizer = new_state(s, trained, s.flags.kl_coef)
    yield from rollout(s, state.params["policy"], s.flags.batch_size, 1, state, models)
    experience = functools.partial(
        s.script.make_experience, critic_config=critic_config, args=s.flags
    )
    sampled = (state, sample(s), floats(s.flags.batch_size))
    yield Phase("values, advantages", experience, sampled, state, models)
    batch, _ = jax.eval_shape(experience, *sampled)
    given = (state, batch, key(), (s.config, critic_config), optimizer, s.flags)
    logits = logits_size(s, s.flags.micro_batch_size, s.flags.max_completion_length)
    yield Phase("update", s.script.train_step, given, state, models, logits=logits)


def grpo(s):
    models = {"reference": parameters(s, s.config), **learned_reward(s)}
    trained, more = models["reference"], () if s.mesh is None else (s.mesh,)
    if getattr(s.flags, "lora_rank", 0):
        init = functools.partial(s.script.init_adapter, args=s.flags)
        trained = on_mesh(s, jax.eval_shape(init, trained))
    if hasattr(s.script, "round_matrices"):  # of grpo_llama.py, which keeps a rounded reference
        rounded = functools.partial(s.script.round_matrices, dtype=s.flags.dtype)
        models["reference"] = on_mesh(s, jax.eval_shape(rounded, models["reference"]))
    state, optimizer = new_state(s, trained, s.flags.ref_sync_steps is not None)
    policy, base = state.params, ()
    if getattr(s.flags, "lora_rank", 0):
        base = (models["reference"],)
        policy = joined(models["reference"], state.params)
    groups = s.flags.batch_size // s.flags.num_generations * s.flags.oversample
    yield from rollout(s, policy, groups, s.flags.num_generations, state, models)
    scored = (sample(s, s.flags.oversample), floats(s.flags.batch_size * s.flags.oversample))
    experience = functools.partial(s.script.make_experience, args=s.flags)
    batch, _ = jax.eval_shape(experience, *scored)
    batch = jax.tree.map(functools.partial(by_rows, s), batch)
    given = (state, batch, key(), s.config, optimizer, s.flags, *more, *base)
    logits = logits_size(s, s.flags.micro_batch_size, s.flags.max_completion_length)
    yield Phase("update", s.script.train_step, given, state, models, logits=logits)


PHASES = {
    "sft": sft,
    "reward": reward,
    "ppo": ppo,
    "dpo": dpo,
    "grpo": grpo,
    "iterative_dpo": iterative_dpo,
    "sharded": grpo,
    "mixed_precision": mixed_precision,
    "lora": lora,
    "grpo_llama": grpo,
}


def phases(run, args):
    """All of them, as [Phase]; on a CPU a checkpoint is written from the same memory."""
    found = list(PHASES[run.script](setup(run, args)))
    if on_cpu(args) and "fsdp" not in vars(run.flags):  # those scripts have Orbax
        most = max(found, key=lambda phase: size(phase.models))
        found.append(most._replace(name="checkpoint", function=None, cache=0, logits=0))
    return found


def rollout(s, params, prompts, samples, state, models):
    """Samples, their log-probabilities under the reference, and a learned reward.

    Of a step or of an evaluation, whichever has more of them; --rollout-batch-size at once.
    """
    evaluated = EVALUATED * getattr(s.flags, "eval_generations", 1)
    if prompts * samples < evaluated:
        prompts, samples = EVALUATED, evaluated // EVALUATED
    if s.flags.rollout_batch_size:
        prompts = min(prompts, s.flags.rollout_batch_size // samples)
    count = prompts * samples
    reference = getattr(state, "ref_params", None) or models["reference"]
    if s.mesh is not None:
        texts = (by_rows(s, ints(prompts, s.flags.max_prompt_length)),) * 2
        numbers = (s.flags.max_completion_length, s.flags.temperature, no_end(s), samples)
        given = (params, reference, s.config, *texts, key(), numbers, s.mesh)
        cache, logits = cache_size(s, count), logits_size(s, count, 1)
        name, function = "sampling, reference", s.script.sample_on_mesh
        yield Phase(name, function, given, state, models, cache, logits)
    else:
        yield sampling(s, params, prompts, samples, state, models)
        given = (reference, s.config, *(ints(count, length(s)),) * 2)
        given = (*given, s.flags.max_prompt_length, s.flags.temperature)
        logits = logits_size(s, count, s.flags.max_completion_length)
        yield Phase("reference", s.script.policy_logprobs, given, state, models, logits=logits)
    if "learned reward" in models:
        yield scoring(s, models["learned reward"], s.reward_config, count, state, models)


def sampling(s, params, prompts, samples, state, models):
    texts = (ints(prompts, s.flags.max_prompt_length),) * 2
    numbers = (s.flags.max_completion_length, s.flags.temperature, no_end(s), samples)
    given, count = (params, s.config, *texts, key(), *numbers), prompts * samples
    sizes = cache_size(s, count), logits_size(s, count, 1)
    return Phase("sampling", s.script.generate, given, state, models, *sizes)


def scoring(s, params, config, count, state, models):
    texts = (by_rows(s, ints(count, length(s))),) * 2
    given = (params, config, *texts)
    return Phase("learned reward", s.script.learned_rewards, given, state, models)


def pair_reference(s, reference, state, models):
    batch = pairs(s, s.flags.micro_batch_size)
    del batch["ref_logprobs"]
    given, logits = (reference, batch, s.config), pair_logits(s)
    function = s.script.pair_logprobs
    return Phase("reference of pairs", function, given, state, models, logits=logits)


def sample(s, times=1):
    """The Rollout of one step."""
    N, R, T = s.flags.batch_size * times, s.flags.max_completion_length, length(s)
    ended = jax.ShapeDtypeStruct((N,), bool)
    return s.script.Rollout(ints(N, T), ints(N, T), *(floats(N, R) for _ in range(3)), ended)


def pairs(s, count=None):
    """A batch of dpo.py's train_step; count: pairs."""
    count = count or s.flags.batch_size
    names = ("tokens", "mask", "response_mask")
    batch = {name: ints(count, 2, length(s)) for name in names}
    return batch | {"ref_logprobs": floats(count, 2)}


# ------------------------------------------------------------------------------------------- sizes


def parts(phase, args):
    """{part: bytes} of a phase, on one device."""
    state, trained = size(phase.state), size(phase.state.params)
    found = {"parameters": trained, "moments": state - trained, "other models": size(phase.models)}
    left = besides(phase, args)
    known = {"gradients": trained if phase.name == "update" else 0}
    known |= {"KV cache": phase.cache, "logits": phase.logits}
    for name, bytes_of_it in known.items():
        found[name] = min(bytes_of_it, left)
        left -= found[name]
    return found | {"activations": left}


def besides(phase, args):
    """Bytes that a phase needs besides its state and the other models."""
    if phase.function is None:
        return 2 * size(phase.state)  # the file's content, which safetensors copies once
    results, temporary = compiled_sizes(lowered(phase, args))
    resident = {id(x) for x in jax.tree.leaves((phase.state, phase.models))}
    given = [x for x in jax.tree.leaves(phase.arguments) if id(x) not in resident]
    return size(given) + results + temporary


KNOWN = {}  # what was compiled: {hash of a program: (results, temporary memory)}


def compiled_sizes(program):
    """(bytes of what comes out and has not the place of what went in, temporary bytes)."""
    text = hash(program.as_text())
    if text not in KNOWN:
        found = program.compile().memory_analysis()
        results = found.output_size_in_bytes - found.alias_size_in_bytes
        KNOWN[text] = results, found.temp_size_in_bytes
    return KNOWN[text]


def lowered(phase, args):
    """The phase's program before XLA, for devices here, or for a TPU that need not be there."""
    function, given = phase.function, phase.arguments
    if args.tpu:
        alone = SingleDeviceSharding(some_devices(args)[0])
        given = jax.tree.map(lambda x: placed(x, getattr(x, "sharding", None) or alone), given)
    if isinstance(function, functools.partial):
        return function.func.lower(*given, **function.keywords)
    return function.lower(*given)


def size(tree):
    """Bytes of all arrays in a tree, on one device; what is no array has none."""
    found = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    shapes = [x.sharding.shard_shape(x.shape) if x.sharding else x.shape for x in found]
    return sum(math.prod(shape) * x.dtype.itemsize for x, shape in zip(found, shapes))


def cache_size(s, rows):
    """Bytes of the keys and values of so many samples, on one device."""
    if hasattr(s.config, "n_embd"):
        layers, width = s.config.n_layer, s.config.n_embd
    else:
        layers = s.config.num_hidden_layers
        width = s.config.num_key_value_heads * s.config.head_dim
    itemsize = jnp.dtype(s.config.dtype).itemsize
    return 2 * layers * rows * length(s) * width * itemsize // splits(s)


def logits_size(s, rows, columns):
    """Bytes of a block of logits, as in read_in_blocks, on one device."""
    block = max(2**25 // (rows * s.config.vocab_size), 1)
    return 4 * rows * min(block, columns) * s.config.vocab_size // splits(s)


def pair_logits(s):
    return logits_size(s, 2 * s.flags.micro_batch_size, length(s) - 1)


def splits(s):
    """The number of devices that share samples, heads and vocabulary."""
    return 1 if s.mesh is None else s.mesh.size


def overhead(args):
    """Bytes of Python, JAX and what it compiled: of this process, which holds no arrays."""
    return resident("VmRSS") if on_cpu(args) else 0


def resident(field):
    """Bytes of this process: VmRSS now, VmHWM at most so far; 0 where there is no /proc."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith(field)]
    return found[0] * 1024 if found else 0


# -------------------------------------------------------------------------------- shapes of arrays


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def key():
    return jax.eval_shape(lambda: jax.random.key(0))


def length(s):
    return s.flags.max_prompt_length + s.flags.max_completion_length


def no_end(s):
    """The EOS of sampling: no token, so that all samples have their full length."""
    return (-1,) if isinstance(s.config.eos_token_id, tuple) else -1


def parameters(s, config, module=None):
    """The shapes of a model's parameters: objects of their own, by which `parts` knows them."""
    module = module or ("GPT2" if hasattr(config, "n_embd") else "Llama")
    one = jnp.ones((1, 1), jnp.int32)
    init = getattr(s.script, module)(config).init
    params = jax.eval_shape(lambda: init(jax.random.key(0), one, one))["params"]
    return on_mesh(s, params, "fsdp" if module == "RewardModel" else None)


def learned_reward(s):
    """{"learned reward": parameters}, or none; it is only read, so it is whole along fsdp."""
    config = s.reward_config
    return {} if config is None else {"learned reward": parameters(s, config, "RewardModel")}


def joined(params, adapter):
    """The policy's tree: weights and, beside them, an adapter."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(adapter))


def new_state(s, params, *more):
    """(the shapes of the TrainState, optimizer)"""
    optimizer, _ = s.script.make_optimizer(s.flags, 10_000)
    state = jax.eval_shape(lambda x: s.script.make_state(x, optimizer, *more), params)
    return on_mesh(s, state), optimizer


def on_mesh(s, tree, without=None):
    """The shapes with the shardings that the script gives them."""
    if s.mesh is None:
        return tree
    return jax.tree.map(placed, tree, s.script.shardings(tree, s.mesh, without=without))


def by_rows(s, x):
    """An array of a batch, split as the script splits it."""
    return x if s.mesh is None else placed(x, NamedSharding(s.mesh, s.script.BATCH))


def placed(x, sharding):
    is_array = isinstance(x, jax.ShapeDtypeStruct)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) if is_array else x


# ------------------------------------------------------------------------- scripts, models, devices


class Run(NamedTuple):
    """A script and its flags."""

    script: str  # ppo
    flags: object  # its Args
    changed: dict  # {flag: value} that the plan has changed


def first_run(args, own_flags):
    """What was asked for."""
    path = Path(args.script)
    if path.suffix != ".py" or path.stem not in PHASES:
        fail(f"{args.script}: pass one of {', '.join(f'{name}.py' for name in PHASES)}")
    script, prog = load(path.stem), f"{args.script}'s own flags:"
    run = Run(path.stem, tyro.cli(script.Args, prog=prog, args=own_flags), {})
    script.check_flags(run.flags)
    found = problem(run, args)
    script.check(not found, found)
    several = args.devices > 1 and "fsdp" not in vars(run.flags)
    if several and run.script not in MANY_DEVICES:
        print(f"note: {args.script} uses one device{more_devices_advice(run, args)}")
    check(not (args.measure and args.devices > 1), "--measure is for one device")
    return run


def load(name):
    """A script of ours as a module."""
    folder = str(Path(__file__).resolve().parents[1])
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def setup(run, args):
    """The Setup of a run."""
    script, flags = load(run.script), run.flags
    mesh = make_mesh(flags, args) if "fsdp" in vars(flags) else None
    config = model_config(script, flags, flags.model)
    given = {"eos_token_id": (-1,) if mesh and run.script == "grpo_llama" else -1}
    given |= {name: getattr(flags, name) for name in ("remat", "dtype") if name in vars(flags)}
    given |= {"mesh": mesh} if run.script == "grpo_llama" else {}
    reward_config, learned = None, vars(flags).get("reward_model")
    if learned:
        reward_config = model_config(script, flags, learned)
    elif "reward_model" in vars(flags) and not flags.reward and run.script != "grpo_llama":
        folder = Path("runs/reward/model")  # what the scripts take then
        same_size = flags.model in SIZES or not folder.exists()
        reward_config = config if same_size else model_config(script, flags, folder)
    return Setup(script, flags, dataclasses.replace(config, **given), reward_config, mesh)


def model_config(script, flags, name):
    """The config of a model: of a name above, of a folder, of the hub, or of flags alone."""
    if not name:
        names = ("n_layer", "n_head", "n_embd", "n_positions")
        tokens = script.load_tokenizer(flags.tokenizer).n_vocab
        return script.GPT2Config(vocab_size=tokens, **{x: getattr(flags, x) for x in names})
    if hasattr(script, "GPT2Config") and str(name) in SIZES:
        return script.GPT2Config(**dict(zip(("n_layer", "n_head", "n_embd"), SIZES[name])))
    if hasattr(script, "LlamaConfig") and str(name) in LLAMA_SIZES:
        names = ["model_type", "vocab_size", "hidden_size", "intermediate_size"]
        names += ["num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        names += ["head_dim", "tie_word_embeddings"]
        sizes = dict(zip(names, LLAMA_SIZES[name]))
        return script.LlamaConfig(max_position_embeddings=8192, **sizes)
    if Path(name).exists() or Path(name).parts[0] == "runs":
        return script.load_config(script.find_model(name))
    known = ", ".join(LLAMA_SIZES if hasattr(script, "LlamaConfig") else SIZES)
    try:
        folder = script.snapshot_download(str(name), allow_patterns=["*config.json"])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        fail(f"no folder {name}, and not from the hub: {reason}; known without it: {known}")
    return script.load_config(Path(folder))


def problem(run, args):
    """Why a script would refuse these flags, or "": of those that the plan changes."""
    flags = run.flags
    minibatch = flags.batch_size // getattr(flags, "num_minibatches", 1)
    if minibatch % flags.micro_batch_size:
        return f"--micro-batch-size {flags.micro_batch_size} does not divide {minibatch} rows"
    s = setup(run, args)
    longest = getattr(s.config, "n_positions", None) or s.config.max_position_embeddings
    if length(s) > longest:
        return f"{length(s)} tokens, but the model has {longest} positions"
    if s.mesh is not None:
        message = io.StringIO()
        with contextlib.redirect_stderr(message), contextlib.suppress(SystemExit):
            s.script.check_splits(s.mesh, s.config, flags)
        return message.getvalue().removeprefix("error: ").strip()
    return ""


def simulate(devices):
    """As many devices on the CPU, where others are not there."""
    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)


def some_devices(args):
    if args.tpu:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # this machine is none of Google's
        return topologies.get_topology_desc(args.tpu, "tpu").devices
    found = jax.devices()
    return found if len(found) >= args.devices else jax.devices("cpu")


def make_mesh(flags, args):
    """The script's mesh, of the first devices."""
    devices, sizes = some_devices(args)[: args.devices], (flags.data, flags.fsdp, flags.tensor)
    try:
        shape = np.arange(args.devices).reshape(sizes).shape
    except ValueError:
        fail(f"--devices {args.devices} make no mesh of --data, --fsdp, --tensor {sizes}")
    return Mesh(np.array(devices).reshape(shape), ("data", "fsdp", "tensor"))


def on_cpu(args):
    device = args.device or ("cpu" if jax.default_backend() == "cpu" else "gpu")
    return device == "cpu" and not args.tpu


def place(args):
    kind = "TPU " + args.tpu if args.tpu else some_devices(args)[0].device_kind
    many = f"{args.devices} devices of kind {kind}, one of them" if args.devices > 1 else kind
    return many + ("" if on_cpu(args) else "; a device with memory of its own")


# -------------------------------------------------------------------------------------------- plan

# Scripts that do the same on other terms: in half precision, with LoRA, on many devices.
HALF_PRECISION, WITH_LORA, MANY_DEVICES = (
    {"sft": "mixed_precision"},
    {"dpo": "lora"},
    {"grpo": "sharded"},
)


def change(run, **changes):
    """The run with these flags changed."""
    return Run(run.script, dataclasses.replace(run.flags, **changes), run.changed | changes)


def move(run, script):
    """The run by another script that has its flags, too."""
    given = {name: x for name, x in vars(run.flags).items() if name != "run_dir"}
    return Run(script, load(script).Args(**given), run.changed)


def smaller_micro_batches(run, args):
    """The same update from smaller parts."""
    for i in range(1, run.flags.micro_batch_size.bit_length()):
        yield change(run, micro_batch_size=run.flags.micro_batch_size // 2**i)


def smaller_rollouts(run, args):
    """The same samples, fewer at once."""
    if "rollout_batch_size" in vars(run.flags):
        groups = (getattr(run.flags, f"{x}_generations", 1) for x in ("num", "eval"))
        group, batch_size = math.lcm(*groups), run.flags.batch_size
        most = run.flags.rollout_batch_size or max(2 * batch_size, EVALUATED)
        for size in (most // 2**i for i in range(1, most.bit_length())):
            if size % group == 0 and (run.script != "ppo" or batch_size % size == 0):
                yield change(run, rollout_batch_size=size)
    elif run.script == "reward":  # fewer of those that normalise the score
        for count in (4, 2):
            if count < run.flags.num_generations:
                yield change(run, num_generations=count)


def remat(run, args):
    """Activations are computed twice in place of being kept: about a third more time."""
    if not run.flags.remat:
        yield change(run, remat=True)


def half_precision(run, args):
    """Products in bfloat16."""
    if run.script in HALF_PRECISION:
        yield change(move(run, HALF_PRECISION[run.script]), dtype="bfloat16")
    elif vars(run.flags).get("dtype") == "float32":
        yield change(run, dtype="bfloat16")


def low_rank(run, args):
    """LoRA: fewer trained parameters, which want a higher learning rate."""
    if run.script in WITH_LORA:
        yield move(run, WITH_LORA[run.script])
    elif vars(run.flags).get("lora_rank") == 0:
        yield change(run, lora_rank=16)


def split_weights(run, args):
    """fsdp, then also tensor: what the devices have in common is sent between them."""
    run = move(run, MANY_DEVICES[run.script]) if run.script in MANY_DEVICES else run
    if args.devices == 1 or "fsdp" not in vars(run.flags):
        return
    group = math.lcm(run.flags.num_generations, run.flags.eval_generations)
    for tensor in (2**i for i in range(args.devices.bit_length())):
        fsdp = args.devices // tensor
        changes = {"data": 1, "fsdp": fsdp, "tensor": tensor}
        if fsdp > run.flags.micro_batch_size:
            changes["micro_batch_size"] = fsdp
        if fsdp * group > (run.flags.rollout_batch_size or math.inf):
            changes["rollout_batch_size"] = fsdp * group
        if fsdp * tensor == args.devices:
            yield change(run, **changes)


# Cheapest first.
CHANGES = (
    smaller_micro_batches,
    smaller_rollouts,
    remat,
    half_precision,
    low_rank,
    split_weights,
)


def plan(run, args, peaks, base):
    """(the first run that fits, else the best one; its peaks). A change that saves nothing goes."""
    report("as given", peaks)
    for changes in CHANGES:
        for tried in changes(run, args):
            if excess(peaks, args) == 0:
                return run, peaks
            if problem(tried, args):
                continue
            found = {x.name: base + sum(parts(x, args).values()) for x in phases(tried, args)}
            saves = excess(found, args) < 0.99 * excess(peaks, args)
            report(difference(run, tried), found, "" if saves else "; saves nothing here")
            if not saves:
                break
            run, peaks = tried, found
    return run, peaks


def excess(peaks, args):
    """Bytes by which the phases are above what there is."""
    return sum(max(peak - 1e9 * args.device_memory, 0) for peak in peaks.values())


def report(what, peaks, more=""):
    print(f"  {what:40} {largest(peaks)}{more}", flush=True)


def largest(peaks):
    """The peak of a run in GB, and the phase that has it."""
    name = max(peaks, key=peaks.get)
    return f"{peaks[name] / 1e9:.2f} GB, {name}"


def difference(run, tried):
    """The change, as it is typed."""
    changed = {name: x for name, x in tried.changed.items() if run.changed.get(name) != x}
    script = [f"{tried.script}.py"] if tried.script != run.script else []
    return " ".join([*script, *typed(changed)])


def typed(changed):
    """Flags as they are typed."""
    flags = {f"--{name.replace('_', '-')}": x for name, x in changed.items()}
    return [flag if x is True else f"{flag} {x}" for flag, x in flags.items()]


def command(run, own_flags):
    """The line to type: the flags that were given, but for those that have changed."""
    names = {f"--{name.replace('_', '-')}" for name in run.changed}
    kept, skipped = [], False
    for flag in own_flags:
        name = flag.partition("=")[0].replace("_", "-")
        skipped = name in names if flag.startswith("--") else skipped
        if not skipped:
            kept.append(shlex.quote(flag))
    return " ".join([f"python {run.script}.py", *kept, *typed(run.changed)])


def more_devices_advice(run, args):
    if "fsdp" in vars(run.flags):
        return "" if args.devices > 1 else ", or more devices (--devices 8)"
    if run.script in MANY_DEVICES:
        return (
            f", or more devices: {MANY_DEVICES[run.script]}.py does the same on them (--devices 8)"
        )
    return "; what runs on many is GRPO: sharded.py, grpo_llama.py"


# ------------------------------------------------------------------------------------------- table


def table(run, args, own_flags):
    """Prints a line for each phase as it comes; returns (all lines, {phase: peak in bytes})."""
    found = phases(run, args)
    print_models(found[-1])
    head = ["script", "phase", "parameters", "moments", "other models", "gradients", "KV cache"]
    head += ["logits", "activations", "peak", *["measured"] * args.measure]
    lines, peaks = [row(head), "|---" * len(head) + "|"], {}
    print(*lines, sep="\n", flush=True)
    for phase in found:
        sizes = parts(phase, args)
        peaks[phase.name] = sum(sizes.values())
        cells = [run.script, phase.name, *(f"{x / 1e6:.0f}" for x in sizes.values())]
        cells.append(f"{peaks[phase.name] / 1e6:.0f}")
        if args.measure:
            with multiprocessing.get_context("spawn").Pool(1) as process:
                measured = process.apply(measure, (args, own_flags, phase.name))
            cells.append(f"{measured / 1e6:.0f}")
        lines.append(row(cells))
        print(lines[-1], flush=True)
    print()
    base = overhead(args)
    if base:
        print(f"Python, JAX and what it compiled: {base / 1e6:.0f} MB more.")
        peaks = {name: base + peak for name, peak in peaks.items()}
    print(f"The script needs {largest(peaks)}.")
    return lines, peaks


def print_models(phase):
    trained = phase.state.params
    trained = trained if "policy" in trained else {"trained": trained}
    models = [f"{name} {size(x) / 1e6:.0f}" for name, x in (trained | phase.models).items()]
    print(f"Models, MB: {', '.join(models)}.\n")


def row(cells):
    return f"| {' | '.join(cells)} |"


def measure(args, own_flags, name):
    """The peak in bytes of one real call: the device's, or this process's without its start."""
    run = first_run(args, own_flags)
    phase = next(phase for phase in phases(run, args) if phase.name == name)
    program = phase.function and lowered(phase, args).compile()
    held = (phase.state, phase.models, phase.arguments)
    shapes = [x for x in jax.tree.leaves(held) if isinstance(x, jax.ShapeDtypeStruct)]
    shapes = {id(x): x for x in shapes}
    real = {number: real_array(x) for number, x in shapes.items()}
    before = resident("VmRSS") - size(list(shapes.values()))  # making them compiled programs, too
    if program:
        given = jax.tree.map(lambda x: real.get(id(x), x), phase.arguments)
        given = [x for x, shape in zip(given, phase.arguments) if size(shape)]  # no static ones
        jax.block_until_ready(program(*given))
    else:
        tensors = {str(i): real[id(x)] for i, x in enumerate(jax.tree.leaves(phase.state))}
        safetensors.flax.save(tensors)
    statistics = jax.devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] if statistics else resident("VmHWM") - before


def real_array(x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding)


def write(run, lines):
    """The script's lines of the table in benchmarks/RESULTS.md, in place of those before."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "RESULTS.md"
    before, found, rest = path.read_text("utf-8").partition(MARKS[0])
    check(found and MARKS[1] in rest, f"{path} lacks the comments between which the table stands")
    old, end, after = rest.partition(MARKS[1])
    rows = [line for line in old.splitlines()[2:] if not line.startswith(f"| {run.script} |")]
    order = list(PHASES)
    rows = sorted(rows + lines[2:], key=lambda line: order.index(line.split()[1]))
    path.write_text(before + found + "\n".join([*lines[:2], *rows]) + "\n" + end + after, "utf-8")


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(condition, message):
    if not condition:
        fail(message)


if __name__ == "__main__":
    sys.exit(main(args, own_flags))
