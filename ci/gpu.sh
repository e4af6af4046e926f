#!/usr/bin/env bash
# On a machine with a GPU, by hand: the tests that need one, then the benchmarks.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: ci/gpu.sh [--gpus N] [--quick] [--only NAME] [--dry-run] [--help]

Runs the tests that need one GPU, on two or more also those that need several (`pytest -m gpus`), compares the golden
numbers (ci/golden.py) with those recorded on such a GPU, if any were, then runs every benchmark of ci/bench, and writes
what they found as JSON, with the device, the driver and the versions beside it. Needs no network. Goes on after a
failure; ends with status 1 if anything failed. Tests of which none passed have failed: all were skipped, so that nothing
was shown.

  --gpus N      use the first N GPUs, and refuse to run where there are fewer   (default: all that torch sees)
  --quick       toy sizes for the benchmarks: shows that they run, measures nothing
  --only NAME   this part only: `tests`, `tests-gpus`, `golden`, or the name of one benchmark without .py
  --dry-run     print the parts and their commands, and run nothing; needs neither a GPU nor torch

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
GPUS=
DRY=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --quick) QUICK=(--quick); shift ;;
        --dry-run) DRY=1; shift ;;
        --gpus)
            case ${2:-} in '' | 0* | *[!0-9]*) usage >&2; exit 2 ;; esac
            GPUS=$2
            shift 2
            ;;
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
    if [ -n "$DRY" ]; then
        [ "$1" != run_tests ] || shift 2
        printf '%s:%s\n' "$name" "$(printf ' %q' "$@")"
        return
    fi
    say "$name"
    if "$@" </dev/null 2>&1 | tee "$OUT/$name.log"; then
        say "$name: done in $((SECONDS - start)) s"
    else
        say "$name: FAILED after $((SECONDS - start)) s"
        FAILED+=("$name")
    fi
}

# The tests that these markers choose. A run in which every one was skipped shows nothing, and pytest calls it a success.
tests() { # NAME MARKERS
    local report=$OUT/$1.xml
    part "$1" run_tests "$report" "$PY" -P -m pytest -m "$2" -p no:cacheprovider --junitxml="$report"
}

run_tests() { # REPORT COMMAND...
    local report=$1
    shift
    rm -f "$report"
    "$@" || return
    "$PY" - "$report" <<'PY'
import sys
from xml.etree import ElementTree

suites = list(ElementTree.parse(sys.argv[1]).getroot().iter("testsuite"))
ran, unsuccessful = (
    sum(int(suite.get(name)) for suite in suites for name in names)
    for names in (["tests"], ["skipped", "failures", "errors"])
)
print(f"{ran - unsuccessful} of {ran} tests passed")
if ran == unsuccessful:
    sys.exit(f"all {ran} tests were skipped: this run shows nothing; the reasons are above")
PY
}

parts() {
    tests tests 'gpu and not gpus'
    if [ "$GPUS" -ge 2 ]; then
        tests tests-gpus gpus
    elif [ -z "$DRY" ]; then
        say "tests-gpus: not run, it needs at least 2 GPUs"
    fi
    # What was found becomes the record of a GPU that has none: from golden.json to ci/golden.
    part golden "$PY" ci/golden.py --check --out "$OUT/golden.json"
    for script in ci/bench/*.py; do
        # Modules that the benchmarks share have no main part.
        grep -q '__main__' "$script" || continue
        name=$(basename "$script" .py)
        part "$name" "$PY" "$script" --out "$OUT/$name.json" "${QUICK[@]}"
    done
    [ "$RAN" -gt 0 ] || refuse "--only $ONLY: no such part with $GPUS GPU(s); --dry-run lists them"
}

if [ -n "$DRY" ]; then
    GPUS=${GPUS:-$(gpus)}
    parts
    exit
fi

"$PY" -c 'import torch' 2>/dev/null || refuse "$PY has no torch; set PY to a Python that has one built for CUDA"
SEEN=$("$PY" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)' 2>/dev/null || echo 0)
[ "$SEEN" -gt 0 ] ||
    refuse "torch of $PY sees no GPU ($(gpus) listed by nvidia-smi); ci/test.sh runs everything that needs none"
GPUS=${GPUS:-$SEEN}
[ "$GPUS" -le "$SEEN" ] || refuse "--gpus $GPUS: torch of $PY sees $SEEN ($(gpus) listed by nvidia-smi)"
if [ "$GPUS" -lt "$SEEN" ]; then
    # Of those that a scheduler has granted, where it names them.
    CUDA_VISIBLE_DEVICES=$(cut -d, -f "1-$GPUS" <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((SEEN - 1)))}")
    export CUDA_VISIBLE_DEVICES
fi
[ -z "$WHEELS" ] || install_wheels
# -P: the folder megamem of this checkout lacks megamem.kernels and megamem.patches, which only an installed one has.
"$PY" -P -c 'import megamem.patches, megatron.core, pytest' 2>/dev/null ||
    refuse "$PY lacks megamem, megatron-core or pytest; run ci/test.sh first and set PY, or set WHEELS (see --help)"

mkdir -p "$OUT"
MACHINE=$(describe_machine)
say "$MACHINE"
parts
if [ ${#FAILED[@]} -gt 0 ]; then
    say "ci/gpu.sh: FAILED: ${FAILED[*]}; results in $OUT; $MACHINE"
    exit 1
fi
say "ci/gpu.sh: $RAN parts passed; results in $OUT; $MACHINE"
