"""Two scripts side by side as one HTML page, aligned by definition.

    python tools/compare.py ppo.py grpo.py             # writes ppo-grpo.html
    python tools/compare.py ppo.py grpo.py page.html
    python tools/compare.py --all docs/compare         # all pages, and index.html, their map
    python tools/compare.py --table                    # the README's table of the losses
    python tools/compare.py --family docs/family.svg   # the README's picture of the scripts

A definition stands beside its namesake, or beside nothing. What is the same is folded, changed
words are marked. On the page: n and p go to the next and the previous difference, o opens all, f
folds all. pygments, which colours the code, comes with rich.
"""

import argparse
import ast
import difflib
import html
import re
import sys
from pathlib import Path
from typing import NamedTuple

from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 4  # equal lines that stay visible around a difference
ARXIV = "https://arxiv.org/abs/"
PAPERS = {
    "Ahmadian et al. 2024": f"{ARXIV}2402.14740",
    "Azar et al. 2024": f"{ARXIV}2310.12036",
    "Bradley and Terry 1952": "https://doi.org/10.2307/2334029",
    "Dong et al. 2024": f"{ARXIV}2405.07863",
    "Eisenstein et al. 2023": f"{ARXIV}2312.09244",
    "Guo et al. 2024": f"{ARXIV}2402.04792",
    "Hu et al. 2021": f"{ARXIV}2106.09685",
    "Hu et al. 2022": f"{ARXIV}2106.09685",
    "Huang et al. 2024": f"{ARXIV}2403.17031",
    "Kalajdzievski 2023": f"{ARXIV}2312.03732",
    "Liu et al. 2024": f"{ARXIV}2309.06657",
    "Liu et al. 2025": f"{ARXIV}2503.20783",
    "Micikevicius et al. 2018": f"{ARXIV}1710.03740",
    "Mitchell 2023": "https://ericmitchell.ai/cdpo.pdf",
    "Ouyang et al. 2022": f"{ARXIV}2203.02155",
    "Pang et al. 2024": f"{ARXIV}2404.19733",
    "Rafailov et al. 2023": f"{ARXIV}2305.18290",
    "Schulman 2020": "http://joschu.net/blog/kl-approx.html",
    "Schulman et al. 2016": f"{ARXIV}1506.02438",
    "Schulman et al. 2017": f"{ARXIV}1707.06347",
    "Shao et al. 2024": f"{ARXIV}2402.03300",
    "Stiennon et al. 2020": f"{ARXIV}2009.01325",
    "Xu et al. 2021": f"{ARXIV}2105.04663",
    "Yu et al. 2025": f"{ARXIV}2503.14476",
    "Zhao et al. 2023": f"{ARXIV}2305.10425",
    "Zheng et al. 2025": f"{ARXIV}2507.18071",
    "Ziegler et al. 2019": f"{ARXIV}1909.08593",
}
CITATION = re.compile("|".join(re.escape(x).replace(r"\ ", r"\s+") for x in PAPERS))


class Part(NamedTuple):
    """A definition of a script, or what stands between definitions."""

    name: str
    text: str  # with the comment right above it
    first: int  # line number
    section: str  # the last "# --- losses" before it
    below: bool  # the line


class Row(NamedTuple):
    """What stands side by side; one of the two may be absent."""

    name: str
    left: Part | None
    right: Part | None

    @property
    def state(self):
        if not self.left or not self.right:
            return "left" if self.left else "right"
        return "same" if self.left.text == self.right.text else "changed"


def fail(message):
    """Ends with one sentence and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------- parts of a script


def node_name(node, seen):
    """The name of a top-level statement; None: it belongs to the one before."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
        return None if name in seen else name
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "imports, heavy" if "flags are parsed" in seen else "imports"
    if isinstance(node, ast.If):
        return "start" if "main" in seen else "flags are parsed"
    return None if seen else "docstring"


