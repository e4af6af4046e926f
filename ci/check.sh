#!/usr/bin/env bash
# Format, lint, types and size, without running anything: the first part of ci/test.sh.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ci/check.sh [--help]

Checks the format (ruff format), lint (ruff check), types (mypy --strict) and size budget (ci/size.py) of the sources.
Every check runs even if one before it failed. The types are those of the wheel that users install: kernels/ and
patches/ become megamem.kernels and megamem.patches only there.

environment:
  PY   the Python that has ruff, mypy and the packages of the `dev` and `train` extras   (default: .venv/bin/python)
TEXT
}

case "${1:-}" in -h | --help) usage; exit 0 ;; esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh
PY=${PY:-$PWD/.venv/bin/python}
FAILED=()

if ! "$PY" -c 'import mypy, ruff, torch' 2>/dev/null; then
    echo "ci/check.sh: $PY lacks ruff, mypy or torch; run ci/test.sh, which installs them, or set PY" >&2
    exit 2
fi

check() {
    local what=$1 start=$SECONDS
    shift
    if "$@"; then
        echo "check: $what passed ($((SECONDS - start)) s)"
    else
        echo "check: $what FAILED ($((SECONDS - start)) s): $*"
        FAILED+=("$what")
    fi
}

# Always at the same path, so that mypy finds its own cache again.
check_types() {
    local work=$PWD/.cache/check config=$PWD/pyproject.toml cache=$PWD/.mypy_cache
    build_wheel "$work" || return
    "$PY" -m pip install -qq --no-index --no-deps --target "$work/site" "$work"/megamem-*.whl || return
    (cd "$work/site" && "$PY" -m mypy --config-file "$config" --cache-dir "$cache" -p megamem)
}

check format "$PY" -m ruff format --check --quiet .
check lint "$PY" -m ruff check --quiet .
check size "$PY" ci/size.py
check types check_types

if [ ${#FAILED[@]} -gt 0 ]; then
    echo "check: FAILED: ${FAILED[*]}"
    exit 1
fi
echo "check: everything passed in $SECONDS s"
