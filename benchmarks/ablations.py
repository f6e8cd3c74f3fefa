"""What breaks without a detail: each run takes one away, and stands beside the run that has it.

    python benchmarks/ablations.py                  # all of ABLATIONS, seeds 1, 2, 3; resumable
    python benchmarks/ablations.py ppo ppo-no-kl    # these alone, in this order
    python benchmarks/ablations.py --write          # runs nothing: the tables of docs/*.md again

It starts from the models of seeds 1, 2, 3: runs/sft1/model, runs/reward1/model and so on, which

    for s in 1 2 3; do
        python sft.py --seed $s --run-dir runs/sft$s
        python reward.py --seed $s --model runs/sft$s/model --run-dir runs/reward$s
    done

makes. An ablation is a script, flags, and perhaps a patch: a function that gets the script as a
fresh module and puts something else in the place of one of its functions. SIZES holds what all
runs of a script share: they are much shorter than the scripts' defaults, so compare a row with its
baseline, not with the README. A run that is in ablations.jsonl with the same settings is not made
again. All policies are measured by evaluate.py's code, unpatched, on the 500 held-out prompts;
J = learned reward - 0.3 * KL.
"""

import contextlib
import functools
import gc
import hashlib
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
KL_COEF = 0.3  # of J, whatever coefficient the run had
RESULTS = ROOT / "benchmarks" / "ablations.jsonl"


@dataclass(frozen=True)
class Args:
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # of ABLATIONS; default: all
    runs: str = "runs"  # where sft1, reward1, … lie; the ablated runs go to its ablations/
    minutes: float = 1e9  # no run begins later than this
    write: bool = False  # run nothing, only write the tables into docs/


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(ROOT))

# ----------------------------------------------------------------------------------------- patches
# Each gets the script, a module of its own, before its main runs.


def no_whitening(script):
    """Advantages as they come out of GAE."""
    script.whiten = lambda x, mask, shift_mean=True: x * mask


def k3_in_reward(script):
    """k3 = exp(-k1) - 1 + k1 in the place of k1: never negative, less noise, another gradient."""
    k1 = script.compute_kl_divergence
    script.compute_kl_divergence = lambda *x: jnp.expm1(-k1(*x)) + k1(*x)


def with_critic(change):
    """A patch that starts from change(critic, policy)."""

    def patch(script):
        make_state = script.make_state

        def changed(params, *more):
            critic = change(params["critic"], params["policy"])
            return make_state(params | {"critic": critic}, *more)

        script.make_state = changed

    return patch


def new_head(critic):
    """The reward model's initialisation of its head: N(0, 1 / (D + 1))."""
    kernel = critic["score"]["kernel"]
    noise = jax.random.normal(jax.random.key(0), kernel.shape)
    return {"kernel": noise * (len(kernel) + 1) ** -0.5}


def zero_head(critic):
    return {"kernel": jnp.zeros_like(critic["score"]["kernel"])}


critic_from_policy = with_critic(
    lambda critic, policy: (
        {k: x for k, x in policy.items() if k != "lm_head"} | {"score": zero_head(critic)}
    )
)
critic_with_new_head = with_critic(lambda critic, _: critic | {"score": new_head(critic)})
critic_with_zero_head = with_critic(lambda critic, _: critic | {"score": zero_head(critic)})


def raw_reward(script):
    """The reward model as it was trained, without `normalise` of reward.py."""
    load_model = script.load_model

    def load_raw(name):
        config, params = load_model(name)
        if "score" in params:
            saved = json.loads((script.find_model(name) / "config.json").read_text())
            gain, shift = saved["reward_gain"], saved["reward_shift"]
            w = params["score"]["kernel"]
            bias = params["ln_f"]["bias"] - shift * w[:, 0] / jnp.sum(w**2)
            params |= {"score": {"kernel": w / gain}, "ln_f": params["ln_f"] | {"bias": bias}}
        return config, params

    script.load_model = load_raw


def constant_learning_rate(script):
    """No warm-up, no fall to 0."""

    def make_optimizer(args, _):
        adamw = optax.adamw(args.learning_rate, weight_decay=args.weight_decay)
        chain = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw)
        return chain, lambda step: args.learning_rate

    script.make_optimizer = make_optimizer


