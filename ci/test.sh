#!/usr/bin/env bash
# From a bare clone to a verdict: makes the environment, then runs all checks and all tests that need no GPU.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ci/test.sh [--fast] [--help] [PYTEST ARGUMENT ...]

Creates .venv, installs megamem with PyTorch, Megatron-Core and the tools, checks format, lint, types and size, and runs
every test that needs no GPU. What is there already is reused, so run it again as often as you like.

  --fast   leave out the tests that launch whole training jobs

Further arguments go to pytest: ci/test.sh --fast tests/runtime -x -n 0 (in one process)

environment:
  PYTHON   the interpreter to begin with, 3.11 or later   (default: the first one found)
  VENV     where the virtual environment is               (default: .venv)
TEXT
}

MARKS="not gpu"
case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    --fast) MARKS="not gpu and not slow"; shift ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

finish() {
    local status=$?
    if [ "$status" -eq 0 ]; then
        say "ci/test.sh: PASSED"
    else
        say "ci/test.sh: FAILED: ${FAILED:-$STEP} (exit status $status)"
    fi
}
trap finish EXIT
trap 'exit 130' INT # or bash would run the line above with the status of whatever came before
trap 'exit 143' TERM
FAILED=

make_environment
install_into_environment train,dev,megatron-lm,nemo-cpu
install_bridge
STEP="fetching the sources of Transformer Engine"
"$PY" ci/transformer_engine.py || say "no sources of Transformer Engine: the tests that read them are skipped"

STEP="checking"
say "checking format, lint, size and types"
PY=$PY ci/check.sh || FAILED="the checks above"

STEP="testing"
say "testing ($MARKS)"
# </dev/null: no test may wait for someone to type.
"$PY" -m pytest -m "$MARKS" "${WORKERS[@]}" "$@" </dev/null || FAILED="${FAILED:+$FAILED, and }the tests above"

[ -z "$FAILED" ]
