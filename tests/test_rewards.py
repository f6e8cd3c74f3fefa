"""rewards.py: every function's values, and what a program under test cannot do."""

import ast
import inspect
import json
import math
import os
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT

import rewards

FUNCTIONS = {
    name: function
    for name, function in vars(rewards).items()
    if inspect.isfunction(function) and not name.startswith("_")
}
ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def scores(function, *completions, **columns):
    """The scores of completions to one prompt; a column's value is the same for all of them."""
    columns = {name: [value] * len(completions) for name, value in columns.items()}
    return function(prompts=["p"] * len(completions), completions=list(completions), **columns)


def assert_scores(function, score, texts, **columns):
    """That each of the texts has this score."""
    found = scores(function, *texts, **columns)
    assert [text for text, x in zip(texts, found) if x != score] == []


def assert_programs(score, *programs, tests=TESTS):
    """That each of these programs passes (1), or none does (0)."""
    assert_scores(rewards.python_tests, score, programs, tests=tests)


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch):
    """Time enough for a right program, whatever else runs here."""
    monkeypatch.setattr(rewards, "SECONDS", 20)


# ---------------------------------------------------------------- all


def test_the_shelf():
    names = ["keyword_sentiment", "phrase_ending", "length_window", "repetition_penalty"]
    names += ["soft_overlong_punishment", "diversity_bonus", "tag_format", "valid_json"]
    names += ["numeric_answer", "python_tests"]
    assert list(FUNCTIONS) == names


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_number_for_any_text(name):
    """Empty, broken and long texts; further columns are ignored, as TRL passes its own."""
    rng = random.Random(name)
    texts = ["", " ", "\n", "\x00", "\ud800", "中文 🙂 \u0663"]
    texts += ["9" * 10_000, "a " * 10_000, "[" * 10_000]
    texts += ["".join(chr(rng.randrange(0x3000)) for _ in range(50)) for _ in range(3)]
    columns = {"answer": "3", "tests": ["assert add(1, 2) == 3"], "phrase": "x", "SECONDS": 0}
    found = scores(FUNCTIONS[name], *texts, **columns, completion_ids=[1], trainer_state=None)
    assert len(found) == len(texts)
    assert all(isinstance(score, float) and -1 <= score <= 1 for score in found)
    assert FUNCTIONS[name](prompts=[], completions=[], answer=[], tests=[], completion_ids=[]) == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_can_be_lifted_out(name):
    """With the imports and what stands between it and the public function before it."""
    lines = inspect.getsource(rewards).splitlines()
    ends = {"": lines.index("# " + "-" * 91 + " words")}
    for function in FUNCTIONS.values():
        block, start = inspect.getsourcelines(function)
        ends[function.__name__] = start - 1 + len(block)
    before = ["", *FUNCTIONS][list(FUNCTIONS).index(name)]
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    namespace = {"__name__": "copy"}
    exec("\n".join([*imports, *lines[ends[before] : ends[name]]]), namespace)
    texts = ["", "good 3", ADD, "<think>a</think><answer>b</answer>", "[1]"]
    columns = {"answer": "3", "tests": TESTS, "completion_ids": [7] * 42}
    assert scores(namespace[name], *texts, **columns) == scores(FUNCTIONS[name], *texts, **columns)


