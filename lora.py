"""LoRA: DPO that trains few parameters, and needs no second model.

Rafailov et al. 2023, "Direct preference optimization: your language model is
secretly a reward model". What maximises E[r] - beta * KL(pi || ref) is
pi* = ref * exp(r / beta) / Z. So a policy tells which reward it is best for:
r = beta * log(pi / ref), up to a constant of the prompt. Put into Bradley and
Terry's model of labels, sigmoid(r1 - r2), it is trained to explain them.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models". A layer
computes x W + (alpha / r) x A B. Trained are A [in, r] and B [r, out], zero at
first; W [in, out] is not, so it needs no gradient and no moments of Adam. And
with B = 0, that is without the adapter, the same model is the reference.

Pairs bind only the answers that they show. --nll-coef, which is not part of
DPO, keeps the policy near the chosen ones, and so within the grammar of the
embedded data; the optimum is then no longer pi*. Plain DPO is --nll-coef 0.

    python lora.py                # from runs/sft/model, on the embedded pairs
    python lora.py --model gpt2 --dataset my.jsonl --learning-rate 1e-5 \\
        --max-prompt-length 128 --max-completion-length 384 --nll-coef 0

Data is JSON Lines: {"prompt", "chosen", "rejected"}. With the defaults it
takes some minutes on two CPU cores; results: README.md.
Compare: diff dpo.py iterative_dpo.py, diff dpo.py lora.py.
"""

import os
import sys
import textwrap
from dataclasses import dataclass
from typing import Literal, NamedTuple

import tyro


@dataclass(frozen=True)
class Args:
    model: str = "runs/sft/model"  # folder or hub name: the policy's start, and the reference
    # file.py:function, a ground truth that is only logged; default: that of the embedded data
    gold: str | None = None
    dataset: str = "data/reviews/preferences_train_more.jsonl.gz"  # prompt, chosen, rejected
    # held out; the first 256 are sampled; default: the embedded test file, or the end of --dataset
    eval_dataset: str | None = None
    run_dir: str = "runs/lora"  # where metrics, samples, checkpoint, adapter and model go
    resume: bool = False  # go on from the checkpoint in run_dir; a finished run stays as it is
    overwrite: bool = False  # replace the run in run_dir
    seed: int = 0  # seeds the order of the data and the samples
    epochs: int = 1  # passes over the pairs
    batch_size: int = 64  # pairs in one optimizer step
    micro_batch_size: int = 16  # pairs in one forward and backward pass
    rollout_batch_size: int | None = None  # completions sampled and scored at once; none: all
    learning_rate: float = 3e-4  # peak; it falls linearly to 0
    warmup_steps: int = 20  # steps in which the learning rate rises from 0
    weight_decay: float = 0.0  # AdamW's, on matrices
    max_grad_norm: float = 1.0  # the gradient is scaled down to this global norm
    lora_rank: int = 8  # r, the columns of A and the rows of B
    lora_alpha: int = 64  # x A B is scaled by alpha / r
    rslora: bool = False  # scale by alpha / sqrt(r) (Kalajdzievski 2023), so that r may grow
    lora_targets: tuple[str, ...] = ("c_attn",)  # layers by name; others: c_proj c_fc
    adapter: str | None = None  # folder in PEFT's format: A and B to go on from
    beta: float = 0.3  # the KL penalty's weight in the objective that DPO solves
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"  # sigmoid is DPO's own
    label_smoothing: float = 0.0  # probability that a label is wrong (cDPO); for sigmoid
    # weight of the chosen answer's mean negative log-likelihood a token; DPO itself has 0
    nll_coef: float = 1.0
    max_prompt_length: int = 16  # tokens; a row with a longer prompt is dropped
    max_completion_length: int = 48  # tokens, EOS included; a row with a longer answer is dropped
    remat: bool = False  # recompute activations in the backward pass: slower, less memory
    temperature: float = 1.0  # of sampling, and of the KL; the loss is at 1
    log_every: int = 10  # steps between lines in metrics.jsonl
    eval_every: int = 50  # steps between evaluations on the held-out data
    save_every: int = 50  # steps between checkpoints


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


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, label_smoothing=0.0):
    """Direct preference optimization (Rafailov et al. 2023, eq. 7); log-probabilities [B] each.

    -mean of (1 - eps) * log sigmoid(margin) + eps * log sigmoid(-margin), the margin being that of
    the implicit rewards beta * log(pi / pi_ref) (eq. 5, without beta * log Z, which is one for
    both). eps = label_smoothing, a number or [B], is the probability that the label is wrong
    (Mitchell 2023, "A note on DPO with noisy preferences").
    """
    shapes = [x.shape for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
    assert shapes == [policy_chosen.shape[:1]] * 4, shapes
    chosen = beta * (policy_chosen - ref_chosen)
    rejected = beta * (policy_rejected - ref_rejected)
    right = jax.nn.log_sigmoid(chosen - rejected)
    wrong = jax.nn.log_sigmoid(rejected - chosen)
    loss = -jnp.mean((1 - label_smoothing) * right + label_smoothing * wrong)
    # Only the margin is trained: the chosen answer's reward and log-probability may well fall, as
    # long as those of the rejected one fall further. What a rejected answer loses need not go to
    # the chosen one, it can go to texts that no pair shows.
    return loss, {
        "loss": loss,
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "rewards/margins": (chosen - rejected).mean(),
    }


def ipo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Identity preference optimization (Azar et al. 2024, eq. 17): mean of (h - 1 / (2 beta))^2.

    h [B] is the difference of the log-ratios. It is regressed onto a constant, so a long answer
    must not count more: the caller divides each log-probability by the answer's length first, as
    TRL does on its authors' word; the paper and other code sum.
    """
    assert policy_chosen.shape == policy_rejected.shape == ref_chosen.shape == ref_rejected.shape
    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    loss = jnp.mean((h - 1 / (2 * beta)) ** 2)
    return loss, {"loss": loss}


def hinge_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Mean of max(0, 1 - margin): SLiC (Zhao et al. 2023) on the implicit rewards of DPO.

    As in Liu et al. 2024, "Statistical rejection sampling improves preference optimization".
    """
    assert policy_chosen.shape == policy_rejected.shape == ref_chosen.shape == ref_rejected.shape
    margins = beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected))
    loss = jax.nn.relu(1 - margins).mean()
    return loss, {"loss": loss}


