"""TRL's trainers with this project's dashboard, rewards and data.

    import sys; sys.path.append("tools")
    from trl_adapter import RunFolder, load_reward, read_jsonl, reward_model

    trainer = GRPOTrainer(
        "gpt2",
        reward_funcs=[load_reward("rewards.py:length_window"), reward_model("runs/reward/model")],
        train_dataset=read_jsonl("data/reviews/prompts_train.jsonl"),
        args=GRPOConfig(output_dir="out", log_completions=True),  # completions: samples.jsonl
        callbacks=[RunFolder("runs/trl_grpo")],
    )
    trainer.train()

    python tools/dashboard.py runs/trl_grpo runs/grpo

The callback writes args.json, metrics.jsonl with this project's names and, where
GRPOTrainer or RLOOTrainer write completions, samples.jsonl, while the trainer
runs; then model/, which the scripts and evaluate.py read. It knows SFTTrainer,
RewardTrainer, DPOTrainer, GRPOTrainer, RLOOTrainer and KTOTrainer, and imports
no JAX. Tried with TRL 1.16.
"""

import functools
import gzip
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import datasets
import pandas
import torch
import transformers

# TRL's names and this project's; all others are the same.
NAMES = {
    "learning_rate": "lr",
    "entropy": "policy/entropy_avg",
    "clip_ratio/region_mean": "policy/clipfrac_avg",
    "accuracy": "rewards/accuracies",  # RewardTrainer
    "margin": "rewards/margins",
}
# What says nothing of the step at which it is logged, or what the run's end logs.
LEFT_OUT = {"epoch", "num_tokens", "step_time", "total_flos", "runtime"}
LEFT_OUT |= {"samples_per_second", "steps_per_second"}


class RunFolder(transformers.TrainerCallback):
    """Writes a run folder while a trainer of TRL's runs."""

    def __init__(self, folder, overwrite=False, save_model=True):
        self.folder, self.overwrite, self.save_model = Path(folder), overwrite, save_model
        self.last_tokens, self.last_time, self.seen = 0, time.time(), set()

    def on_train_begin(self, args, state, control, model=None, **_):
        if not state.is_world_process_zero:
            return
        begun = (self.folder / "args.json").exists()
        if begun and state.global_step == 0 and not self.overwrite:
            raise ValueError(f"{self.folder} holds a run: pass another folder, or overwrite=True")
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl"):  # of a resumed run what was before
            path = self.folder / name
            lines = path.read_text("utf-8").splitlines(True) if path.exists() else []
            kept = [
                x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= state.global_step
            ]
            path.write_text("".join(kept if state.global_step else []), "utf-8")
        names = {"model": getattr(model, "name_or_path", ""), "run_dir": str(self.folder)}
        names |= {"steps": state.max_steps, "batch_size": state.train_batch_size}
        content = json.loads(args.to_json_string()) | names
        (self.folder / "args.json").write_text(json.dumps(content, indent=2), "utf-8")
        self.seen = set(completion_files(args))  # of an earlier run
        self.last_time = time.time()

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or "train_runtime" in logs:  # the run's sums
            return
        now = time.time()
        row = {"step": state.global_step, "perf/time": now}
        on_policy = any(name.endswith("reward_std") for name in logs)
        names = NAMES | ({"loss": "loss/policy_avg"} if on_policy else {})
        for name, value in logs.items():
            prefix, name = ("eval/", name[5:]) if name.startswith("eval_") else ("", name)
            if name not in LEFT_OUT and isinstance(value, int | float):
                row[prefix + names.get(name, name)] = finite_or_none(value)
        tokens = logs.get("num_tokens")  # so far
        if tokens is not None and tokens > self.last_tokens:
            row["perf/tokens_per_second"] = (tokens - self.last_tokens) / (now - self.last_time)
            self.last_tokens, self.last_time = tokens, now
        self.append("metrics.jsonl", row)
        self.add_samples(args)

    def on_train_end(self, args, state, control, model=None, processing_class=None, **_):
        if not state.is_world_process_zero:
            return
        self.add_samples(args)
        if self.save_model and model is not None:
            model.save_pretrained(self.folder / "model")
            if processing_class is not None:
                processing_class.save_pretrained(self.folder / "model")

    def add_samples(self, args):
        """The first eight completions of each file that TRL has written since."""
        for path in completion_files(args):
            if path in self.seen:
                continue
            self.seen.add(path)
            for row in pandas.read_parquet(path).head(8).to_dict("records"):
                texts = {name: as_text(row.pop(name)) for name in ("prompt", "completion")}
                numbers = {name: x for name, x in row.items() if isinstance(x, int | float)}
                scores = {
                    name if name in ("step", "advantage") else f"rewards/{name}": finite_or_none(x)
                    for name, x in numbers.items()
                }
                self.append("samples.jsonl", {"step": scores.pop("step"), **texts, **scores})

    def append(self, name, row):
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def completion_files(args):
    """What log_completions=True writes, in order of the steps."""
    return sorted((Path(args.output_dir) / "completions").glob("completions_*.parquet"))


def finite_or_none(x):
    return x if math.isfinite(x) else None


def as_text(text):
    """A text, or the contents of a list of chat messages."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


# ----------------------------------------------------------------------------------- data, rewards


def read_jsonl(path):
    """A JSON Lines file (or .gz of one) as TRL takes it: the names of its columns are TRL's.

    Its rows are tokenised as TRL does it, prompt and completion together; so ids may differ from
    those of the scripts where a completion does not begin with a space.
    """
    content = Path(path).read_bytes()
    content = gzip.decompress(content) if str(path).endswith(".gz") else content
    lines = content.decode("utf-8-sig").split("\n")
    return datasets.Dataset.from_list([json.loads(line) for line in lines if line.strip()])


def load_reward(name):
    """The reward function of "file.py:function", for texts and for chats."""
    path, _, function = name.rpartition(":")
    sys.path.append(str(Path(path).resolve().parent))  # it may import its neighbours
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    reward = getattr(module, function)

    @functools.wraps(reward)
    def of_texts(prompts, completions, **columns):
        prompts, completions = ([as_text(x) for x in texts] for texts in (prompts, completions))
        return reward(prompts=prompts, completions=completions, **columns)

    return of_texts


def reward_model(folder, tokenizer=None):
    """The scores of a model that reward.py wrote, as a reward function.

    TRL takes the folder itself, too, but then it scores decoded texts, without the EOS that the
    model was trained to judge by. Here the prompt's ids and the completion's own are joined.
    tokenizer: the policy's, if it is not in the folder.
    """
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(folder)
    pad_id = model.config.pad_token_id

    @torch.no_grad()
    def reward_model(prompts, completions, completion_ids, **_):
        rows = [
            tokenizer(as_text(prompt), add_special_tokens=False)["input_ids"] + list(ids)
            for prompt, ids in zip(prompts, completion_ids)
        ]
        width = max(map(len, rows))
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()

    return reward_model
