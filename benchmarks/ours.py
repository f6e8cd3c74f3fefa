"""Whole steps of the scripts, for run.py: each builder returns a function that makes one.

A step is what the loop of the script's main does with one batch, without logging and evaluation;
micro-batches have the script's default size, or `micro`. Without a `dtype` products are in float32.
"""

import itertools
import sys
from pathlib import Path

from work import GROUP, LEARNING_RATE, PPO_EPOCHS, PRODUCT, reward, serve

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # in front: benchmarks/ has a mixed_precision.py, too

import jax
import jax.numpy as jnp

import dpo as dpo_script
import grpo as grpo_script
import mixed_precision as mixed_precision_script
import ppo as ppo_script
import reward as reward_script
import sft as sft_script

KEY = jax.random.key(0)


def initial(script, shape, module="GPT2", **flags):
    """(config, parameters); no token is EOS, so that no response ends early."""
    config = script.GPT2Config(**shape.model, eos_token_id=-1, **flags)
    one = jnp.ones((1, 1), jnp.int32)
    return config, jax.jit(getattr(script, module)(config).init)(KEY, one, one)["params"]


def arguments(script, shape, micro=None, **more):
    """Args of the script; without `micro`, its default micro-batch cut to the batch."""
    micro = min(micro or script.Args().micro_batch_size, shape.batch)
    lengths = {"max_prompt_length": shape.prompt, "max_completion_length": shape.new}
    flags = {"learning_rate": LEARNING_RATE, "batch_size": shape.batch} | lengths | more
    return script.Args(**flags, micro_batch_size=micro)


def repeated(script, params, config, args, new_batch, *more):
    """A function that makes one more train_step, on new_batch()."""
    optimizer, _ = script.make_optimizer(args, 10_000)
    state = script.make_state(params, optimizer, *more)

    def step():
        nonlocal state
        state, metrics = script.train_step(state, new_batch(), config, optimizer, args)
        jax.device_get(metrics)

    step.micro = args.micro_batch_size
    return step


def sampling(shape, prompts=None, num_samples=1, dtype="float32"):
    config, params = initial(sft_script, shape, dtype=dtype)
    tokens = shape.tokens(prompts or shape.batch, shape.prompt)
    mask, steps = jnp.ones_like(tokens), itertools.count()

    def step():
        key = jax.random.fold_in(KEY, next(steps))
        sampled = sft_script.generate(
            params, config, tokens, mask, key, shape.new, 1.0, -1, num_samples
        )
        jax.block_until_ready(sampled)

    return step


def texts(shape, answers):
    """Rows [[prompt, answer, …], …] of token ids, as encode_rows makes them."""
    prompts = shape.tokens(shape.batch, shape.prompt).tolist()
    completions = shape.tokens(shape.batch, answers, shape.new).tolist()
    return [[prompt, *rest] for prompt, rest in zip(prompts, completions)]


def sft(shape, script=sft_script, more=(), micro=None, dtype="float32"):
    config, params = initial(script, shape, dtype=dtype)
    args, rows = arguments(script, shape, micro), texts(shape, 1)

    def new_batch():
        return script.make_batch(rows, shape.length, train_on_prompt=True)

    return repeated(script, params, config, args, new_batch, *more)


def mixed_precision(shape, micro=None, dtype="bfloat16"):
    script = mixed_precision_script
    return sft(shape, script, (float(script.Args().loss_scale),), micro, dtype)


def reward_model(shape):
    config, params = initial(reward_script, shape, "RewardModel")
    args, rows, margins = arguments(reward_script, shape), texts(shape, 2), [0.0] * shape.batch

    def new_batch():
        return reward_script.make_batch(rows, shape.length, margins)

    return repeated(reward_script, params, config, args, new_batch)