def with_adamw(adamw):
    """A patch with another optax.adamw."""

    def patch(script):
        script.optax = types.SimpleNamespace(**vars(optax) | {"adamw": adamw})

    return patch


adam_eps = with_adamw(functools.partial(optax.adamw, eps=1e-5))
decay_all = with_adamw(lambda *x, mask, **more: optax.adamw(*x, **more))


def same_noise(script):
    """One random key for all steps, as where a default key is left in the sampler."""
    stream_key = script.stream_key
    script.stream_key = lambda seed, name, step: stream_key(seed, name, 0)


def without_temperature(script):
    """Log-probabilities at temperature 1, whatever the samples were drawn at."""
    read_response = script.read_response
    script.read_response = lambda *x: read_response(*x[:-1], 1.0)


def padding_counts(script):
    """No mask behind EOS: padding is read, scored and learned."""
    rollout = script.rollout

    def changed(params, ref_params, config, tokenizer, prompts, num_samples, key, args):
        rest = (config, tokenizer, prompts, num_samples, key, args)
        sampled, rows, texts = rollout(params, ref_params, *rest)
        P = args.max_prompt_length
        mask = sampled.mask.at[:, P:].set(1)
        logprobs, ref_logprobs = (
            script.policy_logprobs(p, config, sampled.tokens, mask, P, args.temperature)
            for p in (params, ref_params)
        )
        response_mask = jnp.ones_like(sampled.response_mask)
        more = {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "response_mask": response_mask}
        return sampled._replace(mask=mask, **more), rows, texts

    script.rollout = changed


def eos_is_no_action(script):
    """EOS is not learned, as where a mask is made by tokens != pad and pad is EOS."""
    rollout = script.rollout

    def changed(*x, **more):
        sampled, rows, texts = rollout(*x, **more)
        length = sampled.response_mask.sum(axis=1, keepdims=True) - sampled.ended[:, None]
        kept = jnp.arange(sampled.response_mask.shape[1]) < length
        return sampled._replace(response_mask=sampled.response_mask * kept), rows, texts

    script.rollout = changed


def k1_in_loss(script):
    """k1 is differentiated: with --kl-in loss, in the place of k3."""
    grpo_loss = script.grpo_loss

    def changed(logprobs, old_logprobs, ref_logprobs, advantages, mask, kl_coef, **more):
        arrays = (logprobs, old_logprobs, ref_logprobs, advantages, mask)
        loss, metrics = grpo_loss(*arrays, kl_coef=0.0, **more)
        k1 = jnp.sum((logprobs - ref_logprobs) * mask) / (len(mask) * more["max_length"])
        return loss + kl_coef * k1, metrics

    script.grpo_loss = changed


def no_baseline(script):
    """The reward itself is the advantage."""
    script.group_relative_advantage = lambda rewards, *_: jnp.nan_to_num(rewards)


def batch_baseline(script):
    """Reward minus the mean of all, not of the group."""
    script.group_relative_advantage = lambda rewards, *_: jnp.nan_to_num(
        rewards - jnp.nanmean(rewards)
    )


def mean_logprobs(script):
    """The mean of the tokens' log-probabilities, not their sum."""

    def response_logprobs(logprobs, mask):
        return jnp.sum(logprobs * mask, axis=1) / jnp.maximum(mask.sum(axis=1), 1)

    script.response_logprobs = response_logprobs


def no_reference(script):
    """The reference's log-probabilities are 0."""
    pair_loss = script.pair_loss
    script.pair_loss = lambda logprobs, ref_logprobs, *more: pair_loss(
        logprobs, jnp.zeros_like(ref_logprobs), *more
    )


def prompt_counts(script):
    """The prompt's tokens are in the sum, too."""
    make_batch = script.make_batch

    def changed(*x):
        batch = make_batch(*x)
        return batch | {"response_mask": batch["mask"]}

    script.make_batch = changed


def no_eos(script):
    """Answers end without EOS."""
    encode_rows = script.encode_rows

    def changed(*x):
        found = encode_rows(*x)
        return [(row, [ids[0], *(answer[:-1] for answer in ids[1:])]) for row, ids in found]

    script.encode_rows = changed


