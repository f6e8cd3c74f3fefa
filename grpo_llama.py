"""GRPO of Llama, Qwen and their kin: sharded.py with today's models and chats.

The decoder of Touvron et al. 2023, "LLaMA": RMSNorm, rotary positions, heads
that share keys and values, SwiGLU; families llama, mistral, qwen2 and qwen3.
Products are in bfloat16 over float32 weights (--dtype). Under --fsdp a block's
weights are gathered where they are used, and with --remat again backwards.
With --lora-rank an adapter is all that is trained (Hu et al. 2021).

A prompt is a text, or a list of {"role", "content"}, which the model's own
chat template renders. To such prompts the completions that reward functions
get are lists of messages, too: TRL's [{"role": "assistant", "content": …}].

    python grpo_llama.py --model Qwen/Qwen3-0.6B --dataset questions.jsonl \\
        --reward my_rewards.py:right_answer --learning-rate 1e-6
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 \\
        python grpo_llama.py … --fsdp 4 --tensor 2       # simulated devices

More: docs/llama.md, docs/many_devices.md.
Compare: diff sharded.py grpo_llama.py.
"""

import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import tyro


@dataclass(frozen=True)
class Args:
    # folder or hub name: the policy's start, and the reference
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    # folder of a learned reward, added to --reward: the same family, with a score
    reward_model: str | None = None
    # file.py:function, f(prompts, completions, **columns) -> scores; repeatable
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # one for each --reward, in the same order; default 1
    reward_weight: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    # file.py:function, a ground truth that is only logged; default: that of the embedded data
    gold: str | None = None
    dataset: str = "data/reviews/prompts_train.jsonl"  # JSON Lines (or .gz) with prompt
    # held out; the first 256; default: the embedded test file, or the end of --dataset
    eval_dataset: str | None = None
    run_dir: str = "runs/grpo_llama"  # where metrics, samples, checkpoint and model go
    resume: bool = False  # go on from the checkpoint in run_dir; a finished run stays as it is
    overwrite: bool = False  # replace the run in run_dir
    seed: int = 0  # seeds the order of the prompts, the minibatches and the samples
    steps: int = 100  # rollouts, each followed by epochs * num_minibatches updates
    batch_size: int = 128  # completions in one rollout
    num_generations: int = 8  # completions to one prompt: a group
    oversample: int = 1  # times as many groups are sampled, to replace those without a spread
    epochs: int = 2  # passes over a rollout
    num_minibatches: int = 2  # updates in one pass
    micro_batch_size: int = 32  # sequences in one forward and backward pass of an update
    rollout_batch_size: int | None = None  # completions sampled and scored at once; none: all
    learning_rate: float = 3e-4  # peak; it falls linearly to 0
    warmup_steps: int = 8  # updates in which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW's, on matrices
    max_grad_norm: float = 1.0  # the gradient is scaled down to this global norm
    lora_rank: int = 0  # r, the columns of A and the rows of B; 0: all weights are trained
    lora_alpha: int = 64  # x A B is scaled by alpha / r
    rslora: bool = False  # scale by alpha / sqrt(r) (Kalajdzievski 2023), so that r may grow
    # layers by name; others: gate_proj up_proj down_proj
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    kl_coef: float = 0.3  # weight of the KL penalty
    kl_in: Literal["reward", "loss"] = "reward"  # a sequence's k1 in its reward, or k3 in the loss
    # reward minus the group's mean; that divided by the group's std; reward minus the others' mean
    advantage: Literal["group", "group-std", "leave-one-out"] = "group"
    # sequence: mean of the sequences' token means; token: mean over all tokens; constant: the sum
    # divided by sequences * max_completion_length
    aggregation: Literal["sequence", "token", "constant"] = "constant"
    # token: each token's ratio is clipped; sequence: the geometric mean over the completion
    ratio_level: Literal["token", "sequence"] = "token"
    clip_eps: float = 0.2  # the ratio is clipped to 1 - clip_eps … 1 + clip_eps
    clip_eps_high: float | None = None  # the upper bound is 1 + clip_eps_high; none: clip_eps
    entropy_coef: float = 0.0  # weight of a bonus for the policy's entropy per token
    ref_sync_steps: int | None = None  # steps between moves of the reference; none: it stays
    # the new reference is alpha * policy + (1 - alpha) * the old one; objective/kl is to it
    ref_mixup_alpha: float = 1.0
    missing_eos_penalty: float = 1.0  # taken off the score of a completion that does not end
    mask_truncated_completions: bool = False  # learn nothing from a completion that does not end
    max_prompt_length: int = 16  # tokens; a row with a longer prompt is dropped
    max_completion_length: int = 48  # tokens, EOS included
    remat: bool = False  # recompute activations in the backward pass: slower, less memory
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the model's products
    temperature: float = 1.0  # of sampling, and of every log-probability
    log_every: int = 1  # steps between lines in metrics.jsonl
    eval_every: int = 20  # steps between evaluations on the held-out prompts
    eval_generations: int = 1  # completions to each held-out prompt; from 2 on pass@k is logged
    keep_best: str | None = None  # as gold/reward: the model with the highest goes to best/, too
    save_every: int = 10  # steps between checkpoints
    data: int = -1  # devices that repeat the weights and split the batch; -1: all that are left
    fsdp: int = 1  # devices that split the weights and the batch
    tensor: int = 1  # devices that split heads, hidden units and vocabulary
    # host:port of process 0; auto: as Slurm, Kubernetes or a TPU pod have it; none: one process
    coordinator: str | None = None
    num_processes: int | None = None  # all of them; with --coordinator host:port
    process_id: int | None = None  # of this one, from 0; with --coordinator host:port


# Parsed before JAX is imported, so that --help answers at once (linters call it E402). Indented,
# because tyro joins lines that begin with a letter.
if __name__ == "__main__":
    args = tyro.cli(Args, description=textwrap.indent(__doc__, " "))
    sys.stdout.reconfigure(errors="replace")  # a console need not know every character

