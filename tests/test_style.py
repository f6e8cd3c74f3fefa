"""The scripts as texts: equal copies, one order, flags read and explained, parts to lift out."""

import ast
import builtins
import dataclasses
import dis
import importlib
import itertools
import re
import subprocess
import sys
import types
import typing

import jax
import numpy as np
import pytest
import sync_blocks
import tyro
from conftest import ROOT
from sync_blocks import SCRIPTS

# At most, in all and below the line: what they have. Lower these numbers, do not raise them; wanted
# are 540 below the line, and in all 540, 780, 860, 990, 940, 990, 940, 1180, 860.
LINES = {"gpt2": 613, "sft": 1123, "reward": 1179, "ppo": 1512, "dpo": 1327, "grpo": 1559}
LINES |= {"iterative_dpo": 1480, "sharded": 1721, "mixed_precision": 1213, "lora": 1427}
LINES |= {"grpo_llama": 2250}
LINES_BELOW = dict.fromkeys(SCRIPTS, 936) | {"lora": 942}  # which reads and writes adapters
LINES_BELOW |= {"iterative_dpo": 944, "sharded": 948}  # which keep the best model
LINES_BELOW |= {"grpo_llama": 1320}  # and has the chats and tokenizers of four families
FIRST_LOSS = dict.fromkeys(SCRIPTS, 130)  # the line of its `def`
FIRST_LOSS |= dict.fromkeys(["grpo", "sharded", "grpo_llama"], 175)
BANNER = f"""\
# {"=" * 98}
# The line. From here on the text is the same in every script that has it: read it once, in gpt2.py.
# {"=" * 98}
"""
ABOVE = ["losses", "update", "rollout", "main"]
BELOW = ["model", "sampling", "optimizer", "model folder", "tokenizer and data"]
BELOW += ["chats", "run folder"]
EXTRA = {"sharded": ["mesh"], "grpo_llama": ["mesh", "half precision"]}  # before main
EXTRA |= {"mixed_precision": ["half precision", "loss scaling"]}
# Flags of every training script, in this order.
COMMON = ["model", "dataset", "eval_dataset", "run_dir", "resume", "overwrite", "seed"]
COMMON += ["batch_size", "micro_batch_size", "learning_rate", "warmup_steps", "weight_decay"]
COMMON += ["max_grad_norm", "max_prompt_length", "max_completion_length", "temperature"]
COMMON += ["log_every", "eval_every", "save_every"]

IMPORTS = (ast.Import, ast.ImportFrom)
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)
each_script = pytest.mark.parametrize("name", SCRIPTS)
every_file = pytest.mark.parametrize("name", [*SCRIPTS, "evaluate"])


def source(name):
    return (ROOT / f"{name}.py").read_text("utf-8")


def tree(name):
    return ast.parse(source(name))


def definitions(name, below=0):
    """{name: text} of the top-level definitions from a line on, in the file's order; no methods."""
    found = sync_blocks.blocks(name).items()
    return {x: text for x, (first, _, text) in found if first >= below and "." not in x}


def definitions_below(name):
    text = source(name)
    assert text.count(BANNER) == 1, f"{name}.py has no line"
    return definitions(name, below=text[: text.index(BANNER)].count("\n"))


def functions(name):
    return [x for x in ast.walk(tree(name)) if isinstance(x, ast.FunctionDef)]


def flags(name):
    """{name: type} of a script's flags."""
    cls = importlib.import_module(name).Args
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


# ------------------------------------------------------------------------------------------ copies


@each_script
def test_copies_are_identical(name):
    found = [(x.name, x.owner) for x in sync_blocks.differences() if x.copy == name]
    assert not found, "python tests/sync_blocks.py shows the differences"


@each_script
def test_what_is_below_the_line_is_a_copy(name):
    """It stands below the line in its owner too: whoever has read it there may stop at the line.

    That the texts are equal is tested above.
    """
    owners = sync_blocks.owners({script: sync_blocks.blocks(script) for script in SCRIPTS})
    below = definitions_below(name)
    assert below and not set(below) & set(sync_blocks.DIFFERENT)
    for block in below:
        assert block in definitions_below(owners[block]), f"{block} of {owners[block]}.py"
    rest = ast.parse(source(name).split(BANNER)[1]).body
    assert len(rest) == len(below) + 1, "definitions alone, and the call of main"


@pytest.mark.parametrize("pair", list(itertools.combinations(SCRIPTS, 2)), ids="-".join)
def test_shared_definitions_come_in_one_order(pair):
    """So that a diff aligns."""
    one, other = (definitions(name) for name in pair)
    assert [x for x in one if x in other] == [x for x in other if x in one]


