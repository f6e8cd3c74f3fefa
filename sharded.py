"""GRPO on many devices: grpo.py on a mesh, by data, fully sharded and tensor parallelism.

The devices of all processes form a Mesh, a grid with three named axes. A Spec (PartitionSpec; with
its mesh a NamedSharding) names for each axis of an array the mesh axis that splits it: under
Spec("fsdp", "tensor") a matrix is cut into bands of rows, and these into blocks. jit is told how
arguments and results are split; it compiles what is written as for one device into one program for
all, puts in the communication, and lets a result take the place of an argument that is donated.

    data    splits the rows of a batch; an all-reduce sums their gradients
    fsdp    splits the rows, too, and, between passes, weights and moments: this memory falls as
            1 / fsdp; a pass all-gathers the weights, and scatters the summed gradients
    tensor  splits heads, hidden units and vocabulary; an all-reduce sums the parts after attention
            and after the MLP of each block: keep it within a machine

A process rewards its share of the rows and writes its shards of a checkpoint; process 0 writes the
rest. One step agrees with grpo.py's to rounding; over a run, a token on the border of two falls the
other way now and then.

Shao et al. 2024, "DeepSeekMath", section 4. Each step samples num_generations completions to each
prompt. The advantage of a completion is its reward less its group's mean, the same at every token:
the group takes the place of ppo.py's critic. What others made of it, in flags:

    paper                        flags
    GRPO (Shao et al. 2024)      --advantage group-std --aggregation sequence --kl-in loss
                                 --kl-coef 0.04
    Dr. GRPO (Liu et al. 2025)   --advantage group --aggregation constant --kl-coef 0
    DAPO (Yu et al. 2025)        --advantage group-std --aggregation token --clip-eps-high 0.28
                                 --kl-coef 0 --mask-truncated-completions; not done here: to sample
                                 anew where a group has no spread, its penalty on length
    GSPO (Zheng et al. 2025)     --advantage group-std --aggregation sequence --ratio-level sequence
                                 --clip-eps 3e-4 --clip-eps-high 4e-4 --kl-coef 0 (it omits the KL)
    RLOO (Ahmadian et al. 2024)  --advantage leave-one-out --aggregation constant --kl-in reward
                                 --epochs 1 --num-minibatches 1

The defaults are Dr. GRPO's with the KL in the reward. --kl-in reward takes k1, the log-ratio to the
reference summed over the completion, off the reward. Without std and with aggregation constant, the
on-policy gradient is then that of E[r] - kl_coef * KL(pi || ref), and the optimum that of ppo.py,
ref * exp(r / kl_coef) / Z. --kl-in loss, the paper's way, adds k3 at every token. On-policy its
gradient is that of KL(ref || pi), token by token: blind to where a token leads, and with another
fixed point (kl_coef * ref / (lambda - r) at one step). tests/test_optimum.py shows both, exactly.
On the embedded data, seeds 1 to 3, the first gets 100 to 102 % of what the reward model's optimum
gains in gold at the same KL, the second 81 to 83 %: so the reward is the default.

With one update a rollout (--epochs 1 --num-minibatches 1) the ratio is 1, nothing is clipped, and
the loss says nothing: a group's advantages sum to 0, so it stays near 0 (near kl_coef * k3 with
--kl-in loss), while its gradient does not.

    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 python sharded.py --fsdp 4 --tensor 2    # simulated
    python sharded.py --fsdp 16 --coordinator auto    # on each host of a Slurm job or a TPU pod

Compare: `diff grpo.py sharded.py`.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class Args:
    # folder or hub name of the policy's start, which is also the reference
    model: str = "runs/sft/model"
    # folder of a learned reward, added to --reward; with neither given: runs/reward/model
    reward_model: str | None = None
    # file.py:function, f(prompts, completions, **columns) -> scores; repeatable
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # one for each --reward, in the same order; default 1
    reward_weight: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    # file.py:function of a ground truth, only logged; the embedded data's by default
    gold: str | None = None
    dataset: str = "data/reviews/prompts_train.jsonl"  # JSON Lines (or .gz) with prompt
    eval_dataset: str = "data/reviews/prompts_test.jsonl"  # held out; the first 256
    run_dir: str = "runs/sharded"  # where metrics, samples, checkpoint and model go
    resume: bool = False  # go on from the checkpoint in run_dir; a finished run stays as it is
    overwrite: bool = False  # replace the run in run_dir
    seed: int = 0  # of the order of the prompts, the minibatches and the samples
    steps: int = 100  # rollouts, each followed by epochs * num_minibatches updates
    batch_size: int = 128  # completions in one rollout, batch_size / num_generations prompts
    num_generations: int = 8  # completions to one prompt: a group
    epochs: int = 2  # passes over a rollout
    num_minibatches: int = 2  # updates in one pass
    # sequences in one pass of an update; sampling and scoring take the whole rollout at once
    micro_batch_size: int = 32
    learning_rate: float = 3e-4  # peak; it falls linearly to 0
    warmup_steps: int = 8  # updates in which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW's, on matrices
    max_grad_norm: float = 1.0  # the gradient is scaled down to this global norm
    kl_coef: float = 0.3  # weight of the KL penalty
    kl_in: Literal["reward", "loss"] = "reward"  # a sequence's k1 in its reward, or k3 in the loss
    # reward less the group's mean; the same over the group's std; or reward less the others' mean
    advantage: Literal["group", "group-std", "leave-one-out"] = "group"
    # sequence: mean of the sequences' token means; token: mean over all tokens; constant: the sum
    # over batch size * max_completion_length
    aggregation: Literal["sequence", "token", "constant"] = "constant"
    # whose ratio is clipped. token: each its own; sequence: the geometric mean of the completion's
    ratio_level: Literal["token", "sequence"] = "token"
    clip_eps: float = 0.2  # the ratio is clipped to 1 - clip_eps … 1 + clip_eps
    clip_eps_high: float | None = None  # the upper bound is 1 + clip_eps_high; none: clip_eps
    ref_sync_steps: int | None = None  # steps between moves of the reference; none: it stays
    # the new reference is alpha * policy + (1 - alpha) * the old one; objective/kl is to it
    ref_mixup_alpha: float = 1.0
    missing_eos_penalty: float = 1.0  # taken off the score of a completion that does not end
    mask_truncated_completions: bool = False  # learn nothing from a completion that does not end
    max_prompt_length: int = 16  # tokens; a longer prompt is dropped
    max_completion_length: int = 48  # tokens with EOS
    remat: bool = False  # recompute activations in the backward pass: slower, less memory
    temperature: float = 1.0  # of sampling, and of every log-probability
    data: int = -1  # devices that repeat the weights and split the batch; -1: all that are left
    fsdp: int = 1  # devices that split the weights and the batch
    tensor: int = 1  # devices that split heads, hidden units and vocabulary
    # host:port of process 0; auto: as Slurm, Kubernetes or a TPU pod have it; none: one process
    coordinator: str | None = None
    num_processes: int | None = None  # all of them; with --coordinator host:port
    process_id: int | None = None  # of this one, from 0; with --coordinator host:port
    log_every: int = 1  # steps between lines in metrics.jsonl
    eval_every: int = 20  # steps between evaluations on the held-out prompts
    save_every: int = 10  # steps between checkpoints


# Parsed before JAX is imported, so that --help answers at once (linters call it E402).
if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

import dataclasses
import functools
import gzip
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tiktoken
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download
from jax.experimental.mesh_utils import create_device_mesh
from jax.experimental.multihost_utils import process_allgather, sync_global_devices
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from safetensors.flax import load_file, save_file
from tensorboardX import SummaryWriter

# ------------------------------------------------------------------------------ tokenizer and data


def fail(message):
    """Bad input ends a script with one line and exit status 2, as a wrong flag does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def find_model(name):
    """The local folder of a model: `name` itself, else the hub's model of that name."""
    folder = Path(name)
    if not folder.is_dir() and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", str(name)):
        files = ["config.json", "model.safetensors", "*token*.json", "vocab.json", "merges.txt"]
        try:
            return Path(snapshot_download(str(name), allow_patterns=files))
        except Exception as error:  # offline, no such model, not public: the hub's words say which
            fail(f"no folder {name}, and not from the hub: {str(error).strip().splitlines()[0]}")
    if not folder.is_dir():
        made_here = len(folder.parts) > 1 and folder.parts[0] == "runs"
        run = f"run `python {folder.parts[1]}.py` first, or " if made_here else ""
        fail(f"no model at {name}: {run}pass a folder or a hub name such as gpt2")
    return folder