def score_at_last_column(script):
    """The score is read at the end of the padded row, not at the last real token."""
    script.sequence_scores = lambda scores, mask: scores[:, -1]


def mean_of_scores(script):
    """The mean of all tokens' scores."""
    script.sequence_scores = lambda scores, mask: jnp.sum(scores * mask, 1) / mask.sum(axis=1)


def with_params(change):
    """A patch that starts from change(params)."""

    def patch(script):
        make_state = script.make_state
        script.make_state = lambda params, *more: make_state(change(params), *more)

    return patch


def forget(params):
    """A trunk that was never trained; the head stays."""

    def draw(path, x):
        if path[-1].key == "scale" or path[0].key == "score":
            return x if path[0].key == "score" else jnp.ones_like(x)
        key = jax.random.key(hash_of(jax.tree_util.keystr(path)))
        return 0.05 * jax.random.normal(key, x.shape) * (path[-1].key != "bias")

    return jax.tree.map_with_path(draw, params)


head_of_0 = with_params(lambda params: params | {"score": zero_head(params)})
head_times_10 = with_params(
    lambda params: params | {"score": {"kernel": 10 * params["score"]["kernel"]}}
)
new_trunk = with_params(forget)


def mean_of_means(script):
    """Each micro-batch counts alike, however many tokens it has."""
    accumulate_gradients = script.accumulate_gradients
    script.accumulate_gradients = lambda loss_fn, params, batch, counts, size: accumulate_gradients(
        loss_fn, params, batch, jnp.ones_like(counts), size
    )


def init_for_768(script):
    """GPT-2's standard deviation 0.02, which is for a width of 768."""
    config = script.GPT2Config
    script.GPT2Config = lambda **x: config(**x | {"initializer_range": 0.02})


def no_residual_scaling(script):
    """Layers that add to the residual stream start as large as all others."""
    dense = script.dense
    script.dense = lambda config, features, name, residual=False: dense(config, features, name)


# ------------------------------------------------------------------------------------------- table


class Ablation(NamedTuple):
    script: str
    what: str  # is changed, in words
    flags: str = ""  # besides those of SIZES
    patch: Callable | None = None
    baseline: str = ""  # the run that it is compared with; default: the one named as the script


FROM_SFT = "--model {runs}/sft{seed}/model"
WITH_REWARD = f"{FROM_SFT} --reward-model {{runs}}/reward{{seed}}/model"
HELD_OUT = "--eval-dataset {runs}/ablations/prompts.jsonl"
PAIRS = "--dataset {runs}/ablations/pairs.jsonl --eval-dataset {runs}/ablations/"
# What all runs of a script share. Completions of at most 32 tokens: 1 in 50 reviews is longer.
SIZES = {
    "ppo": f"{WITH_REWARD} {HELD_OUT} --steps 12 --batch-size 64 --max-completion-length 32",
    "grpo": f"{WITH_REWARD} {HELD_OUT} --steps 24 --batch-size 64 --max-completion-length 32",
    "iterative_dpo": f"{WITH_REWARD} {HELD_OUT} --rounds 30 --prompts-per-round 64"
    " --batch-size 32 --max-completion-length 32",
    "dpo": f"{FROM_SFT} {PAIRS}pairs_few.jsonl --batch-size 32",
    "reward": f"{FROM_SFT} {PAIRS}pairs_test.jsonl --batch-size 32 --epochs 1",
    "sft": "--dataset {runs}/ablations/reviews.jsonl"
    " --eval-dataset {runs}/ablations/reviews_test.jsonl",
}
SIZES["mixed_precision"] = SIZES["sft"]
# Parts of the embedded data: {name: (file, its first rows)}.
DATA = {
    "prompts": ("prompts_test.jsonl", 64),
    "pairs": ("preferences_train.jsonl", 1600),
    "pairs_test": ("preferences_test.jsonl", 1000),
    "pairs_few": ("preferences_test.jsonl", 64),
    "reviews": ("sft_train.jsonl", 1280),
    "reviews_test": ("sft_test.jsonl", 64),
}