def read_parts(path):
    """The Parts of a script, in order; together they hold all its lines but blank ones."""
    try:
        source = Path(path).read_text("utf-8")
        tree = ast.parse(source)
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except SyntaxError as error:
        fail(f"{path} is no Python: {error.msg}, line {error.lineno}")
    lines, found, end, section, below = source.splitlines(), {}, 0, "", False
    for node in tree.body:
        decorators = [x.lineno for x in getattr(node, "decorator_list", [])]
        first = min([node.lineno, *decorators]) - 1
        for i in range(end, first):  # comments between: sections, the line, or part of this one
            title = re.match(r"# -{10,} (.+)", lines[i])
            if title:
                section, end = title[1], i + 1
            elif lines[i].startswith(("# ====", "# The line")):
                below, end = True, i + 1
        while end < first and not lines[end].strip():
            end += 1
        name = node_name(node, found)
        if name is None or name in found:
            last = list(found)[-1]
            text = "\n".join(lines[found[last].first - 1 : node.end_lineno])
            found[last] = found[last]._replace(text=text)
        else:
            text = "\n".join(lines[end : node.end_lineno])
            found[name] = Part(name, text, end + 1, section, below)
        end = node.end_lineno
    return list(found.values())


def align(left, right):
    """Rows in the left file's order; what only the right one has stands where it stands there."""
    lefts, rights = ({part.name: part for part in parts} for parts in (left, right))
    following, after = {}, None  # the right's own parts, by the shared one before them
    for part in right:
        if part.name in lefts:
            after = part.name
        else:
            following.setdefault(after, []).append(Row(part.name, None, part))
    rows = following.get(None, [])
    for part in left:
        rows.append(Row(part.name, part, rights.get(part.name)))
        rows += following.get(part.name, [])
    return rows


# ----------------------------------------------------------------------------------- lines of a row


def similar(a, b):
    matcher = difflib.SequenceMatcher(None, a.strip(), b.strip(), autojunk=False)
    return matcher.quick_ratio() > 0.5 and matcher.ratio() > 0.5


def pair_up(left, right):
    """Pairs of indices of two replaced runs of lines, None for a partner that is missing."""
    best = [
        [0] * (len(right) + 1) for _ in range(len(left) + 1)
    ]  # most similar pairs, from the end
    alike = [[similar(a, b) for b in right] for a in left]
    for i in reversed(range(len(left))):
        for j in reversed(range(len(right))):
            both = best[i + 1][j + 1] + 1 if alike[i][j] else 0
            best[i][j] = max(best[i + 1][j], best[i][j + 1], both)
    i = j = 0
    while i < len(left) or j < len(right):
        if (
            i < len(left)
            and j < len(right)
            and alike[i][j]
            and best[i][j] == best[i + 1][j + 1] + 1
        ):
            yield i, j
            i, j = i + 1, j + 1
        elif j == len(right) or (i < len(left) and best[i + 1][j] == best[i][j]):
            yield i, None
            i += 1
        else:
            yield None, j
            j += 1


def line_pairs(left, right):
    """[(is equal, index of the left line or None, of the right line or None)] of two texts."""
    left, right, pairs = left.splitlines(), right.splitlines(), []
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            pairs += [(True, a + i, c + i) for i in range(b - a)]
        else:
            for i, j in pair_up(left[a:b], right[c:d]):
                pairs.append((False, None if i is None else a + i, None if j is None else c + j))
    return pairs


def changed_words(left, right):
    """The ranges of characters that differ in two lines."""
    words = [re.findall(r"\w+|\s+|.", line) for line in (left, right)]
    ranges = [], []
    matcher = difflib.SequenceMatcher(None, *words, autojunk=False)
    for kind, *bounds in matcher.get_opcodes():
        if kind != "equal":
            for side, (start, stop) in enumerate((bounds[:2], bounds[2:])):
                begin = sum(map(len, words[side][:start]))
                ranges[side].append((begin, begin + sum(map(len, words[side][start:stop]))))
    return ranges


# --------------------------------------------------------------------------------------------- HTML


