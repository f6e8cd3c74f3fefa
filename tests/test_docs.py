"""Pages say what is there: links, functions, flags, ablations. A second or two."""

import ast
import functools
import inspect
import re
import shlex
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablations

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# Pages of a script, whose names in backticks are the script's.
OF_A_SCRIPT = ["ppo", "grpo", "dpo", "iterative_dpo", "reward", "sft", "mixed_precision"]
# Names in backticks on them that belong to other code, or to a file of data.
FOREIGN = {
    *("approxkl", "nminibatches", "kl_estimator", "epsilon_c", "disable_dropout", "get_reward"),
    *("kl_loss_mode", "loss_type", "dapo", "expm1", "_get_batch_logps", "precompute_ref_log_probs"),
    *("sigmoid", "robust", "exo_pair", "center_rewards_coefficient", "max_length", "margin"),
    *("GRPOTrainer", "DPOTrainer", "RewardTrainer", "SFTTrainer", "GradScaler"),
}
# Words in backticks that are no functions: columns of the tables, and metrics without a slash.
METRICS = set(re.findall(r"`([A-Za-z_]\w+)`", (ROOT / "docs" / "metrics.md").read_text("utf-8")))
WORDS = {"start", "ended"} | METRICS
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda x: x.stem)
each_script = pytest.mark.parametrize("script", OF_A_SCRIPT)


@functools.cache
def text_of(path):
    return path.read_text("utf-8")


@functools.cache
def names_of(path):
    """(top-level functions, classes and methods; flags) of a Python file."""
    body = ast.parse(text_of(path)).body
    names = {x.name for x in body if isinstance(x, ast.FunctionDef | ast.ClassDef)}
    args = [x for x in body if isinstance(x, ast.ClassDef) and x.name == "Args"]
    fields = [x.target.id for x in (args[0].body if args else []) if isinstance(x, ast.AnnAssign)]
    flags = {"--" + x.replace("_", "-") for x in fields} | {"--help"}
    return names, flags | {"--no-" + x[2:] for x in flags} | {"--reference"}


def anchors(text):
    """GitHub's names of a page's headings."""
    outside = re.sub(r"^```[\s\S]*?^```", "", text, flags=re.M)
    titles = [x.replace("`", "") for x in re.findall(r"^#+ (.+)$", outside, flags=re.M)]
    return {re.sub(r"[^\w\- ]", "", x.strip().lower()).replace(" ", "-") for x in titles}


@each_page
def test_relative_links_lead_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        there = target.exists() and (not anchor or anchor in anchors(text_of(target)))
        wrong += [] if there else [link]
    assert not wrong


@each_script
def test_functions_named_on_a_page_are_in_its_script(script):
    """In backticks, or at the end of a line of the algorithm; of another script where it is named.

    A metric has a slash or stands in the tables; a flag is tested below.
    """
    text = text_of(ROOT / "docs" / f"{script}.md")
    names = names_of(ROOT / f"{script}.py")[0]
    algorithm = text.split("## The algorithm")[1].split("\n## ")[0]
    ends = re.findall(r"  ((?:\w+, )*[A-Za-z]\w+)$", algorithm, flags=re.M)
    named = {x for found in ends for x in found.split(", ")}
    assert named and named <= names, named - names

    prose = "\n".join(line for line in text.splitlines() if line[:1] != "|")
    prose = re.sub(r"<!-- ablations?: [\s\S]*?<!-- end -->", "", prose)
    for name in re.findall(r"`([A-Za-z_]\w+)`", prose):
        other = rf"`{name}` in \[(\w+)\.py\]"
        where = re.search(other, prose)
        found = names_of(ROOT / f"{where[1]}.py")[0] if where else names
        assert name in found | FOREIGN | WORDS, f"docs/{script}.md names {name}"


def test_no_foreign_name_is_left_over():
    used = "\n".join(text_of(ROOT / "docs" / f"{script}.md") for script in OF_A_SCRIPT)
    assert not {x for x in FOREIGN if x not in used}


