"""GSM8K as dialogues, and their reward, for recipes/gsm8k_qwen.sh.

    python data/gsm8k.py FOLDER data/math     # FOLDER: train.jsonl and test.jsonl of GSM8K
    python recipes/gsm8k_chat.py data/math    # writes data/math/chat_{train,test}.jsonl

The column chat_template_kwargs (TRL's) is handed to the chat template: Qwen 3 is to answer without
a part between <think> and </think>, for which 512 tokens are few.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ASK = "\nThink step by step, and end with #### and the number."


@dataclass
class Args:
    folder: tyro.conf.Positional[
        str
    ]  # with prompts_{train,test}.jsonl; the dialogues go there, too


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rewards


def right(prompts, completions, answer, **_):
    """1 where a dialogue's last number is the answer, else 0 [B]."""
    texts = [completion[0]["content"] for completion in completions]
    return rewards.numeric_answer(prompts, texts, answer)


def main(args):
    for split in ("train", "test"):
        with open(f"{args.folder}/prompts_{split}.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        with open(f"{args.folder}/chat_{split}.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                question = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
                chat = [{"role": "user", "content": question + ASK}]
                more = {"chat_template_kwargs": {"enable_thinking": False}}
                file.write(json.dumps({"prompt": chat, "answer": row["answer"], **more}) + "\n")
        print(f"{args.folder}/chat_{split}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main(args)