def load_tokenizer(folder):
    """The tiktoken.Encoding of a model folder, built from its own files.

    What is neither a byte nor made by a merge is a special token; `encode_ordinary` reads the text
    `<|endoftext|>` as plain text. Fails on what tiktoken cannot express: it takes the ids for the
    merges' ranks, and needs all 256 bytes.
    """
    folder, added = find_model(folder), {}
    if (folder / "tokenizer.json").exists():
        file = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        model, split = file["model"], file.get("pre_tokenizer") or {}
        plain_split = split.get("use_regex", True) and not split.get("add_prefix_space")
        kind = (model.get("type"), split.get("type"), plain_split, file.get("normalizer"))
        if kind != ("BPE", "ByteLevel", True, None):
            fail(f"{folder}/tokenizer.json: only byte-level BPE, no normalizer, no prefix space")
        vocabulary, merges = model["vocab"], model["merges"]
        added = {token["content"]: token["id"] for token in file.get("added_tokens", [])}
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
        lines = (folder / "merges.txt").read_text("utf-8").split("\n")
        merges = [line for line in lines[lines[0].startswith("#version") :] if line]
    else:
        fail(f"no tokenizer in {folder}: neither tokenizer.json nor vocab.json with merges.txt")
    # The files write each byte as a printable character: itself, or one of those from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    plain = dict.fromkeys([*characters, *map("".join, pairs)])
    if lacking := [token for token in plain if token not in vocabulary]:
        fail(f"the vocabulary of {folder} lacks bytes or merged tokens: {lacking[:5]}")
    ids = [vocabulary[token] for token in plain]
    if ids[256:] != sorted(ids[256:]):
        fail(f"the token ids of {folder} do not follow the order of its merges")
    ranks = {bytes(characters[c] for c in token): i for token, i in zip(plain, ids)}
    special = {token: i for token, i in vocabulary.items() if token not in plain} | added
    # The pattern is GPT-2's: where to cut a text before the merges begin.
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding(
        str(folder), pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
    )


def check_sizes(config, tokenizer, length):
    """Fails where ids or positions lie outside the model's tables; JAX would read on silently."""
    if tokenizer.max_token_value >= config.vocab_size:
        ids = f"ids up to {tokenizer.max_token_value}"
        fail(f"the tokenizer has {ids}, the model only {config.vocab_size} tokens")
    if length > config.n_positions:
        lower = "lower --max-prompt-length or --max-completion-length"
        fail(f"{length} tokens do not fit into the model's {config.n_positions} positions: {lower}")


def pad_rows(rows, width, left=False):
    """Lists of ids to (tokens, mask), int32 [B, width] each; zeros on the right, or on the left."""
    tokens, mask = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, columns] = row
        mask[i, columns] = 1
    return tokens, mask


def decode_responses(tokenizer, tokens, mask, prompt_length, eos_id):
    """The completions as texts, without EOS: tokens, mask [B, P + R] -> B strings."""
    tokens, mask = np.asarray(tokens)[:, prompt_length:], np.asarray(mask)[:, prompt_length:]
    # Some models have more rows in wte than there are tokens; such an id is no text.
    keep = (mask > 0) & (tokens != eos_id) & (tokens <= tokenizer.max_token_value)
    return [tokenizer.decode(row[kept].tolist()) for row, kept in zip(tokens, keep)]


def read_jsonl(path, *alternatives):
    """The rows of a JSON Lines file, plain or .gz: dicts with all fields of one of `alternatives`.

    Fails, with the line's number, where a line is not JSON or a field is missing, empty (a prompt
    may be) or not a string.
    """
    if not Path(path).is_file():
        fail(f"no data file {path}; `python data/reviews.py` makes the embedded ones")
    rows = []
    with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                fail(f"{path}, line {number} is not JSON: {error}")
            fields = [
                names for names in alternatives if isinstance(row, dict) and names <= row.keys()
            ]
            if not fields:
                needs = " or ".join(" and ".join(sorted(names)) for names in alternatives)
                fail(f"{path}, line {number} is not an object with {needs}")
            for name in fields[0]:
                if not isinstance(row[name], str) or not (row[name] or name == "prompt"):
                    fail(f'{path}, line {number}: "{name}" is empty or not a string')
            rows.append(row)
    return rows or fail(f"{path} holds no rows")


def encode_prompts(rows, tokenizer, eos_id, max_prompt_length):
    """[(row, token ids)] of the prompts that fit; an empty prompt is one EOS."""
    encoded = [(row, tokenizer.encode_ordinary(row["prompt"]) or [eos_id]) for row in rows]
    fitting = [(row, ids) for row, ids in encoded if len(ids) <= max_prompt_length]
    if not fitting:
        fail(f"no prompt has at most --max-prompt-length {max_prompt_length} tokens")
    if len(fitting) < len(rows):
        print(f"{len(rows)} prompts: {len(rows) - len(fitting)} dropped as too long")
    return fitting


