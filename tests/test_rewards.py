"""rewards.py: every function's values, and what a program under test cannot do."""

import ast
import inspect
import json
import math
import os
import random
import socket
import sys
import threading
import time

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
    names += ["diversity_bonus", "tag_format", "valid_json", "numeric_answer", "python_tests"]
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
    assert FUNCTIONS[name](prompts=[], completions=[], answer=[], tests=[]) == []


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
    columns = {"answer": "3", "tests": TESTS}
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

    rows = [{"prompt": "2+3=", "answer": "5"}, {"prompt": "no answer"}]
    function = ppo.load_function(str(ROOT / "rewards.py") + ":numeric_answer")
    assert ppo.call_reward(function, rows, ["5", "5"]).tolist() == [1, 0]


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
    wrong = [("", "5"), ("five", "5"), ("-5", "5"), ("5", "-5"), ("10-3", "-3"), ("5.01", "5")]
    wrong += [("55", "5"), ("5 or 6", "5"), ("1,234", "234"), ("12,34", "1234")]
    wrong += [("5 ####", "5"), ("5 #### none", "5"), ("#### 6, no: it is 5", "5")]
    wrong += [("6", "5\n#### 5, not 6"), ("0.1000000000000000000000000001", "0.1")]
    wrong += [("9" * 5_000, "9" * 4_999 + "8")]  # more digits than a float or Python's int() reads
    wrong += [("\u0665", "5")]  # another script's five
    wrong += [("1e999", "5"), ("NaN", "5"), ("inf", "5")]
    for pairs, score in ((right, 1), (wrong, 0)):
        texts, answers = zip(*pairs)
        found = rewards.numeric_answer(["p"] * len(pairs), texts, answer=answers)
        assert [pair for pair, x in zip(pairs, found) if x != score] == []


def test_numeric_answer_does_not_apply_without_an_answer():
    found = rewards.numeric_answer(["p"] * 4, ["5"] * 4, answer=["5", None, "unknown", ""])
    assert found == [1, None, None, None]
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


def test_the_token_is_not_where_a_program_looks(monkeypatch):
    """With a token that this test knows: it is not in what was read, which does not pass as it."""
    monkeypatch.setattr(rewards.secrets, "token_hex", lambda _: "0123456789abcdef" * 2)
    places = ["__import__('sys').stdin.read()", "os.read(0, 100).decode()"]
    places += ["' '.join(__import__('sys').argv)", "str(dict(os.environ))"]
    places += ["open('/proc/self/cmdline').read()", "open('job.json').read()"]
    places += ["str(os.listdir('.'))", "str(vars(__import__('__main__')))"]
    places += ["str([(f := __import__('sys')._getframe(1)).f_globals, f.f_locals])"]
    read = "import os\ntry:\n    token = {}\nexcept OSError:\n    token = ''\n"
    reads = [read.format(place) for place in places]
    forge = "for fd in range(3):\n    os.write(fd, token.encode())\nos._exit(0)"
    check = "assert '0123456789abcdef' * 2 not in token\n" + ADD
    assert_programs(1, *(read + check for read in reads))
    assert_programs(0, *(read + forge for read in reads))


def test_a_program_that_does_not_end_is_killed_in_time(monkeypatch):
    monkeypatch.setattr(rewards, "SECONDS", 1)
    endless = "try:\n    while True: pass\nexcept BaseException: pass"
    forever = "while True:\n    try:\n        while True: pass\n    except BaseException: pass"
    sleep = "import time\ntime.sleep(60)"
    start = time.perf_counter()
    assert scores(rewards.python_tests, endless, forever, sleep, tests=TESTS) == [0, 0, 0]
    assert time.perf_counter() - start < 10
    assert_programs(0, ADD, tests=["while True: pass"])


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
    attempts += [f"open({str(kept)!r}, 'w')", f"open({str(kept)!r}, 'r+')"]
    attempts += [f"os.open({str(kept)!r}, os.O_RDONLY | os.O_TRUNC)"]
    attempts += [f"open({str(tmp_path / 'made')!r}, 'x')", f"os.mkdir({str(tmp_path / 'made')!r})"]
    attempts += [f"os.remove({str(kept)!r})", f"os.rename({str(kept)!r}, {str(kept)!r} + '2')"]
    attempts += [f"__import__('shutil').rmtree({str(tmp_path)!r})"]
    assert_programs(1, *(REFUSED.format(attempt) for attempt in attempts))
    assert kept.read_text() == "as it was" and os.listdir(tmp_path) == ["kept"]
    assert_programs(1, f"assert open({str(kept)!r}).read() == 'as it was'\n{ADD}")  # may be read


@pytest.mark.parametrize("end", ["", "os._exit(0)", "while True: pass"])
def test_a_process_left_running_is_killed(end, tmp_path, monkeypatch):
    """Were a program to start one in spite of all, it dies with the program's process group."""
    monkeypatch.setattr(rewards, "REFUSED", ())
    monkeypatch.setattr(rewards, "SECONDS", 2)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)  # its reader meets the end of the file when the last writer is dead
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    program = (
        f"import os, time\nfd = os.open({str(fifo)!r}, os.O_WRONLY | os.O_NONBLOCK)\n"
        "if os.fork() == 0:\n    os.write(fd, b'started')\n    time.sleep(60)\n"
    )
    monkeypatch.setattr(rewards, "RUNNER", rewards.RUNNER.replace('event == "open"', "False"))
    start = time.perf_counter()
    scores(rewards.python_tests, program + "time.sleep(0.2)\n" + ADD + end, tests=TESTS)
    os.set_blocking(reader, True)
    assert os.read(reader, 100) == b"started"
    assert os.read(reader, 100) == b""
    assert time.perf_counter() - start < 10
    os.close(reader)


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
