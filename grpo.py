"""GRPO: a language model learns from rewards, compared within a group.

Shao et al. 2024, "DeepSeekMath", section 4. Each step: (1) sample
num_generations completions to each prompt, (2) score them, (3) take off the
KL penalty, (4) advantages: a reward less its group's mean, the same at every
token, in place of ppo.py's critic, (5) go over the batch `epochs` times.

    GRPO (Shao et al. 2024)
        --advantage group-std --aggregation sequence --kl-in loss
    Dr. GRPO (Liu et al. 2025)
        --advantage group --aggregation constant --kl-coef 0
    DAPO (Yu et al. 2025)
        --advantage group-std --aggregation token --clip-eps-high 0.28
        --kl-coef 0 --mask-truncated-completions --oversample 3
        --reward YOURS --reward rewards.py:soft_overlong_punishment
    GSPO (Zheng et al. 2025), without its KL
        --advantage group-std --aggregation sequence --ratio-level sequence
        --clip-eps 3e-4 --clip-eps-high 4e-4 --kl-coef 0
    RLOO (Ahmadian et al. 2024)
        --advantage leave-one-out --epochs 1 --num-minibatches 1
    pass@k of held-out prompts (Chen et al. 2021)
        --eval-generations 16

The defaults are Dr. GRPO's with k1 in the reward: its on-policy gradient is
that of E[r] - kl_coef * KL, as in ppo.py. k3 in the loss has another fixed
point (tests/test_optimum.py). With one update a rollout the loss stays near 0
while its gradient does not: a group's advantages sum to 0.

    python grpo.py      # runs/sft/model, runs/reward/model, embedded prompts
    python grpo.py --model gpt2 --dataset prompts.jsonl --reward rewards.py:f

With the defaults it takes about 80 s on two CPU cores; results: README.md.
Compare: diff ppo.py grpo.py.
"""

import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import tyro


@dataclass(frozen=True)
class Args:
    model: str = "runs/sft/model"  # folder or hub name: the policy's start, and the reference
    # folder of a learned reward, added to --reward; with neither given: runs/reward/model
    reward_model: str | None = None
    # file.py:function, f(prompts, completions, **columns) -> scores; repeatable
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # one for each --reward, in the same order; default 1
    reward_weight: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    # file.py:function, a ground truth that is only logged; default: that of the embedded data
    gold: str | None = None
    dataset: str = "data/reviews/prompts_train.jsonl"  # JSON Lines (or .gz) with prompt
    # held out; the first 256; default: the embedded test file, or the end of --dataset
    eval_dataset: str | None = None
    run_dir: str = "runs/grpo"  # where metrics, samples, checkpoint and model go
    resume: bool = False  # go on from the checkpoint in run_dir; a finished run stays as it is
    overwrite: bool = False  # replace the run in run_dir
    seed: int = 0  # seeds the order of the prompts, the minibatches and the samples
    steps: int = 100  # rollouts, each followed by epochs * num_minibatches updates
    batch_size: int = 128  # completions in one rollout
    num_generations: int = 8  # completions to one prompt: a group
    oversample: int = 1  # times as many groups are sampled, to replace those without a spread
    epochs: int = 2  # passes over a rollout
    num_minibatches: int = 2  # updates in one pass
    micro_batch_size: int = 32  # sequences in one forward and backward pass of an update
    rollout_batch_size: int | None = None  # completions sampled and scored at once; none: all
    learning_rate: float = 3e-4  # peak; it falls linearly to 0
    warmup_steps: int = 8  # updates in which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW's, on matrices
    max_grad_norm: float = 1.0  # the gradient is scaled down to this global norm
    kl_coef: float = 0.3  # weight of the KL penalty
    kl_in: Literal["reward", "loss"] = "reward"  # a sequence's k1 in its reward, or k3 in the loss
    # reward minus the group's mean; that divided by the group's std; reward minus the others' mean
    advantage: Literal["group", "group-std", "leave-one-out"] = "group"
    # sequence: mean of the sequences' token means; token: mean over all tokens; constant: the sum
    # divided by sequences * max_completion_length
    aggregation: Literal["sequence", "token", "constant"] = "constant"
    # token: each token's ratio is clipped; sequence: the geometric mean over the completion
    ratio_level: Literal["token", "sequence"] = "token"
    clip_eps: float = 0.2  # the ratio is clipped to 1 - clip_eps … 1 + clip_eps
    clip_eps_high: float | None = None  # the upper bound is 1 + clip_eps_high; none: clip_eps
    entropy_coef: float = 0.0  # weight of a bonus for the policy's entropy per token
    ref_sync_steps: int | None = None  # steps between moves of the reference; none: it stays
    # the new reference is alpha * policy + (1 - alpha) * the old one; objective/kl is to it
    ref_mixup_alpha: float = 1.0
    missing_eos_penalty: float = 1.0  # taken off the score of a completion that does not end
    mask_truncated_completions: bool = False  # learn nothing from a completion that does not end
    max_prompt_length: int = 16  # tokens; a row with a longer prompt is dropped
    max_completion_length: int = 48  # tokens, EOS included
    remat: bool = False  # recompute activations in the backward pass: slower, less memory
    temperature: float = 1.0  # of sampling, and of every log-probability
    log_every: int = 1  # steps between lines in metrics.jsonl
    eval_every: int = 20  # steps between evaluations on the held-out prompts
    eval_generations: int = 1  # completions to each held-out prompt; from 2 on pass@k is logged
    keep_best: str | None = None  # as gold/reward: the model with the highest goes to best/, too
    save_every: int = 10  # steps between checkpoints


# Parsed before JAX is imported, so that --help answers at once (linters call it E402). Indented,
# because tyro joins lines that begin with a letter.
if __name__ == "__main__":
    args = tyro.cli(Args, description=textwrap.indent(__doc__, " "))
    sys.stdout.reconfigure(errors="replace")  # a console need not know every character
    # What JAX compiles is kept for the next run; JAX_ENABLE_COMPILATION_CACHE=0 turns that off.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import atexit
import contextlib
import dataclasses
import fcntl
import functools
import gzip
import importlib.util
import itertools
import json
import math
import shutil
import signal
import time
import traceback
import zlib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.flax
import tiktoken
from flax.traverse_util import flatten_dict, unflatten_dict
from huggingface_hub import snapshot_download
from rich.progress import Progress
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import hparams, scalar

# ------------------------------------------------------------------------------------------ losses


def grpo_loss(
    logprobs,
    old_logprobs,
    ref_logprobs,
    advantages,
    mask,
    clip_low,
    clip_high,
    kl_coef,
    aggregation,
    ratio_level,
    max_length,
    entropy_bonus=0.0,
):
    """Group-relative policy optimization (Shao et al. 2024, eq. 3), as a loss.

    logprobs, old_logprobs, ref_logprobs, entropy_bonus, mask [B, R]; advantages [B]. For each token
    max(-A * ratio, -A * clip(ratio, 1 - clip_low, 1 + clip_high)) + kl_coef * k3 - entropy_bonus,
    k3 = exp(d) - 1 - d, d = log pi_ref - log pi. clip_high > clip_low is DAPO's "clip-higher".

    ratio_level "token": pi / pi_old of each token; "sequence": their geometric mean over the
    sequence (Zheng et al. 2025, "GSPO", eq. 7).
    aggregation "sequence": the mean over sequences of their tokens' mean (GRPO); "token": the mean
    over all tokens (Yu et al. 2025, "DAPO"); "constant": the sum over B * max_length (Dr. GRPO).
    Under jax.jit these two are static_argnames=("aggregation", "ratio_level").
    """
    assert logprobs.shape == old_logprobs.shape == ref_logprobs.shape == mask.shape
    assert advantages.shape == mask.shape[:1], (advantages.shape, mask.shape)

    def mean(x):
        return jnp.sum(x * mask) / jnp.maximum(mask.sum(), 1)

    lengths = jnp.maximum(mask.sum(axis=1), 1)  # [B]
    log_ratio = (logprobs - old_logprobs) * mask
    if ratio_level == "sequence":
        log_ratio = log_ratio.sum(axis=1, keepdims=True) / lengths[:, None]  # [B, 1]
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    advantages = advantages[:, None]  # [B, 1]
    policy_losses = jnp.maximum(-advantages * ratio, -advantages * clipped)
    difference = jnp.minimum((ref_logprobs - logprobs) * mask, 20.0)  # one token must not overflow
    k3 = jnp.expm1(difference) - difference  # exp(d) - 1 would round away what is left near 0
    losses = (policy_losses + kl_coef * k3 - entropy_bonus) * mask  # [B, R]
    if aggregation == "sequence":
        loss = jnp.mean(losses.sum(axis=1) / lengths)
    elif aggregation == "token":
        loss = mean(losses)
    else:
        loss = losses.sum() / (len(mask) * max_length)
    is_low = (ratio < 1 - clip_low) & (advantages < 0)  # [B, R], or [B, 1]
    is_high = (ratio > 1 + clip_high) & (advantages > 0)
    return loss, {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": 0.5 * mean(log_ratio**2),  # k2, an estimate of KL(old || new)
        "policy/clipfrac_avg": mean(is_low | is_high),
        "clip_ratio/low_mean": mean(is_low),
        "clip_ratio/high_mean": mean(is_high),
        "val/ratio": mean(ratio),
        "kl": mean(k3),
    }