def pair_loss(logprobs, ref_logprobs, lengths, args):
    """(loss, metrics) of the chosen --loss, all [B, 2]; lengths in tokens."""
    # Pang et al. 2024, "Iterative reasoning preference optimization", eq. 1
    nll = jnp.mean(-logprobs[:, 0] / lengths[:, 0])
    logps = {"logps/chosen": logprobs[:, 0].mean(), "logps/rejected": logprobs[:, 1].mean()}
    if args.loss == "ipo":  # it compares means per token, so its rewards/… are per token, too
        logprobs, ref_logprobs = logprobs / lengths, ref_logprobs / lengths
    pairs = (*logprobs.T, *ref_logprobs.T)
    loss, metrics = dpo_loss(*pairs, args.beta, args.label_smoothing)  # its metrics serve all
    if args.loss == "ipo":
        loss, _ = ipo_loss(*pairs, args.beta)
    elif args.loss == "hinge":
        loss, _ = hinge_loss(*pairs, args.beta)
    loss = loss + args.nll_coef * nll
    return loss, metrics | logps | {"loss": loss, "nll_loss": nll}


def response_logprobs(logprobs, mask):
    """log pi(response | prompt): the sum of its tokens' log-probabilities, [B, T], [B, T] -> [B].

    A sum, not a mean, is what Rafailov et al. 2023 derive; a mean would be another loss.
    """
    assert logprobs.shape == mask.shape and mask.ndim == 2, (logprobs.shape, mask.shape)
    return jnp.sum(logprobs * mask, axis=1)


def compute_kl_divergence(logprobs, ref_logprobs):
    """k1 = log pi - log pi_ref of each sampled token [B, R]; its mean under pi is KL(pi || pi_ref).

    For a penalty inside the reward, which is not differentiated, k1 is right: the policy gradient
    of -k1 is that of -KL, and k3 = exp(-k1) - 1 + k1 would be biased there. In a loss it is useless
    (the mean of its gradient is 0); there k3 is common, whose gradient is that of the other
    direction, KL(pi_ref || pi). Schulman 2020, "Approximating KL divergence".
    """
    assert logprobs.shape == ref_logprobs.shape, (logprobs.shape, ref_logprobs.shape)
    return logprobs - ref_logprobs


# ------------------------------------------------------------------------------------------ update


