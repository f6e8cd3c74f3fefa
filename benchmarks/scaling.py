"""How time and memory grow with batch, length, width, depth, vocabulary, devices: docs/scaling.md.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/scaling.py --write
    python benchmarks/scaling.py --axes width devices

One size at a time grows from the base shape; the others stay. Timed are whole calls of sft.py's
train_step (one micro-batch) and generate: medians of rounds in which all points of a line take
turns, at real-time priority where the system allows it, since others may use the machine. Memory is
memory_analysis() of the compiled function, arguments and temporaries. Devices are simulated:
sharded.py's train_step is compiled for them and not run, so there is no time, only memory and what
a device sends.

An exponent stands beside each point: the growth since the one before, 1 if linear, 0 if none, 2 if
quadratic. That of the arithmetic alone stands under FLOPs.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm
from work import Shape

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "scaling.md"
BASE = Shape(4, 4, 128, 512, 2048, batch=16, prompt=16, new=48)
AXES = {
    "batch": (1, 4, 16, 64, 256),
    "length": (32, 64, 128, 256, 512, 1024),
    "width": (32, 64, 128, 256, 512, 1024),
    "depth": (1, 2, 4, 8, 16),
    "vocabulary": (256, 1024, 4096, 16384, 65536),
}
LINEAR = 0.8, 1.2  # exponents that count as linear
MESHES = {
    "data": [(n, 1, 1) for n in (1, 2, 8, 32)],
    "fsdp": [(1, n, 1) for n in (1, 2, 8, 32)],
    "tensor": [(1, 1, n) for n in (1, 2, 4, 12)],
}


@dataclass(frozen=True)
class Args:
    axes: tuple[str, ...] = (*AXES, "devices")
    rounds: int = 7
    write: bool = False


def shape_at(axis, x):
    changes = {
        "batch": {"batch": x},
        "length": {"new": x - BASE.prompt},
        "width": {"n_embd": x},
        "depth": {"n_layer": x},
        "vocabulary": {"vocab_size": x},
    }
    return dataclasses.replace(BASE, **changes[axis])


def programs(shape):
    """{work: (function that does it once, bytes of its program, FLOPs)}."""
    import jax
    import ours
    from ours import sft_script as sft

    config, params = ours.initial(sft, shape)
    args = dataclasses.replace(ours.arguments(sft, shape), micro_batch_size=shape.batch)
    optimizer, _ = sft.make_optimizer(args, 10_000)
    state = sft.make_state(params, optimizer)
    batch = sft.make_batch(ours.texts(shape, 1), shape.length, train_on_prompt=True)
    train = sft.train_step.lower(state, batch, config, optimizer, args).compile()

    def update():
        nonlocal state
        state, metrics = train(state, batch)
        jax.block_until_ready(metrics)

    tokens = shape.tokens(shape.batch, shape.prompt)
    given = (params, config, tokens, tokens * 0 + 1, ours.KEY, shape.new, 1.0, -1)
    generate = sft.generate.lower(*given).compile()
    inputs = (params, *given[2:5])
    decoded = shape.forward(shape.batch, shape.new)
    return {
        "update": (update, used(train), 3 * shape.forward(shape.batch, shape.length)),
        "sampling": (lambda: jax.block_until_ready(generate(*inputs)), used(generate), decoded),
    }


def used(program):
    memory = program.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


@contextlib.contextmanager
def at_once():
    """All threads of this process go before those of others; without the right to it, nothing."""
    threads = [int(name) for name in os.listdir("/proc/self/task")]

    def schedule(policy, priority):
        with contextlib.suppress(OSError, ProcessLookupError):
            for thread in threads:
                os.sched_setscheduler(thread, policy, os.sched_param(priority))

    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    schedule(os.SCHED_RR, 20)
    try:
        yield
    finally:
        schedule(*before)


def seconds(functions, rounds):
    """The median time of each function; they take turns, forth and back."""
    found = [[] for _ in functions]
    for f in functions:
        f()
    for i in range(rounds):
        with at_once():
            for f, times in list(zip(functions, found))[:: 1 if i % 2 else -1]:
                started = time.perf_counter()
                f()
                times.append(time.perf_counter() - started)
        time.sleep(0.2)  # others want to work, too
    return [statistics.median(times) for times in found]


def measure(axis, rounds):
    """{work: {"seconds", "bytes", "flops": one number a point}} along an axis."""
    made = [programs(shape_at(axis, x)) for x in tqdm(AXES[axis], axis)]
    found = {}
    for work in made[0]:
        functions, sizes, flops = zip(*(point[work] for point in made))
        times = seconds(functions, rounds)
        found[work] = {"seconds": times, "bytes": list(sizes), "flops": list(flops)}
    return found


def exponents(xs, ys):
    """log y by log x between neighbours."""
    pairs = zip(xs, xs[1:], ys, ys[1:])
    return [math.log(y2 / y1) / math.log(x2 / x1) for x1, x2, y1, y2 in pairs]


def linear_range(xs, ys):
    """The longest run of points between which y grows linearly, in words."""
    best, start = (0, 0), 0
    for i, exponent in enumerate([*exponents(xs, ys), math.inf]):
        if not LINEAR[0] <= exponent <= LINEAR[1]:
            best = max(best, (i - start, start))
            start = i + 1
    steps, start = best
    return f"{xs[start]} to {xs[start + steps]}" if steps else "nowhere"


def axis_table(axis, found):
    xs = AXES[axis]
    head, columns = [axis], [[str(x) for x in xs]]
    for work, series in found.items():
        for name, unit, scale in (("seconds", "ms", 1e3), ("bytes", "MB", 1e-6)):
            values = [scale * y for y in series[name]]
            growth = ["", *(f"{e:.2f}" for e in exponents(xs, values))]
            head += [f"{work}, {unit}", "exponent"]
            columns += [[f"{y:.1f}" if y < 100 else f"{y:.0f}" for y in values], growth]
        head.append(f"{work}, FLOPs")
        columns.append(["", *(f"{e:.2f}" for e in exponents(xs, series["flops"]))])
    lines = [f"### {axis.capitalize()}", "", row(head), "|---" * len(head) + "|"]
    lines += [row(cells) for cells in zip(*columns)]
    ranges = [
        f"{work} {name} {linear_range(xs, series[key])}"
        for work, series in found.items()
        for name, key in (("time", "seconds"), ("memory", "bytes"))
    ]
    return "\n".join([*lines, "", f"Linear (exponent {LINEAR[0]} to {LINEAR[1]}): "]) + (
        "; ".join(ranges) + ".\n"
    )


def row(cells):
    return f"| {' | '.join(map(str, cells))} |"


# ---------------------------------------------------------------------------------------- devices

SENDING = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
WIDTHS = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1}


def sent(program):
    """Bytes of what comes out of a program's collectives, {operation: bytes}, on one device."""
    found = {}
    for line in program.as_text().splitlines():
        match = re.search(rf" = (.*?) ({SENDING})(-start)?\(", line)
        if match:
            for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                count = math.prod(int(n) for n in sizes.split(",") if n)
                found[match[2]] = found.get(match[2], 0) + WIDTHS[kind] * count
    return found


