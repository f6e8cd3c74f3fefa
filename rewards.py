"""Reward functions to copy, and to use as they are: one score for each completion.

    python grpo.py --reward rewards.py:numeric_answer --dataset data/arithmetic/prompts_train.jsonl

with the other flags that data/arithmetic.py names. The signature is TRL's: f(prompts, completions,
**columns) -> list of numbers. `prompts` and `completions` are lists of strings; every other column
of the data comes as a list of the same length under its own name (`numeric_answer` reads `answer`,
`python_tests` reads `tests`), and so do the completions' token ids (`completion_ids`); a function
takes and ignores the keywords that it does not use. None in the result means "does not apply to
this row": it takes no part in that completion's sum, and a completion to which no function applies
is not trained on. They work unchanged in TRL's GRPOTrainer, for prompts and completions that are
text; TRL's lists of chat messages are not read.

What one would change stands as a constant above its function: as keywords with defaults they could
be overwritten by a column that happens to have such a name. Only the standard library is used; a
reward function can be lifted out together with the imports and with what stands between it and the
one before it.
"""

import ast
import contextlib
import functools
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

# ------------------------------------------------------------------------------------------- words

GOOD = {"good", "great", "excellent", "wonderful", "superb", "lovely", "enjoyed", "loved"}
BAD = {"bad", "awful", "terrible", "boring", "dull", "poor", "hated", "disappointing"}


def keyword_sentiment(prompts, completions, **_):
    """(good - bad) / (good + bad), counting words of GOOD and BAD; 0 where there is neither.

    It sees no negation, and one good word is as much as ten.
    """
    scores = []
    for completion in completions:
        words = re.findall(r"\w+", completion.lower())
        good, bad = sum(word in GOOD for word in words), sum(word in BAD for word in words)
        scores.append((good - bad) / max(1, good + bad))
    return scores


PHRASE = "The end."


def phrase_ending(prompts, completions, **_):
    """1 where the completion ends with PHRASE, else 0; white space after it does not count."""
    return [float(completion.rstrip().endswith(PHRASE)) for completion in completions]


FEWEST_WORDS, MOST_WORDS = 20, 60


def length_window(prompts, completions, **_):
    """1 for FEWEST_WORDS to MOST_WORDS words, words / FEWEST_WORDS below, MOST_WORDS / words above.

    Words are what white space separates.
    """
    counts = [len(completion.split()) for completion in completions]
    return [min(1.0, n / FEWEST_WORDS, MOST_WORDS / max(1, n)) for n in counts]


REPEATED_WORDS = 3  # length of the sequences of words that should not come again


def repetition_penalty(prompts, completions, **_):
    """Minus the share of the REPEATED_WORDS-grams that have come before: from 0 down to above -1.

    Words are what white space separates, in lower case.
    """
    scores = []
    for completion in completions:
        words = completion.lower().split()
        ngrams = list(zip(*(words[i:] for i in range(REPEATED_WORDS))))
        scores.append((len(set(ngrams)) - len(ngrams)) / max(1, len(ngrams)))
    return scores


MAX_LENGTH, CACHE_LENGTH = 48, 12  # tokens: --max-completion-length, and how many of them cost


def soft_overlong_punishment(prompts, completions, completion_ids, **_):
    """0 up to MAX_LENGTH - CACHE_LENGTH tokens, then linearly down to -1 at MAX_LENGTH.

    Yu et al. 2025, "DAPO", eq. 13, which has 20480 and 4096. EOS is one of the tokens.
    """
    lengths = [len(ids) for ids in completion_ids]
    return [max(-1.0, min(0.0, (MAX_LENGTH - CACHE_LENGTH - n) / CACHE_LENGTH)) for n in lengths]


