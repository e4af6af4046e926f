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
  PYTHON   the interpreter to begin with, 3.11 or later   (default: the first one found)
  VENV     where the virtual environment is               (default: .venv)
TEXT
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh
STEP="starting"

finish() {
    local status=$?
    if [ "$status" -eq 0 ]; then
        say "quickstart: done. A GPT was trained with and without megamem, and the losses agree (tables above)."
    else
        say "quickstart: FAILED while $STEP (exit status $status); run it again to go on from there."
    fi
}
trap finish EXIT
trap 'exit 130' INT # or bash would run the line above with the status of whatever came before
trap 'exit 143' TERM

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
    "$PY" -m torch.distributed.run --standalone --nproc-per-node "$ranks" examples/pretrain_gpt.py \
        --data-path "$CORPUS" "${size[@]}" ${parallel[@]+"${parallel[@]}"} \
        --swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights \
        --train-iters 20 --lr 2e-3 --lr-warmup-iters 2 --log-interval 5 \
        --tensorboard-dir .cache/quickstart/tensorboard --log-json .cache/quickstart/log.jsonl \
        --compare --megamem examples/recipes/memo.yaml --megamem-activations-keep-last-layers 0 "$@"
}

make_environment
install_into_environment train
prepare_data
train "$@"
