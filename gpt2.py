"""GPT-2 alone: load a model, continue a prompt, measure a text's perplexity.

Radford et al. 2019, "Language models are unsupervised multitask learners".

    python gpt2.py --model gpt2 --prompt "The capital of France is"
    python gpt2.py --model runs/sft/model --prompt "Second Forest (western)."
    python gpt2.py --model runs/sft/model --text README.md

A model is a folder in Hugging Face's GPT-2 layout (config.json,
model.safetensors and the tokenizer's files) or a name on the hub, such as
gpt2-xl, distilgpt2 or lvwerra/gpt2-imdb.

Read model, sampling, model folder and tokenizer here, once: the other scripts
repeat them (their generate has no top-k and top-p). Next: sft.py.
"""

import os
import sys
import textwrap
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
    seed: int = 0  # seeds the sampling


# Parsed before JAX is imported, so that --help answers at once (linters call it E402). Indented,
# because tyro joins lines that begin with a letter.
if __name__ == "__main__":
    args = tyro.cli(Args, description=textwrap.indent(__doc__, " "))
    sys.stdout.reconfigure(errors="replace")  # a console need not know every character
    # What JAX compiles is kept for the next run; JAX_ENABLE_COMPILATION_CACHE=0 turns that off.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import contextlib
import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.flax
import tiktoken
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download

# -------------------------------------------------------------------------------------------- main


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


def perplexity(params, config, ids, batch_size):
    """Mean loss in nats of a text's tokens, read in windows as long as the model's context.

    Each window begins with EOS, so that its first token has something to be predicted from.
    """
    size = config.n_positions - 1
    windows = [[config.eos_token_id, *ids[i : i + size]] for i in range(0, len(ids), size)]
    windows += [[]] * (-len(windows) % batch_size)  # one shape, one compilation

    @jax.jit
    def total_loss(tokens, mask):
        read = (token_logprobs, tokens[:, 1:])
        logprobs = GPT2(config).apply({"params": params}, tokens, mask, read=read)
        return -jnp.sum(logprobs * mask[:, 1:])

    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    return sum(float(total_loss(*pad_rows(b, len(windows[0])))) for b in batches) / len(ids)


def main(args):
    check_flags(args)
    check(args.prompt or args.text, 'nothing to do: pass --prompt "…" or --text FILE')
    check(args.dtype != "bfloat16" or jax.default_backend() != "METAL", "Metal has no bfloat16")
    config, params = load_model(args.model)
    check("score" not in params, f"{args.model} is a reward model, not a language model")
    tokenizer = load_tokenizer(args.model)
    eos_id = end_token(config, tokenizer)
    config = dataclasses.replace(config, eos_token_id=eos_id, dtype=args.dtype)
    ids, rows = tokenizer.max_token_value + 1, config.vocab_size
    check(ids <= rows, f"the tokenizer has {ids} ids, the model only {rows} tokens")
    if args.text:
        with file_access(args.text):
            ids = tokenizer.encode_ordinary(Path(args.text).read_text("utf-8-sig"))
        check(ids, f"{args.text} is empty: --text takes a file with a text")
        loss = perplexity(params, config, ids, args.batch_size)
        print(f"{args.text}: {len(ids)} tokens, {loss:.4f} nats, perplexity {np.exp(loss):.2f}")
    if args.prompt:
        # An empty prompt is one EOS: what stands before a text's first token in training.
        ids = [tokenizer.encode_ordinary(text) or [config.eos_token_id] for text in args.prompt]
        tokens, mask = pad_rows(ids, max(map(len, ids)), left=True)
        prompt_length = tokens.shape[1]
        length = prompt_length + args.max_completion_length
        longer = f"prompt and --max-completion-length are {length} tokens"
        check(length <= config.n_positions, f"{longer}, the model has {config.n_positions}")
        tokens, mask, _ = generate(
            params,
            config,
            tokens,
            mask,
            jax.random.key(args.seed),
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            eos_id=config.eos_token_id,
            num_samples=args.num_samples,
            filter_logits=functools.partial(keep_top, k=args.top_k, p=args.top_p),
        )
        texts = decode_responses(tokenizer, tokens, mask, prompt_length, config.eos_token_id)
        for i, text in enumerate(texts):
            print(f"{args.prompt[i // args.num_samples]}|{text}\n")


