#!/usr/bin/env bash
# Every script once, on a model of one block and 32 rows: it shows that all of them run, not that
# they learn. `make smoke` is this. Most of the time is compilation; less optimised code is compiled
# sooner.
#
#     recipes/demo.sh                 # writes runs/demo; needs the environment: README, "Run it"
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/demo}
export JAX_DISABLE_MOST_OPTIMIZATIONS=1

mkdir -p "$OUT"
head -n 32 data/reviews/sft_train.jsonl > "$OUT/sft.jsonl"
head -n 32 data/reviews/preferences_train.jsonl > "$OUT/pairs.jsonl"
head -n 16 data/reviews/prompts_test.jsonl > "$OUT/prompts.jsonl"
# Flags that several scripts share.
tiny="--n-layer 1 --n-head 4 --n-embd 32"
twice="--epochs 2 --batch-size 32 --micro-batch-size 16"
texts="--dataset $OUT/sft.jsonl --eval-dataset $OUT/sft.jsonl"
pairs="--model $OUT/sft/model --dataset $OUT/pairs.jsonl --eval-dataset $OUT/pairs.jsonl"
rollouts="--model $OUT/sft/model --reward-model $OUT/reward/model --eval-dataset $OUT/prompts.jsonl"
rollouts="$rollouts --batch-size 16 --micro-batch-size 8"
gold="--gold data/reviews.py:sentiment"

python sft.py $tiny $twice $texts --run-dir "$OUT/sft" --overwrite
python reward.py $twice $pairs --num-generations 2 --run-dir "$OUT/reward" --overwrite
python ppo.py $rollouts --steps 2 --run-dir "$OUT/ppo" --overwrite
python dpo.py $twice $pairs $gold --run-dir "$OUT/dpo" --overwrite
python lora.py $twice $pairs $gold --run-dir "$OUT/lora" --overwrite
python grpo.py $rollouts --steps 2 --run-dir "$OUT/grpo" --overwrite
python iterative_dpo.py $rollouts --rounds 2 --prompts-per-round 16 \
    --run-dir "$OUT/iterative_dpo" --overwrite
# On four simulated devices, and without the cache: jax 0.5.0 must not read such programs from it.
(
    unset JAX_COMPILATION_CACHE_DIR
    export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4
    python sharded.py $rollouts --fsdp 2 --tensor 2 --steps 1 --run-dir "$OUT/sharded" --overwrite
)
python mixed_precision.py $tiny $twice $texts --run-dir "$OUT/mixed_precision" --overwrite
python gpt2.py --model "$OUT/ppo/model" --prompt "The Quiet Harbor (western). Sadly,"
python evaluate.py --no-frontier --num-prompts 16 --batch-size 32 --examples 1 \
    --ref "$OUT/sft/model" --reward-model "$OUT/reward/model" \
    --models "$OUT"/{ppo,dpo,grpo,iterative_dpo,sharded}/model
echo "demo: every script ran"
