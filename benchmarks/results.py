"""The project's headline, made anew: every algorithm on one reward-KL plot, over seeds.

    make results                                      # = python benchmarks/results.py
    python benchmarks/results.py --seeds 11 12 13     # other seeds
    python benchmarks/results.py --only over          # one of: frontier, over, arithmetic

It trains with the scripts' own commands, each kept in `commands.txt`, evaluates with evaluate.py,
and writes results/: README.md (tables), the plots, metrics/ (the runs' curves, thinned). A run that
is finished is not repeated, one that was stopped goes on. The runs themselves stay in runs/results.

frontier: PPO, GRPO, iterative DPO and DPO with several KL coefficients, each from the SFT policy
and with the reward model of its own seed. All other settings are the scripts' defaults, but for
evaluations on the way, which are left out.
over: over-optimisation. PPO without a KL penalty against a reward model of a few pairs. The form of
Gao et al. 2023 ("Scaling laws for reward model overoptimization") is fitted to its gold reward.
arithmetic: the right answers of GRPO on the sums of data/arithmetic, before and after.
"""

import json
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("frontier", "over", "arithmetic")
COEFFICIENTS = {  # script: (flag of the KL penalty's weight, values)
    "ppo": ("kl_coef", (0.15, 0.3, 0.6, 1.2)),
    "grpo": ("kl_coef", (0.15, 0.3, 0.6, 1.2)),
    "iterative_dpo": ("beta", (0.15, 0.3, 0.6, 1.2)),
    "dpo": ("beta", (0.05, 0.1, 0.3, 0.6)),
}
FEW_PAIRS = 80  # that the reward model of `over` has seen
KEPT = 60  # rows of a run's metrics in results/metrics
SUMS = ("--max-prompt-length", "6", "--max-completion-length", "4")


@dataclass(frozen=True)
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    only: tuple[Literal[PARTS], ...] = PARTS
    runs: str = "runs/results"  # folder of the runs
    out: str = "results"  # folder of the tables and plots
    tiny: bool = False  # a step or two of everything: shows that it works, not what it finds


# ------------------------------------------------------------------------------------------ running


class Runner:
    """Runs the scripts' command lines, each once."""

    def __init__(self, args):
        self.args, self.folder, self.commands = args, Path(args.runs), []
        self.folder.mkdir(parents=True, exist_ok=True)

    def call(self, done, *words):
        """One command, unless it is done; what it prints goes to log.txt. Raises if it fails."""
        line = shlex.join(["python", *map(str, words)])
        self.commands.append(line)
        if done:
            return
        print(time.strftime("%H:%M:%S"), line, flush=True)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as log:
            command = [sys.executable, *map(str, words)]
            subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)

    def train(self, name, script, seed, *flags):
        """The folder of a finished run of this script, which is made where it is not there yet."""
        run = self.folder.resolve() / f"{name}-{seed}"
        done = (run / "model" / "model.safetensors").exists()
        flags = [*flags, *(TINY[script] if self.args.tiny else ())]
        self.call(done, f"{script}.py", "--seed", seed, *flags, "--run-dir", run, "--resume")
        return run

    def evaluate(self, name, seed, ref, models, *flags):
        """The rows of evaluate.py's report on these runs."""
        report = self.folder.resolve() / f"{name}-{seed}"
        models = [run / "model" for run in models]
        flags = [*flags, "--ref", ref / "model", "--models", *models, "--report", report]
        small = ("--num-prompts", 8, "--frontier-prompts", 4, "--frontier-samples", 32)
        flags += small if self.args.tiny else ()
        self.call((report / "evaluation.jsonl").exists(), "evaluate.py", "--seed", seed, *flags)
        return read_lines(report / "evaluation.jsonl")


SHORT = ("--warmup-steps", 1)
TINY = {
    "sft": ("--epochs", 1, "--n-layer", 1, "--n-head", 2, "--n-embd", 32, *SHORT),
    "reward": SHORT,
    "ppo": ("--steps", 8, "--batch-size", 32, "--num-minibatches", 1, *SHORT),
    "grpo": ("--steps", 2, "--batch-size", 32, "--micro-batch-size", 16, *SHORT),
    "iterative_dpo": ("--rounds", 2, "--prompts-per-round", 32, "--batch-size", 16, *SHORT),
    "dpo": SHORT,
}


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def base(runner, seed):
    """(SFT run, reward model's run) of a seed."""
    sft = runner.train("sft", "sft", seed)
    return sft, runner.train("reward", "reward", seed, "--model", sft / "model")