def test_what_may_differ_does():
    texts = {script: sync_blocks.blocks(script) for script in SCRIPTS}
    owners = sync_blocks.owners(texts)
    for script, part in sync_blocks.DIFFERENT_IN:
        owner = owners[part.split(".")[0]]
        assert texts[script][part][2] != texts[owner][part][2], f"{part} of {script}.py"


# ----------------------------------------------------------------------- the tool that keeps copies

OWNER = '''
import sys

# ------------------------------------------------------------------ run folder

# why it is 2
STATUS = 2


def fail(message):
    raise SystemExit(STATUS)


class RunFolder:
    """A run."""

    def start(self):
        return "as the owner does"

    # why it appends
    def append(self):
        return "a row"
'''
EDITS = {
    "body": ("SystemExit(STATUS)", "SystemExit(STATUS, 7)"),
    "comment above": ("# why it is 2", "# seven"),
    "decorator": ("def fail", "@decorated7\ndef fail"),
    "method": ('"a row"', '"7"'),
    "comment above a method": ("# why it appends", "# seven: 7"),
    "another method": ("    # why", "    def more(self):\n        return 7\n\n    # why"),
    "base class": ("class RunFolder", "class RunFolder(Base7)"),
}


@pytest.fixture
def three_scripts(tmp_path, monkeypatch):
    """Paths of gpt2.py, which owns all, and of sft.py and sharded.py, which have copies."""
    monkeypatch.setattr(sync_blocks, "ROOT", tmp_path)
    monkeypatch.setattr(sync_blocks, "DIFFERENT_IN", {("sharded", "RunFolder.start"): "Orbax"})
    paths = [tmp_path / f"{name}.py" for name in ("gpt2", "sft", "sharded")]
    for path in paths:
        path.write_text(OWNER, "utf-8")
    paths[2].write_text(OWNER.replace("as the owner does", "with Orbax"), "utf-8")
    assert sync_blocks.main([]) == 0  # the listed method may differ
    return paths


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_changed_copy_is_shown_and_rewritten_only_by_name(edit, three_scripts, capsys):
    path, before = three_scripts[2], [x.read_text("utf-8") for x in three_scripts]
    edited = before[2].replace(*edit)
    path.write_text(edited, "utf-8")
    for arguments in ([], ["--write"], ["--write", "gpt2", "sft"]):
        assert sync_blocks.main(arguments) == 1
        shown = capsys.readouterr().out
        assert re.search(r"^[+].*(7|seven)", shown, re.MULTILINE)
        assert "in gpt2.py" in shown and "--write sharded" in shown
        assert path.read_text("utf-8") == edited
    assert sync_blocks.main(["--write", "sharded.py"]) == 0
    assert re.search(r"^-.*(7|seven)", capsys.readouterr().out, re.MULTILINE)  # what was replaced
    assert [x.read_text("utf-8") for x in three_scripts] == before


def test_an_edit_in_the_owner_is_never_lost(three_scripts):
    owner, *copies = three_scripts
    edited = OWNER.replace(*EDITS["body"]).replace(*EDITS["method"])
    owner.write_text(edited, "utf-8")
    assert sync_blocks.main(["--write", "gpt2"]) == sync_blocks.main(["--write", "sft"]) == 1
    assert copies[0].read_text("utf-8") == owner.read_text("utf-8") == edited
    assert sync_blocks.main(["--write", "gpt2", "sft", "sharded"]) == 0
    assert copies[1].read_text("utf-8") == edited.replace("as the owner does", "with Orbax")
    with pytest.raises(SystemExit):
        sync_blocks.main(["--write", "sfd"])


# ------------------------------------------------------------------------------------------ layout


@each_script
def test_sections_and_the_line_come_in_order(name):
    text = source(name)
    assert (text.count(BANNER), text.count("# The line.")) == (1, 1)
    above, below = ([x for x in y.splitlines() if x[:5] == "# ---"] for y in text.split(BANNER))
    assert {len(line) for line in above + below} == {99}  # as in evaluate.py and the tests
    above, below = ([line.lstrip("# -") for line in lines] for lines in (above, below))
    for section in EXTRA.get(name, []):
        assert 0 < above.index(section) < above.index("main")
        above.remove(section)
    assert above == [section for section in ABOVE if section in above]
    assert below == [section for section in BELOW if section in below]
    assert above == ["main"] if name == "gpt2" else {"losses", "update", "main"} <= set(above)
    assert {"model", "sampling", "model folder", "tokenizer and data"} <= set(below)
    assert text.endswith('\n\n\nif __name__ == "__main__":\n    main(args)\n')


