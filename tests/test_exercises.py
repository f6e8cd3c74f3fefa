"""The course: its texts name what exists, its tests tell right from wrong.

Each exercise's tests pass with the reference, fail with the placeholder, and fail on wrong attempts
(wrong_attempts.py) with words that say what is wrong. They run in this process, on a copy of the
script with one text replaced.
"""

import ast
import importlib.util
import os
import re
import subprocess
import sys

import jax
import pytest
from conftest import ROOT
from wrong_attempts import WRONG

COURSE = ROOT / "exercises"
sys.path.insert(0, str(COURSE))
import check
import make

EXERCISES = {x.number: x for x in make.read_exercises()}
NUMBERS = sorted(EXERCISES)
# These compile models, so their wrong attempts are tried with the long tests.
WITH_MODELS = ["2.1", "2.2", "2.3", "2.4", "3.2", "3.3", "4.1", "4.3", "5.5", "6.1", "6.3", "7.1"]
WITH_MODELS += ["8.2"]


def source(exercise):
    return (ROOT / f"{exercise.script}.py").read_text("utf-8")


def load(script, text):
    """A module of a script's name with another text, in the place of the script."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[script] = module
    exec(compile(text, f"{script}.py", "exec"), module.__dict__)


@pytest.fixture
def results():
    """results(exercise, text of its script) -> what the exercise's tests say of it."""
    modules, path, environment = dict(sys.modules), list(sys.path), dict(os.environ)
    jax.config.update("jax_disable_most_optimizations", True)  # compiled sooner

    def forget():
        for name in [x for x in sys.modules if re.match("course$|conftest$|test_phase_", x)]:
            del sys.modules[name]

    def run(exercise, text, *options):
        forget()
        load(exercise.script, text)
        selected = f"test_{exercise.number.replace('.', '_')}_"
        return check.run(COURSE, exercise.number[0], "-k", selected, *options)

    yield run
    jax.config.update("jax_disable_most_optimizations", False)
    forget()
    sys.modules.update(modules)
    sys.path[:] = path
    # The course's conftest.py sets variables, which processes that later tests start would take.
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_behind():
    """Variables of the course in the environment would change what later tests start."""
    found = lambda: {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}  # noqa: E731
    before = found()
    yield
    assert found() == before


# ------------------------------------------------------------------------------------------- texts


def test_at_least_the_27():
    counts = [sum(x[0] == str(phase) for x in NUMBERS) for phase in range(1, 9)]
    assert all(found >= wanted for found, wanted in zip(counts, [4, 3, 3, 3, 5, 3, 3, 3])), counts


@pytest.mark.parametrize("number", NUMBERS)
def test_names_existing_functions(number):
    exercise = EXERCISES[number]
    tree = ast.parse(source(exercise))
    for name in exercise.functions:
        node = make.find_definition(tree, name)
        place = f"exercises/phase_{number[0]}.md, exercise {number}"
        assert node is not None, f"{place}: {exercise.script}.py has no {name} any more"


@pytest.mark.parametrize("number", NUMBERS)
def test_text_is_whole(number):
    exercise = EXERCISES[number]
    parts = ["**What it achieves.**", "**Why JAX.**", "**Hints.**", "**Reading.**"]
    places = [exercise.text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places), f"{number} lacks one of {parts}"
    hints = re.findall(r"^(\d)\. ", exercise.text, re.MULTILINE)
    assert 3 <= len(hints) <= 6 and hints == [str(i + 1) for i in range(len(hints))], hints
    for earlier in re.findall(r"\d\.\d", exercise.after):
        assert earlier in NUMBERS and earlier < number, f"{number} comes after {earlier}"


def test_index_is_current():
    wanted = make.index(list(EXERCISES.values()))
    text = (COURSE / "README.md").read_text("utf-8")
    assert wanted in text, "python exercises/make.py --index prints the table of the README"


# ------------------------------------------------------------------------------- the course's tests


@pytest.mark.parametrize("number", NUMBERS)
def test_placeholder_fails(number, results):
    """That the reference passes is seen below, where a whole course is made and solved."""
    exercise = EXERCISES[number]
    blank = make.blank(source(exercise), [exercise], exercise.script)
    found = results(exercise, blank).found
    assert found
    for result in found:
        message = f"EXERCISE {number} is not written yet: {exercise.script}.py"
        assert not result.passed and result.message.startswith(message), result


