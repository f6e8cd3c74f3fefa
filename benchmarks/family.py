"""Times a DPO step, a GRPO update and a GRPO rollout against yardsticks in the same run.

    python benchmarks/family.py

The tiny shape of benchmarks/spine.py: 4 layers, 4 heads, width 128, 512 tokens, prompts of 16 and
responses of 48 tokens, float32. A DPO step has 64 pairs. A GRPO rollout has 16 prompts with 4
completions each, beside 64 prompts with one each (what sft.py and ppo.py sample); a GRPO update is
the reference's forward pass, the advantages and one optimizer step, with k3 in the loss. Gradients
are accumulated over micro-batches of the scripts' default sizes, 16 pairs and 32 completions.

Model FLOPs are 2 per parameter and token forwards and 4 backwards (the look-up of embeddings
apart), and 4 and 8 * layers * width * length per token for attention; the head counts only where
logits are computed. They are held against the machine's float32 matrix product.
"""

import jax
import jax.numpy as jnp
import numpy as np
from spine import BATCH, HEADS, LAYERS, NEW, PROMPT, VOCABULARY, WIDTH, alternate

import dpo
import grpo

GROUP = 4


def forward_flops(sequences, length, logits):
    """Of one forward pass; logits: at how many positions the head is computed."""
    blocks = sequences * length * (2 * 12 * LAYERS * WIDTH**2 + 4 * LAYERS * WIDTH * length)
    return blocks + sequences * logits * 2 * VOCABULARY * WIDTH


def main():
    config = grpo.GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS
    )
    dpo_config = dpo.GPT2Config(**vars(config))
    one = jnp.ones((1, 1), jnp.int32)
    params = jax.jit(grpo.GPT2(config).init)(jax.random.key(0), one, one)["params"]
    rng, length = np.random.default_rng(0), PROMPT + NEW
    prompts = rng.integers(1, VOCABULARY, (BATCH, PROMPT), dtype=np.int32)
    ones, key = np.ones_like(prompts), jax.random.key(0)

    def sample(prompts, mask, num_samples):
        return grpo.generate(params, config, prompts, mask, key, NEW, 1.0, -1, num_samples)

    few = slice(0, BATCH // GROUP)
    seconds = alternate(
        {
            "64 x 1": lambda: sample(prompts, ones, 1),
            "16 x 4": lambda: sample(prompts[few], ones[few], GROUP),
        }
    )
    for name, value in seconds.items():
        print(f"generate, {name}: {BATCH * NEW / value:.0f} tokens/s")
    print(f"time of 16 x 4 over that of 64 x 1: {seconds['16 x 4'] / seconds['64 x 1']:.2f}")

    dpo_args = dpo.Args(learning_rate=1e-3, nll_coef=0.0)
    dpo_optimizer, _ = dpo.make_optimizer(dpo_args, 1000)
    dpo_state = dpo.make_state(params, dpo_optimizer)
    pairs = rng.integers(1, VOCABULARY, (BATCH, 2, length), dtype=np.int32)
    response = np.broadcast_to(np.arange(length) >= PROMPT, pairs.shape).astype(np.int32)
    dpo_batch = {"tokens": pairs, "mask": np.ones_like(pairs), "response_mask": response}
    dpo_batch["ref_logprobs"] = dpo.pair_logprobs(params, dpo_batch, dpo_config)

    def dpo_step():
        nonlocal dpo_state
        step = (dpo_state, dpo_batch, dpo_config, dpo_optimizer, dpo_args)
        dpo_state, metrics = dpo.train_step(*step)
        return metrics

    args = grpo.Args(
        learning_rate=1e-3, num_generations=GROUP, epochs=1, num_minibatches=1, kl_in="loss"
    )
    optimizer, _ = grpo.make_optimizer(args, 1000)
    state = grpo.make_state(params, optimizer, False)
    tokens, mask, logprobs = sample(prompts[few], ones[few], GROUP)
    response_mask, ended = mask[:, PROMPT:].astype(jnp.float32), np.ones(BATCH, bool)
    scores = jnp.asarray(rng.standard_normal(BATCH), jnp.float32)

    def grpo_update():
        nonlocal state
        ref_logprobs = grpo.policy_logprobs(params, config, tokens, mask, PROMPT, 1.0)
        sampled = grpo.Rollout(tokens, mask, response_mask, logprobs, ref_logprobs, ended)
        batch, _ = grpo.make_experience(sampled, scores, args)
        state, metrics = grpo.train_step(state, batch, key, config, optimizer, args)
        return metrics

    matrix = jnp.asarray(rng.standard_normal((2048, 2048)), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    steps = {"dpo.train_step": dpo_step, "GRPO update": grpo_update}
    seconds = alternate(steps | {"matrix product": lambda: product(matrix)})
    peak = 2 * 2048**3 / seconds["matrix product"]
    flops = {
        "dpo.train_step": 3 * forward_flops(2 * BATCH, length, length),
        "GRPO update": 4 * forward_flops(BATCH, length, NEW + 1),
    }
    for name, count in flops.items():
        rate = count / seconds[name]
        print(
            f"{name}: {seconds[name] * 1e3:.0f} ms, {rate / 1e9:.0f} GFLOP/s, "
            f"{rate / peak:.1%} of the matrix product's {peak / 1e9:.0f}"
        )
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