def prompt_batches(rows, batch_size, steps, seed):
    """Row numbers [steps, batch_size]: every prompt once before any comes again."""
    epochs = -(-steps * batch_size // rows)
    order = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(order)[: steps * batch_size].reshape(steps, batch_size)


def load_function(name):
    """The function of "file.py:function"."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        fail(f"no file for {name}: a reward is given as file.py:function")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        fail(f"{path} cannot be imported: {type(error).__name__}: {error}")
    if not hasattr(module, function):
        fail(f"{path} has no function {function}")
    return getattr(module, function)


def call_reward(function, rows, completions):
    """Scores [B] of a reward function in TRL's signature; None ("does not apply") counts as 0.

    rows: the data's rows, whose other columns it gets as lists. Fails with one line where it raises
    or returns something else than one finite number a completion.
    """
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    name, prompts = function.__name__, [row["prompt"] for row in rows]
    try:
        scores = function(prompts=prompts, completions=list(completions), **columns)
        scores = np.array([0.0 if score is None else score for score in scores], np.float32)
    except Exception as error:
        fail(f"the reward function {name} raised {type(error).__name__}: {error}")
    if scores.shape != (len(rows),) or not np.isfinite(scores).all():
        fail(f"the reward function {name} must return {len(rows)} finite numbers, not {scores}")
    return scores


def stream_key(seed, name, step):
    """The random key of a named stream at a step: a resumed run needs no stored randomness."""
    stream = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(stream, step)


# ------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class GPT2Config:
    """Hugging Face's names, as in config.json; frozen, so that jit can take it as static."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    reward_gain: float = 1.0  # a record: reward.py has folded gain and shift into the weights
    reward_shift: float = 0.0
    dtype: str = "float32"  # of the computation; parameters are float32
    remat: bool = False  # recompute each block in the backward pass instead of keeping it


def linear(config, x, features, name, scale=1.0):
    """A dense layer [B, T, D] -> [B, T, *features] inside a compact module, as one 2-D product.

    On a CPU the weight gradient of a 3-D input takes three times as long as that of a 2-D one.
    """
    init = nn.initializers.normal(config.initializer_range * scale)
    dense = nn.DenseGeneral(features, dtype=config.dtype, kernel_init=init, name=name)
    y = dense(x.reshape(-1, x.shape[-1]))  # [B * T, *features]
    return y.reshape(*x.shape[:-1], *y.shape[1:])


class Attention(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x, visible, cache, column):
        """x [B, T, D]; visible [B, T, S]; cache: None or (keys, values) [B, H, S, D/H] each."""
        width, heads = x.shape[-1], self.config.n_head
        # c_attn's kernel is held as [D, 3, H, D/H], so that heads can be sharded.
        qkv = linear(self.config, x, (3, heads, width // heads), "c_attn")  # [B, T, 3, H, D/H]
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [B, T, H, D/H]
        keys = "bshd"
        if cache is not None:  # heads first: the small products of decoding then copy nothing
            keys = "bhsd"
            k = jax.lax.dynamic_update_slice(cache[0], k.swapaxes(1, 2), (0, 0, column, 0))
            v = jax.lax.dynamic_update_slice(cache[1], v.swapaxes(1, 2), (0, 0, column, 0))
        weights = jnp.einsum(f"bthd,{keys}->bhts", q, k, preferred_element_type=jnp.float32)
        weights = weights * (width // heads) ** -0.5  # [B, H, T, S]
        weights = jax.nn.softmax(jnp.where(visible[:, None], weights, -1e9))
        y = jnp.einsum(f"bhts,{keys}->bthd", weights.astype(v.dtype), v)  # [B, T, H, D/H]
        residual_scale = (2 * self.config.n_layer) ** -0.5
        return linear(self.config, y.reshape(x.shape), width, "c_proj", residual_scale), (k, v)


class MLP(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x):
        config = self.config
        x = jax.nn.gelu(
            linear(config, x, config.n_inner or 4 * config.n_embd, "c_fc")
        )  # [B, T, 4D]
        return linear(config, x, config.n_embd, "c_proj", (2 * config.n_layer) ** -0.5)


class Block(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x, visible, cache, column):
        norm = functools.partial(nn.LayerNorm, self.config.layer_norm_epsilon, self.config.dtype)
        y, cache = Attention(self.config, name="attn")(norm(name="ln_1")(x), visible, cache, column)
        x = x + y
        return x + MLP(self.config, name="mlp")(norm(name="ln_2")(x)), cache


def embedding(config, size, name):
    """A table of `size` vectors of the model's width, inside a compact module."""
    init = nn.initializers.normal(config.initializer_range)
    return nn.Embed(size, config.n_embd, dtype=config.dtype, embedding_init=init, name=name)


def trunk(config, tokens, mask, positions=None, cache=None, column=0):
    """Embeddings, blocks and the last norm: (hidden states [B, T, D], new cache, wte).

    Called inside a compact method: its submodules stand in the caller's flat tree, under Hugging
    Face's names.
    """
    if positions is None:  # left padding must not count: GPT-2's positions are absolute
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)  # [B, S]
        positions = jax.lax.dynamic_slice_in_dim(positions, column, tokens.shape[1], axis=1)
    queries = column + jnp.arange(tokens.shape[1])
    causal = queries[:, None] >= jnp.arange(mask.shape[1])  # [T, S]
    visible = causal & (mask[:, None, :] > 0)  # [B, T, S]

    wte = embedding(config, config.vocab_size, "wte")
    x = wte(tokens) + embedding(config, config.n_positions, "wpe")(positions)  # [B, T, D]
    block = nn.remat(Block) if config.remat else Block
    new_cache = []
    for i in range(config.n_layer):
        layer_cache = None if cache is None else cache[i]
        x, layer_cache = block(config, name=f"h.{i}")(x, visible, layer_cache, column)
        new_cache.append(layer_cache)
    return nn.LayerNorm(config.layer_norm_epsilon, config.dtype, name="ln_f")(x), new_cache, wte


class GPT2(nn.Module):
    """GPT-2 with its language-model head, which is wte itself unless the config unties it."""

    config: GPT2Config

    @nn.compact
    def __call__(self, tokens, mask, positions=None, cache=None, column=0, logits_from=0):
        """tokens, mask (1 = real token) [B, T] -> float32 logits [B, T - logits_from, V].

        positions [B, T]: cumsum(mask) - 1 unless given. With a cache of S columns, `tokens` stand
        at its columns column … column + T - 1, mask is [B, S], and (logits, new cache) comes back.
        logits_from leaves out the head, the largest product of all, where nobody reads it.
        """
        x, new_cache, wte = trunk(self.config, tokens, mask, positions, cache, column)
        tied = self.config.tie_word_embeddings
        head = wte if tied else embedding(self.config, self.config.vocab_size, "lm_head")
        x, table = x[:, logits_from:], head.embedding.astype(x.dtype)  # [B, T', D], [V, D]
        logits = jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)
        return logits if cache is None else (logits, new_cache)


class RewardModel(nn.Module):
    """GPT-2's trunk with one number a position: a reward model, or a critic."""

    config: GPT2Config

    @nn.compact
    def __call__(self, tokens, mask):
        """tokens, mask [B, T] -> float32 scores [B, T]."""
        x, _, _ = trunk(self.config, tokens, mask)
        init = nn.initializers.normal((self.config.n_embd + 1) ** -0.5)  # scores of about unit size
        return nn.Dense(1, use_bias=False, kernel_init=init, name="score")(x)[..., 0]


def sequence_scores(scores, mask):
    """The score at the last real token of each row: [B, T], [B, T] -> [B]."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnums=1)
def score_sequences(params, config, tokens, mask):
    """The learned reward of whole sequences: [B, T], [B, T] -> [B]."""
    return sequence_scores(RewardModel(config).apply({"params": params}, tokens, mask), mask)


# -------------------------------------------------------------------------------------------- mesh

BATCH = Spec(("data", "fsdp"))  # how rows are split
# How the axes of a weight, and of its moments, are split: by the first pattern in its name.
RULES = {
    "wte|lm_head": Spec("tensor", "fsdp"),  # [V, D]
    "wpe": Spec(None, "fsdp"),  # [N, D]
    "c_attn.*kernel": Spec("fsdp", None, "tensor"),  # [D, 3, H, D/H]: a head keeps its q, k and v
    "c_attn.*bias": Spec(None, "tensor"),  # [3, H, D/H]
    "c_fc.*kernel": Spec("fsdp", "tensor"),  # [D, 4D]
    "c_fc.*bias": Spec("tensor"),  # [4D]
    "c_proj.*kernel": Spec("tensor", "fsdp"),  # [D, D] after attention, [4D, D] in the MLP
}


def join_processes(coordinator, num_processes, process_id, patience=60):
    """Makes this process one of many, before it touches a device; when one dies, JAX ends all.

    Fails where nothing answers at the coordinator for `patience` seconds, or its port is taken:
    jax.distributed.initialize would abort, past all catching.
    """
    host, _, port = coordinator.rpartition(":")
    if coordinator != "auto" and not (host and port.isdecimal() and int(port) < 2**16):
        fail(f"--coordinator {coordinator} is neither host:port nor auto")
    deadline = time.monotonic() + patience
    while host:  # process 0 is the coordinator
        try:
            if process_id:
                socket.create_connection((host, port), timeout=5).close()
            elif process_id == 0:
                socket.create_server(("", int(port))).close()
            break
        except OSError as error:
            if not process_id:
                fail(f"process 0 cannot listen at {coordinator}: {error}")
            if time.monotonic() > deadline:
                fail(f"no coordinator answers at {coordinator}, where process 0 should be: {error}")
            time.sleep(1)
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    address = (None if coordinator == "auto" else coordinator, num_processes, process_id)
    limits = {"heartbeat_timeout_seconds": 20, "shutdown_timeout_seconds": 20}
    try:
        jax.distributed.initialize(*address, initialization_timeout=patience, **limits)
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
    """The NamedSharding of each array in a tree with GPT-2's names: RULES, `without` one axis.

    even: an axis that does not divide (GPT-2 has 50 257 tokens) stays whole, as jit's arguments and
    results must be; inside of it, XLA fills up the last part.
    """

    def sharding(leaf, x):
        name = jax.tree_util.keystr(leaf)
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


def gather_weights(params, mesh):
    """The weights as a pass uses them, inside jit: as they lie, which is how their gradient comes
    back; then whole along fsdp; then the vocabulary split even where that leaves unequal parts."""
    for changes in ({}, {"without": "fsdp"}, {"without": "fsdp", "even": False}):
        params = jax.lax.with_sharding_constraint(params, shardings(params, mesh, **changes))
    return params


def call_reward_in_parts(function, rows, completions):
    """call_reward, each process for its share of the rows; every process gets all scores [B]."""
    i, n, scores = jax.process_index(), jax.process_count(), np.zeros((1, len(rows)), np.float32)
    own = slice(len(rows) * i // n, len(rows) * (i + 1) // n)
    if rows[own]:
        scores[0, own] = call_reward(function, rows[own], completions[own])
    return process_allgather(scores, tiled=True).sum(axis=0)


# --------------------------------------------------------------------- checkpoints and run folder


def hf_name_and_shape(leaf, shape):
    """("h.0", "attn", "c_attn", "kernel"), (D, 3, H, D/H) -> "h.0.attn.c_attn.weight", (D, 3D).

    Only c_attn, and score ([D, 1] here, [1, D] there), have another shape than in the file.
    """
    name = ".".join([*leaf[:-1], "bias" if leaf[-1] == "bias" else "weight"])
    if "c_attn" in leaf:
        shape = (*shape[:-3], int(np.prod(shape[-3:])))
    return name, shape[::-1] if "score" in leaf else shape


def load_config(folder):
    """The GPT2Config in a model folder. Fails on what this GPT-2 does not implement."""
    path = find_model(folder) / "config.json"
    if not path.exists():
        fail(f"{folder} is not a model folder: it has no config.json")
    file = json.loads(path.read_text("utf-8"))
    implemented = {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    }
    for key, value in implemented.items():
        if file.get(key, None if key == "model_type" else value) != value:
            fail(f"{path}: {key} is {file.get(key)!r}, and only {value!r} is implemented")
    names = {field.name for field in dataclasses.fields(GPT2Config)} - {"dtype", "remat"}
    return GPT2Config(**{name: file[name] for name in names & file.keys()})


def load_model(folder):
    """(config, params) of a Hugging Face folder or hub name, in float32; the head is the file's.

    Fails where the folder is no GPT-2, or a tensor is missing or has the wrong shape.
    """
    folder = find_model(folder)
    config, path = load_config(folder), folder / "model.safetensors"
    if not path.exists():
        convert = f"AutoModel.from_pretrained('{folder}').save_pretrained('{folder}')"
        convert = f'python -c "from transformers import AutoModel; {convert}"'
        fail(f"{folder} has no model.safetensors; to convert what it has: {convert}")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    one = jnp.zeros((1, 1), jnp.int32)
    leaves = flatten_dict(jax.eval_shape(GPT2(config).init, jax.random.key(0), one, one)["params"])
    if "score.weight" in tensors:  # a reward model has a score in place of the language-model head
        leaves.pop(("lm_head", "embedding"), None)
        leaves["score", "kernel"] = jnp.zeros((config.n_embd, 1))
    for leaf, like in leaves.items():
        name, shape = hf_name_and_shape(leaf, like.shape)
        if name not in tensors or tensors[name].shape != shape:
            found = f"shape {tensors[name].shape}" if name in tensors else "no such tensor"
            fail(f"{path}: {name} should have shape {shape}, but there is {found}")
        leaves[leaf] = tensors[name].astype(jnp.float32).reshape(like.shape)
    return config, unflatten_dict(leaves)


def write_file(path, write):
    """Calls write(temporary path), then puts the file in place: whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_model(folder, config, params, tokenizer_folder):
    """Writes a Hugging Face folder: config, float32 weights, and a copy of the tokenizer's files.

    A tree with a `score` becomes a GPT2ForSequenceClassification with one label.
    """
    folder = Path(folder)
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    for pattern in ("*token*.json", "vocab.json", "merges.txt"):
        for file in find_model(tokenizer_folder).glob(pattern):
            shutil.copyfile(file, building / file.name)
    is_reward_model = "score" in params
    file = dataclasses.asdict(config) | {
        "model_type": "gpt2",
        "architectures": [
            "GPT2ForSequenceClassification" if is_reward_model else "GPT2LMHeadModel"
        ],
        "bos_token_id": config.eos_token_id,
        "dtype": "float32",
        **dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0),
    }
    if is_reward_model:  # otherwise transformers assumes two labels
        file |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    tensors = {}
    for leaf, x in flatten_dict(params).items():
        name, shape = hf_name_and_shape(leaf, x.shape)
        prefix = "" if leaf[0] in ("lm_head", "score") else "transformer."
        tensors[prefix + name] = jnp.asarray(x, jnp.float32).reshape(shape)
    write_file(building / "config.json", lambda path: path.write_text(json.dumps(file, indent=2)))
    header = {"format": "pt"}  # transformers refuses a file that names no framework
    write_file(building / "model.safetensors", lambda path: save_file(tensors, path, header))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(building, folder)


class RunFolder:
    """args.json, metrics.jsonl, TensorBoard events, samples.jsonl, checkpoint/, model/.

    A run is finished when model/ is there. What is logged at a step is flushed before that step's
    checkpoint; a resumed run cuts the logs back to the checkpoint and does the rest again.
    """

    def __init__(self, args):
        """Fails where the folder must not be used; ends the script where its run is finished."""
        self.path, self.args = Path(args.run_dir), json.loads(json.dumps(vars(args)))
        resume, self.overwrite = self.args.pop("resume"), self.args.pop("overwrite")
        for name in ("data", "fsdp", "tensor", "coordinator", "num_processes", "process_id"):
            self.args.pop(name)  # a run may go on on other devices
        for name, value in self.args.items():  # sizes, counts and intervals
            if type(value) is int and value < 1 and name not in ("seed", "warmup_steps"):
                fail(f"--{name.replace('_', '-')} must be at least 1")
        signal.signal(signal.SIGINT, self.interrupt)
        if not (self.path / "args.json").exists():
            if self.path.exists() and any(self.path.iterdir()):
                fail(f"{self.path} is not empty and not a run: pass another --run-dir")
        elif self.overwrite:
            inputs = [v for k, v in self.args.items() if k != "run_dir"]
            for value in inputs + [x for v in inputs if isinstance(v, list) for x in v]:
                place = Path(str(value).split(":")[0]).resolve()
                if self.path.resolve() in [place, *place.parents]:
                    fail(f"--overwrite would remove {value}, from which this run reads")
        elif not resume:
            ways = "--resume to go on with it, --overwrite to replace it, or another --run-dir"
            fail(f"{self.path} holds a run: pass {ways}")
        else:
            before = json.loads((self.path / "args.json").read_text("utf-8"))
            if changed := [k for k in before | self.args if before.get(k) != self.args.get(k)]:
                fail(f"{self.path} was begun with other values of {', '.join(changed)}")
            if (self.path / "model").exists():
                print(f"{self.path} is finished: its model is {self.path / 'model'}")
                raise SystemExit(0)
        self.checkpoints = self.path.resolve() / "checkpoint"
        sync_global_devices("every process has seen the folder as it was")
        if jax.process_index() > 0:  # the logs are process 0's; these vanish
            self.logs = tempfile.TemporaryDirectory()
            self.path = Path(self.logs.name)

    def start(self, state, total_steps):
        """(state, step) of the checkpoint, or (state, 0) without one; opens the logs there."""
        if self.overwrite and (self.path / "args.json").exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.args, indent=2)
        write_file(self.path / "args.json", lambda path: path.write_text(text, "utf-8"))
        options = {"max_to_keep": 1, "cleanup_tmp_directories": True}
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, **options)
        self.manager = ocp.CheckpointManager(self.checkpoints, options=options)  # waits for all
        if not self.checkpoints.with_name("args.json").exists():
            fail(f"{self.checkpoints.parent} is not on storage that all processes see")
        if step := self.checkpoint_step():
            state = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = self.manager.restore(step, args=ocp.args.StandardRestore(state))
        self.files = {}
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            lines = path.read_text("utf-8").splitlines(True) if step and path.exists() else []
            kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
            write_file(path, lambda path, kept=kept: path.write_text("".join(kept), "utf-8"))
            self.files[name] = path.open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(self.path), purge_step=step + 1 if step else 0)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), "{task.fields[shown]}")
        self.bar = Progress(str(self.path), *columns)
        self.task = self.bar.add_task("", total=total_steps, completed=step, shown="")
        self.bar.start()
        self.total_steps, self.samples = total_steps, []
        return state, step

    def log(self, step, metrics, *shown):
        """One line in metrics.jsonl and in TensorBoard; the metrics `shown` go to the screen."""
        metrics = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        row = {"step": step, **metrics, **dict.fromkeys(bad)}  # JSON has null, but no NaN
        self.append("metrics.jsonl", row)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        text = "  ".join(f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
        self.bar.update(self.task, completed=step, shown=text)
        if not self.bar.console.is_terminal:
            print(f"{self.path} step {step}  {text}", flush=True)
        if bad:
            self.bar.stop()
            cause = "usually --learning-rate is too high or --warmup-steps too low"
            fail(f"{bad[0]} is not finite at step {step}; {cause}")

    def log_samples(self, step, rows):
        """Appends dicts (prompt, completion, scores) to samples.jsonl; `finish` shows the last."""
        self.samples = rows
        for row in rows:
            self.append("samples.jsonl", {"step": step, **row})

    def append(self, name, row):
        self.files[name].write(json.dumps(row) + "\n")
        self.files[name].flush()

    def due(self, step, *every):
        """Whether one of these intervals ends at this step; the last step ends all of them."""
        return step == self.total_steps or any(step % interval == 0 for interval in every)

    def save(self, step, state):
        """Writes the train state, whole or not at all, to a folder named after the step."""
        self.manager.save(step, args=ocp.args.StandardSave(state))

    def checkpoint_step(self):
        """The step of the last checkpoint, 0 without one."""
        names = [path.name for path in self.checkpoints.glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def finish(self):
        """Shows the last samples, and gives the terminal back."""
        if hasattr(self, "bar"):
            self.bar.stop()
            self.writer.close()
            for row in self.samples[:4]:
                print("  ".join(str(value) for value in row.values()))

    def interrupt(self, *_):
        """Ctrl-C."""
        self.finish()
        step = self.checkpoint_step()
        print(f"\nstopped; the last checkpoint is of step {step}, and --resume goes on from there")
        raise SystemExit(130)


# -------------------------------------------------------------------------------------- generation


@functools.partial(jax.jit, static_argnums=(1, 5, 6, 7, 8, 9, 10))
def generate(
    params,
    config,
    tokens,
    mask,
    key,
    max_new_tokens,
    temperature,
    eos_id,
    pad_id=0,
    num_samples=1,
    filter_logits=None,
):
    """Samples from the policy with a cache of keys and values, until every row has ended.

    tokens, mask: [B, P], padded on the left. Returns tokens, mask [N, P + R] and logprobs [N, R]
    with N = B * num_samples, the samples of one prompt side by side, R = max_new_tokens; after a
    row's EOS they are pad_id, 0 and 0. logprobs are those of log_softmax(logits / temperature)
    over the whole vocabulary, before filter_logits ([N, V] -> [N, V]) takes anything away.
    At temperature 0 the likeliest token is taken, and logprobs are those at temperature 1.
    """
    (B, P), R, N = tokens.shape, max_new_tokens, len(tokens) * num_samples
    if config.n_positions < P + R:
        raise ValueError(f"{P} + {R} tokens do not fit into {config.n_positions} positions")
    model = functools.partial(GPT2(config).apply, {"params": params})
    cache_shape = (B, config.n_head, P + R, config.n_embd // config.n_head)
    cache = [(jnp.zeros(cache_shape, config.dtype),) * 2 for _ in range(config.n_layer)]
    mask = jnp.pad(mask, ((0, 0), (0, R)))  # [B, P + R]
    logits, cache = model(tokens, mask, cache=cache, logits_from=P - 1)
    tokens = jnp.pad(tokens, ((0, 0), (0, R)), constant_values=pad_id)  # [B, P + R]
    # Each prompt is read once; from here on every sample is a row of its own.
    prefilled = (tokens, mask, logits, cache)
    prefilled = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), prefilled)

    def not_all_ended(carry):
        step, ended = carry[:2]
        return (step < R) & ~jnp.all(ended)

    def one_token(carry):
        step, ended, logprobs, tokens, mask, logits, cache = carry
        logits = logits[:, 0] / (temperature or 1.0)  # [N, V]
        filtered = filter_logits(logits) if filter_logits else logits
        if temperature == 0:
            token = jnp.argmax(filtered, axis=-1)  # [N]
        else:  # by the inverse of the distribution function: one random number a row, not V
            cumulative = jnp.cumsum(jax.nn.softmax(filtered), axis=-1)  # [N, V]
            cumulative = jnp.where(filtered > -jnp.inf, cumulative, 0.0)  # rounding must not revive
            uniform = jax.random.uniform(jax.random.fold_in(key, step), (N, 1))
            threshold = uniform * cumulative.max(axis=-1, keepdims=True)
            token = jnp.argmax(cumulative > threshold, axis=-1)  # [N], the first that is above
        token = jnp.where(ended, pad_id, token)
        logprobs = logprobs.at[:, step].set(jnp.where(ended, 0.0, token_logprobs(logits, token)))
        tokens = tokens.at[:, P + step].set(token)
        mask = mask.at[:, P + step].set(jnp.where(ended, 0, 1))
        logits, cache = model(token[:, None], mask, cache=cache, column=P + step)
        return step + 1, ended | (token == eos_id), logprobs, tokens, mask, logits, cache

    carry = (0, jnp.zeros(N, bool), jnp.zeros((N, R)), *prefilled)
    _, _, logprobs, tokens, mask, _, _ = jax.lax.while_loop(not_all_ended, one_token, carry)
    return tokens, mask, logprobs


# ------------------------------------------------------------------------------------------ losses


def token_logprobs(logits, tokens):
    """log_softmax(logits) at `tokens`: [..., V], [...] -> [...], in float32 at least.

    As a logit minus a logsumexp, so that no [..., V] log-softmax is kept for the backward pass.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return -optax.softmax_cross_entropy_with_integer_labels(logits, tokens)


def masked_mean(x, mask):
    """Mean of x over the places where mask is 1; 0 where there are none."""
    return jnp.sum(x * mask) / jnp.maximum(mask.sum(), 1)


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
    leave_one_out_advantage's.
    """
    assert group_size > 1 and rewards.ndim == 1, (rewards.shape, group_size)
    groups = rewards.reshape(-1, group_size)  # [B / G, G]
    groups = groups - groups[:, :1]  # equal rewards then have advantages of exactly 0
    advantages = groups - groups.mean(axis=1, keepdims=True)
    if scale:
        advantages = advantages / (groups.std(axis=1, ddof=1, keepdims=True) + eps)
    return advantages.reshape(-1)


def leave_one_out_advantage(rewards, group_size):
    """RLOO (Ahmadian et al. 2024): r less the mean of the others of its group; [B].

    The baseline knows nothing of r itself, so the gradient is not biased, not even in scale.
    """
    return (
        group_relative_advantage(rewards, group_size, scale=False) * group_size / (group_size - 1)
    )


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
):
    """Group-relative policy optimization (Shao et al. 2024, eq. 3), as a loss.

    logprobs, old_logprobs, ref_logprobs, mask [B, R]; advantages [B]. For each token
    max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)) + kl_coef * k3, with
    k3 = exp(d) - 1 - d, d = log pi_ref - log pi. clip_high > clip_low is DAPO's "clip-higher".

    ratio_level "token": pi / pi_old of each token; "sequence": their geometric mean over the
    sequence (Zheng et al. 2025, "GSPO", eq. 7).
    aggregation "sequence": the mean over sequences of their tokens' mean (GRPO); "token": the mean
    over all tokens (Yu et al. 2025, "DAPO"); "constant": the sum over B * max_length (Dr. GRPO).
    """
    assert logprobs.shape == old_logprobs.shape == ref_logprobs.shape == mask.shape
    assert advantages.shape == mask.shape[:1], (advantages.shape, mask.shape)
    lengths = jnp.maximum(mask.sum(axis=1), 1)  # [B]
    log_ratio = (logprobs - old_logprobs) * mask
    if ratio_level == "sequence":
        log_ratio = log_ratio.sum(axis=1, keepdims=True) / lengths[:, None]  # [B, 1]
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    advantages = advantages[:, None]  # [B, 1]
    policy_losses = jnp.maximum(-advantages * ratio, -advantages * clipped)
    difference = (ref_logprobs - logprobs) * mask
    k3 = jnp.expm1(difference) - difference  # exp(d) - 1 would round away what is left near 0
    losses = (policy_losses + kl_coef * k3) * mask  # [B, R]
    if aggregation == "sequence":
        loss = jnp.mean(losses.sum(axis=1) / lengths)
    elif aggregation == "token":
        loss = masked_mean(losses, mask)
    else:
        loss = losses.sum() / (len(mask) * max_length)
    is_low = (ratio < 1 - clip_low) & (advantages < 0)  # [B, R], or [B, 1]
    is_high = (ratio > 1 + clip_high) & (advantages > 0)
    return loss, {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": 0.5 * masked_mean(log_ratio**2, mask),  # k2, as in TRL, but masked
        "policy/clipfrac_avg": masked_mean(is_low | is_high, mask),
        "clip_ratio/low_mean": masked_mean(is_low, mask),
        "clip_ratio/high_mean": masked_mean(is_high, mask),
        "val/ratio": masked_mean(ratio, mask),
        "kl": masked_mean(k3, mask),
    }