def commands(text):
    """[(file, flags)] of each `python file.py …` in a page, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in re.findall(r"python (?!-)([^\n`#;&]+)", text):
        file, *rest = line.split()
        if re.fullmatch(r"[\w/]+\.py", file):
            found.append((file, re.findall(r"(?<!\S)--[a-z][a-z-]*", " ".join(rest))))
    return found


@each_page
def test_commands_have_flags_that_exist(page):
    for file, flags in commands(text_of(page)):
        path = ROOT / file
        assert path.exists(), file
        known = names_of(path)[1]
        if file == "tools/memory.py":  # it takes the flags of a script, too
            known = known.union(*(names_of(x)[1] for x in ROOT.glob("*.py")))
        if len(known) > 3:  # it has Args
            assert set(flags) <= known, (file, set(flags) - known)


@each_script
def test_flags_named_on_a_page_are_its_script_s(script):
    prose = re.sub(r"<!-- ablations: [\s\S]*?<!-- end -->", "", text_of(ROOT / f"docs/{script}.md"))
    prose = re.sub(r"^    python .*(?:\n {8}.*)*", "", prose, flags=re.M)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", prose.replace("<!--", "")))
    assert flags <= names_of(ROOT / f"{script}.py")[1]


# --------------------------------------------------------------------------------------- ablations


def test_every_ablation_is_on_its_script_s_page():
    """In its table, and all but baselines in the list of details, too."""
    for name, ablation in ablations.ABLATIONS.items():
        text = text_of(ROOT / "docs" / f"{ablation.script}.md")
        assert f"| `{name}` |" in text
        baselines = {ablations.baseline_of(x) for x in ablations.ABLATIONS}
        assert f"<!-- ablation: {name} -->" in text or name in baselines, name


def test_every_ablation_on_a_page_is_known():
    for page in PAGES:
        text = text_of(page)
        assert set(re.findall(r"<!-- ablations: (\S+) -->", text)) <= set(OF_A_SCRIPT)
        named = re.findall(r"<!-- ablation: (\S+) -->", text)
        for _, rest in re.findall(r"python (benchmarks/ablations\.py)((?: [a-z][\w.-]*)*)", text):
            named += rest.split()
        assert set(named) <= set(ablations.ABLATIONS)


def test_pages_hold_what_the_runs_said(tmp_path, monkeypatch):
    """What `python benchmarks/ablations.py --write` would change is nothing."""
    (tmp_path / "docs").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        (tmp_path / "docs" / page.name).write_text(text_of(page), "utf-8")
    results = ablations.read_results()
    monkeypatch.setattr(ablations, "ROOT", tmp_path)
    ablations.write_pages(results)
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "docs" / page.name).read_text("utf-8") == text_of(page), page.name


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_an_ablation_takes_away_what_its_script_has(name):
    ablation = ablations.ABLATIONS[name]
    names, flags = names_of(ROOT / f"{ablation.script}.py")
    given = shlex.split(f"{ablations.SIZES[ablation.script]} {ablation.flags}")
    assert {x for x in given if x.startswith("--")} <= flags
    assert ablations.baseline_of(name) in ablations.ABLATIONS
    if ablation.patch:
        replaced = set(re.findall(r"script\.(\w+) = ", inspect.getsource(ablation.patch)))
        assert replaced and replaced <= names | {"optax"}, replaced - names


def test_an_ablation_s_difference_is_paired():
    """By hand: three seeds, differences -1, -1.2, -0.8; t = 1 / (0.2 / sqrt 3) = 8.66 > 4.303."""
    rows = {}
    for seed, base, own in [(1, 2.0, 1.0), (2, 3.0, 1.8), (3, 4.0, 3.2)]:
        rows["ppo", seed] = {"figures": {"J": base}}
        rows["ppo-no-kl", seed] = {"figures": {"J": own}}
    assert ablations.difference("ppo-no-kl", rows) == ("**-1.00 ± 0.20**", True)
    rows["ppo-no-kl", 3]["figures"]["J"] = 4.5  # now they do not agree on a sign
    assert ablations.difference("ppo-no-kl", rows) == ("-0.57 ± 0.93", False)
    del rows["ppo", 3]
    assert ablations.difference("ppo-no-kl", rows)[1] is False
