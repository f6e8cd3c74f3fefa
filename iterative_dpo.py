"""Iterative DPO: a language model samples pairs, has them labelled, learns from them, repeats.

Rafailov et al. 2023, "Direct preference optimization: your language model is secretly a reward
model". What maximises E[r] - beta * KL(pi || ref) is pi* = ref * exp(r / beta) / Z. So a policy
tells which reward it is best for: r = beta * log(pi / ref), up to a constant of the prompt. Put
into Bradley and Terry's model of labels, sigmoid(r1 - r2), this is trained to explain them.

What no pair shows is not trained, so here the pairs are the policy's own, anew in each round (Guo
et al. 2024, "Direct language model alignment from online AI feedback"). --pair sampled draws their
labels from sigmoid(r1 - r2), which leads to pi*. --pair best-worst takes the best and the worst of
a group (Dong et al. 2024, "RLHF workflow"): a stronger signal, with another, sharper optimum.

    python iterative_dpo.py             # runs/sft/model against runs/reward/model, embedded prompts
    python iterative_dpo.py --model gpt2 --dataset my_prompts.jsonl --reward my_rewards.py:function

With the defaults it takes about 85 seconds on two CPU cores, and the gold reward of its reviews
rises from 0.00 to 0.39 at a KL of 2.6 nats (seed 0).
Compare: `diff dpo.py iterative_dpo.py`.
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
    run_dir: str = "runs/iterative_dpo"  # where metrics, samples, checkpoint and model go
    resume: bool = False  # go on from the checkpoint in run_dir; a finished run stays as it is
    overwrite: bool = False  # replace the run in run_dir
    seed: int = 0  # of the order of the data and the samples
    rounds: int = 120  # rounds of sampling, labelling and training
    prompts_per_round: int = 128  # each gives one pair
    num_generations: int = 2  # completions to one prompt; more than 2 only with best-worst
    # the label is drawn from sigmoid(r1 - r2) of the scores, or the best stands against the worst
    pair: Literal["sampled", "best-worst"] = "sampled"
    # the reference in the loss: the start, or the policy as the round began
    reference: Literal["start", "previous"] = "start"
    reset_optimizer: bool = False  # begin moments and learning rate (warm-up!) anew in each round
    epochs: int = 1  # passes over the pairs
    batch_size: int = 64  # pairs in one optimizer step
    # pairs in one forward and backward pass; their gradients are accumulated
    micro_batch_size: int = 16
    learning_rate: float = 3e-4  # peak; it falls linearly to 0
    warmup_steps: int = 20  # steps in which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW's, on matrices
    max_grad_norm: float = 1.0  # the gradient is scaled down to this global norm
    # how close to the reference: the KL penalty's weight in the objective that DPO solves
    beta: float = 0.3
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"  # sigmoid is DPO's own
    label_smoothing: float = 0.0  # probability that a label is wrong (cDPO); for sigmoid
    # weight of the chosen answer's mean negative log-likelihood a token; DPO itself has 0
    nll_coef: float = 0.0
    missing_eos_penalty: float = 1.0  # taken off the score of a completion that does not end
    max_prompt_length: int = 16  # tokens; a longer prompt loses its beginning
    # tokens with EOS, of samples too; a row with a longer answer is dropped
    max_completion_length: int = 48
    remat: bool = False  # recompute activations in the backward pass: slower, less memory
    temperature: float = 1.0  # of sampling, and of the KL; the loss is at 1
    log_every: int = 10  # steps between lines in metrics.jsonl
    eval_every: int = 50  # steps between evaluations on the held-out data
    save_every: int = 1  # rounds between checkpoints


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
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiktoken
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from safetensors import safe_open
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


def encode_rows(rows, fields, tokenizer, eos_id, max_prompt_length, max_completion_length):
    """(the rows kept, their token ids [prompt, completion, …], one completion for each field).

    Prompt and completion are encoded apart, as in sampling; a completion gets its EOS; an empty
    prompt is one EOS. Too long a prompt loses its beginning; a row with too long a completion is
    dropped: without its EOS it would teach not to stop.
    """
    kept, encoded, shortened = [], [], 0
    for row in rows:
        prompt = tokenizer.encode_ordinary(row["prompt"]) or [eos_id]
        completions = [[*tokenizer.encode_ordinary(row[name]), eos_id] for name in fields]
        if max(map(len, completions), default=0) <= max_completion_length:
            shortened += len(prompt) > max_prompt_length
            encoded.append([prompt[-max_prompt_length:], *completions])
            kept.append(row)
    if rows and not kept:
        fail(f"no completion has at most --max-completion-length {max_completion_length} tokens")
    if shortened or len(kept) < len(rows):
        dropped = len(rows) - len(kept)
        print(f"{len(rows)} rows: {dropped} dropped as too long, {shortened} prompts shortened")
    return kept, encoded


def length_batches(lengths, batch_size, epochs, seed):
    """Row numbers [steps, batch_size] of all epochs; a batch has rows of like length, to pad less.

    The rows that fill no whole batch are left out, others in each epoch.
    """
    batches = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
        order = order[np.argsort(np.asarray(lengths)[order], kind="stable")]
        batches.append(rng.permutation(order.reshape(-1, batch_size)))
    return np.concatenate(batches)


def padded_width(longest, max_length):
    """`longest` rounded up to a quarter of max_length: four shapes at most to compile."""
    quarter = -(-max_length // 4)
    return -(-longest // quarter) * quarter


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


def check_batch_sizes(rows, batch_size, micro_batch_size):
    """Fails where no batch can be filled, or micro-batches do not divide it."""
    if rows < batch_size:
        fail(f"{rows} rows do not fill one batch of {batch_size}: lower --batch-size")
    if batch_size % micro_batch_size:
        fail(f"--micro-batch-size {micro_batch_size} does not divide --batch-size {batch_size}")


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
    """args.json, metrics.jsonl, TensorBoard events, samples.jsonl, checkpoint.safetensors, model/.

    A run is finished when model/ is there. What is logged at a step is flushed before that step's
    checkpoint; a resumed run cuts the logs back to the checkpoint and does the rest again.
    """

    def __init__(self, args):
        """Fails where the folder must not be used; ends the script where its run is finished."""
        self.path, self.args = Path(args.run_dir), json.loads(json.dumps(vars(args)))
        resume, self.overwrite = self.args.pop("resume"), self.args.pop("overwrite")
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

    def start(self, state, total_steps):
        """(state, step) of the checkpoint, or (state, 0) without one; opens the logs there."""
        if self.overwrite and (self.path / "args.json").exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.args, indent=2)
        write_file(self.path / "args.json", lambda path: path.write_text(text, "utf-8"))
        if step := self.checkpoint_step():
            saved = load_file(self.path / "checkpoint.safetensors")
            state = jax.tree_util.tree_map_with_path(
                lambda leaf, _: saved[jax.tree_util.keystr(leaf)], state
            )
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
        """Writes the train state, whole or not at all; the step stands in the file's header."""
        leaves = jax.tree_util.tree_flatten_with_path(state)[0]
        tensors = {jax.tree_util.keystr(leaf): jnp.asarray(value) for leaf, value in leaves}
        path, header = self.path / "checkpoint.safetensors", {"step": str(step)}
        write_file(path, lambda path: save_file(tensors, path, header))

    def checkpoint_step(self):
        """The step of the last checkpoint, 0 without one."""
        path = self.path / "checkpoint.safetensors"
        return int(safe_open(path, "flax").metadata()["step"]) if path.exists() else 0

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


