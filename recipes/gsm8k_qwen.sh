#!/usr/bin/env bash
# Qwen 3 0.6B learns school mathematics in words (GSM8K) by GRPO with a reward for right answers.
# Run it again to go on where it was stopped.
#
#     recipes/gsm8k_qwen.sh
#
# DATA    folder with train.jsonl and test.jsonl of GSM8K (MIT licence); downloaded where absent
# MODEL   a folder or a hub name of a chat model of the families in docs/llama.md
#
# Where the numbers come from: learning rate 1e-6, no KL penalty, 8 completions to a prompt, 512 new
# tokens at most: the defaults of TRL's GRPOConfig (1.16). Ours: 32 prompts a step, 200 steps, two
# updates a step.
#
# One card of 80 GB has room: docs/llama.md, "A recipe for GSM8K", adds it up. Not measured: the
# result, and the time; nobody has run this at full size.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen3-0.6B}
DATA=${DATA:-data/math/source}
OUT=${OUT:-runs/gsm8k}
STEPS=${STEPS:-200}
BATCH=${BATCH:-256}       # completions in one rollout
MICRO_BATCH=${MICRO_BATCH:-16}
ANSWER=${ANSWER:-512}     # tokens

url=https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data
for split in train test; do
    [ -e "$DATA/$split.jsonl" ] ||
        curl --fail --location --create-dirs --output "$DATA/$split.jsonl" "$url/$split.jsonl"
done
python data/gsm8k.py "$DATA" "$OUT/data"
python recipes/gsm8k_chat.py "$OUT/data"

# pass@1 to pass@4 on the first 256 held-out questions are logged at each evaluation.
python grpo_llama.py --model "$MODEL" --run-dir "$OUT/grpo" --resume \
    --dataset "$OUT/data/chat_train.jsonl" --eval-dataset "$OUT/data/chat_test.jsonl" \
    --reward recipes/gsm8k_chat.py:right --eval-generations 4 \
    --learning-rate 1e-6 --kl-coef 0 --steps "$STEPS" --batch-size "$BATCH" --num-generations 8 \
    --epochs 1 --num-minibatches 2 --micro-batch-size "$MICRO_BATCH" --remat \
    --rollout-batch-size "$BATCH" --max-prompt-length 256 --max-completion-length "$ANSWER"