def highlight(text):
    """A list of lines, each a list of (class, text), and where papers are cited in them."""
    lines = [[]]
    for kind, value in PythonLexer(stripnl=False).get_tokens(text):
        pieces = value.split("\n")
        for i, piece in enumerate(pieces):
            if i:
                lines.append([])
            if piece:
                lines[-1].append((STANDARD_TYPES.get(kind, ""), piece))
    return lines


def cited(text):
    """{line: [(start, stop, address)]} of the papers named in a text, also across a line's end."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for match in CITATION.finditer(text):
        address = PAPERS[re.sub(r"\s+", " ", match[0])]
        for line, start in enumerate(starts[:-1]):
            a, b = max(match.start(), start), min(match.end(), starts[line + 1])
            content = text[a:b]
            a, b = (
                a + len(content) - len(content.lstrip()),
                b - len(content) + len(content.rstrip()),
            )
            if a < b:
                found.setdefault(line, []).append((a - start, b - start, address))
    return found


def code(tokens, marks, links):
    """One line as HTML: coloured, its changed ranges marked, its papers linked."""
    cuts, place, pieces = {0}, 0, []
    for start, stop, *_ in [*marks, *links]:
        cuts |= {start, stop}
    for kind, text in tokens:
        inner = sorted(x - place for x in cuts if place < x < place + len(text))
        for start, stop in zip([0, *inner], [*inner, len(text)]):
            piece, at = html.escape(text[start:stop], quote=False), place + start
            if kind:
                piece = f'<span class="{kind}">{piece}</span>'
            if any(a <= at < b for a, b in marks):
                piece = f"<mark>{piece}</mark>"
            for a, b, address in links:
                if a <= at < b:
                    piece = f'<a href="{address}">{piece}</a>'
            pieces.append(piece)
        place += len(text)
    return "".join(pieces)


def cell(part, lines, links, index, marks, side):
    content = code(lines[index], marks, links.get(index, []))
    return f'<div class="{side}"><i>{part.first + index}</i><code>{content or " "}</code></div>'


def row_lines(row):
    """The lines of a row as HTML: two columns where they differ, one where they do not."""
    left, right = row.left or row.right, row.right or row.left
    sides = [(part, highlight(part.text), cited(part.text)) for part in (left, right)]
    texts = [part.text.splitlines() for part in (left, right)]
    if row.state != "changed":
        side = {"same": "both", "left": "l", "right": "r"}[row.state]
        return [cell(*sides[0], i, [], side) for i in range(len(texts[0]))]
    pairs, found, equal, run = line_pairs(left.text, right.text), [], [], ([], [])

    def flush_equal(is_last):
        """Equal lines, of which a long run is folded but for those beside a difference."""
        before, after = (CONTEXT if found else 0), (0 if is_last else CONTEXT)
        if len(equal) > before + after + 3:
            hidden = equal[before : len(equal) - after]
            words = f"<summary>{len(hidden)} equal lines</summary>"
            hidden = f'<div class="pair">{"".join(hidden)}</div>'
            equal[before : len(equal) - after] = [
                f'<details class="equal">{words}{hidden}</details>'
            ]
        found.extend(equal)
        equal.clear()

    def flush_run():
        """Lines without a partner: those of the two sides beside one another."""
        if any(run):
            columns = (f'<div class="{side}">{"".join(x)}</div>' for side, x in zip("lr", run))
            found.append(f'<div class="run">{"".join(columns)}</div>')
        for side in run:
            side.clear()

    for is_equal, i, j in pairs:
        if is_equal:
            flush_run()
            cells = cell(*sides[0], i, [], "l same") + cell(*sides[1], j, [], "r same")
            equal.append(cells)
            continue
        flush_equal(is_last=False)
        if i is None or j is None:
            side, index, name = (0, i, "l diff") if j is None else (1, j, "r diff")
            run[side].append(cell(*sides[side], index, [], name))
            continue
        flush_run()
        marks = changed_words(texts[0][i], texts[1][j])
        found.append(
            cell(*sides[0], i, marks[0], "l diff") + cell(*sides[1], j, marks[1], "r diff")
        )
    flush_run()
    flush_equal(is_last=True)
    return found


def row_html(row, names):
    words = {"same": "same", "changed": "changed"}
    word = words.get(row.state, f"only in {names[row.state == 'right']}")
    is_open = " open" if row.state != "same" else ""
    kind = "pair" if row.state != "same" else "one"
    anchor = row.name.replace(" ", "-")
    return (
        f'<details class="part {row.state}" id="{anchor}"{is_open}>'
        f"<summary><b>{html.escape(row.name)}</b> <em>{word}</em></summary>"
        f'<div class="{kind}">{"".join(row_lines(row))}</div></details>'
    )


def sections_html(rows, names):
    found, section = [], None
    for row in rows:
        own = (row.left or row.right).section
        if own != section and own:
            found.append(f"<h2>{html.escape(own)}</h2>")
        section = own
        found.append(row_html(row, names))
    return "\n".join(found)


STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c2128; --soft: #57606a; --rule: #d0d7de;
  --head: #f6f8fa; --left: #fff0ee; --right: #eafbee; --mark-l: #ffc9c2; --mark-r: #a6e9b4;
  --link: #0757b5; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --text: #e6edf3; --soft: #9aa4af;
  --rule: #30363d; --head: #161b22; --left: #2d1719; --right: #12261b; --mark-l: #7d2a2c;
  --mark-r: #1d5c33; --link: #79b8ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; }
header, main { padding: 0 1rem; }
header { position: sticky; top: 0; z-index: 1; background: var(--page);
  border-bottom: 1px solid var(--rule); padding-bottom: .5rem; }
h1 { font-size: 1.2rem; margin: .5rem 0 .2rem; }
h2 { font-size: 1rem; margin: 1.4rem 0 .4rem; color: var(--soft); text-transform: capitalize; }
a { color: var(--link); }
code a { text-decoration: underline; color: inherit; }
button { font: inherit; padding: .25rem .6rem; margin: .2rem .3rem .2rem 0; color: inherit;
  background: var(--head); border: 1px solid var(--rule); border-radius: .3rem; cursor: pointer; }
kbd { font: 12px ui-monospace, monospace; border: 1px solid var(--rule); border-radius: 3px;
  padding: 0 .25rem; color: var(--soft); }
details.part { border: 1px solid var(--rule); border-radius: .4rem; margin: .35rem 0;
  overflow: hidden; scroll-margin-top: 6.5rem; }
summary { cursor: pointer; padding: .3rem .6rem; }
details.part > summary { background: var(--head); }
:focus-visible { outline: 3px solid var(--link); outline-offset: -3px; }
em { font-style: normal; color: var(--soft); font-size: .85em; margin-left: .5rem; }
.changed > summary em, .left > summary em, .right > summary em { color: var(--text);
  border: 1px solid currentColor; border-radius: 1em; padding: 0 .5em; white-space: nowrap; }
.pair { display: grid; grid-template-columns: 1fr 1fr; }
.pair > details, .pair > .run { grid-column: 1 / -1; }
.pair > .run { display: grid; grid-template-columns: 1fr 1fr; }
.run > .l { border-right: 1px solid var(--rule); }
.pair > details > summary { color: var(--soft); font-size: .85em; background: var(--head); }
.pair > .l { grid-column: 1; border-right: 1px solid var(--rule); }
.pair > .r { grid-column: 2; }
.one > div, .pair > .l, .pair > .r, .run > div > div { display: flex; min-width: 0; }
i { flex: none; width: 3.2em; padding-right: .7em; text-align: right; font: 12px/20px ui-monospace,
  monospace; color: var(--soft); user-select: none; }
code { font: 13px/20px ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; min-width: 0; }
.l.diff, .left .l { background: var(--left); }
.r.diff, .right .r { background: var(--right); }
.l mark { background: var(--mark-l); } .r mark { background: var(--mark-r); }
mark { color: inherit; border-radius: 2px; text-decoration: underline dotted; }
details.below { margin: 1.5rem 0; border-top: 3px double var(--rule); }
details.below > summary { font-weight: bold; padding: .7rem 0; }
.papers { color: var(--soft); font-size: .9em; margin: .6rem 0; }
@media (max-width: 800px) {
  header { position: static; }
  details.part { scroll-margin-top: 0; }
  .pair, .pair > .run { grid-template-columns: 1fr; }
  .pair > .l, .pair > .r { grid-column: 1; border-right: 0; }
  .pair > .r.same { display: none; }
  .run > .l { border-right: 0; }
  .l.diff code::before { content: "- "; }
  .r.diff code::before { content: "+ "; }
  i { width: 2.6em; } code { font-size: 12px; }
}
"""
SCRIPT = """
const all = () => [...document.querySelectorAll("details.part")];
const differences = () => all().filter(x => !x.classList.contains("same"));
function show(x) {
  for (; x; x = x.parentElement) if (x.tagName == "DETAILS") x.open = true;
}
function go(step) {
  const found = differences();
  const at = found.findIndex(x => x.contains(document.activeElement));
  const next = found[at < 0 ? (step > 0 ? 0 : found.length - 1)
    : (at + step + found.length) % found.length];
  if (!next) return;
  show(next);
  next.firstElementChild.focus({ preventScroll: true });
  next.scrollIntoView();
}
const setAll = open => document.querySelectorAll("main details").forEach(x => x.open = open);
const keys = { n: () => go(1), p: () => go(-1), o: () => setAll(true), f: () => setAll(false) };
addEventListener("keydown", event => {
  if (!event.ctrlKey && !event.metaKey && !event.altKey && keys[event.key]) keys[event.key]();
});
document.querySelectorAll("button").forEach(x => x.onclick = () => keys[x.dataset.key]());
function arrive() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  show(target);
  target.scrollIntoView();
}
addEventListener("hashchange", arrive);
arrive();
"""


