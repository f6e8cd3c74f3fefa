"""An SFT step of Google's tunix, for run.py, in an environment of its own (.venv-tunix).

tunix has no GPT-2: this is its Llama 3 with the same layers, heads, width and vocabulary, and
SwiGLU's hidden width such that the blocks have as many weights (three matrices instead of two).
"""

import itertools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer
from work import LEARNING_RATE, serve


def tunix_sft(shape, micro):
    """A function of the pipe: tunix asks for the next batch when a step has been sent off."""
    config = llama3.ModelConfig(
        num_layers=shape.n_layer,
        vocab_size=shape.vocab_size,
        embed_dim=shape.n_embd,
        hidden_dim=round(8 / 3 * shape.n_embd),
        num_heads=shape.n_head,
        head_dim=shape.n_embd // shape.n_head,
        num_kv_heads=shape.n_head,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=True,
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    parts = shape.batch // micro
    adamw = optax.adamw(LEARNING_RATE, weight_decay=0.1)
    settings = peft_trainer.TrainingConfig(
        eval_every_n_steps=10**9, gradient_accumulation_steps=parts if parts > 1 else None
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    trainer = peft_trainer.PeftTrainer(model, optimizer, settings)
    tokens = shape.tokens(parts, micro, shape.length)
    causal = jnp.tril(jnp.ones((shape.length, shape.length), bool))

    def model_input(batch):
        size = (micro, shape.length)
        positions = jnp.broadcast_to(jnp.arange(shape.length), size)
        mask = jnp.broadcast_to(causal, (*size, shape.length))
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": positions,
            "attention_mask": mask,
        }

    trainer.with_gen_model_input_fn(model_input)

    def train(pipe):
        def batches():
            for step in itertools.count():
                if step:  # what the trainer has sent off must be done
                    jax.block_until_ready(nnx.state(model))
                    pipe.done()
                pipe.wait()
                for part in tokens:
                    yield peft_trainer.TrainingInput(part, jnp.ones_like(part))

        trainer.train(batches())

    return train


if __name__ == "__main__":
    serve({"tunix_sft": tunix_sft}, lambda train, pipe: train(pipe))