# ------------------------------------------------------------------------------------------ update


class TrainState(NamedTuple):
    """What one step hands to the next, and all that a checkpoint holds."""

    params: dict
    opt_state: optax.OptState
    ref_params: dict | None  # of a reference that moves


def learning_rate_at(step, peak, warmup_steps, total_steps):
    """Linear from 0 to `peak` in warmup_steps, then linear to 0 at total_steps."""
    rising = (step + 1) / max(warmup_steps, 1)
    falling = (total_steps - step) / max(total_steps - warmup_steps, 1)
    return peak * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)


def make_optimizer(args, total_steps):
    """(AdamW after clipping by the global norm, its schedule); biases and norms do not decay."""
    schedule = functools.partial(
        learning_rate_at,
        peak=args.learning_rate,
        warmup_steps=args.warmup_steps,
        total_steps=total_steps,
    )
    matrices = functools.partial(
        jax.tree_util.tree_map_with_path, lambda leaf, _: leaf[-1].key in ("kernel", "embedding")
    )
    adamw = optax.adamw(schedule, weight_decay=args.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw), schedule


def make_state(params, optimizer, ref_moves):
    """A state that shares no buffer with `params`: train_step gives its buffers away."""
    ref_params = jax.tree.map(jnp.copy, params) if ref_moves else None
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, jax.jit(optimizer.init)(params), ref_params)


