"""GPT-2 alone: load a model, continue a prompt, measure the perplexity of a text.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

    python gpt2.py --model gpt2 --prompt "The capital of France is" --num-samples 3
    python gpt2.py --model runs/sft/model --prompt "The Quiet Harbor (western). Sadly,"
    python gpt2.py --model runs/sft/model --text README.md

A model is a folder in Hugging Face's GPT-2 layout (config.json, model.safetensors and the
tokenizer's files) or a name on the hub; `lvwerra/gpt2-imdb`, `distilgpt2` and `gpt2-xl` load too.
The other scripts carry the same tokenizer, model, loader and sampler; the next to read is sft.py.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import tyro


@dataclass(frozen=True)
class Args:
    model: str = "gpt2"  # folder in Hugging Face's GPT-2 layout, or a name on the hub
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # text to continue; repeatable
    text: str = ""  # file whose loss and perplexity to print
    num_samples: int = 1  # continuations of each prompt
    max_completion_length: int = 48  # new tokens at most
    temperature: float = 1.0  # 0 takes the most likely token each time
    top_k: int = 0  # sample among the k most likely tokens; 0: among all
    top_p: float = 1.0  # sample among the fewest tokens that hold this mass; 1: among all
    batch_size: int = 8  # windows of --text in one forward pass
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the computation
    seed: int = 0  # of the sampling


# Parsed before JAX is imported, so that --help answers at once (linters call it E402).
if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

import dataclasses
import functools
import json
import os
import re
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiktoken
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download
from safetensors.flax import load_file, save_file

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


def keep_top(logits, k, p):
    """[N, V] with -inf for all but the k likeliest tokens and the fewest that hold mass p."""
    if 0 < k < logits.shape[-1]:
        threshold = jax.lax.top_k(logits, k)[0].min(axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    if p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)  # [N, V]
        threshold = jnp.where(before < p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    return logits


# ------------------------------------------------------------------------------------------ losses


def token_logprobs(logits, tokens):
    """log_softmax(logits) at `tokens`: [..., V], [...] -> [...], in float32 at least.

    As a logit minus a logsumexp, so that no [..., V] log-softmax is kept for the backward pass.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return -optax.softmax_cross_entropy_with_integer_labels(logits, tokens)


# -------------------------------------------------------------------------------------------- main


def perplexity(params, config, ids, batch_size, eos_id):
    """Mean loss in nats of a text's tokens, read in windows as long as the model's context.

    Each window begins with EOS, so that its first token has something to be predicted from.
    """
    size = config.n_positions - 1
    windows = [[eos_id, *ids[i : i + size]] for i in range(0, len(ids), size)]
    windows += [[]] * (-len(windows) % batch_size)  # one shape, one compilation

    @jax.jit
    def total_loss(tokens, mask):
        logits = GPT2(config).apply({"params": params}, tokens, mask)[:, :-1]
        return -jnp.sum(token_logprobs(logits, tokens[:, 1:]) * mask[:, 1:])

    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    return sum(float(total_loss(*pad_rows(b, len(windows[0])))) for b in batches) / len(ids)


def main(args):
    if not args.prompt and not args.text:
        fail('nothing to do: pass --prompt "…" or --text FILE')
    if args.dtype == "bfloat16" and jax.default_backend().upper() == "METAL":
        fail("Metal has no bfloat16: pass --dtype float16")
    config, params = load_model(args.model)
    config = dataclasses.replace(config, dtype=args.dtype)
    tokenizer = load_tokenizer(args.model)
    eos_id = tokenizer.eot_token if config.eos_token_id is None else config.eos_token_id
    if args.text:
        if not Path(args.text).is_file() or not Path(args.text).stat().st_size:
            fail(f"no text in {args.text}: --text takes a file")
        check_sizes(config, tokenizer, 0)
        ids = tokenizer.encode_ordinary(Path(args.text).read_text("utf-8"))
        loss = perplexity(params, config, ids, args.batch_size, eos_id)
        print(f"{args.text}: {len(ids)} tokens, {loss:.4f} nats, perplexity {np.exp(loss):.2f}")
    if args.prompt:
        # An empty prompt is one EOS: what stands before a text's first token in training.
        rows = [tokenizer.encode_ordinary(prompt) or [eos_id] for prompt in args.prompt]
        tokens, mask = pad_rows(rows, max(map(len, rows)), left=True)
        check_sizes(config, tokenizer, tokens.shape[1] + args.max_completion_length)
        key, length = jax.random.key(args.seed), args.max_completion_length
        top = functools.partial(keep_top, k=args.top_k, p=args.top_p)
        sampling = (length, args.temperature, eos_id, 0, args.num_samples, top)
        sampled, mask, _ = generate(params, config, tokens, mask, key, *sampling)
        texts = decode_responses(tokenizer, sampled, mask, tokens.shape[1], eos_id)
        for i, text in enumerate(texts):
            print(f"{args.prompt[i // args.num_samples]}|{text}\n")


if __name__ == "__main__":
    main(args)