def diversity_bonus(prompts, completions, **_):
    """1 - the mean similarity to the other completions of the same group; 0 for the only one.

    A group is a run of equal prompts: the trainers give the completions of one prompt side by side.
    So a prompt that comes again further on begins a group of its own; only where two rows with the
    same prompt happen to be neighbours do their groups count as one.

    The similarity of two texts is Jaccard's: of the words and pairs of neighbouring words that one
    or both have, the share that both have (1 where neither has any). Words are what white space
    separates, in lower case.
    """
    scores = []
    for _, group in itertools.groupby(zip(prompts, completions), key=lambda pair: pair[0]):
        words = [completion.lower().split() for _, completion in group]
        ngrams = [{*w, *itertools.pairwise(w)} for w in words]
        for i, own in enumerate(ngrams):
            others = ngrams[:i] + ngrams[i + 1 :]
            distances = [len(own ^ other) / max(1, len(own | other)) for other in others]
            scores.append(sum(distances) / max(1, len(distances)))
    return scores


# ------------------------------------------------------------------------------------------ format

INSIDE = r"(?:(?!</?(?:think|answer)>).)+"  # anything but these tags
FORMAT = re.compile(rf"\s*<think>{INSIDE}</think>\s*<answer>{INSIDE}</answer>\s*", re.DOTALL)


def tag_format(prompts, completions, **_):
    """1 where the whole completion is <think>...</think><answer>...</answer>, each once, else 0."""
    return [float(FORMAT.fullmatch(completion) is not None) for completion in completions]


def _refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def valid_json(prompts, completions, **_):
    """1 where the whole completion is one JSON object or array, else 0.

    A bare number or string is not enough. NaN and Infinity, which Python reads, are not JSON.
    """
    scores = []
    for completion in completions:
        try:  # parse_int: Python does not read integers of more than 4300 digits
            value = json.loads(completion, parse_int=str, parse_constant=_refuse_constant)
            scores.append(float(isinstance(value, dict | list)))
        except (ValueError, RecursionError):
            scores.append(0.0)
    return scores


# ------------------------------------------------------------------------------------- mathematics

DIGITS = (  # 12, 1,234.50, .5, 1e-5
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)
NUMBER = re.compile(  # minus, whole number of "2 1/2", numerator, denominator, per cent
    r"((?<![\w)])-)?"  # the minus of "10-3" is no sign, as it stands behind a digit
    rf"(?:([0-9]+) (?=[0-9]+/[0-9]))?({DIGITS})(?: ?/ ?({DIGITS}))?( ?\\?%)?"
)
DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")


def _read_number(text):
    """A text's number and whether it is per cent; None where there is none.

    The number is the first after the last "####" or, without "####", the last in the text.
    """
    text = re.sub(r"-\\?[$€£¥]", "-", text.translate(DASHES))
    text = re.sub(r"(?<=[0-9])\s*(?=\\[dt]?frac)", " ", text)
    text = re.sub(r"\\[dt]?frac{([^{}]*)}{([^{}]*)}", r"\1/\2", text)
    _, marker, after = text.rpartition("####")
    found = list(NUMBER.finditer(after))
    if not found:
        return None
    minus, *parts, percent = found[0 if marker else -1].groups()
    # by way of Decimal: Python's int() does not read more than 4300 digits
    whole, top, bottom = (part and Fraction(Decimal(part.replace(",", ""))) for part in parts)
    if bottom == 0:
        return None
    value = (whole or 0) + top / (bottom or 1)
    return (-value if minus else value), percent is not None


def _equal(number, other):
    """Whether two numbers, with whether they are per cent, are the same."""
    (value, percent), (other_value, other_percent) = sorted((number, other), key=lambda n: n[1])
    return value == other_value or (percent != other_percent and 100 * value == other_value)


def numeric_answer(prompts, completions, answer, **_):
    """1 where the completion's final number equals the one in the column `answer`, else 0.

    The final number is the first after the last "####" (GSM8K's mark) or, where there is no
    "####", the last in the text. `answer` is a number or a text, which is read as if it stood after
    "####"; it may be a worked answer with a "####" of its own. None for a row whose answer holds no
    number.

    They are compared exactly, by value: 5 is 5.0, $1,234 is 1234, 2/4 and \\frac{1}{2} are 0.5, and
    2 1/2 is 2.5. The per cent sign may be left out as a unit may: 50% is 0.5, and it is 50 too.
    """
    scores = []
    for completion, text in zip(completions, answer):
        target = None if text is None else _read_number(f"#### {text}")
        found = _read_number(completion)
        right = found is not None and target is not None and _equal(found, target)
        scores.append(None if target is None else float(right))
    return scores