# fmt: off
ABLATIONS = {
    "ppo": Ablation("ppo", "as it is"),
    "ppo-no-kl": Ablation("ppo", "no KL penalty", "--kl-coef 0"),
    "ppo-k3-in-reward": Ablation("ppo", "k3 in the reward, not k1", patch=k3_in_reward),
    "ppo-no-whitening": Ablation("ppo", "advantages not whitened", patch=no_whitening),
    "ppo-critic-from-policy": Ablation(
        "ppo", "critic from the SFT policy, head 0", patch=critic_from_policy),
    "ppo-new-value-head": Ablation(
        "ppo", "critic from the reward model, new random head", patch=critic_with_new_head),
    "ppo-zero-value-head": Ablation(
        "ppo", "critic from the reward model, head 0", patch=critic_with_zero_head),
    "ppo-raw-reward": Ablation("ppo", "reward model not normalised", patch=raw_reward),
    "ppo-lambda-1": Ablation("ppo", "lambda 1", "--lam 1"),
    "ppo-lambda-0": Ablation("ppo", "lambda 0", "--lam 0"),
    "ppo-gamma-0.9": Ablation("ppo", "gamma 0.9", "--gamma 0.9"),
    "ppo-one-epoch": Ablation("ppo", "one pass over a rollout, not four", "--epochs 1"),
    "ppo-no-ratio-clip": Ablation("ppo", "ratio not clipped", "--clip-eps 1e9"),
    "ppo-no-value-clip": Ablation("ppo", "value not clipped", "--value-clip-eps 1e9"),
    "ppo-no-grad-clip": Ablation("ppo", "gradient not clipped", "--max-grad-norm 1e9"),
    "ppo-adam-eps": Ablation("ppo", "Adam's ε 1e-5, not 1e-8", patch=adam_eps),
    "ppo-constant-lr": Ablation(
        "ppo", "constant learning rate", patch=constant_learning_rate),
    "ppo-high-lr": Ablation("ppo", "learning rate 3e-3, not 3e-4", "--learning-rate 3e-3"),
    "ppo-whiten-rewards": Ablation("ppo", "rewards divided by their std", "--whiten-rewards"),
    "ppo-entropy-bonus": Ablation("ppo", "entropy bonus", "--entropy-coef 0.05"),
    "ppo-padding-counts": Ablation("ppo", "padding not masked", patch=padding_counts),
    "ppo-same-noise": Ablation("ppo", "one random key for all steps", patch=same_noise),
    "ppo-temperature": Ablation("ppo", "sampled at 0.7", "--temperature 0.7"),
    "ppo-temperature-mismatch": Ablation(
        "ppo", "sampled at 0.7, log-probabilities at 1", "--temperature 0.7", without_temperature,
        "ppo-temperature"),
    "ppo-short": Ablation("ppo", "at most 16 tokens", "--max-completion-length 16"),
    "ppo-short-no-penalty": Ablation(
        "ppo", "at most 16 tokens, missing EOS is free",
        "--max-completion-length 16 --missing-eos-penalty 0", None, "ppo-short"),
    "grpo": Ablation("grpo", "as it is"),
    "grpo-no-kl": Ablation("grpo", "no KL penalty", "--kl-coef 0"),
    "grpo-std": Ablation("grpo", "divided by the group's std", "--advantage group-std"),
    "grpo-leave-one-out": Ablation("grpo", "RLOO's baseline", "--advantage leave-one-out"),
    "grpo-no-baseline": Ablation("grpo", "no baseline", patch=no_baseline),
    "grpo-batch-baseline": Ablation(
        "grpo", "the batch's mean as the baseline", patch=batch_baseline),
    "grpo-groups-of-2": Ablation("grpo", "groups of 2, not 8", "--num-generations 2"),
    "grpo-groups-of-4": Ablation("grpo", "groups of 4, not 8", "--num-generations 4"),
    "grpo-kl-in-loss": Ablation("grpo", "k3 in the loss", "--kl-in loss"),
    "grpo-k1-in-loss": Ablation("grpo", "k1 in the loss", "--kl-in loss", k1_in_loss),
    "grpo-token-mean": Ablation("grpo", "mean over all tokens", "--aggregation token"),
    "grpo-sequence-mean": Ablation(
        "grpo", "mean of the sequences' means", "--aggregation sequence"),
    "grpo-sequence-ratio": Ablation("grpo", "ratio of sequences", "--ratio-level sequence"),
    "grpo-no-ratio-clip": Ablation("grpo", "ratio not clipped", "--clip-eps 1e9"),
    "grpo-one-epoch": Ablation("grpo", "one pass over a rollout, not two", "--epochs 1"),
    "grpo-eos-is-no-action": Ablation("grpo", "EOS not learned", patch=eos_is_no_action),
    "dpo": Ablation("dpo", "as it is"),
    "dpo-plain": Ablation("dpo", "no NLL term", "--nll-coef 0"),
    "dpo-no-reference": Ablation("dpo", "no reference", patch=no_reference),
    "dpo-mean-logprobs": Ablation(
        "dpo", "mean of the tokens' log-probabilities", patch=mean_logprobs),
    "dpo-plain-mean-logprobs": Ablation(
        "dpo", "the same, without the NLL term", "--nll-coef 0", mean_logprobs, "dpo-plain"),
    "dpo-prompt-counts": Ablation("dpo", "prompt not masked", patch=prompt_counts),
    "dpo-no-eos": Ablation("dpo", "answers without EOS", patch=no_eos),
    "dpo-ipo": Ablation("dpo", "IPO's loss", "--loss ipo"),
    "dpo-hinge": Ablation("dpo", "hinge loss", "--loss hinge"),
    "dpo-smoothing": Ablation("dpo", "labels smoothed by 0.1", "--label-smoothing 0.1"),
    "dpo-beta-0.03": Ablation("dpo", "β = 0.03", "--beta 0.03"),
    "dpo-beta-3": Ablation("dpo", "β = 3", "--beta 3"),
    "iterative_dpo": Ablation("iterative_dpo", "as it is"),
    "iterative_dpo-hard-labels": Ablation(
        "iterative_dpo", "the better of two is always chosen", "--pair best-worst"),
    "iterative_dpo-best-of-4": Ablation(
        "iterative_dpo", "best against worst of 4", "--pair best-worst --num-generations 4"),
    "iterative_dpo-moving-reference": Ablation(
        "iterative_dpo", "reference: the policy as the round began", "--reference previous"),
    "iterative_dpo-reset": Ablation(
        "iterative_dpo", "optimizer and schedule anew in each round",
        "--reset-optimizer --warmup-steps 1"),
    "iterative_dpo-nll": Ablation("iterative_dpo", "with an NLL term", "--nll-coef 1"),
    "reward": Ablation("reward", "as it is"),
    "reward-last-column": Ablation(
        "reward", "score read at the end of the padding", patch=score_at_last_column),
    "reward-mean-of-scores": Ablation("reward", "mean of all scores", patch=mean_of_scores),
    "reward-no-eos": Ablation("reward", "answers without EOS", patch=no_eos),
    "reward-zero-head": Ablation("reward", "head starts at 0", patch=head_of_0),
    "reward-head-times-10": Ablation(
        "reward", "head starts 10 times as large", patch=head_times_10),
    "reward-new-trunk": Ablation("reward", "not from the SFT model", patch=new_trunk),
    "reward-center": Ablation("reward", "level of the scores fixed", "--center-coef 0.01"),
    "reward-three-passes": Ablation("reward", "three passes, not one", "--epochs 3"),
    "reward-no-decay": Ablation("reward", "no weight decay", "--weight-decay 0"),
    "sft": Ablation("sft", "as it is"),
    "sft-train-on-prompt": Ablation("sft", "prompt in the loss, too", "--train-on-prompt"),
    "sft-no-eos": Ablation("sft", "answers without EOS", patch=no_eos),
    "sft-mean-of-means": Ablation("sft", "micro-batches count alike", patch=mean_of_means),
    "sft-init": Ablation("sft", "initial std 0.02, not 0.049", patch=init_for_768),
    "sft-no-residual-scaling": Ablation(
        "sft", "residual layers not scaled at the start", patch=no_residual_scaling),
    "sft-no-warm-up": Ablation("sft", "no warm-up", "--warmup-steps 1"),
    "sft-constant-lr": Ablation("sft", "constant learning rate", patch=constant_learning_rate),
    "sft-no-grad-clip": Ablation("sft", "gradient not clipped", "--max-grad-norm 1e9"),
    "sft-no-decay": Ablation("sft", "no weight decay", "--weight-decay 0"),
    "sft-decay-all": Ablation("sft", "biases and norms decay, too", patch=decay_all),
    "mixed_precision": Ablation("mixed_precision", "float16, scaled"),
    "mixed_precision-no-scaling": Ablation(
        "mixed_precision", "float16, not scaled", "--loss-scale 1 --growth-interval 99999"),
    "mixed_precision-bfloat16": Ablation("mixed_precision", "bfloat16", "--dtype bfloat16"),
    "mixed_precision-float32": Ablation("mixed_precision", "float32", "--dtype float32"),
}
# fmt: on