def all_attempts():
    for number, found in WRONG.items():
        for attempt in found:
            marks = [pytest.mark.long] if number in WITH_MODELS else []
            yield pytest.param(number, attempt, id=f"{number} {attempt[0]}", marks=marks)


def test_two_wrong_attempts_at_each():
    assert [x for x in NUMBERS if len(WRONG.get(x, [])) < 2] == []


@pytest.mark.parametrize(("number", "attempt"), list(all_attempts()))
def test_wrong_attempt_is_named(number, attempt, results):
    exercise = EXERCISES[number]
    what, function, right, wrong, words = attempt
    text = source(exercise)
    node = make.find_definition(ast.parse(text), function)
    lines = text.splitlines(keepends=True)
    first = node.lineno - 1 if ast.get_docstring(node) is None else node.body[0].end_lineno
    body = "".join(lines[first : node.end_lineno])
    gone = f"{what!r} of {number} edits a text that {function} no longer has: {right}"
    assert right in body, gone
    lines[first : node.end_lineno] = [body.replace(right, wrong, 1)]
    failed = [x for x in results(exercise, "".join(lines), "-x").found if not x.passed]
    assert failed, f"no test of {number} fails on {what!r}"
    assert "Error" not in failed[0].message.split(":")[0], f"no message of ours: {failed[0]}"
    assert words in failed[0].message, f"{what!r}: {failed[0].message}"


# ------------------------------------------------------------------------------------- the commands


def command(*arguments, cwd=ROOT):
    arguments = [sys.executable, *map(str, arguments)]
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True)


def test_make_writes_a_new_folder_only(tmp_path):
    folder = tmp_path / "my course"
    made = command("exercises/make.py", folder)
    assert made.returncode == 0, made.stderr
    for exercise in EXERCISES.values():
        text = (folder / f"{exercise.script}.py").read_text("utf-8")
        assert f"# EXERCISE {exercise.number}: {exercise.title}" in text.replace("    #", "#")
        assert f'raise NotImplementedError("EXERCISE {exercise.number}")' in text
        assert max(map(len, text.splitlines())) <= 100
        docstring = ast.get_docstring(
            make.find_definition(ast.parse(source(exercise)), exercise.functions[0])
        )
        assert docstring is None or docstring.splitlines()[0] in text
    again = command("exercises/make.py", folder)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and "exists" in again.stderr


def test_a_function_that_is_gone_is_named(tmp_path, error_line):
    exercise = EXERCISES["5.2"]
    gone = source(exercise).replace("def compute_gae", "def estimate_advantages")
    line = error_line(make.blank, gone, [exercise], "ppo.py")
    assert "phase_5.md, exercise 5.2: ppo.py has no compute_gae any more" in line


@pytest.mark.slow
def test_a_course_from_beginning_to_end(tmp_path):
    """Made anew nothing is done; with the reference's scripts all is, and phase 3's file trains."""
    folder = tmp_path / "course"
    assert command("exercises/make.py", folder).returncode == 0
    before = command("exercises/check.py", folder)
    assert f"\n0 of {len(NUMBERS)} done\n" in before.stdout, before.stdout
    left = [
        line for line in before.stdout.splitlines() if re.search("to do$|needs .* first$", line)
    ]
    assert len(left) == len(NUMBERS), before.stdout
    for exercise in EXERCISES.values():
        (folder / f"{exercise.script}.py").write_text(source(exercise), "utf-8")
    after = command("exercises/check.py", folder)
    assert f"{len(NUMBERS)} of {len(NUMBERS)} done\n" in after.stdout, after.stdout
    (folder / "few.jsonl").write_text(
        "".join((folder / "data/reviews/sft_train.jsonl").read_text("utf-8").splitlines(True)[:64])
    )
    few = "--dataset few.jsonl --eval-dataset few.jsonl --epochs 2 --n-layer 1 --batch-size 16"
    trained = command("sft.py", *few.split(), "--micro-batch-size", "8", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert (folder / "runs/sft/model/model.safetensors").exists()