def test_only_the_standard_library():
    imports = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(inspect.getsource(rewards)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert "json" in imports
    assert {name.split(".")[0] for name in imports} <= sys.stdlib_module_names


def test_call_reward_of_the_scripts_takes_them():
    import ppo

    rows = [{"prompt": "2+3=", "answer": "5"}, {"prompt": "no answer", "answer": None}]
    function = ppo.load_function(str(ROOT / "rewards.py") + ":numeric_answer")
    found = ppo.call_reward(function, rows, ["5", "5"])
    assert found[0] == 1 and math.isnan(found[1])


# ---------------------------------------------------------------- words


def test_keyword_sentiment():
    texts = ["", "A good film.", "GOOD, great, bad", "bad", "goodness", "good " * 9 + "bad"]
    assert scores(rewards.keyword_sentiment, *texts) == [0, 1, pytest.approx(1 / 3), -1, 0, 0.8]


def test_phrase_ending():
    texts = ["So it was. The end.", "The end. \n", "The end", "The end. Or not", "the end.", ""]
    assert scores(rewards.phrase_ending, *texts) == [1, 1, 0, 0, 0, 0]


def test_length_window():
    texts = ["", "w " * 10, "w " * 20, "w " * 60, "w " * 120]
    assert scores(rewards.length_window, *texts) == [0, 0.5, 1, 1, 0.5]


def test_repetition_penalty():
    texts = ["", "a b", "a b c", "a b c a b c", "A b c d a B c", "a a a a a a"]
    expected = [0, 0, 0, -1 / 4, -1 / 5, -3 / 4]
    assert scores(rewards.repetition_penalty, *texts) == pytest.approx(expected)


def test_soft_overlong_punishment(monkeypatch):
    """Equation 13 by hand, with L_max = 10 and L_cache = 4; and TRL's function, if installed."""
    monkeypatch.setattr(rewards, "MAX_LENGTH", 10)
    monkeypatch.setattr(rewards, "CACHE_LENGTH", 4)
    ids = [[5] * n for n in (0, 5, 6, 7, 8, 10, 11, 50)]
    expected = [0, 0, 0, -0.25, -0.5, -1, -1, -1]
    texts = [""] * len(ids)
    assert rewards.soft_overlong_punishment(texts, texts, completion_ids=ids) == expected
    trl = pytest.importorskip("trl.rewards", reason="trl is not installed")
    assert trl.get_soft_overlong_punishment(10, 4)(completion_ids=ids) == expected


def test_diversity_bonus_within_a_group():
    assert scores(rewards.diversity_bonus, "only one") == [0]
    assert scores(rewards.diversity_bonus, "x y", "x y", "X  Y") == [0, 0, 0]
    assert scores(rewards.diversity_bonus, "x y", "v w") == [1, 1]
    assert scores(rewards.diversity_bonus, "", "") == [0, 0]
    assert scores(rewards.diversity_bonus, "", "x") == [1, 1]
    # {x, y, xy} and {x, z, xz}: one of five in common; {x, y, xy} and {y, x, yx}: two of four
    assert scores(rewards.diversity_bonus, "x y", "x z") == pytest.approx([0.8, 0.8])
    assert scores(rewards.diversity_bonus, "x y", "y x") == pytest.approx([0.5, 0.5])
    found = scores(rewards.diversity_bonus, "x y", "x y", "v w")
    assert found == [0.5, 0.5, 1]


def test_diversity_bonus_sees_no_other_group():
    completions = ["x y", "x y", "x y", "v w"]
    assert rewards.diversity_bonus(["a", "a", "b", "b"], completions) == [0, 0, 1, 1]
    assert rewards.diversity_bonus(["a", "b", "c", "d"], completions) == [0, 0, 0, 0]
    # a prompt that comes again begins a group of its own
    assert rewards.diversity_bonus(["a", "a", "b", "b", "a"], [*completions, "v w"])[::4] == [0, 0]
    assert rewards.diversity_bonus(["a", "b", "a"], ["x", "y", "z"]) == [0, 0, 0]


# ---------------------------------------------------------------- format


def test_tag_format():
    right = ["<think>a</think><answer>b</answer>"]
    right += ["\n<think>3 < 5,\nso</think>\n\n<answer>\n5\n</answer>\n"]
    assert_scores(rewards.tag_format, 1, right)
    wrong = ["<think></think><answer>b</answer>", "<think>a</think>"]
    wrong += ["<think>a</think> so <answer>b</answer>"]
    wrong += ["<think>a</think><answer>b</answer> and more"]
    wrong += ["<think>a</think><answer>b</answer><answer>c</answer>"]
    wrong += ["<think>a<think>b</think></think><answer>c</answer>"]
    wrong += ["<answer>b</answer><think>a</think>", "<THINK>a</THINK><answer>b</answer>"]
    assert_scores(rewards.tag_format, 0, wrong)


def test_tag_format_is_fast_on_texts_that_nearly_fit():
    text = "<think>" + "a < b " * 20_000 + "</think><answer>" + "\n" * 20_000 + "<answer>"
    start = time.perf_counter()
    assert scores(rewards.tag_format, text, "\n" * 50_000) == [0, 0]
    assert time.perf_counter() - start < 5


def test_valid_json():
    right = ['{"a": [1, 2.5e3, null, true, "x"]}', "[]", "[" + "9" * 10_000 + "]"]
    right += [' \n{"ключ": "\\ud83d\\ude00"}\n']
    assert_scores(rewards.valid_json, 1, right)
    wrong = ["1", '"text"', "null", "[NaN]", "[-Infinity]", "{'a': 1}", '{"a": 1,}']
    wrong += ['{"a": 1} and more', '{"a": 1', "", "[" * 100_000]
    wrong += ["[" * 100_000 + "]" * 100_000]  # deeper than Python reads
    assert_scores(rewards.valid_json, 0, wrong)


# ---------------------------------------------------------------- mathematics


def test_numeric_answer():
    right = [("5", "5.0"), ("5", 5), ("5.50", 5.5), ("0.00001", 1e-05), ("1e3", "1000")]
    right += [("1,234", "1234"), ("1234", "1,234.00"), ("It is $1,234,567.89.", "1234567.89")]
    right += [("-$5", "-5"), ("$-5", "-5"), ("\u22125", "-5"), ("x = -7", "-7"), ("-0", "0")]
    right += [("10-3", "3"), ("(10)-3", "3"), ("10 - 3 = 7", "7"), ("+5", "5"), ("007", "7")]
    right += [("half is .5", "0.5"), ("well...5", "5"), ("So 5.", "5"), ("**5**", "5")]
    right += [("\\boxed{5}", "5"), ("$5$", "5"), ("50%", "50"), ("1, 2, 3", "3")]
    right += [("1,2345", "2345"), ("9" * 5_000, "9" * 5_000)]
    # the column may be a worked answer
    right += [("132", "48/2 = 24 clips in May.\n#### 132"), ("#### 7 of the 12", "7")]
    right += [("She has 3 * 4 = 12.\n#### 1,234", "It is 1234.\n#### 1234")]
    right += [("#### 1\n#### 2", "2"), ("#### $ 72", "72")]
    # the column is read as if it stood after "####"
    right += [("#### 7", "7 of the 12"), ("#### 7", "7, not 8")]
    # fractions
    right += [("#### 1/2", "1/2"), ("#### 2/4", "1/2"), ("so 3/4", "0.75"), ("0.75", "3/4")]
    right += [("#### 1 / 2", "1/2"), ("-1/2", "-0.5"), ("48/2", "24"), ("1,000/3", "1000/3")]
    right += [("2 1/2", "2.5"), ("-2 1/2", "-2.5"), ("2.5", "2\\frac{1}{2}"), ("1/2/3", "3")]
    right += [("\\boxed{-\\frac{1}{2}}", "-1/2"), ("$\\dfrac{10}{4}$", "2.5")]
    # other dashes and currencies
    right += [(f"#### {dash}3", "-3") for dash in "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"]
    right += [("-3", "\u20133"), ("5\u20137", "7"), ("-€5", "-5"), ("-\\$5", "-5")]
    # the sign of per cent may be left out, as a unit may
    right += [("50%", "0.5"), ("0.5", "50%"), ("50%", "50%"), ("50", "50%"), ("50\\%", "1/2")]
    right += [("#### 12.5 %", "1/8"), ("1/2%", "0.005")]
    wrong = [("", "5"), ("five", "5"), ("-5", "5"), ("5", "-5"), ("10-3", "-3"), ("5.01", "5")]
    wrong += [("55", "5"), ("5 or 6", "5"), ("1,234", "234"), ("12,34", "1234")]
    wrong += [("5 ####", "5"), ("5 #### none", "5"), ("#### 6, no: it is 5", "5")]
    wrong += [("6", "5\n#### 5, not 6"), ("0.1000000000000000000000000001", "0.1")]
    wrong += [("9" * 5_000, "9" * 4_999 + "8")]  # more digits than a float or Python's int() reads
    wrong += [("\u0665", "5")]  # another script's five
    wrong += [("1e999", "5"), ("NaN", "5"), ("inf", "5")]
    wrong += [("#### 2", "1/2"), ("#### 1", "1/2"), ("0.3333333333333333", "1/3"), ("5/0", "5")]
    wrong += [("#### 1", "\\frac{1}{2}"), ("#### 2", "2 1/2"), ("#### 12", "7 of the 12")]
    wrong += [("3", "\u20133"), ("50%", "0.5%"), ("5%", "0.5"), ("0.5", "0.5/0.5")]
    for pairs, score in ((right, 1), (wrong, 0)):
        texts, answers = zip(*pairs)
        found = rewards.numeric_answer(["p"] * len(pairs), texts, answer=answers)
        assert [pair for pair, x in zip(pairs, found) if x != score] == []


def test_numeric_answer_does_not_apply_without_an_answer():
    found = rewards.numeric_answer(["p"] * 5, ["5"] * 5, answer=["5", None, "unknown", "", "5/0"])
    assert found == [1, None, None, None, None]
    with pytest.raises(TypeError, match="answer"):
        rewards.numeric_answer(["p"], ["5"])


def test_numeric_answer_serves_the_arithmetic_data():
    rows = [json.loads(line) for line in (ROOT / "data/arithmetic/prompts_test.jsonl").open()]
    answers = [row["answer"] for row in rows]
    assert rewards.numeric_answer(None, answers, answer=answers) == [1] * len(rows)
    wrong = [str(int(answer) + 1) for answer in answers]
    assert rewards.numeric_answer(None, wrong, answer=answers) == [0] * len(rows)


# ---------------------------------------------------------------- programs


def test_a_right_program_passes():
    code = "Here it is:\n\n```\n{}```\nIt adds."
    two = "```python\nraise ValueError\n```\nBetter:\n```python\n{}```"
    run = "import asyncio\n\nasync def f(a, b):\n    return a + b\n\n"
    run += "def add(a, b):\n    return asyncio.run(f(a, b))"
    record = "from dataclasses import dataclass\n\n@dataclass\nclass C:\n    x: int\n\n"
    assert_programs(
        1,
        ADD,
        f"```python\n{ADD}```",
        code.format(ADD),
        f"```py\n{ADD}",  # cut off, or ended by EOS
        two.format(ADD),
        ADD + "print('hello')\nif __name__ == '__main__':\n    input()",
        ADD + "import sys\nsys.stdout.write('x' * 10**6)",
        run,
        record + ADD,
        ADD + "import threading, time\nthreading.Thread(target=time.sleep, args=(9,)).start()",
    )


def test_a_wrong_program_or_an_early_exit_does_not_pass():
    assert_programs(
        0,
        "",
        "no code",
        "def add(a, b):\n    return a - b",
        "def add(a, b):\n    return 3",  # right in the first assert only
        "def add(a, b)",
        ADD + "\x00",
        ADD + "'\ud800'",
        f"```python\n{ADD}```\n```python\nx = 1\n```",
        f"```python\n{ADD}import sys\nsys.exit(0)\n```",
        ADD + "raise SystemExit",
        ADD + "import os\nos._exit(0)",
        ADD + "quit()",
        ADD + "import os, signal\nos.abort()",
        "def add(a, b):\n    import os\n    os._exit(0)",
        "print('ok')\nprint('passed')\nexit()",
        "def add(a, b):\n    return add(a, b)",
        ADD + "raise KeyboardInterrupt",
    )


def test_rows_are_told_apart():
    tests = [TESTS, None, [], "assert add(2, 2) == 4", TESTS]
    wrong = "def add(a, b):\n    return 0"
    found = rewards.python_tests(["p"] * 5, [ADD, ADD, ADD, ADD, wrong], tests=tests)
    assert found == [1, None, None, 1, 0]


@pytest.mark.parametrize(
    "tests, steps",
    [
        # nothing that is expected, and of the rest what the program has to do
        ("assert add(1, 2) == 3", ["add(1, 2)"]),
        ("assert 3 == add(1, 2), f'not {add(1, 2)}'", ["add(1, 2)"]),
        ("assert [add(1, 2), 7] == [3, sum([3, 4])]", ["add(1, 2)"]),
        ("assert f(2)[0].x in {4, 5} and not g() != 'a'.upper()", ["f(2)[0].x", "g()"]),
        ("assert abs(f(2) - 1.41) < 1e-3", ["f(2)"]),
        ("import math\nassert math.isclose(f(2), 2 ** 0.5, rel_tol=0.1)", ["import math", "f(2)"]),
        ("assert isinstance(f(2), (int, float))", ["f(2)"]),
        ("assert set(f(2)) == {1, 2}", ["set(f(2))"]),
        ("assert f(2) == [i * i for i in range(3)]", ["f(2)"]),
        ("assert is_odd(3)", ["not not is_odd(3)"]),
        ("assert not is_odd(2)", ["not not not is_odd(2)"]),
        ("assert f(1) == g(1)", ["f(1)", "g(1)"]),
        ("assert {'a': f(1), **{}} == {'a': 2}", ["{'a': f(1), **{}}"]),
        # variables go there when they are needed, and come from there if they may have changed
        ("x, y = 1, 2\nassert f(x) == y", ["f(1)"]),
        ("n: int = 5\nwanted = [6]\nassert f(n) == [n + 1] == wanted", ["f(5)"]),
        ("c = {'in': 'a', 'out': 'b'}\nassert f(c['in'] * 2) == c['out']", ["f('aa')"]),
        ("x = 1\nassert [f(x) for x in (2, x)] == [4, x]", ["x = 1", "[f(x) for x in (2, x)]"]),
        ("a = [2]\nb = [1]\nsort(a)\nassert a == b", ["a = [2]", "sort(a)", "a"]),
        ("a = [2]\nassert f(a) is None\nassert a == [3]", ["a = [2]", "f(a)", "a"]),
        ("n = 5\nn += f(n)\nassert g(n) == n", ["n = 5", "n += f(n)", "g(n)", "n"]),
        ("e = 1\nassert f(1) == e\ne = 2\nassert f(2) == e", ["f(1)", "f(2)"]),
        (
            "r = Node(1)\nr.left = Node(2)\nassert f(r) == 2",
            ["r = Node(1)", "r.left = Node(2)", "f(r)"],
        ),
        # a program's function may have a built-in's name
        ("assert sum(1, 2) == 3", ["sum(1, 2)"]),
        ("assert abs(-3) == 3", ["abs(-3)"]),
        ("assert True", []),
    ],
)
def test_what_the_process_of_a_program_gets_of_the_tests(tests, steps):
    assert [source for _, source in rewards._take_apart((tests,)).steps] == steps


@pytest.mark.parametrize(
    "test, reason",
    [
        ("for x in [1]:\n    assert f(x) == 1", "inside a loop or a function"),
        ("def check(f):\n    assert f(1) == 1", "inside a loop or a function"),
        ("assert all(f(x) == y for x, y in [(1, 2)])", "compares inside"),
        ("assert (lambda r: r == 3)(add(1, 2))", "compares inside"),
        ("check(add)", "no assert"),
        ("assert add(1, 2 == 3", "never closed"),
        ("assert add(1, 2) == 3\x00", "null"),
    ],
)
def test_tests_that_cannot_be_taken_apart(test, reason):
    with pytest.raises(ValueError, match=f"python_tests cannot use the tests .*{reason}"):
        rewards.python_tests(["p"], [ADD], tests=[[test]])


VALUES = [
    None,
    True,
    7,
    -(2**70),
    1.5,
    math.inf,
    2 + 3j,
    "'\\\n\ud800",
    b"\x00",
    [],
    [1, [2]],
    (1,),
]
VALUES += [{1, 2}, frozenset([3]), {frozenset([1]): {"a": None}, (1, "b"): []}, set(), {}]
OWN = """
import collections, enum, math
Pair, Number = collections.namedtuple("Pair", "a b"), enum.IntEnum("Number", "ONE TWO")
class Own:
    def __eq__(self, other): return True
def f(x): return x
"""


def test_values_come_back_as_plain_data():
    right = [f"assert f({value!r}) == {value!r} and type(f({value!r})) is {type(value).__name__}"
             for value in VALUES if value is not None and value != math.inf]  # fmt: skip
    right += ["assert f(None) is None", "assert f(float('inf')) == float('inf') > f(9.9)"]
    right += ["assert math.isnan(f(math.nan))", "assert f(math.nan) != f(math.nan)"]
    right += [
        "assert f(True) is True",
        "assert f(10 ** 5000) % 10 == 0",
        "assert f(1) == 1.0 == True",
    ]
    # of a plain kind's subclass the plain value; and what is not asked for need not be plain
    right += ["assert f(Pair(1, 2)) == (1, 2)", "assert f(Number.TWO) == 2", "assert f(Own())"]
    right += ["assert f(collections.Counter('aab')) == {'a': 2, 'b': 1}"]
    right += ["assert f(None) is None or f(None)[0] == 1", "assert len(f([Own(), Own()])) == 2"]
    for test in right:
        assert_programs(1, OWN, tests=test)
    wrong = ["assert f(Own()) == 3", "assert f([Own()]) == [3]", "assert {'a': Own()} == {'a': 3}"]
    wrong += ["assert f(f) == f", "assert f(1) == 2", "assert f([1]) == (1,)", "assert f(3) == '3'"]
    wrong += ["assert f(math.nan) == math.nan", "assert f(0)", "assert not f(Own())"]
    wrong += [
        "assert f(1)[0] == 1 or True",
        "assert f(1) == 1\nf(1)[0]",
        "f(1)[0]\nassert f(1) == 1",
    ]
    wrong += ["assert f('x' * 2 ** 20) == 'x' * 2 ** 20"]  # more than RESULTS
    for test in wrong:
        assert_programs(0, OWN, tests=test)


# Where a program might find what is expected, in words of Python that give a text or bytes.
PLACES = {
    "frames": "[(f.f_locals, f.f_globals) for f in frames(sys._getframe())]",
    "threads": "[f.f_locals for t in sys._current_frames().values() for f in frames(t)]",
    "garbage": "gc.get_objects()",
    "referrers": "[gc.get_referrers(x) for x in gc.get_objects()[:500]]",
    "code": "[c.co_consts for c in gc.get_objects() if hasattr(c, 'co_consts')]",
    "stack": "[(s.frame.f_locals, s.code_context) for s in __import__('inspect').stack()]",
    "main": "vars(__import__('__main__'))",
    "job": "__import__('__main__').job",
    "modules": "[vars(m) for m in list(sys.modules.values())]",
    "stdin": "sys.stdin.read()",
    "descriptors": "[read(os.pread, fd, 10**6, 0) for fd in range(64)]",
    "pipes": "[read(os.read, fd, 10**6) for fd in range(64)]",
    "arguments": "(sys.argv, sys.orig_argv, dict(os.environ))",
    "own process": "[read(open, f'/proc/self/{x}') for x in ('cmdline', 'environ', 'maps')]",
    "parent": "[open(f'/proc/{os.getppid()}/{x}').read() for x in ('cmdline', 'environ')]",
    "parent's memory": "[open(f'/proc/{os.getppid()}/{x}', 'rb') for x in ('maps', 'mem')]",
    "all processes": "[read(open, f'/proc/{p}/cmdline') for p in os.listdir('/proc')]",
    "data": "open(DATA).read()",
    "data by its bytes": "os.read(os.open(DATA.encode(), 0), 10**6)",
    "data by the back door": "open(os.__file__[:-5] + '/../../../../../../..' + DATA).read()",
    "data by sqlite": "__import__('sqlite3').connect(DATA)",
    "data by its class": "open(type('S', (str,), {'startswith': lambda *_: True})(DATA)).read()",
    "data by fileinput": "list(__import__('fileinput').input(DATA))",
    "data by a command": "__import__('subprocess').check_output(['cat', DATA])",
    "data by fork_exec": "__import__('_posixsubprocess').fork_exec(['cat', DATA])",
    "data by another interpreter": "__import__('_xxsubinterpreters').create()",
    "memory": "__import__('ctypes').string_at(id(0), 100)",
    "the trainer": "sys.path.insert(0, ROOT) or vars(__import__('rewards'))",
    "trace": "sys.settrace(lambda *a: seen.append(a)) or seen",
    "without the hook": "(setattr(M.audit, '__code__', read.__code__), open(DATA).read())",
    "with other defaults": "(setattr(M.audit, '__defaults__', ()), open(DATA).read())",
    "with other built-ins": "(vars(builtins).update(PermissionError=id), open(DATA).read())",
}
WANTED = "90207314159265358979"  # longer than an address, in which it might stand by chance
LOOK = """
import builtins, gc, os, sys
import __main__ as M
DATA, ROOT, seen = {data!r}, {root!r}, []
def frames(frame):
    return [frame] + frames(frame.f_back) if frame else []
def read(function, *args):
    try:
        found = function(*args)
        return found if isinstance(found, bytes) else found.read()
    except OSError:
        pass
def add(a, b):
    try:
        text = str({place})
    except Exception:
        text = ""
    wanted = "".join(reversed({wanted!r}))  # so that it does not find itself
    return int(wanted) if wanted in text else 0
"""


@pytest.mark.parametrize("place", PLACES)
def test_what_is_expected_is_nowhere(place, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text(json.dumps({"tests": [f"assert add(1, 2) == {WANTED}"]}))
    names = {"data": str(data), "root": str(ROOT), "wanted": WANTED[::-1]}
    look = LOOK.format(place=PLACES[place], **names)
    assert_programs(0, look, tests=[f"n = {WANTED}", f"assert add(1, 2) == {WANTED} == n"])
    if place in ("frames", "garbage", "main", "job"):  # that it looks: what is sent can be found
        assert_programs(1, look, tests=f"assert add('{WANTED}', 2) == {WANTED}")


# Whatever else a program might try in order to pass.
EQUAL = "class Any({}):\n    def __eq__(*_): return True\n    __ne__ = __hash__ = __eq__\n"
EQUAL += "    __bool__ = __lt__ = __gt__ = __contains__ = __eq__\ndef add(a, b): return {}"
WRITE = "import os\ndef add(a, b):\n    for fd in range(64):\n        try: os.write(fd, {})\n"
WRITE += "        except OSError: pass\n    {}"
RAISE = "class E(BaseException):\n    __repr__ = __str__ = lambda self: 'true'\n"
TRICKS = {
    "object": EQUAL.format("object", "Any()"),
    "int": EQUAL.format("int", "Any(0)"),
    "str": EQUAL.format("str", "Any()"),
    "list": EQUAL.format("list", "Any()"),
    "dict": EQUAL.format("dict", "Any()"),
    "type": EQUAL.format("type", "Any('x', (), {})"),
    "inside": EQUAL.format("object", "[Any()]"),
    "class": "class Int(int):\n    __class__ = bool\ndef add(a, b): return Int(0)",
    "mock": "from unittest.mock import ANY\ndef add(a, b): return ANY",
    "nan": "def add(a, b): return float('nan')",
    "built-ins": "import builtins\nfor x in ('eval', 'isinstance', 'abs', 'all', 'compile'):\n"
    "    setattr(builtins, x, lambda *_: True)\ndef add(a, b): return 0",
    "json": "import json\njson.dumps = lambda *_: 'true'\ndef add(a, b): return 0",
    "pack": "import __main__\n__main__.pack = lambda _: True\ndef add(a, b): return 0",
    "steps": "import __main__\n__main__.job['steps'].clear()",
    "ast": "import ast, math\nast.parse = math.isclose = lambda *_: True\ndef add(a, b): return 0",
    "AssertionError": "import builtins\nbuiltins.AssertionError = None\ndef add(a, b): return 0",
    "exit": "import sys\ndef add(a, b): sys.exit(0)",
    "_exit": "import os\ndef add(a, b): os._exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): quit()",
    "exception": RAISE + "def add(a, b): raise E",
    "recursion": "def add(a, b): return add(a, b)",
    "depth": "def add(a, b):\n    x = []\n    for _ in range(10**5): x = [x]\n    return x",
    "loop": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "true": WRITE.format(r"b'null\ntrue\ntrue\n'", "os._exit(0)"),
    "many values": WRITE.format(r"b'true\n' * 99", "return 0"),
    "no end": WRITE.format(r"b'[' * 10**6", "os._exit(0)"),
    "bad kinds": WRITE.format(
        r'b\'null\n{"eval": "1"}\n{"int": [], "list": 0}\n{}\n\'', "os._exit(0)"
    ),
    "deep text": WRITE.format(r"b'null\n' + b'[' * 10**5 + b'\n'", "os._exit(0)"),
    "large": "def add(a, b): return 'x' * 10**8",
    "large number": "def add(a, b): return 10**(10**6)",
    "slow to build": "def add(a, b): return {i * (2**61 - 1) for i in range(10**4)}",
    "much output": "import sys\ndef add(a, b):\n    while True: print('x' * 10**6)",
    "sleep": "import time\ndef add(a, b): time.sleep(99)",
    "stop": "import os, signal\ndef add(a, b): os.kill(os.getpid(), signal.SIGSTOP)",
    "alarm": "import signal\nsignal.signal(14, lambda *_: 1 / 0)\n"
    "def add(a, b):\n    signal.setitimer(0, 0.01)\n    while True: pass",
    "deaf": "import signal\nfor n in set(signal.Signals) - {9, 19}:\n"
    "    signal.signal(n, signal.SIG_IGN)\ndef add(a, b):\n    while True: pass",
    "thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\n"
    "def add(a, b): return 0",
    "many threads": "import threading, time\ndef add(a, b):\n"
    "    while True: threading.Thread(target=time.sleep, args=(99,)).start()",
    "children": "import os\ndef add(a, b):\n    while True: os.fork()",
    "session": "import os\ndef add(a, b): os.setsid()",
    "parent": "import os, signal\ndef add(a, b): os.kill(os.getppid(), 9)",
    "parent by its number": "import os, signal\n"
    "def add(a, b): signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "parent's limits": "import os, resource\n"
    "def add(a, b): resource.prlimit(os.getppid(), 0, (1, 1))",
    "memory": "def add(a, b):\n    x = []\n    while True: x.append(bytearray(2**24))",
    "files": "import os\ndef add(a, b):\n    while True: os.dup(1)",
    "tests' list": "import __main__ as M\ndef add(a, b):\n    M.job['steps'][:] = []\n    return 0",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_passes(trick, monkeypatch):
    monkeypatch.setattr(rewards, "SECONDS", 2)
    tests = ["assert add(1, 2) == 90207", "assert isinstance(add(1, 2), int)"]
    start = time.perf_counter()
    assert_programs(0, TRICKS[trick], tests=tests)
    assert time.perf_counter() - start < 10
    assert tests == ["assert add(1, 2) == 90207", "assert isinstance(add(1, 2), int)"]


def test_a_program_that_does_not_end_is_killed_in_time(monkeypatch):
    monkeypatch.setattr(rewards, "SECONDS", 1)
    endless = "try:\n    while True: pass\nexcept BaseException: pass"
    forever = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    sleep = "import time\ntime.sleep(60)"
    start = time.perf_counter()
    assert scores(rewards.python_tests, endless, forever, sleep, tests=TESTS) == [0, 0, 0]
    assert time.perf_counter() - start < 10
    assert_programs(0, ADD, tests=["while True: pass\nassert add(1, 2) == 3"])


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not limit address space")
def test_memory_is_limited():
    half = ADD + "x = bytearray(2**28)"
    bomb = ADD + "x = bytearray(2**30)"
    slow = ADD + "x = []\nwhile True: x.append(bytearray(2**24))"
    assert scores(rewards.python_tests, half, bomb, slow, tests=TESTS) == [1, 0, 0]
    caught = ADD + "try:\n    x = bytearray(2**30)\nexcept MemoryError: pass"
    assert_programs(1, caught)


REFUSED = f"""
import os, socket
try:
    {{}}
except PermissionError:
    pass
else:
    raise ValueError
{ADD}"""


def test_no_connection_can_be_opened():
    server = socket.create_server(("127.0.0.1", 0))
    accepted = []

    def accept():
        while True:
            try:
                accepted.append(server.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    address = server.getsockname()
    socket.create_connection(address).close()  # that it listens
    attempts = [f"socket.create_connection({address})", "socket.getaddrinfo('localhost', 80)"]
    attempts += [f"socket.socket().connect_ex({address})"]
    attempts += [f"__import__('_socket').socket().connect({address})"]
    attempts += [f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', {address})"]
    attempts += ["socket.socket().bind(('127.0.0.1', 0))"]
    assert_programs(1, *(REFUSED.format(attempt) for attempt in attempts))
    attempts += [f"__import__('urllib.request').request.urlopen('http://127.0.0.1:{address[1]}')"]
    assert_programs(0, *(f"import socket\n{attempt}\n{ADD}" for attempt in attempts))
    server.close()
    assert len(accepted) == 1


def test_no_process_is_started_and_no_file_is_changed(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    attempts = ["os.fork()", "os.system('true')", "__import__('subprocess').run(['true'])"]
    attempts += ["__import__('multiprocessing').Process(target=print).start()"]
    attempts += ["os.execv('/bin/true', ['true'])", "os.kill(os.getppid(), 0)"]
    attempts += ["__import__('ctypes').CDLL(None)", "open('made_in_its_own_folder', 'w')"]
    attempts += [
        "(__import__('sys').modules.pop('_posixsubprocess'), __import__('_posixsubprocess'))"
    ]
    attempts += ["__import__('resource').prlimit(os.getppid(), 0, (1, 1))"]
    attempts += ["__import__('sqlite3').connect('made')", "os.chdir('/tmp')"]
    attempts += [f"open({str(kept)!r}, 'w')", f"open({str(kept)!r}, 'r+')"]
    attempts += [f"os.open({str(kept)!r}, os.O_RDONLY | os.O_TRUNC)"]
    attempts += [f"open({str(tmp_path / 'made')!r}, 'x')", f"os.mkdir({str(tmp_path / 'made')!r})"]
    attempts += [f"os.remove({str(kept)!r})", f"os.rename({str(kept)!r}, {str(kept)!r} + '2')"]
    attempts += [f"__import__('shutil').rmtree({str(tmp_path)!r})"]
    assert_programs(1, *(REFUSED.format(attempt) for attempt in attempts))
    assert kept.read_text() == "as it was" and os.listdir(tmp_path) == ["kept"]
    reads = [f"open({str(kept)!r})", f"os.open({str(kept)!r}, os.O_RDONLY)", "os.listdir()"]
    reads += ["open('/proc/self/environ')", f"open(os.__file__ + '/../../../..' + {str(kept)!r})"]
    reads += ["os.listdir('/')", f"open({str(kept).encode()!r})", f"os.scandir({str(tmp_path)!r})"]
    reads += [f"open(type('s', (str,), {{'startswith': lambda *_: 1}})({str(kept)!r}))"]
    assert_programs(1, *(REFUSED.format(read) for read in reads))
    assert_programs(1, f"assert open(__import__('os').__file__).read()\n{ADD}")  # but Python's own


@pytest.fixture
def unwatched(monkeypatch):
    """Python refuses nothing: what is left are the limits and the kernel's walls."""
    runner = rewards.RUNNER.replace("sys.addaudithook(audit)", "").replace('job["silent"]', "()")
    runner = runner.replace('fake = sys.modules["_posixsubprocess"] =', "fake =")
    monkeypatch.setattr(rewards, "RUNNER", runner)
    monkeypatch.setattr(rewards, "SECONDS", 2)


@pytest.fixture
def folder():
    """One in which a program may write: root's programs run as nobody."""
    path = tempfile.mkdtemp()
    os.chmod(path, 0o777)
    yield Path(path)
    shutil.rmtree(path)


apart = "unshare" in rewards._find_walls()
needs_walls = pytest.mark.skipif(not apart, reason="the kernel permits no namespaces here")


@pytest.mark.parametrize("session", ["", pytest.param("os.setsid()", marks=needs_walls)])
@pytest.mark.parametrize("end", ["", "os._exit(0)", "while True: pass"])
def test_a_process_left_running_is_killed(end, session, folder, unwatched):
    """Were a program to start one in spite of all, it dies with the program's."""
    fifo = folder / "fifo"
    os.mkfifo(fifo)  # its reader meets the end of the file when the last writer is dead
    os.chmod(fifo, 0o666)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    program = (
        f"import os, time\nfd = os.open({str(fifo)!r}, os.O_WRONLY | os.O_NONBLOCK)\n"
        f"if os.fork() == 0:\n    {session or 'pass'}\n    os.write(fd, b'started')\n"
        "    time.sleep(60)\n"
    )
    start = time.perf_counter()
    scores(rewards.python_tests, program + "time.sleep(0.2)\n" + ADD + end, tests=TESTS)
    os.set_blocking(reader, True)
    assert os.read(reader, 100) == b"started"
    assert os.read(reader, 100) == b""
    assert time.perf_counter() - start < 10
    os.close(reader)


@needs_walls
def test_the_kernel_hides_other_processes_and_the_network(unwatched):
    server = socket.create_server(("127.0.0.1", 0))
    alone = "import os, socket\nassert os.getpid() == 1 and os.getppid() == 0\n"
    alone += "assert [p for p in os.listdir('/proc') if p.isdigit()] == ['1']\n"
    alone += f"assert socket.socket().connect_ex({server.getsockname()}) != 0\n"
    assert_programs(1, alone + ADD)
    server.close()


def test_what_a_program_leaves_behind_stops_nothing(folder, unwatched):
    shut, large = str(folder / "shut"), str(folder / "large")
    shut = f"import os\nos.makedirs({shut!r} + '/inside')\nos.chmod({shut!r}, 0)\n{ADD}"
    large = f"with open({large!r}, 'wb') as file: file.write(bytes(10**7))\n{ADD}"
    many = f"files = [open(os.__file__) for _ in range(100)]\n{ADD}"
    assert_programs(1, shut)
    assert_programs(0, large, "import os\n" + many)
    assert os.path.getsize(folder / "large") == rewards.RESULTS
    os.chmod(folder / "shut", 0o700)


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(rewards.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SECRET", "x")
    assert_programs(1, f"import os\nassert 'SECRET' not in os.environ\n{ADD}")
    monkeypatch.setattr(rewards, "SECONDS", 1)
    assert_programs(0, "while True: pass")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- TRL


@pytest.mark.parity
@pytest.mark.slow
def test_they_run_in_trl(tmp_path):
    datasets = pytest.importorskip("datasets", reason="trl is not installed")
    trl = pytest.importorskip("trl", reason="trl is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "data/arithmetic/tokenizer")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("eos", "pad")}
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.eos_token_id, **sizes, **ids
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in (ROOT / "data/arithmetic/prompts_train.jsonl").open()]
    rows = [row | {"tests": ["assert True"]} for row in rows[:8]]
    rows[0]["answer"] = rows[1]["tests"] = None
    sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6}
    sizes |= {"max_steps": 2, "logging_steps": 1}
    quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False}
    trainer = trl.GRPOTrainer(
        model=str(tmp_path / "model"),
        reward_funcs=list(FUNCTIONS.values()),
        args=trl.GRPOConfig(output_dir=str(tmp_path / "run"), **sizes, **quiet),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    for step in trainer.state.log_history[:2]:
        assert all(math.isfinite(step[f"rewards/{name}/mean"]) for name in FUNCTIONS)
