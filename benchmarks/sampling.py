"""Three ways to draw a token: time, and how far each is from softmax in the tail.

    python benchmarks/sampling.py

The scripts draw a block of about sqrt(V) tokens and then one of its tokens, both by Gumbel noise
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
    """20 draws for each row: a loop inside jit, as sampling has it."""
    return jax.lax.fori_loop(
        0,
        20,
        lambda i, total: total + draw(jax.random.fold_in(key, i), logits),
        0 * logits[:, 0].astype(int),
    )


def share_of_last_tenth(draw, rows, repeats, vocabulary=50_257, head=0.99):
    """Of the draws from the tail of a distribution with one likely token, those of its last tenth.

    All tokens of the tail are equally likely, so 0.1 is right.
    """
    tail = jnp.full(vocabulary - 1, jnp.log((1 - head) / (vocabulary - 1)))
    logits = jnp.tile(jnp.append(jnp.log(head), tail), (rows, 1))
    sample = jax.jit(lambda key: draw(key, logits))
    last = in_tail = 0
    for i in range(repeats):
        tokens = sample(jax.random.key(i))
        in_tail += int((tokens > 0).sum())
        last += int((tokens > 0.9 * vocabulary).sum())
    return last / in_tail, in_tail


def main():
    print(jax.devices()[0].device_kind)
    on_cpu = jax.default_backend() == "cpu"
    sizes = ((64, 512), (128, 1264), (64, 50_257)) + ((512, 50_257),) * (not on_cpu)
    for rows, vocabulary in sizes:
        logits = jax.random.normal(jax.random.key(0), (rows, vocabulary)) * 3
        seconds = {name: [] for name in WAYS}
        for _ in range(4 if on_cpu else 11):
            for name, draw in WAYS.items():
                started = time.perf_counter()
                many(jax.random.key(1), logits, draw=draw).block_until_ready()
                seconds[name].append((time.perf_counter() - started) / 20)
        times = (f"{n} {1e3 * statistics.median(x[1:]):.3f} ms" for n, x in seconds.items())
        print(f"B {rows}, V {vocabulary}: {', '.join(times)}", flush=True)
    for name, draw in WAYS.items():
        share, count = share_of_last_tenth(draw, *((128, 100) if on_cpu else (4096, 250)))
        print(f"{name}: {share:.3f} of {count} draws from the tail are from its last tenth")


if __name__ == "__main__":
    main()