def accumulate_gradients(loss_fn, params, batch, counts, micro_batch_size, metric_counts=None):
    """((loss, metrics), gradient) of a whole batch from micro-batches, in one scan.

    loss_fn(params, micro_batch) -> (loss, metrics), each a mean over tokens (or sequences); counts
    [B] says how many of them each row has, metric_counts the same of the metrics, where these are
    means over something else. Weighting a micro-batch by its share gives the whole batch's mean; a
    mean of means would favour the short rows.
    """

    def split(x):  # [B, …] -> [M, B / M, …]
        return x.reshape(-1, micro_batch_size, *x.shape[1:])

    def shares(counts):  # [B] -> [M]
        return split(counts).sum(axis=1) / jnp.maximum(counts.sum(), 1)

    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def add(total, part):
        micro_batch, share, metric_share = part
        (loss, metrics), grads = value_and_grad(params, micro_batch)
        loss, grads = jax.tree.map(lambda x: share * x, (loss, grads))
        metrics = jax.tree.map(lambda x: metric_share * x, metrics)
        return jax.tree.map(jnp.add, total, ((loss, metrics), grads)), None

    micro_batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(value_and_grad, params, first))
    metric_shares = shares(counts if metric_counts is None else metric_counts)
    return jax.lax.scan(add, zeros, (micro_batches, shares(counts), metric_shares))[0]