def compute_kl_divergence(logprobs, ref_logprobs):
    """k1 = log pi - log pi_ref of each sampled token [B, R]; its mean under pi is KL(pi || pi_ref).

    For a penalty inside the reward, which is not differentiated, k1 is right: the policy gradient
    of -k1 is that of -KL, and k3 = exp(-k1) - 1 + k1 would be biased there. In a loss it is useless
    (the mean of its gradient is 0); there k3 is common, whose gradient is that of the other
    direction, KL(pi_ref || pi). Schulman 2020, "Approximating KL divergence".
    """
    assert logprobs.shape == ref_logprobs.shape, (logprobs.shape, ref_logprobs.shape)
    return logprobs - ref_logprobs


def group_relative_advantage(rewards, group_size, scale=True, eps=1e-4):
    """GRPO's advantage (Shao et al. 2024, section 4.1.2): [B] -> [B], rows group by group.

    (r - mean of its group) / (std of its group + eps), the std with Bessel's correction, as in TRL.
    scale=False leaves the division out (Liu et al. 2025, "Dr. GRPO"): it weighs prompts by how
    much their rewards agree. The mean includes r itself, so the advantage is (G - 1) / G of
    leave_one_out_advantage's. A reward of NaN is none: its advantage is 0, and it moves no other.
    """
    assert group_size > 1 and rewards.ndim == 1, (rewards.shape, group_size)
    groups = rewards.reshape(-1, group_size)  # [B / G, G]
    groups = groups - jnp.nanmax(groups, axis=1, keepdims=True)  # equal rewards: exactly 0
    advantages = groups - jnp.nanmean(groups, axis=1, keepdims=True)
    if scale:
        advantages = advantages / (jnp.nanstd(groups, axis=1, ddof=1, keepdims=True) + eps)
    return jnp.nan_to_num(advantages).reshape(-1)


def leave_one_out_advantage(rewards, group_size):
    """RLOO (Ahmadian et al. 2024): r less the mean of the others of its group; [B].

    The baseline knows nothing of r itself, so the gradient is not biased, not even in scale.
    """
    advantages = group_relative_advantage(rewards, group_size, scale=False)
    counts = jnp.sum(~jnp.isnan(rewards.reshape(-1, group_size)), axis=1)  # [B / G]
    return advantages * jnp.repeat(counts / jnp.maximum(counts - 1, 1), group_size)


def dynamic_sampling(scores, group_size, num_groups):
    """DAPO's dynamic sampling (Yu et al. 2025, eq. 11): (rows to learn from, counts of groups).

    scores [N], group by group. Of the first num_groups groups, those whose scores are all equal
    are replaced by later ones with a spread, as far as there are any: shapes stay static. A score
    of NaN is none.
    """
    groups = scores.reshape(-1, group_size)  # [N / G, G]
    flat = ~(jnp.nanmax(groups, axis=1) > jnp.nanmin(groups, axis=1))
    kept = jnp.sort(jnp.argsort(flat, stable=True)[:num_groups])  # those with a spread come first
    rows = kept[:, None] * group_size + jnp.arange(group_size)  # [num_groups, G]
    counts = {"groups/replaced": jnp.sum(kept >= num_groups), "groups/zero_std": flat[kept].sum()}
    return rows.reshape(-1), counts


def masked_mean(x, mask):
    """Mean of x over the places where mask is 1; 0 where there are none."""
    return jnp.sum(x * mask) / jnp.maximum(mask.sum(), 1)


# ------------------------------------------------------------------------------------------ update


class TrainState(NamedTuple):
    """What one step hands to the next, and all that a checkpoint holds."""

    params: dict
    opt_state: optax.OptState
    ref_params: dict | None  # of a reference that moves


def make_state(params, optimizer, ref_moves):
    """A fresh state with its own copy of `params`: train_step donates the buffers of its state."""
    params = jax.tree.map(jnp.copy, params)
    ref_params = jax.tree.map(jnp.copy, params) if ref_moves else None
    return TrainState(params, jax.jit(optimizer.init)(params), ref_params)


def token_entropies(logits):
    """Entropy of the distribution at each position: [..., V] -> [...]."""
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jax.nn.softmax(logits) * logits, axis=-1)


@functools.partial(
    jax.jit, static_argnames=("config", "optimizer", "args"), donate_argnames="state"
)
def train_step(state, batch, key, config, optimizer, args):
    """5. Makes epochs * num_minibatches updates on make_experience's batch: (state, metrics)."""
    size, response_length = batch["logprobs"].shape
    prompt_length = batch["tokens"].shape[1] - response_length
    clip_high = args.clip_eps if args.clip_eps_high is None else args.clip_eps_high

    def logprobs_and_entropies(logits, tokens):
        # A metric alone need not be differentiated.
        of_entropy = logits if args.entropy_coef else jax.lax.stop_gradient(logits)
        return token_logprobs(logits, tokens), token_entropies(of_entropy)

    def loss_fn(params, batch):
        tokens, mask = batch["tokens"], batch["mask"]
        model = (params, config, tokens, mask, prompt_length, args.temperature)
        logprobs, entropies = read_response(logprobs_and_entropies, *model)
        loss, metrics = grpo_loss(
            logprobs,
            batch["logprobs"],
            batch["ref_logprobs"],
            batch["advantages"],
            batch["response_mask"],
            clip_low=args.clip_eps,
            clip_high=clip_high,
            kl_coef=args.kl_coef if args.kl_in == "loss" else 0.0,
            aggregation=args.aggregation,
            ratio_level=args.ratio_level,
            max_length=response_length,
            entropy_bonus=args.entropy_coef * entropies,
        )
        entropy = masked_mean(entropies, batch["response_mask"])
        return loss, metrics | {"policy/entropy_avg": entropy}

    def update(state, rows):
        minibatch = jax.tree.map(lambda x: x[rows], batch)
        tokens = minibatch["response_mask"].sum(axis=1)  # [B / num_minibatches]
        counts = tokens if args.aggregation == "token" else jnp.ones_like(tokens)
        (loss, metrics), grads = accumulate_gradients(
            loss_fn, state.params, minibatch, counts, args.micro_batch_size, metric_counts=tokens
        )
        # The loss may be a mean over sequences, the other metrics are means over tokens.
        metrics |= {"loss/policy_avg": loss, "grad_norm": optax.tree.norm(grads)}
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.ref_params), (metrics, tokens.sum())

    keys = jax.random.split(key, args.epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, size))(keys)  # [epochs, B]
    order = order.reshape(args.epochs * args.num_minibatches, -1)
    state, (metrics, weights) = jax.lax.scan(update, state, order)
    weights = weights / jnp.maximum(weights.sum(), 1)  # all 0 where every completion is masked
    return state, {name: jnp.sum(weights * x) for name, x in metrics.items()}


# ----------------------------------------------------------------------------------------- rollout


class Rollout(NamedTuple):
    """Completions, group by group; P + R tokens, R of them the response's."""

    tokens: jax.Array  # [N, P + R]
    mask: jax.Array  # [N, P + R], 1 = real token
    response_mask: jax.Array  # [N, R], 1 up to and including EOS
    logprobs: jax.Array  # [N, R], under the policy that sampled
    ref_logprobs: jax.Array  # [N, R], under the reference
    ended: jax.Array  # [N], whether with EOS


def rollout(params, ref_params, config, tokenizer, prompts, num_samples, key, args):
    """1. Sample completions to encode_rows' prompts: (Rollout, their rows, their texts), N each."""
    P, eos_id = args.max_prompt_length, config.eos_token_id
    tokens, mask = pad_rows([ids[0] for _, ids in prompts], P, left=True)  # [B, P]
    sampling = (args.max_completion_length, args.temperature, eos_id, num_samples)

    def sample(tokens, mask, numbers):
        own_key = jax.random.fold_in(key, numbers[0]) if numbers[0] else key
        tokens, mask, logprobs = generate(params, config, tokens, mask, own_key, *sampling)
        ref_logprobs = policy_logprobs(ref_params, config, tokens, mask, P, args.temperature)
        return tokens, mask, logprobs, ref_logprobs

    size = args.rollout_batch_size and args.rollout_batch_size // num_samples  # prompts at once
    found = in_parts(sample, size, tokens, mask, np.arange(len(prompts)))
    tokens, mask, logprobs, ref_logprobs = found
    response_mask = mask[:, P:].astype(jnp.float32)
    ended = jnp.any(tokens[:, P:] == eos_id, axis=1)
    sampled = Rollout(tokens, mask, response_mask, logprobs, ref_logprobs, ended)
    rows = [row for row, _ in prompts for _ in range(num_samples)]
    ids = zip(np.asarray(tokens)[:, P:], np.asarray(mask)[:, P:] > 0)
    rows = [row | {"completion_ids": x[kept].tolist()} for row, (x, kept) in zip(rows, ids)]
    return sampled, rows, decode_responses(tokenizer, tokens, mask, P, eos_id)


def read_response(function, params, config, tokens, mask, prompt_length, temperature):
    """function(logits, tokens) of what the response tokens were drawn from: [B, P + R] -> [B, R].

    The logits that predict response token t stand at column P - 1 + t.
    """

    def read(logits, tokens):
        return function(logits / temperature, tokens)

    read, model = (read, tokens[:, prompt_length:]), GPT2(config)
    return model.apply({"params": params}, tokens, mask, logits_from=prompt_length - 1, read=read)


