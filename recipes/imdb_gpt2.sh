#!/usr/bin/env bash
# The DPO paper's controlled sentiment experiment (section 6.1, Figure 2 left), whose code was never
# released: GPT-2 large continues the first words of IMDb reviews, a sentiment classifier is the
# ground truth, and DPO, PPO on a learned reward and PPO on the ground truth are compared by reward
# and KL. Run it again to go on where it was stopped.
#
#     pip install datasets torch transformers matplotlib
#     recipes/imdb_gpt2.sh
#     MODEL=gpt2 BETAS=0.1 TARGETS=6 recipes/imdb_gpt2.sh      # a smaller one
#
# DATA    what data/convert.py reads, with a column "text" and the splits train and test
# MODEL   a folder or a hub name of GPT-2's architecture
# SENTIMENT_MODEL  the classifier: recipes/imdb_reward.py
#
# As in the paper (its appendices B and C.1, and the authors' answers in issues 27 and 28 of
# eric-mitchell/direct-preference-optimization): prompts of 2 to 8 tokens; one epoch of supervised
# fine-tuning on IMDb; 4 completions to each of about 25 000 prompts, labelled by
# siebert/sentiment-roberta-large-english, 6 pairs each; reward model trained for 3 epochs; DPO with
# beta 0.05, 0.1, 1 and 5, batch 64, learning rate 1e-6 with 150 steps of warm-up; PPO with target
# KLs of 3, 6, 9 and 12 nats, and 1 024 completions a step; the rest of PPO as in TRL's PPOConfig of
# then (0.7): learning rate 1e-5, 4 epochs, a KL coefficient that begins at 0.2, horizon 10 000,
# gamma 1, lambda 0.95, both clips 0.2, vf_coef 0.1.
#
# Not as in the paper, or not said there: completions are whole sentences of at most 48 tokens, and
# end (recipes/imdb_data.py); AdamW for its RMSprop; learning rates of sft.py (1e-5) and reward.py
# (3e-6, that of the N+ details for models of this size); the reward model is the last, not the one
# best on held-out pairs; PPO makes 100 steps; each KL target and beta is run with one seed.
#
# Not measured: the results, and the time; nobody has run this at full size. Memory, as compiled for
# one device, in recipes/README.md.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-gpt2-large}
DATA=${DATA:-stanfordnlp/imdb}
OUT=${OUT:-runs/imdb}
GOLD=${GOLD:-recipes/imdb_reward.py:sentiment}
BETAS=${BETAS:-0.05 0.1 1 5}
TARGETS=${TARGETS:-3 6 9 12}
PPO_STEPS=${PPO_STEPS:-100}
BATCH=${BATCH:-1024}      # of PPO; the others have a sixteenth of it
MICRO_BATCH=${MICRO_BATCH:-32}
EVALUATE=${EVALUATE:-}    # further flags of evaluate.py, such as --frontier-samples 64
# JAX takes three quarters of a card unless it is told how much; the classifier needs little.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.85}

python -c "import datasets, matplotlib"  # better known now than at the end
lengths="--max-prompt-length 8 --max-completion-length 48"
small="--batch-size $((BATCH / 16)) --micro-batch-size $MICRO_BATCH"

[ -e "$OUT/texts/sft_test.jsonl" ] ||
    python data/convert.py "$DATA" "$OUT/texts" --kind sft --test-split test
[ -e "$OUT/data/prompts_test.jsonl" ] ||
    python recipes/imdb_data.py "$OUT/texts" "$OUT/data" --model "$MODEL" --max-completion-length 48

python sft.py --model "$MODEL" --run-dir "$OUT/sft" --resume \
    --dataset "$OUT/data/sft_train.jsonl" --eval-dataset "$OUT/data/sft_test.jsonl" \
    --learning-rate 1e-5 --epochs 1 $small $lengths

label="--model $OUT/sft/model --reward $GOLD --num-generations 4"
[ -e "$OUT/data/preferences_train.jsonl" ] ||
    python recipes/label_pairs.py --dataset "$OUT/data/prompts_train.jsonl" \
        --out "$OUT/data/preferences_train.jsonl" $label $lengths
[ -e "$OUT/data/preferences_test.jsonl" ] ||
    python recipes/label_pairs.py --dataset "$OUT/data/prompts_test.jsonl" --num-prompts 200 \
        --out "$OUT/data/preferences_test.jsonl" $label $lengths
pairs="--dataset $OUT/data/preferences_train.jsonl"
pairs="$pairs --eval-dataset $OUT/data/preferences_test.jsonl"
prompts="--dataset $OUT/data/prompts_train.jsonl --eval-dataset $OUT/data/prompts_test.jsonl"

python reward.py --model "$OUT/sft/model" --run-dir "$OUT/reward" --resume \
    --learning-rate 3e-6 --epochs 3 $pairs $small $lengths

models=()
for beta in $BETAS; do
    python dpo.py --model "$OUT/sft/model" --run-dir "$OUT/dpo_$beta" --resume --gold "$GOLD" \
        --beta "$beta" --nll-coef 0 --learning-rate 1e-6 --warmup-steps 150 --epochs 1 \
        $pairs $small $lengths
    models+=("$OUT/dpo_$beta/model")
done

ppo="--learning-rate 1e-5 --batch-size $BATCH --epochs 4 --num-minibatches 1 --kl-coef 0.2"
ppo="$ppo --kl-horizon 10000 --micro-batch-size $MICRO_BATCH --steps $PPO_STEPS"
for target in $TARGETS; do
    python ppo.py --model "$OUT/sft/model" --run-dir "$OUT/ppo_$target" --resume \
        --reward-model "$OUT/reward/model" --gold "$GOLD" --kl-target "$target" \
        $ppo $prompts $lengths
    python ppo.py --model "$OUT/sft/model" --run-dir "$OUT/ppo_gold_$target" --resume \
        --reward "$GOLD" --kl-target "$target" $ppo $prompts $lengths
    models+=("$OUT/ppo_$target/model" "$OUT/ppo_gold_$target/model")
done

python evaluate.py --ref "$OUT/sft/model" --models "${models[@]}" --gold "$GOLD" \
    --reward-model "$OUT/reward/model" --dataset "$OUT/data/prompts_test.jsonl" \
    --batch-size $((BATCH / 4)) --report "$OUT/report" $lengths $EVALUATE
