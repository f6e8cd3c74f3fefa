"""What one device holds under fsdp: GPT-2 from 124M to XL on 1 to 64 devices, compiled, not run.

    python benchmarks/sharding.py
    python benchmarks/sharding.py 124M 1.5B

sharded.py's train_step is compiled from shapes alone for a mesh of simulated devices; no weight is
ever made. The figures are compiled.memory_analysis()'s of one device, in MB (10^6 bytes). State is
what the program takes in and gives back in its place: float32 weights and AdamW's two moments,
12 bytes a parameter. Temporary is what it needs besides, for one sequence of 256 tokens a device:
mostly the gathered weights and, on a CPU, where XLA splits it only after the sum, the gradient.
"""

import sys

import jax

jax.config.update("jax_num_cpu_devices", 64)

import jax.numpy as jnp
import numpy as np
import spine  # noqa: F401  (puts the scripts on the path)
from jax.sharding import Mesh

import sharded

SIZES = {  # layers, heads, width
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1.5B": (48, 25, 1600),
}
PROMPT, NEW = 128, 128


def compile_train_step(size, devices):
    """(compiled train_step, number of parameters) of a GPT-2 on a mesh (1, devices, 1)."""
    layers, heads, width = SIZES[size]
    config = sharded.GPT2Config(n_layer=layers, n_head=heads, n_embd=width, remat=True)
    args = sharded.Args(
        batch_size=devices,
        micro_batch_size=devices,
        num_minibatches=1,
        epochs=1,
        max_completion_length=NEW,
    )
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, -1, 1), ("data", "fsdp", "tensor"))
    optimizer, _ = sharded.make_optimizer(args, 100)

    def new_state():
        one = jnp.ones((1, 1), jnp.int32)
        params = sharded.GPT2(config).init(jax.random.key(0), one, one)["params"]
        return sharded.make_state(params, optimizer, ref_moves=False)

    def new_batch():
        tokens = jnp.zeros((devices, PROMPT + NEW), jnp.int32)
        logprobs, scores = jnp.zeros((devices, NEW)), jnp.zeros(devices)
        shared = {"tokens": tokens, "mask": tokens, "response_mask": logprobs}
        return shared | {"logprobs": logprobs, "ref_logprobs": logprobs, "advantages": scores}

    state, batch, key = jax.eval_shape(lambda: (new_state(), new_batch(), jax.random.key(0)))
    _, _, train_step = sharded.jit_on_mesh(mesh, sharded.shardings(state, mesh))
    lowered = train_step.lower(state, batch, key, config, optimizer, args, mesh)
    return lowered.compile(), sum(x.size for x in jax.tree.leaves(state.params))


def main():
    print("| GPT-2 | parameters | devices | state, MB | times devices | temporary, MB |")
    print("|---|---|---|---|---|---|")
    for size in sys.argv[1:] or SIZES:
        for devices in (1, 2, 4, 8, 16, 32, 64):
            compiled, parameters = compile_train_step(size, devices)
            memory = compiled.memory_analysis()
            state, temporary = memory.alias_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
            row = [size, f"{parameters / 1e6:.1f} M", devices, f"{state:.1f}"]
            row += [f"{state * devices:.0f}", f"{temporary:.0f}"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
