"""sharded.py on simulated devices: what one of them holds, and whether all meshes sample the same.

    python benchmarks/sharding.py memory           # GPT-2 from 124M to XL on 1 to 64 devices
    python benchmarks/sharding.py tokens MODEL     # a folder whose heads 8 divides

memory: train_step is compiled from shapes alone for fsdp = N; no weight is ever made. The figures
are compiled.memory_analysis()'s of one device, in MB (10^6 bytes). State is what the program takes
in and gives back in its place: float32 weights and AdamW's two moments, 12 bytes a parameter.
Temporary is what it needs besides, for one sequence of 256 tokens a device: mostly the gathered
weights and, on a CPU, where XLA splits it only after the sum, the gradient.

tokens: 20 times 256 reviews are sampled, 8 to a prompt, and held against those of one device.
"""

import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 64)

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sharded

SIZES = {  # layers, heads, width
    "124M": (12, 12, 768),
    "355M": (24, 16, 1024),
    "774M": (36, 20, 1280),
    "1.5B": (48, 25, 1600),
}
PROMPT, NEW = 128, 128


def place(x, sharding):
    """The shape of an array that lies on a mesh."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def compile_train_step(size, shape, rows):
    """(compiled train_step of so many rows, number of parameters) of a GPT-2 on a mesh."""
    layers, heads, width = SIZES[size]
    config = sharded.GPT2Config(n_layer=layers, n_head=heads, n_embd=width, remat=True)
    args = sharded.Args(
        batch_size=rows,
        micro_batch_size=rows,
        num_minibatches=1,
        epochs=1,
        max_completion_length=NEW,
    )
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    optimizer, _ = sharded.make_optimizer(args, 100)

    def new_state():
        one = jnp.ones((1, 1), jnp.int32)
        params = sharded.GPT2(config).init(jax.random.key(0), one, one)["params"]
        return sharded.make_state(params, optimizer, ref_moves=False)

    def new_batch():
        tokens = jnp.zeros((rows, PROMPT + NEW), jnp.int32)
        logprobs, scores = jnp.zeros((rows, NEW)), jnp.zeros(rows)
        shared = {"tokens": tokens, "mask": tokens, "response_mask": logprobs}
        return shared | {"logprobs": logprobs, "ref_logprobs": logprobs, "advantages": scores}

    state, batch, key = jax.eval_shape(lambda: (new_state(), new_batch(), jax.random.key(0)))
    by_rows = NamedSharding(mesh, sharded.BATCH)
    state = jax.tree.map(place, state, sharded.shardings(state, mesh))
    batch = jax.tree.map(lambda x: place(x, by_rows), batch)
    lowered = sharded.train_step.lower(state, batch, key, config, optimizer, args, mesh)
    return lowered.compile(), sum(x.size for x in jax.tree.leaves(state.params))


def memory_table():
    print("| GPT-2 | parameters | devices | state, MB | times devices | temporary, MB |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        for devices in (1, 2, 4, 8, 16, 32, 64):
            compiled, parameters = compile_train_step(size, (1, devices, 1), devices)
            memory = compiled.memory_analysis()
            state, temporary = memory.alias_size_in_bytes / 1e6, memory.temp_size_in_bytes / 1e6
            row = [size, f"{parameters / 1e6:.1f} M", devices, f"{state:.1f}"]
            row += [f"{state * devices:.0f}", f"{temporary:.0f}"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


def compare_tokens(folder):
    config, params = sharded.load_model(folder)
    tokenizer = sharded.load_tokenizer(folder)
    rows = sharded.read_jsonl("data/reviews/prompts_train.jsonl", ["prompt"])[:32]
    ids = [tokenizer.encode_ordinary(row["prompt"]) for row in rows]
    prompts = sharded.pad_rows(ids, 16, left=True)
    one_device = None
    for sizes in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)):
        devices = np.array(jax.devices()[: np.prod(sizes)])
        mesh = Mesh(devices.reshape(sizes), ("data", "fsdp", "tensor"))
        weights = jax.tree.map(sharded.put, params, sharded.shardings(params, mesh))
        by_rows = NamedSharding(mesh, sharded.BATCH)
        tokens, mask = (sharded.put(x, by_rows) for x in prompts)
        found = []
        for seed in range(20):
            key, sampling = jax.random.key(seed), (48, 1.0, tokenizer.eot_token, 8)
            given = (weights, weights, config, tokens, mask, key, sampling, mesh)
            sampled = sharded.sample_on_mesh(*given)
            found.append([np.asarray(x) for x in sampled])
        found = [np.concatenate(x) for x in zip(*found)]  # as in a Rollout
        one_device = one_device or found
        same = (found[0] == one_device[0]).all(axis=1)
        error = np.abs(found[3] - one_device[3])[same].max()
        print(f"{sizes}: {np.sum(~same)} of {len(same)} differ; log-probabilities by {error:.1e}")


def main():
    if sys.argv[1:2] == ["tokens"] and len(sys.argv) == 3:
        compare_tokens(sys.argv[2])
    else:
        memory_table()


if __name__ == "__main__":
    main()
