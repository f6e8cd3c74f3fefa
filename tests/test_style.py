"""The scripts as texts: equal copies, one order, every flag read and explained, no globals."""

import ast
import builtins
import dataclasses
import importlib
import subprocess
import sys
import typing

import pytest
import sync_blocks
import tyro
from conftest import ROOT

SCRIPTS = [name for name in sync_blocks.SCRIPTS if (ROOT / f"{name}.py").exists()]
ALL = [*SCRIPTS, "evaluate"]
SECTIONS = [
    "tokenizer and data",
    "model",
    "mesh",
    "checkpoints and run folder",
    "generation",
    "losses",
    "update",
    "main",
]
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
each_script = pytest.mark.parametrize("name", SCRIPTS)
every_file = pytest.mark.parametrize("name", ALL)


def source(name):
    return (ROOT / f"{name}.py").read_text("utf-8")


def tree(name):
    return ast.parse(source(name))


def length(node):
    """Lines of a function, decorators not counted."""
    return node.end_lineno - node.lineno + 1


def fields(name):
    """{name: type} of a script's flags."""
    cls = importlib.import_module(name).Args
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


# ------------------------------------------------------------------------------ copies


def test_copies_are_identical():
    assert sync_blocks.differences() == []


def test_most_of_a_script_is_shared():
    """The check above sees something: these are in every training script."""
    shared = set.intersection(
        *(set(sync_blocks.blocks(ROOT / f"{name}.py")) for name in SCRIPTS if name != "gpt2")
    )
    expected = {"fail", "load_tokenizer", "GPT2Config", "GPT2", "load_model", "save_model"}
    assert expected | {"RunFolder", "generate", "accumulate_gradients"} <= shared
    assert not expected & set(sync_blocks.DIFFERENT)