# ---------------------------------------------------------------------------------------- programs

SECONDS = 3  # whole ones, for a program and its tests: of processor time, and by the clock
MEMORY = 2**29  # bytes of address space
RESULTS = 2**18  # bytes of what the tests' calls return, and of any file
LIMITS = {"FSIZE": RESULTS, "NOFILE": 64, "CORE": 0}
PROCESSES = 64 * (os.cpu_count() or 1)  # and threads, of all programs together; see _find_walls
REFUSED = (  # audit events, by their beginning: network, processes, foreign code, changes to files
    *("socket.connect", "socket.bind", "socket.send", "socket.get", "subprocess.", "ctypes."),
    *("os.fork", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.kill", "pty."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr", "os.chdir", "os.fchdir"),
    *("resource.", "signal.pthread_kill", "sqlite3.", "cpython.PyInterpreterState_New"),
)
# What would get round that: modules, by their beginning, and functions that raise no such event.
FOREIGN = ("_ctypes", "_posixsubprocess", "_posixshmem", "_dbm", "_gdbm", "_test", "_xx", "_interp")
SILENT = ["mkfifo", "mknod", "memfd_create", "pidfd_send_signal", "setpriority"]
SILENT += ["sched_setaffinity", "sched_setparam", "sched_setscheduler"]

# The process of a program: limits itself, then does the steps and writes what each one's value is.
RUNNER = """
import json, os, posix, resource, signal, sys

job = json.load(sys.stdin)
results, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
for fd in range(3):
    os.dup2(null, fd)
for name, value in job["limits"].items():
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
    except (ValueError, OSError):  # macOS refuses RLIMIT_AS
        pass
fake = sys.modules["_posixsubprocess"] = type(sys)("_posixsubprocess")  # asyncio imports it
fake.fork_exec = None
for module in (os, posix, signal, sys.modules["_signal"]):
    for name in job["silent"]:
        vars(module).pop(name, None)


def audit(
    # What it needs stands in defaults, which a program cannot change.
    event, args, refused=tuple(job["refused"]), foreign=tuple(job["foreign"]), type=type, str=str,
    folders=tuple(folder + "/" for folder in sys.path), error=PermissionError,
    writing=os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC,
):
    wrong = event.startswith(refused)
    reads, imports = event in ("open", "os.listdir", "os.scandir"), event == "import"
    if reads or imports:  # the standard library; not the data, nor the memory of the trainer
        path = args[1] if imports else args[0]  # of a module only where it is compiled
        known = type(path) is str and ".." not in path and (path + "/").startswith(folders)
        wrong = not known and (path is not None if imports else type(path) is not int)
    if imports:
        wrong = wrong or str.startswith(args[0], foreign)
    if event == "open":
        wrong = wrong or (args[2] or 0) & writing
    if event == "object.__setattr__":
        settings = args[1] in ("__code__", "__defaults__", "__kwdefaults__")
        wrong = settings and args[0].__code__.co_name == "audit"
    if wrong:
        raise error(event)


def pack(value):  # as JSON that is plain data and nothing else
    if value is None or isinstance(value, (str, float, bool)):
        return value
    if isinstance(value, int):  # hex: Python does not read integers of more than 4300 digits
        return value if abs(value) < 2**63 else {"int": hex(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(item) for item in value]}
    raise TypeError


sys.addaudithook(audit)
namespace = {"__name__": "program"}
try:
    for mode, text in job["steps"]:
        try:
            line = json.dumps(pack(eval(compile(text, "<program>", mode), namespace)))
        except BaseException:
            if mode == "exec":
                break
            line = ""
        os.write(results, line.encode() + b"\\n")
finally:
    os._exit(0)
"""
PYTHON = [sys.executable, "-I", "-S", "-B", "-c"]
QUIET = {"stderr": subprocess.DEVNULL, "env": {}, "cwd": "/"}


