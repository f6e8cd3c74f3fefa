"""The same steps in other libraries, for run.py: each builder returns a function that makes one.

Trainers run their own loop; a callback stops it after each optimizer step until run.py asks for
the next. TRL's are given texts: a tokenizer with one word a token makes the lengths exact.
"""

import os
import sys
import tempfile

from work import GROUP, LEARNING_RATE, PPO_EPOCHS, PRODUCT, repeat, reward, serve

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

torch.manual_seed(0)
KINDS = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def config(shape):
    """GPT-2 of this shape without dropout; no token is EOS, so that no response ends early."""
    ends = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
    dropout = dict.fromkeys(["attn_pdrop", "embd_pdrop", "resid_pdrop"], 0.0)
    return transformers.GPT2Config(**shape.model, **dropout, **ends)


def language_model(shape):
    return transformers.GPT2LMHeadModel(config(shape))


def scorer(shape):
    settings = config(shape)
    settings.num_labels = 1
    return transformers.GPT2ForSequenceClassification(settings)


def tokenizer(shape):
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<eos>", "<pad>", *(f"t{i}" for i in range(2, shape.vocab_size))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<eos>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def texts(rows):
    return [" " + " ".join(f"t{max(i, 2)}" for i in row) for row in rows.tolist()]


def dataset(shape, *answers, count=None):
    """Prompts and, under these names, answers: one token less, as TRL appends EOS."""
    from datasets import Dataset

    count = count or shape.batch
    columns = {"prompt": texts(shape.tokens(count, shape.prompt))}
    for i, name in enumerate(answers):
        columns[name] = texts(shape.tokens(count, i + 2, shape.new - 1)[:, i])
    return Dataset.from_dict(columns)


def wait_for_device():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def generate(shape, dtype="float32"):
    model = language_model(shape).eval().to(DEVICE, KINDS[dtype])
    tokens = torch.tensor(shape.tokens(shape.batch, shape.prompt).astype("int64"), device=DEVICE)
    length = {"max_new_tokens": shape.new, "min_new_tokens": shape.new}

    def step():
        with torch.no_grad():
            mask = torch.ones_like(tokens)
            model.generate(tokens, attention_mask=mask, do_sample=True, top_k=0, **length)
        wait_for_device()

    return step


