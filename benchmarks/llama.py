"""grpo_llama.py: what a device holds of Qwen 3 and Llama 3.2, and sums for a small chat model.

    python benchmarks/llama.py memory              # four models on 1, 8 and 64 devices
    python benchmarks/llama.py sums FOLDER         # writes FOLDER/{train,test}.jsonl

memory: train_step is compiled from shapes alone for fsdp = N, with --remat, for one sequence of
PROMPT + NEW tokens a device; no weight is ever made. The figures, compiled.memory_analysis()'s,
are those of one device, in GB (10^9 bytes). State is what the program takes in and gives back:
float32 weights and AdamW's two moments, 12 bytes a parameter. Temporary is what it needs besides:
the gradient, and of weights and activations what is alive at once.

sums: "What is 7 + 12? Answer with the number only." as a dialogue, terms to 20; `number` is their
reward. No two numbers of a held-out question stand in one to train on, in that order.
"""

import dataclasses
import json
import random
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROMPT, NEW = 256, 256
# Of tools/memory.py's, which also knows what sampling takes, and which flags make a model fit.
MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-8B")


def number(prompts, completions, answer, **_):
    """1 where the last number of the answer is the sum, else 0."""
    texts = [x if isinstance(x, str) else x[-1]["content"] for x in completions]
    found = [re.findall(r"\d+", text)[-1:] for text in texts]
    return [float(numbers == [right]) for numbers, right in zip(found, answer)]


def write_sums(folder):
    """280 questions to train on and 120 others."""
    pairs = [(a, b) for a in range(1, 21) for b in range(1, 21)]
    random.Random(0).shuffle(pairs)
    for name, part in (("train", pairs[:280]), ("test", pairs[280:])):
        rows = []
        for a, b in part:
            question = f"What is {a} + {b}? Answer with the number only."
            rows.append({"prompt": [{"role": "user", "content": question}], "answer": str(a + b)})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def compile_train_step(size, devices):
    """(compiled train_step, number of parameters) of a model on a mesh (1, devices, 1)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding

    import grpo_llama
    from tools.memory import model_config

    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(1, -1, 1), ("data", "fsdp", "tensor"))
    config = model_config(grpo_llama, None, size)
    config = dataclasses.replace(config, dtype="bfloat16", remat=True, mesh=mesh)
    args = grpo_llama.Args(
        batch_size=devices,
        micro_batch_size=devices,
        num_minibatches=1,
        epochs=1,
        max_completion_length=NEW,
    )
    optimizer, _ = grpo_llama.make_optimizer(args, 100)

    def new_state():
        one = jnp.ones((1, 1), jnp.int32)
        params = grpo_llama.Llama(config).init(jax.random.key(0), one, one)["params"]
        return grpo_llama.make_state(params, optimizer, ref_moves=False)

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.eval_shape(new_state)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    state = jax.tree.map(place, state, grpo_llama.shardings(state, mesh))
    rows = {"tokens": (PROMPT + NEW, jnp.int32), "mask": (PROMPT + NEW, jnp.int32)}
    rows |= dict.fromkeys(["response_mask", "logprobs", "ref_logprobs"], (NEW, jnp.float32))
    rows["advantages"] = (None, jnp.float32)
    by_rows = NamedSharding(mesh, grpo_llama.BATCH)
    batch = {
        name: jax.ShapeDtypeStruct((devices, length) if length else (devices,), kind)
        for name, (length, kind) in rows.items()
    }
    batch = {name: place(x, by_rows) for name, x in batch.items()}
    given = (state, batch, jax.random.key(0), config, optimizer, args, mesh)
    return grpo_llama.train_step.lower(*given).compile(), count


def memory(models):
    """The table, line by line."""
    import jax

    jax.config.update("jax_num_cpu_devices", 64)
    print("model                    parameters  devices  state  temporary  together  compiled in")
    for size in models or MODELS:
        for devices in (1, 8, 64):
            started = time.perf_counter()
            compiled, count = compile_train_step(size, devices)
            used = compiled.memory_analysis()
            state, temporary = used.argument_size_in_bytes / 1e9, used.temp_size_in_bytes / 1e9
            seconds = time.perf_counter() - started
            row = f"{size:24} {count / 1e9:8.2f} B  {devices:7}  {state:5.1f}  {temporary:9.1f}"
            print(f"{row}  {state + temporary:8.1f}  {seconds:9.0f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        memory(sys.argv[2:])
    elif sys.argv[1:2] == ["sums"] and len(sys.argv) == 3:
        write_sums(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