import atexit
import contextlib
import dataclasses
import fcntl
import functools
import gzip
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import tempfile
import time
import traceback
import unicodedata
import zlib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
import optax
import orbax.checkpoint as ocp
import regex
import safetensors.flax
import safetensors.numpy
import tiktoken
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download
from jax.experimental.mesh_utils import create_device_mesh
from jax.experimental.multihost_utils import (
    broadcast_one_to_all,
    process_allgather,
    sync_global_devices,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from rich.progress import Progress
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import hparams, scalar

# ------------------------------------------------------------------------------------------ losses


def grpo_loss(
    logprobs,
    old_logprobs,
    ref_logprobs,
    advantages,
    mask,
    clip_low,
    clip_high,
    kl_coef,
    aggregation,
    ratio_level,
    max_length,
    entropy_bonus=0.0,
):
    """Group-relative policy optimization (Shao et al. 2024, eq. 3), as a loss.

    logprobs, old_logprobs, ref_logprobs, entropy_bonus, mask [B, R]; advantages [B]. For each token
    max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)) + kl_coef * k3 - entropy_bonus,
    k3 = exp(d) - 1 - d, d = log pi_ref - log pi. clip_high > clip_low is DAPO's "clip-higher".

    ratio_level "token": pi / pi_old of each token; "sequence": their geometric mean over the
    sequence (Zheng et al. 2025, "GSPO", eq. 7).
    aggregation "sequence": the mean over sequences of their tokens' mean (GRPO); "token": the mean
    over all tokens (Yu et al. 2025, "DAPO"); "constant": the sum over B * max_length (Dr. GRPO).
    Under jax.jit these two are static_argnames=("aggregation", "ratio_level").
    """
    assert logprobs.shape == old_logprobs.shape == ref_logprobs.shape == mask.shape
    assert advantages.shape == mask.shape[:1], (advantages.shape, mask.shape)

    def mean(x):
        return jnp.sum(x * mask) / jnp.maximum(mask.sum(), 1)

    lengths = jnp.maximum(mask.sum(axis=1), 1)  # [B]
    log_ratio = (logprobs - old_logprobs) * mask
    if ratio_level == "sequence":
        log_ratio = log_ratio.sum(axis=1, keepdims=True) / lengths[:, None]  # [B, 1]
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    advantages = advantages[:, None]  # [B, 1]
    policy_losses = jnp.maximum(-advantages * ratio, -advantages * clipped)
    difference = jnp.minimum((ref_logprobs - logprobs) * mask, 20.0)  # one token must not overflow
    k3 = jnp.expm1(difference) - difference  # exp(d) - 1 would round away what is left near 0
    losses = (policy_losses + kl_coef * k3 - entropy_bonus) * mask  # [B, R]
    if aggregation == "sequence":
        loss = jnp.mean(losses.sum(axis=1) / lengths)
    elif aggregation == "token":
        loss = mean(losses)
    else:
        loss = losses.sum() / (len(mask) * max_length)
    is_low = (ratio < 1 - clip_low) & (advantages < 0)  # [B, R], or [B, 1]
    is_high = (ratio > 1 + clip_high) & (advantages > 0)
    return loss, {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": 0.5 * mean(log_ratio**2),  # k2, an estimate of KL(old || new)
        "policy/clipfrac_avg": mean(is_low | is_high),
        "clip_ratio/low_mean": mean(is_low),
        "clip_ratio/high_mean": mean(is_high),
        "val/ratio": mean(ratio),
        "kl": mean(k3),
    }


def compute_kl_divergence(logprobs, ref_logprobs):
    """k1 = log pi - log pi_ref of each sampled token [B, R]; its mean under pi is KL(pi || pi_ref).

    For a penalty inside the reward, which is not differentiated, k1 is right: the policy gradient
    of -k1 is that of -KL, and k3 = exp(-k1) - 1 + k1 would be biased there. In a loss it is useless
    (the mean of its gradient is 0); there k3 is common, whose gradient is that of the other
    direction, KL(pi_ref || pi). Schulman 2020, "Approximating KL divergence".
    """
    assert logprobs.shape == ref_logprobs.shape, (logprobs.shape, ref_logprobs.shape)
    return logprobs - ref_logprobs


def group_relative_advantage(rewards, group_size, scale=True, eps=1e-4):
    """GRPO's advantage (Shao et al. 2024, section 4.1.2): [B] -> [B], rows group by group.

    (r - mean of its group) / (std of its group + eps), the std with Bessel's correction, as in TRL.
    scale=False leaves the division out (Liu et al. 2025, "Dr. GRPO"): it weighs prompts by how
    much their rewards agree. The mean includes r itself, so the advantage is (G - 1) / G of
    leave_one_out_advantage's. A reward of NaN is none: its advantage is 0, and it moves no other.
    """
    assert group_size > 1 and rewards.ndim == 1, (rewards.shape, group_size)
    groups = rewards.reshape(-1, group_size)  # [B / G, G]
    groups = groups - jnp.nanmax(groups, axis=1, keepdims=True)  # equal rewards: exactly 0
    advantages = groups - jnp.nanmean(groups, axis=1, keepdims=True)
    if scale:
        advantages = advantages / (jnp.nanstd(groups, axis=1, ddof=1, keepdims=True) + eps)
    return jnp.nan_to_num(advantages).reshape(-1)


def leave_one_out_advantage(rewards, group_size):
    """RLOO (Ahmadian et al. 2024): r less the mean of the others of its group; [B].

    The baseline knows nothing of r itself, so the gradient is not biased, not even in scale.
    """
    advantages = group_relative_advantage(rewards, group_size, scale=False)
    counts = jnp.sum(~jnp.isnan(rewards.reshape(-1, group_size)), axis=1)  # [B / G]
    return advantages * jnp.repeat(counts / jnp.maximum(counts - 1, 1), group_size)


def dynamic_sampling(scores, group_size, num_groups):
    """DAPO's dynamic sampling (Yu et al. 2025, eq. 11): (rows to learn from, counts of groups).

    scores [N], group by group. Of the first num_groups groups, those whose scores are all equal
    are replaced by later ones with a spread, as far as there are any: shapes stay static. A score
    of NaN is none.
    """
    groups = scores.reshape(-1, group_size)  # [N / G, G]
    flat = ~(jnp.nanmax(groups, axis=1) > jnp.nanmin(groups, axis=1))
    kept = jnp.sort(jnp.argsort(flat, stable=True)[:num_groups])  # those with a spread come first
    rows = kept[:, None] * group_size + jnp.arange(group_size)  # [num_groups, G]
    counts = {"groups/replaced": jnp.sum(kept >= num_groups), "groups/zero_std": flat[kept].sum()}
    return rows.reshape(-1), counts


def masked_mean(x, mask):
    """Mean of x over the places where mask is 1; 0 where there are none."""
    return jnp.sum(x * mask) / jnp.maximum(mask.sum(), 1)


# -------------------------------------------------------------------------------------------- mesh

BATCH = Spec(("data", "fsdp"))  # how rows are split
# How the axes of a weight, and of its moments, are split: by the first pattern in its name.
RULES = {
    "lora_": Spec(),  # A and B are small
    "embedding": Spec("tensor", "fsdp"),  # [V, D]
    "(q|k|v|gate|up)_proj.*kernel": Spec("fsdp", "tensor"),  # [D, H * d], [D, K * d], [D, F]
    "(q|k|v)_proj.*bias": Spec("tensor"),  # [H * d], [K * d]
    "(o|down)_proj.*kernel": Spec("tensor", "fsdp"),  # [H * d, D], [F, D]
}


def join_processes(coordinator, num_processes, process_id):
    """Makes this process one of many, before it touches a device; when one dies, JAX ends all."""
    if coordinator is None:
        alone = num_processes is None and process_id is None
        check(alone, "--num-processes and --process-id need --coordinator")
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    address = (None if coordinator == "auto" else coordinator, num_processes, process_id)
    limits = {"heartbeat_timeout_seconds": 20, "shutdown_timeout_seconds": 20}
    try:
        jax.distributed.initialize(*address, initialization_timeout=60, **limits)
    except (ValueError, RuntimeError) as error:
        fail(f"no processes to join with --coordinator {coordinator}: {error}")
    if jax.process_index() > 0:  # process 0 speaks for all
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115


def make_mesh(data, fsdp, tensor):
    """The devices of all processes; one of the sizes may be -1: as many as the others leave."""
    count, sizes = jax.device_count(), (data, fsdp, tensor)
    try:
        shape = np.arange(count).reshape(sizes).shape
    except ValueError:
        fail(f"{count} devices do not make a mesh of --data, --fsdp, --tensor {sizes}")
    # Neighbours in a TPU's network stay neighbours. (jax.make_mesh's axes are another kind.)
    return Mesh(create_device_mesh(shape), ("data", "fsdp", "tensor"))


def shardings(tree, mesh, without=None, even=True):
    """The NamedSharding of each array in a tree with the names of RULES, `without` one axis.

    even: an axis that does not divide (GPT-2 has 50 257 tokens) stays whole, as jit's arguments and
    results must be; inside of it, XLA fills up the last part.
    """

    def sharding(path, x):
        name = jax.tree_util.keystr(path)
        spec = next((spec for pattern, spec in RULES.items() if re.search(pattern, name)), Spec())
        split = [
            None if axis == without or (even and size % mesh.shape.get(axis, 1)) else axis
            for size, axis in zip(x.shape, spec)
        ]
        return NamedSharding(mesh, Spec(*split))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def put(x, sharding):
    """An array that every process has, onto the mesh: each hands its own devices their parts."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def round_matrices(params, dtype):
    """The weights with all that is multiplied, or looked up, in dtype; norms and biases stay."""
    return jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_weights(params, config):
    """Some weights as a pass uses them, inside jit: rounded to config.dtype, then whole along fsdp;
    then the vocabulary split even where that leaves unequal parts. Their types stay."""
    whole = round_matrices(params, config.dtype)
    for changes in ({}, {"without": "fsdp"}, {"without": "fsdp", "even": False}):
        if config.mesh:
            places = shardings(whole, config.mesh, **changes)
            whole = jax.lax.with_sharding_constraint(whole, places)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), whole, params)


def gather_forward(params, config):
    """gather_weights; its gradient needs nothing of it."""
    return gather_weights(params, config), None


def gather_backward(config, _, gradients):
    """The gradients come back as the weights lie, and are not rounded."""
    if config.mesh:
        places = shardings(gradients, config.mesh)
        gradients = jax.lax.with_sharding_constraint(gradients, places)
    return (gradients,)


gather_weights.defvjp(gather_forward, gather_backward)


def check_splits(mesh, config, args):
    """The number of parts of a batch; fails where rows or heads do not split into equal parts."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    size = args.batch_size // args.num_generations * args.oversample
    most = args.rollout_batch_size or 0
    for count, what, by in (
        (size, "prompts of a step (--batch-size / --num-generations * --oversample)", parts),
        (args.micro_batch_size, "sequences of --micro-batch-size", parts),
        (most // args.num_generations, "prompts of --rollout-batch-size", parts),
        (most // args.eval_generations, "held-out prompts of --rollout-batch-size", parts),
        (config.num_key_value_heads, "key-value heads of the model", mesh.shape["tensor"]),
    ):
        check(count % by == 0, f"{dict(mesh.shape)} cannot split the {count} {what} by {by}")
    return parts


def state_on_mesh(params, optimizer, ref_moves, mesh):
    """make_state, of which each device holds its part from the beginning."""
    new_state = functools.partial(make_state, optimizer=optimizer, ref_moves=ref_moves)
    parts = shardings(jax.eval_shape(new_state, params), mesh)
    return jax.jit(new_state, out_shardings=parts)(params)


def models_on_mesh(params, args, mesh):
    """(what is trained, the reference, the weights under an adapter, if one is what is trained)."""
    trained = init_adapter(params, args) if args.lora_rank else params
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (trained, params)]
    print("trained: {:,} of {:,} parameters, {:.2%}".format(*sizes, sizes[0] / sizes[1]))
    reference = round_matrices(params, args.dtype)  # it is only read
    trained, reference = (
        jax.tree.map(put, tree, shardings(tree, mesh)) for tree in (trained, reference)
    )
    return trained, reference, reference if args.lora_rank else None


def save_from_mesh(folder, config, params, source):
    """save_model by process 0, of weights that lie on all; the others wait until it is done."""
    params = process_allgather(params, tiled=True)
    if jax.process_index() == 0:
        save_model(folder, config, params, source)
    sync_global_devices(f"{folder.name} is written")


def save_adapter_from_mesh(folder, adapter, args):
    """save_adapter by process 0."""
    adapter = jax.tree.map(jnp.asarray, process_allgather(adapter, tiled=True))
    if jax.process_index() == 0:
        save_adapter(folder, adapter, args, prefix="model", fan_in_fan_out=False)


def rewards_on_mesh(rewards, mesh):
    """Rewards whose learned reward is split along tensor; whole along fsdp: it is only read."""
    if not rewards.learned:
        return rewards
    config, params = rewards.learned
    params = jax.tree.map(put, params, shardings(params, mesh, without="fsdp"))
    return rewards._replace(learned=(config, params))


def call_reward_in_parts(function, rows, texts):
    """call_reward, each process for its share of the rows; every process gets all scores [B]."""
    i, n = jax.process_index(), jax.process_count()
    own = slice(len(rows) * i // n, len(rows) * (i + 1) // n)
    scores = np.zeros((1, len(rows)), np.float32)
    if rows[own]:
        scores[0, own] = call_reward(function, rows[own], texts[own])
    return process_allgather(scores, tiled=True).sum(axis=0)


# ---------------------------------------------------------------------------------- half precision


def product(x, y, x_axes, y_axes):
    """x times y, summed over these axes in float32, whatever type x and y have."""
    axes = ((x_axes, y_axes), ((), ()))
    return jax.lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def half_dot(dtype, x, w, axis):
    """x [N, D] times w, of which D is an axis, both rounded to dtype -> float32 [N, …].

    So are its gradients: JAX's own would be products of float32 and half, which are slow.
    """
    return product(x.astype(dtype), w.astype(dtype), (1,), (axis,))


def half_dot_forward(dtype, x, w, axis):
    """half_dot, and what its gradients need: the rounded operands, half as large."""
    return half_dot(dtype, x, w, axis), (x.astype(dtype), w.astype(dtype))


def half_dot_backward(dtype, axis, saved, gradient):
    """The gradients with respect to x and w, float32 sums of products in dtype."""
    x, w = saved
    gradient, features = gradient.astype(dtype), tuple(i for i in range(w.ndim) if i != axis)
    rows, columns = (gradient, x) if axis == 0 else (x, gradient)
    columns = columns.T
    if dtype == "bfloat16":  # copied by a look-up: from a mere transpose CPUs multiply slowly
        columns = columns[jnp.arange(len(columns))]
    x_gradient = product(gradient, w, tuple(range(1, w.ndim)), features)  # [N, D]
    return x_gradient, product(columns, rows, (1,), (0,))


half_dot.defvjp(half_dot_forward, half_dot_backward)


# ------------------------------------------------------------------------------------------ update


class LoRADense(nn.DenseGeneral):
    """A linear layer that adds x A B where its parameters have A and B (Hu et al. 2021, eq. 3)."""

    @nn.compact
    def __call__(self, x):
        y = super().__call__(x)
        if self.has_variable("params", "lora_A"):
            # Small products: W + A B would be a second copy of W, with a gradient of that size.
            rank = self.variables["params"]["lora_A"]["kernel"].shape[-1]
            layer = functools.partial(self.clone, parent=self, use_bias=False)
            y += layer(name="lora_B")(layer(name="lora_A", features=rank)(x))
        return y


def init_adapter(params, args):
    """A tree of A [in, r], random as PEFT's, and B [r, *out], zero, for each kernel [in, *out]."""
    kernels = {path: x for path, x in flatten_dict(params).items() if path[-1] == "kernel"}
    names = sorted({path[-2] for path in kernels})
    check(set() < {*args.lora_targets} <= {*names}, f"--lora-targets: some of {', '.join(names)}")
    draw, adapter = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), {}
    for (*layer, _), kernel in kernels.items():
        if layer[-1] in args.lora_targets:
            (fan_in, *out), rank, name = kernel.shape, args.lora_rank, ".".join(layer)
            check(rank <= min(fan_in, math.prod(out)), f"--lora-rank is above a side of {name}")
            key = stream_key(args.seed, name, 0)
            adapter[*layer, "lora_A", "kernel"] = draw(key, (fan_in, rank))
            adapter[*layer, "lora_B", "kernel"] = jnp.zeros((rank, *out))
    return unflatten_dict(adapter)


def attach(params, adapter, args):
    """The policy's parameters: A, times alpha / r, and B beside their kernels; none is copied."""
    scale = args.lora_alpha / (args.lora_rank**0.5 if args.rslora else args.lora_rank)
    flat = {p: scale * x if "lora_A" in p else x for p, x in flatten_dict(adapter).items()}
    return unflatten_dict(flatten_dict(params) | flat)


def merge(params, adapter, args):
    """The same policy as a plain model: W + (alpha / r) A B in place of W."""
    flat = flatten_dict(attach(params, adapter, args))
    for path in [path for path in flat if "lora_A" in path]:
        B = flat.pop((*path[:-2], "lora_B", "kernel"))
        flat[*path[:-2], "kernel"] += jnp.tensordot(flat.pop(path), B, 1)
    return unflatten_dict(flat)


def with_base(params, base, args):
    """The policy's parameters: what is trained, or the frozen weights and the adapter on them."""
    return attach(base, params, args) if args.lora_rank else params


def plain(params, base, args):
    """The same policy without an adapter: merged into the weights under it, if there is one."""
    return merge(base, params, args) if args.lora_rank else params


class TrainState(NamedTuple):
    """What one step hands to the next, and all that a checkpoint holds."""

    params: dict
    opt_state: optax.OptState
    ref_params: dict | None  # of a reference that moves


def make_state(params, optimizer, ref_moves):
    """A fresh state with its own copy of `params`: train_step donates the buffers of its state."""
    params = jax.tree.map(jnp.copy, params)
    ref_params = jax.tree.map(jnp.copy, params) if ref_moves else None
    return TrainState(params, jax.jit(optimizer.init)(params), ref_params)


def token_entropies(logits):
    """Entropy of the distribution at each position: [..., V] -> [...]."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jax.nn.softmax(logits) * logits, axis=-1)


@functools.partial(
    jax.jit, static_argnames=("config", "optimizer", "args", "mesh"), donate_argnames="state"
)
def train_step(state, batch, key, config, optimizer, args, mesh, base=None):
    """5. Makes epochs * num_minibatches updates on make_experience's batch: (state, metrics).

    base: the frozen weights under an adapter, which then is all that is trained.
    """
    size, response_length = batch["logprobs"].shape
    prompt_length = batch["tokens"].shape[1] - response_length
    clip_high = args.clip_eps if args.clip_eps_high is None else args.clip_eps_high

    def logprobs_and_entropies(logits, tokens):
        # A metric alone need not be differentiated.
        of_entropy = logits if args.entropy_coef else jax.lax.stop_gradient(logits)
        return token_logprobs(logits, tokens), token_entropies(of_entropy)

    def loss_fn(params, batch):
        params = with_base(params, base, args)
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH))
        tokens, mask = batch["tokens"], batch["mask"]
        model = (params, config, tokens, mask, prompt_length, args.temperature)
        logprobs, entropies = read_response(logprobs_and_entropies, *model)
        loss, metrics = grpo_loss(
            logprobs,
            batch["logprobs"],
            batch["ref_logprobs"],
            batch["advantages"],
            batch["response_mask"],
            clip_low=args.clip_eps,
            clip_high=clip_high,
            kl_coef=args.kl_coef if args.kl_in == "loss" else 0.0,
            aggregation=args.aggregation,
            ratio_level=args.ratio_level,
            max_length=response_length,
            entropy_bonus=args.entropy_coef * entropies,
        )
        entropy = masked_mean(entropies, batch["response_mask"])
        return loss, metrics | {"policy/entropy_avg": entropy}

    def update(state, rows):
        minibatch = jax.tree.map(lambda x: x[rows], batch)
        tokens = minibatch["response_mask"].sum(axis=1)  # [B / num_minibatches]
        counts = tokens if args.aggregation == "token" else jnp.ones_like(tokens)
        (loss, metrics), grads = accumulate_gradients(
            loss_fn, state.params, minibatch, counts, args.micro_batch_size, metric_counts=tokens
        )
        # The loss may be a mean over sequences, the other metrics are means over tokens.
        metrics |= {"loss/policy_avg": loss, "grad_norm": optax.tree.norm(grads)}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.ref_params), (metrics, tokens.sum())

    keys = jax.random.split(key, args.epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(keys)  # [epochs, B]
    order = order.reshape(args.epochs * args.num_minibatches, -1)
    state, (metrics, weights) = jax.lax.scan(update, state, order)
    state = jax.lax.with_sharding_constraint(state, shardings(state, mesh))
    weights = weights / jnp.maximum(weights.sum(), 1)  # all 0 where every completion is masked
    return state, {name: jnp.sum(weights * x) for name, x in metrics.items()}


# ----------------------------------------------------------------------------------------- rollout


class Rollout(NamedTuple):
    """Completions, group by group; P + R tokens, R of them the response's."""

    tokens: jax.Array  # [N, P + R]
    mask: jax.Array  # [N, P + R], 1 = real token
    response_mask: jax.Array  # [N, R], 1 up to and including EOS
    logprobs: jax.Array  # [N, R], under the policy that sampled
    ref_logprobs: jax.Array  # [N, R], under the reference
    ended: jax.Array  # [N], whether with EOS


def rollout(params, ref_params, config, tokenizer, prompts, num_samples, key, args, mesh):
    """1. Sample completions to encode_rows' prompts: (Rollout, their rows, their texts), N each."""
    P, eos_ids = args.max_prompt_length, config.eos_token_id
    tokens, mask = pad_rows([ids[0] for _, ids in prompts], P, left=True)  # [B, P]
    sampling = (args.max_completion_length, args.temperature, eos_ids, num_samples)

    def sample(tokens, mask, numbers):
        own_key = jax.random.fold_in(key, numbers[0]) if numbers[0] else key
        tokens, mask = (put(x, NamedSharding(mesh, BATCH)) for x in (tokens, mask))
        return sample_on_mesh(params, ref_params, config, tokens, mask, own_key, sampling, mesh)

    size = args.rollout_batch_size and args.rollout_batch_size // num_samples  # prompts at once
    sampled = in_parts(sample, size, tokens, mask, np.arange(len(prompts)))
    tokens, mask = process_allgather(sampled[:2], tiled=True)
    rows = [row for row, _ in prompts for _ in range(num_samples)]
    ids = zip(np.asarray(tokens)[:, P:], np.asarray(mask)[:, P:] > 0)
    rows = [row | {"completion_ids": x[kept].tolist()} for row, (x, kept) in zip(rows, ids)]
    return sampled, rows, decode_responses(tokenizer, tokens, mask, P, eos_ids)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "mesh"))
