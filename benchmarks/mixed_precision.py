"""Shows what loss scaling is for, and how far half precision is from float32.

    python benchmarks/mixed_precision.py

1. Gradients that underflow in float16: the share of their elements that are 0 (and are not in
   float32), with and without a loss scale, in the stream that the blocks read and write and in the
   parameters; and the relative error of the parameters' gradient.
2. 300 steps in float32, in float16 with and without scaling, and in bfloat16, on the same batches:
   the loss, and its largest distance from float32's, both as means of 20 steps.
3. An injected overflow, step by step.
4. log p as sampled minus log p in float32, of 512 sampled sequences.

The model is small (2 layers, width 64) and trained on 4096 tokens of reviews a step. As initialised
by sft.py it does not underflow. `enlarge_residual` multiplies what is written into the residual
stream: the function stays the same, since layer norms divide the factor out, but gradients in the
stream get smaller by it, as they do where training has made the stream large. They are smaller,
too, by the number of tokens that the loss is a mean over: a factor of 1024 at 4096 tokens is one of
64 at 65 536 tokens.
"""

import dataclasses
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import mixed_precision as script

REVIEWS = Path(__file__).resolve().parents[1] / "data" / "reviews"
ROWS, LENGTH, STEPS, WINDOW = 64, 64, 300, 20
RUNS = {  # name: (dtype, loss scaling)
    "float32": ("float32", False),
    "float16, scaled": ("float16", True),
    "float16, not scaled": ("float16", False),
    "bfloat16": ("bfloat16", False),
}


def review_batches(steps, rows=ROWS, length=LENGTH):
    """`steps` batches of running text: reviews one after another, an EOS after each."""
    tokenizer = script.load_tokenizer(REVIEWS / "tokenizer")
    texts = script.read_jsonl(REVIEWS / "sft_train.jsonl", ["prompt", "completion"])
    encode, eos_id = tokenizer.encode_ordinary, tokenizer.eot_token
    ids = [i for row in texts for i in [*encode(row["prompt"] + row["completion"]), eos_id]]
    tokens = np.resize(np.array(ids, np.int32), (steps, rows, length))
    ones = np.ones_like(tokens[0])
    return [{"tokens": x, "mask": ones, "loss_mask": ones} for x in tokens]


def make_model(width=64):
    """(config, parameters) as sft.py initialises them, but with a head of its own."""
    config = script.GPT2Config(
        vocab_size=script.load_tokenizer(REVIEWS / "tokenizer").n_vocab,
        n_positions=LENGTH,
        n_embd=width,
        n_layer=2,
        n_head=4,
        initializer_range=0.02 * (768 / width) ** 0.5,
        tie_word_embeddings=False,
    )
    one = jnp.ones((1, 1), jnp.int32)
    return config, jax.jit(script.GPT2(config).init)(jax.random.key(0), one, one)["params"]


def enlarge_residual(params, factor):
    """The parameters of the same function with a residual stream `factor` times as large."""

    def enlarge(path, x):
        names = [part.key for part in path]
        writes = {"wte", "wpe", "c_proj"} & set(names)
        return factor * x if writes else x

    return jax.tree_util.tree_map_with_path(enlarge, params)


@functools.partial(jax.jit, static_argnums=1)
def gradients(params, config, batch, loss_scale):
    """((of the parameters, of the residual stream), loss): float32, unscaled.

    The residual stream's is with respect to what each block reads, [layers, B * T, D]: the
    derivative by a nudge of 0 that is added there, in config.dtype.
    """

    def loss_fn(params, nudges):
        def add(next_function, args, kwargs, context):
            if isinstance(context.module, script.Block):
                x = args[0] + nudges[int(context.module.name.removeprefix("h."))]
                args = (x, *args[1:])
            return next_function(*args, **kwargs)

        with nn.intercept_methods(add):
            logits = script.GPT2(config).apply({"params": params}, batch["tokens"], batch["mask"])
        targets, loss_mask = batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]
        loss, _ = script.cross_entropy_loss(logits[:, :-1], targets, loss_mask)
        return loss_scale * loss

    shape = (config.n_layer, batch["tokens"].size, config.n_embd)
    loss, grads = jax.value_and_grad(loss_fn, (0, 1))(params, jnp.zeros(shape, config.dtype))
    return jax.tree.map(lambda x: x.astype(jnp.float32) / loss_scale, grads), loss / loss_scale


def underflow(params, config, batch, dtype, loss_scale):
    """(share of zeros in the residual stream's gradient, in the parameters', error of these)."""
    half = dataclasses.replace(config, dtype=dtype)

    def flat(grads):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])

    exact, exact_stream = map(flat, gradients(params, config, batch, 1.0)[0])
    found, stream = map(flat, gradients(params, half, batch, loss_scale)[0])
    zeros = [np.mean(y[x != 0] == 0) for x, y in ((exact_stream, stream), (exact, found))]
    return *zeros, np.linalg.norm(found - exact) / np.linalg.norm(exact)