@functools.partial(jax.jit, static_argnums=(1, 4, 5))
def policy_logprobs(params, config, tokens, mask, prompt_length, temperature):
    """Log-probabilities of the response tokens, entropies of what they were drawn from: [B, R].

    tokens, mask [B, P + R]. The logits that predict response token t stand at column P - 1 + t.
    """
    model = GPT2(config)
    logits = model.apply({"params": params}, tokens, mask, logits_from=prompt_length - 1)[:, :-1]
    logits = logits / temperature  # [B, R, V]
    fixed = jax.lax.stop_gradient(logits)
    entropy = jax.nn.logsumexp(fixed, axis=-1) - jnp.sum(jax.nn.softmax(fixed) * fixed, axis=-1)
    return token_logprobs(logits, tokens[:, prompt_length:]), entropy


def sample(params, ref_params, config, tokens, mask, key, sampling, mesh):
    """Completions with the policy's and the reference's log-probabilities of them.

    tokens, mask [B, P], padded on the left; sampling: what generate takes after the key. Returns
    tokens, mask [N, P + R], logprobs, ref_logprobs [N, R].
    """

    def whole_rows(logits):  # [N, V]: drawing sums a row up from end to end; takes nothing away
        return jax.lax.with_sharding_constraint(logits, NamedSharding(mesh, BATCH))

    params, ref_params = (gather_weights(x, mesh) for x in (params, ref_params))
    prompt_length, temperature = tokens.shape[1], sampling[1]
    tokens, mask, logprobs = generate(params, config, tokens, mask, key, *sampling, whole_rows)
    ref_logprobs, _ = policy_logprobs(ref_params, config, tokens, mask, prompt_length, temperature)
    return tokens, mask, logprobs, ref_logprobs