def dpo(shape, cached, micro=None, dtype="float32"):
    config, params = initial(dpo_script, shape, dtype=dtype)
    args, rows = arguments(dpo_script, shape, micro, nll_coef=0.0), texts(shape, 2)
    pairs = dpo_script.make_batch(rows, shape.length)
    known = jax.device_get(dpo_script.pair_logprobs(params, pairs, config)) if cached else None

    def new_batch():
        batch = dpo_script.make_batch(rows, shape.length)
        logprobs = known if cached else dpo_script.pair_logprobs(params, batch, config)
        return batch | {"ref_logprobs": logprobs}

    return repeated(dpo_script, params, config, args, new_batch)


def sampler(script, shape, config, args, num_samples, rewards):
    """f(policy, reference, key) -> (Rollout, rewards), as in main of ppo.py and grpo.py."""
    tokenizer = script.load_tokenizer(ROOT / "data" / "reviews" / "tokenizer")  # 512 ids and more
    ids = shape.tokens(shape.batch // num_samples, shape.prompt).tolist()
    prompts = [({"prompt": ""}, [prompt]) for prompt in ids]

    def sample(policy, ref_params, key):
        models = (policy, ref_params, config, tokenizer)
        sampled, rows, texts = script.rollout(*models, prompts, num_samples, key, args)
        scores = script.score(sampled, rows, texts, rewards, args)
        script.describe(sampled, rows, texts, scores)
        return sampled, scores["reward"]

    return sample


def grpo(shape, micro=None, dtype="float32"):
    script = grpo_script
    config, ref_params = initial(script, shape, dtype=dtype)
    flags = {"kl_in": "loss", "advantage": "group-std", "aggregation": "sequence"}
    flags |= {"num_generations": GROUP, "epochs": 1, "num_minibatches": 1}
    args = arguments(script, shape, micro, **flags)
    rewards = script.Rewards([("reward", reward, 1.0)], None, None)
    sample = sampler(script, shape, config, args, GROUP, rewards)
    optimizer, _ = script.make_optimizer(args, 10_000)
    state, steps = script.make_state(ref_params, optimizer, False), itertools.count()

    def step():
        nonlocal state
        keys = jax.random.split(jax.random.fold_in(KEY, next(steps)))
        sampled, scores = sample(state.params, ref_params, keys[0])
        batch, metrics = script.make_experience(sampled, scores, args)
        state, more = script.train_step(state, batch, keys[1], config, optimizer, args)
        jax.device_get(metrics | more)

    step.micro = args.micro_batch_size
    return step


def ppo(shape, micro=None, dtype="float32"):
    script = ppo_script
    config, ref_params = initial(script, shape, dtype=dtype)
    critic_config, critic = initial(script, shape, "RewardModel", dtype=dtype)
    args = arguments(script, shape, micro, epochs=PPO_EPOCHS, num_minibatches=1)
    rewards = script.Rewards([], (critic_config, critic), None)
    sample = sampler(script, shape, config, args, 1, rewards)
    optimizer, _ = script.make_optimizer(args, 10_000)
    params = {"policy": ref_params, "critic": critic}
    state, steps = script.make_state(params, optimizer, args.kl_coef), itertools.count()
    configs = (config, critic_config)

    def step():
        nonlocal state
        keys = jax.random.split(jax.random.fold_in(KEY, next(steps)))
        sampled, scores = sample(state.params["policy"], ref_params, keys[0])
        batch, metrics = script.make_experience(state, sampled, scores, critic_config, args)
        state, more = script.train_step(state, batch, keys[1], configs, optimizer, args)
        jax.device_get(metrics | more)

    step.micro = args.micro_batch_size
    return step


def product(shape, dtype, size=PRODUCT):
    """The machine's matrix product, summed in float32: the peak that shares are taken of."""
    x = jax.random.normal(KEY, (size, size)).astype(dtype)
    multiply = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    return lambda: jax.block_until_ready(multiply(x))


def device_peak():
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


if __name__ == "__main__":
    serve(
        {
            "sampling": sampling,
            "sft": sft,
            "mixed_precision": mixed_precision,
            "reward": reward_model,
            "dpo": dpo,
            "grpo": grpo,
            "ppo": ppo,
            "product": product,
        },
        device_peak=device_peak,
    )