class LoRADense(nn.DenseGeneral):
    """A linear layer that adds x A B where its parameters have A and B (Hu et al. 2021, eq. 3)."""

    @nn.compact
    def __call__(self, x):
        y = super().__call__(x)
        if self.has_variable("params", "lora_A"):
            # Small products: W + A B would be a second copy of W, with a gradient of that size.
            rank = self.variables["params"]["lora_A"]["kernel"].shape[-1]
            layer = functools.partial(self.clone, parent=self, use_bias=False)
            y += layer(name="lora_B")(layer(name="lora_A", features=rank)(x))
        return y


def init_adapter(params, args):
    """A tree of A [in, r], random as PEFT's, and B [r, *out], zero, for each kernel [in, *out]."""
    kernels = {path: x for path, x in flatten_dict(params).items() if path[-1] == "kernel"}
    names = sorted({path[-2] for path in kernels})
    check(set() < {*args.lora_targets} <= {*names}, f"--lora-targets: some of {', '.join(names)}")
    draw, adapter = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), {}
    for (*layer, _), kernel in kernels.items():
        if layer[-1] in args.lora_targets:
            (fan_in, *out), rank, name = kernel.shape, args.lora_rank, ".".join(layer)
            check(rank <= min(fan_in, math.prod(out)), f"--lora-rank is above a side of {name}")
            key = stream_key(args.seed, name, 0)
            adapter[*layer, "lora_A", "kernel"] = draw(key, (fan_in, rank))
            adapter[*layer, "lora_B", "kernel"] = jnp.zeros((rank, *out))
    return unflatten_dict(adapter)


def attach(params, adapter, args):
    """The policy's parameters: A, times alpha / r, and B beside their kernels; none is copied."""
    scale = args.lora_alpha / (args.lora_rank**0.5 if args.rslora else args.lora_rank)
    flat = {p: scale * x if "lora_A" in p else x for p, x in flatten_dict(adapter).items()}
    return unflatten_dict(flatten_dict(params) | flat)


def merge(params, adapter, args):
    """The same policy as a plain model: W + (alpha / r) A B in place of W."""
    flat = flatten_dict(attach(params, adapter, args))
    for path in [path for path in flat if "lora_A" in path]:
        B = flat.pop((*path[:-2], "lora_B", "kernel"))
        flat[*path[:-2], "kernel"] += jnp.tensordot(flat.pop(path), B, 1)
    return unflatten_dict(flat)


class TrainState(NamedTuple):
    """What one step hands to the next, and all that a checkpoint holds."""

    params: dict
    opt_state: optax.OptState