def train(params, config, dtype, scaled, batches, learning_rate=3e-3):
    """(losses [steps], final state) of mixed_precision.train_step."""
    never = 10**9
    args = script.Args(
        micro_batch_size=ROWS, learning_rate=learning_rate, growth_interval=200 if scaled else never
    )
    config = dataclasses.replace(config, dtype=dtype)
    optimizer, _ = script.make_optimizer(args, len(batches))
    state, losses = script.make_state(params, optimizer, args.loss_scale if scaled else 1.0), []
    for batch in batches:
        state, metrics = script.train_step(state, batch, config, optimizer, args)
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


def smooth(losses):
    """Means of WINDOW steps."""
    return np.convolve(losses, np.ones(WINDOW) / WINDOW, "valid")


def show_gradients(params, config, batch):
    print("\n1. zeros: residual stream, parameters; error of the parameters' gradient")
    for factor in (1, 1024, 4096):
        large = enlarge_residual(params, factor)
        for dtype, loss_scale in (("float16", 1.0), ("float16", 65536.0), ("bfloat16", 1.0)):
            numbers = "  ".join(
                f"{x:8.4%}" for x in underflow(large, config, batch, dtype, loss_scale)
            )
            print(f"residual x {factor:4}, {dtype}, scale {loss_scale:5.0f}:  {numbers}")


def show_training(params, config, batches):
    print(f"\n2. loss, mean of {WINDOW} steps, and its largest distance from float32's")
    for factor in (1, 1024, 4096):
        large = enlarge_residual(params, factor)
        reference = None
        for name, run in RUNS.items():
            losses, state = train(large, config, *run, batches)
            curve = smooth(losses)
            reference = curve if reference is None else reference  # float32 comes first
            shown = "  ".join(f"{curve[i]:.4f}" for i in (0, 30, 80, 130, 180, 230, 280))
            print(
                f"residual x {factor:4}, {name:20} {shown}   {abs(curve - reference).max():.5f}   "
                f"scale {float(state.loss_scale):.0f}, {int(state.skipped_steps)} skipped",
                flush=True,
            )


def show_overflow(params, config, batches):
    print("\n3. a scale of 2 ** 30, float16: step, scale, skipped so far, gradient norm, loss")
    args = script.Args(micro_batch_size=ROWS, growth_interval=4)
    config = dataclasses.replace(config, dtype="float16")
    optimizer, _ = script.make_optimizer(args, len(batches))
    state = script.make_state(params, optimizer, 2.0**30)
    for step, batch in enumerate(batches[:16], 1):
        before = jax.tree.map(np.array, state)
        state, metrics = script.train_step(state, batch, config, optimizer, args)
        equal = jax.tree.map(np.array_equal, before[:2], state[:2])
        same = "weights and optimizer as before" if all(jax.tree.leaves(equal)) else ""
        names = ("loss_scale", "skipped_steps", "grad_norm", "loss")
        print(step, *(f"{float(metrics[name]):10.6g}" for name in names), same)


def show_log_ratios(params, config):
    print("\n4. log p as sampled - log p in float32: std over 512 sequences, mean ratio")
    tokenizer = script.load_tokenizer(REVIEWS / "tokenizer")
    prompts = script.read_jsonl(REVIEWS / "prompts_test.jsonl", ["prompt"])[:64]
    ids = [tokenizer.encode_ordinary(row["prompt"]) for row in prompts]
    tokens, mask = script.pad_rows(ids, 16, left=True)
    for length, eos_id in ((10, -1), (48, tokenizer.eot_token)):
        for dtype in ("float32", "float16", "bfloat16"):
            half = dataclasses.replace(config, dtype=dtype)
            key = jax.random.key(0)
            sampled = script.generate(
                params, half, tokens, mask, key, length, 1.0, eos_id, num_samples=8
            )
            ratios = np.asarray(script.log_ratios(params, half, *sampled, 1.0))
            lengths = np.asarray(sampled[1])[:, 16:].sum(axis=1)
            print(
                f"{lengths.mean():.1f} tokens, {dtype:9} std {ratios.std():.1e}  "
                f"mean ratio {np.exp(ratios).mean():.5f}"
            )


def main():
    config, params = make_model()
    batches = review_batches(STEPS)
    show_gradients(params, config, batches[0])
    show_training(params, config, batches)
    show_overflow(params, config, batches)
    _, state = train(params, config, "float32", False, batches)
    show_log_ratios(state.params, config)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")


if __name__ == "__main__":
    main()