def sample_on_mesh(params, ref_params, config, tokens, mask, key, sampling, mesh):
    """A Rollout, from tokens, mask [B, P] by rows; sampling: what generate takes after the key."""
    P, (_, temperature, eos_ids, _) = tokens.shape[1], sampling
    whole, alone = gather_weights(params, config), dataclasses.replace(config, mesh=None)
    tokens, mask, logprobs = generate(whole, alone, tokens, mask, key, *sampling)
    ref_logprobs = policy_logprobs(ref_params, config, tokens, mask, P, temperature)
    response_mask = mask[:, P:].astype(jnp.float32)
    ended = jnp.isin(tokens[:, P:], np.array(eos_ids)).any(axis=1)
    sampled = Rollout(tokens, mask, response_mask, logprobs, ref_logprobs, ended)
    return jax.lax.with_sharding_constraint(sampled, NamedSharding(mesh, BATCH))


def read_response(function, params, config, tokens, mask, prompt_length, temperature):
    """function(logits, tokens) of what the response tokens were drawn from: [B, P + R] -> [B, R].

    The logits that predict response token t stand at column P - 1 + t.
    """

    def read(logits, tokens):
        return function(logits / temperature, tokens)

    read, model = (read, tokens[:, prompt_length:]), Llama(config)
    return model.apply({"params": params}, tokens, mask, logits_from=prompt_length - 1, read=read)


@functools.partial(jax.jit, static_argnames=("config", "prompt_length", "temperature"))
def policy_logprobs(params, config, tokens, mask, prompt_length, temperature):
    """Log-probabilities of the response tokens: tokens, mask [B, P + R] -> [B, R]."""
    return read_response(token_logprobs, params, config, tokens, mask, prompt_length, temperature)


class Rewards(NamedTuple):
    """What scores completions."""

    functions: list  # [(name, function, weight)] of --reward; weight 0: it is only logged
    learned: tuple | None  # (config, params) of a reward model
    gold: Callable | None  # the ground truth, which is only logged


def load_rewards(args, tokenizer, eos_ids):
    """The Rewards that the flags name."""
    weights = args.reward_weight or (1.0,) * len(args.reward)
    counts = f"{len(args.reward)} times --reward, but {len(weights)} times --reward-weight"
    check(len(args.reward) == len(weights), counts)
    check(args.reward_model or any(weights), "every --reward-weight is 0: nothing can be learned")
    names = [name.rpartition(":")[2] for name in args.reward]  # by which they are logged
    names = [x if names.count(x) == 1 else y for x, y in zip(names, args.reward)]
    functions = list(zip(names, map(load_function, args.reward), weights))
    learned = None
    if args.reward_model:
        learned = load_model(args.reward_model)
        check("score" in learned[1], f"{args.reward_model} has no score: not a reward model")
        own = load_tokenizer(args.reward_model)
        same = token_ids(own) == token_ids(tokenizer) and end_tokens(learned[0], own) == eos_ids
        check(same, f"the tokenizers of {args.reward_model} and {args.model} differ")
        check_sizes(learned[0], tokenizer, args)
    return Rewards(functions, learned, load_gold(args.gold, args.dataset))


def score(sampled, rows, texts, rewards, args):
    """2. Score the completions of a Rollout: {"reward", "gold/reward", "rewards/<name>"}, [N] each.

    NaN where a function does not apply. "reward" is the weighted sum of those that do, and NaN,
    which make_experience leaves out of all that it learns from, where none does.
    """
    parts = [
        (name, call_reward_in_parts(function, rows, texts), w)
        for name, function, w in rewards.functions
    ]
    if rewards.learned:
        config, params = rewards.learned
        function = functools.partial(learned_rewards, params, config)
        learned = in_parts(function, args.rollout_batch_size, sampled.tokens, sampled.mask)
        parts.append(("reward_model", process_allgather(learned, tiled=True), 1.0))
    total = sum(weight * np.nan_to_num(x) for _, x, weight in parts)
    total = total - args.missing_eos_penalty * ~process_allgather(sampled.ended, tiled=True)
    applies = np.any([~np.isnan(x) for _, x, weight in parts if weight], axis=0)
    scores = {"reward": np.where(applies, total, np.nan)}
    if rewards.gold:
        scores["gold/reward"] = call_reward_in_parts(rewards.gold, rows, texts)
    return scores | {f"rewards/{name}": x for name, x, _ in parts}


def describe(sampled, rows, texts, scores):
    """(metrics, samples to show) of a Rollout; scores: {name: [N]}."""
    kl = compute_kl_divergence(sampled.logprobs, sampled.ref_logprobs) * sampled.response_mask
    known = {name: x[~np.isnan(x)] for name, x in scores.items()}
    parts = {name: x for name, x in known.items() if name.startswith("rewards/") and x.size}
    metrics = {name: x.mean() for name, x in known.items() if name not in parts and x.size}
    metrics |= {f"{name}/mean": x.mean() for name, x in parts.items()}
    metrics |= {f"{name}/std": x.std() for name, x in parts.items()}
    metrics |= {
        "objective/kl": kl.sum(axis=1).mean(),  # nats per sequence
        "objective/entropy": -sampled.logprobs.sum(axis=1).mean(),
        "completions/mean_length": sampled.response_mask.sum(axis=1).mean(),
        "completions/clipped_ratio": 1 - sampled.ended.mean(),
    }
    columns = {"prompt": [prompt_text(row["prompt"]) for row in rows], "completion": texts}
    columns |= {name: np.where(np.isnan(x), None, x).tolist() for name, x in scores.items()}
    return metrics, [dict(zip(columns, values)) for values in zip(*columns.values())]


def pass_at_k(right, k):
    """The chance that one of k completions is right, of each prompt: right [P, n], 0 or 1 -> [P].

    1 - C(n - c, k) / C(n, k) with c right ones of n, which is not biased (Chen et al. 2021, eq. 1).
    """
    n = right.shape[1]
    wrong = n - right.sum(axis=1).astype(int)  # [P]
    return np.array([1 - math.comb(w, k) / math.comb(n, k) for w in wrong])


def pass_rates(samples, size):
    """{"<score>/pass@k"}, k = 2, 4, … to `size` samples a prompt, of each score of only 0 and 1."""
    metrics = {}
    for name in (name for name in samples[0] if "/" in name):  # gold/reward, rewards/<name>
        scores = np.array([x[name] for x in samples], float).reshape(-1, size)  # [P, size]
        scores = scores[~np.isnan(scores).any(axis=1)]  # where it applies
        if len(scores) and np.isin(scores, (0, 1)).all():
            ks = 2 ** np.arange(1, size.bit_length())
            metrics |= {f"{name}/pass@{k}": pass_at_k(scores, k).mean() for k in ks}
    return metrics


