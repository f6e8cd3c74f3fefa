"""Curves, samples and alarms of runs on one page, live or as one file.

    python tools/dashboard.py runs/ppo runs/grpo                    # serves http://127.0.0.1:8300
    python tools/dashboard.py runs/ppo runs/grpo --html page.html   # the same page in one file

It reads metrics.jsonl, samples.jsonl and args.json of each run's folder, and
writes nothing there. What a metric means, and where it is in a healthy run,
is read from docs/metrics.md. Needs: pip install -r tools/requirements.txt
"""

import json
import os
import re
import sys
import textwrap
import time
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro


@dataclass(frozen=True)
class Args:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]  # folders of runs, or of many runs
    html: str | None = None  # write the page to this file, and serve nothing
    port: int = 8300  # on 127.0.0.1


METRICS = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
# A curve keeps the lowest and the highest value of each of 1000 stretches: a screen shows no more
STRETCHES = 1000
# The samples of the first and of the last evaluations; a completion's first characters.
EVALUATIONS, CHARACTERS = 40, 2000
# Sections of the page, and the beginnings of the metrics in them; the rest comes last.
SECTIONS = {
    "Reward": "reward gold/ objective/rlhf_reward rewards/",
    "KL and entropy": "objective/kl kl policy/entropy objective/",
    "Updates": "policy/ val/ratio clip_ratio grad_norm lr loss nll_loss mean_token_accuracy",
    "Critic": "val/",
    "Spread of the reward": "reward_std frac_reward pairs/",
    "Completions": "completions/",
    "Preferences": "logps/",
    "Speed": "perf/",
}
SECTION_OF = {"reward_std": "Spread of the reward", "reward_std_between": "Spread of the reward"}
SECTION_OF |= dict.fromkeys(
    [f"rewards/{x}" for x in ("chosen", "rejected", "margins", "accuracies")], "Preferences"
)
# Names in TRL's logs, and in older runs.
ALIASES = {"learning_rate": "lr", "objective/scores": "reward", "entropy": "policy/entropy_avg"}


# ------------------------------------------------------------------------------------------ reading


class Series(NamedTuple):
    """One metric: the rows that have it."""

    steps: np.ndarray
    values: np.ndarray


class Lines:
    """The rows of a growing JSON Lines file; each call parses only what is new."""

    def __init__(self, path):
        self.path, self.inode, self.position, self.rows = path, None, 0, []

    def read(self):
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self.inode or status.st_size < self.position:  # begun again
                self.inode, self.position, self.rows = status.st_ino, 0, []
            file.seek(self.position)
            for number, line in enumerate(file, len(self.rows) + 1):
                if not line.endswith(b"\n"):  # not yet written to its end
                    break
                self.position += len(line)
                try:
                    row = json.loads(line)
                    self.rows.append(row if isinstance(row.get("step"), int | float) else {})
                except (ValueError, AttributeError):
                    print(f"note: {self.path}, line {number} is no JSON object", file=sys.stderr)
                    self.rows.append({})
        return self.rows


class Run:
    """A run's folder. `refresh` reads what is new."""

    def __init__(self, path):
        self.path, self.name = path, str(path)
        self.metrics = Lines(path / "metrics.jsonl")
        self.sample_rows = Lines(path / "samples.jsonl")
        self.columns, self.read_rows, self.series, self.bad = {}, 0, {}, {}

    def refresh(self):
        try:
            self.args = json.loads((self.path / "args.json").read_text("utf-8"))
        except (OSError, ValueError):
            self.args = {}
        rows = self.metrics.read()
        if len(rows) < self.read_rows:
            self.columns, self.read_rows, self.bad = {}, 0, {}
        for row in rows[self.read_rows :]:
            for name, value in row.items():
                name = ALIASES.get(name, name)
                if name in ("step", "perf/time"):
                    continue
                if isinstance(value, int | float) and np.isfinite(value):
                    steps, values = self.columns.setdefault(name, ([], []))
                    steps.append(row["step"])
                    values.append(value)
                elif value is None or isinstance(value, float):  # the scripts write null for NaN
                    self.bad.setdefault(name, row["step"])
        changed, self.read_rows = len(rows) != self.read_rows, len(rows)
        if changed or not self.series:
            self.series = {x: Series(*map(np.array, y)) for x, y in self.columns.items()}
            self.series |= derived(self.series)
        return self

    @property
    def last_step(self):
        return max((int(x.steps[-1]) for x in self.series.values()), default=0)

    def status(self):
        total = self.args.get("steps")
        at = f"step {self.last_step}" + (f" of {total}" if total else "")
        if (self.path / "model").exists():
            return f"finished, {at}"
        times = [row["perf/time"] for row in self.metrics.rows[-1:] if row.get("perf/time")]
        return f"{at}, last line {ago(time.time() - times[0])} ago" if times else at