def sft(shape, micro, compiled=False, dtype="float32"):
    """The shortest loop that one would write in torch, with its fused optimizer."""
    model = language_model(shape).train().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    tokens = torch.tensor(shape.tokens(shape.batch, shape.length).astype("int64"), device=DEVICE)

    def loss_of(tokens):
        with torch.autocast(DEVICE, KINDS[dtype], enabled=dtype != "float32"):
            return model(tokens, labels=tokens, use_cache=False).loss

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step():
        for part in tokens.split(micro):
            (loss_of(part) * len(part) / shape.batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait_for_device()

    return step


class Pause(transformers.TrainerCallback):
    """Tells run.py that a step is done, and waits until it wants another."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_step_end(self, *_, **__):
        wait_for_device()
        self.pipe.done()
        self.pipe.wait()


def trainer_loop(start, pipe):
    """The loop for `serve`: a trainer has its own, which Pause interrupts; else `repeat`."""
    if not hasattr(start, "callback"):
        return repeat(start, pipe)
    start.callback.pipe = pipe
    pipe.wait()
    return start()


def start_of(trainer):
    """What trains, with the callback that lets one step after the other go by."""
    callback = Pause(None)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(callback)

    def start():
        trainer.train()

    start.callback = callback
    return start


def common(shape, micro, dtype, **more):
    """Arguments of every trainer: AdamW, one norm, micro-batches, no logs and no files."""
    quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 10**6, "disable_tqdm": True}
    size = {"per_device_train_batch_size": micro}
    size["gradient_accumulation_steps"] = shape.batch // micro
    arithmetic = {"bf16": dtype == "bfloat16", "use_cpu": DEVICE == "cpu"}
    arithmetic |= {"gradient_checkpointing": False}
    endless = {"max_steps": 10**6, "output_dir": tempfile.mkdtemp()}
    return quiet | size | arithmetic | endless | {"learning_rate": LEARNING_RATE} | more


def trl_sft(shape, micro, dtype="float32"):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [" ".join(row) for row in zip(*(dataset(shape, "completion")[:].values()))]
    args = SFTConfig(**common(shape, micro, dtype, max_length=shape.length))
    data = Dataset.from_dict({"text": rows})
    words = tokenizer(shape)
    return start_of(
        SFTTrainer(language_model(shape), args, train_dataset=data, processing_class=words)
    )


def trl_reward(shape, micro, dtype="float32"):
    from trl import RewardConfig, RewardTrainer

    args = RewardConfig(**common(shape, micro, dtype, max_length=shape.length))
    data = dataset(shape, "chosen", "rejected")
    return start_of(
        RewardTrainer(scorer(shape), args, train_dataset=data, processing_class=tokenizer(shape))
    )


def trl_dpo(shape, micro, cached, dtype="float32"):
    from trl import DPOConfig, DPOTrainer

    more = {"max_length": shape.length, "precompute_ref_log_probs": cached}
    args = DPOConfig(**common(shape, micro, dtype, **more))
    data = dataset(shape, "chosen", "rejected")
    model, reference = language_model(shape), None if cached else language_model(shape)
    words = tokenizer(shape)
    trainer = DPOTrainer(model, reference, args, train_dataset=data, processing_class=words)
    return start_of(trainer)


def trl_grpo(shape, micro, dtype="float32"):
    from trl import GRPOConfig, GRPOTrainer

    more = {"num_generations": GROUP, "max_completion_length": shape.new, "beta": 0.04}
    more |= {"loss_type": "grpo", "num_iterations": 1}
    more |= {"generation_kwargs": {"min_new_tokens": shape.new}}  # the tokenizer has an EOS
    args = GRPOConfig(**common(shape, micro, dtype, **more))
    data, words, folder = dataset(shape), tokenizer(shape), tempfile.mkdtemp()
    language_model(shape).save_pretrained(folder)  # this trainer wants a model with a name
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    trainer = GRPOTrainer(model, reward, args, train_dataset=data, processing_class=words)
    return start_of(trainer)


def trl_ppo(shape, micro, dtype="float32"):
    """TRL 1.12's: later versions have none. run.py puts that version in front of the path."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    more = {"num_ppo_epochs": PPO_EPOCHS, "num_mini_batches": 1, "response_length": shape.new}
    more |= {"total_episodes": 10**6, "local_rollout_forward_batch_size": shape.batch}
    args = PPOConfig(**common(shape, micro, dtype, num_sample_generations=0, **more))
    words = tokenizer(shape)
    ids = words(list(dataset(shape, count=16 * shape.batch)["prompt"]))["input_ids"]
    from datasets import Dataset

    data = Dataset.from_dict({"input_ids": ids})
    policy, reference = language_model(shape), language_model(shape)
    trainer = PPOTrainer(
        args=args,
        processing_class=words,
        model=policy,
        ref_model=reference,
        reward_model=scorer(shape),
        value_model=scorer(shape),
        train_dataset=data,
        eval_dataset=data,
    )
    return start_of(trainer)


def product(shape, dtype, size=PRODUCT):
    x = torch.randn(size, size).to(DEVICE, KINDS[dtype])

    def step():
        x @ x
        wait_for_device()

    return step


def device_peak():
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


if __name__ == "__main__":
    builders = {"generate": generate, "sft": sft, "product": product}
    builders |= {"trl_sft": trl_sft, "trl_reward": trl_reward, "trl_dpo": trl_dpo}
    builders |= {"trl_grpo": trl_grpo, "trl_ppo": trl_ppo}
    sys.exit(serve(builders, trainer_loop, device_peak))