@functools.partial(jax.jit, static_argnames="args")
def make_experience(sampled, scores, args):
    """What train_step learns from a Rollout and its scores [N]: (batch, metrics of all N)."""
    tokens, mask, response_mask, logprobs, ref_logprobs, ended = sampled
    group_size = args.num_generations
    # 3. The KL penalty of the whole sequence: part of the reward, so taken off before the baseline.
    kl = compute_kl_divergence(logprobs, ref_logprobs)  # [B, R]
    penalty = args.kl_coef * jnp.sum(kl * response_mask, axis=1)  # [B]
    rewards = scores - penalty if args.kl_in == "reward" else scores
    if args.mask_truncated_completions:
        rewards = jnp.where(ended, rewards, jnp.nan)
    # A completion without a reward is not trained on, and counts in no group.
    response_mask = response_mask * ~jnp.isnan(rewards)[:, None]
    # 4. Advantages within each group.
    if args.advantage == "leave-one-out":
        advantages = leave_one_out_advantage(rewards, group_size)
    else:
        advantages = group_relative_advantage(rewards, group_size, args.advantage == "group-std")
    batch = {
        "tokens": tokens,
        "mask": mask,
        "response_mask": response_mask,
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "advantages": advantages,
    }
    known = ~jnp.isnan(scores)
    groups = scores.reshape(-1, group_size)  # [N / G, G]
    metrics = {
        "objective/non_score_reward": masked_mean(-penalty, known),
        "objective/rlhf_reward": masked_mean(jnp.nan_to_num(scores) - penalty, known),
        "reward_std": jnp.nan_to_num(jnp.nanmean(jnp.nanstd(groups, axis=1, ddof=1))),
        # From such a group only the KL is learned. (Its std may differ from 0 by rounding.)
        "frac_reward_zero_std": (jnp.nanmax(groups, axis=1) == jnp.nanmin(groups, axis=1)).mean(),
    }
    if args.oversample > 1:  # groups from which nothing is learned make room for others
        counted = jnp.where(jnp.isnan(rewards), jnp.nan, scores)
        rows, counts = dynamic_sampling(counted, group_size, args.batch_size // group_size)
        batch = jax.tree.map(lambda x: x[rows], batch)
        metrics |= counts
    return batch, metrics


# -------------------------------------------------------------------------------------------- main


def check_own_flags(args):
    """Fails where flags do not go together."""
    named = args.reward_model or args.reward
    check(named, "nothing to learn from: pass --reward FILE.py:FUNCTION, or --reward-model FOLDER")
    check(args.dtype != "bfloat16" or jax.default_backend() != "METAL", "Metal has no bfloat16")
    moves = args.lora_rank and args.ref_sync_steps
    check(not moves, "--ref-sync-steps moves a reference; with --lora-rank it is the model itself")


def main(args):
    join_processes(args.coordinator, args.num_processes, args.process_id)
    check_flags(args)
    check_own_flags(args)
    run = RunFolder(args)

    config, ref_params = load_model(args.model)
    tokenizer = load_tokenizer(args.model)
    eos_ids = end_tokens(config, tokenizer)
    mesh = make_mesh(args.data, args.fsdp, args.tensor)
    given = {"eos_token_id": eos_ids, "remat": args.remat, "dtype": args.dtype, "mesh": mesh}
    config = dataclasses.replace(config, **given)
    rewards = load_rewards(args, tokenizer, eos_ids)
    prompts, eval_prompts = (
        encode_rows(rows, [], tokenizer, eos_ids[0], args) for rows in read_data(args, ["prompt"])
    )

    check("score" not in ref_params, f"{args.model} is a reward model, not a language model")
    check_sizes(config, tokenizer, args)
    check(args.temperature > 0, "--temperature must be above 0: else nothing can be learned")
    check(args.num_generations >= 2, "--num-generations must be at least 2, to have a baseline")
    groups = f"--num-generations {args.num_generations} does not divide"
    check(args.batch_size % args.num_generations == 0, f"{groups} --batch-size {args.batch_size}")
    most = args.rollout_batch_size or 0
    check(most % args.num_generations == 0, f"{groups} --rollout-batch-size {most}")
    held_out = f"--eval-generations {args.eval_generations} does not divide"
    check(most % args.eval_generations == 0, f"{held_out} --rollout-batch-size {most}")
    sizes = f"--num-minibatches {args.num_minibatches} * --micro-batch-size {args.micro_batch_size}"
    fits = args.batch_size % (args.num_minibatches * args.micro_batch_size) == 0
    check(fits, f"{sizes} does not divide --batch-size {args.batch_size}")
    size = args.batch_size // args.num_generations * args.oversample
    fewer = f"a step takes {size} prompts (--batch-size / --num-generations * --oversample)"
    check(size <= len(prompts), f"{fewer}, --dataset has {len(prompts)}")

    parts = check_splits(mesh, config, args)
    eval_prompts = eval_prompts[: min(256, len(eval_prompts)) // parts * parts]
    check(eval_prompts, f"fewer than {parts} held-out prompts do not split into as many parts")

    batches = prompt_batches(len(prompts), size, args.steps, args.seed)
    updates_per_step = args.epochs * args.num_minibatches
    optimizer, schedule = make_optimizer(args, args.steps * updates_per_step)
    trained, ref_params, base = models_on_mesh(ref_params, args, mesh)
    rewards = rewards_on_mesh(rewards, mesh)
    state = state_on_mesh(trained, optimizer, args.ref_sync_steps is not None, mesh)
    state, start = run.start(state, args.steps)

    # Every process runs all that follows: where one left out a jitted call, the others would hang.
    def sample(asked, num_samples, stream, step):
        """(Rollout, scores [N], metrics, samples) of the present policy."""
        reference = ref_params if state.ref_params is None else state.ref_params
        models = (with_base(state.params, base, args), reference, config, tokenizer)
        key = stream_key(args.seed, stream, step)
        sampled, rows, texts = rollout(*models, asked, num_samples, key=key, args=args, mesh=mesh)
        scores = score(sampled, rows, texts, rewards, args)
        return sampled, scores["reward"], *describe(sampled, rows, texts, scores)

    def evaluate_and_sample(step):
        size = args.eval_generations
        *_, metrics, samples = sample(eval_prompts, size, "eval", step)
        metrics |= pass_rates(samples, size)
        run.log_samples(step, samples[::size][:8])
        keep_best(run, step, metrics, config, plain(state.params, base, args), args)
        return {f"eval/{name}": value for name, value in metrics.items()}

    if start == 0:
        run.log(0, evaluate_and_sample(0), "eval/reward")
    for step in range(start + 1, args.steps + 1):
        started = time.perf_counter()
        asked = [prompts[i] for i in batches[step - 1]]
        sampled, scores, metrics, _ = sample(asked, args.num_generations, "rollout", step)
        batch, batch_metrics = make_experience(sampled, scores, args)
        metrics["lr"] = schedule((step - 1) * updates_per_step)  # of the first update
        key = stream_key(args.seed, "minibatches", step)
        state, update_metrics = train_step(state, batch, key, config, optimizer, args, mesh, base)
        metrics |= jax.device_get(batch_metrics | update_metrics)
        seconds = time.perf_counter() - started
        metrics["perf/tokens_per_second"] = batch["mask"].sum() / seconds
        if run.due(step, args.eval_every):
            metrics |= evaluate_and_sample(step)
        if run.due(step, args.log_every, args.eval_every, args.save_every):
            run.log(step, metrics, "reward", "objective/kl", "gold/reward")
        if args.ref_sync_steps is not None and step % args.ref_sync_steps == 0:
            moved = optax.incremental_update(state.params, state.ref_params, args.ref_mixup_alpha)
            state = state._replace(ref_params=moved)
        if run.must_save(step, args.save_every):
            run.save(step, state)
    if args.lora_rank:
        save_adapter_from_mesh(run.path / "adapter", state.params, args)
    save_from_mesh(run.path / "model", config, plain(state.params, base, args), args.model)
    run.finish(f"grpo_llama.py --dataset {args.dataset} --run-dir {args.run_dir}-more --model")


# ==================================================================================================
# The line. From here on the text is the same in every script that has it: read it once, in gpt2.py.
# ==================================================================================================

# ------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class LlamaConfig:
    """Hugging Face's names, as in config.json; frozen, so that jit can take it as static."""

    vocab_size: int
    max_position_embeddings: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # Llama 3's, as (name, value) pairs
    attention_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    eos_token_id: tuple = ()  # each of them ends a text
    pad_token_id: int | None = None
    dtype: str = "float32"  # of the operands of products; all else is float32
    remat: bool = False  # recompute each block in the backward pass instead of keeping it
    mesh: Mesh | None = None  # over which the weights lie split


class Llama(nn.Module):
    """Llama with its language-model head, which is embed_tokens itself where the config ties it."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens, mask, cache=None, column=0, logits_from=0, read=None):
        """tokens, mask (1 = real token) [B, T] -> float32 logits [B, T - logits_from, V].

        With read = (function, *arrays [B, C]): what function(logits [B, C, V], *arrays) says of
        each token, [B, C], without ever holding all the logits.
        """
        # With a cache: mask is [B, S], tokens its T columns from `column` on; the cache comes back.
        x, new_cache, table = trunk(self.config, tokens, mask, cache, column)
        if not self.config.tie_word_embeddings:
            table = vocabulary_table(self.config, "lm_head")
        x = x[:, logits_from:]  # the largest product: only where it is read
        if read:
            return read_in_blocks(self.config, table, x, *read)
        logits = unembed(self.config, table, x)
        return logits if cache is None else (logits, new_cache)


def unembed(config, table, x):
    """The head: x [B, T, D] times the embeddings [V, D], float32 logits [B, T, V]."""
    table = table.astype(jnp.float32)  # of a frozen one in bfloat16, too: half_dot's gradient is
    logits = half_dot(config.dtype, x.reshape(-1, x.shape[-1]), table, 1)
    return logits.reshape(*x.shape[:2], -1)


def read_in_blocks(config, table, x, function, *arrays):
    """function(logits of x, *arrays) -> [B, C]; x [B, T, D] is cut to the arrays' [B, C].

    GPT-2's logits take 200 kB a token. Here 128 MB stand at a time, those of a block of columns:
    they are forgotten once they are read, and made again in the backward pass.
    """
    B, C = arrays[0].shape
    x, size = x[:, :C], max(2**25 // (B * len(table)), 1)  # columns in a block

    def block(parts):
        return function(unembed(config, table, parts[0]), *parts[1:])

    if size >= C:
        return block((x, *arrays))

    def split(x):  # [B, C, …] -> [C / size, B, size, …], filled up with 0
        x = jnp.pad(x, [(0, 0), (0, -C % size), (0, 0)][: x.ndim])
        return x.reshape(B, -1, size, *x.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(jax.checkpoint(block), jax.tree.map(split, (x, *arrays)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :C], found)


def token_logprobs(logits, tokens):
    """log_softmax(logits) at `tokens`: [..., V], [...] -> [...], in float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # A logit minus a logsumexp: no [..., V] log-softmax is kept for the backward pass.
    return -optax.softmax_cross_entropy_with_integer_labels(logits, tokens)


class RewardModel(nn.Module):
    """Llama's trunk with one number a position."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens, mask):
        """tokens, mask [B, T] -> float32 scores [B, T]."""
        x, _, _ = trunk(self.config, tokens, mask)
        init = nn.initializers.normal((self.config.hidden_size + 1) ** -0.5)  # scores of unit size
        return nn.Dense(1, use_bias=False, kernel_init=init, name="score")(x)[..., 0]


def sequence_scores(scores, mask):
    """The score at the last real token of each row: [B, T], [B, T] -> [B]."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames="config")
def learned_rewards(params, config, tokens, mask):
    """A reward model's scores of whole sequences: [B, T], [B, T] -> [B]."""
    return sequence_scores(RewardModel(config).apply({"params": params}, tokens, mask), mask)


def trunk(config, tokens, mask, cache=None, column=0):
    """(hidden states [B, T, D], new cache, embed_tokens), with parameters in the caller's tree."""
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)  # [B, S]; padding does not count
    positions = jax.lax.dynamic_slice_in_dim(positions, column, tokens.shape[1], axis=1)  # [B, T]
    queries = column + jnp.arange(tokens.shape[1])
    causal = queries[:, None] >= jnp.arange(mask.shape[1])  # [T, S]
    bias = jnp.where(causal & (mask[:, None] > 0), 0.0, -1e9)[:, None]  # [B, 1, T, S], to scores
    angles = rotary_angles(config, positions)
    table = vocabulary_table(config, "embed_tokens")
    x = table[tokens].astype(jnp.float32)  # [B, T, D]
    x = x.reshape(-1, config.hidden_size)  # a 3-D input makes weight gradients slow on a CPU
    blocks = [Block(config, name=f"layers.{i}") for i in range(config.num_hidden_layers)]
    if cache is None and not blocks[0].is_initializing():
        x = scan_blocks(config, [block.variables["params"] for block in blocks], x, bias, angles)
    else:
        cache = list(cache or [None] * config.num_hidden_layers)
        for i, block in enumerate(blocks):
            x, cache[i] = block(x, bias, angles, cache[i], column)
    x = nn.RMSNorm(config.rms_norm_eps, name="norm")(x)
    return x.reshape(*tokens.shape, config.hidden_size), cache, table


def scan_blocks(config, weights, x, bias, angles):
    """Block after block, from a list of their weights: like x [B * T, D].

    A scan, because it is compiled once for all blocks, and because the weights of only one block
    are whole at a time, forwards and, with remat, backwards. docs/llama.md says what that saves.
    """

    def one_block(x, weights):
        weights = gather_weights(weights, config)
        return Block(config, parent=None).apply({"params": weights}, x, bias, angles, None, 0)

    one_block = jax.checkpoint(one_block, prevent_cse=False) if config.remat else one_block
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *weights)
    return jax.lax.scan(one_block, x, stacked)[0]


def vocabulary_table(config, name):
    """One vector for each token, [V, D]."""
    init = nn.initializers.normal(config.initializer_range)
    embed = nn.Embed(config.vocab_size, config.hidden_size, embedding_init=init, name=name)
    return gather_weights({"embedding": embed.embedding}, config)["embedding"]


def rotary_angles(config, positions):
    """By how much each pair of a head's numbers is turned: positions [B, T] -> [B, T, d/2].

    Su et al. 2021, "RoFormer": position * theta ** (-2i / d). Llama 3 divides slow frequencies, of
    which its first training saw less than a turn or so, by a factor, and those in between by less.
    """
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    if config.rope_scaling:
        scaling = dict(config.rope_scaling)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling["factor"]
    return positions[..., None] * jnp.asarray(frequencies, jnp.float32)


