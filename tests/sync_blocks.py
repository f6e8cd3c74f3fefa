"""Keeps copied blocks identical: same name, same text in every script.

    python tests/sync_blocks.py                    # shows what differs; exit status 1 if any does
    python tests/sync_blocks.py --write ppo grpo   # rewrites the copies in ppo.py and grpo.py

A top-level function, class or constant that stands in two scripts is the same text in both, the
comment right above it included. The first script in SCRIPTS that has it owns it. What differs by
nature stands in DIFFERENT; what one script has otherwise, a definition or a part of a class, in
DIFFERENT_IN. A script in BASE is another one with changes: that one owns what both have. An owner's
text is never rewritten, and a copy only where its script is named.
"""

import argparse
import ast
import difflib
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# In the order in which they own what they share.
SCRIPTS = ["gpt2", "sft", "reward", "ppo", "dpo", "grpo", "iterative_dpo", "sharded"]
SCRIPTS += ["mixed_precision", "lora", "grpo_llama"]
BASE = {"grpo_llama": "sharded"}
DIFFERENT = {
    "Args": "each algorithm has its own flags",
    "TrainState": "each algorithm hands something else to its next step",
    "make_state": "makes that TrainState",
    "train_step": "the algorithm",
    "make_batch": "each algorithm learns from something else",
    "make_experience": "each algorithm learns from something else",
    "eval_step": "the algorithm",
    "evaluate": "each algorithm is measured by something else",
    "main": "the order of an algorithm's steps",
}
DIFFERENT_IN = {
    ("gpt2", "generate"): "has top-k, top-p and temperature 0, which training must not use",
    ("mixed_precision", "unembed"): "the head is a product in half precision, too",
    ("mixed_precision", "dense"): "a product in half precision, with half_dot's gradients",
    ("lora", "dense"): "a layer that adds its adapter's product, if there is one",
    ("sharded", "rollout"): "puts prompts on the mesh, and gathers the samples",
    ("sharded", "score"): "each process scores its share",
    ("sharded", "keep_best"): "process 0 decides, and the weights are gathered",
    ("sharded", "RunFolder.__doc__"): "says who writes what",
    ("sharded", "RunFolder.__init__"): "a run may go on on another mesh; process 0 writes the logs",
    ("sharded", "RunFolder.start"): "reads a checkpoint with Orbax, each process its shards",
    ("sharded", "RunFolder.must_save"): "all processes stop at the same step",
    ("sharded", "RunFolder.save"): "writes a checkpoint with Orbax, each process its shards",
    ("sharded", "RunFolder.checkpoint_step"): "the name of a folder, not the header of a file",
    ("grpo_llama", "RULES"): "the names of Llama's weights",
    ("grpo_llama", "gather_weights"): "rounds, and gives gradients in float32",
    ("grpo_llama", "sample_on_mesh"): "gathers the weights of a forward pass layer by layer",
    ("grpo_llama", "unembed"): "the head is a product in half precision, too",
    ("grpo_llama", "describe"): "shows a dialogue by its last message",
    ("grpo_llama", "call_reward"): "completions of dialogues are dialogues",
    ("grpo_llama", "read_jsonl"): "a prompt may be a dialogue",
    ("grpo_llama", "encode_rows"): "a prompt may be a dialogue",
    ("grpo_llama", "load_tokenizer"): "other families of tokenizers",
    ("grpo_llama", "check_splits"): "key-value heads must split",
    ("grpo_llama", "check_sizes"): "the config's names are Llama's",
}
MODEL = ["trunk", "Block", "Attention", "MLP", "dense", "RewardModel", "read_response"]
MODEL += ["load_config", "load_model", "save_model"]
DIFFERENT_IN |= {("grpo_llama", name): "the model is Llama" for name in MODEL}
ENDS = ["rollout", "load_rewards", "generate", "decode_responses"]
DIFFERENT_IN |= {("grpo_llama", name): "several tokens may end a text" for name in ENDS}


class Difference(NamedTuple):
    """A copy that is not what its owner says."""

    name: str
    owner: str
    copy: str
    wanted: str  # the owner's text, with the parts in it that may differ as the copy has them
    found: str


def blocks(script):
    """{name: (first line, last line, text)} of a script's top-level definitions, counted from 0.

    Of a class also its docstring and its methods: Class.__doc__, Class.method.
    """
    source = (ROOT / f"{script}.py").read_text("utf-8")
    lines, found = source.splitlines(keepends=True), {}

    def add(name, node):
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        # A comment right above belongs to the block; a section's name and the line's banner do not.
        while first and (above := lines[first - 1].lstrip()).startswith("#"):
            if above.startswith(("# ---", "# ===")):
                break
            first -= 1
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


def owners(texts):
    """{name: script} of every definition that must be the same everywhere."""
    found = {}
    for script, own in texts.items():
        for name in own:
            if "." not in name and name not in DIFFERENT and (script, name) not in DIFFERENT_IN:
                found.setdefault(name, script)
    return found


def differences():
    """A Difference for each copy with another text than its owner's."""
    texts = {script: blocks(script) for script in SCRIPTS if (ROOT / f"{script}.py").exists()}
    found = []
    for name, first in owners(texts).items():
        for script, own in texts.items():
            if name not in own or (script, name) in DIFFERENT_IN:
                continue
            owner = BASE[script] if name in texts.get(BASE.get(script), ()) else first
            wanted = texts[owner][name][2]
            for entry, part in DIFFERENT_IN:
                if entry == script and part.startswith(f"{name}.") and part in own:
                    wanted = wanted.replace(texts[owner][part][2], own[part][2])
            if script != owner and own[name][2] != wanted:
                found.append(Difference(name, owner, script, wanted, own[name][2]))
    return found


def diff(before, after, before_name, after_name):
    """A unified diff of two texts."""
    texts = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return "".join(difflib.unified_diff(*texts, before_name, after_name))


def write(difference):
    """Puts the owner's text in the place of the copy."""
    path = ROOT / f"{difference.copy}.py"
    first, last, _ = blocks(difference.copy)[difference.name]
    lines = path.read_text("utf-8").splitlines(keepends=True)
    lines[first:last] = [difference.wanted]
    path.write_text("".join(lines), "utf-8")


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words = "rewrite the copies in these scripts from their owners; without a name: none"
    parser.add_argument("--write", nargs="*", default=[], metavar="SCRIPT", help=words)
    named = [name.removesuffix(".py") for name in parser.parse_args(arguments).write]
    if set(named) - set(SCRIPTS):
        parser.error(f"the scripts are {', '.join(SCRIPTS)}")
    left = set()
    for difference in differences():
        name, owner, copy, wanted, found = difference
        if copy in named:
            write(difference)
            print(f"{name}: {copy}.py has the text of {owner}.py again. What was replaced:")
            print(diff(found, wanted, f"{copy}.py before", f"{copy}.py now"))
        else:
            left.add(copy)
            print(f"{name}: {copy}.py differs from its owner, {owner}.py")
            print(diff(wanted, found, f"{owner}.py", f"{copy}.py"))
            print(f"To have it everywhere: edit {name} in {owner}.py, then --write the copies.\n")
    if left:
        copies = " ".join(sorted(left, key=SCRIPTS.index))
        print(f"To have the owners' text: python tests/sync_blocks.py --write {copies}")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