@functools.partial(jax.jit, static_argnames=("config", "prompt_length", "temperature"))
def policy_logprobs(params, config, tokens, mask, prompt_length, temperature):
    """Log-probabilities of the response tokens: tokens, mask [B, P + R] -> [B, R]."""
    return read_response(token_logprobs, params, config, tokens, mask, prompt_length, temperature)


class Rewards(NamedTuple):
    """What scores completions."""

    functions: list  # [(name, function, weight)] of --reward; weight 0: it is only logged
    learned: tuple | None  # (config, params) of a reward model
    gold: Callable | None  # the ground truth, which is only logged


def load_rewards(args, tokenizer, eos_id):
    """The Rewards that the flags name."""
    weights = args.reward_weight or (1.0,) * len(args.reward)
    counts = f"{len(args.reward)} times --reward, but {len(weights)} times --reward-weight"
    check(len(args.reward) == len(weights), counts)
    check(args.reward_model or any(weights), "every --reward-weight is 0: nothing can be learned")
    names = [name.rpartition(":")[2] for name in args.reward]  # by which they are logged
    names = [x if names.count(x) == 1 else y for x, y in zip(names, args.reward)]
    functions = list(zip(names, map(load_function, args.reward), weights))
    learned = None
    if args.reward_model:
        learned = load_model(args.reward_model)
        check("score" in learned[1], f"{args.reward_model} has no score: not a reward model")
        own = load_tokenizer(args.reward_model)
        same = token_ids(own) == token_ids(tokenizer) and end_token(learned[0], own) == eos_id
        check(same, f"the tokenizers of {args.reward_model} and {args.model} differ")
        check_sizes(learned[0], tokenizer, args)
    return Rewards(functions, learned, load_gold(args.gold, args.dataset))


def score(sampled, rows, texts, rewards, args):
    """2. Score the completions of a Rollout: {"reward", "gold/reward", "rewards/<name>"}, [N] each.

    NaN where a function does not apply. "reward" is the weighted sum of those that do, and NaN,
    which make_experience leaves out of all that it learns from, where none does.
    """
    parts = [(name, call_reward(f, rows, texts), weight) for name, f, weight in rewards.functions]
    if rewards.learned:
        config, params = rewards.learned
        function = functools.partial(learned_rewards, params, config)
        learned = in_parts(function, args.rollout_batch_size, sampled.tokens, sampled.mask)
        parts.append(("reward_model", np.asarray(learned), 1.0))
    total = sum(weight * np.nan_to_num(x) for _, x, weight in parts)
    total = total - args.missing_eos_penalty * ~np.asarray(sampled.ended)
    applies = np.any([~np.isnan(x) for _, x, weight in parts if weight], axis=0)
    if not applies.any():
        print("note: no reward applies to any completion of this step: nothing is learned from it")
    scores = {"reward": np.where(applies, total, np.nan)}
    if rewards.gold:
        scores["gold/reward"] = call_reward(rewards.gold, rows, texts)
    return scores | {f"rewards/{name}": x for name, x, _ in parts}


def describe(sampled, rows, texts, scores):
    """(metrics, samples to show) of a Rollout; scores: {name: [N]}."""
    kl = compute_kl_divergence(sampled.logprobs, sampled.ref_logprobs) * sampled.response_mask
    known = {name: x[~np.isnan(x)] for name, x in scores.items()}
    parts = {name: x for name, x in known.items() if name.startswith("rewards/") and x.size}
    metrics = {name: x.mean() for name, x in known.items() if name not in parts and x.size}
    metrics |= {f"{name}/mean": x.mean() for name, x in parts.items()}
    metrics |= {f"{name}/std": x.std() for name, x in parts.items()}
    metrics |= {
        "objective/kl": kl.sum(axis=1).mean(),  # nats per sequence
        "objective/entropy": -sampled.logprobs.sum(axis=1).mean(),
        "completions/mean_length": sampled.response_mask.sum(axis=1).mean(),
        "completions/clipped_ratio": 1 - sampled.ended.mean(),
    }
    columns = {"prompt": [row["prompt"] for row in rows], "completion": texts}
    columns |= {name: np.where(np.isnan(x), None, x).tolist() for name, x in scores.items()}
    return metrics, [dict(zip(columns, values)) for values in zip(*columns.values())]


def pass_at_k(right, k):
    """The chance that one of k completions is right, of each prompt: right [P, n], 0 or 1 -> [P].

    1 - C(n - c, k) / C(n, k) with c right ones of n, which is not biased (Chen et al. 2021, eq. 1).
    """
    n = right.shape[1]
    wrong = n - right.sum(axis=1).astype(int)  # [P]
    return np.array([1 - math.comb(w, k) / math.comb(n, k) for w in wrong])


def pass_rates(samples, size):
    """{"<score>/pass@k"}, k = 2, 4, … to `size` samples a prompt, of each score of only 0 and 1."""
    metrics = {}
    for name in (name for name in samples[0] if "/" in name):  # gold/reward, rewards/<name>
        scores = np.array([x[name] for x in samples], float).reshape(-1, size)  # [P, size]
        scores = scores[~np.isnan(scores).any(axis=1)]  # where it applies
        if len(scores) and np.isin(scores, (0, 1)).all():
            ks = 2 ** np.arange(1, size.bit_length())
            metrics |= {f"{name}/pass@{k}": pass_at_k(scores, k).mean() for k in ks}
    return metrics


