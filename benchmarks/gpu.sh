#!/usr/bin/env bash
# What only a GPU can show, in under ten minutes on a bare machine with one NVIDIA card: the tests
# that a GPU can break, then steps and samples in bfloat16 at 124M and 774M, beside TRL and
# transformers on the same card. What it finds goes to runs/gpu/.
#
#     benchmarks/gpu.sh
#     OURS=python3 PEERS=python3 benchmarks/gpu.sh    # environments that are there: installs nothing
#     GPU_SH_DRY=1 OURS=python3 PEERS=python3 benchmarks/gpu.sh    # without a card, at a tiny shape
#
# JAX and torch want other versions of CUDA's libraries, and each would take the whole card: each has
# an environment and processes of its own, and they run one after the other. Compiled programs are
# kept in .jax_cache, so that a second run gets further in its ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
DRY=${GPU_SH_DRY:-}
FOUND=runs/gpu
SECONDS=0
mkdir -p "$FOUND"
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
export JAX_ENABLE_COMPILATION_CACHE=1 JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 PIP_DISABLE_PIP_VERSION_CHECK=1

if [ -n "$DRY" ]; then
    PLATFORM=cpu ROUNDS=1 MINUTES=60 TEST_SECONDS=3600
    echo "dry run, no card" > "$FOUND/card.txt"
else
    PLATFORM=cuda ROUNDS=8 MINUTES=9.5 TEST_SECONDS=100
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv > "$FOUND/card.txt" ||
        { echo "error: no NVIDIA card here; GPU_SH_DRY=1 tries all this without one" >&2; exit 2; }
fi
cat "$FOUND/card.txt"

if [ -z "${OURS:-}" ]; then
    # CUDA 13 needs driver 580 or newer; torch 2.10 was the last on PyPI for CUDA 12.
    DRIVER=$(sed -n '2s/.*, //p' "$FOUND/card.txt")
    if [ "${DRIVER%%.*}" -ge 580 ]; then CUDA=cuda13 TORCH=2.13.0; else CUDA=cuda12 TORCH=2.10.0; fi
    python3 -m venv .venv-gpu
    python3 -m venv .venv-gpu-peers
    .venv-gpu/bin/pip install --quiet "jax[$CUDA]" -r requirements.txt tokenizers &
    .venv-gpu-peers/bin/pip install --quiet torch==$TORCH transformers==5.24.0 trl==1.16.0 datasets
    .venv-gpu-peers/bin/pip install --quiet --no-deps --upgrade --target .venv-ppo trl==1.12.0
    wait $!
    OURS=.venv-gpu/bin/python PEERS=$PWD/.venv-gpu-peers/bin/python
fi
echo "installed after $SECONDS s"
"$OURS" -c "import jax; print('JAX', jax.__version__, jax.devices())" | tee "$FOUND/versions.txt"
"$PEERS" -c "import torch, transformers, trl
print('torch', torch.__version__, torch.version.cuda, torch.cuda.is_available())
print('transformers', transformers.__version__, 'TRL', trl.__version__)" | tee -a "$FOUND/versions.txt"

# Float32 at the highest precision of products, as tests/conftest.py sets it: golden numbers,
# sampling against a forward pass, draws against the softmax. Then, with deterministic operations,
# that one seed gives one run, bit for bit.
FAILED=0
check() {
    JAX_PLATFORMS=$PLATFORM timeout "$TEST_SECONDS" "$OURS" -m pytest -q -rf -p no:cacheprovider "$@" |
        tee -a "$FOUND/tests.txt" || FAILED=1
}
: > "$FOUND/tests.txt"
check tests/test_losses.py tests/test_gpt2.py \
    -k "golden or equals_hugging_face or equal_hugging_face or full_forward or follow_the_softmax"
XLA_FLAGS="--xla_gpu_deterministic_ops=true ${XLA_FLAGS:-}" \
    check tests/test_runs.py -k "resumed_equals_never_stopped and grpo"
echo "tested after $SECONDS s"

# No row begins in the last minute, and what is printed by then stays.
LEFT=$(awk "BEGIN {print 60 * $MINUTES - $SECONDS}")
PEERS_PYTHON=$PEERS JAX_PLATFORMS=$PLATFORM timeout --foreground "$LEFT" "$OURS" benchmarks/run.py \
    --gpu ${DRY:+--dry} --no-wait --rounds "$ROUNDS" --minutes "$(awk "BEGIN {print $LEFT / 60 - 1}")" |
    tee "$FOUND/speed.md" || echo "stopped: the time was up, or it failed"
echo "ended after $SECONDS s; found: $FOUND/{card.txt,versions.txt,tests.txt,speed.md}"
exit $FAILED
