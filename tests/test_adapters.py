"""tools/openrlhf_adapter.py and tools/trl_adapter.py against OpenRLHF's own code and TRL itself."""

import asyncio
import importlib
import importlib.util
import json
import subprocess
import sys
import threading
import types
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))

TOKENIZER = ROOT / "data/reviews/tokenizer"
EOS = "<|endoftext|>"
PROMPTS = ["2 + 3 =", "4 + 4 ="]
QUERIES = [f"2 + 3 = 5{EOS}", "4 + 4 = 9 or so"]  # the second was cut
LABELS = ["5", "8"]


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A tiny GPT-2 with random weights and the embedded tokenizer; a reward model such as it."""
    import jax
    import jax.numpy as jnp

    import ppo

    folder = tmp_path_factory.mktemp("models")
    tokenizer = ppo.load_tokenizer(TOKENIZER)
    pad_id = tokenizer.encode_single_token("<|pad|>")
    config = ppo.GPT2Config(
        vocab_size=tokenizer.n_vocab,
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        eos_token_id=tokenizer.eot_token,
        pad_token_id=pad_id,
    )
    one = jnp.ones((1, 1), jnp.int32)
    for name, module in (("policy", ppo.GPT2), ("reward", ppo.RewardModel)):
        params = module(config).init(jax.random.key(0), one, one)["params"]
        ppo.save_model(folder / name, config, params, TOKENIZER)
    return folder


# ---------------------------------------------------------------------------------------- OpenRLHF


@pytest.fixture
def server():
    """The address of a running server with rewards.py's numeric_answer and a length."""
    import openrlhf_adapter as adapter

    args = adapter.Args(reward=(f"{ROOT}/rewards.py:numeric_answer",), reward_weight=(2.0,))
    server = adapter.make_server(adapter.Scorer(args), "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/get_reward"
    server.shutdown()
    server.server_close()


@pytest.fixture
def executor():
    """OpenRLHF's class that asks for rewards, without what its package imports besides."""
    pytest.importorskip("aiohttp", reason="OpenRLHF asks with aiohttp")
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        pytest.skip("no openrlhf: pip install --no-deps openrlhf")
    utils = types.ModuleType("openrlhf.utils")
    utils.__path__ = [str(Path(spec.origin).parent / "utils")]
    sys.modules.setdefault("openrlhf.utils", utils)  # its __init__ imports DeepSpeed
    return importlib.import_module("openrlhf.utils.agent").SingleTurnAgentExecutor


def test_the_answer_to_a_request_in_openrlhfs_form(server):
    """The keys of its agent.py, and those of its own server's answer."""
    asked = {"query": QUERIES, "prompts": PROMPTS, "labels": LABELS}
    with urllib.request.urlopen(server, json.dumps(asked).encode()) as response:
        found = json.loads(response.read())
    logs = {"rewards/numeric_answer": [1.0, 0.0]}
    assert found == {"rewards": [2.0, 0.0], "scores": [2.0, 0.0], "extra_logs": logs}


def test_a_request_that_cannot_be_answered(server, capsys):
    asked = {"query": ["3 ="], "prompts": ["2 + 3 ="], "labels": ["5"]}
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(server, json.dumps(asked).encode())
    assert "does not begin with its prompt" in capsys.readouterr().err


def test_openrlhfs_own_code_asks_the_server(server, executor):
    fetch = executor(server)._fetch_rewards_via_http
    (found,) = asyncio.run(fetch(QUERIES, PROMPTS, LABELS))
    assert found["rewards"] == found["scores"] == [2.0, 0.0]
    (one,) = asyncio.run(fetch(QUERIES[:1], PROMPTS[:1], LABELS[:1]))  # as a rollout asks
    assert one["rewards"] == [2.0]


@pytest.mark.parity
def test_openrlhfs_own_code_calls_the_written_function(executor, tmp_path):
    path = tmp_path / "my_reward.py"
    given = ["--reward", "rewards.py:numeric_answer", "--write", path]
    command = [sys.executable, "tools/openrlhf_adapter.py", *given]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    fetch = executor(str(path))._fetch_rewards_via_func
    first, second = asyncio.run(fetch(QUERIES, PROMPTS, LABELS))  # one query a call
    assert first["rewards"].tolist() == first["scores"].tolist() == [1.0]
    assert second["rewards"].tolist() == [0.0]
    assert second["extra_logs"]["rewards/numeric_answer"].tolist() == [0.0]


@pytest.mark.parity
def test_openrlhf_reads_our_columns(executor):
    """preprocess_data of its datasets, under the keys that the adapter's docstring names."""
    folder = Path(importlib.util.find_spec("openrlhf").origin).parent / "datasets"

    def load(name):  # without the package's __init__, which imports the others
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.preprocess_data

    row = {"prompt": "2 + 3 =", "answer": "5"}
    found = load("prompts_dataset")(row, input_key="prompt", label_key="answer")
    assert found == ("2 + 3 =", "5")


def test_a_learned_reward_scores_what_the_policy_wrote(gpt2_folder):
    """As learned_rewards does on the ids, with EOS where the completion ended."""
    import openrlhf_adapter as adapter

    import ppo

    config, params = ppo.load_model(gpt2_folder / "reward")
    tokenizer = ppo.load_tokenizer(gpt2_folder / "reward")
    texts = [("A fine film.", " It moved me.", True), ("Sadly,", " no", False)]
    ids = [
        tokenizer.encode_ordinary(p) + tokenizer.encode_ordinary(c) + [tokenizer.eot_token] * ended
        for p, c, ended in texts
    ]
    expected = [
        float(ppo.learned_rewards(params, config, *ppo.pad_rows([row], len(row)))[0]) for row in ids
    ]
    queries = [p + c + EOS * ended for p, c, ended in texts]
    scorer = adapter.Scorer(adapter.Args(reward_model=str(gpt2_folder / "reward")))
    found = scorer(queries, [p for p, *_ in texts], ["", ""])
    np.testing.assert_allclose(found["rewards"], expected, atol=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


# --------------------------------------------------------------------------------------------- TRL


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def settings(folder, **more):
    common = {
        "output_dir": str(folder / "out"),
        "max_steps": 3,
        "logging_steps": 1,
        "use_cpu": True,
    }
    common |= {"save_strategy": "no", "report_to": "none", "per_device_train_batch_size": 4}
    return common | {"disable_tqdm": True, "bf16": False} | more


@pytest.mark.parity
def test_a_run_of_trls_grpo(gpt2_folder, tmp_path, capsys):
    """Its folder has our names, the dashboard reads it, and our loader its model."""
    import dashboard
    import trl_adapter
    from trl import GRPOConfig, GRPOTrainer

    import ppo

    run = tmp_path / "run"
    learned = trl_adapter.reward_model(gpt2_folder / "reward")
    trainer = GRPOTrainer(
        str(gpt2_folder / "policy"),
        reward_funcs=[trl_adapter.load_reward(f"{ROOT}/rewards.py:length_window"), learned],
        train_dataset=trl_adapter.read_jsonl(ROOT / "data/reviews/prompts_train.jsonl"),
        args=GRPOConfig(
            **settings(tmp_path, num_generations=2, log_completions=True, max_completion_length=8)
        ),
        callbacks=[trl_adapter.RunFolder(run)],
    )
    trainer.train()
    metrics = rows(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    ours = {"reward", "reward_std", "frac_reward_zero_std", "lr", "grad_norm", "loss/policy_avg"}
    ours |= {"policy/entropy_avg", "completions/mean_length", "completions/clipped_ratio"}
    ours |= {"rewards/length_window/mean", "rewards/reward_model/std", "perf/time"}
    assert ours <= metrics[1].keys() and "perf/tokens_per_second" in metrics[2]
    logged = [x for x in trainer.state.log_history if "reward" in x]
    assert metrics[0]["reward"] == logged[0]["reward"]
    samples = rows(run / "samples.jsonl")
    assert (
        len(samples) == 3 * 4
        and {"prompt", "completion", "rewards/reward_model"} <= samples[0].keys()
    )
    # TRL's own text and our function on it give the score that TRL used.
    score = trl_adapter.load_reward(f"{ROOT}/rewards.py:length_window")
    used = samples[0]["rewards/length_window"]
    assert score(["x"], [samples[0]["completion"]])[0] == pytest.approx(used)
    config, params = ppo.load_model(run)
    assert config.n_embd == 16 and "wte" in params
    seen = dashboard.Run(run).refresh()
    assert seen.last_step == 3 and "rewards/reward_model/mean" in seen.series
    assert not seen.bad and seen.status().startswith("finished")
    with pytest.raises(ValueError, match="holds a run"):
        trl_adapter.RunFolder(run).on_train_begin(trainer.args, type("S", (), NEW)(), None)
    pytest.importorskip("plotly")
    dashboard.main(dashboard.Args(runs=(str(run),), html=str(tmp_path / "page.html")))
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "rewards/reward_model/mean" in page and samples[-1]["prompt"][:8] in page


NEW = {"is_world_process_zero": True, "global_step": 0}


@pytest.mark.parity
def test_our_reward_model_in_trl(gpt2_folder):
    """Scores of rows of unequal length are those of learned_rewards on the same ids."""
    import trl_adapter

    import ppo

    config, params = ppo.load_model(gpt2_folder / "reward")
    tokenizer = ppo.load_tokenizer(gpt2_folder / "reward")
    prompts, ids = ["A fine film.", "Sadly,"], [[5, 6, 7, tokenizer.eot_token], [9]]
    found = trl_adapter.reward_model(gpt2_folder / "reward")(prompts, ["", ""], completion_ids=ids)
    full = [tokenizer.encode_ordinary(p) + x for p, x in zip(prompts, ids)]
    for row, score in zip(full, found):
        expected = ppo.learned_rewards(params, config, *ppo.pad_rows([row], len(row)))[0]
        assert score == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFT", "Reward", "DPO"])
def test_runs_of_trls_other_trainers(gpt2_folder, tmp_path, kind):
    import trl
    import trl_adapter

    data = "sft_test" if kind == "SFT" else "preferences_test"
    data = trl_adapter.read_jsonl(ROOT / f"data/reviews/{data}.jsonl").select(range(16))
    model = gpt2_folder / ("reward" if kind == "Reward" else "policy")
    given = settings(tmp_path, eval_strategy="steps", eval_steps=3)
    trainer = getattr(trl, f"{kind}Trainer")(
        str(model),
        train_dataset=data,
        eval_dataset=data,
        args=getattr(trl, f"{kind}Config")(**given),
        callbacks=[trl_adapter.RunFolder(tmp_path / "run")],
    )
    trainer.train()
    names = set().union(*rows(tmp_path / "run" / "metrics.jsonl"))
    pairs = {"rewards/accuracies", "rewards/margins", "eval/rewards/accuracies"}
    wanted = {"SFT": {"mean_token_accuracy"}, "Reward": pairs, "DPO": pairs | {"logps/chosen"}}
    assert {"loss", "eval/loss", "lr", "grad_norm", "perf/time"} | wanted[kind] <= names
    assert not {name for name in names if name.startswith(("eval_", "train_"))}