def make_state(params, optimizer):
    """A fresh state with its own copy of `params`: train_step donates the buffers of its state."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, jax.jit(optimizer.init)(params))


def make_batch(rows, max_length):
    """[[prompt, chosen, rejected], …] -> {"tokens", "mask", "response_mask"}, [B, 2, T] each."""
    texts = [prompt + answer for prompt, *answers in rows for answer in answers]
    tokens, mask = pad_rows(texts, padded_width(max(map(len, texts)), max_length))
    starts = np.repeat([len(prompt) for prompt, *_ in rows], 2)[:, None]
    response_mask = mask * (np.arange(mask.shape[1]) >= starts)
    batch = {"tokens": tokens, "mask": mask, "response_mask": response_mask}
    return {name: x.reshape(len(rows), 2, -1) for name, x in batch.items()}


@functools.partial(jax.jit, static_argnames="config")
def pair_logprobs(params, batch, config):
    """log pi(answer | prompt) [B, 2] of chosen and rejected, from one forward pass.

    batch: {"tokens", "mask", "response_mask"}, [B, 2, T] each.
    """
    names = ["tokens", "mask", "response_mask"]
    tokens, mask, response_mask = (batch[x].reshape(-1, batch[x].shape[-1]) for x in names)
    read = (token_logprobs, tokens[:, 1:])
    logprobs = GPT2(config).apply({"params": params}, tokens, mask, read=read)  # [2B, T - 1]
    return response_logprobs(logprobs, response_mask[:, 1:]).reshape(-1, 2)


def dataset_logprobs(params, config, rows, batch_size, max_length):
    """log pi(answer | prompt) [N, 2] of all pairs, those of about one length together."""
    order = np.argsort([sum(map(len, row)) for row in rows])
    order = np.append(order, order[-1:].repeat(-len(order) % batch_size))  # one shape to compile
    logprobs = np.zeros((len(rows), 2), np.float32)
    for indices in order.reshape(-1, batch_size):
        batch = make_batch([rows[i] for i in indices], max_length)
        logprobs[indices] = pair_logprobs(params, batch, config)
    return logprobs


@functools.partial(
    jax.jit, static_argnames=("config", "optimizer", "args"), donate_argnames="state"
)
def train_step(state, batch, ref_params, config, optimizer, args):
    """One optimizer step on a batch of make_batch, with "ref_logprobs" [B, 2] added."""

    def loss_fn(params, batch):  # the adapter alone is differentiated
        logprobs = pair_logprobs(attach(ref_params, params, args), batch, config)
        lengths = batch["response_mask"].sum(axis=2)  # [B, 2]
        return pair_loss(logprobs, batch["ref_logprobs"], lengths, args)

    counts = jnp.ones(len(batch["tokens"]))
    (_, metrics), grads = accumulate_gradients(
        loss_fn, state.params, batch, counts, args.micro_batch_size
    )
    metrics |= {"grad_norm": optax.tree.norm(grads)}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics


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


# -------------------------------------------------------------------------------------------- main


def main(args):
    check_flags(args)
    run = RunFolder(args)

    config, ref_params = load_model(args.model)
    tokenizer = load_tokenizer(args.model)
    eos_id = end_token(config, tokenizer)
    config = dataclasses.replace(config, eos_token_id=eos_id, remat=args.remat)
    gold = load_gold(args.gold, args.dataset)
    answers = ["chosen", "rejected"]
    pairs, eval_pairs = (
        encode_rows(rows, answers, tokenizer, eos_id, args)
        for rows in read_data(args, ["prompt", *answers])
    )
    rows = [ids for _, ids in pairs]  # [[prompt, chosen, rejected], …]
    eval_rows = [ids for _, ids in eval_pairs]

    check("score" not in ref_params, f"{args.model} is a reward model, not a language model")
    check_sizes(config, tokenizer, args)
    check(args.temperature > 0, "--temperature must be above 0: else there is no KL")
    check(args.beta > 0, "--beta must be above 0")
    smoothing = "--label-smoothing must be at least 0 and below 0.5, and is for --loss sigmoid"
    check(0 <= args.label_smoothing < 0.5, smoothing)
    check(args.loss == "sigmoid" or not args.label_smoothing, smoothing)
    fits = args.batch_size % args.micro_batch_size == 0
    check(fits, f"--micro-batch-size does not divide --batch-size {args.batch_size}")
    check(args.batch_size <= len(rows), f"--batch-size is above the {len(rows)} pairs")

    max_length = args.max_prompt_length + args.max_completion_length
    lengths = [len(row[0]) + max(map(len, row[1:])) for row in rows]  # of the longer answer
    batches = length_batches(lengths, args.batch_size, args.epochs, args.seed)
    total_steps = len(batches)
    optimizer, schedule = make_optimizer(args, total_steps)
    adapter = init_adapter(ref_params, args)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (adapter, ref_params)]
    print("adapter: {:,} of {:,} parameters, {:.2%}".format(*sizes, sizes[0] / sizes[1]))
    ref_params = attach(ref_params, adapter, args)  # with B = 0, also where the policy has moved
    if args.adapter:
        adapter = load_adapter(args.adapter, adapter, args)
    state, start = run.start(make_state(adapter, optimizer), total_steps)
    ref_logprobs, eval_ref_logprobs = (
        dataset_logprobs(ref_params, config, x, args.micro_batch_size, max_length)
        for x in (rows, eval_rows)
    )

    def evaluate_and_sample(step):
        models = (attach(ref_params, state.params, args), ref_params, config, tokenizer)
        key = stream_key(args.seed, "eval", step)
        asked = eval_pairs[:256]
        sampled, rows, texts = rollout(*models, asked, num_samples=1, key=key, args=args)
        scores = {"gold/reward": call_reward(gold, rows, texts)} if gold else {}
        metrics, samples = describe(sampled, rows, texts, scores)
        run.log_samples(step, samples[:8])
        size = args.micro_batch_size
        logprobs = dataset_logprobs(models[0], config, eval_rows, size, max_length)
        lengths = np.array([[len(chosen), len(rejected)] for _, chosen, rejected in eval_rows])
        metrics |= pair_loss(jnp.asarray(logprobs), eval_ref_logprobs, lengths, args)[1]
        return {f"eval/{name}": value for name, value in metrics.items()}

    if start == 0:
        run.log(0, evaluate_and_sample(0), "eval/loss")
    for step in range(start + 1, total_steps + 1):
        indices = batches[step - 1]
        batch = make_batch([rows[i] for i in indices], max_length)
        batch["ref_logprobs"] = ref_logprobs[indices]
        started = time.perf_counter()
        state, metrics = train_step(state, batch, ref_params, config, optimizer, args)
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - started
        metrics["lr"] = schedule(step - 1)
        metrics["perf/tokens_per_second"] = batch["mask"].sum() / seconds
        if run.due(step, args.eval_every):
            metrics |= evaluate_and_sample(step)
        if run.due(step, args.log_every, args.eval_every, args.save_every):
            run.log(step, metrics, "loss", "eval/loss", "eval/gold/reward")
        if run.must_save(step, args.save_every):
            run.save(step, state)
    save_adapter(run.path / "adapter", state.params, args)
    save_model(run.path / "model", config, merge(ref_params, state.params, args), args.model)
    run.finish(f"evaluate.py --ref {args.model} --models")


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
    layer = functools.partial(LoRADense, dtype=config.dtype, dot_general=dot)
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


def save_adapter(folder, adapter, args, prefix="transformer", fan_in_fan_out=True):
    """Writes a folder in PEFT's format; prefix: where the layers are in transformers' model."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": fan_in_fan_out}
    settings |= {"base_model_name_or_path": args.model, "target_modules": list(args.lora_targets)}
    settings |= {"r": args.lora_rank, "lora_alpha": args.lora_alpha, "use_rslora": args.rslora}
    flat = flatten_dict(adapter)
    names = [".".join(["base_model.model", prefix, *path[:-1], "weight"]) for path in flat]
    tensors = {name: x.reshape(len(x), -1).T for name, x in zip(names, flat.values())}
    header = {"base": str(checksum(find_model(args.model)))}  # a second entry: in random order
    folder.mkdir(exist_ok=True)
    write_file(folder / "adapter_model.safetensors", safetensors.flax.save(tensors, header))
    write_file(folder / "adapter_config.json", json.dumps(settings, indent=2).encode())


