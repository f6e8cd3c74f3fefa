"""Keeps copied blocks identical: same name, same text in every script.

    python tests/sync_blocks.py            # names what differs, exit status 1 if anything does
    python tests/sync_blocks.py --write    # rewrites the copies from their owners

A top-level function, class or constant that stands in two scripts is the same text in both. The
first script in SCRIPTS that has it owns it. What differs by nature stands in DIFFERENT.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# In the order in which they own what they share.
SCRIPTS = ["gpt2", "sft", "reward", "ppo", "dpo", "grpo", "iterative_dpo", "sharded"]
SCRIPTS += ["mixed_precision"]
DIFFERENT = {
    "Args": "each algorithm has its own flags",
    "TrainState": "each algorithm hands something else to its next step",
    "make_state": "makes that TrainState",
    "train_step": "the algorithm",
    "rollout": "the algorithm",
    "make_batch": "each algorithm learns from something else",
    "make_experience": "each algorithm learns from something else",
    "eval_step": "the algorithm",
    "evaluate": "each algorithm is measured by something else",
    "main": "the order of an algorithm's steps",
}


def blocks(path):
    """{name: (first line, last line, text)} of a script's top-level definitions."""
    source = path.read_text("utf-8")
    lines = source.splitlines(keepends=True)
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
            first = min([node.lineno] + [d.lineno for d in node.decorator_list]) - 1
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, first = node.targets[0].id, node.lineno - 1
        else:
            continue
        while lines[first - 1].startswith("#") and not lines[first - 1].startswith("# ---"):
            first -= 1  # a comment right above belongs to the block
        found[name] = (first, node.end_lineno, "".join(lines[first : node.end_lineno]))
    return found


def differences():
    """[(name, owner's path, copy's path)] where the texts differ."""
    owners, found = {}, []
    for path in (ROOT / f"{name}.py" for name in SCRIPTS):
        if not path.exists():
            continue
        for name, (_, _, text) in blocks(path).items():
            if name in DIFFERENT:
                continue
            owner, owned = owners.setdefault(name, (path, text))
            if owned != text:
                found.append((name, owner, path))
    return found


def main():
    write = "--write" in sys.argv[1:]
    for name, owner, path in differences():
        print(f"{name}: {path.name} differs from {owner.name}" + (", rewritten" if write else ""))
        if write:
            first, last, _ = blocks(path)[name]
            lines = path.read_text("utf-8").splitlines(keepends=True)
            lines[first:last] = [blocks(owner)[name][2]]
            path.write_text("".join(lines), "utf-8")
    sys.exit(bool(differences()))


if __name__ == "__main__":
    main()