def measure_devices():
    """{mesh axis: [[devices, state, temporary, all-gathered, all-reduced, other], …]}, MB."""
    import sharding  # before JAX has devices: it asks for simulated ones

    found = {}
    for axis, meshes in MESHES.items():
        found[axis] = []
        for mesh in tqdm(meshes, axis):
            devices = math.prod(mesh)
            rows = devices if axis != "tensor" else 12
            program, _ = sharding.compile_train_step("124M", mesh, rows)
            memory, bytes_sent = program.memory_analysis(), sent(program)
            numbers = [memory.alias_size_in_bytes, memory.temp_size_in_bytes]
            numbers += [bytes_sent.pop(name, 0) for name in ("all-gather", "all-reduce")]
            numbers.append(sum(bytes_sent.values()))
            found[axis].append([devices, *(x / 1e6 for x in numbers)])
    return found


def devices_table(found):
    head = ["devices", "state, MB", "temporary, MB", "gathered, MB", "summed, MB", "other, MB"]
    lines = ["### Devices", ""]
    for axis, points in found.items():
        rows = "12 sequences in all" if axis == "tensor" else "a sequence a device"
        lines += [f"`--{axis}`, {rows}:", "", row(head), "|---" * len(head) + "|"]
        lines += [row([n, *(f"{x:.1f}" for x in numbers)]) for n, *numbers in points]
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- picture


def draw(measured, path):
    """Time and memory of both kinds of work along each axis, and memory by devices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(2, len(measured), figsize=(16, 6), layout="constrained")
    colors = {"update": "#4477aa", "sampling": "#ee6677"}
    for (axis, found), (upper, lower) in zip(measured.items(), all_axes.T):
        xs = AXES[axis]
        for work, series in found.items():
            for axes, name, scale in ((upper, "seconds", 1e3), (lower, "bytes", 1e-6)):
                ys = [scale * y for y in series[name]]
                axes.loglog(xs, ys, "o-", color=colors[work], label=work, markersize=4)
        for axes, name, scale in ((upper, "seconds", 1e3), (lower, "bytes", 1e-6)):
            last = scale * found["update"][name][-1]  # a linear line that ends where updates do
            line = [last * x / xs[-1] for x in xs]
            axes.loglog(xs, line, ":", color="black", linewidth=1, label="linear")
            axes.spines[["top", "right"]].set_visible(False)
        upper.set_title(axis)
        lower.set_xlabel(axis)
    all_axes[0, 0].set_ylabel("ms")
    all_axes[1, 0].set_ylabel("MB")
    all_axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def in_a_process(function, *given):
    """The result of a function of this file in a process of its own, through JSON."""
    code = f"import json, scaling; print(json.dumps(scaling.{function}(*{given!r})))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def write(axis, text):
    """Replaces the table of an axis in the page."""
    begin, end = f"<!-- {axis}: benchmarks/scaling.py -->\n", "<!-- end -->\n"
    before, found, rest = PAGE.read_text("utf-8").partition(begin)
    assert found and end in rest, f"{PAGE} lacks the two comments around the table of {axis}"
    PAGE.write_text(before + begin + text + end + rest.partition(end)[2], "utf-8")


def main(args):
    measured = {}
    for axis in args.axes:
        if axis == "devices":
            text = devices_table(in_a_process("measure_devices"))
        else:
            measured[axis] = in_a_process("measure", axis, args.rounds)
            text = axis_table(axis, measured[axis])
        print(text, flush=True)
        if args.write:
            write(axis, text)
    if args.write and list(measured) == list(AXES):
        draw(measured, PAGE.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
