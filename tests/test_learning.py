"""End to end, at a small size on the embedded data: sft.py, then all the others from its model.

The bounds leave room between what was measured and what a broken step would give.
"""

import itertools
import json
import signal

import pytest
from test_runs import REVIEWS, ROOT, metrics_of, open_embedded

import dpo
import grpo
import iterative_dpo
import lora
import ppo
import reward
import sft

pytestmark = pytest.mark.slow
SENTIMENT = f"{ROOT}/data/reviews.py:sentiment"
FACTS = json.loads((REVIEWS / "facts.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the first rows of the embedded data, and room for the runs."""
    folder = tmp_path_factory.mktemp("learning")
    held_out = {"sft": 256, "preferences": 1000, "prompts": 256}
    counts = {"sft": 2000, "preferences": 3000, "prompts": 1000}
    for (name, count), split in itertools.product(counts.items(), ("train", "test")):
        with open_embedded(f"{name}_{split}") as file:
            rows = itertools.islice(file, count if split == "train" else held_out[name])
            (folder / f"{name}_{split}.jsonl").write_text("".join(rows), "utf-8")
    handler = signal.getsignal(signal.SIGINT)
    yield folder
    signal.signal(signal.SIGINT, handler)


def train(script, folder, run, name, **flags):
    """(before, …, after): the metrics of a run on the data `name`; from sft.py's model, if any."""
    if script is not sft:
        flags = {"model": str(folder / "sft" / "model")} | flags
    paths = {"dataset": f"{name}_train.jsonl", "eval_dataset": f"{name}_test.jsonl"}
    paths = {flag: str(folder / path) for flag, path in paths.items()}
    script.main(script.Args(run_dir=str(folder / run), **paths, **flags))
    rows = metrics_of(folder / run)
    print({k: (v, rows[-1][k]) for k, v in rows[0].items() if k.startswith("eval/")})
    return rows


@pytest.fixture(scope="module")
def sft_rows(folder):
    """The metrics of sft.py's run, 186 steps from scratch; the others start from its model."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64}
    flags = {"epochs": 3, "learning_rate": 5e-3, "warmup_steps": 20, "eval_every": 93}
    return train(sft, folder, "sft", "sft", tokenizer=str(REVIEWS / "tokenizer"), **sizes, **flags)


def test_sft_comes_near_the_floor(sft_rows):
    """Nats per token on held-out reviews: over 7 at the start, 0.4 above the floor at the end."""
    losses = [row["eval/loss"] for row in sft_rows if "eval/loss" in row]
    floor = FACTS["sft_test_floor_nats_per_token"]
    assert losses[0] > 6.5
    assert losses[-1] < losses[1] < losses[0]
    assert floor - 0.05 < losses[-1] < floor + 0.7


def test_reward_ranks_held_out_pairs(folder, sft_rows):
    """Accuracy on held-out pairs: 1/2 by chance, the best possible stands in facts.json."""
    flags = {"epochs": 2, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 10}
    flags |= {"eval_every": 1000, "num_generations": 2}
    before, *_, after = train(reward, folder, "reward", "preferences", **flags)
    # measured 0.71 and more; a standard error of 1.5 %
    ceiling = FACTS["preferences_test_best_accuracy"]
    assert 0.63 < after["eval/rewards/accuracies"] < ceiling + 0.04
    assert after["eval/loss"] < 0.62 < before["eval/loss"]


def test_dpo_learns_from_pairs(folder, sft_rows):
    """Held-out pairs are told apart, and what is written gets better, at a KL that stays small."""
    for split, count in (("train", 1500), ("test", 300)):
        lines = (folder / f"preferences_{split}.jsonl").read_text("utf-8").splitlines(True)
        (folder / f"pairs_{split}.jsonl").write_text("".join(lines[:count]), "utf-8")
    flags = {"batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 4, "beta": 0.1}
    flags |= {"eval_every": 1000, "max_completion_length": 40, "gold": SENTIMENT}
    before, *_, after = train(dpo, folder, "dpo", "pairs", **flags)
    assert before["eval/rewards/margins"] == 0 and abs(before["eval/objective/kl"]) < 1e-3
    assert after["eval/rewards/accuracies"] > 0.57 and after["eval/rewards/margins"] > 0.03
    assert after["eval/objective/kl"] < 6
    assert after["eval/gold/reward"] > before["eval/gold/reward"] + 0.06  # measured: 0.13


def test_an_adapter_learns_from_pairs(folder, sft_rows):
    """Held-out pairs are told apart by 8 columns beside each kernel; slower than by all weights."""
    flags = {"batch_size": 32, "learning_rate": 4e-3, "warmup_steps": 4, "eval_every": 1000}
    flags |= {"lora_targets": ("c_attn", "c_proj", "c_fc"), "max_completion_length": 40}
    before, *_, after = train(lora, folder, "lora", "preferences", **flags)
    assert before["eval/rewards/margins"] == 0 and abs(before["eval/objective/kl"]) < 1e-3
    # measured 0.634, a standard error of 0.015; 0.15; 0.49
    assert after["eval/rewards/accuracies"] > 0.57 and after["eval/rewards/margins"] > 0.05
    assert after["eval/objective/kl"] < 2


POLICIES = {  # flags of its own, and by how much the objective rises at least
    ppo: ({"steps": 12, "kl_coef": 0.1}, 0.3),
    grpo: ({"steps": 12, "kl_coef": 0.1}, 0.3),
    iterative_dpo: (
        {
            "rounds": 12,
            "prompts_per_round": 64,
            "num_generations": 4,
            "pair": "best-worst",
            "micro_batch_size": 32,
            "beta": 0.1,
        },
        0.2,
    ),
}


@pytest.mark.parametrize("script", POLICIES, ids=lambda script: script.__name__)
def test_a_policy_raises_what_it_maximises(script, folder, sft_rows):
    """J = E[reward] - 0.1 * KL on held-out prompts, and gold with it, at a KL that stays small."""
    own, gain = POLICIES[script]
    flags = {"reward": (SENTIMENT,), "reward_weight": (4.0,), "gold": SENTIMENT}
    flags |= {"batch_size": 64, "learning_rate": 2e-3, "warmup_steps": 4, "eval_every": 12}
    flags |= {"max_completion_length": 40}
    rows = train(script, folder, script.__name__, "prompts", **flags, **own)
    before, after = rows[0], rows[-1]
    rise = after["eval/reward"] - before["eval/reward"]
    assert rise - 0.1 * after["eval/objective/kl"] > gain
    assert abs(before["eval/objective/kl"]) < 1e-3 and after["eval/objective/kl"] < 15
    assert after["eval/gold/reward"] > before["eval/gold/reward"] + 0.08
    if script is ppo:  # in training, too
        train_rewards = [row["objective/rlhf_reward"] for row in rows[1:]]
        assert sum(train_rewards[-3:]) / 3 > sum(train_rewards[:3]) / 3 + 0.3
