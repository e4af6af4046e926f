#!/usr/bin/env bash
# Runs the tests on every Megatron-Core release that megamem supports, each in an environment of its own.
set -euo pipefail

# Release and the minor version of Python 3 that it is tested on. From 0.17 on Megatron-Core needs 3.12.
MATRIX=("0.15.3 11" "0.16.1 11" "0.18.2 12" "0.19.2 12")

usage() {
    cat <<'TEXT'
usage: ci/matrix.sh [--only VERSION | --megatron-source GIT@REF] [--fast] [--help] [PYTEST ARGUMENT ...]

Runs every test that needs no GPU on megatron-core 0.15.3 and 0.16.1 (Python 3.11), 0.18.2 and 0.19.2 (Python 3.12), one
after the other, and prints what each showed. Goes on after a failure; ends with status 1 if anything failed or could not
be run. The environments are kept and reused.

  --only VERSION   this release only; any other one that pip finds may be named, on Python 3.12
  --megatron-source GIT@REF
                   instead of releases, Megatron-Core built from a git repository (URL or path) at a branch, tag or
                   commit, on Python 3.12, without Megatron-Bridge. Sources newer than megamem supports are built as the
                   last version that it does, so that the tests show what would break, and not only that the number is
                   new; `megamem doctor` says first which patches still fit
  --fast           leave out the tests that launch whole training jobs

Further arguments go to pytest: ci/matrix.sh --only 0.18.2 tests/patches

With MEGATRON_LM, a clone of Megatron-LM with its tags, pretrain_gpt.py of each release trains too, and the tests that
need a checkout (tests/integrations/test_megatron_lm.py) are not skipped.

environment:
  MEGATRON_LM            a git clone of https://github.com/NVIDIA/Megatron-LM   (default: none)
  PYTHON311, PYTHON312   the interpreters   (default: python3.11 and python3.12 on the PATH, or pyenv's)
  MATRIX_ENVS            where the environments are, as VERSION or `source`   (default: here, as .venv-VERSION)
TEXT
}

MARKS="not gpu"
ONLY=
SOURCE=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --fast) MARKS="not gpu and not slow"; shift ;;
        --only)
            [ $# -ge 2 ] || { usage >&2; exit 2; }
            ONLY=$2
            shift 2
            ;;
        --megatron-source)
            case ${2:-} in ?*@?*) ;; *) usage >&2; exit 2 ;; esac
            SOURCE=$2
            shift 2
            ;;
        *) break ;;
    esac
done

if [ -n "$ONLY" ] && [ -n "$SOURCE" ]; then
    echo "ci/matrix.sh: --only names a release and --megatron-source none; give one of them" >&2
    exit 2
