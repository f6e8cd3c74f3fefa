"""Where the time and the memory of a script go, without a change to it.

    python tools/profiler.py ppo.py --steps 5 --run-dir runs/profiled
    python tools/profiler.py --out profiles/sft sft.py --epochs 1

Flags behind the script's name are the script's. Its top-level functions are
wrapped from outside, and each wrapper waits until JAX is done, so that a phase
has its own time. Into --out, profiles/<script> by default, go profile.md (also
printed), python.html (a flame graph of the Python side, if pyinstrument is
installed) and trace/ (one step, for Perfetto or TensorBoard: only without
--no-trace, and where a run logs four times).
"""

import ast
import contextlib
import functools
import inspect
import resource
import sys
import time
import types
from pathlib import Path

PHASES = {
    "start": "load_model load_tokenizer load_rewards load_gold read_data encode_rows encode_texts "
    "make_optimizer make_state length_batches prompt_batches RunFolder.__init__ RunFolder.start",
    "sampling": "generate rollout sample_on_mesh",
    "reference": "policy_logprobs dataset_logprobs pair_logprobs",
    "rewards": "score call_reward",
    "learned reward": "learned_rewards",
    "experience": "make_experience make_pairs make_batch",
    "updates": "train_step",
    "evaluation": "evaluate eval_step log_ratios",
    "checkpoint": "RunFolder.save save_model",
    "logging": "describe RunFolder.log RunFolder.log_samples RunFolder.finish",
}
# In the order of the table. A phase below a function evaluate… counts as evaluation.
ROWS = [*PHASES, "compilation", "profiler", "between phases"]


# ------------------------------------------------------------------------------------------- clock


class Clock:
    """Time of each phase, without that of the phases inside it."""

    def __init__(self):
        self.seconds, self.calls, self.tokens = ({x: 0.0 for x in ROWS} for _ in range(3))
        self.stack, self.last = ["between phases"], time.perf_counter()
        self.compiled = []  # (begin, end, phase) of all that traces and compiles

    def tick(self):
        """What passed since the last tick is the innermost phase's."""
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.last
        self.last = now

    @contextlib.contextmanager
    def phase(self, name, calls=1):
        self.tick()
        self.calls[name] += calls * (self.stack[-1] != name)  # rollout calls generate: one
        self.stack.append(name)
        try:
            yield
        finally:
            self.tick()
            self.stack.pop()

    def compilation(self, event, seconds, **_):
        """JAX reports tracing and compiling once they are over; some lie inside others."""
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            begin = now - seconds
            self.compiled = [x for x in self.compiled if x[0] < begin]
            self.compiled.append((begin, now, self.stack[-1]))

    def finish(self):
        """Moves the time of compilation out of the phases in which it happened."""
        self.tick()
        for begin, end, phase in self.compiled:
            self.seconds[phase] -= end - begin
            self.seconds["compilation"] += end - begin
            self.calls["compilation"] += 1


# ---------------------------------------------------------------------------------------- wrapping


class Program:
    """A jitted function at one set of shapes."""

    def __init__(self, function, args, kwargs, phase):
        self.function, self.phase, self.calls, self.trips = function, phase, 0, []
        self.args, self.kwargs = shapes((args, kwargs))


def shapes(tree):
    """The tree with shapes in place of arrays: what a program can be compiled from once more."""
    import jax

    def shape(x):
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            return x
        spread = isinstance(x, jax.Array) and len(x.devices()) > 1
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if spread else None)

    return jax.tree.map(shape, tree)