def load_adapter(folder, adapter, args, prefix="transformer"):
    """A tree like `adapter` from a folder in PEFT's format; fails on all that is not plain LoRA."""
    may = {"r": [args.lora_rank], "lora_alpha": [args.lora_alpha], "use_rslora": [args.rslora]}
    may |= {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, False, "gaussian"]}
    any_value = "auto_mapping base_model_name_or_path fan_in_fan_out inference_mode lora_dropout "
    any_value += "megatron_core peft_version qalora_group_size revision target_modules task_type"
    for name, found in read_json(Path(folder) / "adapter_config.json").items():
        values = may.get(name, [None, False, [], {}])  # a feature that is off
        right = found in values or name in any_value.split()
        check(right, f"{folder}: {name} is {found!r}, which here can only be {values[0]!r}")
    path = Path(folder) / "adapter_model.safetensors"
    with file_access(path):
        saved = safetensors.flax.load_file(path)
        base = (safetensors.safe_open(path, "np").metadata() or {}).get("base")
    other = f"{folder} belongs to another model than {args.model}, or to other --lora-targets"
    check(base in (None, str(checksum(find_model(args.model)))), other)
    flat = flatten_dict(adapter)
    names = [".".join(["base_model.model", prefix, *path[:-1], "weight"]) for path in flat]
    wanted = [(name, x.reshape(len(x), -1).T.shape) for name, x in zip(names, flat.values())]
    odd = sorted({*wanted} ^ {(name, x.shape) for name, x in saved.items()})
    check(not odd, f"{other}: {odd[:2]}")
    loaded = [saved[name].T.astype(jnp.float32) for name in names]
    return unflatten_dict({p: x.reshape(flat[p].shape) for p, x in zip(flat, loaded)})


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


def length_batches(lengths, batch_size, epochs, seed):
    """Row numbers [steps, batch_size]: rows of similar lengths; what fills no batch is left out."""
    batches = []
    for epoch in range(epochs):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
        order = order[np.argsort(np.asarray(lengths)[order], kind="stable")]
        batches.append(rng.permutation(order.reshape(-1, batch_size)))
    return np.concatenate(batches)


def padded_width(longest, max_length):
    """`longest` rounded up to a quarter of max_length: four shapes at most to compile."""
    quarter = -(-max_length // 4)
    return -(-longest // quarter) * quarter


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


if __name__ == "__main__":
    main(args)