fi
[ ! -e "${SOURCE%@*}" ] || SOURCE=$(realpath "${SOURCE%@*}")@${SOURCE##*@}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh
# What the tests write; each release has its own log.
LOGS=$PWD/.cache/matrix
EXTRAS=train,dev,megatron-lm,nemo-cpu
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

# Puts SOURCE into a folder named after its commit, and prints the path.
fetch_source() {
    local clone=$PWD/.cache/megatron-lm/source folder
    rm -rf "$clone"
    git init -q "$clone" && git -C "$clone" fetch -q --depth 1 "${SOURCE%@*}" "${SOURCE##*@}" || return
    folder=$PWD/.cache/megatron-lm/$(git -C "$clone" rev-parse --short FETCH_HEAD) || return
    rm -rf "$folder"
    mkdir -p "$folder" && git -C "$clone" archive FETCH_HEAD | tar -x -C "$folder" || return
    echo "$folder"
}

# Brings the version that sources say they are below the limit in setup.py, and prints what they said.
lower_version() { # FOLDER
    local file=$1/megatron/core/package_info.py limit major minor
    limit=$(sed -n 's/^MEGATRON = "megatron-core.*<0\.\([0-9]*\)"$/\1/p' setup.py)
    major=$(sed -n 's/^MAJOR = \([0-9]*\)$/\1/p' "$file")
    minor=$(sed -n 's/^MINOR = \([0-9]*\)$/\1/p' "$file")
    if [ -z "$limit" ] || [ -z "$major" ] || [ -z "$minor" ]; then
        echo "ci/matrix.sh: no limit in setup.py or no version in $file" >&2
        return 1
    fi
    echo "$major.$minor"
    if [ "$major" -gt 0 ] || [ "$minor" -ge "$limit" ]; then
        sed -i "s/^MAJOR = .*/MAJOR = 0/; s/^MINOR = .*/MINOR = $((limit - 1))/; s/^PATCH = .*/PATCH = 99/
            s/^PRE_RELEASE = .*/PRE_RELEASE = ''/" "$file"
    fi
}

# A row of the table for one release. Called where `set -e` is off, so each failure is dealt with.
run_release() { # VERSION MINOR
    find_interpreter "$1" "$2" || return
    if ! { make_environment && install_into_environment "$EXTRAS" "megatron-core==$1" && install_bridge; }; then
        row "$1" "3.$2" - "NOT RUN: failed while $STEP, see above"
        return 1
    fi
    run_tests "$1" "$1" "$2" "$(checkout "$1")"
}

# The same for SOURCE.
run_source() {
    local folder said
    find_interpreter source 12 || return
    STEP="fetching $SOURCE"
    # pybind11 first: Megatron-Core is built without isolation, as megamem is.
    if ! { folder=$(fetch_source) && said=$(lower_version "$folder") && make_environment &&
        "$PY" -m pip install -qq pybind11 'packaging>=24.2' &&
        install_into_environment "$EXTRAS" "megatron-core @ file://$folder"; }; then
        row "${SOURCE##*@}" 3.12 - "NOT RUN: failed while $STEP, see above"
        return 1
    fi
    say "${SOURCE##*@} is ${folder##*/}, of $said"
    "$PY" -m megamem doctor || true
    run_tests source "$said+${folder##*/}" 12 "$folder"
}

# Sets PYTHON and VENV.
find_interpreter() { # NAME MINOR
    PYTHON=$(interpreter "$2") || true
    if [ -z "$PYTHON" ]; then
        row "$1" "3.$2" - "NOT RUN: no Python 3.$2 here; set PYTHON3$2"
        return 1
    fi
    VENV=${MATRIX_ENVS:+$MATRIX_ENVS/$1}
    VENV=${VENV:-.venv-$1}
}

run_tests() { # NAME VERSION MINOR SOURCES
    local log=$LOGS/$1.log start=$SECONDS torch
    torch=$("$PY" -c 'from importlib.metadata import version; print(version("torch"))')
    # Megatron-LM's Makefile asks python3 for the flags of its helpers.
    if MEGATRON_LM=$4 PATH=${PY%/*}:$PATH "$PY" -m pytest -q -m "$MARKS" "${WORKERS[@]}" "${ARGUMENTS[@]}" </dev/null 2>&1 |
        tee "$log"; then
        row "$2" "3.$3" "$torch" "passed: $(closing_line "$log"), $((SECONDS - start)) s in all"
    else
        row "$2" "3.$3" "$torch" "FAILED: $(closing_line "$log"), see ${log#"$PWD"/}"
        return 1
    fi
}

# pytest's own summary, without the rule that it is drawn in (none with -q). Warnings of other processes may follow it.
closing_line() {
    local found
    found=$(sed -nE 's/ =+$//; s/^(=+ )?((no tests ran|[0-9]+ [a-z].*) in [0-9.]+s.*)$/\2/p' "$1" | tail -n 1)
    echo "${found:-$(tail -n 1 "$1")}"
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

if [ -n "$SOURCE" ]; then
    MATRIX=("${SOURCE##*@} 12")
    say "Megatron-Core of $SOURCE on Python 3.12"
    run_source || BAD=1
else
    for entry in "${MATRIX[@]}"; do
        say "megatron-core ${entry% *} on Python 3.${entry#* }"
        run_release "${entry% *}" "${entry#* }" || BAD=$((BAD + 1))
    done
fi

echo
printf '%-14s %-8s %-14s %s\n' megatron-core Python torch "tests ($MARKS) ${ARGUMENTS[*]-}"
printf '%s\n' "${TABLE[@]}"
echo
if [ "$BAD" -gt 0 ]; then
    say "ci/matrix.sh: FAILED on $BAD of ${#MATRIX[@]} releases"
    exit 1
fi
say "ci/matrix.sh: PASSED on ${#MATRIX[@]} of ${#MATRIX[@]} releases"
