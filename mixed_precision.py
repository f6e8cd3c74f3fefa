"""Supervised fine-tuning in half precision: sft.py in float16 or bfloat16, with loss scaling.

The first stage of Ouyang et al. 2022, "Training language models to follow instructions with human
feedback" (section 3.5): maximum likelihood of the completion, given the prompt.

    python mixed_precision.py                         # from scratch, on the embedded reviews
    python mixed_precision.py --model gpt2 --dataset my.jsonl --eval-dataset my_test.jsonl \\
        --max-prompt-length 128 --max-completion-length 384 --learning-rate 2e-5

Data is JSON Lines: {"prompt", "completion"}, or {"text"} for plain language modelling.
The model learns the completion's tokens and the EOS after them, not the prompt.

Micikevicius et al. 2018, "Mixed precision training": the model computes in float16 (11 significant
bits, from 6e-8 to 65504) or bfloat16 (8 bits, float32's range); layer norm, softmax, logits, loss
and optimizer stay in float32. So do the weights, which are cast where they are used: half precision
would round away an update below 1/4096 (bfloat16: 1/512) of a weight. Gradients of a mean over many
tokens are small, and float16 makes 0 of what is below 3e-8. So the loss is multiplied by a scale
before the backward pass, and the gradients divided by it after. Where one overflows, the step is
skipped and the scale halved; after growth_interval good steps it doubles. bfloat16 needs no scale,
but is coarser: the log-probability of a sampled review is off by 0.014 (std; float16 0.0014,
float32 2e-6), which RL sees as noise in its ratios. The defaults take 50 seconds on two CPU cores
(34 in float32), and the held-out loss comes to 1.451 nats a token in both, to 1.449 in float32, and
to 1.450 in float16 without a scale (--loss-scale 1 --growth-interval 99999), which this small a
model does not need. Compare: `diff sft.py mixed_precision.py`.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class Args:
    # folder or hub name of the model to start from; empty: from scratch, of the sizes below
    model: str = ""
    # folder of the tokenizer, where the model starts from scratch
    tokenizer: str = "data/reviews/tokenizer"
    # JSON Lines (or .gz) with prompt and completion, or text
    dataset: str = "data/reviews/sft_train.jsonl"
    eval_dataset: str = "data/reviews/sft_test.jsonl"  # the same, held out
    run_dir: str = "runs/mixed_precision"  # where metrics, samples, checkpoint and model go
    resume: bool = False  # go on from the checkpoint in run_dir; a finished run stays as it is
    overwrite: bool = False  # replace the run in run_dir
    seed: int = 0  # of the initialisation, the order of the data and the samples
    n_layer: int = 2  # blocks, from scratch
    n_head: int = 4  # attention heads, from scratch
    n_embd: int = 128  # width, from scratch
    n_positions: int = 128  # longest sequence in tokens, from scratch
    epochs: int = 4  # passes over the data
    batch_size: int = 32  # sequences in one optimizer step
    # sequences in one forward and backward pass; their gradients are accumulated
    micro_batch_size: int = 16
    learning_rate: float = 3e-3  # peak; it falls linearly to 0
    warmup_steps: int = 50  # steps in which the learning rate rises from 0
    weight_decay: float = 0.1  # AdamW's, on matrices
    max_grad_norm: float = 1.0  # the gradient is scaled down to this global norm
    max_prompt_length: int = 16  # tokens; a longer prompt loses its beginning
    max_completion_length: int = 48  # tokens with EOS; a row whose completion is longer is dropped
    train_on_prompt: bool = False  # let the prompt's tokens count in the loss, too
    remat: bool = False  # recompute activations in the backward pass: slower, less memory
    dtype: Literal["float32", "bfloat16", "float16"] = "float16"  # of the model's arithmetic
    loss_scale: int = 65536  # the first one; it halves after an overflow, down to 1
    growth_interval: int = 200  # steps in a row without an overflow, after which it doubles
    temperature: float = 1.0  # of the samples that are shown
    log_every: int = 10  # steps between lines in metrics.jsonl
    eval_every: int = 250  # steps between evaluations on the held-out data
    save_every: int = 250  # steps between checkpoints


# Parsed before JAX is imported, so that --help answers at once (linters call it E402).
if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

import collections
import dataclasses
import functools
import gzip
import itertools
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


def encode_texts(rows, tokenizer, eos_id, max_completion_length):
    """Plain texts, EOS before and after, as rows of encode_rows: pieces after the token before."""
    texts = [[eos_id, *tokenizer.encode_ordinary(row["text"]), eos_id] for row in rows]
    size = max_completion_length
    return [[t[i - 1 : i], t[i : i + size]] for t in texts for i in range(1, len(t), size)]


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


def cross_entropy_loss(logits, targets, mask):
    """Mean negative log-likelihood of the tokens that count: -sum(mask * log p) / sum(mask).

    logits [B, T, V], targets [B, T] already shifted (logits[:, t] predicts targets[:, t]), mask
    [B, T]. The metrics also have the share of targets that were the likeliest token.
    """
    assert logits.shape[:2] == targets.shape == mask.shape, (logits.shape, targets.shape)
    count = jnp.maximum(mask.sum(), 1)
    loss = -jnp.sum(token_logprobs(logits, targets) * mask) / count
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    accuracy = jnp.sum((target_logits >= logits.max(axis=-1)) * mask) / count
    return loss, {"loss": loss, "mean_token_accuracy": accuracy}


# ------------------------------------------------------------------------------------------ update


class TrainState(NamedTuple):
    """What one step hands to the next, and all that a checkpoint holds."""

    params: dict
    opt_state: optax.OptState
    loss_scale: jax.Array  # of the next step
    good_steps: jax.Array  # in a row, since the scale last changed
    skipped_steps: jax.Array


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


def make_state(params, optimizer, loss_scale):
    """A state that shares no buffer with `params`: train_step gives its buffers away."""
    params = jax.tree.map(jnp.copy, params)
    scaling = jnp.float32(loss_scale), jnp.int32(0), jnp.int32(0)
    return TrainState(params, jax.jit(optimizer.init)(params), *scaling)


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


@functools.partial(jax.jit, static_argnums=(2, 3, 4), donate_argnums=0)
def train_step(state, batch, config, optimizer, args):
    """One optimizer step on batch: {"tokens", "mask", "loss_mask"}, [B, T] each."""

    def loss_fn(params, batch):
        logits = GPT2(config).apply({"params": params}, batch["tokens"], batch["mask"])
        targets, loss_mask = batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]
        loss, metrics = cross_entropy_loss(logits[:, :-1], targets, loss_mask)
        return state.loss_scale * loss, metrics

    counts = batch["loss_mask"][:, 1:].sum(axis=1)
    (_, metrics), grads = accumulate_gradients(
        loss_fn, state.params, batch, counts, args.micro_batch_size
    )
    grads = jax.tree.map(lambda x: x / state.loss_scale, grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updated = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(lambda x, y: jnp.where(finite, x, y), updated, state[:2])
    good_steps = jnp.where(finite, (state.good_steps + 1) % args.growth_interval, 0)
    factor = jnp.where(finite, jnp.where(good_steps == 0, 2.0, 1.0), 0.5)
    loss_scale = jnp.clip(state.loss_scale * factor, 1.0, 2.0**24)
    skipped = state.skipped_steps + ~finite
    # A skipped step has norm 0, but infinity at a scale of 1: it cannot fall, and the run ends.
    grad_norm = jnp.where(finite | (state.loss_scale <= 1), grad_norm, 0.0)
    metrics |= {"grad_norm": grad_norm, "loss_scale": state.loss_scale, "skipped_steps": skipped}
    return TrainState(params, opt_state, loss_scale, good_steps, skipped), metrics


# -------------------------------------------------------------------------------------------- main


def make_batch(rows, max_length, train_on_prompt=False):
    """[[prompt, completion], …] -> {"tokens", "mask", "loss_mask"}, [B, T] each."""
    texts = [list(itertools.chain(*row)) for row in rows]
    tokens, mask = pad_rows(texts, padded_width(max(map(len, texts)), max_length))
    starts = [0 if train_on_prompt or not row else len(row[0]) for row in rows]
    loss_mask = mask * (np.arange(mask.shape[1]) >= np.array(starts)[:, None])
    return {"tokens": tokens, "mask": mask, "loss_mask": loss_mask}


@functools.partial(jax.jit, static_argnums=2)
def eval_step(params, batch, config):
    """The metrics of cross_entropy_loss, and over how many tokens they are means."""
    logits = GPT2(config).apply({"params": params}, batch["tokens"], batch["mask"])[:, :-1]
    loss_mask = batch["loss_mask"][:, 1:]
    return cross_entropy_loss(logits, batch["tokens"][:, 1:], loss_mask)[1], loss_mask.sum()


def evaluate(params, config, rows, batch_size, max_length):
    """Loss and accuracy on all held-out completion tokens."""
    rows = sorted(rows, key=lambda row: sum(map(len, row)))
    rows += [[]] * (-len(rows) % batch_size)  # empty rows count nothing
    sums, count = collections.Counter(), 0
    for i in range(0, len(rows), batch_size):
        batch = make_batch(rows[i : i + batch_size], max_length)
        metrics, n = jax.device_get(eval_step(params, batch, config))
        sums.update({name: float(value) * int(n) for name, value in metrics.items()})
        count += int(n)
    return {f"eval/{name}": total / count for name, total in sums.items()}


@functools.partial(jax.jit, static_argnums=(1, 5))
def log_ratios(params, config, tokens, mask, logprobs, temperature):
    """log p in config.dtype, as `generate` gave it, minus log p in float32, of whole responses."""
    R, full = logprobs.shape[1], dataclasses.replace(config, dtype="float32")
    logits = GPT2(full).apply({"params": params}, tokens, mask, logits_from=-R - 1)[:, :-1]
    logprobs -= token_logprobs(logits / (temperature or 1.0), tokens[:, -R:])  # [N, R]
    return jnp.sum(logprobs * mask[:, -R:], axis=1)  # [N]


def main(args):
    run = RunFolder(args)
    if args.dtype == "bfloat16" and jax.default_backend().upper() == "METAL":
        fail("Metal has no bfloat16: pass --dtype float16")
    tokenizer = load_tokenizer(args.model or args.tokenizer)
    if args.model:
        config, params = load_model(args.model)
        if "score" in params:
            fail(f"{args.model} is a reward model, not a language model")
    else:
        config = GPT2Config(
            vocab_size=tokenizer.n_vocab,
            n_positions=args.n_positions,
            n_embd=args.n_embd,
            n_layer=args.n_layer,
            n_head=args.n_head,
            initializer_range=0.02 * (768 / args.n_embd) ** 0.5,  # 0.02 is for GPT-2's width
            eos_token_id=tokenizer.eot_token,
            pad_token_id=tokenizer._special_tokens.get("<|pad|>"),
        )
        one = jnp.ones((1, 1), jnp.int32)
        params = jax.jit(GPT2(config).init)(stream_key(args.seed, "init", 0), one, one)["params"]
    config = dataclasses.replace(config, remat=args.remat, dtype=args.dtype)
    eos_id = tokenizer.eot_token if config.eos_token_id is None else config.eos_token_id
    max_length = args.max_prompt_length + args.max_completion_length
    check_sizes(config, tokenizer, max_length)

    def load_rows(path):
        rows = read_jsonl(path, {"prompt", "completion"}, {"text"})
        texts = [row for row in rows if "completion" not in row]
        pairs = [row for row in rows if "completion" in row]
        lengths = (args.max_prompt_length, args.max_completion_length)
        _, encoded = encode_rows(pairs, ["completion"], tokenizer, eos_id, *lengths)
        return encoded + encode_texts(texts, tokenizer, eos_id, args.max_completion_length)

    rows, eval_rows = load_rows(args.dataset), load_rows(args.eval_dataset)
    check_batch_sizes(len(rows), args.batch_size, args.micro_batch_size)
    lengths = [sum(map(len, row)) for row in rows]
    batches = length_batches(lengths, args.batch_size, args.epochs, args.seed)
    optimizer, schedule = make_optimizer(args, len(batches))
    state, start = run.start(make_state(params, optimizer, args.loss_scale), len(batches))

    def evaluate_and_sample(step):
        prompts = [row[0] for row in eval_rows[:128]]
        key, width = stream_key(args.seed, "samples", step), args.max_prompt_length
        tokens, mask, logprobs = generate(
            state.params,
            config,
            *pad_rows(prompts, width, left=True),
            key,
            args.max_completion_length,
            args.temperature,
            eos_id,
        )
        texts = decode_responses(tokenizer, tokens, mask, width, eos_id)
        samples = [{"prompt": tokenizer.decode(p), "completion": t} for p, t in zip(prompts, texts)]
        run.log_samples(step, samples[:8])
        ratios = log_ratios(state.params, config, tokens, mask, logprobs, args.temperature)
        metrics = {"eval/ratio": jnp.exp(ratios).mean(), "eval/log_ratio_std": ratios.std()}
        return metrics | evaluate(state.params, config, eval_rows, args.batch_size, max_length)

    if start == 0:
        run.log(0, evaluate_and_sample(0), "eval/loss")
    for step in range(start + 1, len(batches) + 1):
        batch = [rows[i] for i in batches[step - 1]]
        batch = make_batch(batch, max_length, args.train_on_prompt)
        started = time.perf_counter()
        state, metrics = train_step(state, batch, config, optimizer, args)
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - started
        metrics["lr"] = schedule(step - 1 - metrics["skipped_steps"])
        metrics["perf/tokens_per_second"] = batch["mask"].sum() / seconds
        if run.due(step, args.eval_every):
            metrics |= evaluate_and_sample(step)
        if run.due(step, args.log_every, args.eval_every, args.save_every):
            run.log(step, metrics, "loss", "eval/loss")
        if run.due(step, args.save_every):
            run.save(step, state)
    run.finish()
    save_model(run.path / "model", config, state.params, args.model or args.tokenizer)


if __name__ == "__main__":
    main(args)
