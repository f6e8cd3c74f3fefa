"""Curves to expect: runs with the scripts' defaults, seeds 1, 2, 3, as tables and one picture.

    python benchmarks/curves.py            # prints the tables
    python benchmarks/curves.py --write    # into docs/*.md, and docs/curves.png (needs matplotlib)

It reads metrics.jsonl of runs/sft1, runs/reward1, runs/ppo1, …, which the loop under "Results" in
README.md makes. A cell is the mean ± standard deviation over seeds, at the logged step that is
nearest to that share of the run; of what is logged at every step it is a mean of five lines, for
one batch says little.
"""

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3)
SHARES = (0, 0.1, 0.25, 0.5, 1)  # of a run
# Of each script: its metrics in the table, (metric, digits); the first two are drawn.
SHOWN = {
    "sft": [("eval/loss", 3), ("loss", 3), ("mean_token_accuracy", 3), ("grad_norm", 2)],
    "reward": [("eval/rewards/accuracies", 3), ("eval/loss", 3), ("loss", 3), ("grad_norm", 2)],
    "ppo": [
        ("gold/reward", 3),
        ("objective/kl", 2),
        ("reward", 2),
        ("objective/entropy", 1),
        ("policy/approxkl_avg", 4),
        ("policy/clipfrac_avg", 4),
        ("val/explained_variance", 2),
        ("loss/value_avg", 3),
        ("grad_norm", 2),
    ],
    "grpo": [
        ("gold/reward", 3),
        ("objective/kl", 2),
        ("reward", 2),
        ("reward_std", 2),
        ("objective/entropy", 1),
        ("policy/approxkl_avg", 4),
        ("policy/clipfrac_avg", 4),
        ("grad_norm", 3),
    ],
    "dpo": [
        ("eval/gold/reward", 3),
        ("eval/objective/kl", 2),
        ("eval/loss", 3),
        ("eval/rewards/accuracies", 3),
        ("eval/rewards/margins", 2),
        ("eval/logps/chosen", 1),
        ("eval/logps/rejected", 1),
    ],
    "iterative_dpo": [
        ("gold/reward", 3),
        ("objective/kl", 2),
        ("reward", 2),
        ("loss", 3),
        ("rewards/accuracies", 2),
        ("rewards/margins", 2),
        ("logps/chosen", 1),
    ],
}
MARKS = r"(<!-- curves: (\w+) -->\n)[\s\S]*?(<!-- end -->)"


@dataclass(frozen=True)
class Args:
    runs: str = "runs"  # the folder of sft1, reward1, ppo1, …
    write: bool = False  # into docs/


def read(runs, script, seed):
    """[(share of the run, metrics)] of a run's log."""
    path = Path(runs) / f"{script}{seed}" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [(row["step"] / rows[-1]["step"], row) for row in rows]


def at(rows, share, metric):
    """A metric near that share of the run: one evaluation, or the mean of five lines."""
    found = [(abs(x - share), row[metric]) for x, row in rows if row.get(metric) is not None]
    found.sort(key=lambda pair: pair[0])
    return statistics.mean(x for _, x in found[: 1 if metric.startswith("eval/") else 5])


def table(runs, script):
    logs = [read(runs, script, seed) for seed in SEEDS]
    last = logs[0][-1][1]["step"]
    titles = ["start", *(f"{share:.0%}" for share in SHARES[1:-1]), f"end, step {last}"]
    lines = [["metric", *titles], ["---"] * (len(titles) + 1)]
    for metric, digits in SHOWN[script]:
        cells = [f"`{metric}`"]
        for share in SHARES:
            values = [at(rows, share, metric) for rows in logs]
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            cells.append(f"{mean:.{digits}f} ± {deviation:.{digits}f}")
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(runs, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(SHOWN), figsize=(18, 5.4), sharex=True)
    for column, (script, metrics) in enumerate(SHOWN.items()):
        for axis, (metric, _) in zip(axes[:, column], metrics):
            for seed in SEEDS:
                rows = [(row["step"], row.get(metric)) for _, row in read(runs, script, seed)]
                last = rows[-1][0]
                rows = [(step / last, value) for step, value in rows if value is not None]
                axis.plot(*zip(*rows), linewidth=1, label=f"seed {seed}")
            axis.set_title(f"{script}.py: {metric}", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.grid(alpha=0.3)
        axes[1, column].set_xlabel("share of the run", fontsize=8)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main(args):
    tables = {script: table(args.runs, script) for script in SHOWN}
    for script, text in tables.items():
        print(f"{script}\n\n{text}\n")
    for path in sorted((ROOT / "docs").glob("*.md")) if args.write else ():
        before = path.read_text("utf-8")
        text = re.sub(MARKS, lambda match: match[1] + tables[match[2]] + "\n" + match[3], before)
        if text != before:
            path.write_text(text, "utf-8")
    if args.write:
        draw(args.runs, ROOT / "docs" / "curves.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
