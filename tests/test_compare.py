"""tools/compare.py: what stands beside what, and the page in a browser where there is one."""

import html
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import compare

LEFT = '''"""One: Schulman et al.
2017."""

import json

# ------------------------------------------------------------------ losses


def shared(x):
    return x


def only_left(x):
    return x


# why it changes
def changed(x):
    y = x + 1
    return y


# ==================================================================================================
# The line. From here on the text is the same in every script that has it: read it once, in gpt2.py.
# ==================================================================================================

# ------------------------------------------------------------------ model


def machine(x):
    return x


machine.defaults = 1
'''
RIGHT = LEFT.replace("only_left", "only_right").replace("x + 1", "x + 2 < 3")


@pytest.fixture
def pages(tmp_path):
    """The paths of two small scripts, and the page of the two."""
    paths = tmp_path / "one.py", tmp_path / "two.py"
    for path, text in zip(paths, (LEFT, RIGHT)):
        path.write_text(text, "utf-8")
    return *paths, compare.compare(*paths)


def text_of(page):
    """A page's text, without marks, colours and line numbers."""
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<i>\d+</i>|</code>", "\n", page)))


def test_a_definition_stands_beside_its_namesake(pages):
    left, right, _ = pages
    rows = compare.align(compare.read_parts(left), compare.read_parts(right))
    assert [(x.name, x.state) for x in rows] == [
        ("docstring", "same"),
        ("imports", "same"),
        ("shared", "same"),
        ("only_right", "right"),
        ("only_left", "left"),
        ("changed", "changed"),
        ("machine", "same"),
    ]
    assert [x.left.section for x in rows if x.left][2:] == ["losses"] * 3 + ["model"]
    assert [x.name for x in rows if (x.left or x.right).below] == ["machine"]


def test_another_order_pairs_namesakes_too(tmp_path):
    orders = (tmp_path / "one.py", "abc"), (tmp_path / "two.py", "cxab")
    for path, names in orders:
        path.write_text("\n\n".join(f"def {x}():\n    pass" for x in names), "utf-8")
    rows = compare.align(*(compare.read_parts(path) for path, _ in orders))
    assert [(x.name, x.state) for x in rows if x.state == "same"] == [(x, "same") for x in "abc"]
    assert sorted(x.name for x in rows) == ["a", "b", "c", "x"]


@pytest.mark.parametrize("script", sorted(compare.read_family()))
def test_no_line_is_lost(script):
    """All lines but blank ones, sections and the line stand in the parts, with their numbers."""
    path = ROOT / f"{script}.py"
    lines = path.read_text("utf-8").splitlines()
    found = {}
    for part in compare.read_parts(path):
        found |= {part.first + i: x for i, x in enumerate(part.text.splitlines())}
    rest = {i: x for i, x in enumerate(lines, 1) if x.strip() and found.get(i) != x}
    assert all(re.match(r"# (---|===|The line)", x) for x in rest.values()), rest


def test_page_marks_words_and_links_papers(pages):
    *_, page = pages
    marks = [
        html.unescape(re.sub("<[^>]+>", "", x)) for x in re.findall("<mark>(.*?)</mark>", page)
    ]
    assert "".join(marks).replace(" ", "") == "12<3", marks
    address = compare.PAPERS["Schulman et al. 2017"]
    assert page.count(f'href="{address}"') == 3, (
        "once at the top, and in both lines of the docstring"
    )
    assert "<script src" not in page and "<link" not in page, "self-contained"
    assert (
        'class="part same" id="shared">' in page
        and 'class="part changed" id="changed" open>' in page
    )
    below = page[page.index('<details class="below">') :]
    assert "machine.defaults" in text_of(below) and "def changed" not in text_of(below)


def test_every_line_is_on_the_page():
    page = text_of(compare.compare(ROOT / "dpo.py", ROOT / "iterative_dpo.py"))
    shown = {line.rstrip() for line in page.splitlines()}
    for name in ("dpo", "iterative_dpo"):
        for line in (ROOT / f"{name}.py").read_text("utf-8").splitlines():
            is_title = re.match(r"# (---|===|The line)", line)
            assert is_title or line in shown, f"{name}.py: {line}"


def test_map_has_every_definition_and_its_links_lead_somewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "read_family", lambda: {"gpt2": None, "sft": "gpt2"})
    compare.write_all(tmp_path)
    index = (tmp_path / "index.html").read_text("utf-8")
    assert "keep_top" in index and "cross_entropy_loss" in index
    links = re.findall(r'href="([\w-]+\.html)#([^"]+)"', index)
    assert len(links) > 60
    for page, anchor in links:
        assert f'id="{anchor}"' in (tmp_path / page).read_text("utf-8"), (page, anchor)
    assert re.search(r"keep_top</code></td><td class=.only.>", index)


def test_the_readme_is_current():
    text = (ROOT / "README.md").read_text("utf-8")
    assert compare.losses_table() in text, "python tools/compare.py --table"
    picture = (ROOT / "docs/family.svg").read_text("utf-8")
    again = "python tools/compare.py --family docs/family.svg"
    assert compare.family_svg() == picture, again


@pytest.mark.parametrize(
    "arguments", [["ppo.py"], ["nowhere.py", "ppo.py"], ["README.md", "ppo.py"]]
)
def test_mistakes_end_in_one_sentence(arguments):
    command = [sys.executable, "tools/compare.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


def browser():
    names = ["chromium", "chromium-browser", "google-chrome"]
    return next((x for x in map(shutil.which, names) if x), None)


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium: apt-get install chromium")
def test_page_in_a_browser(tmp_path):
    """The script of the page runs: a link to a folded definition opens it and what it lies in."""
    page = tmp_path / "page.html"
    text = compare.compare(ROOT / "dpo.py", ROOT / "iterative_dpo.py")
    probe = "<script>document.title = [!!document.querySelector('#trunk[open]'), "
    probe += "document.querySelector('details.below').open, "
    probe += "document.documentElement.scrollWidth <= innerWidth].join()</script></body>"
    page.write_text(text.replace("</body>", probe), "utf-8")
    options = ["--headless", "--no-sandbox", "--window-size=500,900", "--dump-dom"]
    command = [browser(), *options, f"{page.as_uri()}#trunk"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>true,true,true</title>" in dom, re.findall("<title>.*?</title>", dom)