def wrap(function, phase, clock, programs):
    """The function, timed. Inside another function's trace it is only called."""
    import jax

    signature = inspect.signature(function)

    @functools.wraps(function)
    def timed(*args, **kwargs):
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return function(*args, **kwargs)
        name, frame = phase, sys._getframe(1)
        while frame is not None and phase != "profiler":
            if frame.f_code.co_name.startswith("evaluate"):
                name = "evaluation"
            frame = frame.f_back
        with clock.phase("profiler", calls=0):  # before the call: it may donate its arguments
            program, given = None, signature.bind(*args, **kwargs).arguments
            if hasattr(function, "lower"):
                key = (timed.__name__, name, *(getattr(x, "shape", None) for x in leaves))
                program = programs.get(key)
                if program is None:
                    program = programs[key] = Program(function, args, kwargs, name)
                program.calls += 1
        with clock.phase(name):
            result = jax.block_until_ready(function(*args, **kwargs))
        with clock.phase("profiler", calls=0):
            count_tokens(timed.__name__, name, given, result, clock, program)
        return result

    return timed


def count_tokens(function, phase, given, result, clock, program):
    """Real tokens that a call read, or those that it sampled."""
    import numpy as np

    if function in ("generate", "sample_on_mesh"):
        width = result[2].shape[1]
        sampled = np.asarray(result[1])[:, -width:].sum(axis=1)
        clock.tokens[phase] += int(sampled.sum())
        program.trips.append(int(sampled.max()))  # the loop ends with the longest completion
    elif program:
        holders = [given.get("batch"), given.get("sampled"), given]
        masks = [
            x["mask"] if isinstance(x, dict) else x.mask
            for x in holders
            if (isinstance(x, dict) and "mask" in x) or hasattr(x, "mask")
        ]
        clock.tokens[phase] += int(np.asarray(masks[0]).sum()) if masks else 0


def wrap_all(module, clock, programs, on_log):
    """Puts the wrappers into the script's namespace, and into its RunFolder."""
    for phase, names in PHASES.items():
        for name in names.split():
            owner, _, method = name.rpartition(".")
            place = getattr(module, owner, None) if owner else module
            function = vars(place).get(method) if place else None
            if callable(function) and getattr(function, "__module__", "") == module.__name__:
                setattr(place, method, wrap(function, phase, clock, programs))
    if hasattr(module, "RunFolder"):
        log = module.RunFolder.log

        @functools.wraps(log)
        def log_and_tell(*args, **kwargs):
            log(*args, **kwargs)
            with clock.phase("profiler", calls=0):
                on_log()

        module.RunFolder.log = log_and_tell


class Trace:
    """jax.profiler's trace of one step: from the third line of metrics.jsonl to the fourth."""

    def __init__(self, folder, wanted):
        self.folder, self.wanted, self.lines, self.running = folder, wanted, 0, False

    def on_log(self):
        import jax

        self.lines += 1
        if self.wanted and self.lines == 3:
            options = {}
            if hasattr(jax.profiler, "ProfileOptions"):
                options = {"profiler_options": jax.profiler.ProfileOptions()}
                options["profiler_options"].python_tracer_level = 0  # python.html has that side
            jax.profiler.start_trace(str(self.folder), **options)
            self.running = True
        elif self.running:
            self.stop()

    def stop(self):
        import jax

        if self.running:
            jax.profiler.stop_trace()
            self.running = False


# -------------------------------------------------------------------------------- XLA's cost model


def cost(program):
    """(FLOPs, bytes) of one call, by XLA's cost analysis of the program as it was traced.

    XLA counts the body of a loop once. Here it counts as often as it runs: a scan's length is in
    the program, that of a sampling loop was seen. Bytes are those before operations are fused: an
    upper bound.
    """
    traced = program.function.trace(*program.args, **program.kwargs)
    trips = sum(program.trips) / len(program.trips) if program.trips else 1
    once, more = analysis(traced.lower()), repeated(traced.jaxpr.jaxpr, trips)
    return tuple(max(x + y, 0) for x, y in zip(once, more))


def analysis(lowered):
    found = lowered.cost_analysis() or {}
    found = found[0] if isinstance(found, list) else found
    return found.get("flops", 0.0), found.get("bytes accessed", 0.0)