def colours():
    light = HtmlFormatter(style="tango").get_style_defs("code")
    dark = HtmlFormatter(style="github-dark").get_style_defs("code")
    dark = "\n".join(x for x in dark.splitlines() if re.match(r"code \.\w+ ", x))
    light = "\n".join(x for x in light.splitlines() if re.match(r"code \.\w+ ", x))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def document(title, style, body, script=""):
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style}</style></head>\n<body>\n{body}\n"
        f"<script>{script}</script></body></html>\n"
    )


def compare(left, right, back=""):
    """The page of two scripts; back: a link to stand at its top."""
    names = [Path(x).name for x in (left, right)]
    rows = align(read_parts(left), read_parts(right))
    counts = {
        state: sum(x.state == state for x in rows) for state in ("same", "changed", "left", "right")
    }
    texts = [Path(x).read_text("utf-8") for x in (left, right)]
    papers = sorted({re.sub(r"\s+", " ", x) for text in texts for x in CITATION.findall(text)})
    links = " · ".join(f'<a href="{PAPERS[x]}">{x}</a>' for x in papers)
    above = [x for x in rows if not (x.left or x.right).below]
    below = [x for x in rows if (x.left or x.right).below]
    titled = " and ".join(html.escape(x) for x in names)
    keys = {"n": "next difference", "p": "previous", "o": "open all", "f": "fold all"}
    buttons = [f'<button data-key="{x}">{word} <kbd>{x}</kbd></button>' for x, word in keys.items()]
    total = f"{counts['same']} the same · {counts['changed']} changed · "
    total += f"{counts['left']} only in {names[0]} · {counts['right']} only in {names[1]}"
    body = (
        f"<header>{back}<h1>{titled}</h1><div>{total}</div><div>{''.join(buttons)}</div></header>"
    )
    body += f'\n<main><p class="papers">Papers: {links}</p>' if papers else "\n<main>"
    body += sections_html(above, names)
    if below:
        changed = sum(x.state != "same" for x in below)
        words = f"Below the line: {len(below)} definitions, {changed} of them not the same"
        body += f'<details class="below"><summary>{words}</summary>'
        body += f"{sections_html(below, names)}</details>"
    body += "</main>"
    return document(titled, STYLE + colours(), body, SCRIPT)