# ==================================================================================================
# The line. From here on the text is the same in every script that has it: read it once, in gpt2.py.
# ==================================================================================================

# ------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class GPT2Config:
    """Hugging Face's names, as in config.json; frozen, so that jit can take it as static."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"  # of the operands of products; all else is float32
    remat: bool = False  # recompute each block in the backward pass instead of keeping it


class GPT2(nn.Module):
    """GPT-2 with its language-model head, which is wte itself unless the config unties it."""

    config: GPT2Config

    @nn.compact
    def __call__(self, tokens, mask, cache=None, column=0, logits_from=0, read=None):
        """tokens, mask (1 = real token) [B, T] -> float32 logits [B, T - logits_from, V].

        With read = (function, *arrays [B, C]): what function(logits [B, C, V], *arrays) says of
        each token, [B, C], without ever holding all the logits.
        """
        # With a cache: mask is [B, S], tokens its T columns from `column` on; the cache comes back.
        x, new_cache, head = trunk(self.config, tokens, mask, cache, column)
        if not self.config.tie_word_embeddings:
            head = nn.Embed(self.config.vocab_size, self.config.n_embd, name="lm_head")
        x = x[:, logits_from:]  # the largest product: only where it is read
        if read:
            return read_in_blocks(self.config, head.embedding, x, *read)
        logits = unembed(self.config, head.embedding, x)
        return logits if cache is None else (logits, new_cache)


def unembed(config, table, x):
    """The head: x [B, T, D] times the embeddings [V, D], float32 logits [B, T, V]."""
    x, table = x.astype(config.dtype), table.astype(config.dtype)
    return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)


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


def trunk(config, tokens, mask, cache=None, column=0):
    """(hidden states [B, T, D], new cache, wte), with parameters in the caller's own tree."""
    # Left padding must not count: GPT-2's positions are absolute.
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)  # [B, S]
    positions = jax.lax.dynamic_slice_in_dim(positions, column, tokens.shape[1], axis=1)  # [B, T]
    queries = column + jnp.arange(tokens.shape[1])
    causal = queries[:, None] >= jnp.arange(mask.shape[1])  # [T, S]
    bias = jnp.where(causal & (mask[:, None] > 0), 0.0, -1e9)[:, None]  # [B, 1, T, S], to scores
    init = nn.initializers.normal(config.initializer_range)
    embed = functools.partial(nn.Embed, embedding_init=init)
    wte = embed(config.vocab_size, config.n_embd, name="wte")
    wpe = embed(config.n_positions, config.n_embd, name="wpe")
    x = wte(tokens) + wpe(positions)  # [B, T, D]
    x = x.reshape(-1, config.n_embd)  # a 3-D input makes weight gradients 3 times as slow on a CPU
    block = nn.remat(Block) if config.remat else Block
    cache = list(cache or [None] * config.n_layer)
    for i in range(config.n_layer):
        x, cache[i] = block(config, name=f"h.{i}")(x, bias, cache[i], column)
    x = nn.LayerNorm(config.layer_norm_epsilon, name="ln_f")(x)
    return x.reshape(*tokens.shape, config.n_embd), cache, wte


class Block(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x, bias, cache, column):
        """x [B * T, D]; bias [B, 1, T, S]; cache: None or (keys, values) [B, H, S, D/H] each."""
        norm = functools.partial(nn.LayerNorm, self.config.layer_norm_epsilon)
        y, cache = Attention(self.config, name="attn")(norm(name="ln_1")(x), bias, cache, column)
        x = x + y
        return x + MLP(self.config, name="mlp")(norm(name="ln_2")(x)), cache