def compute_kl_divergence(logprobs, ref_logprobs):
    """k1 = log pi - log pi_ref of each sampled token [B, R]; its mean under pi is KL(pi || pi_ref).

    For a penalty inside the reward, which is not differentiated, k1 is right: the policy gradient
    of -k1 is that of -KL, and k3 = exp(-k1) - 1 + k1 would be biased there. In a loss it is useless
    (the mean of its gradient is 0); there k3 is common, whose gradient is that of the other
    direction, KL(pi_ref || pi). Schulman 2020, "Approximating KL divergence".
    """
    assert logprobs.shape == ref_logprobs.shape, (logprobs.shape, ref_logprobs.shape)
    return logprobs - ref_logprobs


def response_logprobs(logprobs, mask):
    """log pi(response | prompt): the sum of its tokens' log-probabilities, [B, T], [B, T] -> [B].

    A sum, not a mean, is what Rafailov et al. 2023 derive; a mean would be another loss.
    """
    assert logprobs.shape == mask.shape and mask.ndim == 2, (logprobs.shape, mask.shape)
    return jnp.sum(logprobs * mask, axis=1)


def implicit_rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """(chosen, rejected, metrics): rewards beta * log(pi / pi_ref) of both answers, all [B].

    Rafailov et al. 2023, eq. 5, without beta * log Z, which is one for both.
    """
    shapes = [x.shape for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
    assert shapes == [policy_chosen.shape[:1]] * 4, shapes
    chosen = beta * (policy_chosen - ref_chosen)
    rejected = beta * (policy_rejected - ref_rejected)
    # Only the margin is trained: the chosen answer's reward and log-probability may well fall, as
    # long as those of the rejected one fall further. What a rejected answer loses need not go to
    # the chosen one, it can go to texts that no pair shows. --nll-coef holds against that.
    metrics = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "rewards/margins": (chosen - rejected).mean(),
    }
    return chosen, rejected, metrics


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """Direct preference optimization (Rafailov et al. 2023, eq. 7); log-probabilities [B] each.

    -mean of (1 - eps) * log sigmoid(margin) + eps * log sigmoid(-margin), the margin being that of
    the implicit rewards. eps = label_smoothing, a number or [B], is the probability that the label
    is wrong (Mitchell 2023, "A note on DPO with noisy preferences").
    """
    chosen, rejected, metrics = implicit_rewards(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta
    )
    right, wrong = jax.nn.log_sigmoid(chosen - rejected), jax.nn.log_sigmoid(rejected - chosen)
    loss = -jnp.mean((1 - label_smoothing) * right + label_smoothing * wrong)
    return loss, {"loss": loss} | metrics