# -------------------------------------------------------------------------------------- all of them


def read_family():
    """{script: the script it grows from, or None}, from the README's table of the files."""
    text = (ROOT / "README.md").read_text("utf-8")
    text = text[text.index("\n## The files") :].split("\n## ")[1]
    rows = re.findall(r"^\| `(\w+)\.py` \|.*\| (?:`(\w+)\.py`)? ?\|$", text, re.MULTILINE)
    has_line = [
        x
        for x, _ in rows
        if (ROOT / f"{x}.py").exists() and "# The line." in (ROOT / f"{x}.py").read_text("utf-8")
    ]
    return {name: parent or None for name, parent in rows if name in has_line}


MAP_STYLE = """
table { border-collapse: collapse; font-size: 14px; }
th, td { border: 1px solid var(--rule); padding: .15rem .5rem; text-align: center; }
th:first-child, td:first-child { text-align: left; }
thead th { position: sticky; top: 0; background: var(--head); }
td a { display: block; text-decoration: none; }
td.changed { background: var(--mark-l); } td.only { background: var(--mark-r); }
td.first { background: var(--head); }
main { padding: 1rem; overflow-x: auto; }
@media (max-width: 800px) { table { font-size: 12px; } th, td { padding: .1rem .25rem; } }
"""


def write_all(folder):
    """index.html, the map of all definitions, and a page for each pair that it links to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = read_family()
    parts = {name: {x.name: x for x in read_parts(ROOT / f"{name}.py")} for name in family}
    order = dict.fromkeys(x for own in parts.values() for x in own)
    pages, lines = set(), []
    for name in sorted(
        order, key=lambda x: next(own[x].below for own in parts.values() if x in own)
    ):
        having = [script for script in parts if name in parts[script]]
        owner, cells = having[0], []
        for script in parts:
            if script not in having:
                cells.append("<td></td>")
                continue
            other = owner if script != owner else (having[1] if len(having) > 1 else family[script])
            if other is None:  # the root's own
                other = next(x for x in family if family[x] == script)
            pair = sorted([script, other], key=list(family).index)
            pages.add(tuple(pair))
            same = parts[script][name].text == parts[owner][name].text
            kind, sign = ("same", "same") if same else ("changed", "changed")
            if script == owner:
                kind, sign = ("first", "first") if len(having) > 1 else ("only", "only here")
            address = f"{pair[0]}-{pair[1]}.html#{name.replace(' ', '-')}"
            cells.append(f'<td class="{kind}"><a href="{address}">{sign}</a></td>')
        lines.append(f"<tr><td><code>{html.escape(name)}</code></td>{''.join(cells)}</tr>")
    pages |= {(parent, name) for name, parent in family.items() if parent}
    for left, right in pages:
        back = '<a href="index.html">all scripts</a>'
        page = compare(ROOT / f"{left}.py", ROOT / f"{right}.py", back)
        (folder / f"{left}-{right}.html").write_text(page, "utf-8")
    grown = " · ".join(
        f'<a href="{parent}-{name}.html">{parent}.py → {name}.py</a>'
        for name, parent in family.items()
        if parent
    )
    head = "".join(f"<th>{name}.py</th>" for name in parts)
    body = (
        "<main><h1>All scripts, all definitions</h1><p>first: the first script that has it, whose "
        "text the others copy. A cell leads to the page of the two, at that definition.</p>"
        f"<p>Which file grows from which: {grown}</p><table><thead><tr><th>definition</th>{head}"
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></main>"
    )
    index = document("All scripts, all definitions", STYLE + MAP_STYLE, body)
    (folder / "index.html").write_text(index, "utf-8")
    return len(pages)


def losses_table():
    """The README's table: each function of the scripts' first section, and where it stands."""
    found = {}
    for script in read_family():
        for part in read_parts(ROOT / f"{script}.py"):
            node = ast.parse(part.text).body[0]
            if part.section == "losses" and isinstance(node, ast.FunctionDef):
                sentence = " ".join(ast.get_docstring(node).split("\n\n")[0].split())
                found.setdefault(part.name, (sentence, []))[1].append(f"`{script}`")
    lines = ["| function | | in |", "|---|---|---|"]
    for name, (sentence, scripts) in found.items():
        sentence = sentence.replace("|", r"\|").rstrip(":")
        lines.append(f"| `{name}` | {sentence} | {', '.join(scripts)} |")
    return "\n".join(lines) + "\n"


def family_svg():
    """The scripts as a tree, with how many definitions each adds to the one that it grows from."""
    family = read_family()
    parts = {name: {x.name: x.text for x in read_parts(ROOT / f"{name}.py")} for name in family}
    children = {name: [x for x in family if family[x] == name] for name in family}
    places, row = {}, 0

    def place(name, depth):
        nonlocal row
        below = [place(child, depth + 1) for child in children[name]]
        if not below:
            row += 1
        y = sum(below) / len(below) if below else row - 0.5
        places[name] = (depth, y)
        return y

    for name in family:
        if family[name] is None:
            place(name, 0)
    width, height, across, down = 158, 40, 236, 62
    shapes = []
    for name, (depth, y) in places.items():
        x0, y0 = 8 + depth * across, 8 + y * down - height / 2
        parent = family[name]
        if parent:
            px, py = 8 + places[parent][0] * across + width, 8 + places[parent][1] * down
            middle = (px + x0) / 2
            y1 = y0 + height / 2
            shapes.append(f'<path d="M{px} {py}C{middle} {py} {middle} {y1} {x0} {y1}"/>')
            new = len([x for x in parts[name] if x not in parts[parent]])
            words = f"{new} definitions of its own"
        else:
            words = f"{len(parts[name])} definitions"
        shapes.append(f'<rect x="{x0}" y="{y0}" width="{width}" height="{height}" rx="6"/>')
        shapes.append(f'<text x="{x0 + width / 2}" y="{y0 + 17}" class="n">{name}.py</text>')
        shapes.append(f'<text x="{x0 + width / 2}" y="{y0 + 32}" class="w">{words}</text>')
    w = 16 + width + across * max(depth for depth, _ in places.values())
    h = 16 + row * down
    style = (
        "rect{fill:#f6f8fa;stroke:#8c959f}path{fill:none;stroke:#8c959f;stroke-width:1.5}"
        "text{font-family:system-ui,sans-serif;text-anchor:middle;fill:#1c2128}"
        ".n{font-size:14px;font-weight:600}.w{font-size:11px;fill:#57606a}"
        "@media(prefers-color-scheme:dark){rect{fill:#161b22}text{fill:#e6edf3}.w{fill:#9aa4af}}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:g} {h:g}" width="{w:g}">'
        f"<title>Which file grows from which</title><style>{style}</style>\n"
        + "\n".join(shapes)
        + "\n</svg>\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="two scripts, and perhaps the page to write"
    )
    parser.add_argument(
        "--all", metavar="FOLDER", help="write the map of all scripts, and its pages"
    )
    parser.add_argument(
        "--table", action="store_true", help="print the README's table of the losses"
    )
    parser.add_argument(
        "--family", metavar="SVG", help="write the picture of which file grows from which"
    )
    arguments = parser.parse_args()
    if arguments.table:
        print(losses_table(), end="")
    elif arguments.family:
        Path(arguments.family).write_text(family_svg(), "utf-8")
    elif arguments.all:
        print(f"{arguments.all}/index.html and {write_all(arguments.all)} pages")
    elif len(arguments.files) in (2, 3):
        left, right, *page = arguments.files
        page = Path(page[0] if page else f"{Path(left).stem}-{Path(right).stem}.html")
        page.write_text(compare(left, right), "utf-8")
        print(page)
    else:
        parser.error("name two scripts, such as ppo.py grpo.py, or --all FOLDER")


if __name__ == "__main__":
    main()
