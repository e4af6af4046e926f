#!/usr/bin/env bash
# Runs the tests on every Megatron-Core release that megamem supports, each in an environment of its own.
set -euo pipefail

# Release and the minor version of Python 3 that it is tested on. From 0.17 on Megatron-Core needs 3.12.
MATRIX=("0.15.3 11" "0.16.1 11" "0.18.2 12" "0.19.2 12")

usage() {
    cat <<'TEXT'
usage: ci/matrix.sh [--only VERSION] [--fast] [--help] [PYTEST ARGUMENT ...]

Runs every test that needs no GPU on megatron-core 0.15.3 and 0.16.1 (Python 3.11), 0.18.2 and 0.19.2 (Python 3.12), one
after the other, and prints what each showed. Goes on after a failure; ends with status 1 if anything failed or could not
be run. The environments are kept and reused.

  --only VERSION   this release only; any other one that pip finds may be named, on Python 3.12
  --fast           leave out the tests that launch whole training jobs

Further arguments go to pytest: ci/matrix.sh --only 0.18.2 tests/patches

With MEGATRON_LM, a clone of Megatron-LM with its tags, pretrain_gpt.py of each release trains too, and the tests that
need a checkout (tests/integrations/test_megatron_lm.py) are not skipped.

environment:
  MEGATRON_LM            a git clone of https://github.com/NVIDIA/Megatron-LM   (default: none)
  PYTHON311, PYTHON312   the interpreters   (default: python3.11 and python3.12 on the PATH, or pyenv's)
  MATRIX_ENVS            where the environments are, as VERSION   (default: here, as .venv-VERSION)
TEXT
}

MARKS="not gpu"
ONLY=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --fast) MARKS="not gpu and not slow"; shift ;;
        --only)
            [ $# -ge 2 ] || { usage >&2; exit 2; }
            ONLY=$2
            shift 2
            ;;
        *) break ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh
# What the tests write; each release has its own log.
LOGS=$PWD/.cache/matrix
TABLE=()
BAD=0
MEGATRON_LM_CLONE=${MEGATRON_LM:-}

interpreter() { # MINOR: a command that starts this Python, or nothing
    local minor=$1 named command
    named=PYTHON3$minor
    if [ -n "${!named:-}" ]; then
        is_python "${!named}" "$minor" && echo "${!named}"
        return
    fi
    for command in "python3.$minor" python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"3.$minor".*/bin/python; do
        if is_python "$command" "$minor"; then
            echo "$command"
            return
        fi
    done
}

# Puts the sources of Megatron-LM at a release into a folder of their own, and prints its path; nothing without a clone.
checkout() { # VERSION
    local folder=$PWD/.cache/megatron-lm/$1
    [ -n "$MEGATRON_LM_CLONE" ] || return 0
    if ! git -C "$MEGATRON_LM_CLONE" rev-parse -q --verify "core_v$1" >/dev/null; then
        echo "ci/matrix.sh: $MEGATRON_LM_CLONE has no tag core_v$1; its tests are skipped" >&2
        return 0
    fi
    rm -rf "$folder"
    mkdir -p "$folder"
    git -C "$MEGATRON_LM_CLONE" archive "core_v$1" megatron pretrain_gpt.py gpt_builders.py model_provider.py |
        tar -x -C "$folder"
    echo "$folder"
}

row() { # VERSION PYTHON TORCH RESULT
    TABLE+=("$(printf '%-14s %-8s %-14s %s' "$@")")
}

# A row of the table for one release. Called where `set -e` is off, so each failure is dealt with.
run_release() {
    local version=$1 minor=$2 log=$LOGS/$1.log start=$SECONDS torch sources
    PYTHON=$(interpreter "$minor") || true
    if [ -z "$PYTHON" ]; then
        row "$version" "3.$minor" - "NOT RUN: no Python 3.$minor here; set PYTHON3$minor"
        return 1
    fi
    VENV=${MATRIX_ENVS:+$MATRIX_ENVS/$version}
    VENV=${VENV:-.venv-$version}
    if ! { make_environment && install_into_environment train,dev,megatron-lm,nemo-cpu "megatron-core==$version" &&
        install_bridge; }; then
        row "$version" "3.$minor" - "NOT RUN: failed while $STEP, see above"
        return 1
    fi
    torch=$("$PY" -c 'from importlib.metadata import version; print(version("torch"))')
    sources=$(checkout "$version")
    # Megatron-LM's Makefile asks python3 for the flags of its helpers.
    if MEGATRON_LM=$sources PATH=${PY%/*}:$PATH "$PY" -m pytest -q -m "$MARKS" "${ARGUMENTS[@]}" </dev/null 2>&1 | tee "$log"; then
        row "$version" "3.$minor" "$torch" "passed: $(closing_line "$log"), $((SECONDS - start)) s in all"
    else
        row "$version" "3.$minor" "$torch" "FAILED: $(closing_line "$log"), see ${log#"$PWD"/}"
        return 1
    fi
}

# pytest's own summary, without the rule that it is drawn in.
closing_line() {
    tail -n 1 "$1" | sed -E 's/^=+ //; s/ =+$//'
}

ARGUMENTS=("$@")
mkdir -p "$LOGS"
if [ -n "$ONLY" ]; then
    minor=12
    for entry in "${MATRIX[@]}"; do
        [ "${entry% *}" != "$ONLY" ] || minor=${entry#* }
    done
    MATRIX=("$ONLY $minor")
fi

for entry in "${MATRIX[@]}"; do
    say "megatron-core ${entry% *} on Python 3.${entry#* }"
    run_release "${entry% *}" "${entry#* }" || BAD=$((BAD + 1))
done

echo
printf '%-14s %-8s %-14s %s\n' megatron-core Python torch "tests ($MARKS) ${ARGUMENTS[*]-}"
printf '%s\n' "${TABLE[@]}"
echo
if [ "$BAD" -gt 0 ]; then
    say "ci/matrix.sh: FAILED on $BAD of ${#MATRIX[@]} releases"
    exit 1
fi
say "ci/matrix.sh: PASSED on ${#MATRIX[@]} of ${#MATRIX[@]} releases"