def find_and_repair(monkeypatch):
    """Runs the tool as a command: it finds a difference, rewrites the copy, finds none."""
    for arguments, status in (([], 1), (["--write"], 0), ([], 0)):
        monkeypatch.setattr(sys, "argv", ["sync_blocks.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            sync_blocks.main()
        assert bool(stop.value.code) == bool(status)


@pytest.mark.parametrize(
    "before, after",
    [
        ("raise SystemExit(2)", "raise SystemExit(3)"),
        ("class GPT2Config:", "class GPT2Config:\n    # another comment"),
        ("@dataclass(frozen=True)\nclass GPT2Config", "@dataclass\nclass GPT2Config"),
    ],
)
def test_a_changed_copy_is_found_and_repaired(before, after, tmp_path, monkeypatch):
    for name in ("gpt2", "sft"):
        (tmp_path / f"{name}.py").write_text(source(name), "utf-8")
    assert source("sft").count(before) == 1
    (tmp_path / "sft.py").write_text(source("sft").replace(before, after), "utf-8")
    monkeypatch.setattr(sync_blocks, "ROOT", tmp_path)
    ((block, owner, copy),) = sync_blocks.differences()
    assert block in ("fail", "GPT2Config")
    assert (owner, copy) == (tmp_path / "gpt2.py", tmp_path / "sft.py")
    find_and_repair(monkeypatch)
    assert (tmp_path / "sft.py").read_text("utf-8") == source("sft")
    assert (tmp_path / "gpt2.py").read_text("utf-8") == source("gpt2")


@pytest.mark.parametrize(
    "before, after",
    [
        ('self.files[name].write(json.dumps(row) + "\\n")', "self.files[name].write(str(row))"),
        (
            "    def append(self, name, row):\n",
            "    # another comment\n    def append(self, name, row):\n",
        ),
        (
            "    def interrupt(self, *_):",
            "    def more(self):\n        pass\n\n    def interrupt(self, *_):",
        ),
        ("class RunFolder:", "class RunFolder(dict):"),
    ],
    ids=["body", "comment", "another method", "base class"],
)
def test_only_the_listed_methods_of_a_class_may_differ(before, after, tmp_path, monkeypatch):
    """sharded.py keeps its own RunFolder.start and .save, and nothing else of that class."""
    for name in ("sft", "sharded"):
        (tmp_path / f"{name}.py").write_text(source(name), "utf-8")
    monkeypatch.setattr(sync_blocks, "ROOT", tmp_path)
    owner, copy = tmp_path / "sft.py", tmp_path / "sharded.py"
    assert sync_blocks.differences() == []
    assert source("sharded").count(before) == 1
    copy.write_text(source("sharded").replace(before, after), "utf-8")
    assert sync_blocks.differences() == [("RunFolder", owner, copy)]
    find_and_repair(monkeypatch)
    assert copy.read_text("utf-8") == source("sharded") and owner.read_text("utf-8") == source(
        "sft"
    )


def test_what_may_differ_does():
    """An entry of DIFFERENT_IN is for a part that stands in both scripts, with two texts."""
    for script, part in sync_blocks.DIFFERENT_IN:
        own, owner = (sync_blocks.blocks(ROOT / f"{name}.py") for name in (script, "grpo"))
        assert own[part][2] != owner[part][2], part


# ------------------------------------------------------------------------------ flags


def reads_of_args(name):
    """Fields read as args.<field>, or taken out of RunFolder's self.args."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "args" and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
        elif isinstance(node, ast.ClassDef) and node.name == "RunFolder":
            calls = [x for x in ast.walk(node) if isinstance(x, ast.Call)]
            pops = [x for x in calls if isinstance(x.func, ast.Attribute) and x.func.attr == "pop"]
            taken = [x.args[0] for x in pops if ast.unparse(x.func.value) == "self.args"]
            found |= {name.value for name in taken if isinstance(name, ast.Constant)}
    return found


@every_file
def test_every_flag_is_read(name):
    unread = set(fields(name)) - reads_of_args(name)
    assert not unread, f"{name}.py never reads {sorted(unread)}"


@each_script
def test_args_are_frozen_and_hashable(name):
    """They are jit's static argument `args`; also where tyro has filled the repeatable flags."""
    cls = importlib.import_module(name).Args
    repeatable = {"reward": "f.py:f", "reward_weight": "2", "prompt": "It is"}
    line = []
    for field, value in repeatable.items():
        if str(fields(name).get(field, "")).startswith("typing.Annotated[tuple"):
            line += ["--" + field.replace("_", "-"), value] * 2
    args, again = (tyro.cli(cls, args=line) for _ in range(2))
    assert args == again and hash(args) == hash(again) != hash(cls(seed=17))
    for field in dataclasses.fields(cls):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(args, field.name, field.default)


@every_file
def test_only_flags_are_read(name):
    """No args.<something> that Args does not have."""
    assert reads_of_args(name) <= set(fields(name))


@every_file
def test_every_flag_is_explained(name):
    """By a comment at the end of its line, or in the line above."""
    lines = source(name).splitlines()
    args = next(x for x in tree(name).body if isinstance(x, ast.ClassDef) and x.name == "Args")
    for field in (x for x in args.body if isinstance(x, ast.AnnAssign)):
        beside = lines[field.end_lineno - 1][field.end_col_offset :].strip()
        above = lines[field.lineno - 2].strip()
        text = beside if beside else above
        assert text.startswith("# ") and len(text) > 8, f"{name}.py: {field.target.id}"


def test_a_flag_has_one_type_everywhere():
    types = {}  # evaluate.py aside, which may be told of a run's kl_coef, or not
    for name in SCRIPTS:
        for field, hint in fields(name).items():
            types.setdefault(field, {}).setdefault(str(hint), []).append(name)
    assert not {field: found for field, found in types.items() if len(found) > 1}


def test_training_scripts_share_their_flags():
    data = ["model", "dataset", "eval_dataset", "run_dir", "resume", "overwrite", "seed"]
    step = ["batch_size", "micro_batch_size", "learning_rate", "warmup_steps", "weight_decay"]
    rest = ["max_grad_norm", "max_prompt_length", "max_completion_length", "temperature"]
    common = [*data, *step, *rest, "log_every", "eval_every", "save_every"]
    for name in SCRIPTS:
        if name == "gpt2":
            continue
        flags = list(fields(name))
        assert set(common) <= set(flags), name
        assert [flag for flag in flags if flag in common] == common, f"{name}: another order"
        assert {"steps", "epochs"} & set(flags)


# ------------------------------------------------------------------------------ functions


def assigned_names(node):
    """Names that a function (or a lambda, comprehension …) binds anywhere inside itself."""
    found = set()
    for x in ast.walk(node):
        if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store):
            found.add(x.id)
        elif isinstance(x, ast.arg):
            found.add(x.arg)
        elif isinstance(x, (*DEFINITIONS, ast.ExceptHandler)):
            found.add(x.name)
        elif isinstance(x, ast.alias):  # imported inside the function
            found.add((x.asname or x.name).split(".")[0])
    return found


def top_level_names(name):
    """Names of a module that exist when it is imported: imports, functions, classes, constants."""
    found = set()
    for node in tree(name).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(x.asname or x.name).split(".")[0] for x in node.names}
        elif isinstance(node, DEFINITIONS):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {x.id for x in node.targets if isinstance(x, ast.Name)}
    return found