@functools.partial(jax.jit, static_argnames="args")
def make_experience(sampled, scores, args):
    """What train_step learns from a Rollout and its scores [N]: (batch, metrics of all N)."""
    tokens, mask, response_mask, logprobs, ref_logprobs, ended = sampled
    group_size = args.num_generations
    # 3. The KL penalty of the whole sequence: part of the reward, so taken off before the baseline.
    kl = compute_kl_divergence(logprobs, ref_logprobs)  # [B, R]
    penalty = args.kl_coef * jnp.sum(kl * response_mask, axis=1)  # [B]
    rewards = scores - penalty if args.kl_in == "reward" else scores
    if args.mask_truncated_completions:
        rewards = jnp.where(ended, rewards, jnp.nan)
    # A completion without a reward is not trained on, and counts in no group.
    response_mask = response_mask * ~jnp.isnan(rewards)[:, None]
    # 4. Advantages within each group.
    if args.advantage == "leave-one-out":
        advantages = leave_one_out_advantage(rewards, group_size)
    else:
        advantages = group_relative_advantage(rewards, group_size, args.advantage == "group-std")
    batch = {
        "tokens": tokens,
        "mask": mask,
        "response_mask": response_mask,
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "advantages": advantages,
    }
    known = ~jnp.isnan(scores)
    groups = scores.reshape(-1, group_size)  # [N / G, G]
    metrics = {
        "objective/non_score_reward": masked_mean(-penalty, known),
        "objective/rlhf_reward": masked_mean(jnp.nan_to_num(scores) - penalty, known),
        "reward_std": jnp.nan_to_num(jnp.nanmean(jnp.nanstd(groups, axis=1, ddof=1))),
        # From such a group only the KL is learned. (Its std may differ from 0 by rounding.)
        "frac_reward_zero_std": (jnp.nanmax(groups, axis=1) == jnp.nanmin(groups, axis=1)).mean(),
    }
    if args.oversample > 1:  # groups from which nothing is learned make room for others
        counted = jnp.where(jnp.isnan(rewards), jnp.nan, scores)
        rows, counts = dynamic_sampling(counted, group_size, args.batch_size // group_size)
        batch = jax.tree.map(lambda x: x[rows], batch)
        metrics |= counts
    return batch, metrics


# -------------------------------------------------------------------------------------------- main


def main(args):
    if not args.reward_model and not args.reward:
        args = dataclasses.replace(args, reward_model="runs/reward/model")
    check_flags(args)
    run = RunFolder(args)

    config, ref_params = load_model(args.model)
    tokenizer = load_tokenizer(args.model)
    eos_id = end_token(config, tokenizer)
    config = dataclasses.replace(config, eos_token_id=eos_id, remat=args.remat)
    rewards = load_rewards(args, tokenizer, eos_id)
    prompts, eval_prompts = (
        encode_rows(rows, [], tokenizer, eos_id, args) for rows in read_data(args, ["prompt"])
    )

    check("score" not in ref_params, f"{args.model} is a reward model, not a language model")
    check_sizes(config, tokenizer, args)
    check(args.temperature > 0, "--temperature must be above 0: else nothing can be learned")
    check(args.num_generations >= 2, "--num-generations must be at least 2, to have a baseline")
    groups = f"--num-generations {args.num_generations} does not divide"
    check(args.batch_size % args.num_generations == 0, f"{groups} --batch-size {args.batch_size}")
    most = args.rollout_batch_size or 0
    check(most % args.num_generations == 0, f"{groups} --rollout-batch-size {most}")
    held_out = f"--eval-generations {args.eval_generations} does not divide"
    check(most % args.eval_generations == 0, f"{held_out} --rollout-batch-size {most}")
    sizes = f"--num-minibatches {args.num_minibatches} * --micro-batch-size {args.micro_batch_size}"
    fits = args.batch_size % (args.num_minibatches * args.micro_batch_size) == 0
    check(fits, f"{sizes} does not divide --batch-size {args.batch_size}")
    size = args.batch_size // args.num_generations * args.oversample
    fewer = f"a step takes {size} prompts (--batch-size / --num-generations * --oversample)"
    check(size <= len(prompts), f"{fewer}, --dataset has {len(prompts)}")

    batches = prompt_batches(len(prompts), size, args.steps, args.seed)
    updates_per_step = args.epochs * args.num_minibatches
    optimizer, schedule = make_optimizer(args, args.steps * updates_per_step)
    state = make_state(ref_params, optimizer, ref_moves=args.ref_sync_steps is not None)
    state, start = run.start(state, args.steps)

    def sample(asked, num_samples, stream, step):
        """(Rollout, scores [N], metrics, samples) of the present policy."""
        reference = ref_params if state.ref_params is None else state.ref_params
        models = (state.params, reference, config, tokenizer)
        key = stream_key(args.seed, stream, step)
        sampled, rows, texts = rollout(*models, asked, num_samples=num_samples, key=key, args=args)
        scores = score(sampled, rows, texts, rewards, args)
        return sampled, scores["reward"], *describe(sampled, rows, texts, scores)

    def evaluate_and_sample(step):
        size = args.eval_generations
        *_, metrics, samples = sample(eval_prompts[:256], size, "eval", step)
        metrics |= pass_rates(samples, size)
        run.log_samples(step, samples[::size][:8])
        keep_best(run, step, metrics, config, state.params, args)
        return {f"eval/{name}": value for name, value in metrics.items()}

    if start == 0:
        run.log(0, evaluate_and_sample(0), "eval/reward")
    for step in range(start + 1, args.steps + 1):
        started = time.perf_counter()
        asked = [prompts[i] for i in batches[step - 1]]
        sampled, scores, metrics, _ = sample(asked, args.num_generations, "rollout", step)
        batch, batch_metrics = make_experience(sampled, scores, args)
        metrics["lr"] = schedule((step - 1) * updates_per_step)  # of the first update
        key = stream_key(args.seed, "minibatches", step)
        state, update_metrics = train_step(state, batch, key, config, optimizer, args)
        metrics |= jax.device_get(batch_metrics | update_metrics)
        seconds = time.perf_counter() - started
        metrics["perf/tokens_per_second"] = batch["mask"].sum() / seconds
        if run.due(step, args.eval_every):
            metrics |= evaluate_and_sample(step)
        if run.due(step, args.log_every, args.eval_every, args.save_every):
            run.log(step, metrics, "reward", "objective/kl", "gold/reward")
        if args.ref_sync_steps is not None and step % args.ref_sync_steps == 0:
            moved = optax.incremental_update(state.params, state.ref_params, args.ref_mixup_alpha)
            state = state._replace(ref_params=moved)
        if run.must_save(step, args.save_every):
            run.save(step, state)
    save_model(run.path / "model", config, state.params, args.model)
    run.finish(f"evaluate.py --ref {args.model} --reward-model={args.reward_model or ''} --models")


# ==================================================================================================
# The line. From here on the text is the same in every script that has it: read it once, in gpt2.py.
# ==================================================================================================

# ------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class GPT2Config:
    """Hugging Face's names, as in config.json; frozen, so that jit can take it as static."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    dtype: str = "float32"  # of the operands of products; all else is float32
    remat: bool = False  # recompute each block in the backward pass instead of keeping it


class GPT2(nn.Module):
    """GPT-2 with its language-model head, which is wte itself unless the config unties it."""

    config: GPT2Config

    @nn.compact
    def __call__(self, tokens, mask, cache=None, column=0, logits_from=0, read=None):
        """tokens, mask (1 = real token) [B, T] -> float32 logits [B, T - logits_from, V].

        With read = (function, *arrays [B, C]): what function(logits [B, C, V], *arrays) says of
        each token, [B, C], without ever holding all the logits.
        """
        # With a cache: mask is [B, S], tokens its T columns from `column` on; the cache comes back.
        x, new_cache, head = trunk(self.config, tokens, mask, cache, column)
        if not self.config.tie_word_embeddings:
            head = nn.Embed(self.config.vocab_size, self.config.n_embd, name="lm_head")
        x = x[:, logits_from:]  # the largest product: only where it is read
        if read:
            return read_in_blocks(self.config, head.embedding, x, *read)
        logits = unembed(self.config, head.embedding, x)
        return logits if cache is None else (logits, new_cache)


def unembed(config, table, x):
    """The head: x [B, T, D] times the embeddings [V, D], float32 logits [B, T, V]."""
    x, table = x.astype(config.dtype), table.astype(config.dtype)
    return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)


def read_in_blocks(config, table, x, function, *arrays):
    """function(logits of x, *arrays) -> [B, C]; x [B, T, D] is cut to the arrays' [B, C].

    GPT-2's logits take 200 kB a token. Here 128 MB stand at a time, those of a block of columns:
    they are forgotten once they are read, and made again in the backward pass.
    """
    B, C = arrays[0].shape
    x, size = x[:, :C], max(2**25 // (B * len(table)), 1)  # columns in a block

    def block(parts):
        return function(unembed(config, table, parts[0]), *parts[1:])

    if size >= C:
        return block((x, *arrays))

    def split(x):  # [B, C, …] -> [C / size, B, size, …], filled up with 0
        x = jnp.pad(x, [(0, 0), (0, -C % size), (0, 0)][: x.ndim])
        return x.reshape(B, -1, size, *x.shape[2:]).swapaxes(0, 1)

    found = jax.lax.map(jax.checkpoint(block), jax.tree.map(split, (x, *arrays)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :C], found)


def token_logprobs(logits, tokens):
    """log_softmax(logits) at `tokens`: [..., V], [...] -> [...], in float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    # A logit minus a logsumexp: no [..., V] log-softmax is kept for the backward pass.
    return -optax.softmax_cross_entropy_with_integer_labels(logits, tokens)


class RewardModel(nn.Module):
    """GPT-2's trunk with one number a position: a reward model, or a critic."""

    config: GPT2Config

    @nn.compact
    def __call__(self, tokens, mask):
        """tokens, mask [B, T] -> float32 scores [B, T]."""
        x, _, _ = trunk(self.config, tokens, mask)
        init = nn.initializers.normal((self.config.n_embd + 1) ** -0.5)  # scores of about unit size
        return nn.Dense(1, use_bias=False, kernel_init=init, name="score")(x)[..., 0]


def sequence_scores(scores, mask):
    """The score at the last real token of each row: [B, T], [B, T] -> [B]."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames="config")
def learned_rewards(params, config, tokens, mask):
    """A reward model's scores of whole sequences: [B, T], [B, T] -> [B]."""
    return sequence_scores(RewardModel(config).apply({"params": params}, tokens, mask), mask)


def trunk(config, tokens, mask, cache=None, column=0):
    """(hidden states [B, T, D], new cache, wte), with parameters in the caller's own tree."""
    # Left padding must not count: GPT-2's positions are absolute.
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)  # [B, S]
    positions = jax.lax.dynamic_slice_in_dim(positions, column, tokens.shape[1], axis=1)  # [B, T]
    queries = column + jnp.arange(tokens.shape[1])
    causal = queries[:, None] >= jnp.arange(mask.shape[1])  # [T, S]
    bias = jnp.where(causal & (mask[:, None] > 0), 0.0, -1e9)[:, None]  # [B, 1, T, S], to scores
    init = nn.initializers.normal(config.initializer_range)
    embed = functools.partial(nn.Embed, embedding_init=init)
    wte = embed(config.vocab_size, config.n_embd, name="wte")
    wpe = embed(config.n_positions, config.n_embd, name="wpe")
    x = wte(tokens) + wpe(positions)  # [B, T, D]
    x = x.reshape(-1, config.n_embd)  # a 3-D input makes weight gradients 3 times as slow on a CPU
    block = nn.remat(Block) if config.remat else Block
    cache = list(cache or [None] * config.n_layer)
    for i in range(config.n_layer):
        x, cache[i] = block(config, name=f"h.{i}")(x, bias, cache[i], column)
    x = nn.LayerNorm(config.layer_norm_epsilon, name="ln_f")(x)
    return x.reshape(*tokens.shape, config.n_embd), cache, wte


class Block(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x, bias, cache, column):
        """x [B * T, D]; bias [B, 1, T, S]; cache: None or (keys, values) [B, H, S, D/H] each."""
        norm = functools.partial(nn.LayerNorm, self.config.layer_norm_epsilon)
        y, cache = Attention(self.config, name="attn")(norm(name="ln_1")(x), bias, cache, column)
        x = x + y
        return x + MLP(self.config, name="mlp")(norm(name="ln_2")(x)), cache


