#!/usr/bin/env bash
# Supervised fine-tuning, reward model, PPO, DPO, GRPO and iterative DPO on the embedded film
# reviews, whose gold reward is known, and one table of them all. It is `make all`: the environment
# is made, too, and what was stopped goes on.
#
#     recipes/embedded.sh
#
# Time: README, "Run it". Nothing is downloaded but the packages. Other seeds: README, "Results".
set -euo pipefail
cd "$(dirname "$0")/.."
make all
