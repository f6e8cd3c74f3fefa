"""Reward functions to copy, and to use as they are: one score for each completion.

    python grpo.py --reward rewards.py:numeric_answer --dataset data/arithmetic/prompts_train.jsonl

with the other flags that data/arithmetic.py names. The signature is TRL's: f(prompts, completions,
**columns) -> list of numbers. `prompts` and `completions` are lists of strings; every other column
of the data comes as a list of the same length under its own name (`numeric_answer` reads `answer`,
`python_tests` reads `tests`), and a function takes and ignores the columns that it does not use.
None in the result means "does not apply to this row". They work unchanged in TRL's GRPOTrainer, for
prompts and completions that are text; TRL's lists of chat messages are not read.

What one would change stands as a constant above its function: as keywords with defaults they could
be overwritten by a column that happens to have such a name. Only the standard library is used; a
reward function can be lifted out together with the imports and with what stands between it and the
one before it.
"""

import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

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


def diversity_bonus(prompts, completions, **_):
    """1 - the mean similarity to the other completions of the same prompt; 0 for the only one.

    The similarity of two texts is Jaccard's: of the words and pairs of neighbouring words that one
    or both have, the share that both have (1 where neither has any). Words are what white space
    separates, in lower case.
    """
    ngrams, groups = [], {}
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        words = completion.lower().split()
        ngrams.append({*words, *itertools.pairwise(words)})
        groups.setdefault(prompt, []).append(i)
    scores = []
    for i, prompt in enumerate(prompts):
        others = [ngrams[j] for j in groups[prompt] if j != i]
        distances = [len(ngrams[i] ^ other) / max(1, len(ngrams[i] | other)) for other in others]
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

# 12, -1,234.50, .5, 1e-5; the minus of "10-3" is no sign, as it stands behind a digit.
NUMBER = re.compile(
    r"(?:(?<![\w)])-)?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9]))?"
)


def _final_number(text):
    """The first number after the last "####", or without "####" the last number; None if none."""
    _, marker, after = text.replace("\u2212", "-").replace("-$", "-").rpartition("####")
    numbers = NUMBER.findall(after)
    return Decimal(numbers[0 if marker else -1].replace(",", "")) if numbers else None


def numeric_answer(prompts, completions, answer, **_):
    """1 where the completion's final number equals the one in the column `answer`, else 0.

    The final number is the first after the last "####" (GSM8K's mark) or, where there is no
    "####", the last in the text; `answer` is a number or such a text. They are compared exactly, by
    value: 5 is 5.0, $1,234 is 1234. None for a row whose answer holds no number.
    """
    scores = []
    for completion, text in zip(completions, answer):
        target = None if text is None else _final_number(str(text))
        scores.append(None if target is None else float(_final_number(completion) == target))
    return scores


# ---------------------------------------------------------------------------------------- programs

SECONDS = 3  # whole ones, for a program and its tests: of processor time, and by the clock
MEMORY = 2**29  # bytes of address space
REFUSED = (  # audit events, by their beginning: network, processes, foreign code, changes to files
    *("socket.connect", "socket.bind", "socket.send", "socket.get", "subprocess.", "ctypes."),
    *("os.fork", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.kill", "pty."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "os.setxattr", "os.removexattr"),
)
# The child process: limits itself, runs the program and the tests, then hands the token back.
RUNNER = """
import json, os, resource, sys

token_fd, passed_fd, null_fd = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
for fd in range(3):
    os.dup2(null_fd, fd)
with open("job.json") as file:
    job = json.load(file)
os.remove("job.json")

def limit(name, value):
    try:
        resource.setrlimit(getattr(resource, name), (value, value))
    except (ValueError, OSError):  # macOS refuses RLIMIT_AS
        pass

limit("RLIMIT_CPU", job["seconds"])
limit("RLIMIT_AS", job["memory"])
limit("RLIMIT_FSIZE", 0)
limit("RLIMIT_CORE", 0)
try:  # a network of its own, which has no interfaces (Linux, Python 3.12, where it is permitted)
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNET)
except (AttributeError, OSError):
    pass

writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

def audit(event, args, refused=tuple(job["refused"]), writing=writing):
    if event.startswith(refused) or event == "open" and (args[2] or 0) & writing:
        raise PermissionError(event)

sys.addaudithook(audit)
namespace = {"__name__": "program"}
for text in job["texts"]:
    exec(text, namespace)
os.write(passed_fd, os.read(token_fd, 64))
os._exit(0)
"""


def _find_code(completion):
    """The last ``` block (a last one may lack its end), or the whole text if there is none."""
    blocks = re.findall(r"^```[^\n`]*\n(.*?)(?:^```|\Z)", completion, re.MULTILINE | re.DOTALL)
    return blocks[-1] if blocks else completion


def _passes(completion, tests):
    """Whether the program in a completion runs and then all tests do, in a process of their own."""
    texts = [_find_code(completion), *([tests] if isinstance(tests, str) else tests)]
    job = {"texts": texts, "seconds": SECONDS, "memory": MEMORY, "refused": REFUSED}
    token = secrets.token_hex(16).encode()
    command = [sys.executable, "-I", "-B", "-c", RUNNER]
    options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    options |= dict(env={}, start_new_session=True)  # a session of its own: all can be killed
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job.json").write_text(json.dumps(job))
        with subprocess.Popen(command, cwd=folder, **options) as process:
            try:
                return process.communicate(token, timeout=SECONDS)[0] == token
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)


def python_tests(prompts, completions, tests, **_):
    """1 where the completion is a Python program after which all asserts in `tests` hold, else 0.

    The program is the last block between ``` or, where there is none, the whole completion. The
    column `tests` has a list of strings (or one string) for each row, such as
    ["assert add(1, 2) == 3"]; None for a row without tests.

    Each program runs in a process of its own, in an empty folder and environment, with limits on
    time and memory (macOS has none on memory); it may open no connection, start no process and
    change no file. It passes by handing back, after the last assert, a random token that it is
    given apart from its input; what it prints and how it exits do not count.

    That stops accidents, and the short cuts that a policy finds by chance. It is no sandbox against
    an adversary: a program shares the interpreter with its tests, so it can deceive them (with an
    object that equals everything, or by a search for the token's pipe), it can read files, and
    Python's own guards can be got round. For that, train in a container without a network.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = pool.map(lambda pair: _passes(*pair) if pair[1] else None, zip(completions, tests))
        return [None if result is None else float(result) for result in passed]