@functools.cache
def _find_walls():
    """The command before a command by which the kernel shuts it in; empty where none works.

    unshare gives it processes, a /proc and a network (with no interfaces) of its own: it sees no
    other process, and those that it leaves die with it. setpriv makes root nobody. Both also make
    the limit on processes count its own only; so without them that limit is not set.
    """
    apart = ["unshare", "--user", "--net", "--ipc", "--pid", "--fork"]
    apart += ["--kill-child", "--mount-proc"]
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    nobody = nobody if os.geteuid() == 0 else []
    for walls in ([*nobody, *apart], apart, nobody):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            command = [*walls, *PYTHON, "import json, resource"]
            run = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=60, **QUIET)
            if run.returncode == 0:
                return walls
    return []


def _kill(group):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _run_steps(steps):
    """The lines that a process of its own writes on doing the steps, [(mode, source)].

    The job and the results are files without a name: unlike a pipe, they have no end that a process
    could fill, or keep open, and nothing is left to be removed.
    """
    walls = _find_walls()
    limits = LIMITS | {"CPU": SECONDS, "AS": MEMORY} | ({"NPROC": PROCESSES} if walls else {})
    job = {"steps": steps, "limits": limits}
    job |= {"refused": REFUSED, "foreign": FOREIGN, "silent": SILENT}
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as results:
        source.write(json.dumps(job).encode())
        source.seek(0)
        files = {"stdin": source, "stdout": results, "start_new_session": True}
        with subprocess.Popen([*walls, *PYTHON, RUNNER], **files, **QUIET) as process:
            timer = threading.Timer(SECONDS, _kill, [process.pid])
            try:
                timer.start()
                process.wait()  # without a timeout, with which it would look at intervals
            finally:
                timer.cancel()
                _kill(process.pid)
        results.seek(0)
        return results.read(RESULTS).split(b"\n")[:-1]


# What a test may use outside the program's process: it works on plain data and does no harm.
PURE = (abs, all, any, bool, bytes, chr, complex, dict, divmod, enumerate, float, frozenset, int)
PURE += (isinstance, len, list, max, min, ord, pow, range, reversed, round, set, sorted, str, sum)
PURE += (tuple, type, zip)
TOOLS = {tool.__name__: tool for tool in PURE} | {"math": math, "isclose": math.isclose}
METHODS = {name for kind in (*PURE, math) for name in dir(kind) if not name.startswith("_")}
# What may be applied there to what a program returns: nothing that a large number makes slow.
JUDGES = (abs, all, any, bool, float, isinstance, len, max, min, sum, type, math.isclose)
OPERATORS = ast.Add | ast.Sub | ast.Div | ast.BitAnd | ast.BitOr | ast.BitXor