@every_file
def test_compiled_programs_are_kept(name):
    """But for those on a mesh: jax 0.5.0 must not read programs for several devices back."""
    before = source(name).partition("\nimport jax\n")[0]  # which reads the variable
    kept = name not in ("sharded", "grpo_llama")
    assert before.count('setdefault("JAX_COMPILATION_CACHE_DIR"') == kept


@every_file
def test_arguments_are_parsed_before_heavy_imports(name):
    """Docstring, light imports, Args, parse, so that --help answers at once."""
    body = tree(name).body
    before = list(itertools.takewhile(lambda node: not isinstance(node, ast.If), body))
    imported = {getattr(x, "module", None) or x.names[0].name for x in before if type(x) in IMPORTS}
    assert {x.split(".")[0] for x in imported} <= sys.stdlib_module_names | {"tyro"}
    assert [x.name for x in before if isinstance(x, DEFINITIONS)] == ["Args"]
    parse = body[len(before)]
    assert ast.unparse(parse).startswith("if __name__ == '__main__':\n    args = tyro.cli(Args")


@each_script
def test_a_script_is_short(name):
    lines = source(name).splitlines()
    below = source(name).partition(BANNER)[2].splitlines()
    assert len(lines) <= LINES[name] and len(below) <= LINES_BELOW[name], (len(lines), len(below))


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_the_first_loss_stands_near_the_top(name):
    losses = [x.lineno for x in functions(name) if x.name.endswith("_loss")]
    assert min(losses) <= FIRST_LOSS[name]


@every_file
def test_functions_are_short(name):
    """60 lines, main 90."""
    limits = {"main": 90}
    lengths = [(x.name, x.end_lineno - x.lineno + 1) for x in functions(name)]
    assert not [(x, length) for x, length in lengths if length > limits.get(x, 60)]


@every_file
def test_docstrings(name):
    """The module's is the description in --help, in a terminal of 80 columns."""
    text = ast.get_docstring(tree(name))
    if name in SCRIPTS:
        assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 79
    assert f"python {name}.py" in text
    known = {"--" + x.replace("_", "-") for x in flags(name)}
    assert set(re.findall(r"(?<!\S)--(?:no-)?[a-z-]+", text.replace("--no-", "--"))) <= known
    small = ("Args", "main", "Attention", "MLP", "Block")  # a module's __call__ speaks for it
    public = [x for x in tree(name).body if isinstance(x, DEFINITIONS) and x.name not in small]
    assert not [x.name for x in public if x.name[0] != "_" and not ast.get_docstring(x)]


# ------------------------------------------------------------------------------------------- flags


@every_file
def test_flags_are_read_and_only_flags(name):
    """As args.<flag>, or taken out of RunFolder's self.args."""
    read = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "args":
            read.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.args.pop":
            read |= {x.value for x in node.args if isinstance(x, ast.Constant)}
    assert read == set(flags(name))


@every_file
def test_every_flag_is_explained(name):
    """By a comment at the end of its line, or in the line above."""
    lines = source(name).splitlines()
    args = next(x for x in tree(name).body if isinstance(x, ast.ClassDef) and x.name == "Args")
    for field in (x for x in args.body if isinstance(x, ast.AnnAssign)):
        beside = lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode().strip()
        comment = beside or lines[field.lineno - 2].strip()
        assert comment.startswith("# ") and len(comment) > 8, f"{name}.py: {field.target.id}"


@each_script
def test_args_are_frozen_and_hashable(name):
    """They are jit's static argument `args`; also where tyro has filled the repeatable flags."""
    repeatable = [flag for flag, hint in flags(name).items() if "tuple[" in str(hint)]
    line = [word for flag in repeatable for word in 2 * ["--" + flag.replace("_", "-"), "2"]]
    args, again = (tyro.cli(importlib.import_module(name).Args, args=line) for _ in range(2))
    other = dataclasses.replace(args, seed=17)
    assert args == again != other and hash(args) == hash(again) != hash(other)
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.seed = 17


def test_a_flag_has_one_type_everywhere():
    """The values of a Literal aside. evaluate.py may be told of a run's kl_coef, or not."""
    types = {}
    for name in SCRIPTS:
        for flag, hint in flags(name).items():
            hint = re.sub(r"Literal\[[^]]*\]", "Literal", str(hint))
            types.setdefault(flag, {})[name] = hint
    assert not {flag: found for flag, found in types.items() if len(set(found.values())) > 1}


