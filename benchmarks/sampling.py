"""Three ways to draw a token: time, and how far each is from softmax in the tail.

    python benchmarks/sampling.py

The scripts draw a block of 256 tokens and then one of its tokens, both by Gumbel noise
(draw_token). Beside it stand jax.random.categorical, Gumbel noise for every token, and the inverse
of the distribution function, one uniform number a row. All run inside one jit, in turn, on logits
of a normal distribution.
"""

import functools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpt2


def inverse(key, logits):
    """The first token whose cumulative probability is above a uniform number."""
    cumulative = jnp.cumsum(jax.nn.softmax(logits), axis=-1)
    uniform = jax.random.uniform(key, (len(logits), 1)) * cumulative.max(axis=-1, keepdims=True)
    return jnp.argmax(cumulative > uniform, axis=-1)


WAYS = {"block, then token": gpt2.draw_token, "categorical": jax.random.categorical}
WAYS |= {"inverse": inverse}


@functools.partial(jax.jit, static_argnames="draw")
def many(key, logits, draw):
    """100 draws for each row: a loop inside jit, as sampling has it."""
    return jax.lax.fori_loop(
        0,
        100,
        lambda i, total: total + draw(jax.random.fold_in(key, i), logits),
        0 * logits[:, 0].astype(int),
    )


def never_drawn(draw, vocabulary=50_257, head=0.99, rows=4096, repeats=250):
    """Share of the tail's draws that fall on the last tenth of it; without a fault it is 0.1."""
    tail = jnp.full(vocabulary - 1, jnp.log((1 - head) / (vocabulary - 1)))
    logits = jnp.tile(jnp.append(jnp.log(head), tail), (rows, 1))
    sample = jax.jit(lambda key: draw(key, logits))
    last = in_tail = 0
    for i in range(repeats):
        tokens = sample(jax.random.key(i))
        in_tail += int((tokens > 0).sum())
        last += int((tokens > 0.9 * vocabulary).sum())
    return last / in_tail


def main():
    print(jax.devices()[0].device_kind)
    for rows, vocabulary in ((64, 512), (128, 1264), (64, 50_257), (512, 50_257)):
        logits = jax.random.normal(jax.random.key(0), (rows, vocabulary)) * 3
        seconds = {name: [] for name in WAYS}
        for _ in range(6):
            for name, draw in WAYS.items():
                started = time.perf_counter()
                many(jax.random.key(1), logits, draw=draw).block_until_ready()
                seconds[name].append((time.perf_counter() - started) / 100)
        times = "  ".join(
            f"{n} {1e3 * statistics.median(x[1:]):.3f} ms" for n, x in seconds.items()
        )
        print(f"B {rows}, V {vocabulary}: {times}", flush=True)
    repeats = 250 if jax.default_backend() != "cpu" else 20
    for name, draw in WAYS.items():
        print(
            f"{name}: {never_drawn(draw, repeats=repeats):.3f} of the tail is its last tenth",
            flush=True,
        )


if __name__ == "__main__":
    main()
