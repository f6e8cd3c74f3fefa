"""Where the time of a step goes: the operations that XLA makes of it, longest first.

    python benchmarks/profile_step.py sft               # also: reward, dpo, grpo, ppo, sampling
    python benchmarks/profile_step.py sft --shape 124M --top 30

The steps are those of run.py. XLA fuses several operations of a script into one and names it after
the last; on a CPU, products are called dot, or ynn_fusion where XLA gives them to that library.
"""

import collections
import os
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from work import SHAPES


@dataclass(frozen=True)
class Args:
    step: tyro.conf.Positional[Literal["sft", "reward", "dpo", "grpo", "ppo", "sampling"]]
    shape: str = "tiny"  # of run.py's
    steps: int = 5  # that are profiled
    top: int = 20  # kinds of operations that are shown


def main(args):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_xprof_traceme"
    import jax
    import ours

    builders = {"reward": ours.reward_model, "dpo": lambda shape: ours.dpo(shape, cached=True)}
    step = builders.get(args.step, getattr(ours, args.step))(SHAPES[args.shape])
    seconds = []
    for _ in range(args.steps + 2):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(args.steps):
                step()
        file = next(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
    spent, calls = collections.Counter(), collections.Counter()
    for plane in planes:
        for event in (event for line in plane.lines for event in line.events):
            # An operation of XLA's: lower case, without arguments. Loops contain the others.
            kind = re.sub(r"\.\d+$", "", event.name)
            if re.fullmatch(r"[a-z_-]+", kind) and kind not in ("while", "call", "conditional"):
                spent[kind] += event.duration_ns / 1e6 / args.steps
                calls[kind] += 1
    print(f"{args.step}, {args.shape}: {1e3 * statistics.median(seconds[2:]):.0f} ms a step")
    print(f"{'ms':>8}{'share':>7}{'calls':>7}  operation")
    for kind, ms in spent.most_common(args.top):
        share = 100 * ms / spent.total()
        print(f"{ms:8.2f}{share:6.1f}%{calls[kind] / args.steps:7.0f}  {kind}")
    print(f"{spent.total():8.2f} in all")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
