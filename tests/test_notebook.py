"""notebooks/analysis.ipynb runs from top to bottom on runs and a report, and is committed empty."""

import gzip
import json

import numpy as np
import pytest
from conftest import ROOT

import evaluate

NOTEBOOK = ROOT / "notebooks" / "analysis.ipynb"
P, N = 12, 32  # prompts, and completions to each


def cells(kind):
    found = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def write_runs(folder):
    """Runs of this project, and one whose gold reward rises and falls, as Gao's form has it."""
    with gzip.open(ROOT / "tests" / "goldens" / "runs.jsonl.gz", "rt") as file:
        runs = {run["name"]: run["rows"] for run in map(json.loads, file)}
    runs = {name: rows for name, rows in runs.items() if name.startswith("good_")}
    d, noise = np.linspace(0.2, 4, 60), np.random.default_rng(0).normal(0, 0.05, 60)
    columns = {"objective/kl": d**2, "reward": d * 1.2 + noise}
    columns["gold/reward"] = d * (0.6 - 0.5 * np.log(d)) + noise
    steps = [dict(zip(columns, map(float, row))) for row in zip(*columns.values())]
    zero = {"step": 0, "eval/reward": 0.0, "eval/gold/reward": 0.0}
    runs["overoptimised"] = [zero, *({"step": i, **row} for i, row in enumerate(steps, 1))]
    for name, rows in runs.items():
        (folder / name).mkdir(parents=True)
        for file, lines in (("metrics", rows), ("samples", samples_of(rows))):
            text = "".join(json.dumps(row) + "\n" for row in lines)
            (folder / name / f"{file}.jsonl").write_text(text)


def samples_of(rows):
    return [{"step": row["step"], "prompt": "The film.", "completion": " Good."} for row in rows]


def write_report(folder):
    """What evaluate.py writes of a reference and two policies, from random scores."""
    folder.mkdir()
    rng = np.random.default_rng(0)

    def samples(gain, kl):
        gold = rng.normal(gain, 1, (P, N))
        texts = [f" It is {word}." for word in rng.choice(["good", "bad", "dull"], P * N)]
        kls = rng.normal(kl, 0.1, (P, N)) if kl else np.zeros((P, N))
        same = np.full((P, N), 5.0)
        return evaluate.Samples(texts, gold * 1.5, gold, kls, kls, same, same, same)

    drawn = [samples(0, 0), samples(0.9, 0.7), samples(1.4, 1.5)]
    names = ["runs/sft/model", "runs/dpo/model", "runs/ppo/model"]
    curves = evaluate.make_curves(drawn[0])
    figures = []
    for name, x in zip(names, drawn):
        row = {"policy": name, "kl_coef": 0.3} | evaluate.describe_policy(x, drawn[0], 0.3)
        figures.append(row | evaluate.describe_shares(x, drawn[0], curves, 0.3))
    prompts = [f"Film {i}." for i in range(P)]
    best = evaluate.describe_best_of_n(drawn[0])
    args = evaluate.Args(models=tuple(names[1:]), report=str(folder))
    found = (args, names, prompts, figures, drawn, drawn, curves, best, {}, None, {})
    evaluate.write_report(folder, evaluate.Results(*found))


def execute(folder):
    """The notebook after a run from top to bottom on the runs and the report in this folder."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = f"import os\nos.environ |= {{'RUNS': '{folder}/runs', 'REPORT': '{folder}/report'}}"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first))
    nbclient.NotebookClient(notebook, timeout=120).execute(cwd=str(folder))
    return notebook


def test_it_runs(tmp_path):
    pytest.importorskip("matplotlib")
    write_runs(tmp_path / "runs")
    write_report(tmp_path / "report")
    outputs = [out for cell in execute(tmp_path).cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.get("name") == "stderr"]
    pictures = [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 4 and min(map(len, pictures)) > 20_000  # none is empty
    texts = "".join(
        out.get("text", "") + out.get("data", {}).get("text/markdown", "") for out in outputs
    )
    for words in ("overoptimised", "| ppo |", "Completions side by side", "step    0"):
        assert words in texts


def test_the_fit_finds_the_curve_that_it_was_given():
    (source,) = [x for x in cells("code") if "def fit_gain" in x]
    names = {"np": np}
    exec(source.partition("figure, axes")[0], names)
    d = np.linspace(0.1, 5, 50)
    assert names["fit_gain"](d, d * (0.6 - 0.4 * np.log(d))) == pytest.approx([0.6, 0.4])


def test_no_output_is_committed():
    for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
