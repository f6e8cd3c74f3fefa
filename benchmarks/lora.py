"""What a training step of lora.py and of dpo.py needs, compiled ahead of time and not run.

    JAX_PLATFORMS=cpu python benchmarks/lora.py 124M 355M 774M 1.5B

GPT-2's shapes, 8 pairs of up to 256 tokens in micro-batches of 2. GB are 10^9 bytes: weights (what
the step reads and leaves as it is), state (what it trains, and Adam's moments), and what it needs
for a while, by XLA's memory_analysis(); and the FLOPs of a micro-batch, by its cost_analysis().
"merged" is lora.py with W + (alpha / r) A B formed in the step, in place of two small products.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

import dpo
import lora

SIZES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280)}
SIZES |= {"1.5B": (48, 25, 1600)}
PAIRS, MICRO, LENGTH = 8, 2, 256
TARGETS = {"c_attn": ("c_attn",), "all": ("c_attn", "c_proj", "c_fc")}
ATTACH = lora.attach


def compiled(script, config, shapes, targets=()):
    """The compiled train_step of a script, for parameters of these shapes."""
    flags = {"batch_size": PAIRS, "micro_batch_size": MICRO}
    batch = dict.fromkeys(["tokens", "mask", "response_mask"], (PAIRS, 2, LENGTH))
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in batch.items()}
    batch["ref_logprobs"] = jax.ShapeDtypeStruct((PAIRS, 2), jnp.float32)
    args = script.Args(**flags, **({"lora_targets": targets} if targets else {}))
    init = functools.partial(lora.init_adapter, args=args)
    trained = jax.eval_shape(init, shapes) if targets else shapes
    optimizer, _ = script.make_optimizer(args, 100)
    state = script.TrainState(trained, jax.eval_shape(optimizer.init, trained))
    more = (shapes,) if targets else ()
    return script.train_step.lower(state, batch, *more, config, optimizer, args).compile(), state


def report(name, script, config, shapes, targets=()):
    program, state = compiled(script, config, shapes, targets)
    memory, size = program.memory_analysis(), sum(x.size for x in jax.tree.leaves(state.params))
    weights = 4 * sum(x.size for x in jax.tree.leaves(shapes)) if targets else 0
    state = 4 * sum(x.size for x in jax.tree.leaves(state))
    parts = [x / 1e9 for x in (weights, state, memory.temp_size_in_bytes)]
    row = [name, f"{size / 1e6:.2f} M", *(f"{x:.2f}" for x in [*parts, sum(parts)])]
    flops = program.cost_analysis()["flops"] / 1e12
    print("| " + " | ".join([*row, f"{flops:.2f}"]) + " |", flush=True)


def merge_in_the_step(params, adapter, args):
    """In place of lora.attach: W + (alpha / r) A B."""
    lora.attach = ATTACH  # which merge calls
    merged = lora.merge(params, adapter, args)
    lora.attach = merge_in_the_step
    return merged


def main(sizes):
    print("| | trained | weights | state | for a while | in all | TFLOPs |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes or SIZES:
        layers, heads, width = SIZES[size]
        config = dpo.GPT2Config(n_layer=layers, n_head=heads, n_embd=width)
        one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        shapes = jax.eval_shape(dpo.GPT2(config).init, jax.random.key(0), one, one)["params"]
        report(f"{size}, `dpo.py`", dpo, config, shapes)
        for name, targets in TARGETS.items():
            report(f"{size}, `lora.py`, {name}", lora, config, shapes, targets)
        if size == "124M":
            lora.attach = merge_in_the_step
            jax.clear_caches()
            for name, targets in TARGETS.items():
                report(f"{size}, merged, {name}", lora, config, shapes, targets)
            lora.attach = ATTACH
            jax.clear_caches()


if __name__ == "__main__":
    main(sys.argv[1:])