def frontier(runner):
    """{(script, coefficient): one evaluated row of each seed}, and all rows of each seed."""
    points, reports = {}, []
    for seed in runner.args.seeds:
        sft, reward = base(runner, seed)
        models = {}
        for script, (flag, values) in COEFFICIENTS.items():
            learned = () if script == "dpo" else ("--reward-model", reward / "model")
            given = ("--model", sft / "model", *learned, "--eval-every", 1000)
            for value in values[: 1 if runner.args.tiny else None]:
                name, weight = f"{script}-{value}", (f"--{flag.replace('_', '-')}", value)
                models[script, value] = runner.train(name, script, seed, *given, *weight)
        rest = ("--reward-model", reward / "model")
        rows = runner.evaluate("report", seed, sft, models.values(), *rest)
        policies = {row["policy"]: row for row in rows if row["kind"] == "policy"}
        for key, run in models.items():
            points.setdefault(key, []).append(policies[str(run / "model")])
        reports.append(rows)
    return points, reports


def over_optimise(runner):
    """The metrics of one run for each seed; the learned reward has seen FEW_PAIRS pairs."""
    pairs = runner.folder.resolve() / "few_pairs.jsonl"
    lines = (ROOT / "data/reviews/preferences_train.jsonl").read_text("utf-8").splitlines(True)
    pairs.write_text("".join(lines[:FEW_PAIRS]), "utf-8")
    source = "data/reviews/preferences_train.jsonl"
    runner.commands.append(f"head -n {FEW_PAIRS} {source} > {pairs}")
    runs = []
    for seed in runner.args.seeds:
        sft = runner.train("sft", "sft", seed)
        few = ("--dataset", pairs, "--eval-dataset", "data/reviews/preferences_test.jsonl")
        few += ("--epochs", 6, "--batch-size", 16, "--micro-batch-size", 16)
        reward = runner.train("few", "reward", seed, "--model", sft / "model", *few)
        flags = ("--model", sft / "model", "--reward-model", reward / "model", "--kl-coef", 0)
        flags += ("--gold", "data/reviews.py:sentiment", "--steps", 40, "--eval-every", 2)
        run = runner.train("over", "ppo", seed, *flags)
        runs.append((run, read_lines(run / "metrics.jsonl")))
    return runs


def arithmetic(runner):
    """{"sft", "grpo"}: the evaluated row of each seed."""
    data = ROOT / "data" / "arithmetic"
    found = {"sft": [], "grpo": []}
    for seed in runner.args.seeds:
        files = ("--dataset", data / "sft_train.jsonl", "--eval-dataset", data / "sft_test.jsonl")
        files += ("--tokenizer", data / "tokenizer", "--epochs", 5, "--learning-rate", "1e-3")
        sft = runner.train("sums-sft", "sft", seed, *files, *SUMS)
        prompts = ("--dataset", data / "prompts_train.jsonl")
        prompts += ("--eval-dataset", data / "prompts_test.jsonl")
        flags = ("--model", sft / "model", "--reward", "rewards.py:numeric_answer", *prompts)
        flags += ("--steps", 150, "--batch-size", 512, "--micro-batch-size", 256)
        flags += ("--learning-rate", "1e-3", "--kl-coef", 0)
        run = runner.train("sums-grpo", "grpo", seed, *flags, *SUMS)
        rest = ("--dataset", data / "prompts_test.jsonl", "--reward-model", "", "--no-frontier")
        rest += ("--gold", "rewards.py:numeric_answer", "--samples-per-prompt", 16, *SUMS)
        rows = runner.evaluate("sums-report", seed, sft, [run], *rest)
        first, second = [row for row in rows if row["kind"] == "policy"]
        found["sft"].append(first)
        found["grpo"].append(second)
    return found


# ----------------------------------------------------------------------------------------- figures