@functools.partial(jax.jit, static_argnums=6)
def make_experience(tokens, mask, logprobs, ref_logprobs, scores, ended, args):
    """What train_step learns from: (batch, metrics) of a rollout and its scores, group by group.

    tokens, mask [B, P + R]; logprobs, ref_logprobs [B, R], those of sampling; scores, ended [B].
    """
    prompt_length, group_size = tokens.shape[1] - logprobs.shape[1], args.num_generations
    response_mask = mask[:, prompt_length:].astype(jnp.float32)  # [B, R]
    # 1. The KL penalty of the whole sequence: part of the reward, so taken off before the baseline.
    kl = (compute_kl_divergence(logprobs, ref_logprobs) * response_mask).sum(axis=1)  # [B]
    rewards = scores - args.kl_coef * kl if args.kl_in == "reward" else scores
    # 2. Advantages within each group.
    if args.advantage == "leave-one-out":
        advantages = leave_one_out_advantage(rewards, group_size)
    else:
        advantages = group_relative_advantage(rewards, group_size, args.advantage == "group-std")
    groups = scores.reshape(-1, group_size)  # [B / G, G]
    if args.mask_truncated_completions:
        response_mask = response_mask * ended[:, None]
    batch = {
        "tokens": tokens,
        "mask": mask,
        "response_mask": response_mask,
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "advantages": advantages,
    }
    return batch, {
        "objective/non_score_reward": -args.kl_coef * kl.mean(),
        "objective/rlhf_reward": (scores - args.kl_coef * kl).mean(),
        "reward_std": groups.std(axis=1, ddof=1).mean(),
        # From such a group only the KL is learned. (Its std may differ from 0 by rounding.)
        "frac_reward_zero_std": (groups.max(axis=1) == groups.min(axis=1)).mean(),
    }


def train_step(state, batch, key, config, optimizer, args, mesh):
    """All updates of one rollout, epochs * num_minibatches, in one scan: (state, metrics)."""
    size, response_length = batch["logprobs"].shape
    prompt_length = batch["tokens"].shape[1] - response_length
    clip_high = args.clip_eps if args.clip_eps_high is None else args.clip_eps_high

    def loss_fn(params, batch):
        params = gather_weights(params, mesh)
        batch = jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH))
        logprobs, entropy = policy_logprobs(
            params, config, batch["tokens"], batch["mask"], prompt_length, args.temperature
        )
        loss, metrics = grpo_loss(
            logprobs,
            batch["logprobs"],
            batch["ref_logprobs"],
            batch["advantages"],
            batch["response_mask"],
            args.clip_eps,
            clip_high,
            args.kl_coef if args.kl_in == "loss" else 0.0,
            args.aggregation,
            args.ratio_level,
            response_length,
        )
        return loss, metrics | {"policy/entropy_avg": masked_mean(entropy, batch["response_mask"])}

    def update(carry, rows):
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[rows], batch)
        tokens = minibatch["response_mask"].sum(axis=1)  # [B / num_minibatches]
        counts = tokens if args.aggregation == "token" else jnp.ones_like(tokens)
        (loss, metrics), grads = accumulate_gradients(
            loss_fn, params, minibatch, counts, args.micro_batch_size, metric_counts=tokens
        )
        metrics |= {"loss/policy_avg": loss, "grad_norm": optax.tree.norm(grads)}
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (metrics, tokens.sum())

    keys = jax.random.split(key, args.epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(keys)  # [epochs, B]
    order = order.reshape(args.epochs * args.num_minibatches, -1)
    carry = (state.params, state.opt_state)
    (params, opt_state), (metrics, weights) = jax.lax.scan(update, carry, order)
    weights = weights / jnp.maximum(weights.sum(), 1)  # all 0 where every completion is masked
    metrics = {name: jnp.sum(weights * x) for name, x in metrics.items()}
    return TrainState(params, opt_state, state.ref_params), metrics


def jit_on_mesh(mesh, state_shardings):
    """(sample, train_step), compiled for a mesh; a state gives its buffers to the next one."""
    by_rows, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, Spec())
    state, params = state_shardings, state_shardings.params

    def jit(function, static, given, returned, **options):
        shardings = {"in_shardings": given, "out_shardings": returned}
        return jax.jit(function, static_argnums=static, **shardings, **options)

    return (
        jit(sample, (2, 6, 7), (params, params, by_rows, by_rows, whole), by_rows),
        jit(train_step, (3, 4, 5, 6), (state, by_rows, whole), (state, whole), donate_argnums=0),
    )


# -------------------------------------------------------------------------------------------- main