def repeated(jaxpr, trips):
    """What the loops of a program cost beyond one pass through their bodies."""
    import jax
    from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

    total = [0.0, 0.0]
    for equation in jaxpr.eqns:
        inner = [
            x if isinstance(x, ClosedJaxpr) else ClosedJaxpr(x, ())
            for value in equation.params.values()
            for x in (value if isinstance(value, list | tuple) else [value])
            if isinstance(x, ClosedJaxpr) or hasattr(x, "eqns")
        ]
        name = equation.primitive.name
        for closed in inner:
            more = repeated(closed.jaxpr, trips)
            if name in ("scan", "while"):
                times = equation.params["length"] if name == "scan" else trips
                avals = [x.aval for x in closed.jaxpr.invars]
                like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in avals]
                body = analysis(jax.jit(jaxpr_as_fun(closed)).lower(*like))
                more = [times * (x + y) - x for x, y in zip(body, more)]
            total = [x + y for x, y in zip(total, more)]
    return total


def measured_peak():
    """FLOPs a second of a large float32 product: the best of ten tries."""
    import jax
    import jax.numpy as jnp

    n = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((n, n))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * n**3 / min(times)


# ---------------------------------------------------------------------------------------- report


def memory_rows(programs, models):
    """{what: bytes}: parameters, optimizer state, KV cache, each program's temporaries."""
    rows = {f"parameters of {name}": size for name, size in models.items()}
    for program in programs.values():
        given = inspect.signature(program.function).bind(*program.args, **program.kwargs).arguments
        state = given.get("state")
        if hasattr(state, "opt_state"):
            rows["trained parameters"] = size_of_shapes(state.params)
            rows["optimizer state"] = size_of_shapes(state.opt_state)
        if program.function.__name__ == "generate":
            config, (count, prompt) = given["config"], given["tokens"].shape
            count, width = count * given.get("num_samples", 1), prompt + given["max_new_tokens"]
            values = 2 * config.n_layer * count * width * config.n_embd
            itemsize = 4 if config.dtype == "float32" else 2
            rows[f"KV cache of {count} * {width} tokens"] = values * itemsize
    for program in programs.values():
        name = f"temporaries of {program.function.__name__}"
        if name not in rows:  # at its first shapes
            compiled = program.function.lower(*program.args, **program.kwargs).compile()
            rows[name] = compiled.memory_analysis().temp_size_in_bytes
    return rows


def size_of_shapes(tree):
    import jax

    sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]
    return sum(sizes)


def peak_memory():
    """(what, bytes) of the highest use so far: the device's, or the process's on a CPU."""
    import jax

    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "peak_bytes_in_use" in stats:
        return "peak of the first device", stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return "peak of the process (resident)", size


