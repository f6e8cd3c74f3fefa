"""Times sampling and one SFT step against yardsticks in the same run, alternating with them.

    pip install torch transformers          # for the comparison with generate(); optional
    python benchmarks/spine.py

The tiny shape: 4 layers, 4 heads, width 128, 512 tokens, batch 64, float32. Sampling reads 16
tokens and writes 48 (no row ends early), against transformers' generate(); the step trains on
64 x 64 tokens, against the machine's float32 matrix product. Model FLOPs are 6 per parameter and
token (the look-up of embeddings apart), and 12 * layers * width * length per token for attention.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sft

ROUNDS = 15
VOCABULARY, LAYERS, HEADS, WIDTH, BATCH, PROMPT, NEW = 512, 4, 4, 128, 64, 16, 48


def alternate(functions):
    """{name: median seconds}; every function once in a round, after one round that compiles."""
    times = {name: [] for name in functions}
    for _ in range(ROUNDS + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def hugging_face_sampler(prompts):
    """A function that samples with transformers, or None where that is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "vocab_size": VOCABULARY}
    config = transformers.GPT2Config(n_positions=128, bos_token_id=0, eos_token_id=0, **sizes)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.tensor(prompts.astype(np.int64))
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}

    def sample():
        with torch.no_grad():
            mask = torch.ones_like(tokens)
            model.generate(tokens, attention_mask=mask, do_sample=True, top_k=0, **length)

    return sample


def main():
    config = sft.GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS
    )
    one = jnp.ones((1, 1), jnp.int32)
    params = jax.jit(sft.GPT2(config).init)(jax.random.key(0), one, one)["params"]
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, VOCABULARY, (BATCH, PROMPT), dtype=np.int32)
    mask = np.ones_like(prompts)
    samplers = {
        "sft.generate": lambda: sft.generate(
            params, config, prompts, mask, jax.random.key(0), NEW, 1.0, -1
        )
    }
    if peer := hugging_face_sampler(prompts):
        samplers["transformers.generate"] = peer
    seconds = alternate(samplers)
    for name, value in seconds.items():
        print(f"{name}: {BATCH * NEW / value:.0f} tokens/s")
    if peer:
        ratio = seconds["transformers.generate"] / seconds["sft.generate"]
        print(f"ratio: {ratio:.2f}")

    length = PROMPT + NEW
    tokens = rng.integers(1, VOCABULARY, (BATCH, length), dtype=np.int32)
    batch = {name: np.ones_like(tokens) for name in ("mask", "loss_mask")} | {"tokens": tokens}
    args = sft.Args(learning_rate=1e-3)
    optimizer, _ = sft.make_optimizer(args, 1000)
    state = sft.make_state(params, optimizer)

    def step():
        nonlocal state
        state, metrics = sft.train_step(state, batch, config, optimizer, args)
        return metrics

    matrix = jnp.asarray(rng.standard_normal((2048, 2048)), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    seconds = alternate({"sft.train_step": step, "matrix product": lambda: product(matrix)})
    parameters = 12 * LAYERS * WIDTH**2 + VOCABULARY * WIDTH
    flops = BATCH * length * (6 * parameters + 12 * LAYERS * WIDTH * length)
    rate, peak = flops / seconds["sft.train_step"], 2 * 2048**3 / seconds["matrix product"]
    print(
        f"sft.train_step: {BATCH * length / seconds['sft.train_step']:.0f} tokens/s, "
        f"{rate / 1e9:.0f} GFLOP/s, {rate / peak:.1%} of the matrix product's {peak / 1e9:.0f}"
    )
    print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