def spread(values, scale=1.0, digits=3):
    """mean ± standard deviation over seeds, as text."""
    values = [scale * x for x in values if x is not None]
    if not values:
        return ""
    half = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{half}"


def frontier_table(points):
    lines = ["| | coefficient | gold | KL | share of gold's optimum |"]
    lines[0] += " of its reward model's | J share |"
    lines.append("|---|---|---|---|---|---|---|")
    for (script, value), rows in points.items():
        shares = []
        for name in ("share_gold", "share_gold_of_best_reward", "share_J"):
            text = spread([row.get(name) for row in rows], 100, 0)
            trusted = all(row.get(f"{name}_trusted", True) for row in rows)
            shares.append(text and text + " %" + ("" if trusted else "*"))
        gold, kl = (spread([row[x] for row in rows], 1, d) for x, d in (("gold", 3), ("kl", 2)))
        lines.append(f"| `{script}.py` | {value} | {gold} | {kl} | {' | '.join(shares)} |")
    return "\n".join(lines)


def reward_model_line(reports):
    rows = [row for report in reports for row in report if row["kind"] == "reward_model"]
    names = [x for x in rows[0] if x != "kind" and not x.endswith(("_ci", "_trusted"))]
    numbers = [x for x in names if all(isinstance(row[x], (int, float)) for row in rows)]
    return (
        "Reward models: " + "; ".join(f"{x} {spread([r[x] for r in rows])}" for x in numbers) + "."
    )