def report(command, clock, wall, programs, models, peak):
    """profile.md as text."""
    flops, bytes_moved = ({x: 0.0 for x in ROWS} for _ in range(2))
    for program in programs.values():
        one_flops, one_bytes = cost(program)
        flops[program.phase] += one_flops * program.calls
        bytes_moved[program.phase] += one_bytes * program.calls
    fastest = measured_peak()
    lines = [f"# {command}", "", f"Wall time {wall:.2f} s.", ""]
    lines += ["| phase | s | share | calls | tokens/s | GFLOP | of the peak | GB moved, at most |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in ROWS:
        seconds, calls = clock.seconds[name], clock.calls[name]
        if seconds < 5e-3 and not calls:
            continue
        cells = [name, f"{seconds:.2f}", f"{100 * seconds / wall:.1f} %", f"{calls:.0f}"]
        cells += [f"{clock.tokens[name] / seconds:,.0f}" if clock.tokens[name] else ""]
        cells += [f"{flops[name] / 1e9:,.3f}" if flops[name] else ""]
        share = flops[name] / seconds / fastest if seconds else 0
        cells += [f"{100 * share:.1f} %" if flops[name] else ""]
        cells += [f"{bytes_moved[name] / 1e9:,.1f}" if flops[name] else ""]
        lines.append(f"| {' | '.join(cells)} |")
    total = sum(clock.seconds.values())  # of clocks that are stopped and started; wall: one clock
    lines += [f"| **sum** | {total:.2f} | {100 * total / wall:.1f} % | | | | | |", ""]
    lines += [f"Peak: {fastest / 1e9:,.0f} GFLOP/s, measured now with a float32 product.", ""]
    lines += ["| memory | MB |", "|---|---|"]
    for what, size in [*memory_rows(programs, models).items(), peak]:
        lines.append(f"| {what} | {size / 1e6:,.1f} |")
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------------- main


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def split_script(path):
    """(code up to the last `if __name__ == "__main__":`, that block): names are wrapped between."""
    tree = ast.parse(path.read_text("utf-8"), str(path))
    last = tree.body[-1]
    if not (isinstance(last, ast.If) and "__main__" in ast.unparse(last.test)):
        fail(f'{path} does not end with `if __name__ == "__main__":`')
    first = ast.Module(tree.body[:-1], tree.type_ignores)
    return compile(first, str(path), "exec"), compile(ast.Module([last], []), str(path), "exec")


def main(argv):
    begin = time.perf_counter()
    out, wants_trace = None, True
    while argv and argv[0].startswith("--"):
        flag = argv.pop(0)
        if flag == "--help":
            print(__doc__)
            return 0
        if flag == "--no-trace":
            wants_trace = False
        elif flag == "--out" and argv:
            out = Path(argv.pop(0))
        else:
            fail(f"{flag}: only --out FOLDER and --no-trace stand before the script's name")
    if not argv or not Path(argv[0]).is_file():
        fail(f"no file {argv[0]}" if argv else "pass a script, such as ppo.py, and its flags")
    path = Path(argv[0])
    out = out or Path("profiles") / path.stem
    out.mkdir(parents=True, exist_ok=True)
    setup, run = split_script(path)

    clock, programs, models, trace = Clock(), {}, {}, Trace(out / "trace", wants_trace)
    clock.last, sampler = begin, None
    with clock.phase("profiler", calls=0), contextlib.suppress(ImportError):
        from pyinstrument import Profiler

        sampler = Profiler(interval=0.01)
    # The script's own module, in place of this one, runs as if it had been started by itself.
    module = types.ModuleType("__main__")
    module.__file__, sys.argv = str(path), argv
    sys.modules["__main__"] = module
    sys.path[0] = str(path.resolve().parent)
    status = 0
    with clock.phase("start"):
        exec(setup, vars(module))
        import jax

        wrap_all(module, clock, programs, trace.on_log)
        jax.monitoring.register_event_duration_secs_listener(clock.compilation)
    load_model = getattr(module, "load_model", None)
    if load_model:

        def load_and_note(name):
            config, params = load_model(name)
            models[str(name)] = size_of_shapes(params)
            return config, params

        module.load_model = load_and_note
    if sampler:
        sampler.start()
    try:
        exec(run, vars(module))
    except SystemExit as error:  # a finished run, or Ctrl-C: what there is is reported
        status = error.code
    finally:
        with clock.phase("profiler", calls=0):
            trace.stop()
            if sampler:
                sampler.stop()
        clock.finish()
        wall = time.perf_counter() - begin
    if status == 2:
        return status
    peak = peak_memory()  # before the programs are looked at
    if sampler:
        (out / "python.html").write_text(sampler.output_html(), "utf-8")
    else:
        print("note: no python.html: pip install -r tools/requirements.txt")
    text = report(" ".join(argv), clock, wall, programs, models, peak)
    (out / "profile.md").write_text(text, "utf-8")
    print(f"\n{text}\nwrote {', '.join(sorted(str(x) for x in out.iterdir()))}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
