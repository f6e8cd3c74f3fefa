"""This project's rewards for OpenRLHF: as a server, or as a file with a function.

    python tools/openrlhf_adapter.py --reward rewards.py:numeric_answer    # serves
    python -m openrlhf.cli.train_ppo_ray --reward.remote_url \\
        http://127.0.0.1:5000/get_reward ...

    python tools/openrlhf_adapter.py --reward rewards.py:numeric_answer --write my_reward.py
    python -m openrlhf.cli.train_ppo_ray --reward.remote_url my_reward.py ...

Both give OpenRLHF the weighted sum of the functions, and each one's scores for
its logs. A learned reward (--reward-model, a folder that reward.py wrote) takes
JAX; JAX_PLATFORMS=cpu leaves the GPU to OpenRLHF. Older versions spell the flag
--remote_rm_url. Request and answer are those of OpenRLHF 0.11.2.

This project's JSON Lines are read under these keys (.gz: gunzip first):

    train_ppo_ray  --data.input_key prompt --data.label_key answer
    train_sft      --data.input_key prompt --data.output_key completion
                   --data.input_template "{}"
    train_rm, train_dpo  --data.prompt_key prompt --data.chosen_key chosen
                         --data.rejected_key rejected

The label is the one column that a reward function gets, under the name --label.
"""

import json
import math
import sys
import textwrap
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import tyro


@dataclass(frozen=True)
class Args:
    # file.py:function, f(prompts, completions, **columns) -> scores; repeatable
    reward: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # one for each --reward, in the same order; default 1
    reward_weight: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    reward_model: str | None = None  # folder of a learned reward, added to --reward
    label: str = "answer"  # the column as which the functions get OpenRLHF's label
    eos: str = "<|endoftext|>"  # how the policy's tokenizer writes the end of a text
    write: str | None = None  # write a file with reward_func for OpenRLHF, and serve nothing
    host: str = "127.0.0.1"  # 0.0.0.0: other machines may ask, too
    port: int = 5000


# Parsed before JAX is imported, so that --help answers at once (linters call it E402). Indented,
# because tyro joins lines that begin with a letter.
if __name__ == "__main__":
    args = tyro.cli(Args, description=textwrap.indent(__doc__, " "))

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np

import ppo  # reads functions and models

REWARD_FILE = '''"""reward_func for OpenRLHF: --reward.remote_url {name}

Written by: python tools/openrlhf_adapter.py {flags}
"""

import sys

import torch

sys.path.append({tools!r})
from openrlhf_adapter import Args, Scorer

scorer = Scorer(Args({given}))


def reward_func(queries, prompts, labels, **_):
    """queries: prompts with responses. Tensors: the reward, the score to filter by, the logs."""
    found = scorer(queries, prompts, labels)
    logs = {{name: torch.tensor(x) for name, x in found["extra_logs"].items()}}
    rewards, scores = (torch.tensor(found[name]) for name in ("rewards", "scores"))
    return {{"rewards": rewards, "scores": scores, "extra_logs": logs}}
'''