def rotate(x, angles):
    """Turns the pairs (x_i, x_{i + d/2}) of each head: [B, T, n, d], [B, T, d/2] -> like x."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]  # [B, T, 1, d/2]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Block(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, bias, angles, cache, column):
        """x [B * T, D]; bias [B, 1, T, S]; cache: None or (keys, values) [B, K, S, d] each."""
        norm = functools.partial(nn.RMSNorm, self.config.rms_norm_eps)
        y = norm(name="input_layernorm")(x)
        y, cache = Attention(self.config, name="self_attn")(y, bias, angles, cache, column)
        x = x + y
        return x + MLP(self.config, name="mlp")(norm(name="post_attention_layernorm")(x)), cache


class Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, bias, angles, cache, column):
        """x [B * T, D], bias [B, 1, T, S], cache as in Block -> (y [B * T, D], new cache)."""
        config, (B, _, T, _) = self.config, bias.shape
        H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        biased = config.attention_bias or config.model_type == "qwen2"
        heads = {"q_proj": H, "k_proj": K, "v_proj": K}
        q, k, v = (
            dense(config, n * d, name, biased)(x).reshape(B, T, n, d) for name, n in heads.items()
        )
        if config.model_type == "qwen3":
            norm = functools.partial(nn.RMSNorm, config.rms_norm_eps)
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        q, k = rotate(q, angles) * d**-0.5, rotate(k, angles)
        q, k, v = (x.swapaxes(1, 2).astype(config.dtype) for x in (q, k, v))  # [B, n, T, d]
        q = q.reshape(B, K, H // K, T, d)  # the query heads of each key-value head
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k, (0, 0, column, 0))  # [B, K, S, d]
            v = jax.lax.dynamic_update_slice(cache[1], v, (0, 0, column, 0))
            cache = (k, v)
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = einsum("bkhtd,bksd->bkhts", q, k) + bias[:, None]
        # A softmax that is divided after the product with v: that leaves one pass less over T x S.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        y = einsum("bkhts,bksd->bkhtd", weights.astype(v.dtype), v)
        y = (y / weights.sum(axis=-1, keepdims=True)).reshape(B, H, T, d)
        y = y.swapaxes(1, 2).reshape(B * T, H * d)
        return dense(config, x.shape[-1], "o_proj", config.attention_bias)(y), cache


class MLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x):
        width = self.config.intermediate_size
        gate = jax.nn.silu(dense(self.config, width, "gate_proj")(x))  # [B * T, F]
        return dense(self.config, x.shape[-1], "down_proj")(
            gate * dense(self.config, width, "up_proj")(x)
        )


def dense(config, features, name, biased=False):
    """A linear layer, its product in config.dtype."""

    def dot(x, kernel, *_, **__):
        return half_dot(config.dtype, x, kernel, 0)

    init = nn.initializers.normal(config.initializer_range)
    return LoRADense(features, use_bias=biased, kernel_init=init, dot_general=dot, name=name)


# ---------------------------------------------------------------------------------------- sampling


def draw_token(key, logits):
    """A sample of softmax(logits) in each row: [N, V] -> [N].

    First a block of about sqrt(V) tokens, then one of its tokens, both by Gumbel noise: that takes
    fewer random numbers than noise for all V, and reaches the tail, as a cumulative sum does not.
    """
    size = 2 ** (logits.shape[1].bit_length() // 2)  # 32 of 512 to 2 047 tokens, 256 of GPT-2's
    blocks = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % size)), constant_values=-jnp.inf)
    blocks = blocks.reshape(len(logits), -1, size)  # [N, V / size, size]
    block_key, token_key = jax.random.split(key)
    block = jax.random.categorical(block_key, jax.nn.logsumexp(blocks, axis=-1))  # [N]
    drawn = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [N, size]
    return block * size + jax.random.categorical(token_key, drawn)


@functools.partial(
    jax.jit, static_argnames=("config", "max_new_tokens", "temperature", "eos_ids", "num_samples")
)
def generate(
    params, config, tokens, mask, key, max_new_tokens, temperature, eos_ids, num_samples=1
):
    """Samples until every row has ended: (tokens, mask [N, P + R], logprobs [N, R]).

    tokens, mask: prompts [B, P], padded on the left. N = B * num_samples, those of one prompt side
    by side; R = max_new_tokens. logprobs are those of log_softmax(logits / temperature). After a
    row's EOS all three are 0.
    """
    (B, P), R, N = tokens.shape, max_new_tokens, len(tokens) * num_samples
    assert config.max_position_embeddings >= P + R, (P, R, config.max_position_embeddings)
    params = round_matrices(params, config.dtype)  # once, not for each token
    model = functools.partial(Llama(config).apply, {"params": params})
    cache_shape = (B, config.num_key_value_heads, P + R, config.head_dim)
    cache = [(jnp.zeros(cache_shape, config.dtype),) * 2 for _ in range(config.num_hidden_layers)]
    mask = jnp.pad(mask, ((0, 0), (0, R)))  # [B, P + R]
    logits, cache = model(tokens, mask, cache=cache, logits_from=P - 1)
    tokens = jnp.pad(tokens, ((0, 0), (0, R)))  # [B, P + R]
    prefilled = (tokens, mask, logits, cache)  # each prompt is read once; now one row per sample
    prefilled = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), prefilled)

    def unfinished(carry):
        return (carry[0] < R) & ~jnp.all(carry[1])

    def one_token(carry):
        step, ended, logprobs, tokens, mask, logits, cache = carry
        logits = logits[:, 0] / temperature  # [N, V]
        token = jnp.where(ended, 0, draw_token(jax.random.fold_in(key, step), logits))  # [N]
        logprobs = logprobs.at[:, step].set(jnp.where(ended, 0.0, token_logprobs(logits, token)))
        tokens = tokens.at[:, P + step].set(token)
        mask = mask.at[:, P + step].set(jnp.where(ended, 0, 1))
        logits, cache = model(token[:, None], mask, cache=cache, column=P + step)
        ended = ended | jnp.isin(token, np.array(eos_ids))
        return step + 1, ended, logprobs, tokens, mask, logits, cache

    carry = (0, jnp.zeros(N, bool), jnp.zeros((N, R)), *prefilled)
    _, _, logprobs, tokens, mask, _, _ = jax.lax.while_loop(unfinished, one_token, carry)
    return tokens, mask, logprobs


def in_parts(function, size, *arrays):
    """function(*arrays) of `size` rows at a time, or of all for None: its arrays, joined.

    The last part is filled up with the first rows once more: one shape to compile.
    """
    count = len(arrays[0])
    size = min(size or count, count)
    parts = np.resize(np.arange(count), (-(-count // size), size))
    found = [function(*(x[rows] for x in arrays)) for rows in parts]
    return jax.tree.map(lambda *x: jnp.concatenate(x)[: count * len(x[0]) // size], *found)


def stream_key(seed, name, step):
    """The random key of a named stream at a step: a resumed run needs no stored randomness."""
    stream = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(stream, step)


# --------------------------------------------------------------------------------------- optimizer


def make_optimizer(args, total_steps):
    """(clipping, then AdamW; its schedule: a linear rise, then a linear fall to 0)."""
    warmup = max(args.warmup_steps, 1)
    rise = optax.linear_schedule(args.learning_rate / warmup, args.learning_rate, warmup - 1)
    fall = optax.linear_schedule(args.learning_rate, 0.0, total_steps - warmup)
    schedule = optax.join_schedules([rise, fall], [warmup])

    def decays(params):  # matrices, no biases and no norms
        return jax.tree.map_with_path(lambda p, _: p[-1].key in ("kernel", "embedding"), params)

    adamw = optax.adamw(schedule, weight_decay=args.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw), schedule


def accumulate_gradients(loss_fn, params, batch, counts, micro_batch_size, metric_counts=None):
    """((loss, metrics), gradient) of a whole batch from micro-batches, in one scan.

    loss_fn(params, micro_batch) -> (loss, metrics), means over tokens; counts [B] says over how
    many in each row (metric_counts: those of the metrics). A micro-batch counts by its share of
    them: a mean of means would favour the short rows.
    """
    metric_counts = counts if metric_counts is None else metric_counts
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def split(x):  # [B, …] -> [M, B / M, …]
        return x.reshape(-1, micro_batch_size, *x.shape[1:])

    def add(total, part):
        micro_batch, count, metric_count = part
        share = count.sum() / jnp.maximum(counts.sum(), 1)
        metric_share = metric_count.sum() / jnp.maximum(metric_counts.sum(), 1)
        (loss, metrics), grads = value_and_grad(params, micro_batch)
        loss, grads = jax.tree.map(lambda x: share * x, (loss, grads))
        metrics = jax.tree.map(lambda x: metric_share * x, metrics)
        return jax.tree.map(jnp.add, total, ((loss, metrics), grads)), None

    if len(counts) == micro_batch_size:  # no sums of gradients as large as the model
        return value_and_grad(params, batch)
    parts = jax.tree.map(split, (batch, counts, metric_counts))
    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts[0]))
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    return jax.lax.scan(add, zeros, parts)[0]


# ------------------------------------------------------------------------------------ model folder

# What a model folder takes over from the one that it came from.
KEPT_FILES = ("*config.json", "*token*.json", "vocab.json", "merges.txt", "*.jinja")


def find_model(name):
    """The local folder of a model: `name` itself, else the hub's model of that name."""
    folder = Path(name)
    if folder.is_dir():
        return folder / "model" if (folder / "args.json").exists() else folder  # a run's own model
    first = f"run `python {folder.parent.name}.py` first, or pass another folder"
    check(folder.parts[0] != "runs", f"no model at {name}: {first}")
    try:
        return Path(snapshot_download(str(name), allow_patterns=[*KEPT_FILES, "*.safetensors"]))
    except Exception as error:  # offline, no such model, not public: the hub's words say which
        fail(f"no folder {name}, and not from the hub: {' '.join(str(error).split())[:200]}")


def hf_name(path):
    """A parameter's name in the file: ("norm", "scale") is model.norm.weight there."""
    name = ".".join([*path[:-1], "bias" if path[-1] == "bias" else "weight"])
    return name if path[0] in ("lm_head", "score") else f"model.{name}"


# The families, each with what transformers assumes where its config.json is silent.
FAMILIES = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}


