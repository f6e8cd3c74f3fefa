"""Tests a folder that make.py made, and prints what is done.

    python exercises/check.py my_course          # all phases, some minutes
    python exercises/check.py my_course 5 6      # these phases

`pytest my_course/test_phase_5.py` shows the same failures in full.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make import fail, read_exercises


class Result(NamedTuple):
    exercise: str  # "5.2"
    test: str
    passed: bool
    message: str  # of a failure


class Results:
    """A pytest plugin that keeps the result of each test."""

    def __init__(self):
        self.found = []
        self.broken = ""  # why the tests could not be collected

    def pytest_collectreport(self, report):
        if report.failed:
            self.broken = report.longreprtext

    def pytest_runtest_logreport(self, report):
        number = re.match(r"test_(\d)_(\d)", report.location[2])
        if not number or (report.when != "call" and report.passed):
            return
        text = report.longreprtext
        crash = getattr(report.longrepr, "reprcrash", None)
        message = (crash.message if crash else text).removeprefix("AssertionError: ")
        name = report.location[2]
        self.found.append(Result(".".join(number.groups()), name, report.passed, message))


def run(folder, phase, *options):
    """The Results of one phase's tests in a folder."""
    results = Results()
    path = f"{folder}/test_phase_{phase}.py"
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "--import-mode=prepend"]
    pytest.main([path, *quiet, *options], plugins=[results])
    return results


def state(exercise, results):
    """One word or sentence on an exercise."""
    own = [x for x in results.found if x.exercise == exercise.number]
    failed = [x for x in own if not x.passed]
    if results.broken:
        lines = results.broken.strip().splitlines()
        return "cannot be read: " + next((x[2:].strip() for x in lines[::-1] if x[:1] == "E"), "")
    if not failed:
        return "done" if own else "has no tests"
    missing = re.match(r"EXERCISE (\d\.\d)", failed[0].message)
    if missing and missing[1] == exercise.number:
        return "to do"
    if missing:
        return f"needs {missing[1]} first"
    right = f"{len(own) - len(failed)} of {len(own)} tests pass"
    return f"{right}; {failed[0].message.splitlines()[0]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="made by make.py")
    parser.add_argument("phases", nargs="*", help="1 to 8; default: all")
    arguments = parser.parse_args()
    exercises = read_exercises()
    phases = arguments.phases or sorted({x.number[0] for x in exercises})
    done = count = 0
    for phase in phases:
        if not Path(arguments.folder, f"test_phase_{phase}.py").exists():
            fail(f"{arguments.folder} has no test_phase_{phase}.py: exercises/make.py makes one")
        results = run(arguments.folder, phase)
        for exercise in [x for x in exercises if x.number[0] == phase]:
            word = state(exercise, results)
            done, count = done + (word == "done"), count + 1
            title = f"{exercise.title} ({exercise.script}.py)"
            print(f"{exercise.number}  {title:60}  {word}", flush=True)
    print(f"{done} of {count} done")


if __name__ == "__main__":
    main()
