#!/usr/bin/env bash
# GPT-2 (124M) on Anthropic's HH-RLHF: supervised fine-tuning, reward model, then PPO and DPO from
# the same start, and a report on both. Run it again to go on where it was stopped.
#
#     pip install matplotlib
#     recipes/hh_gpt2.sh
#     DATA=harmless-base-test.jsonl.gz OUT=runs/small PPO_STEPS=20 recipes/hh_gpt2.sh
#
# DATA    a file of HH-RLHF, .jsonl or .jsonl.gz; by default PART is downloaded from the hub (MIT
#         licence; the content is offensive)
# MODEL   a folder or a hub name of GPT-2's architecture
#
# Where the numbers come from. [L] lm-human-preference-details (Huang et al.), GPT-2 124M and Pythia
# 160M: train_policy_jax.py, summarize/sft.py, summarize/reward.py. [N] the N+ details of RLHF with
# PPO: summarize_from_feedback_details/ppo_left_padding.py. [D] the DPO paper, appendix B.
#
#     sft       learning rate 6.35e-5, batch 128, 1 epoch [L]
#     reward    learning rate 5e-6, batch 64, 1 epoch [L]
#     ppo       learning rate 1e-5, batch 512, 4 epochs, 1 minibatch, clipping 0.2 and 0.2, vf_coef
#               0.1, gamma 1, lambda 0.95 [L]; a fixed kl_coef of 0.05, and 1 off the score without
#               an end [N]. Ours: 200 steps, 102 400 completions (both sources: 1 000 000);
#               temperature 1 (0.7) and rewards as they are (whitened), so that J is defined
#     dpo       beta 0.1, learning rate 1e-6 with 150 steps of warm-up, batch 64, 1 epoch [D];
#               AdamW instead of its RMSprop. Set by the authors for larger models
#     lengths   384 + 192 tokens keep 94 % of the pairs of harmless-base-test
#
# Not measured: the results, and the time; nobody has run this at full size. Memory, as compiled for
# one device, in recipes/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-gpt2}
PART=${PART:-harmless-base}
DATA=${DATA:-}
OUT=${OUT:-runs/hh}
PPO_STEPS=${PPO_STEPS:-200}
BATCH=${BATCH:-512}       # of PPO; the others have a quarter and an eighth of it
MICRO_BATCH=${MICRO_BATCH:-16}
PROMPT=${PROMPT:-384}     # tokens; a longer prompt is dropped
ANSWER=${ANSWER:-192}     # tokens
TEST_ROWS=${TEST_ROWS:-312}
EVALUATE=${EVALUATE:-}    # further flags of evaluate.py, such as --frontier-samples 64

python -c "import matplotlib"  # which the report needs: better known now than at the end
if [ -z "$DATA" ]; then
    DATA=$(python -c "
import huggingface_hub as hub
print(hub.hf_hub_download('Anthropic/hh-rlhf', '$PART/train.jsonl.gz', repo_type='dataset'))")
fi
lengths="--max-prompt-length $PROMPT --max-completion-length $ANSWER"
micro="--micro-batch-size $MICRO_BATCH"

python data/hh_rlhf.py "$DATA" "$OUT/data" --test-rows "$TEST_ROWS"

python sft.py --model "$MODEL" --run-dir "$OUT/sft" --resume \
    --dataset "$OUT/data/sft_train.jsonl" --eval-dataset "$OUT/data/sft_test.jsonl" \
    --learning-rate 6.35e-5 --batch-size $((BATCH / 4)) --epochs 1 $micro $lengths

# After training, the score is normalised on 128 prompts with 2 answers each, all at once.
python reward.py --model "$OUT/sft/model" --run-dir "$OUT/reward" --resume \
    --dataset "$OUT/data/preferences_train.jsonl" \
    --eval-dataset "$OUT/data/preferences_test.jsonl" \
    --learning-rate 5e-6 --batch-size $((BATCH / 8)) --epochs 1 --num-generations 2 \
    $micro $lengths

python ppo.py --model "$OUT/sft/model" --reward-model "$OUT/reward/model" \
    --run-dir "$OUT/ppo" --resume \
    --dataset "$OUT/data/prompts_train.jsonl" --eval-dataset "$OUT/data/prompts_test.jsonl" \
    --learning-rate 1e-5 --batch-size "$BATCH" --epochs 4 --num-minibatches 1 \
    --kl-coef 0.05 --missing-eos-penalty 1 --steps "$PPO_STEPS" \
    --rollout-batch-size $((BATCH / 4)) $micro $lengths

python dpo.py --model "$OUT/sft/model" --run-dir "$OUT/dpo" --resume \
    --dataset "$OUT/data/preferences_train.jsonl" \
    --eval-dataset "$OUT/data/preferences_test.jsonl" \
    --beta 0.1 --nll-coef 0 --learning-rate 1e-6 --warmup-steps 150 \
    --batch-size $((BATCH / 8)) --epochs 1 --rollout-batch-size $((BATCH / 4)) $micro $lengths

python evaluate.py --ref "$OUT/sft/model" --reward-model "$OUT/reward/model" \
    --models "$OUT/ppo/model" "$OUT/dpo/model" --dataset "$OUT/data/prompts_test.jsonl" \
    --batch-size $((BATCH / 8)) --report "$OUT/report" $lengths $EVALUATE
