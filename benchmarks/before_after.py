"""Times the training steps and the sampler of two checkouts in one process, alternated.

    git worktree add ../before REVISION
    python benchmarks/before_after.py ../before .        # runs/sft, runs/reward: those of `make`

For a change that may cost speed: medians of both, and of the ratios pair by pair. Default batch and
micro-batch sizes of the scripts, prompts of 16 and responses of 48 random tokens, float32.
"""

import importlib.util
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROUNDS, BATCH, PROMPT, NEW = 8, 128, 16, 48


def load(checkout, name):
    """A checkout's script as a module of its own, beside the other checkout's."""
    path = Path(checkout).resolve() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name} of {path.parent}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def repeated(script, params, batch, *rest, **args):
    """A function that makes one more train_step; `rest` stands before the optimizer."""
    args = script.Args(**args)
    optimizer, _ = script.make_optimizer(args, 1000)
    more = {"ppo": (0.3,), "grpo": (False,)}.get(script.__name__.split()[0], ())
    state = script.make_state(params, optimizer, *more)

    def step():
        nonlocal state
        state, metrics = script.train_step(state, batch, *rest, optimizer, args)
        jax.block_until_ready(metrics)

    return step


def functions(checkout):
    """{what: function to time}."""
    sft, dpo, ppo, grpo = (load(checkout, name) for name in ("sft", "dpo", "ppo", "grpo"))
    config, policy = sft.load_model("runs/sft/model")
    critic_config, critic = ppo.load_model("runs/reward/model")
    configs = {script: script.GPT2Config(**vars(config)) for script in (dpo, ppo, grpo)}
    rng, key = np.random.default_rng(0), jax.random.key(0)
    tokens = rng.integers(1, config.vocab_size, (BATCH, PROMPT + NEW), dtype=np.int32)
    ones = np.ones_like(tokens)
    response = np.broadcast_to(np.arange(PROMPT + NEW) >= PROMPT, tokens.shape).astype(np.int32)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    texts = {"tokens": tokens[:32], "mask": ones[:32], "loss_mask": response[:32]}
    pairs = {"tokens": tokens, "mask": ones, "response_mask": response}
    pairs = {name: x.reshape(-1, 2, PROMPT + NEW) for name, x in pairs.items()}
    pairs["ref_logprobs"] = normal(BATCH // 2, 2)
    rollout = {"tokens": tokens, "mask": ones, "logprobs": normal(BATCH, NEW) - 5}
    values = {name: normal(BATCH, NEW) for name in ("values", "advantages", "returns")}
    group = {"response_mask": jnp.ones((BATCH, NEW)), "ref_logprobs": normal(BATCH, NEW) - 5}
    both = {"policy": policy, "critic": critic}
    ppo_configs = (configs[ppo], critic_config)
    return {
        "SFT step": repeated(sft, policy, texts, config),
        "DPO step": repeated(dpo, policy, pairs, configs[dpo]),
        "PPO step": repeated(ppo, both, rollout | values, key, ppo_configs),
        "GRPO step": repeated(
            grpo, policy, rollout | group | {"advantages": normal(BATCH)}, key, configs[grpo]
        ),
        "sampling": lambda: jax.block_until_ready(
            sft.generate(policy, config, tokens[:, :PROMPT], ones[:, :PROMPT], key, NEW, 1.0, -1)
        ),
    }


def main(before, after):
    before, after = functions(before), functions(after)
    for what in before:
        seconds = {before[what]: [], after[what]: []}
        for i in range(ROUNDS + 1):
            for function in list(seconds)[:: 1 if i % 2 else -1]:
                started = time.perf_counter()
                function()
                seconds[function].append(time.perf_counter() - started)
        first, second = (times[1:] for times in seconds.values())  # the first round compiles
        ratio = statistics.median(y / x for x, y in zip(first, second))
        medians = [f"{statistics.median(times) * 1e3:.1f} ms" for times in (first, second)]
        print(f"{what}: {medians[0]} before, {medians[1]} after, ratio {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
