"""benchmarks/results.py: what it computes of finished runs."""

import sys
from pathlib import Path

import numpy as np
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import results

import dpo
import grpo
import iterative_dpo
import ppo


def test_the_fit_finds_the_curve_that_made_the_points():
    kl = np.linspace(0.1, 40, 30)
    d = np.sqrt(kl)
    found = results.fit_gao(kl, d * (0.4 - 0.17 * np.log(d)))
    np.testing.assert_allclose(found, (0.4, 0.17), atol=1e-9)


def test_the_tables_of_runs_whose_gold_falls():
    """Two seeds; gold is highest at KL 4, the learned reward goes on to rise."""
    rows = [{"step": 0, "loss": 1.0}]
    for step, gold in enumerate((0.0, 0.2, 0.3, 0.25, 0.1)):
        found = {"eval/objective/kl": step**2, "eval/reward": float(step), "eval/gold/reward": gold}
        found["eval/objective/entropy"] = 20.0 - step
        rows.append({"step": step} | found)
    text = results.over_table([(Path(f"over-{seed}"), rows) for seed in (1, 2)])
    lines = text.splitlines()
    assert len(lines) == 4 and lines[2].startswith(
        "| 1 | 4.0 | 0.300 | 0.100 | 16.0 | 2.00 → 4.00 |"
    )
    row = {"gold": 0.4, "kl": 2.0, "share_gold": 0.9, "share_J": 0.8, "share_gold_trusted": False}
    text = results.frontier_table({("ppo", 0.3): [row, row | {"gold": 0.5}]})
    line = "| `ppo.py` | 0.3 | 0.450 ± 0.071 | 2.00 ± 0.00 | 90 ± 0 %* |  | 80 ± 0 % |"
    assert text.splitlines()[2] == line


def test_thinned_curves_keep_their_ends():
    rows = [{"step": i, "x": i / 3} for i in range(1000)]
    thinned = results.thin(rows)
    assert len(thinned) == results.KEPT and thinned[0]["step"] == 0 and thinned[-1]["step"] == 999
    assert thinned[-1]["x"] == 333 and results.thin(rows[:3]) == [
        {"step": 0, "x": 0.0},
        {"step": 1, "x": 0.33333},
        {"step": 2, "x": 0.66667},
    ]


def test_flags_that_it_types_exist():
    """Each script's Args take what the sweep sets."""
    scripts = {"ppo": ppo, "grpo": grpo, "iterative_dpo": iterative_dpo, "dpo": dpo}
    for script, (flag, values) in results.COEFFICIENTS.items():
        for value in values:
            assert getattr(scripts[script].Args(**{flag: value}), flag) == value
