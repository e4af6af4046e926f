#!/usr/bin/env bash
# From a bare clone to a Megatron-Core GPT that trains with and without megamem, side by side.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: examples/quickstart.sh [--help] [FLAG ...]

Creates .venv, installs megamem with PyTorch and Megatron-Core, makes a corpus from Python's own sources, and trains a
small GPT twice from the same start: stock Megatron-Core, then with megamem. Uses the GPUs of this machine; without any,
four ranks on the CPU (tensor parallel 2 x pipeline parallel 2, sequence parallel). What is there already is reused, so
run it again as often as you like. Further FLAGs go to examples/pretrain_gpt.py, for instance --train-iters 50.

environment:
  PYTHON   the interpreter to begin with, 3.11 or later   (default: python3)
  VENV     where the virtual environment is               (default: .venv)
TEXT
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
STEP="starting"

say() { printf '[%3ds] %s\n' "$SECONDS" "$*"; }

finish() {
    local status=$?
    if [ "$status" -eq 0 ]; then
        say "quickstart: done. A GPT was trained with and without megamem, and the losses agree (tables above)."
    else
        say "quickstart: FAILED while $STEP (exit status $status); run it again to go on from there."
    fi
}
trap finish EXIT

make_environment() {
    STEP="creating $VENV"
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "quickstart: $PYTHON is not Python 3.11 or later; set PYTHON=/path/to/a/newer/python" >&2
        exit 1
    fi
    if [ ! -x "$VENV/bin/python" ]; then
        say "creating $VENV"
        "$PYTHON" -m venv "$VENV"
    fi
    PY="$VENV/bin/python"
}

install() {
    STEP="installing"
    local stamp="$VENV/.megamem-installed" pip=("$PY" -m pip --disable-pip-version-check -q install)
    if [ -f "$stamp" ] && cmp -s setup.py "$stamp"; then
        say "already installed in $VENV"
        return
    fi
    "${pip[@]}" 'setuptools>=77' wheel
    if ! "$PY" -c 'import torch' 2>/dev/null; then
        say "installing PyTorch (the large one)"
        "${pip[@]}" "$(torch_to_install)"
    fi
    say "installing megamem and Megatron-Core"
    "${pip[@]}" --no-build-isolation -e '.[train]'
    cp setup.py "$stamp"
}

torch_to_install() {
    if [ "$(gpus)" -eq 0 ] && "$PY" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))'; then
        echo 'torch==2.13.0'
    else
        echo 'torch>=2.6'
    fi
}

gpus() {
    if command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

prepare_data() {
    STEP="preparing data"
    say "preparing data: Python's standard library as byte tokens"
    CORPUS=$("$PY" examples/prepare_data.py --limit-mib 8 --output .cache/data)
}

train() {
    STEP="training"
    local count ranks parallel size
    count=$(gpus)
    if [ "$count" -eq 0 ]; then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the ranks share the cores
        ranks=4
        parallel=(--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel)
        size=(--num-layers 8 --hidden-size 128 --num-attention-heads 4 --seq-length 1024 --global-batch-size 4)
    else
        size=(--num-layers 16 --hidden-size 1024 --num-attention-heads 8 --seq-length 8192 --global-batch-size 8 --bf16)
        size+=(--compare-tolerance 1e-3)
        if [ "$count" -ge 4 ]; then
            ranks=4
            parallel=(--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel)
        elif [ "$count" -ge 2 ]; then
            ranks=2
            parallel=(--tensor-model-parallel-size 2 --sequence-parallel)
        else
            ranks=1
            parallel=()
        fi
    fi
    say "training on $ranks ranks, $([ "$count" -eq 0 ] && echo CPU || echo "GPUs"): first stock, then with megamem"
    "$VENV/bin/torchrun" --standalone --nproc-per-node "$ranks" examples/pretrain_gpt.py \
        --data-path "$CORPUS" "${size[@]}" ${parallel[@]+"${parallel[@]}"} \
        --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights \
        --train-iters 20 --lr 2e-3 --lr-warmup-iters 2 --log-interval 5 \
        --tensorboard-dir .cache/quickstart/tensorboard --log-json .cache/quickstart/log.jsonl \
        --compare --megamem examples/recipes/memo.yaml --megamem-activations-keep-last-layers 0 "$@"
}

make_environment
install
prepare_data
train "$@"