@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_training_scripts_share_their_flags_in_one_order(name):
    assert [flag for flag in flags(name) if flag in COMMON] == COMMON
    assert {"steps", "epochs", "rounds"} & set(flags(name))


# ------------------------------------------------------------------------------- parts to lift out


def names_read(code):
    """The names that a definition reads from outside itself: globals and builtins."""
    if isinstance(code, str):
        code = compile(code, "definition", "exec")
    reads = (x for x in dis.get_instructions(code) if re.match("LOAD_.*(GLOBAL|NAME)", x.opname))
    found = {x.argval for x in reads if not x.argval.startswith("__")}
    return found.union(*(names_read(x) for x in code.co_consts if isinstance(x, types.CodeType)))


@every_file
def test_globals_exist_on_import(name):
    """No function assigns a global, or reads one, `args` least of all, that only a run makes."""
    known = set(dir(builtins)) | set(vars(importlib.import_module(name)))
    for definition, text in definitions(name).items():
        assert names_read(text) <= known, f"{definition} of {name}.py"
    assert not [x.lineno for x in ast.walk(tree(name)) if isinstance(x, ast.Global)]


@each_script
def test_a_script_imports_alone(name, tmp_path):
    """Copied into an empty folder; so it imports no other script."""
    (tmp_path / f"{name}.py").write_text(source(name), "utf-8")
    line = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); import {name}"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    imported = [ast.unparse(x).split()[1] for x in ast.walk(tree(name)) if isinstance(x, IMPORTS)]
    others = {path.stem for path in ROOT.glob("*.py")} | {"tests", "data", "benchmarks"}
    assert not {module.split(".")[0] for module in imported} & others  # nor inside a function


@pytest.fixture
def pasted(tmp_path, monkeypatch):
    """pasted(script, names) -> a module of the script's imports and these definitions alone."""

    def paste(script, wanted):
        imports = [ast.unparse(x) for x in tree(script).body if isinstance(x, IMPORTS)]
        texts = [text for name, text in definitions(script).items() if name in wanted]
        module = f"pasted_from_{script}"
        (tmp_path / f"{module}.py").write_text("\n".join([*imports, *texts]), "utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop(module, None)
        return importlib.import_module(module)

    return paste


ROWS = np.linspace(-2, -1, 6, dtype=np.float32).reshape(2, 3)  # [B, R]
MASK = np.array([[1, 1, 1], [1, 1, 0]], np.float32)
GRPO = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.1, "max_length": 3}
GRPO |= {"aggregation": "token", "ratio_level": "token"}


@pytest.mark.parametrize(
    "script, function, arrays, others",
    [
        ("ppo", "compute_gae", [ROWS, ROWS, MASK], {"gamma": 0.9, "lam": 0.9}),
        ("ppo", "ppo_policy_loss", [ROWS, ROWS, ROWS, MASK], {"clip_eps": 0.2}),
        ("dpo", "dpo_loss", [ROWS[:, i] for i in (0, 1, 2, 0)], {"beta": 0.1}),
        ("grpo", "grpo_loss", [ROWS, ROWS, ROWS, ROWS[:, 0], MASK], GRPO),
    ],
    ids=["compute_gae", "ppo_policy_loss", "dpo_loss", "grpo_loss"],
)
def test_a_loss_runs_alone(script, function, arrays, others, pasted):
    """Pasted with its file's imports into an empty script, it gives what it gives at home."""
    found = getattr(pasted(script, {function}), function)(*arrays, **others)
    at_home = getattr(importlib.import_module(script), function)(*arrays, **others)
    jax.tree.map(np.testing.assert_array_equal, found, at_home)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("script", ["gpt2", "ppo"])
def test_generate_runs_with_the_model_alone(script, pasted):
    """With those definitions below the line that it needs, and that these need."""
    below = definitions_below(script)
    needed, seen = {"generate"}, set()
    while needed - seen:
        name = (needed - seen).pop()
        seen.add(name)
        needed |= names_read(below[name]) & set(below)
    assert "GPT2" in needed and "RunFolder" not in needed and "load_model" not in needed
    module = pasted(script, needed)
    config = module.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    tokens, mask = np.array([[0, 3], [4, 5]]), np.array([[0, 1], [1, 1]])
    key = jax.random.key(0)
    params = module.GPT2(config).init(key, tokens, mask)["params"]
    tokens, mask, logprobs = module.generate(params, config, tokens, mask, key, 4, 1.0, 10, 2)
    assert tokens.shape == mask.shape == (4, 6) and logprobs.shape == (4, 4)
    assert (np.asarray(logprobs)[mask[:, 2:] > 0] < 0).all() and tokens.max() <= 10