class Attention(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x, bias, cache, column):
        """x [B * T, D], bias [B, 1, T, S], cache as in Block -> (y [B * T, D], new cache)."""
        (B, _, T, _), D, H = bias.shape, x.shape[-1], self.config.n_head
        # c_attn's kernel is held as [D, 3, H, D/H], so that heads can be sharded.
        qkv = dense(self.config, (3, H, D // H), "c_attn")(x).astype(self.config.dtype)
        qkv = qkv.reshape(B, T, 3, H, D // H)
        q, k, v = (qkv[:, :, i].swapaxes(1, 2) for i in range(3))  # [B, H, T, D/H] each
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k, (0, 0, column, 0))  # [B, H, S, D/H]
            v = jax.lax.dynamic_update_slice(cache[1], v, (0, 0, column, 0))
            cache = (k, v)
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        scores = einsum("bhtd,bhsd->bhts", q * (D // H) ** -0.5, k) + bias
        # A softmax that is divided after the product with v: that leaves one pass less over T x S.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        y = einsum("bhts,bhsd->bhtd", weights.astype(v.dtype), v)
        y = (y / weights.sum(axis=-1, keepdims=True)).swapaxes(1, 2).reshape(x.shape)
        return dense(self.config, D, "c_proj", residual=True)(y), cache


class MLP(nn.Module):
    config: GPT2Config

    @nn.compact
    def __call__(self, x):
        hidden = jax.nn.gelu(dense(self.config, 4 * x.shape[-1], "c_fc")(x))  # [B * T, 4D]
        return dense(self.config, x.shape[-1], "c_proj", residual=True)(hidden)


def dense(config, features, name, residual=False):
    """A linear layer; as in GPT-2, those that add to the residual stream start with less weight."""
    scale = (2 * config.n_layer) ** -0.5 if residual else 1.0
    init = nn.initializers.normal(config.initializer_range * scale)
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    layer = functools.partial(nn.DenseGeneral, dtype=config.dtype, dot_general=dot)
    return layer(features, kernel_init=init, name=name)


# ---------------------------------------------------------------------------------------- sampling


def draw_token(key, logits):
    """A sample of softmax(logits) in each row: [N, V] -> [N].

    First a block of about sqrt(V) tokens, then one of its tokens, both by Gumbel noise: that takes
    fewer random numbers than noise for all V, and reaches the tail, as a cumulative sum does not.
    """
    size = 2 ** (logits.shape[1].bit_length() // 2)  # 32 of 512 to 2 047 tokens, 256 of GPT-2's
    blocks = jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % size)), constant_values=-jnp.inf)
    blocks = blocks.reshape(len(logits), -1, size)  # [N, V / size, size]
    block_key, token_key = jax.random.split(key)
    block = jax.random.categorical(block_key, jax.nn.logsumexp(blocks, axis=-1))  # [N]
    drawn = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]  # [N, size]
    return block * size + jax.random.categorical(token_key, drawn)


@functools.partial(
    jax.jit, static_argnames=("config", "max_new_tokens", "temperature", "eos_id", "num_samples")
)
def generate(params, config, tokens, mask, key, max_new_tokens, temperature, eos_id, num_samples=1):
    """Samples until every row has ended: (tokens, mask [N, P + R], logprobs [N, R]).

    tokens, mask: prompts [B, P], padded on the left. N = B * num_samples, those of one prompt side
    by side; R = max_new_tokens. logprobs are those of log_softmax(logits / temperature). After a
    row's EOS all three are 0.
    """
    (B, P), R, N = tokens.shape, max_new_tokens, len(tokens) * num_samples
    assert config.n_positions >= P + R, (P, R, config.n_positions)
    model = functools.partial(GPT2(config).apply, {"params": params})
    cache_shape = (B, config.n_head, P + R, config.n_embd // config.n_head)
    cache = [(jnp.zeros(cache_shape, config.dtype),) * 2 for _ in range(config.n_layer)]
    mask = jnp.pad(mask, ((0, 0), (0, R)))  # [B, P + R]
    logits, cache = model(tokens, mask, cache=cache, logits_from=P - 1)
    tokens = jnp.pad(tokens, ((0, 0), (0, R)))  # [B, P + R]
    prefilled = (tokens, mask, logits, cache)  # each prompt is read once; now one row per sample
    prefilled = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), prefilled)

    def unfinished(carry):
        return (carry[0] < R) & ~jnp.all(carry[1])

    def one_token(carry):
        step, ended, logprobs, tokens, mask, logits, cache = carry
        logits = logits[:, 0] / temperature  # [N, V]
        token = jnp.where(ended, 0, draw_token(jax.random.fold_in(key, step), logits))  # [N]
        logprobs = logprobs.at[:, step].set(jnp.where(ended, 0.0, token_logprobs(logits, token)))
        tokens = tokens.at[:, P + step].set(token)
        mask = mask.at[:, P + step].set(jnp.where(ended, 0, 1))
        logits, cache = model(token[:, None], mask, cache=cache, column=P + step)
        return step + 1, ended | (token == eos_id), logprobs, tokens, mask, logits, cache

    carry = (0, jnp.zeros(N, bool), jnp.zeros((N, R)), *prefilled)
    _, _, logprobs, tokens, mask, _, _ = jax.lax.while_loop(unfinished, one_token, carry)
    return tokens, mask, logprobs


