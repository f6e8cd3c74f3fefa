"""Keeps copied blocks identical: same name, same text in every script.

    python tests/sync_blocks.py            # names what differs, exit status 1 if anything does
    python tests/sync_blocks.py --write    # rewrites the copies from their owners

A top-level function, class or constant that stands in two scripts is the same text in both. The
first script in SCRIPTS that has it owns it. What differs by nature stands in DIFFERENT; what only
one script has otherwise, a function or a part of a class, in DIFFERENT_IN.
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
DIFFERENT_IN = {
    ("sharded", "sample"): "gathers the weights",
    ("sharded", "RunFolder.__doc__"): "says who writes what",
    ("sharded", "RunFolder.__init__"): "a run may go on on another mesh; process 0 writes the logs",
    ("sharded", "RunFolder.start"): "reads a checkpoint with Orbax, each process its shards",
    ("sharded", "RunFolder.save"): "writes a checkpoint with Orbax, each process its shards",
    ("sharded", "RunFolder.checkpoint_step"): "the name of a folder, not the header of a file",
}


def blocks(path):
    """{name: (first line, last line, text)} of a script's top-level definitions.

    Of a class also its docstring and its methods: Class.__doc__, Class.method.
    """
    source = path.read_text("utf-8")
    lines, found = source.splitlines(keepends=True), {}

    def add(name, node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while (above := lines[first - 1].lstrip()).startswith("#") and above[:5] != "# ---":
            first -= 1  # a comment right above belongs to the block
        found[name] = (first, node.end_lineno, "".join(lines[first : node.end_lineno]))

    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            add(node.name, node)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            add(node.targets[0].id, node)
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    add(f"{node.name}.{part.name}", part)
            if ast.get_docstring(node):
                add(f"{node.name}.__doc__", node.body[0])
    return found


def expected(name, owner, path):
    """The owner's text of a block; the parts of it that may differ, as they stand in `path`."""
    owned, own = blocks(owner), blocks(path)
    text = owned[name][2]
    for script, part in DIFFERENT_IN:
        if script == path.stem and part.startswith(f"{name}.") and part in own:
            text = text.replace(owned[part][2], own[part][2])
    return text


def differences():
    """[(name, owner's path, copy's path)] where the texts differ."""
    owners, found = {}, []
    for path in (ROOT / f"{name}.py" for name in SCRIPTS):
        if not path.exists():
            continue
        for name, (_, _, text) in blocks(path).items():
            if name in DIFFERENT or (path.stem, name) in DIFFERENT_IN or "." in name:
                continue  # a method is compared with its class
            owner, owned = owners.setdefault(name, (path, text))
            if text != owned and text != expected(name, owner, path):
                found.append((name, owner, path))
    return found


def main():
    write = "--write" in sys.argv[1:]
    for name, owner, path in differences():
        print(f"{name}: {path.name} differs from {owner.name}" + (", rewritten" if write else ""))
        if write:
            first, last, _ = blocks(path)[name]
            lines = path.read_text("utf-8").splitlines(keepends=True)
            lines[first:last] = [expected(name, owner, path)]
            path.write_text("".join(lines), "utf-8")
    sys.exit(bool(differences()))


if __name__ == "__main__":
    main()