def load_config(folder):
    """The LlamaConfig of a model folder; fails on what this Llama does not implement."""
    path = folder / "config.json"
    saved = read_json(path)
    family, families = saved.get("model_type"), ", ".join(FAMILIES)
    other = "; GPT-2 is trained by grpo.py" if family == "gpt2" else ""
    known = f"model_type is {family!r}, and only {families} are implemented{other}"
    check(family in FAMILIES, f"{folder}: {known}")
    saved = FAMILIES[family] | {name: x for name, x in saved.items() if x is not None}
    saved |= {name: x for name, x in read_json(path).items() if name == "sliding_window"}
    wanted = {"hidden_act": "silu", "mlp_bias": False, "use_sliding_window": False}
    wanted |= {"sliding_window": None} if family == "mistral" else {}
    for name, value in wanted.items():
        found = saved.get(name, value)
        check(found == value, f"{folder}: {name} is {found!r}, and only {value!r} is implemented")
    sizes = ["vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size"]
    sizes += ["num_hidden_layers", "num_attention_heads"]
    lacking = [name for name in sizes if name not in saved]
    check(not lacking, f"{path} lacks {', '.join(lacking)}")
    heads = saved["num_attention_heads"]
    saved = {"num_key_value_heads": heads} | saved | load_rotary(path, saved)
    saved["eos_token_id"] = load_ends(folder, saved)
    values = {}
    for field in dataclasses.fields(LlamaConfig):
        if field.name in saved and field.name not in ("dtype", "remat", "mesh"):
            values[field.name] = value = saved[field.name]
            kind = {float: (int, float), int | None: int}.get(field.type, field.type)
            right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
            right = right and (field.type is not int or 0 < value < 2**31)
            check(right, f"{path}: {field.name} cannot be {value!r}")
    values.setdefault("head_dim", values["hidden_size"] // heads)
    config = LlamaConfig(**values)
    divides = heads % config.num_key_value_heads == 0
    check(divides, f"{path}: num_key_value_heads does not divide num_attention_heads {heads}")
    check(config.head_dim % 2 == 0, f"{path}: heads of {config.head_dim} numbers have no pairs")
    in_table = all(type(i) is int and 0 <= i < config.vocab_size for i in config.eos_token_id)
    check(in_table, f"{path}: eos_token_id {config.eos_token_id} is not in the vocabulary")
    return config


def load_rotary(path, saved):
    """{"rope_theta", "rope_scaling"} of a config.json, from its entries of today or of old."""
    found = {"rope_theta": saved.get("rope_theta", 10000.0)}
    found |= (saved.get("rope_parameters") or {}) | (saved.get("rope_scaling") or {})
    kind = found.get("rope_type", found.get("type", "default"))
    known = kind in ("default", "llama3") and found.get("partial_rotary_factor", 1) == 1
    check(known, f"{path}: of the rotary positions, Llama 1 to 3's are implemented, not {found}")
    names = ["low_freq_factor", "high_freq_factor", "factor", "original_max_position_embeddings"]
    scaling = tuple((name, found.get(name)) for name in names if kind == "llama3")
    for name, value in scaling:
        right = type(value) in (int, float) and value > 0
        check(right, f"{path}: {name} of the rotary positions cannot be {value!r}")
    return {"rope_theta": found["rope_theta"], "rope_scaling": scaling}


def load_ends(folder, saved):
    """The ids of all tokens that end a text: generation_config.json may name several."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    ends = generation.get("eos_token_id", saved.get("eos_token_id"))
    return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)


def load_model(name):
    """(config, params in float32) of a Llama in a Hugging Face folder or of a hub name.

    The params are in the host's memory: a device may be too small for all of them.
    """
    folder = find_model(name)
    config = load_config(folder)
    files = sorted(folder.glob("model*.safetensors"))  # large models come in several
    convert = (
        f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(name)!r})"
    )
    check(files, f"{folder} has no safetensors: python -c \"{convert}.save_pretrained('FOLDER')\"")
    tensors = {}
    for file in files:
        with file_access(file):
            tensors |= safetensors.numpy.load_file(file)
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        same = np.array_equal(tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight"))
        check(
            same, f"{folder}: lm_head is a table of its own; should tie_word_embeddings be false?"
        )
    one = jnp.zeros((1, 1), jnp.int32)
    likes = flatten_dict(jax.eval_shape(Llama(config).init, jax.random.key(0), one, one)["params"])
    if "score.weight" in tensors:  # a reward model has a score in place of the language-model head
        likes.pop(("lm_head", "embedding"), None)
        likes["score", "kernel"] = jnp.zeros((config.hidden_size, 1))
    params = {}
    for path, like in likes.items():
        key = hf_name(path)
        shape = like.shape[::-1]  # as in the file: [F, D] for a kernel [D, F]
        shape = shape if path[-1] == "kernel" else like.shape
        found = tensors[key].shape if key in tensors else "missing"
        check(found == shape, f"{folder}: {key} should have shape {shape}, but is {found}")
        x = tensors.pop(key).astype(np.float32)
        check(np.isfinite(x).all(), f"{folder}: {key} has values that are not finite")
        params[path] = np.ascontiguousarray(x.T) if path[-1] == "kernel" else x
    biases = [key for key in tensors if key.endswith("bias")]
    check(not biases, f"{folder}: {biases[:1]} is in the file, but not in this model")
    return config, unflatten_dict(params)


def save_model(folder, config, params, source, file_size=5_000_000_000):
    """Writes a Hugging Face folder; tokenizer and the rest of config.json as in `source`.

    Weights of more than file_size bytes go to several files, with the index that names them.
    """
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    with file_access(building):
        building.mkdir(parents=True)
        for pattern in KEPT_FILES:
            for file in find_model(source).glob(pattern):
                shutil.copyfile(file, building / file.name)
    file = building / "config.json"
    saved = read_json(file) if file.exists() else {}
    saved = {"eos_token_id": config.eos_token_id} | saved | config_entries(config)
    kind = "ForSequenceClassification" if "score" in params else "ForCausalLM"
    saved["architectures"] = [config.model_type.capitalize() + kind]
    write_file(file, json.dumps(saved, indent=2).encode())
    files, size = [{}], 0
    for path, x in flatten_dict(params).items():
        x = np.asarray(x, np.float32)
        if files[-1] and size + x.nbytes > file_size:
            files.append({})
            size = 0
        size += x.nbytes
        files[-1][hf_name(path)] = np.ascontiguousarray(x.T) if path[-1] == "kernel" else x
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        places = {key: name for name, tensors in zip(names, files) for key in tensors}
        index = {"metadata": {"total_size": sum(4 * x.size for x in jax.tree.leaves(params))}}
        content = json.dumps(index | {"weight_map": places}, indent=2).encode()
        write_file(building / "model.safetensors.index.json", content)
    for name, tensors in zip(names, files):
        content = safetensors.numpy.save(tensors, {"format": "pt"})  # transformers wants one
        write_file(building / name, content)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(building, folder)


def config_entries(config):
    """What a config.json says of the model itself."""
    own = dataclasses.asdict(dataclasses.replace(config, mesh=None))
    rotary = {"rope_type": "llama3" if config.rope_scaling else "default"}
    rotary |= {"rope_theta": config.rope_theta} | dict(config.rope_scaling)
    own |= {"rope_parameters": rotary, "rope_scaling": rotary if config.rope_scaling else None}
    own |= {"dtype": "float32", "torch_dtype": "float32"}  # of the files
    absent = ["eos_token_id", "remat", "mesh"]
    absent += ["attention_bias"] * (not config.attention_bias)
    absent += ["head_dim"] * (config.model_type == "qwen2")  # which has none
    return {name: x for name, x in own.items() if name not in absent}


def save_adapter(folder, adapter, args, prefix="transformer", fan_in_fan_out=True):
    """Writes a folder in PEFT's format; prefix: where the layers are in transformers' model."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": fan_in_fan_out}
    settings |= {"base_model_name_or_path": args.model, "target_modules": list(args.lora_targets)}
    settings |= {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "use_rslora": args.rslora}
    flat = flatten_dict(adapter)
    names = [".".join(["base_model.model", prefix, *path[:-1], "weight"]) for path in flat]
    tensors = {name: x.reshape(len(x), -1).T for name, x in zip(names, flat.values())}
    header = {"base": str(checksum(find_model(args.model)))}  # a second entry: in random order
    folder.mkdir(exist_ok=True)
    write_file(folder / "adapter_model.safetensors", safetensors.flax.save(tensors, header))
    write_file(folder / "adapter_config.json", json.dumps(settings, indent=2).encode())


# ------------------------------------------------------------------------------ tokenizer and data


class Tokenizer(tiktoken.Encoding):
    """tiktoken's Encoding, and what else a folder says of the texts and chats of its model."""

    def __init__(self, cut, ranks, absent, added, normalizer, begin, chat):
        """absent: bytes that the vocabulary lacks; added, normalizer: as in tokenizer.json.

        begin: ids in front of a plain text; chat: (template, its variables, the folder).
        """
        special = {token["content"]: token["id"] for token in added if token.get("special")}
        # Added tokens that are not special, such as <think>, are text that no merge may touch.
        self.whole = {x["content"]: x["id"] for x in added if x["content"] not in special}
        ranks = ranks | {token.encode(): i for token, i in self.whole.items()}
        last = max([*ranks.values(), *special.values()])
        ranks |= {bytes([x]): last + 1 + i for i, x in enumerate(absent)}  # tiktoken needs all 256
        super().__init__("", pat_str=cut, mergeable_ranks=ranks, special_tokens=special)
        self.max_token_value, self.composes = last, normalizer is not None
        self.cut, self.absent = cut, set(absent)
        self.begin, self.chat = begin, chat

    def encode_ordinary(self, text, special=()):
        """A text's ids; a special token in it is a token only where `special` names it."""
        cut = sorted([*self.whole, *special], key=len, reverse=True)
        ids = []
        for i, part in enumerate(re.split(f"({'|'.join(map(re.escape, cut)) or '(?!)'})", text)):
            if i % 2:  # between two parts: what they were cut at
                ids.append(self.encode_single_token(part))
            else:
                part = part.replace(BREAK, "")
                part = unicodedata.normalize("NFC", part) if self.composes else part
                ids += self.encode_part(part)
        return ids

    def encode_part(self, text):
        """The ids of a text without added tokens. Bytes that the vocabulary lacks are left out."""
        if not self.absent.intersection(text.encode()):
            return super().encode_ordinary(text)
        pieces = (piece.encode() for piece in regex.findall(self.cut, text))
        pieces = (bytes(x for x in piece if x not in self.absent) for piece in pieces)
        return [i for piece in pieces if piece for i in self._encode_single_piece(piece)]


def load_tokenizer(folder):
    """The Tokenizer of a model folder; fails on what tiktoken cannot express."""
    folder = find_model(folder)
    path = folder / "tokenizer.json"
    with file_access(f"the tokenizer of {folder}"):
        saved = read_json(path)
        model, normalizer = saved["model"], saved.get("normalizer")
        usual = model["type"] == "BPE" and isinstance(model.get("merges"), list)
        unusual = [model.get("end_of_word_suffix"), model.get("continuing_subword_prefix")]
        unusual += [model.get("dropout"), model.get("byte_fallback"), model.get("unk_token")]
        plain = "only byte-level BPE without dropout, suffix, prefix and unknown token"
        check(usual and not any(unusual), f"{path}: {plain}")
        composes = normalizer is None or normalizer == {"type": "NFC"}
        check(composes, f"{path}: of the normalizers only NFC, not {normalizer}")
        added = saved.get("added_tokens", [])
        for token in added:
            flags = [x for x in ("lstrip", "rstrip", "single_word") if token.get(x)]
            flags += ["normalized"] * bool(normalizer and token.get("normalized"))
            check(not flags, f"{path}: {token['content']} has {flags}, which tiktoken has not")
        names = {token["content"] for token in added}
        vocabulary = {token: i for token, i in model["vocab"].items() if token not in names}
        ranks, absent = token_ranks(path, vocabulary, model["merges"])
        twice = len(ranks) + len(added) - len({*ranks.values(), *(x["id"] for x in added)})
        check(twice == 0, f"{path}: {twice} ids of the vocabulary belong to two tokens")
        begin = begin_ids(path, saved.get("post_processor"))
        cut, chat = cut_pattern(path, saved["pre_tokenizer"]), load_template(folder)
        return Tokenizer(cut, ranks, absent, added, normalizer, begin, chat)


def token_ranks(path, vocabulary, merges):
    """({bytes: id}, absent bytes) of a byte-level vocabulary; tiktoken takes ids for ranks."""
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    # The files write each byte as a printable character: itself, or one of those from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = dict(zip(map(chr, [*printable, *range(256, 512)]), [*printable, *others]))
    single = [c for c in characters if c in vocabulary]
    plain = dict.fromkeys([*single, *map("".join, pairs)])
    lacking = [token for token in plain if token not in vocabulary]
    check(not lacking, f"{path}: the vocabulary lacks parts: {lacking[:5]}")
    more = [token for token in vocabulary if token not in plain]
    check(not more, f"{path}: no merge makes these tokens: {more[:5]}")
    ids = [vocabulary[token] for token in plain]
    in_order = ids[len(single) :] == sorted(ids[len(single) :])
    check(in_order, f"{path}: the token ids are not in merge order")
    # tiktoken joins any two parts that make a token, the lowest id first. Where every such pair is
    # a merge, as in Llama 3's file, it does what the merges say; else each token must be made so.
    known = set(map(tuple, pairs))
    splits = ((token[:i], token[i:]) for token in plain for i in range(1, len(token)))
    if not all(x in known for x in splits if x[0] in vocabulary and x[1] in vocabulary):
        for left, right in pairs:
            parts = [*left, *right]
            while len(parts) > 2:
                joined = [vocabulary.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
                i = joined.index(min(joined))
                parts[i : i + 2] = ["".join(parts[i : i + 2])]
            check(parts == [left, right], f"{path}: tiktoken would not make {left + right} so")
    ranks = {bytes(characters[c] for c in token): i for token, i in zip(plain, ids)}
    return ranks, [byte for c, byte in characters.items() if c not in vocabulary]


def cut_pattern(path, pre_tokenizer):
    """Where to cut a text before the merges begin, as a regular expression."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    first, last = ({} if not steps else steps[0]), ({} if not steps else steps[-1])
    kinds = [step["type"] for step in steps]
    known = not last.get("add_prefix_space") and last.get("use_regex", True) != ("Split" in kinds)
    if known and kinds == ["ByteLevel"]:  # GPT-2's pattern
        return r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    if known and kinds == ["Digits", "ByteLevel"] and first["individual_digits"]:  # SmolLM's
        words = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++"
        return words + r"|\s++$|\s+(?![^\s\p{N}])|\s"
    pattern = first.get("pattern", {}).get("Regex", "\\")
    # Llama 3's, Qwen's: what these few signs mean is the same in all dialects.
    known &= kinds == ["Split", "ByteLevel"] and first["behavior"] == "Isolated"
    known &= not first.get("invert") and not re.search(r"\\[^pPsSrnt]|&&|\[:|\(\?[^:!i]", pattern)
    check(known, f"{path}: texts are cut as GPT-2, SmolLM, Llama 3 or Qwen do, not {steps}")
    return pattern


def begin_ids(path, post_processor):
    """The ids that stand in front of each plain text, such as Llama 3's <|begin_of_text|>."""
    begin = []
    for step in (post_processor or {}).get("processors", [post_processor or {}]):
        single = step.get("single", [{"Sequence": {}}])
        kinds = [*itertools.chain(*single)]  # "SpecialToken" or "Sequence"
        known = step.get("type", "ByteLevel") in ("ByteLevel", "TemplateProcessing")
        known = known and kinds.index("Sequence") == len(kinds) - 1
        check(known, f"{path}: special tokens may stand before a text, not after it: {step}")
        tokens = [part["SpecialToken"]["id"] for part in single[:-1]]
        begin += [i for token in tokens for i in step["special_tokens"][token]["ids"]]
    return begin


def token_ids(tokenizer):
    """{bytes: id} of all but special tokens: equal for tokenizers that read every text alike."""
    return {x: tokenizer.encode_single_token(x) for x in tokenizer.token_byte_values()}


def end_tokens(config, tokenizer):
    """The ids that end a text: those of the model folder, else that of <|endoftext|>."""
    known = config.eos_token_id or "<|endoftext|>" in tokenizer.special_tokens_set
    check(known, "the model has no end of text: put its id into config.json as eos_token_id")
    return config.eos_token_id or (tokenizer.eot_token,)


def check_sizes(config, tokenizer, args):
    """Fails where ids or positions lie outside the model's tables; JAX would not complain."""
    ids, rows = tokenizer.max_token_value + 1, config.vocab_size
    check(ids <= rows, f"the tokenizer has {ids} ids, the model only {rows} tokens")
    length = args.max_prompt_length + args.max_completion_length
    longer = f"--max-prompt-length + --max-completion-length are {length} tokens"
    positions = config.max_position_embeddings
    check(length <= positions, f"{longer}, the model has {positions} positions")


def pad_rows(rows, width, left=False):
    """Lists of ids to (tokens, mask), int32 [B, width] each; zeros on the right, or on the left."""
    tokens, mask = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, columns] = row
        mask[i, columns] = 1
    return tokens, mask


