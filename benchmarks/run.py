"""Times our scripts' steps against other libraries': same work, same machine, by turns.

    pip install -r benchmarks/requirements-peers.txt
    pip install --no-deps --target .venv-ppo trl==1.12.0   # the last TRL with a PPO trainer
    python -m venv .venv-tunix                             # it wants other versions of its own
    .venv-tunix/bin/pip install google-tunix==0.1.7 jax==0.10.2 flax==0.12.8
    python benchmarks/run.py                               # ten minutes; a table
    python benchmarks/run.py --only sft sampling --rounds 5
    python benchmarks/run.py --write                       # also into RESULTS.md and docs/speed.png
    benchmarks/gpu.sh                                      # on an NVIDIA card: installs, and --gpu

Each contestant is a process of its own (ours.py, peers.py), so that libraries, thread pools and
memory do not mix; all wait while one makes its step, and they take turns. A ratio is the peer's
time by ours, of the medians. Share of the peak: model FLOPs a second over those of the library's
own product of two matrices of 2 048 by 2 048 (8 192 on a GPU), timed in the same run, in the same
type. On a GPU the contestants of a row come one after the other: each wants the card's memory.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm
from work import GROUP, PPO_EPOCHS, PRODUCT, PRODUCT_GPU, SHAPES

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# glibc's huge pages, as `make` has them; with large models it also keeps what XLA and torch give
# back (README, "Speed").
MALLOC = "glibc.malloc.hugetlb=1"
KEEP = ["mmap_max=0", "arena_max=1", "trim_threshold=100000000000"]
MALLOC_124M = ":".join([MALLOC, *(f"glibc.malloc.{x}" for x in KEEP)])
MARKS = "<!-- benchmarks/run.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class Args:
    only: tuple[str, ...] = ()  # rows whose name begins with one of these; default: all
    rounds: int = 15  # steps of each contestant at the tiny shape; a third of it at 124M
    wait: bool = True  # at most ten minutes, until the machine is quiet
    write: bool = False  # the table into benchmarks/RESULTS.md, the picture to docs/speed.png
    gpu: bool = False  # the rows for a GPU, in bfloat16, in place of all others
    dry: bool = False  # these rows once, at the tiny shape, to try them without a GPU
    minutes: float = 60.0  # no row begins later than this


@dataclass(eq=False)
class Row:
    name: str
    shape: str
    ours: dict  # the job of ours.py
    peers: dict  # {name: job of peers.py}
    tokens: int  # that are sampled or trained on in one step
    flops: float
    work: str  # what a step is, and where the peer's is another


def rows():
    tiny, big, sampled = SHAPES["tiny"], SHAPES["124M"], SHAPES["124M, sampling"]

    def trained(shape, sequences, logits, passes=3):
        return passes * shape.forward(sequences, logits)

    def decoded(shape):  # the head once a new token; attention to what is there
        return shape.forward(shape.batch, shape.new)

    def train(shape, name, ours, peers, work):
        tokens = shape.batch * shape.length
        return Row(name, shape_name(shape), ours, peers, tokens,
                   trained(shape, shape.batch, shape.length), work)  # fmt: skip

    def shape_name(shape):
        return next(name for name, x in SHAPES.items() if x is shape)

    sft = {"name": "sft"}
    same = "forward, backward, clipping, AdamW on all tokens"
    pairs, response = 2 * tiny.batch, tiny.new
    reference = tiny.forward(pairs, response)
    rollout = decoded(tiny) + tiny.forward(tiny.batch, response)
    group = tiny.batch // GROUP
    return [
        Row("sampling, tiny", "tiny", {"name": "sampling"},
            {"transformers": {"name": "generate"}}, tiny.batch * tiny.new, decoded(tiny),
            "temperature 1, no filter, no row ends early; ours also gives log-probabilities"),
        train(tiny, "sft, tiny", sft,
              {"TRL": {"name": "trl_sft"}, "torch": sft, "torch.compile": sft | {"compiled": True},
               "torch.compile, whole batch": sft | {"compiled": True, "micro": tiny.batch},
               "tunix 0.1.7": {"name": "tunix_sft"}},
              f"{same}; TRL also computes the entropy; tunix has no GPT-2, so its Llama 3 with as "
              "many weights"),
        Row("sampling, groups, tiny", "tiny",
            {"name": "sampling", "prompts": group, "num_samples": GROUP},
            {"ours, 64 x 1": {"name": "sampling"}}, tiny.batch * tiny.new, decoded(tiny),
            f"{group} prompts, {GROUP} samples each, against {tiny.batch} prompts"),
        Row("reward, tiny", "tiny", {"name": "reward"}, {"TRL": {"name": "trl_reward"}},
            pairs * tiny.length, trained(tiny, pairs, 0), "both answers of each pair"),
        Row("dpo, tiny", "tiny", {"name": "dpo", "cached": False},
            {"TRL": {"name": "trl_dpo", "cached": False}}, pairs * tiny.length,
            trained(tiny, pairs, response) + reference, "the reference's forward pass each step"),
        Row("dpo, cached, tiny", "tiny", {"name": "dpo", "cached": True},
            {"TRL": {"name": "trl_dpo", "cached": True}}, pairs * tiny.length,
            trained(tiny, pairs, response), "the reference's log-probabilities known before"),
        Row("grpo, tiny", "tiny", {"name": "grpo"}, {"TRL": {"name": "trl_grpo"}},
            tiny.batch * tiny.new, rollout + trained(tiny, tiny.batch, response),
            f"{group} prompts, {GROUP} completions each: rollout, reference, k3, one step"),
        Row("ppo, tiny", "tiny", {"name": "ppo"}, {"TRL 1.12": {"name": "trl_ppo"}},
            tiny.batch * tiny.new,
            rollout + 2 * tiny.forward(tiny.batch, 0)
            + PPO_EPOCHS * (trained(tiny, tiny.batch, response) + trained(tiny, tiny.batch, 0)),
            f"rollout, reference, learned reward, values, {PPO_EPOCHS} steps of both models"),
        train(big, "sft, 124M", sft,
              {"torch": sft, "torch.compile": sft | {"compiled": True}}, same),
        Row("sampling, 124M", "124M, sampling", {"name": "sampling"},
            {"transformers": {"name": "generate"}}, sampled.batch * sampled.new, decoded(sampled),
            "as at the tiny shape"),
        train(big, "bfloat16 sft, 124M", {"name": "mixed_precision"},
              {"torch autocast": sft | {"dtype": "bfloat16"},
               "autocast, compiled": sft | {"dtype": "bfloat16", "compiled": True}},
              f"{same}; weights and moments in float32"),
        train(tiny, "bfloat16 sft, tiny", {"name": "mixed_precision"}, {"sft.py": sft},
              "mixed_precision.py against sft.py in float32"),
    ]  # fmt: skip


def gpu_rows(dry):
    """SFT, DPO, GRPO and PPO steps and sampling at 124M and 774M, in bfloat16, one micro-batch."""
    half = {"dtype": "bfloat16"}
    for size in ("tiny",) if dry else ("124M", "774M"):
        shape_name = "tiny" if dry else f"{size}, GPU"
        shape = SHAPES[shape_name]
        whole = half | {"micro": shape.batch}
        B, pairs, T, R = shape.batch, 2 * shape.batch, shape.length, shape.new
        decoded = shape.forward(B, R)
        rollout = decoded + shape.forward(B, R)
        for name, ours, peers, tokens, flops, work in [
            ("sampling", {"name": "sampling"} | half,
             {"transformers": {"name": "generate"} | half}, B * R, decoded,
             "temperature 1; ours has weights in float32, transformers in bfloat16"),
            ("sft", {"name": "mixed_precision"} | whole,
             {"TRL": {"name": "trl_sft"} | half, "torch autocast": {"name": "sft"} | half},
             B * T, 3 * shape.forward(B, T), "mixed_precision.py"),
            ("dpo", {"name": "dpo", "cached": False} | whole,
             {"TRL": {"name": "trl_dpo", "cached": False} | half}, pairs * T,
             4 * shape.forward(pairs, R), "the reference's forward pass each step"),
            ("grpo", {"name": "grpo"} | whole, {"TRL": {"name": "trl_grpo"} | half}, B * R,
             rollout + 3 * shape.forward(B, R), f"{B // GROUP} prompts, {GROUP} completions each"),
            ("ppo", {"name": "ppo"} | whole, {"TRL 1.12": {"name": "trl_ppo"} | half}, B * R,
             rollout + 2 * shape.forward(B, 0)
             + PPO_EPOCHS * 3 * (shape.forward(B, R) + shape.forward(B, 0)),
             f"one rollout, {PPO_EPOCHS} steps of policy and critic"),
        ]:  # fmt: skip
            yield Row(f"bfloat16 {name}, {size}", shape_name, ours, peers, tokens, flops, work)


class Contestant:
    """A process that makes one step whenever it is asked to."""

    def __init__(self, file, job):
        malloc = MALLOC_124M if job["shape"].startswith("124M") else MALLOC
        environment = {"GLIBC_TUNABLES": malloc} | os.environ
        # The first step is a cold one for all, unless this says otherwise.
        environment.setdefault("JAX_ENABLE_COMPILATION_CACHE", "0")
        environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
        if job["name"] == "trl_ppo":
            environment["PYTHONPATH"] = str(ROOT / ".venv-ppo")
        python = sys.executable
        if file == "peers.py":  # torch for a GPU wants other CUDA libraries than JAX
            python = os.environ.get("PEERS_PYTHON", python)
        if file == "peer_tunix.py":
            python = str(ROOT / ".venv-tunix" / "bin" / "python")
            if not Path(python).exists():
                raise RuntimeError("not installed; see benchmarks/requirements-peers.txt")
        command = [python, HERE / file, json.dumps(job)]
        descriptor, self.log = tempfile.mkstemp(prefix="run_", suffix=".log")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": descriptor}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.seconds, self.megabytes = [], 0.0
        self.micro = self.answer().get("micro")

    def answer(self):
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {"error": "it ended"}
        if "error" in found:
            raise RuntimeError(f"{found['error']}; see {self.log}")
        return found

    def step(self):
        print(file=self.process.stdin, flush=True)
        found = self.answer()
        self.seconds.append(found["seconds"])
        self.megabytes = found["megabytes"]

    def median(self):
        return statistics.median(self.seconds[2:])  # the first two compile and warm up

    def close(self):
        self.process.kill()
        self.process.wait()


def file_of(name):
    """The program of a contestant."""
    if name in ("ours", "sft.py", "ours, 64 x 1"):
        return "ours.py"
    return "peer_tunix.py" if name.startswith("tunix") else "peers.py"


def one_after_another(row, rounds):
    """As `contest`, but each contestant ends before the next begins."""
    found = {}
    for name, job in {"ours": row.ours, **row.peers}.items():
        try:
            more = {"micro": row.ours["micro"]} if "micro" in row.ours else {}
            found[name] = Contestant(file_of(name), more | job | {"shape": row.shape})
            for _ in range(rounds + 2):
                found[name].step()
            found[name].close()
        except RuntimeError as error:  # also where the card's memory is too small
            found[name] = str(error)
    return found


def contest(row, rounds):
    """{name: Contestant} after `rounds` timed steps each, or an error's text in its place."""
    found = {"ours": Contestant("ours.py", row.ours | {"shape": row.shape})}
    micro = {"micro": found["ours"].micro} if found["ours"].micro else {}
    for name, job in row.peers.items():
        file = file_of(name)
        more = {} if file == "ours.py" else micro
        try:
            found[name] = Contestant(file, more | job | {"shape": row.shape})
        except RuntimeError as error:
            found[name] = str(error)
    for i in range(rounds + 2):
        for name, contestant in list(found.items())[:: 1 if i % 2 else -1]:
            try:
                if not isinstance(contestant, str):
                    contestant.step()
            except RuntimeError as error:
                found[name] = str(error)
    for contestant in found.values():
        if not isinstance(contestant, str):
            contestant.close()
    return found