def main(args):
    if not args.reward_model and not args.reward:
        args = dataclasses.replace(args, reward_model="runs/reward/model")
    if args.coordinator:
        join_processes(args.coordinator, args.num_processes, args.process_id)
    elif (args.num_processes, args.process_id) != (None, None):
        fail("--num-processes and --process-id say nothing without --coordinator")
    run = RunFolder(args)
    tokenizer = load_tokenizer(args.model)
    config, ref_params = load_model(args.model)
    if "score" in ref_params:
        fail(f"{args.model} is a reward model, not a language model")
    config = dataclasses.replace(config, remat=args.remat)
    eos_id = tokenizer.eot_token if config.eos_token_id is None else config.eos_token_id
    max_length = args.max_prompt_length + args.max_completion_length
    check_sizes(config, tokenizer, max_length)
    if args.temperature <= 0:
        fail("--temperature must be above 0: at 0 nothing is sampled, and nothing can be learned")
    functions = [load_function(name) for name in args.reward]
    weights = args.reward_weight or (1.0,) * len(functions)
    if len(weights) != len(functions):
        fail(f"{len(functions)} times --reward, but {len(weights)} times --reward-weight")
    embedded, gold = Path("data/reviews"), args.gold
    if gold is None and Path(args.dataset).resolve().parent == embedded.resolve():
        gold = "data/reviews.py:sentiment" if Path("data/reviews.py").is_file() else None
    gold = gold and load_function(gold)
    if args.reward_model:
        reward_config, reward_params = load_model(args.reward_model)
        if "score" not in reward_params:
            fail(f"{args.reward_model} is not a reward model: it has no score.weight")
        if load_tokenizer(args.reward_model)._mergeable_ranks != tokenizer._mergeable_ranks:
            fail(f"the tokenizers of {args.reward_model} and {args.model} differ")
        check_sizes(reward_config, tokenizer, max_length)

    def load_prompts(path):
        rows = read_jsonl(path, {"prompt"})
        return encode_prompts(rows, tokenizer, eos_id, args.max_prompt_length)

    rows, eval_rows = load_prompts(args.dataset), load_prompts(args.eval_dataset)[:256]
    if not 0 < args.ref_mixup_alpha <= 1:
        fail("--ref-mixup-alpha must be above 0 and at most 1")
    if args.num_generations < 2:
        fail("--num-generations must be at least 2: a group of one has nothing to compare with")
    if args.batch_size % args.num_generations:
        fail(
            f"--num-generations {args.num_generations} does not divide "
            f"--batch-size {args.batch_size}"
        )
    if args.batch_size % (args.num_minibatches * args.micro_batch_size):
        sizes = f"--num-minibatches {args.num_minibatches} * --micro-batch-size"
        fail(f"{sizes} {args.micro_batch_size} does not divide --batch-size {args.batch_size}")
    prompts_per_step = args.batch_size // args.num_generations
    if len(rows) < prompts_per_step:
        fail(
            f"{len(rows)} rows are too few for the {prompts_per_step} of a step: lower --batch-size"
        )
    mesh = make_mesh(args.data, args.fsdp, args.tensor)
    by_rows, parts = NamedSharding(mesh, BATCH), mesh.shape["data"] * mesh.shape["fsdp"]
    for count, size, what in (
        (prompts_per_step, parts, "prompts of a step (--batch-size / --num-generations)"),
        (args.micro_batch_size, parts, "sequences of --micro-batch-size"),
        (config.n_head, mesh.shape["tensor"], "heads of the model"),
    ):
        if count % size:
            fail(f"a mesh of {dict(mesh.shape)} cannot split the {count} {what} into {size}")
    batches = prompt_batches(len(rows), prompts_per_step, args.steps, args.seed)
    updates_per_step = args.epochs * args.num_minibatches
    optimizer, schedule = make_optimizer(args, args.steps * updates_per_step)
    ref_params = jax.tree.map(put, ref_params, shardings(ref_params, mesh))
    if args.reward_model:  # whole along fsdp: it is only read
        reward_params = jax.tree.map(put, reward_params, shardings(reward_params, mesh, "fsdp"))
    ref_moves = args.ref_sync_steps is not None
    new_state = functools.partial(make_state, optimizer=optimizer, ref_moves=ref_moves)
    state_shardings = shardings(jax.eval_shape(new_state, ref_params), mesh)
    new_state = jax.jit(new_state, out_shardings=state_shardings)
    state, start = run.start(new_state(ref_params), args.steps)
    sample, train_step = jit_on_mesh(mesh, state_shardings)  # from here on: these

    # Every process runs all that follows: where one left out a jitted call, the others would hang.
    def rollout(prompts, num_samples, stream, step):
        """(what make_experience takes, metrics, samples) of the present policy."""
        rows, ids = zip(*prompts)
        rows = [row for row in rows for _ in range(num_samples)]  # group by group
        prompt_length, key = args.max_prompt_length, stream_key(args.seed, stream, step)
        ids = (ids * parts)[: -(-len(ids) // parts) * parts]  # again from the first, to be split
        tokens, mask = (put(x, by_rows) for x in pad_rows(ids, prompt_length, left=True))
        sampling = (args.max_completion_length, args.temperature, eos_id, 0, num_samples)
        reference = ref_params if state.ref_params is None else state.ref_params
        sampled = sample(state.params, reference, config, tokens, mask, key, sampling, mesh)
        copies = (x[: len(rows)] for x in process_allgather(sampled, tiled=True))
        tokens, mask, logprobs, ref_logprobs = copies
        completions = decode_responses(tokenizer, tokens, mask, prompt_length, eos_id)
        ended = np.any(np.asarray(tokens)[:, prompt_length:] == eos_id, axis=1)
        scores = -args.missing_eos_penalty * ~ended
        if args.reward_model:
            learned = score_sequences(reward_params, reward_config, *sampled[:2])
            scores = scores + process_allgather(learned, tiled=True)[: len(rows)]
        for function, weight in zip(functions, weights):
            scores = scores + weight * call_reward_in_parts(function, rows, completions)
        columns = {"prompt": [row["prompt"] for row in rows], "completion": completions}
        columns["score"] = scores.tolist()
        response_mask = mask[:, prompt_length:]
        kl = compute_kl_divergence(logprobs, ref_logprobs) * response_mask
        metrics = {
            "objective/kl": kl.sum(axis=1).mean(),  # nats a sequence
            "objective/entropy": -jnp.sum(logprobs * response_mask, axis=1).mean(),
            "reward": scores.mean(),
            "completions/mean_length": response_mask.sum(axis=1).mean(),
            "completions/clipped_ratio": 1 - ended.mean(),
        }
        if gold:
            golds = call_reward_in_parts(gold, rows, completions)
            metrics["gold/reward"], columns["gold"] = golds.mean(), golds.tolist()
        samples = [dict(zip(columns, values)) for values in zip(*columns.values())]
        return (tokens, mask, logprobs, ref_logprobs, scores, ended), metrics, samples

    def evaluate_and_sample(step):
        _, metrics, samples = rollout(eval_rows, 1, "eval", step)
        run.log_samples(step, samples[:8])
        return {f"eval/{name}": value for name, value in metrics.items()}

    if start == 0:
        run.log(0, evaluate_and_sample(0), "eval/reward")
    for step in range(start + 1, args.steps + 1):
        started = time.perf_counter()
        prompts = [rows[i] for i in batches[step - 1]]
        sampled, metrics, _ = rollout(prompts, args.num_generations, "rollout", step)
        batch, batch_metrics = make_experience(*sampled, args)
        batch = {name: put(x, by_rows) for name, x in batch.items()}
        key = stream_key(args.seed, "minibatches", step)
        state, update_metrics = train_step(state, batch, key, config, optimizer, args, mesh)
        metrics |= jax.device_get(batch_metrics | update_metrics)
        seconds = time.perf_counter() - started
        metrics["lr"] = schedule((step - 1) * updates_per_step)  # of the first update
        metrics["perf/tokens_per_second"] = batch["mask"].sum() / seconds
        if run.due(step, args.eval_every):
            metrics |= evaluate_and_sample(step)
        if run.due(step, args.log_every, args.eval_every, args.save_every):
            run.log(step, metrics, "reward", "objective/kl", "gold/reward")
        if args.ref_sync_steps is not None and step % args.ref_sync_steps == 0:
            moved = optax.incremental_update(state.params, state.ref_params, args.ref_mixup_alpha)
            state = state._replace(ref_params=moved)
        if run.due(step, args.save_every):
            run.save(step, state)
    run.finish()
    params = process_allgather(state.params, tiled=True)
    if jax.process_index() == 0:
        save_model(run.path / "model", config, params, args.model)
    sync_global_devices("the model is written")


if __name__ == "__main__":
    main(args)
