"""HH-RLHF, GSM8K and GPT-2's vocabulary through the converters and scripts, on to transformers."""

import gzip
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import dpo
import grpo
import ppo
import reward
import sft

pytestmark = [pytest.mark.real_data, pytest.mark.slow]
STAGES = (sft, reward, ppo, dpo, grpo)
RUN = {"batch_size": 8, "micro_batch_size": 4, "eval_every": 10, "warmup_steps": 1}
RUN |= {"max_prompt_length": 80, "max_completion_length": 72}


@pytest.fixture(scope="module")
def chain(shared_data, tmp_path_factory):
    """A folder with the converted data and the runs sft, reward, ppo, dpo and grpo."""
    folder = tmp_path_factory.mktemp("hh")
    source = shared_data / "hh-rlhf" / "harmless-base-test.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [line for line in file if len(line) < 500][:120]  # short ones: a test has no time
    (folder / "hh.jsonl").write_text("".join(rows), "utf-8")
    command = [sys.executable, ROOT / "data" / "hh_rlhf.py", folder / "hh.jsonl", folder]
    subprocess.run([*command, "--test-rows", "24"], check=True, capture_output=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer").mkdir(exist_ok=True)
        shutil.copyfile(shared_data / "gpt2" / name, folder / "tokenizer" / name)

    for split in ("train", "test"):
        lines = (folder / f"preferences_{split}.jsonl").read_text("utf-8").splitlines(True)
        (folder / f"pairs_{split}.jsonl").write_text("".join(lines[:16]), "utf-8")
    mathematics(shared_data / "gsm8k", folder)

    def train(script, data, **args):
        """Runs a script in the folder of its name, on this kind of data."""
        paths = {"dataset": f"{data}_train.jsonl", "eval_dataset": f"{data}_test.jsonl"}
        args |= {name: str(folder / path) for name, path in paths.items()}
        script.main(script.Args(run_dir=str(folder / script.__name__), **RUN, **args))

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 160}
    train(sft, "sft", tokenizer=str(folder / "tokenizer"), epochs=1, **sizes)
    model, reward_model = (str(folder / name / "model") for name in ("sft", "reward"))
    train(reward, "preferences", model=model, epochs=1, num_generations=2)
    train(ppo, "prompts", model=model, reward_model=reward_model, steps=2)
    train(dpo, "pairs", model=model)
    right = (f"{ROOT}/rewards.py:numeric_answer",)
    train(grpo, "math/prompts", model=model, reward=right, steps=2, num_generations=4)
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


def test_every_stage_ends_with_finite_numbers(chain):
    for script in STAGES:
        lines = (chain / script.__name__ / "metrics.jsonl").read_text().splitlines()
        assert len(lines) > 1
        for line in lines:
            assert all(np.isfinite(value) for value in json.loads(line).values())


def test_worked_answers_of_gsm8k_are_right_and_others_wrong(chain):
    """The data's `answer` reaches the reward function, row by row."""
    function = grpo.load_function(f"{ROOT}/rewards.py:numeric_answer")
    rows = grpo.read_jsonl(chain / "math" / "prompts_test.jsonl", ["prompt", "answer"])
    worked = sft.read_jsonl(chain / "math" / "sft_test.jsonl", ["prompt", "completion"])
    completions = [row["completion"] for row in worked]
    assert grpo.call_reward(function, rows, completions).tolist() == [1.0] * len(rows)
    others = grpo.call_reward(function, rows, completions[1:] + completions[:1])
    assert others.mean() < 0.5
    samples = [json.loads(x) for x in (chain / "grpo" / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} <= {row["prompt"] for row in rows}
    assert {sample["reward"] for sample in samples} <= {-1.0, 0.0, 1.0}


@pytest.mark.parity
def test_the_folders_load_in_transformers(chain):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    texts = ["\n\nHuman: Hello\n\nAssistant: Hi", " <|endoftext|> naïve ünïcode \n\n x", "a"]
    for script in STAGES:
        folder = chain / script.__name__ / "model"
        config, params = sft.load_model(folder)
        tokenizer = sft.load_tokenizer(folder)
        rows = [[*tokenizer.encode_ordinary(text), tokenizer.eot_token] for text in texts]
        tokens, mask = sft.pad_rows(rows, max(map(len, rows)))
        if script == reward:
            kind = transformers.GPT2ForSequenceClassification
            tokens = np.where(mask > 0, tokens, config.pad_token_id)
            ours = reward.learned_rewards(params, config, tokens, mask)[:, None]
        else:
            kind = transformers.GPT2LMHeadModel
            ours = sft.GPT2(config).apply({"params": params}, tokens, mask)
        with torch.no_grad():
            ids, attention = (torch.tensor(np.asarray(x, np.int64)) for x in (tokens, mask))
            theirs = kind.from_pretrained(folder).eval()
            logits = theirs(input_ids=ids, attention_mask=attention).logits.numpy()
        real = np.ones(len(ours), bool) if script == reward else mask > 0
        np.testing.assert_allclose(np.asarray(ours)[real], logits[real], atol=1e-4)