class _Tests(ast.NodeTransformer):
    """A row's tests taken apart: steps for the program's process, and asserts over their values.

    A name or expression is known if it is made of constants, TOOLS and variables that were assigned
    such. What is known is evaluated here; the largest parts of an assert that hold nothing known,
    apart from what stands in a call, become steps.
    """

    def __init__(self, texts, tools):
        self.steps, self.asserts = [], []
        self.names = dict(tools)  # what is known, by name
        self.unsent = {}  # assignments of known values that no step has needed yet
        self.constants = {}  # known parts of the asserts
        for text in texts:
            for statement in ast.parse(text).body:
                self.add_statement(statement)

    def add_statement(self, statement):
        match statement:
            case ast.Assert(test=test):
                # "not not": of an assert that is no comparison, only the truth is asked for
                test = ast.UnaryOp(ast.Not(), ast.UnaryOp(ast.Not(), test))
                self.asserts.append(_compile(self.visit(test)))
                return
            case (
                ast.Assign(targets=[target], value=value)
                | ast.AnnAssign(target=target, value=ast.expr() as value)
            ) if self.is_known(value):
                with contextlib.suppress(Exception):
                    return self.assign(target, self.evaluate(value))
        if any(isinstance(node, ast.Assert) for node in ast.walk(statement)):
            raise ValueError("an assert inside a loop or a function cannot be taken apart")
        self.add_step("exec", statement)
        for name in [*_find_bound(statement), getattr(statement, "name", None)]:
            self.names.pop(name, None)

    def assign(self, target, result):
        if isinstance(target, ast.Name):
            values = {target.id: result}
        else:
            values = {name.id: value for name, value in zip(target.elts, result, strict=True)}
        unsent = {name: f"{name} = {_write(value)}" for name, value in values.items()}
        self.names |= values
        self.unsent |= unsent

    def add_step(self, mode, node):
        source = ast.unparse(node if mode == "exec" else _Inline(self, node).visit(node))
        for name in sorted(self.unsent.keys() & set(re.findall(r"\w+", source))):
            self.steps.append(("exec", self.unsent.pop(name)))
            try:
                hash(self.names[name])
            except TypeError:  # the program may change it
                del self.names[name]
        self.steps.append((mode, source))

    def is_known(self, node):
        nodes = list(ast.walk(node))
        names = {n.id for n in nodes if isinstance(n, ast.Name)} - _find_bound(node)
        attributes = {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        return names <= self.names.keys() and attributes <= METHODS

    def evaluate(self, node):
        return eval(_compile(node), {"__builtins__": {}, **self.names})

    def is_judge(self, node):
        with contextlib.suppress(Exception):
            return self.is_known(node) and self.evaluate(node) in JUDGES
        return False

    def get_parts(self, node):
        """The operands of what can be applied here; none for what has to be a step as a whole."""
        parts = []
        match node:
            case ast.Compare(left=left, comparators=others):
                parts = [left, *others]
            case ast.BinOp(left=left, op=op, right=right) if isinstance(op, OPERATORS):
                parts = [left, right]
            case ast.UnaryOp(operand=operand):
                parts = [operand]
            case ast.BoolOp(values=parts):
                pass
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts):
                pass
            case ast.Dict(keys=keys, values=values) if None not in keys:
                parts = [*keys, *values]
            case ast.Call(func=func, args=args, keywords=keywords) if self.is_judge(func):
                parts = [*args, *(keyword.value for keyword in keywords)]
        return [] if any(isinstance(part, ast.Starred) for part in parts) else parts

    def is_mixed(self, node):
        """Whether it is to be applied here, as something known stands among its parts."""
        parts = self.get_parts(node)
        match node:
            case ast.Compare() | ast.Call(func=ast.Name(id="type")):  # always: a type is not plain
                return bool(parts)
        return any(self.is_known(part) or self.is_mixed(part) for part in parts)

    def compares(self, node):
        """Whether it compares, apart from what the program's own functions are called with."""
        if isinstance(node, ast.Call) and not self.is_known(node.func):
            return False
        return isinstance(node, ast.Compare) or any(map(self.compares, ast.iter_child_nodes(node)))

    def visit(self, node):
        if not isinstance(node, ast.expr):
            return self.generic_visit(node)
        if self.is_known(node):
            with contextlib.suppress(Exception):
                name = f"constant {len(self.constants)}"
                self.constants[name] = self.evaluate(node)
                return ast.Name(name, ast.Load())
        if self.is_mixed(node):
            return self.generic_visit(node)
        if self.compares(node):
            raise ValueError(f"{ast.unparse(node)} compares inside, and cannot be taken apart")
        self.add_step("eval", node)
        return ast.Name(f"step {len(self.steps) - 1}", ast.Load())


class _Inline(ast.NodeTransformer):
    """Writes values, where they cannot change, for what is known: "f(5)" for "f(case[0])"."""

    def __init__(self, tests, step):
        self.tests, self.bound = tests, _find_bound(step)

    def visit(self, node):
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        if names and not names & self.bound and self.tests.is_known(node):
            with contextlib.suppress(Exception):
                value = self.tests.evaluate(node)
                hash(value)
                return ast.parse(_write(value), mode="eval").body
        return self.generic_visit(node)