# -------------------------------------------------------------------------------------------- runs


def hash_of(text):
    return int(hashlib.sha1(text.encode()).hexdigest()[:7], 16)


def settings(name):
    """What a result depends on: flags, and the patch's source."""
    ablation = ABLATIONS[name]
    flags = f"{SIZES[ablation.script]} {ablation.flags}".strip()
    if ablation.patch is None:
        return flags
    captured = [x.cell_contents for x in ablation.patch.__closure__ or ()]
    sources = [
        inspect.getsource(x) if inspect.isfunction(x) else re.sub(r" at 0x\w+", "", str(x))
        for x in [ablation.patch, *captured]
    ]
    return f"{flags} [patch {hash_of(''.join(sources)):x}]"


# What one compiled program serves all values of: the models' sizes are the same.
FREE = ("seed", "run_dir", "model", "reward_model")


@functools.lru_cache(maxsize=1)
def patched_module(script, patch):
    """A script as a module of its own: what a patch changes there is nowhere else.

    Its Args are equal where all but FREE is, so that the seeds share what is traced and compiled.
    """
    spec = importlib.util.spec_from_file_location(f"ablated_{script}", ROOT / f"{script}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if patch:
        patch(module)

    def key(args):
        return tuple(value for name, value in vars(args).items() if name not in FREE)

    module.Args.__eq__ = lambda self, other: key(self) == key(other)
    module.Args.__hash__ = lambda self: hash(key(self))
    module.make_optimizer = functools.lru_cache(module.make_optimizer)  # a static argument, too
    return module


def run(name, seed, args):
    """Trains and measures: {"figures"}, or {"failed"} with the script's last words."""
    ablation = ABLATIONS[name]
    place = Path(args.runs) / "ablations" / f"{name}-{seed}"
    module = patched_module(ablation.script, ablation.patch)
    flags = f"{SIZES[ablation.script]} {ablation.flags}".format(runs=args.runs, seed=seed).split()
    never = ["--eval-every", "1000000", "--save-every", "1000000"]
    flags += ["--seed", str(seed), "--run-dir", str(place), "--overwrite", *never]
    words = io.StringIO()
    try:
        with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
            module.main(tyro.cli(module.Args, args=flags))
    except SystemExit as stop:
        if stop.code >= 128:  # Ctrl-C
            raise
        return {"failed": words.getvalue().strip().splitlines()[-1]}
    except Exception:
        print(words.getvalue()[-2000:])
        raise
    found = {"figures": measure(ablation.script, place, seed, args)}
    shutil.rmtree(place)
    return found


@functools.cache
def bench_of(seed, runs):
    """(evaluate.py, its flags, its Bench) of a seed's SFT policy and reward model."""
    import evaluate

    flags = evaluate.Args(ref=f"{runs}/sft{seed}/model", reward_model=f"{runs}/reward{seed}/model")
    return evaluate, flags, evaluate.load_bench(flags)


def measure(script, place, seed, args):
    """The figures of a finished run."""
    lines = (place / "metrics.jsonl").read_text("utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    if script == "reward":
        names = ["rewards/accuracies", "loss", "calibration_error"]
        figures = {x.removeprefix("rewards/"): log[-1][f"eval/{x}"] for x in names}
        config = json.loads((place / "model" / "config.json").read_text())
        return figures | {"gain": config["reward_gain"]}
    evaluate, flags, bench = bench_of(seed, args.runs)
    own = script in ("sft", "mixed_precision")  # no SFT policy to be compared with
    config, params = evaluate.ppo.load_model(place)
    if own:
        bench = bench._replace(ref=(config, params))
    with contextlib.redirect_stdout(io.StringIO()):
        samples = evaluate.draw_samples((config, params), bench, 500, 1, "table", flags)
    figures = {x: float(np.mean(getattr(samples, x))) for x in ("gold", "length", "ended")}
    if own:
        module = importlib.import_module("sft")
        wanted = module.Args(dataset=str(ROOT / "data/reviews/sft_test.jsonl"))
        rows = module.read_jsonl(wanted.dataset, ["prompt", "completion"])
        rows = module.encode_rows(rows, ["completion"], bench.tokenizer, bench.eos_id, wanted)
        found = module.evaluate(params, config, [ids for _, ids in rows], 16, 64)
        figures |= {"loss": found["eval/loss"], "accuracy": found["eval/mean_token_accuracy"]}
        return figures | {"skipped": log[-1].get("skipped_steps", 0)}
    for x in ("reward", "kl", "entropy"):
        figures[x] = float(np.mean(getattr(samples, x)))
    if script == "dpo":
        figures["accuracies"] = log[-1]["eval/rewards/accuracies"]
    return figures | {"J": figures["reward"] - KL_COEF * figures["kl"]}


def make_data(runs):
    folder = Path(runs) / "ablations"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (file, count) in DATA.items():
        lines = (ROOT / "data/reviews" / file).read_text("utf-8").splitlines(True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), "utf-8")


def read_results():
    """{(ablation, seed): row} of all runs with the settings that the table has now."""
    rows = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    rows = [json.loads(row) for row in rows]
    known = [x for x in rows if x["ablation"] in ABLATIONS]
    found = [x for x in known if x["settings"] == settings(x["ablation"])]
    return {(x["ablation"], x["seed"]): x for x in found}


# ------------------------------------------------------------------------------------------- pages

# Figures of a kind of script, as (key, title, digits); the first is the one that is compared.
POLICY = [("J", "J", 2), ("gold", "gold", 3), ("reward", "reward", 2), ("kl", "KL", 2)]
POLICY += [("entropy", "entropy", 1), ("length", "length", 1), ("ended", "ended", 3)]
REWARD = [("accuracies", "accuracy", 3), ("loss", "loss", 3)]
REWARD += [("calibration_error", "calibration error", 3), ("gain", "gain of `normalise`", 2)]
TEXT = [("loss", "loss", 3), ("ended", "ended", 3), ("accuracy", "token accuracy", 3)]
TEXT += [("length", "length", 1)]
COLUMNS = dict.fromkeys(["ppo", "grpo", "iterative_dpo", "dpo"], POLICY)
COLUMNS |= {"reward": REWARD, "sft": TEXT, "mixed_precision": TEXT}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 % quantile for so many seeds
NOT_MEASURED = "not measured"


def spread(values, digits):
    """Mean ± standard deviation over seeds."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else " (one seed)"
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def seeds_of(name, results):
    """{seed: figures} of an ablation's runs that came to their end."""
    rows = {seed: results[name, seed] for seed in SEEDS if (name, seed) in results}
    return {seed: row["figures"] for seed, row in rows.items() if "figures" in row}


def baseline_of(name):
    return ABLATIONS[name].baseline or ABLATIONS[name].script


def difference(name, results):
    """The compared figure minus the baseline's of the same seeds; bold if the seeds agree on it.

    Bold: the 95 % interval of a paired t-test excludes 0.
    """
    key, _, digits = COLUMNS[ABLATIONS[name].script][0]
    own, base = seeds_of(name, results), seeds_of(baseline_of(name), results)
    values = [own[seed][key] - base[seed][key] for seed in own if seed in base]
    if not values:
        return "", False
    text = f"{statistics.mean(values):+.{digits}f}"
    if len(values) < 2:
        return text, False
    half = STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    text += f" ± {statistics.stdev(values):.{digits}f}"
    sure = abs(statistics.mean(values)) > half
    return f"**{text}**" if sure else text, sure


def failures(name, results):
    rows = [results[name, seed] for seed in SEEDS if (name, seed) in results]
    return [row["failed"] for row in rows if "failed" in row]


def table(script, results):
    """The lines of a script's table, in the order of ABLATIONS."""
    columns = COLUMNS[script]
    titles = ["run", "what is changed", f"difference in {columns[0][1]}"]
    titles += [title for _, title, _ in columns]
    lines = [titles, ["---"] * len(titles)]
    for name, ablation in ABLATIONS.items():
        if ablation.script != script:
            continue
        figures, failed = seeds_of(name, results), failures(name, results)
        what = ablation.what + (f" (against `{ablation.baseline}`)" if ablation.baseline else "")
        if failed:
            what += f"; {len(failed)} of {len(failed) + len(figures)} seeds failed: {failed[0]}"
        cells = [f"`{name}`", what, "" if name == script else difference(name, results)[0]]
        for key, _, digits in columns:
            values = [x[key] for x in figures.values()]
            cells.append(spread(values, digits) if values else "failed" * bool(failed))
        if not figures and not failed:
            cells[3] = NOT_MEASURED
        lines.append(cells)
    return ["| " + " | ".join(line) + " |" for line in lines]


def sentence(name, results):
    """An ablation in one line, for the list of details."""
    columns = COLUMNS[ABLATIONS[name].script]
    if failed := failures(name, results):
        return f"`{name}`: {len(failed)} of {len(SEEDS)} seeds failed: {failed[0]}"
    own, base = seeds_of(name, results), seeds_of(baseline_of(name), results)
    if not own:
        return f"`{name}`: {NOT_MEASURED}"
    shown = columns[:4] if columns is POLICY else columns[:2]
    parts = []
    for key, title, digits in shown:
        mean, before = (statistics.mean(x[key] for x in y.values()) for y in (own, base))
        parts.append(f"{title} {before:.{digits}f} → {mean:.{digits}f}")
    change, sure = difference(name, results)
    verdict = "" if sure else ", within what the seeds differ by"
    return f"`{name}`: {', '.join(parts)} ({columns[0][1]} {change}{verdict})"


def write_pages(results):
    """Fills the marked places of docs/*.md: <!-- ablations: script -->, <!-- ablation: name -->."""
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = before = path.read_text("utf-8")

        def lines(match):
            return match[1] + "\n".join([*table(match[2], results), match[3]])

        def line(match):
            return f"{match[1]}{sentence(match[2], results)}{match[3]}"

        text = re.sub(r"(<!-- ablations: (\S+) -->\n)[\s\S]*?(<!-- end -->)", lines, text)
        text = re.sub(r"(<!-- ablation: (\S+) -->)[\s\S]*?(<!-- end -->)", line, text)
        if text != before:
            path.write_text(text, "utf-8")


def main(args):
    unknown = set(args.names) - set(ABLATIONS)
    assert not unknown, f"no ablation {unknown}; there are {', '.join(ABLATIONS)}"
    os.chdir(ROOT)
    results, started = read_results(), time.monotonic()
    if not args.write:
        make_data(args.runs)
    asked = [(name, seed) for name in args.names or ABLATIONS for seed in SEEDS]
    for name, seed in [] if args.write else asked:
        if (name, seed) in results or time.monotonic() - started > 60 * args.minutes:
            continue
        since = time.monotonic()
        row = {"ablation": name, "seed": seed, "settings": settings(name)}
        row |= run(name, seed, args) | {"seconds": round(time.monotonic() - since, 1)}
        gc.collect()
        results[name, seed] = row
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {k: round(x, 3) for k, x in row.get("figures", {}).items()}
        print(name, seed, row.get("failed", shown), f"{row['seconds']} s", flush=True)
    write_pages(results)


if __name__ == "__main__":
    main(args)