def in_parts(function, size, *arrays):
    """function(*arrays) of `size` rows at a time, or of all for None: its arrays, joined.

    The last part is filled up with the first rows once more: one shape to compile.
    """
    count = len(arrays[0])
    size = min(size or count, count)
    parts = np.resize(np.arange(count), (-(-count // size), size))
    found = [function(*(x[rows] for x in arrays)) for rows in parts]
    return jax.tree.map(lambda *x: jnp.concatenate(x)[: count * len(x[0]) // size], *found)


def stream_key(seed, name, step):
    """The random key of a named stream at a step: a resumed run needs no stored randomness."""
    stream = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(stream, step)


# --------------------------------------------------------------------------------------- optimizer


def make_optimizer(args, total_steps):
    """(clipping, then AdamW; its schedule: a linear rise, then a linear fall to 0)."""
    warmup = max(args.warmup_steps, 1)
    rise = optax.linear_schedule(args.learning_rate / warmup, args.learning_rate, warmup - 1)
    fall = optax.linear_schedule(args.learning_rate, 0.0, total_steps - warmup)
    schedule = optax.join_schedules([rise, fall], [warmup])

    def decays(params):  # matrices, no biases and no norms
        return jax.tree.map_with_path(lambda p, _: p[-1].key in ("kernel", "embedding"), params)

    adamw = optax.adamw(schedule, weight_decay=args.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw), schedule


def accumulate_gradients(loss_fn, params, batch, counts, micro_batch_size, metric_counts=None):
    """((loss, metrics), gradient) of a whole batch from micro-batches, in one scan.

    loss_fn(params, micro_batch) -> (loss, metrics), means over tokens; counts [B] says over how
    many in each row (metric_counts: those of the metrics). A micro-batch counts by its share of
    them: a mean of means would favour the short rows.
    """
    metric_counts = counts if metric_counts is None else metric_counts
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def split(x):  # [B, …] -> [M, B / M, …]
        return x.reshape(-1, micro_batch_size, *x.shape[1:])

    def add(total, part):
        micro_batch, count, metric_count = part
        share = count.sum() / jnp.maximum(counts.sum(), 1)
        metric_share = metric_count.sum() / jnp.maximum(metric_counts.sum(), 1)
        (loss, metrics), grads = value_and_grad(params, micro_batch)
        loss, grads = jax.tree.map(lambda x: share * x, (loss, grads))
        metrics = jax.tree.map(lambda x: metric_share * x, metrics)
        return jax.tree.map(jnp.add, total, ((loss, metrics), grads)), None

    if len(counts) == micro_batch_size:  # no sums of gradients as large as the model
        return value_and_grad(params, batch)
    parts = jax.tree.map(split, (batch, counts, metric_counts))
    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts[0]))
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    return jax.lax.scan(add, zeros, parts)[0]


# ------------------------------------------------------------------------------------ model folder

# What a model folder takes over from the one that it came from.
KEPT_FILES = ("*config.json", "*token*.json", "vocab.json", "merges.txt", "*.jinja")


def find_model(name):
    """The local folder of a model: `name` itself, else the hub's model of that name."""
    folder = Path(name)
    if folder.is_dir():
        return folder / "model" if (folder / "args.json").exists() else folder  # a run's own model
    first = f"run `python {folder.parent.name}.py` first, or pass another folder"
    check(folder.parts[0] != "runs", f"no model at {name}: {first}")
    try:
        return Path(snapshot_download(str(name), allow_patterns=[*KEPT_FILES, "*.safetensors"]))
    except Exception as error:  # offline, no such model, not public: the hub's words say which
        fail(f"no folder {name}, and not from the hub: {' '.join(str(error).split())[:200]}")


def hf_name_and_shape(path, shape):
    """A parameter's name and shape in the file: ("h.0", "ln_1", "bias") is h.0.ln_1.bias there."""
    name = ".".join([*path[:-1], "bias" if path[-1] == "bias" else "weight"])
    if "c_attn" in path:  # [D, 3, H, D/H] here, [D, 3D] there
        shape = (*shape[:-3], math.prod(shape[-3:]))
    return name, shape[::-1] if "score" in path else shape


def load_config(folder):
    """The GPT2Config of a model folder; fails on what this GPT-2 does not implement."""
    path = folder / "config.json"
    saved = {"model_type": None} | read_json(path)
    wanted = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True}
    wanted |= {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for name, value in wanted.items():
        found = saved.get(name, value)
        more = "; Llama and Qwen: grpo_llama.py" if name == "model_type" else ""
        check(found == value, f"{folder}: {name} is {found!r}, only {value!r} is implemented{more}")
    eos_id = saved.get("eos_token_id")
    if isinstance(eos_id, list) and len(eos_id) == 1:
        saved["eos_token_id"] = eos_id = eos_id[0]
    values = {}
    for field in dataclasses.fields(GPT2Config):
        if field.name in saved and field.name not in ("dtype", "remat"):
            values[field.name] = value = saved[field.name]
            kinds = (int, float) if field.type is float else field.type
            right = isinstance(value, kinds) and isinstance(value, bool) == (field.type is bool)
            right = right and (type(field.default) is not int or 0 < value < 2**31)
            check(right, f"{path}: {field.name} cannot be {value!r}")
    sizes = {"vocab_size", "n_positions", "n_embd", "n_layer", "n_head"}
    check(sizes <= values.keys(), f"{path} lacks {', '.join(sorted(sizes - values.keys()))}")
    config = GPT2Config(**values)
    check(config.n_embd % config.n_head == 0, f"{path}: n_head does not divide n_embd")
    in_table = eos_id is None or eos_id in range(config.vocab_size)
    check(in_table, f"{path}: eos_token_id {eos_id} is above the vocab_size {config.vocab_size}")
    return config


def load_model(name):
    """(config, params in float32) of a GPT-2 in a Hugging Face folder or of a hub name."""
    folder = find_model(name)
    config = load_config(folder)
    files = sorted(folder.glob("model*.safetensors"))  # large models come in several
    convert = f"from transformers import GPT2LMHeadModel as M; M.from_pretrained({str(name)!r})"
    check(files, f"{folder} has no safetensors: python -c \"{convert}.save_pretrained('FOLDER')\"")
    tensors = {}
    for file in files:
        with file_access(file):
            tensors |= safetensors.flax.load_file(file)
    tensors = {key.removeprefix("transformer."): x for key, x in tensors.items()}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        same = np.array_equal(tensors["lm_head.weight"], tensors.get("wte.weight"))
        check(same, f"{folder}: lm_head is not wte, so tie_word_embeddings should be false")
    one = jnp.zeros((1, 1), jnp.int32)
    likes = flatten_dict(jax.eval_shape(GPT2(config).init, jax.random.key(0), one, one)["params"])
    if "score.weight" in tensors:  # a reward model has a score in place of the language-model head
        likes.pop(("lm_head", "embedding"), None)
        likes["score", "kernel"] = jnp.zeros((config.n_embd, 1))
    params = {}
    for path, like in likes.items():
        key, shape = hf_name_and_shape(path, like.shape)
        found = tensors[key].shape if key in tensors else "missing"
        check(found == shape, f"{folder}: {key} should have shape {shape}, but is {found}")
        params[path] = tensors[key].astype(jnp.float32).reshape(like.shape)
        check(jnp.isfinite(params[path]).all(), f"{folder}: {key} has values that are not finite")
    return config, unflatten_dict(params)


def save_model(folder, config, params, source, **more):
    """Writes a Hugging Face folder; tokenizer and the rest of config.json as in `source`."""
    building = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(building, ignore_errors=True)
    with file_access(building):
        building.mkdir(parents=True)
        for pattern in KEPT_FILES:
            for file in find_model(source).glob(pattern):
                shutil.copyfile(file, building / file.name)
    file = building / "config.json"
    saved = read_json(file) if file.exists() else {}
    saved = {"bos_token_id": config.eos_token_id} | saved | dataclasses.asdict(config) | more
    saved |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    saved |= dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)
    if "score" in params:  # one label; transformers assumes two
        saved["architectures"] = ["GPT2ForSequenceClassification"]
        saved |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    write_file(file, json.dumps(saved, indent=2).encode())
    tensors = {}
    for path, x in flatten_dict(params).items():
        name, shape = hf_name_and_shape(path, x.shape)
        prefix = "" if path[0] in ("lm_head", "score") else "transformer."
        tensors[prefix + name] = jnp.asarray(x, jnp.float32).reshape(shape)
    content = safetensors.flax.save(tensors, {"format": "pt"})  # transformers wants a framework
    write_file(building / "model.safetensors", content)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(building, folder)


# ------------------------------------------------------------------------------ tokenizer and data


def load_tokenizer(folder):
    """The tiktoken.Encoding of a model folder; fails on what tiktoken cannot express."""
    folder = find_model(folder)
    with file_access(f"the tokenizer of {folder}"):
        if (folder / "tokenizer.json").exists():
            saved = read_json(folder / "tokenizer.json")
            model, split = saved["model"], saved["pre_tokenizer"] or {"type": None}
            after = saved.get("post_processor") or {}
            usual = (model["type"], split["type"]) == ("BPE", "ByteLevel")
            unusual = [saved.get("normalizer"), split.get("add_prefix_space")]
            unusual += ["SpecialToken" in str(after), after.get("cls")]  # put around each text
            unusual += [model.get("end_of_word_suffix"), model.get("continuing_subword_prefix")]
            unusual += [not split.get("use_regex", True), not isinstance(model.get("merges"), list)]
            plain = "only byte-level BPE; no normalizer, suffix, prefix space or begin token"
            check(usual and not any(unusual), f"{folder}/tokenizer.json: {plain}")
            vocabulary, merges = model["vocab"], model["merges"]
            added = {token["content"]: token["id"] for token in saved.get("added_tokens", [])}
        else:
            vocabulary, added = read_json(folder / "vocab.json"), {}
            lines = (folder / "merges.txt").read_text("utf-8").split("\n")
            merges = [line for line in lines[lines[0].startswith("#version") :] if line]
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        # The files write each byte as a printable character: itself, or one of those from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        characters = dict(zip(map(chr, [*printable, *range(256, 512)]), [*printable, *others]))
        plain = dict.fromkeys([*characters, *map("".join, pairs)])
        # tiktoken needs all 256 bytes, and takes the ids for the merges' ranks.
        lacking = [token for token in plain if token not in vocabulary]
        check(not lacking, f"the vocabulary of {folder} lacks bytes or parts: {lacking[:5]}")
        ids = [vocabulary[token] for token in plain]
        check(ids[256:] == sorted(ids[256:]), f"the token ids of {folder} are not in merge order")
        for left, right in pairs:  # it joins any two parts that make a token, the lowest id first
            parts = [*left, *right]
            while len(parts) > 2:
                joined = [vocabulary.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
                i = joined.index(min(joined))
                parts[i : i + 2] = ["".join(parts[i : i + 2])]
            check(parts == [left, right], f"{folder}: tiktoken would not make {left + right} so")
        ranks = {bytes(characters[c] for c in token): i for token, i in zip(plain, ids)}
        special = {token: i for token, i in vocabulary.items() if token not in plain} | added
        twice = len(ids) + len(special) - len({*ids, *special.values()})
        check(twice == 0, f"{folder}: {twice} ids of the vocabulary belong to two tokens")
        # Where to cut a text before the merges begin: GPT-2's pattern.
        cut = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
        return tiktoken.Encoding("", pat_str=cut, mergeable_ranks=ranks, special_tokens=special)


def token_ids(tokenizer):
    """{bytes: id} of all but special tokens: equal for tokenizers that read every text alike."""
    return {x: tokenizer.encode_single_token(x) for x in tokenizer.token_byte_values()}


def end_token(config, tokenizer):
    """The id of EOS: that of config.json, else that of <|endoftext|>."""
    known = config.eos_token_id is not None or "<|endoftext|>" in tokenizer.special_tokens_set
    check(known, "the model has no end of text: put its id into config.json as eos_token_id")
    return tokenizer.eot_token if config.eos_token_id is None else config.eos_token_id


def check_sizes(config, tokenizer, args):
    """Fails where ids or positions lie outside the model's tables; JAX would not complain."""
    ids, rows = tokenizer.max_token_value + 1, config.vocab_size
    check(ids <= rows, f"the tokenizer has {ids} ids, the model only {rows} tokens")
    length = args.max_prompt_length + args.max_completion_length
    longer = f"--max-prompt-length + --max-completion-length are {length} tokens"
    check(length <= config.n_positions, f"{longer}, the model has {config.n_positions} positions")


def pad_rows(rows, width, left=False):
    """Lists of ids to (tokens, mask), int32 [B, width] each; zeros on the right, or on the left."""
    tokens, mask = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, columns] = row
        mask[i, columns] = 1
    return tokens, mask


def decode_responses(tokenizer, tokens, mask, prompt_length, eos_id):
    """The completions as texts, without EOS: tokens, mask [B, P + R] -> B strings."""
    tokens, mask = np.asarray(tokens)[:, prompt_length:], np.asarray(mask)[:, prompt_length:]
    # As in TRL, special tokens are no text; nor is an id that belongs to no token, of which a model
    # may have some.
    keep = (mask > 0) & (tokens != eos_id) & np.isin(tokens, list(token_ids(tokenizer).values()))
    return [tokenizer.decode(row[kept].tolist()) for row, kept in zip(tokens, keep)]


def read_jsonl(path, fields, instead=None):
    """Rows of JSON Lines with texts in `fields`, or in `instead`; prompts may be empty.

    A row gets every column of the file: None where it lacks one.
    """
    form = ", ".join(f'"{name}": "…"' for name in fields)
    wanted = f"; wanted: JSON Lines in UTF-8 (or .gz of it), each {{{form}}}; see data/convert.py"
    made = "; `python data/reviews.py` makes it" if Path(path).resolve().parent == EMBEDDED else ""
    check(Path(path).is_file(), f"{path} is no file{made}")
    with file_access(path, wanted):
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if str(path).endswith(".gz") else content
        lines = content.decode("utf-8-sig").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            with file_access(place, wanted):
                row = json.loads(line, parse_constant=int)  # int refuses NaN and Infinity
            check(isinstance(row, dict), f"{place} is no object{wanted}")
            for name in [instead] if instead in row else fields:
                good = isinstance(row.get(name), str) and (row[name] or name == "prompt")
                check(good, f'{place}: "{name}" is missing, empty or no text{wanted}')
            rows.append(row)
    check(rows, f"{path} holds no rows")
    columns = dict.fromkeys(name for row in rows for name in row)
    return [columns | row for row in rows]


# The folder of the film reviews, which know their ground truth and their held-out part.
EMBEDDED = Path("data/reviews").resolve()


def read_data(args, fields, instead=None):
    """(rows to train on, held-out rows); without --eval-dataset, the last of one's own rows."""
    rows, held_out = read_jsonl(args.dataset, fields, instead), args.eval_dataset
    kind, train, _ = Path(args.dataset).name.partition("_train")
    if held_out is None and train and Path(args.dataset).resolve().parent == EMBEDDED:
        held_out = f"data/reviews/{kind}_test.jsonl"
    if held_out:
        held_out_rows = read_jsonl(held_out, fields, instead)
    else:
        count = min(256, -(-len(rows) // 20))
        check(count < len(rows), f"{args.dataset} has one row: pass --eval-dataset, too")
        rows, held_out_rows, held_out = rows[:-count], rows[-count:], f"the end of {args.dataset}"
    print(f"data: {len(rows)} rows of {args.dataset}; held out: {len(held_out_rows)} of {held_out}")
    return rows, held_out_rows


def encode_text(tokenizer, text, size=50_000):
    """A text's ids, none of them special; in pieces: tiktoken fails on a long run of blanks."""
    pieces = (text[i : i + size] for i in range(0, len(text), size))
    return [i for piece in pieces for i in tokenizer.encode_ordinary(piece)]


def encode_rows(rows, answers, tokenizer, eos_id, args):
    """[(row, [ids of the prompt, ids of each of its `answers`, …])] of the rows that fit.

    Fails where more than a tenth does not: a run on the rest would be another experiment.
    """
    special = sorted(tokenizer.special_tokens_set)
    spelled = blank = 0
    encoded = []
    for row in rows:
        texts = [row["prompt"], *(row[name] for name in answers)]
        spelled += any(token in text for token in special for text in texts)
        blank += texts[0] != texts[0].rstrip()
        prompt, *ids = (encode_text(tokenizer, text) for text in texts)
        encoded.append((row, [prompt or [eos_id], *([*x, eos_id] for x in ids)]))
    if spelled:
        print(f"note: {spelled} rows spell a special token {special}: they are read as plain text")
    if blank:  # "x " + "y" and "x y" are other tokens
        print(f"note: {blank} of {len(rows)} prompts end in white space")
    # An answer without its EOS would teach not to stop: a row that is too long is dropped, not cut.
    limits = args.max_prompt_length, args.max_completion_length
    lengths = [(len(ids[0]), max(map(len, ids[1:]), default=0)) for _, ids in encoded]
    lengths = np.array(lengths).reshape(-1, 2)
    fits = (lengths <= limits).all(axis=1)
    if not fits.all():
        flags = "--max-prompt-length {} --max-completion-length {}"
        longer = f"{sum(~fits)} of {len(rows)} rows are longer than {flags.format(*limits)}"
        most, all_of_them = (
            flags.format(*np.maximum(np.quantile(lengths, q, axis=0, method="higher"), limits))
            for q in (0.975, 1.0)  # 0.95 of the rows fit where 0.975 do in either length
        )
        check(np.mean(fits) >= 0.9, f"{longer}; {most} keeps 95 % of them, {all_of_them} all")
        print(f"dropped: {longer}")
    return [pair for pair, kept in zip(encoded, fits) if kept]


def prompt_batches(rows, batch_size, steps, seed):
    """Row numbers [steps, batch_size]: every prompt once before any comes again."""
    epochs = -(-steps * batch_size // rows)
    order = [np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(order)[: steps * batch_size].reshape(steps, batch_size)


def load_function(name):
    """What "file.py:function" names: any callable."""
    path, _, function = name.rpartition(":")
    there = path.endswith(".py") and Path(path).is_file()
    check(there, f"no file for {name}: a reward is given as file.py:function")
    sys.path.append(str(Path(path).resolve().parent))  # it may import its neighbours
    module_name, source = Path(path).stem, (path, Path(path).read_bytes())
    module = sys.modules.get(module_name)
    if getattr(module, "loaded_from", None) != source:  # one module for all functions of a file
        module_name += "_" * (module is not None)
        spec = importlib.util.spec_from_file_location(module_name, path)
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            fail(f"{path} cannot be imported: {type(error).__name__}: {error}")
        module.loaded_from = source
    check(callable(getattr(module, function, None)), f"{path} has no function {function}")
    return getattr(module, function)


def load_gold(name, dataset):
    """The ground truth of `name`, or else that of the embedded data, or None."""
    if name is None and Path(dataset).resolve().parent == EMBEDDED:
        name = "data/reviews.py:sentiment"
    return name and load_function(name)


def call_reward(function, rows, completions):
    """Scores [B] in TRL's way: the rows' columns come as lists; NaN where it says None."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {"prompts": columns.pop("prompt"), "completions": list(completions)}
    name = getattr(function, "__name__", repr(function))
    try:
        returned = function(**columns)
        found = list(returned) if np.iterable(returned) and not isinstance(returned, dict) else []
        scores = np.array([np.nan if x is None else x for x in found])
    except (Exception, SystemExit) as error:  # the user's own: where it happened is what counts
        traceback.print_exc()
        fail(f"the reward function {name} raised {type(error).__name__}: {error}")
    right = scores.shape == (len(rows),) and scores.dtype.kind in "fiub"
    shown = str(returned)[:200]
    check(right, f"the reward function {name} must return {len(rows)} numbers, not {shown}")
    wrong = [x for x in found if x is not None and not math.isfinite(x)]
    check(not wrong, f"the reward function {name} returned {wrong[:1]}: no finite number, no None")
    return scores.astype(np.float32)


# -------------------------------------------------------------------------------------- run folder


def fail(message):
    """Bad input ends a script with one line and exit status 2, as a wrong flag does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(condition, message):
    """Fails with the message unless the condition holds."""
    if not condition:
        fail(message)


@contextlib.contextmanager
def file_access(place, advice=""):
    """Whatever goes wrong with a file ends the script with its name and the reason."""
    try:
        yield
    except Exception as error:  # missing, cut short, not JSON, not UTF-8, no space on the disk, …
        reason = " ".join(str(error).split())[:200]
        fail(f"{place}: {type(error).__name__}: {reason}{advice}")


def read_json(path):
    """The object in a JSON file; fails where it is missing or broken."""
    with file_access(path):
        found = json.loads(path.read_text("utf-8-sig"))
    check(isinstance(found, dict), f"{path} holds no JSON object")
    return found


def write_file(path, content):
    """Replaces a file by these bytes: whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with file_access(path), open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# Lowest and highest value of a flag. Others are whole numbers from 1, or fractions from 0.
RANGES = {
    **dict.fromkeys(["seed", "warmup_steps", "process_id", "examples"], (0, 2**31 - 1)),
    **dict.fromkeys(["data", "fsdp", "tensor"], (-1, 2**31 - 1)),
    **dict.fromkeys(["max_grad_norm", "beta", "kl_target", "stop_kl"], (1e-6, math.inf)),
    **dict.fromkeys(["top_p", "ref_mixup_alpha"], (1e-6, 1)),
    **dict.fromkeys(["gamma", "lam"], (0, 1)),
    "reward_weight": (-math.inf, math.inf),
}


def check_flags(args):
    """Fails where a number is not finite or out of its range; a default is always in it."""
    check(not jax.config.jax_enable_x64, "unset JAX_ENABLE_X64: the scripts are float32 throughout")
    for name, value in vars(args).items():
        low, high = RANGES.get(name, (1, 2**31 - 1) if type(value) is int else (0, math.inf))
        for x in value if isinstance(value, tuple) else [value]:
            if type(x) in (int, float) and x != getattr(type(args), name):
                right = low <= x <= high and math.isfinite(x)
                flag = f"--{name.replace('_', '-')}"
                check(right, f"{flag} must be from {low} to {high}, not {x}")


def checksum(value):
    """Of what a flag names, wherever it lies: a data file, a model's weights, a reward's file."""
    if isinstance(value, list):
        found = [checksum(x) for x in value]
        return found if all(found) else None
    path, _, function = str(value).partition(":")
    weights = sorted(Path(path).glob("*.safetensors")) if path else []
    files = weights or [x for x in (Path(path), Path(path) / "tokenizer.json") if x.is_file()]
    crc = functools.reduce(lambda crc, file: zlib.crc32(file.read_bytes(), crc), files, 0)
    return f"{crc} {function}" if files else None


# What may be changed when a run is resumed; beside these, its length may grow.
MAY_CHANGE = ["run_dir", "log_every", "eval_every", "save_every"]


class RunFolder:
    """args.json, metrics.jsonl, TensorBoard, samples.jsonl, checkpoint.safetensors, then model/."""

    def __init__(self, args):
        self.path = Path(args.run_dir)
        self.args = json.loads(json.dumps(vars(args)))  # as they come back from args.json
        self.resume = self.args.pop("resume")
        self.overwrite = self.args.pop("overwrite")
        check(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")
        sums = {name: checksum(value) for name, value in self.args.items()}
        self.args["checksums"] = {name: value for name, value in sums.items() if value}
        self.asked, self.stopped, self.bar, self.process = 0, 0, None, os.getpid()
        self.held_out, self.samples = "", []
        signal.signal(signal.SIGINT, self.interrupt)
        signal.signal(signal.SIGTERM, self.interrupt)
        if not (self.path / "args.json").exists():
            with file_access(self.path):
                empty = not self.path.exists() or {x.name for x in self.path.iterdir()} <= {".lock"}
            check(empty, f"{self.path} is no run: pass another --run-dir")
            if self.resume:
                print(f"nothing to resume in {self.path}: the run begins at step 0")
        elif self.overwrite:
            for value in [*self.args.values(), *self.args.get("reward", [])]:
                place = Path(str(value).split(":")[0]).resolve()
                inside = place.is_relative_to(self.path.resolve()) and value != args.run_dir
                check(not inside, f"--overwrite would remove {value}, from which this run reads")
        else:
            ways = "pass --resume, --overwrite or another --run-dir"
            check(self.resume, f"{self.path} holds a run: {ways}")
            print(f"resuming {self.path}")
            with file_access(self.path / "args.json"):
                self.check_unchanged(read_json(self.path / "args.json"))

    def check_unchanged(self, before):
        """Fails where a resumed run has other flags or data; ends a run that is finished."""
        old, new = ({**x, **x.get("checksums", {})} for x in (before, self.args))
        length = next(name for name in ("rounds", "steps", "epochs") if name in new)
        grown = new[length] > old.get(length, new[length])
        may_change = [*MAY_CHANGE, "checksums", *([length] if grown else [])]
        changed = [k for k in old | new if old.get(k) != new.get(k) and k not in may_change]
        changed = [f"{name} {before.get(name)}, now {self.args.get(name)}" for name in changed]
        words = f"{self.path} was begun with other settings, or files with another content"
        check(not changed, f"{words}: {'; '.join(changed)}")
        if grown:
            print(f"{self.path} goes on to {length} {new[length]}, from {old[length]}")
        elif (self.path / "model").exists():
            print(f"{self.path} is finished: its model is {self.path / 'model'}")
            raise SystemExit(0)

    def start(self, state, total_steps):
        """(state, step) of the checkpoint, or (state, 0) without one; opens the logs there."""
        with file_access(self.path, "; does another run write there?"):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / ".lock", "w")  # noqa: SIM115
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in self.path.iterdir() if self.overwrite else ():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        step = self.checkpoint_step()
        if step:
            with file_access(self.path / "checkpoint.safetensors"):
                saved = safetensors.flax.load_file(self.path / "checkpoint.safetensors")
                state = jax.tree.map_with_path(lambda p, _: saved[jax.tree_util.keystr(p)], state)
        logs = {self.path / "metrics.jsonl": b"", self.path / "samples.jsonl": b""}
        for log in logs if step else ():
            with file_access(log):
                lines = log.read_bytes().splitlines(True) if log.exists() else []
                kept = [x for x in lines if x.endswith(b"\n") and json.loads(x)["step"] <= step]
                logs[log] = b"".join(kept)
        # All that this run goes on from has been read: from here on it writes.
        shutil.rmtree(self.path / "model", ignore_errors=True)  # a run that has grown had one
        write_file(self.path / "args.json", json.dumps(self.args, indent=2).encode())
        for log, content in logs.items():
            write_file(log, content)
        # Not a SummaryWriter: its thread dies on a full disk, and then its queue never empties.
        with file_access(self.path):
            self.events = EventsWriter(str(self.path / "events"))
            begin = SessionLog(status=SessionLog.START)  # TensorBoard forgets what was from here on
            self.events.write_event(Event(step=step + 1 if step else 0, session_log=begin))
            for summary in hparams({name: str(value) for name, value in self.args.items()}, {}):
                self.events.write_event(Event(wall_time=time.time(), summary=summary))
        size = f"{sum(x.size for x in jax.tree.leaves(state.params)):,} trained parameters"
        device = f"{jax.device_count()} {jax.default_backend()} ({jax.devices()[0].device_kind})"
        print(f"model: {self.args['model'] or 'new'}, {size}; device: {device}")
        print(f"run: {self.path}, steps {step} to {total_steps}; tensorboard --logdir {self.path}")
        self.bar = Progress()
        atexit.register(self.bar.stop)  # however the run ends, it gives the cursor back
        self.task = self.bar.add_task(self.path.name, total=total_steps, completed=step)
        self.bar.start()
        self.total_steps, self.first_step, self.started = total_steps, step, time.monotonic()
        return state, step

    def log(self, step, metrics, *shown):
        """One line in metrics.jsonl and in TensorBoard; the metrics `shown` go to the screen."""
        metrics = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        row = {"step": step, "perf/time": time.time(), **metrics, **dict.fromkeys(bad)}  # no NaN
        self.append("metrics.jsonl", row)
        with file_access(self.path):
            for name, value in metrics.items():
                summary = scalar(name if "/" in name else f"train/{name}", value)
                self.events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self.events.flush()
        values = [f"  {name} {metrics[name]:.4g}" for name in shown if name in metrics]
        named = ("eval/loss", "eval/rewards/accuracies", "eval/reward", "eval/gold/reward")
        held_out = [f"  {name} {metrics[name]:.4g}" for name in named if name in metrics]
        self.held_out = "".join(held_out) or self.held_out
        done = step - self.first_step
        seconds = (time.monotonic() - self.started) * (self.total_steps - step) / max(done, 1)
        left = f"  {seconds:.0f} s left" if done else ""
        self.bar.update(self.task, completed=step)
        print(f"step {step}/{self.total_steps}{''.join(values)}{left}", flush=True)
        cause = "is --learning-rate too high?" if step else "is the model, or a reward, at fault?"
        check(not bad, f"{bad and bad[0]} is not finite at step {step}: {cause}")

    def log_samples(self, step, rows):
        """Appends dicts (prompt, completion, scores) to samples.jsonl; `finish` shows the last."""
        self.samples = rows
        for row in rows:
            self.append("samples.jsonl", {"step": step, **row})

    def append(self, name, row):
        with file_access(self.path / name), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def due(self, step, *every):
        """Whether one of these intervals ends at this step; the last step ends all of them."""
        return step == self.total_steps or any(step % interval == 0 for interval in every)

    def must_save(self, step, every):
        """Whether a checkpoint is due, or the run was asked to stop."""
        self.stopped = self.asked
        return self.due(step, every) or self.stopped > 0

    def save(self, step, state):
        """Writes the train state, whole or not at all; the step stands in the file's header."""
        tensors = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}
        content = safetensors.flax.save(tensors, {"step": str(step)})
        write_file(self.path / "checkpoint.safetensors", content)
        self.end_if_stopped(step)

    def checkpoint_step(self):
        """The step of the last checkpoint, 0 without one."""
        path = self.path / "checkpoint.safetensors"
        with file_access(path):
            return int(safetensors.safe_open(path, "np").metadata()["step"]) if path.exists() else 0

    def interrupt(self, number, _):
        """The first Ctrl-C or SIGTERM lets the step in hand end; the second ends everything."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.bar is None or os.getpid() != self.process:  # before the run, or in a child
            os._exit(128 + number)
        self.asked = number
        self.bar.console.show_cursor()
        os.write(1, b"stopping as soon as this step is done and saved; once more: at once\n")

    def end_if_stopped(self, step):
        if self.stopped:
            self.bar.stop()
            print(f"stopped after step {step}, which is saved: --resume goes on")
            raise SystemExit(128 + self.stopped)

    def finish(self, command):
        """The last lines: samples, the held-out figures, where the model is, what comes next."""
        self.bar.stop()
        for row in self.samples[:3]:
            texts = [value for value in row.values() if isinstance(value, str)]
            numbers = [f"{name} {x:.2f}" for name, x in row.items() if isinstance(x, float)]
            print("|".join(texts), *numbers, sep="  ")
        seconds = time.monotonic() - self.started
        print(f"finished in {seconds:.0f} s{self.held_out}; the model is {self.path / 'model'}")
        more = "" if Path(self.args["dataset"]).resolve().parent == EMBEDDED else "  # on your data"
        print(f"next: python {command} {self.path / 'model'}{more}")


def keep_best(run, step, metrics, config, params, args):
    """Writes best/, a model folder, where --keep-best is higher than at any evaluation before."""
    if args.keep_best is None:
        return
    check(step or args.keep_best in metrics, f"--keep-best must be one of {', '.join(metrics)}")
    value = float(metrics.get(args.keep_best, -math.inf))
    file = run.path / "best.json"
    best = read_json(file) if file.exists() else {"step": 0, "value": -math.inf}
    if value > best["value"]:
        best = {"metric": f"eval/{args.keep_best}", "step": step, "value": value}
        save_model(run.path / "best", config, params, args.model)
        write_file(file, json.dumps(best).encode())
    if step == run.total_steps:
        shown = f"{args.keep_best} {best['value']:.4g} at step {best['step']}"
        print(f"best eval/{shown}; that model is {run.path / 'best'}")


if __name__ == "__main__":
    main(args)
