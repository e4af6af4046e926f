#!/usr/bin/env bash
# On a machine with a GPU, by hand: the tests that need one, then the benchmarks.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ci/gpu.sh [--quick] [--only NAME] [--help]

Runs `pytest -m gpu`, then every benchmark of ci/bench, and writes what they found as JSON, with the device, the driver
and the versions beside it. Needs no network. Goes on after a failure; ends with status 1 if anything failed.

  --quick       toy sizes for the benchmarks: shows that they run, measures nothing
  --only NAME   `tests`, or the name of one benchmark without .py

environment:
  PY       a Python with torch for CUDA, pytest and megamem   (default: .venv/bin/python if it is there, else python3)
  WHEELS   a folder of pure Python wheels for a machine that has torch and little else: megatron-core, pytest and what
           they need, setuptools and wheel. They and this checkout are installed in .cache/gpu, without network and
           without touching PY's own packages
  OUT      where the results go   (default: ci/bench/results)
TEXT
}

QUICK=()
ONLY=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --quick) QUICK=(--quick); shift ;;
        --only)
            [ $# -ge 2 ] || { usage >&2; exit 2; }
            ONLY=$2
            shift 2
            ;;
        *) usage >&2; exit 2 ;;
    esac
done

WHEELS=${WHEELS:+$(realpath "$WHEELS")}
OUT=$(realpath -m "${OUT:-$(dirname "${BASH_SOURCE[0]}")/bench/results}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PY:-}" ]; then
    if [ -x .venv/bin/python ]; then PY=$PWD/.venv/bin/python; else PY=python3; fi
fi
source ci/environment.sh

refuse() {
    echo "ci/gpu.sh: $*" >&2
    exit 2
}

# WHEELS and this checkout, in a folder of their own that PYTHONPATH puts before everything else.
install_wheels() {
    local site=$PWD/.cache/gpu/site
    say "installing $WHEELS and megamem in ${site#"$PWD"/}"
    rm -rf "$PWD/.cache/gpu"
    "$PY" -m pip install -qq --no-index --no-deps --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    build_wheel "$PWD/.cache/gpu/wheel"
    "$PY" -m pip install -qq --no-index --no-deps --target "$site" "$PWD"/.cache/gpu/wheel/megamem-*.whl
}

describe_machine() {
    "$PY" - "$OUT/machine.json" <<'PY'
import json, platform, subprocess, sys
from importlib import metadata

import torch

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
try:
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
except (OSError, subprocess.CalledProcessError, IndexError):
    driver = None
found = {
    "device": torch.cuda.get_device_name(0),
    "devices": torch.cuda.device_count(),
    "device_bytes": torch.cuda.get_device_properties(0).total_memory,
    "driver": driver,
    "cuda": torch.version.cuda,
    "python": platform.python_version(),
    "packages": {name: version(name) for name in ("torch", "triton", "megatron-core", "transformer-engine", "megamem")},
}
with open(sys.argv[1], "w") as file:
    json.dump(found, file, indent=2)
    file.write("\n")
packages = ", ".join(f"{name} {number}" for name, number in found["packages"].items() if number)
print(f"{found['devices']} x {found['device']}, driver {driver}, CUDA {found['cuda']}, Python {found['python']}, {packages}")
PY
}

FAILED=()
RAN=0

part() { # NAME COMMAND...: runs one part and keeps what it prints
    local name=$1 start=$SECONDS
    shift
    if [ -n "$ONLY" ] && [ "$ONLY" != "$name" ]; then return; fi
    RAN=$((RAN + 1))
    say "$name"
    if "$@" </dev/null 2>&1 | tee "$OUT/$name.log"; then
        say "$name: done in $((SECONDS - start)) s"
    else
        say "$name: FAILED after $((SECONDS - start)) s"
        FAILED+=("$name")
    fi
}

"$PY" -c 'import torch' 2>/dev/null || refuse "$PY has no torch; set PY to a Python that has one built for CUDA"
"$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
    refuse "torch of $PY sees no GPU ($(gpus) listed by nvidia-smi); ci/test.sh runs everything that needs none"
[ -z "$WHEELS" ] || install_wheels
# -P: the folder megamem of this checkout lacks megamem.kernels and megamem.patches, which only an installed one has.
"$PY" -P -c 'import megamem.patches, megatron.core, pytest' 2>/dev/null ||
    refuse "$PY lacks megamem, megatron-core or pytest; run ci/test.sh first and set PY, or set WHEELS (see --help)"

mkdir -p "$OUT"
MACHINE=$(describe_machine)
say "$MACHINE"

part tests "$PY" -P -m pytest -m gpu -p no:cacheprovider
for script in ci/bench/*.py; do
    # Modules that the benchmarks share have no main part.
    grep -q '__main__' "$script" || continue
    name=$(basename "$script" .py)
    part "$name" "$PY" "$script" --out "$OUT/$name.json" "${QUICK[@]}"
done

[ "$RAN" -gt 0 ] || refuse "--only $ONLY: there is no such benchmark in ci/bench"
if [ ${#FAILED[@]} -gt 0 ]; then
    say "ci/gpu.sh: FAILED: ${FAILED[*]}; results in $OUT; $MACHINE"
    exit 1
fi
say "ci/gpu.sh: $RAN parts passed; results in $OUT; $MACHINE"