class Attention(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x, bias, cache, column):
        """x [B * T, D], bias [B, 1, T, S], cache as in Block -> (y [B * T, D], new cache)."""
        (B, _, T, _), D, H = bias.shape, x.shape[-1], self.config.n_head
        # c_attn's kernel is held as [D, 3, H, D/H], so that heads can be sharded.
        qkv = dense(self.config, (3, H, D // H), "c_attn")(x).astype(self.config.dtype)
        qkv = qkv.reshape(B, T, 3, H, D // H)
        q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # [B, H, T, D/H] each
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k, (0, 0, column, 0))  # [B, H, S, D/H]
            v = jax.lax.dynamic_update_slice(cache[1], v, (0, 0, column, 0))
            cache = (k, v)
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = einsum("bhtd,bhsd->bhts", q * (D // H) ** -0.5, k) + bias
        # A softmax that is divided after the product with v: that leaves one pass less over T x S.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        y = einsum("bhts,bhsd->bhtd", weights.astype(v.dtype), v)
        y = (y / weights.sum(axis=-1, keepdims=True)).swapaxes(1, 2).reshape(x.shape)
        return dense(self.config, D, "c_proj", residual=True)(y), cache


class MLP(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x):
        hidden = jax.nn.gelu(dense(self.config, 4 * x.shape[-1], "c_fc")(x))  # [B * T, 4D]
        return dense(self.config, x.shape[-1], "c_proj", residual=True)(hidden)


def dense(config, features, name, residual=False):
    """A linear layer; as in GPT-2, those that add to the residual stream start with less weight."""
    scale = (2 * config.n_layer) ** -0.5 if residual else 1.0
    init = nn.initializers.normal(config.initializer_range * scale)
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    layer = functools.partial(nn.DenseGeneral, dtype=config.dtype, dot_general=dot)
    return layer(features, kernel_init=init, name=name)


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
    jax.jit,
    static_argnames=(
        "config",
        "max_new_tokens",
        "temperature",
        "eos_id",
        "num_samples",
        "filter_logits",
    ),
)
def generate(
    params,
    config,
    tokens,
    mask,
    key,
    max_new_tokens,
    temperature,
    eos_id,
    num_samples=1,
    filter_logits=None,
):
    """Samples until every row has ended: (tokens, mask [N, P + R], logprobs [N, R]).

    tokens, mask: prompts [B, P], padded on the left. N = B * num_samples, those of one prompt side
    by side; R = max_new_tokens. logprobs are those of log_softmax(logits / temperature). After a
    row's EOS all three are 0. At temperature 0 the likeliest token is taken, and logprobs are those
    at 1. filter_logits ([N, V] -> [N, V], such as keep_top) takes tokens away after logprobs are
    known.
    """
    (B, P), R, N = tokens.shape, max_new_tokens, len(tokens) * num_samples
    assert config.n_positions >= P + R, (P, R, config.n_positions)
    model = functools.partial(GPT2(config).apply, {"params": params})
    cache_shape = (B, config.n_head, P + R, config.n_embd // config.n_head)
    cache = [(jnp.zeros(cache_shape, config.dtype),) * 2 for _ in range(config.n_layer)]
    mask = jnp.pad(mask, ((0, 0), (0, R)))  # [B, P + R]
    logits, cache = model(tokens, mask, cache=cache, logits_from=P - 1)
    tokens = jnp.pad(tokens, ((0, 0), (0, R)))  # [B, P + R]
    prefilled = (tokens, mask, logits, cache)  # each prompt is read once; now one row per sample
    prefilled = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), prefilled)

    def unfinished(carry):
        return (carry[0] < R) & ~jnp.all(carry[1])

    def one_token(carry):
        step, ended, logprobs, tokens, mask, logits, cache = carry
        logits = logits[:, 0] / (temperature or 1.0)  # [N, V]
        kept = filter_logits(logits) if filter_logits else logits
        token = draw_token(jax.random.fold_in(key, step), kept)  # [N]
        if temperature == 0:
            token = jnp.argmax(kept, axis=-1)
        token = jnp.where(ended, 0, token)
        logprobs = logprobs.at[:, step].set(jnp.where(ended, 0.0, token_logprobs(logits, token)))
        tokens = tokens.at[:, P + step].set(token)
        mask = mask.at[:, P + step].set(jnp.where(ended, 0, 1))
        logits, cache = model(token[:, None], mask, cache=cache, column=P + step)
        return step + 1, ended | (token == eos_id), logprobs, tokens, mask, logits, cache

    carry = (0, jnp.zeros(N, bool), jnp.zeros((N, R)), *prefilled)
    _, _, logprobs, tokens, mask, _, _ = jax.lax.while_loop(unfinished, one_token, carry)
    return tokens, mask, logprobs


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


def hf_name_and_shape(path, shape):
    """A parameter's name and shape in the file: ("h.0", "ln_1", "bias") is h.0.ln_1.bias there."""
    name = ".".join([*path[:-1], "bias" if path[-1] == "bias" else "weight"])
    if "c_attn" in path:  # [D, 3, H, D/H] here, [D, 3D] there
        shape = (*shape[:-3], math.prod(shape[-3:]))
    return name, shape[::-1] if "score" in path else shape


def load_config(folder):
    """The GPT2Config of a model folder; fails on what this GPT-2 does not implement."""
    path = folder / "config.json"
    saved = {"model_type": None} | read_json(path)
    wanted = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True}
    wanted |= {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for name, value in wanted.items():
        found = saved.get(name, value)
        more = "; Llama and Qwen: grpo_llama.py" if name == "model_type" else ""
        check(found == value, f"{folder}: {name} is {found!r}, only {value!r} is implemented{more}")
    eos_id = saved.get("eos_token_id")
    if isinstance(eos_id, list) and len(eos_id) == 1:
        saved["eos_token_id"] = eos_id = eos_id[0]
    values = {}
    for field in dataclasses.fields(GPT2Config):
        if field.name in saved and field.name not in ("dtype", "remat"):
            values[field.name] = value = saved[field.name]
            kinds = (int, float) if field.type is float else field.type
            right = isinstance(value, kinds) and isinstance(value, bool) == (field.type is bool)
            right = right and (type(field.default) is not int or 0 < value < 2**31)
            check(right, f"{path}: {field.name} cannot be {value!r}")
    sizes = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head"}
    check(sizes <= values.keys(), f"{path} lacks {', '.join(sorted(sizes - values.keys()))}")
    config = GPT2Config(**values)
    check(config.n_embd % config.n_head == 0, f"{path}: n_head does not divide n_embd")
    in_table = eos_id is None or eos_id in range(config.vocab_size)
    check(in_table, f"{path}: eos_token_id {eos_id} is above the vocab_size {config.vocab_size}")
    return config


def load_model(name):
    """(config, params in float32) of a GPT-2 in a Hugging Face folder or of a hub name."""
    folder = find_model(name)
    config = load_config(folder)
    files = sorted(folder.glob("model*.safetensors"))  # large models come in several
    convert = f"from transformers import GPT2LMHeadModel as M; M.from_pretrained({str(name)!r})"
    check(files, f"{folder} has no safetensors: python -c \"{convert}.save_pretrained('FOLDER')\"")
    tensors = {}
    for file in files:
        with file_access(file):
            tensors |= safetensors.flax.load_file(file)
    tensors = {key.removeprefix("transformer."): x for key, x in tensors.items()}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        same = np.array_equal(tensors["lm_head.weight"], tensors.get("wte.weight"))
        check(same, f"{folder}: lm_head is not wte, so tie_word_embeddings should be false")
    one = jnp.zeros((1, 1), jnp.int32)
    likes = flatten_dict(jax.eval_shape(GPT2(config).init, jax.random.key(0), one, one)["params"])
    if "score.weight" in tensors:  # a reward model has a score in place of the language-model head
        likes.pop(("lm_head", "embedding"), None)
        likes["score", "kernel"] = jnp.zeros((config.n_embd, 1))
    params = {}
    for path, like in likes.items():
        key, shape = hf_name_and_shape(path, like.shape)
        found = tensors[key].shape if key in tensors else "missing"
        check(found == shape, f"{folder}: {key} should have shape {shape}, but is {found}")
        params[path] = tensors[key].astype(jnp.float32).reshape(like.shape)
        check(jnp.isfinite(params[path]).all(), f"{folder}: {key} has values that are not finite")
    return config, unflatten_dict(params)


# ------------------------------------------------------------------------------ tokenizer and data


def load_tokenizer(folder):
    """The tiktoken.Encoding of a model folder; fails on what tiktoken cannot express."""
    folder = find_model(folder)
    with file_access(f"the tokenizer of {folder}"):
        if (folder / "tokenizer.json").exists():
            saved = read_json(folder / "tokenizer.json")
            model, split = saved["model"], saved["pre_tokenizer"] or {"type": None}
            after = saved.get("post_processor") or {}
            usual = (model["type"], split["type"]) == ("BPE", "ByteLevel")
            unusual = [saved.get("normalizer"), split.get("add_prefix_space")]
            unusual += ["SpecialToken" in str(after), after.get("cls")]  # put around each text
            unusual += [model.get("end_of_word_suffix"), model.get("continuing_subword_prefix")]
            unusual += [not split.get("use_regex", True), not isinstance(model.get("merges"), list)]
            plain = "only byte-level BPE; no normalizer, suffix, prefix space or begin token"
            check(usual and not any(unusual), f"{folder}/tokenizer.json: {plain}")
            vocabulary, merges = model["vocab"], model["merges"]
            added = {token["content"]: token["id"] for token in saved.get("added_tokens", [])}
        else:
            vocabulary, added = read_json(folder / "vocab.json"), {}
            lines = (folder / "merges.txt").read_text("utf-8").split("\n")
            merges = [line for line in lines[lines[0].startswith("#version") :] if line]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        # The files write each byte as a printable character: itself, or one of those from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        characters = dict(zip(map(chr, [*printable, *range(256, 512)]), [*printable, *others]))
        plain = dict.fromkeys([*characters, *map("".join, pairs)])
        # tiktoken needs all 256 bytes, and takes the ids for the merges' ranks.
        lacking = [token for token in plain if token not in vocabulary]
        check(not lacking, f"the vocabulary of {folder} lacks bytes or parts: {lacking[:5]}")
        ids = [vocabulary[token] for token in plain]
        check(ids[256:] == sorted(ids[256:]), f"the token ids of {folder} are not in merge order")
        for left, right in pairs:  # it joins any two parts that make a token, the lowest id first
            parts = [*left, *right]
            while len(parts) > 2:
                joined = [vocabulary.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
                i = joined.index(min(joined))
                parts[i : i + 2] = ["".join(parts[i : i + 2])]
            check(parts == [left, right], f"{folder}: tiktoken would not make {left + right} so")
        ranks = {bytes(characters[c] for c in token): i for token, i in zip(plain, ids)}
        special = {token: i for token, i in vocabulary.items() if token not in plain} | added
        twice = len(ids) + len(special) - len({*ids, *special.values()})
        check(twice == 0, f"{folder}: {twice} ids of the vocabulary belong to two tokens")
        # Where to cut a text before the merges begin: GPT-2's pattern.
        cut = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        return tiktoken.Encoding("", pat_str=cut, mergeable_ranks=ranks, special_tokens=special)


def token_ids(tokenizer):
    """{bytes: id} of all but special tokens: equal for tokenizers that read every text alike."""
    return {x: tokenizer.encode_single_token(x) for x in tokenizer.token_byte_values()}


def end_token(config, tokenizer):
    """The id of EOS: that of config.json, else that of <|endoftext|>."""
    known = config.eos_token_id is not None or "<|endoftext|>" in tokenizer.special_tokens_set
    check(known, "the model has no end of text: put its id into config.json as eos_token_id")
    return tokenizer.eot_token if config.eos_token_id is None else config.eos_token_id


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
    # As in TRL, special tokens are no text; nor is an id that belongs to no token, of which a model
    # may have some.
    keep = (mask > 0) & (tokens != eos_id) & np.isin(tokens, list(token_ids(tokenizer).values()))
    return [tokenizer.decode(row[kept].tolist()) for row, kept in zip(tokens, keep)]


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


if __name__ == "__main__":
    main(args)