class Scorer:
    """Scores OpenRLHF's queries with this project's functions and its learned reward."""

    def __init__(self, args):
        weights = args.reward_weight or (1.0,) * len(args.reward)
        counts = f"{len(args.reward)} times --reward, but {len(weights)} times --reward-weight"
        ppo.check(len(args.reward) == len(weights), counts)
        ppo.check(args.reward or args.reward_model, "pass --reward or --reward-model")
        names = [name.rpartition(":")[2] for name in args.reward]
        self.functions = list(zip(names, map(ppo.load_function, args.reward), weights))
        self.args, self.learned, self.lock = args, None, threading.Lock()
        if args.reward_model:
            config, params = ppo.load_model(args.reward_model)
            ppo.check("score" in params, f"{args.reward_model} has no score: not a reward model")
            self.learned = config, params, ppo.load_tokenizer(args.reward_model)

    def __call__(self, queries, prompts, labels):
        """{"rewards", "scores": [B], "extra_logs": {function: [B]}}, lists of numbers.

        Where a function says None, "does not apply", it adds 0: OpenRLHF trains on every row.
        """
        completions = [self.completion(q, p) for q, p in zip(queries, prompts)]
        rows = [{"prompt": p, self.args.label: label} for p, label in zip(prompts, labels)]
        with self.lock:  # OpenRLHF asks from many threads
            scores = {
                name: np.nan_to_num(ppo.call_reward(function, rows, completions))
                for name, function, _ in self.functions
            }
            total = sum(weight * scores[name] for name, _, weight in self.functions)
            if self.learned:
                scores["reward_model"] = self.learned_scores(queries, prompts, completions)
                total = total + scores["reward_model"]
        logs = {f"rewards/{name}": x.tolist() for name, x in scores.items()}
        return {"rewards": total.tolist(), "scores": total.tolist(), "extra_logs": logs}

    def completion(self, query, prompt):
        """What stands behind the prompt, without the EOS that OpenRLHF writes out."""
        if not query.startswith(prompt):
            raise ValueError("a query does not begin with its prompt: is --data.max_len too small?")
        return query[len(prompt) :].removesuffix(self.args.eos)

    def learned_scores(self, queries, prompts, completions):
        """The reward model's scores [B]; an EOS counts where the query has one."""
        config, params, tokenizer = self.learned
        eos_id = ppo.end_token(config, tokenizer)
        rows = [
            (ppo.encode_text(tokenizer, prompt) or [eos_id])
            + ppo.encode_text(tokenizer, completion)
            + [eos_id] * query.endswith(self.args.eos)
            for query, prompt, completion in zip(queries, prompts, completions)
        ]
        longest = max(map(len, rows))
        if longest > config.n_positions:
            raise ValueError(
                f"{longest} tokens; the reward model has {config.n_positions} positions"
            )
        width = min(2 ** math.ceil(math.log2(longest)), config.n_positions)  # few shapes to compile
        return np.asarray(ppo.learned_rewards(params, config, *ppo.pad_rows(rows, width)))


def make_server(scorer, host, port):
    """OpenRLHF's side: openrlhf/utils/agent.py, SingleTurnAgentExecutor._fetch_rewards_via_http."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            status = 200
            try:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                labels = asked.get("labels") or [""] * len(asked["query"])
                answer = scorer(asked["query"], asked["prompts"], labels)
            except (KeyError, TypeError, ValueError) as error:
                status, answer = 400, {"error": f"{type(error).__name__}: {error}"}
            except SystemExit:  # a reward function failed: ppo.py has said how
                status, answer = 500, {"error": "a reward function failed; see the server's output"}
            if status != 200:
                print(f"error: {answer['error']}", file=sys.stderr)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        ppo.fail(f"--host {host} --port {port}: {error}")


def write_reward_file(args, flags):
    """A file for --reward.remote_url, with all paths absolute."""
    rewards = tuple(absolute(name) for name in args.reward)
    model = args.reward_model and str(Path(args.reward_model).resolve())
    given = {"reward": rewards, "reward_weight": args.reward_weight, "reward_model": model}
    given |= {"label": args.label, "eos": args.eos}
    Scorer(Args(**given))  # fails here, and not within OpenRLHF
    shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
    tools = str(Path(__file__).resolve().parent)
    text = REWARD_FILE.format(name=args.write, flags=flags, tools=tools, given=shown)
    Path(args.write).write_text(text, "utf-8")
    print(f"wrote {args.write}: openrlhf … --reward.remote_url {args.write}")


def absolute(name):
    path, _, function = name.rpartition(":")
    return f"{Path(path).resolve()}:{function}"


def main(args):
    if args.write:
        write_reward_file(args, " ".join(sys.argv[1:]))
        return
    server = make_server(Scorer(args), args.host, args.port)
    print(f"--reward.remote_url http://{args.host}:{server.server_port}/get_reward", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("stopped")


if __name__ == "__main__":
    main(args)