def plot_frontier(points, reports, path):
    """Both rewards against KL: a point for each coefficient, bars of one standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = {"reward": "learned reward", "gold": "gold reward"}
    for axis, (panel, title) in zip(figure.subplots(1, 2), panels.items()):
        for i, report in enumerate(reports):
            rows = [r for r in report if r["kind"] == "frontier" and r["of"] == panel]
            label = "" if i else "the most there is, each seed"
            axis.plot([r["kl"] for r in rows], [r[panel] for r in rows], "k-", lw=0.7, label=label)
        for script in dict.fromkeys(script for script, _ in points):
            own = [rows for (name, _), rows in points.items() if name == script]
            table = np.array([[[r["kl"], r[panel]] for r in rows] for rows in own])  # [C, S, 2]
            mean, std = table.mean(axis=1), table.std(axis=1, ddof=min(1, table.shape[1] - 1))
            axis.errorbar(*mean.T, std[:, 1], std[:, 0], "o-", ms=4, capsize=2, label=script)
        axis.set(xlabel="KL to the SFT policy, nats a sequence", ylabel=title)
        axis.set_xlim(0, 1.1 * max(r["kl"] for rows in points.values() for r in rows))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=120)


def fit_gao(kl, gold):
    """(alpha, beta) of gold - gold_0 = d (alpha - beta log d), d = sqrt(KL), by least squares.

    Gao et al. 2023, eq. 2, for reinforcement learning; kl > 0, gold already less its start.
    """
    d = np.sqrt(kl)
    terms = np.stack([d, -d * np.log(d)], axis=1)
    return np.linalg.lstsq(terms, gold, rcond=None)[0]


def over_curves(rows):
    """(step, KL, learned reward, gold reward, entropy) of the evaluations of a run, each [N]."""
    rows = [row for row in rows if "eval/gold/reward" in row]
    names = ("step", "eval/objective/kl", "eval/reward", "eval/gold/reward")
    names += ("eval/objective/entropy",)
    return np.array([[row[name] for name in names] for row in rows]).T


def over_table(runs):
    """Where gold was highest, and where it ended; the entropy at both, of that at the start."""
    lines = ["| seed | KL at the highest gold | gold there | gold at the end | KL at the end |"]
    lines[0] += " learned reward, there → end | entropy, there → end |"
    lines[0] += " alpha, beta of Gao et al. |"
    lines.append("|---|---|---|---|---|---|---|---|")
    for run, rows in runs:
        _, kl, reward, gold, entropy = over_curves(rows)
        best = int(np.argmax(gold))
        alpha, beta = fit_gao(kl[1:].clip(1e-3), gold[1:] - gold[0])
        seed = run.name.rpartition("-")[2]
        lines.append(
            f"| {seed} | {kl[best]:.1f} | {gold[best]:.3f} | {gold[-1]:.3f} | {kl[-1]:.1f} |"
            f" {reward[best]:.2f} → {reward[-1]:.2f} |"
            f" {entropy[best] / entropy[0]:.0%} → {entropy[-1] / entropy[0]:.0%} |"
            f" {alpha:.3f}, {beta:.3f} |"
        )
    return "\n".join(lines)


def plot_over(runs, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    twin = axis.twinx()
    for i, (_, rows) in enumerate(runs):
        _, kl, reward, gold, _ = over_curves(rows)
        twin.plot(np.sqrt(kl.clip(0)), reward, color="tab:blue", alpha=0.6, lw=1)
        axis.plot(np.sqrt(kl.clip(0)), gold, ".", color="tab:orange", label="" if i else "gold")
        alpha, beta = fit_gao(kl[1:].clip(1e-3), gold[1:] - gold[0])
        d = np.linspace(0.05, np.sqrt(kl.max()), 100)
        fitted = gold[0] + d * (alpha - beta * np.log(d))
        label = "" if i else "fit: d (alpha - beta log d)"
        axis.plot(d, fitted, "--", color="tab:orange", lw=1, label=label)
    axis.set(xlabel="d = sqrt(KL to the SFT policy)", ylabel="gold reward")
    twin.set_ylabel("learned reward (blue)", color="tab:blue")
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def thin(rows):
    """At most KEPT rows, the first and the last among them, numbers with five digits."""
    rows = [rows[i] for i in sorted({*np.linspace(0, len(rows) - 1, KEPT).astype(int)})]
    return [
        {k: float(f"{x:.5g}") if isinstance(x, float) else x for k, x in r.items()} for r in rows
    ]


def write_metrics(runner, out):
    folder = out / "metrics"
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(runner.folder.glob("*/metrics.jsonl")):
        lines = "".join(json.dumps(row) + "\n" for row in thin(read_lines(path)))
        (folder / f"{path.parent.name}.jsonl").write_text(lines, "utf-8")


def machine():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{len(names)} cores, {names[0]}" if names else platform.processor()


def main(args):
    started, runner, out = time.monotonic(), Runner(args), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    seeds = ", ".join(map(str, args.seeds))
    page = [
        "# Results",
        "Mean ± standard deviation over seeds " + seeds + ". Made by `make results`;",
    ]
    page[1] += (
        " the commands stand in [commands.txt](commands.txt), the curves in [metrics](metrics)."
    )
    if "frontier" in args.only:
        points, reports = frontier(runner)
        plot_frontier(points, reports, out / "frontier.png")
        page += ["## Reward and KL", "![Reward against KL](frontier.png)", frontier_table(points)]
        page += ["\\*: above the KL to which the frontier is trusted; too high."]
        page += [reward_model_line(reports)]
    if "over" in args.only:
        runs = over_optimise(runner)
        plot_over(runs, out / "over.png")
        text = f"PPO without a KL penalty; the reward model has seen {FEW_PAIRS} pairs."
        page += ["## Over-optimisation", text, "![Gold against KL](over.png)", over_table(runs)]
    if "arithmetic" in args.only:
        found = arithmetic(runner)
        lines = ["| | right answers, % | KL |", "|---|---|---|"]
        for name, rows in found.items():
            gold, kl = spread([r["gold"] for r in rows], 100, 1), spread([r["kl"] for r in rows])
            lines.append(f"| `{name}.py` | {gold} | {kl} |")
        page += ["## Sums with exact answers", "\n".join(lines)]
    write_metrics(runner, out)
    text = (
        "\n".join(dict.fromkeys(runner.commands))
        .replace(f"{runner.folder.resolve()}", args.runs)
        .replace(f"{ROOT}/", "")
    )
    (out / "commands.txt").write_text(text + "\n", "utf-8")
    minutes = f"{(time.monotonic() - started) / 60:.0f} minutes in this call"
    page.append(f"{time.strftime('%Y-%m-%d')}; {machine()}; {minutes}.")
    (out / "README.md").write_text("\n\n".join(page) + "\n", "utf-8")
    print(f"written: {out / 'README.md'}; {minutes}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