def decode_responses(tokenizer, tokens, mask, prompt_length, eos_ids):
    """The completions as texts, without EOS: tokens, mask [B, P + R] -> B strings."""
    tokens, mask = np.asarray(tokens)[:, prompt_length:], np.asarray(mask)[:, prompt_length:]
    # As in TRL, special tokens are no text; nor is an id that belongs to no token, of which a model
    # may have some.
    keep = (mask > 0) & np.isin(tokens, list(token_ids(tokenizer).values()))
    keep &= ~np.isin(tokens, eos_ids)
    return [tokenizer.decode(row[kept].tolist()) for row, kept in zip(tokens, keep)]


def read_jsonl(path, fields, instead=None):
    """Rows of JSON Lines with texts in `fields`, or in `instead`; prompts may be empty, or chats.

    A row gets every column of the file: None where it lacks one.
    """
    form = ", ".join(f'"{name}": "…"' for name in fields)
    wanted = f"; wanted: JSON Lines in UTF-8 (or .gz of it), each {{{form}}}; see data/convert.py"
    made = "; `python data/reviews.py` makes it" if Path(path).resolve().parent == EMBEDDED else ""
    check(Path(path).is_file(), f"{path} is no file{made}")
    with file_access(path, wanted):
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if str(path).endswith(".gz") else content
        lines = content.decode("utf-8-sig").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            with file_access(place, wanted):
                row = json.loads(line, parse_constant=int)  # int refuses NaN and Infinity
            check(isinstance(row, dict), f"{place} is no object{wanted}")
            for name in [instead] if instead in row else fields:
                good = isinstance(row.get(name), str) and (row[name] or name == "prompt")
                good = good or (name == "prompt" and is_chat(row.get(name)))
                check(good, f'{place}: "{name}" is missing, empty or no text{wanted}')
            rows.append(row)
    check(rows, f"{path} holds no rows")
    columns = dict.fromkeys(name for row in rows for name in row)
    return [columns | row for row in rows]


# The folder of the film reviews, which know their ground truth and their held-out part.
EMBEDDED = Path("data/reviews").resolve()