def _write(value):
    """The value as Python's source; raises for what has none."""
    ast.literal_eval(repr(value))
    return repr(value)


def _find_bound(node):
    """The names to which something is assigned inside."""
    bound = set()
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()) | ast.arg(arg=name):
                bound.add(name)
    return bound


def _compile(node):
    return compile(ast.fix_missing_locations(ast.Expression(node)), "<test>", "eval")


@functools.lru_cache(1024)
def _take_apart(texts):
    try:
        tests = _Tests(texts, TOOLS)
        if not any(mode == "eval" for mode, _ in tests.steps):
            tests = _Tests(texts, {})  # the program's function has the name of one of the tools
        if not tests.asserts:
            raise ValueError("they hold no assert")
        return tests
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"python_tests cannot use the tests {list(texts)}: {error}") from error


BUILDERS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict)}
BUILDERS |= {"bytes": bytes.fromhex, "int": lambda digits: int(digits, 16)}
BUILDERS |= {"complex": lambda parts: complex(*parts)}


def _build(packed):
    """The value of what RUNNER's `pack` made of it: of one of these kinds, and no subclass."""
    ((kind, content),) = packed.items()
    return BUILDERS[kind](content)


def _find_code(completion):
    """The last ``` block (a last one may lack its end), or the whole text if there is none."""
    blocks = re.findall(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", completion, re.MULTILINE | re.DOTALL)
    return blocks[-1] if blocks else completion


def _passes(completion, tests):
    """Whether the program in a completion does all steps, and then all asserts hold."""
    lines = _run_steps([("exec", _find_code(completion)), *tests.steps])[1:]
    values = {"__builtins__": {}, **tests.constants}
    for i, line in enumerate(lines):
        with contextlib.suppress(Exception):  # a step that raised or is no plain data has no value
            values[f"step {i}"] = json.loads(line, object_hook=_build)
    try:
        return len(lines) == len(tests.steps) and all(eval(a, values) for a in tests.asserts)
    except Exception:
        return False


def python_tests(prompts, completions, tests, **_):
    """1 where the completion is a Python program after which all asserts in `tests` hold, else 0.

    The program is the last block between ``` or, where there is none, the whole completion. The
    column `tests` has a list of strings (or one string) for each row, such as
    ["assert add(1, 2) == 3"]; None for a row without tests.

    Each program runs in a process of its own, which does not learn what the tests expect. Of the
    tests it gets the calls, here `add(1, 2)`, in their order, and the statements that are no
    asserts. The values come back as plain data (None, numbers, strings, bytes, lists, tuples, sets,
    dicts, in this exact type) and are compared here, with what is evaluated here. So for tests:
    - A value that is no plain data, such as an object of the program's own class, makes its assert
      fail (unless the assert asks only for its truth, or it stands in a call).
    - What stands in a call is sent: abs(f(2) - 1.41) < 0.01 and math.isclose(f(2), 1.41) are taken
      apart (as are all JUDGES), but close(f(2), 1.41) with a `close` of the tests' own is not: a
      program could find the 1.41 there, and it decides alone what the value is.
    - ValueError for an assert inside a loop or a function, a comparison inside a comprehension, and
      tests that hold no assert.

    The process has limits on time, memory, files and processes (fewer on macOS). It can import and
    read the standard library alone, open no connection, start no process and change no file. Python
    refuses these, and on Linux, where that is permitted, the kernel too hides from it the network
    and all other processes. That stops accidents, and the short cuts that a policy finds. It is no
    sandbox against an adversary who gets round Python's own guards: he could read the expected
    values in a file. For that, train in a container without a network.
    """
    rows = [[text] if isinstance(text, str) else text for text in tests]
    plans = [_take_apart(tuple(row)) if row and any(row) else None for row in rows]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = pool.map(lambda pair: _passes(*pair) if pair[1] else None, zip(completions, plans))
        return [None if result is None else float(result) for result in passed]
