"""HH-RLHF, GSM8K and GPT-2's vocabulary through the converters and scripts, on to transformers."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import dpo
import grpo
import ppo
import reward
import sft

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = {"max_prompt_length": 80, "max_completion_length": 48}
RUN = {"batch_size": 8, "micro_batch_size": 4, "eval_every": 10, "warmup_steps": 1} | LENGTHS


@pytest.fixture(scope="module")
def chain(shared_data, tmp_path_factory):
    """A folder with the converted data and the runs sft, reward, ppo, dpo and grpo."""
    folder = tmp_path_factory.mktemp("hh")
    source = shared_data / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [line for line in file if len(line) < 700][:120]  # short ones: a test has no time
    (folder / "hh.jsonl").write_text("".join(rows), "utf-8")
    command = [sys.executable, ROOT / "data" / "hh_rlhf.py", folder / "hh.jsonl", folder]
    subprocess.run([*command, "--test-rows", "24"], check=True, capture_output=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer").mkdir(exist_ok=True)
        shutil.copyfile(shared_data / "gpt2" / name, folder / "tokenizer" / name)

    def paths(kind):
        names = {"dataset": f"{kind}_train.jsonl", "eval_dataset": f"{kind}_test.jsonl"}
        return {field: str(folder / name) for field, name in names.items()}

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "epochs": 1}
    tokenizer, model = str(folder / "tokenizer"), str(folder / "sft" / "model")
    out = str(folder / "sft")
    sft.main(sft.Args(tokenizer=tokenizer, run_dir=out, **sizes, **RUN, **paths("sft")))
    out = str(folder / "reward")
    args = {"epochs": 1, "num_generations": 2}
    reward.main(reward.Args(model=model, run_dir=out, **args, **RUN, **paths("preferences")))
    args = {"steps": 2, "reward_model": str(folder / "reward" / "model")}
    out = str(folder / "ppo")
    ppo.main(ppo.Args(model=model, run_dir=out, **args, **RUN, **paths("prompts")))
    for split in ("train", "test"):
        lines = (folder / f"preferences_{split}.jsonl").read_text("utf-8").splitlines(True)
        (folder / f"pairs_{split}.jsonl").write_text("".join(lines[:16]), "utf-8")
    out = str(folder / "dpo")
    dpo.main(dpo.Args(model=model, run_dir=out, **RUN, **paths("pairs")))
    mathematics(shared_data / "gsm8k", folder)
    args = {"steps": 2, "num_generations": 4, "reward": (f"{ROOT}/rewards.py:numeric_answer",)}
    out = str(folder / "grpo")
    grpo.main(grpo.Args(model=model, run_dir=out, **args, **RUN, **paths("math/prompts")))
    return folder


def mathematics(source, folder):
    """The first short questions of GSM8K, converted."""
    (folder / "gsm8k").mkdir()
    for split in ("train", "test"):
        lines = (source / f"{split}.jsonl").read_text("utf-8").splitlines(True)
        rows = [line for line in lines if len(json.loads(line)["question"]) < 200][:24]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("".join(rows), "utf-8")
    command = [sys.executable, ROOT / "data" / "gsm8k.py", folder / "gsm8k", folder / "math"]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.real_data
def test_every_stage_ends_with_finite_numbers(chain):
    for name in ("sft", "reward", "ppo", "dpo", "grpo"):
        lines = (chain / name / "metrics.jsonl").read_text().splitlines()
        assert len(lines) > 1
        for line in lines:
            assert all(np.isfinite(value) for value in json.loads(line).values())


@pytest.mark.real_data
def test_worked_answers_of_gsm8k_are_right_and_others_wrong(chain):
    """The data's `answer` reaches the reward function, row by row."""
    function = grpo.load_function(f"{ROOT}/rewards.py:numeric_answer")
    rows = grpo.read_jsonl(chain / "math" / "prompts_test.jsonl", {"prompt", "answer"})
    worked = sft.read_jsonl(chain / "math" / "sft_test.jsonl", {"prompt", "completion"})
    completions = [row["completion"] for row in worked]
    assert grpo.call_reward(function, rows, completions).tolist() == [1.0] * len(rows)
    others = grpo.call_reward(function, rows, completions[1:] + completions[:1])
    assert others.mean() < 0.5
    samples = [json.loads(x) for x in (chain / "grpo" / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} <= {row["prompt"] for row in rows}
    assert {sample["score"] for sample in samples} <= {-1.0, 0.0, 1.0}


@pytest.mark.real_data
@pytest.mark.parity
def test_the_folders_load_in_transformers(chain):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    texts = ["\n\nHuman: Hello\n\nAssistant: Hi", " <|endoftext|> naïve ünïcode \n\n x", "a"]
    for name in ("sft", "ppo", "reward", "dpo", "grpo"):
        folder = chain / name / "model"
        config, params = sft.load_model(folder)
        tokenizer = sft.load_tokenizer(folder)
        rows = [[*tokenizer.encode_ordinary(text), tokenizer.eot_token] for text in texts]
        tokens, mask = sft.pad_rows(rows, max(map(len, rows)))
        if name == "reward":
            theirs = transformers.GPT2ForSequenceClassification.from_pretrained(folder).eval()
            tokens = np.where(mask > 0, tokens, config.pad_token_id)
            ours = reward.score_sequences(params, config, tokens, mask)
        else:
            theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
            ours = sft.GPT2(config).apply({"params": params}, tokens, mask)
        with torch.no_grad():
            given = {"input_ids": tokens, "attention_mask": mask}
            given = {key: torch.tensor(np.asarray(value, np.int64)) for key, value in given.items()}
            logits = theirs(**given).logits.numpy()
        ours = np.asarray(jax.device_get(ours))
        if name == "reward":
            np.testing.assert_allclose(ours, logits[:, 0], atol=1e-4)
        else:
            np.testing.assert_allclose(ours[mask > 0], logits[mask > 0], atol=1e-4)