def measure_peaks(rounds, size):
    """{(file, dtype): FLOPs a second} of a matrix product."""
    jobs = [(file, dtype) for file in ("ours.py", "peers.py") for dtype in ("float32", "bfloat16")]
    found = {}
    for file, dtype in jobs:
        job = {"name": "product", "shape": "tiny", "dtype": dtype, "size": size}
        contestant = Contestant(file, job)
        for _ in range(rounds + 2):
            contestant.step()
        found[file, dtype] = 2 * size**3 / contestant.median()
        contestant.close()
    return found


def wait_until_quiet(minutes=10):
    until = time.monotonic() + 60 * minutes
    while os.getloadavg()[0] > 0.5 and time.monotonic() < until:
        time.sleep(5)


def line(row, name, contestant, ours, peaks):
    """One line of the table."""
    if isinstance(contestant, str):
        return f"| {row.name} | {name} | {contestant} | | | | | |"
    dtype = "bfloat16" if row.name.startswith("bfloat16") and name != "sft.py" else "float32"
    peak = peaks["peers.py" if file_of(name) == "peers.py" else "ours.py", dtype]
    seconds, timed = contestant.median(), contestant.seconds[2:]
    alone = name == "ours" or isinstance(ours, str)
    ratio = "" if alone else f"**{seconds / ours.median():.2f}**"
    shown = f"{1e3 * seconds:.0f} ({1e3 * min(timed):.0f}-{1e3 * max(timed):.0f})"
    share = f"{100 * row.flops / seconds / peak:.0f} %"
    first = f"{contestant.seconds[0]:.1f}"
    memory = f"{contestant.megabytes:.0f}"
    speed = f"{row.tokens / seconds:.0f}"
    cells = [row.name, name, shown, ratio, speed, share, first, memory]
    return "| " + " | ".join(cells) + " |"