def ago(seconds):
    """About how long: 70 -> "1 min"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def derived(series):
    """Metrics that follow from logged ones: how fast the KL moves, the spread between prompts."""
    found = {}
    if "objective/kl" in series and len(series["objective/kl"].steps) > 1:
        steps, values = series["objective/kl"]
        updates = series.get("policy/updates", Series(steps, np.ones(len(steps)))).values
        if len(updates) == len(steps):
            count = np.maximum(np.diff(steps) * updates[1:], 1)
            found["objective/kl_per_update"] = Series(steps[1:], np.diff(values) / count)
    totals = [x for x in series if re.fullmatch(r"rewards/.+/std", x)]
    if "reward_std" in series and len(totals) == 1:
        (steps, within), total = series["reward_std"], series[totals[0]].values
        if len(total) == len(within):
            between = np.sqrt(np.maximum(total**2 - within**2, 0))
            found["reward_std_between"] = Series(steps, between)
    return found


def find_runs(names):
    """The Runs in these folders; ends with one sentence where there are none."""
    found = []
    for name in names:
        folder = Path(name)
        if not folder.is_dir():
            fail(f"no folder {name}: pass the folder of a run, such as runs/ppo")
        inside = sorted(x.parent for x in folder.glob("*/metrics.jsonl"))
        if inside and not (folder / "metrics.jsonl").exists():
            found += inside
        else:
            found.append(folder)
    return [Run(folder) for folder in dict.fromkeys(found)]


@cache
def read_meanings(path=METRICS):
    """{metric: {"what", "healthy", "band"}} from the tables of docs/metrics.md."""
    found = {}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for line in lines:
        cells = [x.strip() for x in line.strip("|").split("|")]
        if len(cells) != 3 or not cells[0].startswith("`") or cells[1].startswith("as above"):
            continue
        what, healthy = (x.replace("`", "") for x in cells[1:])
        for name in re.findall(r"`([^`]+)`", cells[0]):
            if name in found:  # `loss` is another one in each script
                found[name]["what"] += f" · {what}"
            elif not name.endswith(".py"):
                found[name] = {"what": what, "healthy": healthy, "band": band(healthy)}
    return found


def band(healthy):
    """[low, high] of "below 0.05 …", "above 0 …" or "within 0.05 of 1 …"; None: no bound."""
    if match := re.match(r"within ([\d.]*\d) of ([\d.]*\d)", healthy):
        width, middle = map(float, match.groups())
        return [middle - width, middle + width]
    if match := re.match(r"(below|above) ([\d.]*\d)", healthy):
        value = float(match[2])
        return [None, value] if match[1] == "below" else [value, None]
    return None


def meaning(name):
    """What docs/metrics.md says of a metric, eval/ in front of it or not."""
    meanings = read_meanings()
    for known, found in meanings.items():
        pattern = re.escape(known.removeprefix("eval/"))
        pattern = re.sub("<[a-z]+>", "[^/]+", pattern).replace("@k", "@[0-9]+")
        if re.fullmatch(rf"(eval/)?{pattern}", name):
            return found
    return {"what": "", "healthy": "", "band": None}


# ------------------------------------------------------------------------------------------- alarms


class Alarm(NamedTuple):
    metric: str  # the curve that shows it
    first: int  # step
    last: int  # step; that of the run's end where it still holds
    title: str
    evidence: str
    reason: str
    remedy: str


def level(series, width=None):
    """Means over a window of rows, each at its last step: noise must raise no alarm."""
    steps, values = series
    width = width or min(max(len(values) // 20, 5), 50)
    if len(values) < width:
        return Series(steps[:0], values[:0])
    return Series(steps[width - 1 :], np.convolve(values, np.ones(width) / width, "valid"))


def levels(run, *names):
    """(name, level) of those of these metrics that the run has; of eval/ ones in pairs."""
    found = [(x, y) for x in names for y in run.series if re.fullmatch(rf"(eval/)?{x}", y)]
    return [(y, level(run.series[y], 2 if y.startswith("eval/") else None)) for _, y in found]


def begin(run, name):
    """A metric before the first update: held out, at step 0, or else the first that is logged."""
    for x in (f"eval/{name}", name):
        if x in run.series:
            return run.series[x].values[0]
    return None


def where(name, series, bad, title, evidence, reason, remedy):
    """The Alarm that `bad` [rows of series] calls for, in a list, or none.

    evidence has places for the value at the worst row: the farthest from the first.
    """
    if not bad.any():
        return []
    steps, values = series.steps[bad], series.values[bad]
    worst = values[np.argmax(np.abs(values - series.values[0]))]
    text = evidence.format(worst=worst)
    return [Alarm(name, int(steps[0]), int(steps[-1]), title, text, reason, remedy)]


def earliest(alarms):
    """The first of alarms that say the same of several curves, in a list."""
    return sorted(alarms, key=lambda alarm: alarm.first)[:1]


def not_finite(run):
    """A metric is NaN or infinite."""
    for name, step in run.bad.items():
        return [
            Alarm(
                name,
                step,
                step,
                "A number is not finite",
                f"{name} at step {step}; {len(run.bad)} metrics in all",
                "The loss or a reward overflowed, most often after updates that were too large.",
                "Lower --learning-rate, or --max-grad-norm; look whether a reward can be infinite.",
            )
        ]
    return []


def kl_runs_away(run):
    """The policy leaves the reference by more than a good policy needs."""
    title = "The KL runs away"
    reason = (
        "The completions are no longer such as the reference writes: nothing holds the policy, or "
        "its steps are too large. A learned reward knows nothing about such texts."
    )
    remedy = (
        "Raise --kl-coef (or set --kl-target); lower --learning-rate; stop a rollout's updates "
        "with --stop-kl. Use the checkpoint from before."
    )
    entropy = begin(run, "objective/entropy")
    found = []
    for name, kl in levels(run, "objective/kl"):
        if entropy and entropy > 0:
            evidence = f"{name} {{worst:.3g}} nats; the reference's own entropy is {entropy:.3g}"
            found += where(name, kl, kl.values > 0.5 * entropy, title, evidence, reason, remedy)
    entropy = begin(run, "policy/entropy_avg")
    for name, kl in levels(run, "kl") if not found and entropy and entropy > 0 else ():
        evidence = f"{name} {{worst:.3g}} nats a token; the entropy was {entropy:.3g} a token"
        found += where(name, kl, kl.values > 0.5 * entropy, title, evidence, reason, remedy)
    wanted = ("reward", "objective/non_score_reward", "objective/kl")
    if not found and all(x in run.series for x in wanted):
        reward, penalty, kl = (level(run.series[x]) for x in wanted)
        if len(reward.steps) == len(penalty.steps) == len(kl.steps) and len(kl.steps):
            gain = np.maximum(reward.values - begin(run, "reward"), 0)
            bad = (kl.values > 1) & (-penalty.values > 1.25 * gain)
            evidence = "KL {worst:.3g} nats; its penalty is more than the reward that was gained"
            found += where("objective/kl", kl, bad, title, evidence, reason, remedy)
    return earliest(found)


def kl_below_zero(run):
    """A KL is positive, but for noise."""
    found, entropy = [], begin(run, "objective/entropy") or 0
    for name, kl in levels(run, "objective/kl"):
        found += where(
            name,
            kl,
            kl.values < -0.02 * max(entropy, 1),
            "The KL is negative",
            f"{name} {{worst:.3g}} nats",
            "Masks or temperatures differ between sampling and the reference, or the samples are "
            "not the policy's own.",
            "Compare log-probabilities of policy and reference at step 0, where they must be "
            "equal; sample with neither top-k nor top-p.",
        )
    return earliest(found)


def updates_too_large(run):
    """Outside the bands that docs/metrics.md gives."""
    names = ("policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio", "clip_ratio/region_mean")
    found = []
    for name, series in levels(run, *names):
        low, high = meaning(name)["band"] or (None, None)
        bad = np.zeros(len(series.values), bool)
        bad |= series.values < (-np.inf if low is None else low)
        bad |= series.values > (np.inf if high is None else high)
        found += where(
            name,
            series,
            bad,
            "The updates of a rollout are too large",
            f"{name} {{worst:.3g}}; healthy: {meaning(name)['healthy']}",
            "The policy moves so far from the one that sampled that the ratio is clipped for many "
            "tokens, and what is left of the gradient no longer points upwards.",
            "Lower --learning-rate or --epochs; raise --batch-size; --stop-kl (ppo.py).",
        )
    return earliest(found)


def entropy_collapses(run):
    """The policy writes nearly one text."""
    found = []
    for name in ("policy/entropy_avg", "objective/entropy"):
        start = begin(run, name)
        for curve, series in levels(run, name) if start and start > 0 else ():
            found += where(
                curve,
                series,
                series.values < 0.3 * start,
                "The entropy collapses",
                f"{curve} {{worst:.3g}} nats, {start:.3g} at the start",
                "The policy writes nearly the same to every sample of a prompt: it explores no "
                "more. (Where a prompt has one right answer, that is the aim.)",
                "Raise --kl-coef or --entropy-coef; lower --learning-rate; grpo.py: a larger "
                "--clip-eps-high. Look at the samples below.",
            )
    return earliest(found)


def gradient_spikes(run):
    """One gradient is far above those before it, or all of them have grown."""
    if "grad_norm" not in run.series:
        return []
    series = run.series["grad_norm"]
    if len(series.values) <= 5:
        return []
    padded = np.concatenate([np.full(20, np.nan), series.values])
    before = np.lib.stride_tricks.sliding_window_view(padded, 20)[:-1]
    usual = np.nanmedian(before[5:], axis=1)
    rest = Series(series.steps[5:], series.values[5:])
    start = np.median(series.values[:5])
    spikes = (rest.values > 10 * usual) & (rest.values > start)  # at the end many are near 0
    return where(
        "grad_norm",
        rest,
        spikes | (rest.values > 30 * start),
        "The gradient spikes",
        f"grad_norm {{worst:.3g}}, {start:.3g} in the first steps; spikes: {spikes.sum()}",
        "A few rows dominate an update (a ratio or a reward far from the others), or the policy is "
        "in a region where the loss is steep.",
        "Lower --learning-rate; lower --max-grad-norm; raise --warmup-steps; look at the largest "
        "reward of the step.",
    )


def noise(series):
    """Standard error of level(series): from neighbours' differences, which a trend hardly moves."""
    width = min(max(len(series.values) // 20, 5), 50)
    return np.std(np.diff(series.values)) / np.sqrt(2 * width)


def score_is_exploited(run):
    """What is trained on rises while the truth, or the held-out reward, falls."""
    pairs = [("reward", "gold/reward"), ("reward", "eval/gold/reward"), ("reward", "eval/reward")]
    for score, truth in [*pairs, ("rewards/margins", "eval/gold/reward")]:
        if score not in run.series or truth not in run.series:
            continue
        held_out = truth.startswith("eval/")
        rising, fallen = level(run.series[score]), level(run.series[truth], 2 if held_out else None)
        if len(rising.values) < 2 or len(fallen.values) < 2:
            continue
        scores = np.interp(fallen.steps, rising.steps, rising.values)
        peak = np.maximum.accumulate(fallen.values)
        at = np.maximum.accumulate(
            np.where(fallen.values == peak, np.arange(len(peak)), 0)
        )  # the row of the highest so far
        fall, rise = peak - fallen.values, scores - scores[at]
        surely = 0 if held_out else 4 * noise(run.series[truth])
        bad = (fall > surely) & (fall > 0.25 * np.ptp(fallen.values))
        bad &= rise > 4 * noise(run.series[score])
        found = where(
            truth,
            fallen,
            bad,
            f"The score rises while {truth} falls",
            f"{truth} {{worst:.3g}} after {peak[-1]:.3g}; {score} {scores[-1]:.3g}",
            "The policy has found what the score rewards by mistake (length, a phrase, a format), "
            "or it learns the training prompts by heart.",
            "Read the samples with the highest scores. Stop at the peak; raise --kl-coef; repair "
            "the reward, or train the reward model on samples of this policy.",
        )
        if found:
            return found
    return []


def no_spread(run):
    """Equal rewards within the groups, or everywhere: no advantage, nothing to learn."""
    found = []
    remedy = (
        "Look at the reward of a few samples: is it constant, or the task too easy or too hard? "
        "Mix prompts of another difficulty; raise --temperature or --num-generations; if the "
        "entropy has collapsed, too, raise --kl-coef."
    )
    for name, bound in (("frac_reward_zero_std", 0.8), ("pairs/ties", 0.5)):
        for curve, series in levels(run, name):
            found += where(
                curve,
                series,
                series.values > bound,
                "Groups lose their spread",
                f"{curve} {{worst:.3g}}",
                "All completions to a prompt have the same reward, so that none is better than "
                "another: such a prompt teaches nothing.",
                remedy,
            )
    stds = {x: y for x, y in levels(run, "rewards/[^/]+/std") if not x.startswith("eval/")}
    flat = [x for x, y in stds.items() if len(y.values) and y.values[-1] < 1e-6]
    if stds and len(flat) == len(stds):
        name, series = flat[0], stds[flat[0]]
        found += where(
            name,
            series,
            series.values < 1e-6,
            "The reward is constant",
            f"{name} {{worst:.3g}}: every completion of a step has the same score",
            "Nothing but the KL penalty and noise is left in the advantages.",
            remedy,
        )
    if not found and begin(run, "reward_std"):
        start = level(run.series["reward_std"])
        if len(start.values):
            found += where(
                "reward_std",
                start,
                start.values < 0.05 * start.values[0],
                "Groups lose their spread",
                f"reward_std {{worst:.3g}}, {start.values[0]:.3g} at the start",
                "All completions to a prompt have nearly the same reward: what is left is noise, "
                "which --advantage group scales up.",
                remedy,
            )
    return earliest(found)


def completions_do_not_end(run):
    """Most completions are cut."""
    found = []
    for name, series in levels(run, "completions/clipped_ratio"):
        found += where(
            name,
            series,
            series.values > 0.3,
            "Completions stop ending",
            f"{name} {{worst:.3g}}",
            "The reward pays for length, or nothing asks for an end: a cut text is scored as if it "
            "were whole.",
            "Raise --missing-eos-penalty; raise --max-completion-length if the texts are good; "
            "start from a model that has learned to end (sft.py).",
        )
    start = begin(run, "completions/mean_length")
    for name, series in levels(run, "completions/mean_length") if not found and start else ():
        found += where(
            name,
            series,
            series.values < 0.25 * start,
            "Completions shrink to almost nothing",
            f"{name} {{worst:.3g}} tokens, {start:.3g} at the start",
            "The reward, or the KL penalty that is summed over tokens, favours short texts.",
            "Read the samples. Does the reward of an empty text exceed that of a good one?",
        )
    return earliest(found)


def critic_explains_nothing(run):
    """After it had time to learn, the critic is no better than a constant."""
    for name, series in levels(run, "val/explained_variance"):
        rest = Series(series.steps[10:], series.values[10:])
        return where(
            name,
            rest,
            rest.values < 0.05,
            "The critic explains nothing",
            f"{name} {{worst:.3g}}",
            "The advantages are then the bare returns, with all their noise; below 0 the critic "
            "adds noise of its own.",
            "Raise --vf-coef; raise --value-clip-eps if the rewards are large; start the critic "
            "from a reward model; or do without one (grpo.py).",
        )
    return []


def learning_rate_is_gone(run):
    """Steps that change nothing: more of them than the end of a schedule has."""
    if "lr" not in run.series:
        return []
    series = run.series["lr"]
    bad = series.values <= 1e-3 * series.values.max()
    bad &= np.minimum.accumulate(bad[::-1])[::-1]  # those after which none is higher
    if bad.sum() < max(5, 0.05 * len(bad)):
        return []
    return where(
        "lr",
        series,
        bad,
        "The learning rate is gone",
        f"lr {{worst:.3g}} since step {series.steps[bad][0]}, {bad.sum()} logged steps",
        "The schedule ended before the run did, or the rate was given as 0: what comes after "
        "teaches nothing.",
        "Give the schedule the run's real length (--resume with more --steps sets it anew), or a "
        "--learning-rate above 0.",
    )


def likelihoods(run):
    """Losses that mean something: those of tokens and of pairs."""
    if not {"mean_token_accuracy", "rewards/accuracies"} & run.series.keys():
        return []
    found = []
    remedy = "Lower --learning-rate; raise --warmup-steps."
    for name, series in levels(run, "loss"):
        if name == "loss" and len(series.values):
            first, lowest = begin(run, "loss"), np.minimum.accumulate(series.values)
            undone = lowest + 0.3 * np.maximum(first - lowest, 0)  # of what was gained
            bad = series.values > np.where(lowest < 0.5 * first, undone, 1.2 * first)
            found += where(
                name,
                series,
                bad & (series.values > lowest + 4 * noise(run.series[name])),
                "The loss rises",
                f"{name} {{worst:.3g}}, {lowest[-1]:.3g} at its lowest",
                "The steps are so large that they undo what was learned.",
                remedy,
            )
    if not found and {"loss", "eval/loss"} <= run.series.keys():
        held_out, trained = run.series["eval/loss"], level(run.series["loss"])
        lowest = np.minimum.accumulate(held_out.values)
        if len(trained.values) > 1 and trained.values[-1] < trained.values[0]:
            gained = held_out.values[0] - lowest
            found += where(
                "eval/loss",
                held_out,
                (held_out.values - lowest > 0.2 * gained) & (gained > 0),
                "The held-out loss rises while the loss falls",
                f"eval/loss {{worst:.3g}}, {lowest[-1]:.3g} at its lowest",
                "The model learns the training rows by heart.",
                "Fewer --epochs, more rows, a lower --learning-rate, --weight-decay.",
            )
    accuracies = run.series.get("rewards/accuracies")
    if not found and accuracies and len(accuracies.values) >= 20:
        half = Series(*(x[len(x) // 2 :] for x in accuracies))
        mean = level(half, len(half.values))
        found += where(
            "rewards/accuracies",
            mean,
            mean.values < 0.55,
            "The pairs teach nothing",
            "rewards/accuracies {worst:.3g} over the second half of the run; 0.5 is chance",
            "Chosen and rejected are told apart no better than by chance: noisy labels, swapped "
            "columns, a learning rate that is too low or far too high.",
            "Read ten pairs of the data. Try a --learning-rate ten times lower and one ten times "
            "higher.",
        )
    return earliest(found)


def steps_are_skipped(run):
    """mixed_precision.py: gradients overflow all the time."""
    if "skipped_steps" not in run.series:
        return []
    series = run.series["skipped_steps"]
    return where(
        "skipped_steps",
        series,
        (series.values > 0.1 * series.steps) & (series.steps >= 50),
        "Many steps are skipped",
        "{worst:.0f} steps so far had a gradient that overflowed",
        "The numbers of half precision do not reach as far as the gradients.",
        "Use --dtype bfloat16, or a lower --learning-rate.",
    )


CHECKS = [not_finite, kl_runs_away, kl_below_zero, updates_too_large, entropy_collapses]
CHECKS += [gradient_spikes, score_is_exploited, no_spread, completions_do_not_end]
CHECKS += [critic_explains_nothing, learning_rate_is_gone, likelihoods, steps_are_skipped]


def find_alarms(run):
    """All Alarms of a run that has been read, the earliest first."""
    return sorted((x for check in CHECKS for x in check(run)), key=lambda alarm: alarm.first)


# --------------------------------------------------------------------------------------------- page


def thin(series):
    """At most 2 * STRETCHES points: the lowest and the highest of each stretch, so spikes stay."""
    steps, values = series
    if len(values) > 2 * STRETCHES:
        size = -(-len(values) // STRETCHES)
        parts = np.pad(values, (0, -len(values) % size), mode="edge").reshape(-1, size)
        ends = np.stack([parts.argmin(axis=1), parts.argmax(axis=1)], axis=1)
        kept = np.minimum(ends + size * np.arange(len(parts))[:, None], len(values) - 1)
        kept = np.unique([0, *kept.ravel(), len(values) - 1])
        steps, values = steps[kept], values[kept]
    return [steps.tolist(), [float(f"{x:.6g}") for x in values]]


def shown_samples(run):
    """Samples of at most EVALUATIONS steps, spread over the run; texts cut to CHARACTERS."""
    rows = [x for x in run.sample_rows.read() if x]
    steps = list(dict.fromkeys(row["step"] for row in rows))
    places = np.linspace(0, len(steps) - 1, min(len(steps), EVALUATIONS)).round().astype(int)
    kept = {steps[i] for i in places}
    return [
        {k: v[:CHARACTERS] if isinstance(v, str) else v for k, v in row.items()}
        for row in rows
        if row["step"] in kept
    ]


def section(name):
    base = name.removeprefix("eval/")
    known = SECTION_OF.get(base)
    found = [title for title, starts in SECTIONS.items() if base.startswith(tuple(starts.split()))]
    return known or (found or ["Other"])[0]


def page_data(runs):
    """All that the page shows, ready for JSON."""
    shown, names = [], {}
    for run in runs:
        run.refresh()
        alarms = [x._asdict() | {"now": x.last >= run.last_step} for x in find_alarms(run)]
        row = {"name": run.name, "status": run.status(), "alarms": alarms, "args": run.args}
        row |= {"series": {name: thin(x) for name, x in run.series.items()}}
        shown.append(row | {"samples": shown_samples(run)})
        names |= dict.fromkeys(x.removeprefix("eval/") for x in run.series)
    order = [*SECTIONS, "Other"]
    starts = [start for starts in SECTIONS.values() for start in starts.split()]

    def place(name):
        first = [len(start) for start in starts if name.startswith(start)]
        first = [i for i, x in enumerate(starts) if name.startswith(x) and len(x) == max(first)]
        return order.index(section(name)), (first or [len(starts)])[0]

    panels = [{"name": x, "section": section(x), **meaning(x)} for x in sorted(names, key=place)]
    return {"runs": shown, "panels": panels}


def page(data, live):
    """The whole page: Plotly, the data, and the script that draws them."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        fail("plotly is missing: pip install -r tools/requirements.txt")
    text = json.dumps(data).replace("<", "\\u003c")  # no text of a sample may end the script
    parts = {"PLOTLY": get_plotlyjs(), "DATA": text, "LIVE": json.dumps(live)}
    return re.sub(r"/\*(PLOTLY|DATA|LIVE)\*/", lambda match: parts[match[1]], PAGE)


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; GET /data the runs as they are, or 204 if they have not grown."""

    def do_GET(self):
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost"):  # another site's name that leads here
            return self.answer(403, "text/plain", "only for 127.0.0.1")
        path, _, have = self.path.partition("?")
        if path == "/":
            return self.answer(200, "text/html", self.server.page)
        if path != "/data":
            return self.answer(404, "text/plain", "no such page")
        data = json.dumps(page_data(self.server.runs)) if self.grown(have) else ""
        self.answer(200 if data else 204, "application/json", data)

    def grown(self, have):
        """Whether the files are not those of the page's last answer; it sends their sizes back."""
        logs = [x.path for run in self.server.runs for x in (run.metrics, run.sample_rows)]
        self.sizes = "-".join(str(x.stat().st_size if x.exists() else 0) for x in logs)
        return have != self.sizes

    def answer(self, status, kind, text):
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Sizes", getattr(self, "sizes", ""))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def main(args):
    if not args.runs:
        fail("pass the folder of a run, such as runs/ppo")
    runs = find_runs(args.runs)
    if args.html:
        empty = [run.name for run in runs if not run.metrics.read()]
        if empty:
            fail(f"no metrics in {empty[0]}/metrics.jsonl: pass the folder of a run")
        Path(args.html).write_text(page(page_data(runs), live=False), "utf-8")
        for run in runs:
            for alarm in find_alarms(run):
                print(f"{run.name}: step {alarm.first}: {alarm.title}: {alarm.evidence}")
        print(f"wrote {args.html}, {Path(args.html).stat().st_size / 1e6:.1f} MB")
        return
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except OSError as error:
        fail(f"port {args.port}: {error.strerror}; pass another --port")
    server.runs, server.page = runs, page({"runs": [], "panels": []}, live=True)
    names = ", ".join(run.name for run in runs)
    print(f"http://127.0.0.1:{server.server_port} shows {names}; Ctrl-C ends it", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Runs</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --page: #f5f5f3; --card: #fff; --ink: #1b1b1a; --soft: #6a6966;
  --line: #e2e1dc; --band: rgba(30, 150, 90, .13); --bad: #b3261e; --bad-soft: #fbeceb; }
@media (prefers-color-scheme: dark) { :root { --page: #141413; --card: #1e1e1c; --ink: #ecebe7;
  --soft: #a09e98; --line: #363632; --band: rgba(70, 200, 130, .16); --bad: #ff8a80;
  --bad-soft: #3a2120; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, sans-serif; }
header { position: sticky; top: 0; z-index: 5; background: var(--page); padding: 10px 20px;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: 6px 20px; }
header label { cursor: pointer; white-space: nowrap; }
#runs { display: flex; flex-wrap: wrap; gap: 4px 16px; flex: 1; }
.dot { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 5px; }
.soft { color: var(--soft); }
main { padding: 0 20px 40px; }
h2 { font-size: 15px; margin: 22px 0 8px; }
.grid { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 12px; min-width: 0; }
.card h3 { margin: 0; font: 600 13px ui-monospace, monospace; }
.card p { margin: 2px 0 0; font-size: 12px; color: var(--soft); }
.plot { height: 230px; }
.alarm { border-left: 4px solid var(--bad); background: var(--bad-soft); cursor: pointer; }
.alarm.past { opacity: .75; }
.alarm h3 { color: var(--bad); font-family: inherit; font-size: 14px; }
.alarm p { color: var(--ink); font-size: 13px; }
table { border-collapse: collapse; width: 100%; background: var(--card); font-size: 13px; }
td, th { border: 1px solid var(--line); padding: 5px 8px; text-align: left; vertical-align: top; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
select, input { font: inherit; vertical-align: middle; }
</style>
<header>
  <div id="runs"></div>
  <label>smoothing
    <input id="smoothing" type="range" min="0" max="0.98" step="0.02" value="0.6"></label>
  <label><input id="logy" type="checkbox"> log y</label>
  <label><input id="logx" type="checkbox"> log step</label>
</header>
<main>
  <h2 id="alarms-title"></h2>
  <div id="alarms" class="grid"></div>
  <div id="panels"></div>
  <h2>Samples</h2>
  <p><select id="sample-run"></select> step <input id="sample-step" type="range" min="0" value="0">
    <b id="sample-number"></b></p>
  <table id="samples"></table>
</main>
<script>/*PLOTLY*/</script>
<script id="data" type="application/json">/*DATA*/</script>
<script>
const live = /*LIVE*/;
const LIGHT = ["#2368c4", "#d9601a", "#148a5e", "#a33b9e", "#b08400",
  "#c43d4b", "#127f94", "#6b4fc8"];
const DARK = ["#6aa8ff", "#ff9a5c", "#4fd09a", "#e58be0", "#e6c14f",
  "#ff8591", "#5fd0e6", "#b09bff"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const $ = id => document.getElementById(id);
const hidden = new Set();
let data = JSON.parse($("data").textContent), sizes = "", drawn = new Set(), visible = new Set();

function element(tag, text, parent, className = "") {  // texts only: a sample is no HTML
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  parent.append(made);
  return made;
}

const color = i => (dark.matches ? DARK : LIGHT)[i % LIGHT.length];
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function smooth(values, weight) {  // exponential mean that is not drawn to 0 at its start
  let sum = 0, norm = 0;
  return values.map(x => {
    sum = weight * sum + (1 - weight) * x;
    norm = weight * norm + (1 - weight);
    return +(sum / norm).toPrecision(6);
  });
}

function draw(panel) {
  const weight = +$("smoothing").value, traces = [], shapes = [];
  let low = Infinity, high = -Infinity;
  data.runs.forEach((run, i) => {
    if (hidden.has(run.name)) return;
    const look = {name: run.name, type: "scatter", showlegend: false};
    if (panel.name in run.series) {
      const [x, y] = run.series[panel.name];
      for (const v of y) { low = Math.min(low, v); high = Math.max(high, v); }
      const mode = y.length > 1 ? "lines" : "markers";
      if (weight && y.length > 2)
        traces.push({...look, x, y, mode, opacity: .3, line: {color: color(i), width: 1},
          hoverinfo: "skip"});
      traces.push({...look, x, y: weight ? smooth(y, weight) : y, customdata: y, mode,
        line: {color: color(i), width: 1.8}, hovertemplate: weight ?
        "%{y:.4g} (logged %{customdata:.4g})" : "%{y:.4g}"});
    }
    if ("eval/" + panel.name in run.series) {
      const [x, y] = run.series["eval/" + panel.name];
      for (const v of y) { low = Math.min(low, v); high = Math.max(high, v); }
      traces.push({...look, name: run.name + " eval", x, y, mode: "lines+markers",
        line: {color: color(i), width: 1.5, dash: "dot"}, marker: {size: 6},
        hovertemplate: "%{y:.4g}"});
    }
    for (const alarm of run.alarms)
      if (alarm.metric.replace(/^eval\//, "") === panel.name)
        shapes.push({type: "line", x0: alarm.first, x1: alarm.first, y0: 0, y1: 1, yref: "paper",
          line: {color: css("--bad"), width: 1.5, dash: "dash"}});
  });
  if (panel.band && low < Infinity) {  // within what the curves span: a far bound must not flatten
    const pad = (high - low) * .05 || Math.abs(high) * .05 || .01;
    const y0 = Math.max(panel.band[0] ?? -Infinity, low - ($("logy").checked ? 0 : pad));
    const y1 = Math.min(panel.band[1] ?? Infinity, high + pad);
    if (y0 < y1) shapes.push({type: "rect", xref: "paper", x0: 0, x1: 1, y0, y1, layer: "below",
      line: {width: 0}, fillcolor: css("--band")});
  }
  const axis = {gridcolor: css("--line"), linecolor: css("--line"), zeroline: false};
  Plotly.react("plot-" + panel.name, traces, {
    margin: {l: 52, r: 8, t: 8, b: 30}, paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)", font: {color: css("--ink"), size: 11}, hovermode: "x unified",
    hoverlabel: {bgcolor: css("--card"), font: {color: css("--ink")}}, shapes, uirevision:
    $("logy").checked + " " + $("logx").checked,
    xaxis: {...axis, type: $("logx").checked ? "log" : "linear"},
    yaxis: {...axis, type: $("logy").checked ? "log" : "linear", exponentformat: "power"},
  }, {displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"]});
  drawn.add(panel.name);
}

// A panel is drawn once it comes into view: a page of 30 panels opens at once.
const watcher = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    const name = target.id.slice(5);
    isIntersecting ? visible.add(name) : visible.delete(name);
    const panel = data.panels.find(x => x.name === name);
    if (isIntersecting && panel && !drawn.has(name)) draw(panel);
  }
}, {rootMargin: "200px"});

function redraw() {
  drawn.clear();
  for (const panel of data.panels) if (visible.has(panel.name)) draw(panel);
}

function showRuns() {
  $("runs").replaceChildren();
  data.runs.forEach((run, i) => {
    const label = element("label", "", $("runs"));
    const box = element("input", "", label);
    box.type = "checkbox";
    box.checked = !hidden.has(run.name);
    box.onchange = () => {
      box.checked ? hidden.delete(run.name) : hidden.add(run.name);
      redraw();
    };
    element("span", "", label, "dot").style.background = color(i);
    element("b", run.name, label);
    element("span", "  " + run.status, label, "soft");
  });
}

function showAlarms() {
  const all = data.runs.flatMap((run, i) => run.alarms.map(alarm => ({...alarm, run, i})));
  all.sort((a, b) => b.now - a.now);
  $("alarms-title").textContent = all.length ? `Alarms (${all.length})` : "No alarms";
  $("alarms").replaceChildren();
  for (const alarm of all) {
    const card = element("div", "", $("alarms"), "card alarm" + (alarm.now ? "" : " past"));
    element("h3", alarm.title, card);
    const place = element("p", "", card);
    element("span", "", place, "dot").style.background = color(alarm.i);
    const until = alarm.now ? "on" : `to ${alarm.last}`;
    const text = `${alarm.run.name}, from step ${alarm.first} ${until}: ${alarm.evidence}`;
    element("span", text, place);
    element("p", "Why: " + alarm.reason, card);
    element("p", "What to do: " + alarm.remedy, card);
    card.onclick = () => $("plot-" + alarm.metric.replace(/^eval\//, ""))
      .closest(".card").scrollIntoView({block: "center"});
  }
}

function showPanels() {
  let grid, section;
  for (const panel of data.panels) {
    if (panel.section !== section) {
      section = panel.section;
      const id = "section-" + section;
      if (!$(id)) {
        const whole = element("section", "", $("panels"));
        element("h2", section, whole);
        element("div", "", whole, "grid").id = id;
      }
      grid = $(id);
    }
    if ($("plot-" + panel.name)) continue;
    const card = element("div", "", grid, "card");
    element("h3", panel.name, card);
    element("p", panel.what, card);
    if (panel.healthy) element("p", "Healthy: " + panel.healthy, card);
    const plot = element("div", "", card, "plot");
    plot.id = "plot-" + panel.name;
    watcher.observe(plot);
  }
}

function showSamples() {
  const run = data.runs.find(x => x.name === $("sample-run").value);
  $("samples").replaceChildren();
  if (!run) return;
  const steps = [...new Set(run.samples.map(x => x.step))], slider = $("sample-step");
  const atEnd = +slider.value >= +slider.max;
  slider.max = Math.max(steps.length - 1, 0);
  if (atEnd) slider.value = slider.max;
  const step = steps[+slider.value];
  $("sample-number").textContent = step ?? "";
  const rows = run.samples.filter(x => x.step === step);
  const names = [...new Set(rows.flatMap(Object.keys))].filter(x => x !== "step");
  const head = element("tr", "", $("samples"));
  for (const name of names) element("th", name, head);
  for (const row of rows) {
    const line = element("tr", "", $("samples"));
    for (const name of names) {
      const value = row[name], number = typeof value === "number";
      element("td", number ? value.toFixed(3) : value ?? "", line, number ? "number" : "");
    }
  }
}

function showAll() {
  showRuns();
  showAlarms();
  showPanels();
  const select = $("sample-run"), chosen = select.value;
  select.replaceChildren();
  for (const run of data.runs) element("option", run.name, select);
  if (chosen) select.value = chosen;
  showSamples();
  redraw();
}

async function poll() {
  try {
    const answer = await fetch("data?" + sizes);
    if (answer.status === 200) {
      data = await answer.json();
      sizes = answer.headers.get("Sizes");
      showAll();
    }
    document.title = "Runs";
  } catch { document.title = "Runs (server gone)"; }
  setTimeout(poll, 2000);
}

for (const id of ["smoothing", "logy", "logx"]) $(id).oninput = redraw;
$("sample-run").onchange = $("sample-step").oninput = showSamples;
dark.onchange = showAll;
showAll();
if (live) poll();
</script>
</html>
"""


if __name__ == "__main__":
    main(tyro.cli(Args, description=textwrap.indent(__doc__, " ")))
