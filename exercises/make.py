"""Makes the course: copies of the scripts without the functions that you are to write.

    python exercises/make.py my_course           # makes the folder my_course
    python exercises/make.py --index             # the table of exercises/README.md

The exercises stand in phase_1.md to phase_8.md beside this file; each names its functions. In the
copies their bodies are `raise NotImplementedError("EXERCISE 5.2")`, with the exercise's text above.
The solutions are the scripts themselves.
"""

import argparse
import ast
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# What the scripts, the tests and a run on the embedded data need beside the scripts with exercises.
ALSO = ["evaluate.py", "rewards.py", "data/reviews.py", "data/reviews"]
HEADING = re.compile(r"^## (\d\.\d) (.+)$", re.MULTILINE)
# `ppo.py`: `compute_gae` · lax.scan · 60 minutes · after 1.5, 5.1
FACTS = re.compile(r"^`(\w+)\.py`: (`.+`) · (.+) · (\d+) minutes · after (.+)$", re.MULTILINE)


class Exercise(NamedTuple):
    number: str  # "5.2"
    title: str
    script: str  # "ppo"
    functions: list  # ["compute_gae"]; in a class or a function: ["Block.__call__"]
    concept: str  # of JAX
    minutes: int
    after: str  # numbers of exercises, or "nothing"
    text: str  # Markdown


def fail(message):
    """Ends with one sentence and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_exercises(folder=HERE):
    """All exercises of phase_*.md, in order."""
    found = []
    for path in sorted(folder.glob("phase_*.md")):
        _, *parts = HEADING.split(path.read_text("utf-8"))
        for number, title, text in zip(parts[::3], parts[1::3], parts[2::3]):
            facts = FACTS.search(text)
            if not facts:
                fail(f"{path.name}, exercise {number}: no line like `ppo.py`: `f` · …")
            script, functions, concept, minutes, after = facts.groups()
            functions = re.findall("`([^`]+)`", functions)
            text = text[facts.end() :].strip()
            found.append(
                Exercise(number, title, script, functions, concept, int(minutes), after, text)
            )
    return found


def find_definition(tree, name):
    """The node of a definition in a module: "f", "Class.method" or "f.inner"; None if absent."""
    node = tree
    for part in name.split("."):
        inner = [x for x in node.body if isinstance(x, ast.FunctionDef | ast.ClassDef)]
        node = next((x for x in inner if x.name == part), None)
        if node is None:
            return None
    return node


def as_comment(exercise, indent, width=99):
    """The exercise's text as lines of comments."""
    facts = f"{exercise.concept} · {exercise.minutes} minutes · after {exercise.after}"
    lines = [f"EXERCISE {exercise.number}: {exercise.title}", "", facts, ""]
    was_item = False
    for paragraph in re.split(r"\n\n|\n(?=\d\. )", exercise.text.replace("**", "")):
        is_item = re.match(r"\d\. ", paragraph) is not None
        if lines[-1] and not (is_item and was_item):
            lines.append("")
        text, hang, was_item = " ".join(paragraph.split()), "   " * is_item, is_item
        lines += textwrap.wrap(text, width - 2 - len(indent), subsequent_indent=hang)
    rule = indent + "# " + "~" * (width - 2 - len(indent))
    return [rule, *(f"{indent}# {line}".rstrip() for line in lines), rule]


def blank(source, exercises, file):
    """A script's text with the functions of these exercises taken out."""
    tree, lines, edits = ast.parse(source), source.splitlines(), []
    for exercise in exercises:
        for i, name in enumerate(exercise.functions):
            node = find_definition(tree, name)
            if node is None:
                phase = f"exercises/phase_{exercise.number[0]}.md"
                fail(f"{phase}, exercise {exercise.number}: {file} has no {name} any more")
            has_docstring = ast.get_docstring(node) is not None
            body = node.body[0].end_lineno + 1 if has_docstring else node.body[0].lineno
            above = min([node.lineno, *(x.lineno for x in node.decorator_list)])
            indent = " " * node.col_offset
            comment = [
                f"{indent}# EXERCISE {exercise.number}, too; its text: {exercise.functions[0]}"
            ]
            edits.append((above, body, node.end_lineno, indent, exercise, comment * bool(i)))
    for above, body, end, indent, exercise, comment in sorted(
        edits, reverse=True, key=lambda x: x[0]
    ):
        lines[body - 1 : end] = [
            f'{indent}    raise NotImplementedError("EXERCISE {exercise.number}")'
        ]
        lines[above - 1 : above - 1] = comment or as_comment(exercise, indent)
    return "\n".join(lines) + "\n"


def make(folder, exercises):
    """Writes the course into a new folder."""
    folder = Path(folder)
    if folder.exists():
        fail(f"{folder} exists, and may hold your work: name another folder")
    folder.mkdir(parents=True)
    for script in dict.fromkeys(x.script for x in exercises):
        source = (ROOT / f"{script}.py").read_text("utf-8")
        own = [x for x in exercises if x.script == script]
        (folder / f"{script}.py").write_text(blank(source, own, f"{script}.py"), "utf-8")
    texts = [*HERE.glob("*.md"), *HERE.glob("test_phase_*.py")]
    for path in [*texts, HERE / "conftest.py", HERE / "course.py"]:
        shutil.copyfile(path, folder / path.name)
    for name in ALSO:
        source, target = ROOT / name, folder / name
        if target.exists():  # it has exercises
            continue
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    (folder / ".gitignore").write_text("*\n", "utf-8")  # yours alone


def index(exercises):
    """The table of exercises/README.md."""
    lines = ["| | exercise | function | JAX | minutes | after |", "|---|---|---|---|---|---|"]
    for x in exercises:
        functions = ", ".join(f"`{name}`" for name in x.functions)
        title = f"[{x.title}](phase_{x.number[0]}.md)"
        where = f"{functions} in `{x.script}.py`"
        lines.append(f"| {x.number} | {title} | {where} | {x.concept} | {x.minutes} | {x.after} |")
    hours = sum(x.minutes for x in exercises) / 60
    return "\n".join(lines) + f"\n\n{len(exercises)} exercises, {hours:.0f} hours.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="the new folder")
    parser.add_argument("--index", action="store_true", help="print the table of the exercises")
    arguments = parser.parse_args()
    exercises = read_exercises()
    if arguments.index:
        print(index(exercises), end="")
    elif arguments.folder:
        make(arguments.folder, exercises)
        first = "Begin with the text above init_linear in"
        print(f"{arguments.folder}: {len(exercises)} exercises. {first}")
        print(f"{arguments.folder}/jax_basics.py, then: pytest {arguments.folder}/test_phase_1.py")
    else:
        parser.error("name the folder to make, such as my_course")


if __name__ == "__main__":
    main()
