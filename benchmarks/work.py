"""What run.py's contestants have in common: shapes, random data, FLOPs, the loop that serves it.

Imports nothing heavy, so that ours.py and peers.py can import it before JAX or torch.
"""

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass

import numpy as np

GROUP = 4  # completions to one prompt in GRPO
PPO_EPOCHS = 4  # optimizer steps on one rollout
LEARNING_RATE = 1e-4
PRODUCT = 2048  # rows and columns of the matrices whose product is the measured peak
PRODUCT_GPU = 8192


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    n_positions: int
    batch: int  # sequences, or pairs, in one optimizer step
    prompt: int
    new: int

    @property
    def length(self):
        return self.prompt + self.new

    @property
    def model(self):
        """Hugging Face's names, which are also ours."""
        names = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions")
        return {name: getattr(self, name) for name in names}

    def tokens(self, *size):
        """Random tokens; never 0, which is the peers' PAD and EOS."""
        return np.random.default_rng(0).integers(1, self.vocab_size, size, dtype=np.int32)

    def forward(self, sequences, logits):
        """FLOPs of a forward pass: 2 per weight and token, and the attention's two products.

        logits: at how many positions of a sequence the head is computed.
        """
        weights = 12 * self.n_layer * self.n_embd**2
        attention = 2 * self.n_layer * self.n_embd * self.length
        blocks = 2 * sequences * self.length * (weights + attention)
        return blocks + 2 * sequences * logits * self.vocab_size * self.n_embd


GPT2 = (12, 12, 768, 50257, 1024)
GPT2_LARGE = (36, 20, 1280, 50257, 1024)
SHAPES = {
    "tiny": Shape(4, 4, 128, 512, 128, batch=64, prompt=16, new=48),
    "124M": Shape(*GPT2, batch=4, prompt=64, new=64),
    "124M, sampling": Shape(*GPT2, batch=8, prompt=16, new=48),
    "124M, GPU": Shape(*GPT2, batch=32, prompt=64, new=192),
    "774M, GPU": Shape(*GPT2_LARGE, batch=16, prompt=64, new=192),
}


def reward(prompts, completions, **_):
    """A reward function that costs nothing, and differs between completions."""
    return [float(len(text) % 7) for text in completions]


def memory(field):
    """MB of this process: VmRSS now, VmHWM at most so far (Linux)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) / 1e3


class Pipe:
    """run.py's end of the line: it asks for a step and is told how long it took.

    device_peak() -> the most bytes so far on a device with memory of its own; else 0.
    """

    def __init__(self, device_peak):
        self.device_peak = device_peak
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a library prints must not come between the answers
        self.before = memory("VmRSS")  # with the libraries, without models and data

    def tell(self, **answer):
        print(json.dumps(answer), file=self.answers, flush=True)

    def wait(self):
        """Until the next step is asked for; ends the process once there is none."""
        if not sys.stdin.readline():
            os._exit(0)
        self.started = time.perf_counter()

    def done(self):
        seconds = time.perf_counter() - self.started
        on_device = self.device_peak() / 1e6
        self.tell(seconds=seconds, megabytes=on_device or memory("VmHWM") - self.before)


def repeat(step, pipe):
    while True:
        pipe.wait()
        step()
        pipe.done()


def serve(builders, loop=repeat, device_peak=lambda: 0):
    """The main program of ours.py and peers.py; argv[1] is {"name", "shape", more arguments}."""
    pipe = Pipe(device_peak)
    job = json.loads(sys.argv[1])
    try:
        step = builders[job.pop("name")](SHAPES[job.pop("shape")], **job)
        pipe.tell(micro=getattr(step, "micro", None))
        loop(step, pipe)
    except BaseException as error:  # SystemExit, too: the parent waits for an answer
        traceback.print_exc()
        pipe.tell(error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