def table(results, peaks):
    """The Markdown of all results: {row: {name: Contestant or text}}."""
    head = ["work", "who", "ms a step, median (min-max)", "peer / ours", "tokens/s"]
    head += ["share of peak", "first step, s", "memory, MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row, found in results.items():
        lines += [line(row, name, x, found["ours"], peaks) for name, x in found.items()]
    speeds = {f"{file[:-3]} {kind}": f"{x / 1e9:.0f}" for (file, kind), x in peaks.items()}
    peak = ", ".join(f"{name} {x}" for name, x in speeds.items())
    work = "\n".join(f"- {row.name}: {row.work}." for row in results)
    return "\n".join([*lines, "", f"Matrix product, GFLOP/s: {peak}.", "", "A step:", work]) + "\n"


def draw(results, path):
    """A bar for each peer: its time over ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        (f"{row.name}\nagainst {name}", x.median() / found["ours"].median())
        for row, found in results.items()
        for name, x in found.items()
        if name != "ours" and not isinstance(x, str)
    ]
    labels, ratios = zip(*reversed(bars))
    figure, axes = pyplot.subplots(figsize=(8, 0.5 * len(bars) + 1), layout="constrained")
    drawn = axes.barh(labels, ratios, color=["#4477aa" if x >= 1 else "#cc6677" for x in ratios])
    axes.bar_label(drawn, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time of the other library / ours (more than 1: ours is faster)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(args):
    started = time.monotonic()
    every = gpu_rows(args.dry) if args.gpu else rows()
    chosen = [row for row in every if row.name.startswith(args.only or ("",))]
    if args.wait:
        wait_until_quiet()
    peaks = measure_peaks(args.rounds, PRODUCT_GPU if args.gpu and not args.dry else PRODUCT)
    results, take_turns = {}, one_after_another if args.gpu else contest
    for row in tqdm(chosen):
        if time.monotonic() - started > 60 * args.minutes:
            print(f"no time left for {row.name}")
            continue
        rounds = args.rounds if args.gpu or row.shape == "tiny" else max(args.rounds // 3, 1)
        results[row] = take_turns(row, rounds)
        if args.gpu:
            for name, x in results[row].items():
                print(line(row, name, x, results[row]["ours"], peaks), flush=True)
    text = table(results, peaks)
    print(text)
    if args.write:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(x.split(": ")[1] for x in info if x.startswith("model name"))
        stamp = f"{datetime.date.today()}, {os.cpu_count()} cores, {processor}.\n\n"
        path = HERE / "RESULTS.md"
        before, found, rest = path.read_text("utf-8").partition(MARKS[0])
        assert found and MARKS[1] in rest, f"{path} lacks the two comments that the table replaces"
        after = rest.partition(MARKS[1])[2]
        path.write_text(before + MARKS[0] + stamp + text + MARKS[1] + after, "utf-8")
        draw(results, ROOT / "docs" / "speed.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