def read_data(args, fields, instead=None):
    """(rows to train on, held-out rows); without --eval-dataset, the last of one's own rows."""
    rows, held_out = read_jsonl(args.dataset, fields, instead), args.eval_dataset
    kind, train, _ = Path(args.dataset).name.partition("_train")
    if held_out is None and train and Path(args.dataset).resolve().parent == EMBEDDED:
        held_out = f"data/reviews/{kind}_test.jsonl"
    if held_out:
        held_out_rows = read_jsonl(held_out, fields, instead)
    else:
        count = min(256, -(-len(rows) // 20))
        check(count < len(rows), f"{args.dataset} has one row: pass --eval-dataset, too")
        rows, held_out_rows, held_out = rows[:-count], rows[-count:], f"the end of {args.dataset}"
    print(f"data: {len(rows)} rows of {args.dataset}; held out: {len(held_out_rows)} of {held_out}")
    return rows, held_out_rows


def encode_text(tokenizer, text, size=50_000):
    """A text's ids, none of them special; in pieces: tiktoken fails on a long run of blanks."""
    pieces = (text[i : i + size] for i in range(0, len(text), size))
    return [i for piece in pieces for i in tokenizer.encode_ordinary(piece)]


def encode_rows(rows, answers, tokenizer, eos_id, args):
    """[(row, [ids of the prompt, ids of each of its `answers`, …])] of the rows that fit.

    Fails where more than a tenth does not: a run on the rest would be another experiment.
    """
    special = tokenizer.special_tokens_set
    spelled, blank = [], 0
    encoded = []
    for row in rows:
        texts = [prompt_text(row["prompt"]), *(row[name] for name in answers)]
        spelled += {token for token in special for text in texts if token in text}
        blank += texts[0] != texts[0].rstrip() and isinstance(row["prompt"], str)
        prompt = encode_prompt(tokenizer, row)
        ids = (encode_text(tokenizer, text) for text in texts[1:])
        encoded.append((row, [prompt or [eos_id], *([*x, eos_id] for x in ids)]))
    if spelled:
        print(f"note: prompts spell {sorted(set(spelled))[:5]}: they are read as plain text")
    if blank:  # "x " + "y" and "x y" are other tokens
        print(f"note: {blank} of {len(rows)} prompts end in white space")
    # An answer without its EOS would teach not to stop: a row that is too long is dropped, not cut.
    limits = args.max_prompt_length, args.max_completion_length
    lengths = [(len(ids[0]), max(map(len, ids[1:]), default=0)) for _, ids in encoded]
    lengths = np.array(lengths).reshape(-1, 2)
    fits = (lengths <= limits).all(axis=1)
    if not fits.all():
        flags = "--max-prompt-length {} --max-completion-length {}"
        longer = f"{sum(~fits)} of {len(rows)} rows are longer than {flags.format(*limits)}"
        most, all_of_them = (
            flags.format(*np.maximum(np.quantile(lengths, q, axis=0, method="higher"), limits))
            for q in (0.975, 1.0)  # 0.95 of the rows fit where 0.975 do in either length
        )
        check(np.mean(fits) >= 0.9, f"{longer}; {most} keeps 95 % of them, {all_of_them} all")
        print(f"dropped: {longer}")
    return [pair for pair, kept in zip(encoded, fits) if kept]


def prompt_batches(rows, batch_size, steps, seed):
    """Row numbers [steps, batch_size]: every prompt once before any comes again."""
    epochs = -(-steps * batch_size // rows)
    order = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(order)[: steps * batch_size].reshape(steps, batch_size)


def load_function(name):
    """What "file.py:function" names: any callable."""
    path, _, function = name.rpartition(":")
    there = path.endswith(".py") and Path(path).is_file()
    check(there, f"no file for {name}: a reward is given as file.py:function")
    sys.path.append(str(Path(path).resolve().parent))  # it may import its neighbours
    module_name, source = Path(path).stem, (path, Path(path).read_bytes())
    module = sys.modules.get(module_name)
    if getattr(module, "loaded_from", None) != source:  # one module for all functions of a file
        module_name += "_" * (module is not None)
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            fail(f"{path} cannot be imported: {type(error).__name__}: {error}")
        module.loaded_from = source
    check(callable(getattr(module, function, None)), f"{path} has no function {function}")
    return getattr(module, function)


def load_gold(name, dataset):
    """The ground truth of `name`, or else that of the embedded data, or None."""
    if name is None and Path(dataset).resolve().parent == EMBEDDED:
        name = "data/reviews.py:sentiment"
    return name and load_function(name)


def call_reward(function, rows, completions):
    """Scores [B] in TRL's way: the rows' columns come as lists; NaN where it says None.

    The completion of a dialogue is a dialogue: one message of the assistant's.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {"prompts": columns.pop("prompt"), "completions": list(completions)}
    for i, prompt in enumerate(columns["prompts"]):
        if isinstance(prompt, list):
            answer = {"role": "assistant", "content": completions[i]}
            columns["completions"][i] = [answer]
    name = getattr(function, "__name__", repr(function))
    try:
        returned = function(**columns)
        found = list(returned) if np.iterable(returned) and not isinstance(returned, dict) else []
        scores = np.array([np.nan if x is None else x for x in found])
    except (Exception, SystemExit) as error:  # the user's own: where it happened is what counts
        traceback.print_exc()
        fail(f"the reward function {name} raised {type(error).__name__}: {error}")
    right = scores.shape == (len(rows),) and scores.dtype.kind in "fiub"
    shown = str(returned)[:200]
    check(right, f"the reward function {name} must return {len(rows)} numbers, not {shown}")
    wrong = [x for x in found if x is not None and not math.isfinite(x)]
    check(not wrong, f"the reward function {name} returned {wrong[:1]}: no finite number, no None")
    return scores.astype(np.float32)


# ------------------------------------------------------------------------------------------- chats

# Stands inside of special tokens in a message, so that they are none: no text holds half a pair.
BREAK = "\udcff"


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %} marks what an assistant says: here it is only text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        """The block in between."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def load_template(folder):
    """(chat template or None, its variables, the folder), as in transformers: in a sandbox."""
    path = folder / "tokenizer_config.json"
    saved = read_json(path) if path.exists() else {}
    source = saved.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if (folder / "chat_template.jinja").exists():
        source = (folder / "chat_template.jinja").read_text("utf-8")
    names = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    tokens = {name: saved[name] for name in names if saved.get(name) is not None}
    tokens = {name: x["content"] if isinstance(x, dict) else x for name, x in tokens.items()}

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    extensions = [GenerationTag, "jinja2.ext.loopcontrols"]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": time.strftime}
    with file_access(f"the chat template of {folder}"):
        return source and environment.from_string(source), tokens, folder


def render_chat(tokenizer, messages, **variables):
    """A dialogue as the model's own template writes it, up to where the answer begins."""
    template, tokens, folder = tokenizer.chat
    check(template, f"{folder} has no chat template, and a prompt is a list of messages")
    shown = json.dumps(messages, ensure_ascii=False)[:200]
    messages = [{k: x for k, x in each.items() if x is not None} for each in messages]
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return template.render(given | tokens | variables)
    except Exception as error:  # the template's own, too: raise_exception
        fail(f"the chat template of {folder} fails on {shown}: {type(error).__name__}: {error}")


def encode_chat(tokenizer, messages, **variables):
    """The ids of render_chat's text. Special tokens count where the template wrote them only."""
    special = tokenizer.special_tokens_set

    def without_special(x):
        if isinstance(x, str):
            for token in special:
                x = x.replace(token, token[0] + BREAK + token[1:])
            return x
        if isinstance(x, dict):
            return {key: without_special(value) for key, value in x.items()}
        return [*map(without_special, x)] if isinstance(x, list) else x

    text = render_chat(tokenizer, without_special(messages), **variables)
    return tokenizer.encode_ordinary(text, special)


def is_chat(prompt):
    """Whether a prompt is a list of messages, of which the last is not the assistant's."""
    chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    texts = [message.get(x) for message in prompt for x in ("role", "content")] if chat else [None]
    return all(isinstance(x, str) for x in texts) and texts[-2:-1] not in ([], ["assistant"])


def prompt_text(prompt):
    """What to show of a prompt: a text, or a dialogue's last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def encode_prompt(tokenizer, row):
    """The ids of a row's text with what the tokenizer puts before it, or of its dialogue.

    The template may have variables: TRL's column for them is chat_template_kwargs.
    """
    if isinstance(row["prompt"], str):
        return [*tokenizer.begin, *encode_text(tokenizer, row["prompt"])]
    return encode_chat(tokenizer, row["prompt"], **(row.get("chat_template_kwargs") or {}))


# -------------------------------------------------------------------------------------- run folder


def fail(message):
    """Bad input ends a script with one line and exit status 2, as a wrong flag does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(condition, message):
    """Fails with the message unless the condition holds."""
    if not condition:
        fail(message)


@contextlib.contextmanager
def file_access(place, advice=""):
    """Whatever goes wrong with a file ends the script with its name and the reason."""
    try:
        yield
    except Exception as error:  # missing, cut short, not JSON, not UTF-8, no space on the disk, …
        reason = " ".join(str(error).split())[:200]
        fail(f"{place}: {type(error).__name__}: {reason}{advice}")


def read_json(path):
    """The object in a JSON file; fails where it is missing or broken."""
    with file_access(path):
        found = json.loads(path.read_text("utf-8-sig"))
    check(isinstance(found, dict), f"{path} holds no JSON object")
    return found


def write_file(path, content):
    """Replaces a file by these bytes: whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with file_access(path), open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# Lowest and highest value of a flag. Others are whole numbers from 1, or fractions from 0.
RANGES = {
    **dict.fromkeys(["seed", "warmup_steps", "process_id", "examples"], (0, 2**31 - 1)),
    **dict.fromkeys(["data", "fsdp", "tensor"], (-1, 2**31 - 1)),
    **dict.fromkeys(["max_grad_norm", "beta", "kl_target", "stop_kl"], (1e-6, math.inf)),
    **dict.fromkeys(["top_p", "ref_mixup_alpha"], (1e-6, 1)),
    **dict.fromkeys(["gamma", "lam"], (0, 1)),
    "reward_weight": (-math.inf, math.inf),
}


def check_flags(args):
    """Fails where a number is not finite or out of its range; a default is always in it."""
    check(not jax.config.jax_enable_x64, "unset JAX_ENABLE_X64: the scripts are float32 throughout")
    for name, value in vars(args).items():
        low, high = RANGES.get(name, (1, 2**31 - 1) if type(value) is int else (0, math.inf))
        for x in value if isinstance(value, tuple) else [value]:
            if type(x) in (int, float) and x != getattr(type(args), name):
                right = low <= x <= high and math.isfinite(x)
                flag = f"--{name.replace('_', '-')}"
                check(right, f"{flag} must be from {low} to {high}, not {x}")


def checksum(value):
    """Of what a flag names, wherever it lies: a data file, a model's weights, a reward's file."""
    if isinstance(value, list):
        found = [checksum(x) for x in value]
        return found if all(found) else None
    path, _, function = str(value).partition(":")
    weights = sorted(Path(path).glob("*.safetensors")) if path else []
    files = weights or [x for x in (Path(path), Path(path) / "tokenizer.json") if x.is_file()]
    crc = functools.reduce(lambda crc, file: zlib.crc32(file.read_bytes(), crc), files, 0)
    return f"{crc} {function}" if files else None


# What may be changed when a run is resumed; beside these, its length may grow.
MAY_CHANGE = ["run_dir", "log_every", "eval_every", "save_every"]


class RunFolder:
    """args.json, metrics.jsonl, TensorBoard, samples.jsonl, checkpoint/, then model/."""

    def __init__(self, args):
        self.path = Path(args.run_dir)
        self.args = json.loads(json.dumps(vars(args)))  # as they come back from args.json
        self.resume = self.args.pop("resume")
        self.overwrite = self.args.pop("overwrite")
        check(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")
        for name in ("data", "fsdp", "tensor", "coordinator", "num_processes", "process_id"):
            self.args.pop(name)  # a run may be resumed on other devices
        sums = {name: checksum(value) for name, value in self.args.items()}
        self.args["checksums"] = {name: value for name, value in sums.items() if value}
        self.asked, self.stopped, self.bar, self.process = 0, 0, None, os.getpid()
        self.held_out, self.samples = "", []
        signal.signal(signal.SIGINT, self.interrupt)
        signal.signal(signal.SIGTERM, self.interrupt)
        if not (self.path / "args.json").exists():
            with file_access(self.path):
                empty = not self.path.exists() or {x.name for x in self.path.iterdir()} <= {".lock"}
            check(empty, f"{self.path} is no run: pass another --run-dir")
            if self.resume:
                print(f"nothing to resume in {self.path}: the run begins at step 0")
        elif self.overwrite:
            for value in [*self.args.values(), *self.args.get("reward", [])]:
                place = Path(str(value).split(":")[0]).resolve()
                inside = place.is_relative_to(self.path.resolve()) and value != args.run_dir
                check(not inside, f"--overwrite would remove {value}, from which this run reads")
        else:
            ways = "pass --resume, --overwrite or another --run-dir"
            check(self.resume, f"{self.path} holds a run: {ways}")
            print(f"resuming {self.path}")
            with file_access(self.path / "args.json"):
                self.check_unchanged(read_json(self.path / "args.json"))
        self.checkpoints = self.path.resolve() / "checkpoint"
        sync_global_devices("every process has seen the folder as it was")
        if jax.process_index() > 0:  # the logs are process 0's; these vanish
            self.logs = tempfile.TemporaryDirectory()
            self.path = Path(self.logs.name)

    def check_unchanged(self, before):
        """Fails where a resumed run has other flags or data; ends a run that is finished."""
        old, new = ({**x, **x.get("checksums", {})} for x in (before, self.args))
        length = next(name for name in ("rounds", "steps", "epochs") if name in new)
        grown = new[length] > old.get(length, new[length])
        may_change = [*MAY_CHANGE, "checksums", *([length] if grown else [])]
        changed = [k for k in old | new if old.get(k) != new.get(k) and k not in may_change]
        changed = [f"{name} {before.get(name)}, now {self.args.get(name)}" for name in changed]
        words = f"{self.path} was begun with other settings, or files with another content"
        check(not changed, f"{words}: {'; '.join(changed)}")
        if grown:
            print(f"{self.path} goes on to {length} {new[length]}, from {old[length]}")
        elif (self.path / "model").exists():
            print(f"{self.path} is finished: its model is {self.path / 'model'}")
            raise SystemExit(0)

    def start(self, state, total_steps):
        """(state, step) of the checkpoint, or (state, 0) without one; opens the logs there."""
        with file_access(self.path, "; does another run write there?"):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")  # noqa: SIM115
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new = self.resume or self.overwrite or not (self.path / "args.json").exists()
        check(new, f"another run has begun in {self.path} since this one was started")
        for path in self.path.iterdir() if self.overwrite else ():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not (self.path / "args.json").exists():  # the other processes look for it
            write_file(self.path / "args.json", json.dumps(self.args, indent=2).encode())
        options = {"max_to_keep": 1, "cleanup_tmp_directories": True}
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
        self.manager = ocp.CheckpointManager(self.checkpoints, options=options)  # waits for all
        step = self.checkpoint_step()  # process 0 may have just emptied the folder
        shared = self.checkpoints.with_name("args.json").exists()
        check(shared, f"{self.checkpoints.parent} is not on storage that all processes see")
        if step:
            state = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            with file_access(self.checkpoints):
                state = self.manager.restore(step, args=ocp.args.StandardRestore(state))
        logs = {self.path / "metrics.jsonl": b"", self.path / "samples.jsonl": b""}
        for log in logs if step else ():
            with file_access(log):
                lines = log.read_bytes().splitlines(True) if log.exists() else []
                kept = [x for x in lines if x.endswith(b"\n") and json.loads(x)["step"] <= step]
                logs[log] = b"".join(kept)
        # All that this run goes on from has been read: from here on it writes.
        shutil.rmtree(self.path / "model", ignore_errors=True)  # a run that has grown had one
        write_file(self.path / "args.json", json.dumps(self.args, indent=2).encode())
        for log, content in logs.items():
            write_file(log, content)
        # Not a SummaryWriter: its thread dies on a full disk, and then its queue never empties.
        with file_access(self.path):
            self.events = EventsWriter(str(self.path / "events"))
            begin = SessionLog(status=SessionLog.START)  # TensorBoard forgets what was from here on
            self.events.write_event(Event(step=step + 1 if step else 0, session_log=begin))
            for summary in hparams({name: str(value) for name, value in self.args.items()}, {}):
                self.events.write_event(Event(wall_time=time.time(), summary=summary))
        size = f"{sum(x.size for x in jax.tree.leaves(state.params)):,} trained parameters"
        device = f"{jax.device_count()} {jax.default_backend()} ({jax.devices()[0].device_kind})"
        print(f"model: {self.args['model'] or 'new'}, {size}; device: {device}")
        print(f"run: {self.path}, steps {step} to {total_steps}; tensorboard --logdir {self.path}")
        self.bar = Progress()
        atexit.register(self.bar.stop)  # however the run ends, it gives the cursor back
        self.task = self.bar.add_task(self.path.name, total=total_steps, completed=step)
        self.bar.start()
        self.total_steps, self.first_step, self.started = total_steps, step, time.monotonic()
        return state, step

    def log(self, step, metrics, *shown):
        """One line in metrics.jsonl and in TensorBoard; the metrics `shown` go to the screen."""
        metrics = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        row = {"step": step, "perf/time": time.time(), **metrics, **dict.fromkeys(bad)}  # no NaN
        self.append("metrics.jsonl", row)
        with file_access(self.path):
            for name, value in metrics.items():
                summary = scalar(name if "/" in name else f"train/{name}", value)
                self.events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self.events.flush()
        values = [f"  {name} {metrics[name]:.4g}" for name in shown if name in metrics]
        named = ("eval/loss", "eval/rewards/accuracies", "eval/reward", "eval/gold/reward")
        held_out = [f"  {name} {metrics[name]:.4g}" for name in named if name in metrics]
        self.held_out = "".join(held_out) or self.held_out
        done = step - self.first_step
        seconds = (time.monotonic() - self.started) * (self.total_steps - step) / max(done, 1)
        left = f"  {seconds:.0f} s left" if done else ""
        self.bar.update(self.task, completed=step)
        print(f"step {step}/{self.total_steps}{''.join(values)}{left}", flush=True)
        cause = "is --learning-rate too high?" if step else "is the model, or a reward, at fault?"
        check(not bad, f"{bad and bad[0]} is not finite at step {step}: {cause}")

    def log_samples(self, step, rows):
        """Appends dicts (prompt, completion, scores) to samples.jsonl; `finish` shows the last."""
        self.samples = rows
        for row in rows:
            self.append("samples.jsonl", {"step": step, **row})

    def append(self, name, row):
        with file_access(self.path / name), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def due(self, step, *every):
        """Whether one of these intervals ends at this step; the last step ends all of them."""
        return step == self.total_steps or any(step % interval == 0 for interval in every)

    def must_save(self, step, every):
        """Whether a checkpoint is due, or one of the processes was asked to stop."""
        self.stopped = int(process_allgather(np.int32(self.asked)).max())
        return self.due(step, every) or self.stopped > 0

    def save(self, step, state):
        """Writes the train state, whole or not at all, to a folder named after the step."""
        with file_access(self.checkpoints):
            self.manager.save(step, args=ocp.args.StandardSave(state))
        self.end_if_stopped(step)

    def checkpoint_step(self):
        """The step of the last checkpoint, 0 without one."""
        names = [path.name for path in self.checkpoints.glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def interrupt(self, number, _):
        """The first Ctrl-C or SIGTERM lets the step in hand end; the second ends everything."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.bar is None or os.getpid() != self.process:  # before the run, or in a child
            os._exit(128 + number)
        self.asked = number
        self.bar.console.show_cursor()
        os.write(1, b"stopping as soon as this step is done and saved; once more: at once\n")

    def end_if_stopped(self, step):
        if self.stopped:
            self.bar.stop()
            print(f"stopped after step {step}, which is saved: --resume goes on")
            raise SystemExit(128 + self.stopped)

    def finish(self, command):
        """The last lines: samples, the held-out figures, where the model is, what comes next."""
        self.bar.stop()
        for row in self.samples[:3]:
            texts = [value for value in row.values() if isinstance(value, str)]
            numbers = [f"{name} {x:.2f}" for name, x in row.items() if isinstance(x, float)]
            print("|".join(texts), *numbers, sep="  ")
        seconds = time.monotonic() - self.started
        print(f"finished in {seconds:.0f} s{self.held_out}; the model is {self.path / 'model'}")
        more = "" if Path(self.args["dataset"]).resolve().parent == EMBEDDED else "  # on your data"
        print(f"next: python {command} {self.path / 'model'}{more}")


def keep_best(run, step, metrics, config, params, args):
    """Writes best/, a model folder, where --keep-best is higher than at any evaluation before."""
    if args.keep_best is None:
        return
    check(step or args.keep_best in metrics, f"--keep-best must be one of {', '.join(metrics)}")
    value = float(metrics.get(args.keep_best, -math.inf))
    file = run.path / "best.json"
    best = read_json(file) if file.exists() else {"step": 0, "value": -math.inf}
    if broadcast_one_to_all(value > best["value"]):  # process 0 has the file
        best = {"metric": f"eval/{args.keep_best}", "step": step, "value": value}
        save_from_mesh(run.path / "best", config, params, args.model)
        write_file(file, json.dumps(best).encode())
    if step == run.total_steps:
        shown = f"{args.keep_best} {best['value']:.4g} at step {best['step']}"
        print(f"best eval/{shown}; that model is {run.path / 'best'}")


if __name__ == "__main__":
    main(args)