def ipo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Identity preference optimization (Azar et al. 2024, eq. 17): mean of (h - 1 / (2 beta))^2.

    h [B] is the difference of the log-ratios. It is regressed onto a constant, so a long answer
    must not count more: the caller divides each log-probability by the answer's length first, as
    TRL does on its authors' word; the paper and other code sum.
    """
    chosen, rejected, metrics = implicit_rewards(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta
    )
    loss = jnp.mean(((chosen - rejected) / beta - 1 / (2 * beta)) ** 2)
    return loss, {"loss": loss} | metrics


def hinge_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Mean of max(0, 1 - margin): SLiC (Zhao et al. 2023) on the implicit rewards of DPO.

    As in Liu et al. 2024, "Statistical rejection sampling improves preference optimization".
    """
    chosen, rejected, metrics = implicit_rewards(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta
    )
    loss = jax.nn.relu(1 - (chosen - rejected)).mean()
    return loss, {"loss": loss} | metrics


# ------------------------------------------------------------------------------------------ update


class TrainState(NamedTuple):
    """What one step hands to the next, and all that a checkpoint holds."""

    params: dict
    opt_state: optax.OptState


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


def make_state(params, optimizer):
    """A state that shares no buffer with `params`: train_step gives its buffers away."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, jax.jit(optimizer.init)(params))


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


@functools.partial(jax.jit, static_argnums=(2, 6))
def sample(params, ref_params, config, tokens, mask, key, sampling):
    """Completions with the policy's and the reference's log-probabilities of them.

    tokens, mask [B, P], padded on the left; sampling: what generate takes after the key. Returns
    tokens, mask [N, P + R], logprobs, ref_logprobs [N, R].
    """
    prompt_length, temperature = tokens.shape[1], sampling[1]
    tokens, mask, logprobs = generate(params, config, tokens, mask, key, *sampling)
    ref_logprobs, _ = policy_logprobs(ref_params, config, tokens, mask, prompt_length, temperature)
    return tokens, mask, logprobs, ref_logprobs


@functools.partial(jax.jit, static_argnums=2)
def pair_logprobs(params, batch, config):
    """log pi(answer | prompt) [B, 2] of chosen and rejected, from one forward pass.

    batch: {"tokens", "mask", "response_mask"}, [B, 2, T] each.
    """
    names = ["tokens", "mask", "response_mask"]
    tokens, mask, response_mask = (batch[x].reshape(-1, batch[x].shape[-1]) for x in names)
    logits = GPT2(config).apply({"params": params}, tokens, mask)[:, :-1]  # [2B, T - 1, V]
    logprobs = token_logprobs(logits, tokens[:, 1:])
    return response_logprobs(logprobs, response_mask[:, 1:]).reshape(-1, 2)


def pair_loss(logprobs, ref_logprobs, lengths, args):
    """(loss, metrics) of the chosen --loss, all [B, 2]; lengths in tokens."""
    # Pang et al. 2024, "Iterative reasoning preference optimization", eq. 1
    nll = jnp.mean(-logprobs[:, 0] / lengths[:, 0])
    logps = {"logps/chosen": logprobs[:, 0].mean(), "logps/rejected": logprobs[:, 1].mean()}
    if args.loss == "ipo":  # so its rewards/… are those of a mean token
        logprobs, ref_logprobs = logprobs / lengths, ref_logprobs / lengths
    pairs = (*logprobs.T, *ref_logprobs.T)
    if args.loss == "sigmoid":
        loss, metrics = dpo_loss(*pairs, args.beta, args.label_smoothing)
    elif args.loss == "ipo":
        loss, metrics = ipo_loss(*pairs, args.beta)
    else:
        loss, metrics = hinge_loss(*pairs, args.beta)
    loss = loss + args.nll_coef * nll
    return loss, metrics | logps | {"loss": loss, "nll_loss": nll}


@functools.partial(jax.jit, static_argnums=(2, 3, 4), donate_argnums=0)
def train_step(state, batch, config, optimizer, args):
    """One optimizer step on a batch of make_batch, with "ref_logprobs" [B, 2] added."""

    def loss_fn(params, batch):
        logprobs = pair_logprobs(params, batch, config)
        lengths = batch["response_mask"].sum(axis=2)  # [B, 2]
        return pair_loss(logprobs, batch["ref_logprobs"], lengths, args)

    counts = jnp.ones(len(batch["tokens"]))
    (_, metrics), grads = accumulate_gradients(
        loss_fn, state.params, batch, counts, args.micro_batch_size
    )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics |= {"grad_norm": optax.tree.norm(grads)}
    return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics


# -------------------------------------------------------------------------------------------- main


def make_batch(rows, max_length):
    """[[prompt, chosen, rejected], …] -> {"tokens", "mask", "response_mask"}, [B, 2, T] each."""
    texts = [prompt + answer for prompt, *answers in rows for answer in answers]
    tokens, mask = pad_rows(texts, padded_width(max(map(len, texts)), max_length))
    starts = np.repeat([len(prompt) for prompt, *_ in rows], 2)[:, None]
    response_mask = mask * (np.arange(mask.shape[1]) >= starts)
    batch = {"tokens": tokens, "mask": mask, "response_mask": response_mask}
    return {name: x.reshape(len(rows), 2, -1) for name, x in batch.items()}


def dataset_logprobs(params, config, rows, batch_size, max_length):
    """log pi(answer | prompt) [N, 2] of all pairs, those of about one length together."""
    order = np.argsort([sum(map(len, row)) for row in rows])
    order = np.append(order, order[-1:].repeat(-len(order) % batch_size))  # one shape to compile
    logprobs = np.zeros((len(rows), 2), np.float32)
    for indices in order.reshape(-1, batch_size):
        batch = make_batch([rows[i] for i in indices], max_length)
        logprobs[indices] = pair_logprobs(params, batch, config)
    return logprobs


def make_pairs(scores, pair, rng):
    """Columns [N, 2] of the chosen and the rejected answer among scores [N, K]."""
    if pair == "best-worst":  # the same answer twice where all score the same: nothing is learned
        return np.stack([scores.argmax(axis=1), scores.argmin(axis=1)], axis=1)
    second_wins = rng.random(len(scores)) < 1 / (1 + np.exp(scores[:, 0] - scores[:, 1]))
    return np.stack([second_wins, ~second_wins], axis=1).astype(int)


def main(args):
    if not args.reward_model and not args.reward:
        args = dataclasses.replace(args, reward_model="runs/reward/model")
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
        fail("--temperature must be above 0: at 0 nothing is sampled, and there is no KL")
    if args.beta <= 0:
        fail("--beta must be above 0")
    if not 0 <= args.label_smoothing < 0.5:
        fail("--label-smoothing must be at least 0 and below 0.5")
    if args.label_smoothing and args.loss != "sigmoid":
        fail(f"--label-smoothing is for --loss sigmoid, not for {args.loss}")
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

    def load_rows(path):
        rows = read_jsonl(path, {"prompt"})
        lengths = (args.max_prompt_length, args.max_completion_length)
        rows, ids = encode_rows(rows, [], tokenizer, eos_id, *lengths)
        return [(row, prompt) for row, (prompt,) in zip(rows, ids)]

    prompts, eval_prompts = load_rows(args.dataset), load_rows(args.eval_dataset)[:256]
    if args.num_generations < 2 or (args.num_generations > 2 and args.pair == "sampled"):
        fail("--num-generations must be 2, or more with --pair best-worst")
    if len(prompts) < args.prompts_per_round:
        fail(f"{len(prompts)} rows are too few for a round: lower --prompts-per-round")
    if args.prompts_per_round % args.batch_size:
        sizes = f"--batch-size {args.batch_size} does not divide --prompts-per-round"
        fail(f"{sizes} {args.prompts_per_round}")
    check_batch_sizes(args.prompts_per_round, args.batch_size, args.micro_batch_size)
    steps_per_round = args.prompts_per_round // args.batch_size * args.epochs
    total_steps = args.rounds * steps_per_round
    schedule_steps = steps_per_round if args.reset_optimizer else total_steps
    optimizer, schedule = make_optimizer(args, schedule_steps)
    state, start = run.start(make_state(ref_params, optimizer), total_steps)

    def rollout(prompts, num_samples, stream, step):
        """((ids of the answers, scores), metrics, samples) of the present policy."""
        rows, ids = zip(*prompts)
        rows = [row for row in rows for _ in range(num_samples)]  # group by group
        prompt_length, key = args.max_prompt_length, stream_key(args.seed, stream, step)
        tokens, mask = pad_rows(ids, prompt_length, left=True)
        sampling = (args.max_completion_length, args.temperature, eos_id, 0, num_samples)
        sampled = sample(state.params, ref_params, config, tokens, mask, key, sampling)
        tokens, mask, logprobs, ref_logprobs = sampled
        completions = decode_responses(tokenizer, tokens, mask, prompt_length, eos_id)
        ended = np.any(np.asarray(tokens)[:, prompt_length:] == eos_id, axis=1)
        scores = -args.missing_eos_penalty * ~ended
        if args.reward_model:
            learned = score_sequences(reward_params, reward_config, tokens, mask)
            scores = scores + np.asarray(learned)
        for function, weight in zip(functions, weights):
            scores = scores + weight * call_reward(function, rows, completions)
        columns = {"prompt": [row["prompt"] for row in rows], "completion": completions}
        columns["score"] = scores.tolist()
        response_mask = mask[:, prompt_length:]
        kl = compute_kl_divergence(logprobs, ref_logprobs) * response_mask
        metrics = {
            "objective/kl": kl.sum(axis=1).mean(),  # nats a sequence
            "objective/entropy": -jnp.sum(logprobs * response_mask, axis=1).mean(),
            "objective/scores": scores.mean(),
            "completions/mean_length": response_mask.sum(axis=1).mean(),
            "completions/clipped_ratio": 1 - ended.mean(),
        }
        if gold:
            golds = call_reward(gold, rows, completions)
            metrics["gold/reward"], columns["gold"] = golds.mean(), golds.tolist()
        samples = [dict(zip(columns, values)) for values in zip(*columns.values())]
        responses = zip(*(np.asarray(x)[:, prompt_length:] for x in (tokens, mask)))
        answers = [row[kept > 0].tolist() for row, kept in responses]
        return (answers, scores), metrics, samples

    def labelled_batches(start):
        """Samples and labels the pairs of each round; (batch, the round's metrics) of each step."""
        K, size = args.num_generations, args.micro_batch_size
        for number in range(start // steps_per_round, args.rounds):
            rng = np.random.default_rng([args.seed, number])
            chosen = rng.choice(len(prompts), args.prompts_per_round, replace=False)
            asked = [prompts[i] for i in chosen]
            (answers, scores), metrics, _ = rollout(asked, K, "rollout", number)
            pairs = make_pairs(scores.reshape(-1, K), args.pair, rng)
            metrics["pairs/ties"] = np.mean(pairs[:, 0] == pairs[:, 1])
            pairs += K * np.arange(len(pairs))[:, None]
            rows = [[asked[i // K][1], answers[i], answers[j]] for i, j in pairs]
            ref_model = ref_params if args.reference == "start" else state.params
            ref_logprobs = dataset_logprobs(ref_model, config, rows, size, max_length)
            lengths, seed = [sum(map(len, row)) for row in rows], rng.integers(2**32)
            for indices in length_batches(lengths, args.batch_size, args.epochs, seed):
                batch = make_batch([rows[i] for i in indices], max_length)
                batch["ref_logprobs"] = ref_logprobs[indices]
                yield batch, metrics

    def evaluate_and_sample(step):
        _, metrics, samples = rollout(eval_prompts, 1, "eval", step)
        run.log_samples(step, samples[:8])
        return {f"eval/{name}": value for name, value in metrics.items()}

    if start == 0:
        run.log(0, evaluate_and_sample(0), "eval/loss", "eval/objective/scores")
    for step, (batch, round_metrics) in enumerate(labelled_batches(start), start + 1):
        if args.reset_optimizer and (step - 1) % steps_per_round == 0:
            state = make_state(state.params, optimizer)
        started = time.perf_counter()
        state, metrics = train_step(state, batch, config, optimizer, args)
        metrics = jax.device_get(metrics) | round_metrics
        seconds = time.perf_counter() - started
        metrics["lr"] = schedule((step - 1) % schedule_steps)
        metrics["perf/tokens_per_second"] = batch["mask"].sum() / seconds
        if run.due(step, args.eval_every):
            metrics |= evaluate_and_sample(step)
        if run.due(step, args.log_every, args.eval_every, args.save_every * steps_per_round):
            shown = ["loss", "objective/kl", "gold/reward", "eval/objective/kl", "eval/gold/reward"]
            run.log(step, metrics, *shown)
        if run.due(step, args.save_every * steps_per_round):
            run.save(step, state)
    run.finish()
    save_model(run.path / "model", config, state.params, args.model)


if __name__ == "__main__":
    main(args)