@every_file
def test_functions_read_no_global_args(name):
    """A function may have a parameter `args`; a global of that name is not there when lifted out.

    More: every global that a function reads exists where the script is imported, not run.
    """
    known = top_level_names(name) | set(dir(builtins))
    for node in tree(name).body:
        if isinstance(node, DEFINITIONS):
            read = {
                x.id
                for x in ast.walk(node)
                if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)
            }
            unknown = read - known - assigned_names(node)
            assert not unknown, f"{name}.py: {node.name} reads {unknown}"


@every_file
def test_functions_assign_no_globals(name):
    for node in ast.walk(tree(name)):
        assert not isinstance(node, ast.Global), f"{name}.py, line {node.lineno}"


@each_script
def test_scripts_import_no_other_script(name):
    others = {path.stem for path in ROOT.glob("*.py")} | {"tests", "data", "benchmarks"}
    for node in ast.walk(tree(name)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [x.name for x in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [node.module]
        assert not {module.split(".")[0] for module in modules} & others, f"{name}.py"


@each_script
def test_a_script_runs_alone(name, tmp_path):
    """Copied into an empty folder, it imports."""
    (tmp_path / f"{name}.py").write_text(source(name), "utf-8")
    line = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); import {name}"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr


@every_file
def test_functions_have_at_most_60_lines(name):
    """`main` aside, and of a class its methods, one by one."""
    long = {
        x.name: length(x)
        for x in ast.walk(tree(name))
        if isinstance(x, FUNCTIONS) and x.name != "main" and length(x) > 60
    }
    assert not long


@every_file
def test_public_functions_and_classes_have_docstrings(name):
    """Those at the top level; `main` and `Args` are what the module's own docstring is about."""
    assert ast.get_docstring(tree(name))
    lacking = [
        x.name
        for x in tree(name).body
        if isinstance(x, DEFINITIONS)
        and x.name not in ("main", "Args")
        and not x.name.startswith("_")
        and not ast.get_docstring(x)
    ]
    # A module's __call__ speaks for the small ones among the classes.
    classes = {x.name: x for x in tree(name).body if isinstance(x, ast.ClassDef)}
    lacking = [x for x in lacking if x not in ("Attention", "MLP", "Block") or x not in classes]
    assert not lacking


# ------------------------------------------------------------------------------ layout


def sections(name):
    lines = source(name).splitlines()
    return [line.lstrip("# -") for line in lines if line.startswith("# ----")]


@each_script
def test_sections_come_in_one_order(name):
    found = sections(name)
    assert found == [section for section in SECTIONS if section in found]
    assert {"tokenizer and data", "model", "losses", "main"} <= set(found)


@each_script
def test_shared_definitions_come_in_one_order(name):
    """So that a diff of two scripts aligns."""

    def shared(name):
        return [
            x for x in sync_blocks.blocks(ROOT / f"{name}.py") if x not in sync_blocks.DIFFERENT
        ]

    own = shared(name)
    for other in SCRIPTS:
        others = shared(other)
        assert [x for x in own if x in others] == [x for x in others if x in own], other


@every_file
def test_arguments_are_parsed_before_heavy_imports(name):
    """Docstring, light imports, Args, parse; the rest of the imports after that."""
    body = tree(name).body
    kinds = [type(node).__name__ for node in body]
    parse = kinds.index("If")
    assert ast.unparse(body[parse]).startswith("if __name__ == '__main__':\n    args = tyro.cli(")
    light = [x for x in body[:parse] if isinstance(x, ast.Import | ast.ImportFrom)]
    modules = {x.module if isinstance(x, ast.ImportFrom) else x.names[0].name for x in light}
    assert modules <= {"sys", "dataclasses", "typing", "tyro"}
    assert [x.name for x in body[:parse] if isinstance(x, ast.ClassDef)] == ["Args"]
    assert ast.unparse(body[-1]) == "if __name__ == '__main__':\n    main(args)"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_lines_have_at_most_100_columns(path):
    lines = path.read_text("utf-8").splitlines()
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 100]


@every_file
def test_the_docstring_says_how_to_run_it(name):
    text = ast.get_docstring(tree(name))
    assert f"python {name}.py" in text and len(text.splitlines()) >= 6
    used = {word.rstrip(",.;:)") for word in text.split() if word.startswith("--")}
    flags = {"--" + field.replace("_", "-") for field in fields(name)}
    flags |= {"--no-" + field.replace("_", "-") for field in fields(name)}
    assert used <= flags, f"{name}.py's docstring names flags that it does not have"
