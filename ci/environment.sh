# The virtual environment that all scripts share. Sourced, not run: examples/quickstart.sh, ci/test.sh, ci/matrix.sh.
#
#   PYTHON   the interpreter to begin with   (default: the first of python3, python3.13, 3.12, 3.11 that is new enough)
#   VENV     where the environment is        (default: .venv)
#
# say TEXT                        a line of progress, with the seconds since the start
# is_python COMMAND [MINOR ...]   whether COMMAND starts a Python 3 of one of these minor versions; without any, >= 3.11
# make_environment                creates VENV if it is not there, and sets PY to its interpreter (a full path)
# install_into_environment EXTRAS [REQUIREMENT ...]
#                                 torch, then megamem from this checkout (editable) with these extras; nothing when that
#                                 has been done and setup.py is as it was then
# install_bridge                  Megatron-Bridge of the series that fits the Megatron-Core in VENV, so that it can be
#                                 imported on a CPU; needs the extra nemo-cpu. A line and no failure where none fits
# build_wheel DIRECTORY           makes DIRECTORY with the wheel of megamem in it, as users install it, and nothing else
# gpus                            how many NVIDIA GPUs this machine has
#
# They return a status and rely on nobody's `set -e`. Call them from the root of the repository. STEP says what is being
# done, for the caller's closing line.

VENV=${VENV:-.venv}
# For pytest. A file's tests stay in one process: they share whole training runs. Many have ranks of their own: more
# processes than four only get in each other's way.
WORKERS=(-n auto --maxprocesses 4 --dist loadfile)
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '[%3ds] %s\n' "$SECONDS" "$*"; }

gpus() {
    if command -v nvidia-smi >/dev/null 2>&1; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

is_python() {
    local command=$1
    shift
    "$command" -c 'import sys
minors = [int(text) for text in sys.argv[1:]] or range(11, 99)
sys.exit(not (sys.version_info[0] == 3 and sys.version_info[1] in minors))' "$@" >/dev/null 2>&1
}

# find_python: prints the first interpreter on PATH that is new enough, or nothing.
find_python() {
    local command
    for command in python3 python3.13 python3.12 python3.11; do
        if is_python "$command"; then
            echo "$command"
            return
        fi
    done
}

make_environment() {
    STEP="creating $VENV"
    case $VENV in /*) PY=$VENV/bin/python ;; *) PY=$PWD/$VENV/bin/python ;; esac
    if "$PY" -m pip --version >/dev/null 2>&1; then
        if ! is_python "$PY"; then
            echo "$VENV holds $("$PY" --version), megamem needs 3.11 or later; remove $VENV and run again" >&2
            return 1
        fi
        return
    fi
    if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ]; then
        echo "$VENV is there and is no virtual environment; move it away, or set VENV to another place" >&2
        return 1
    fi
    PYTHON=${PYTHON:-$(find_python)}
    if ! is_python "${PYTHON:-none}"; then
        echo "megamem needs Python 3.11 or later; ${PYTHON:-each of python3, python3.13, python3.12, python3.11}" \
            "is missing or older; set PYTHON to such an interpreter" >&2
        return 1
    fi
    say "creating $VENV with $("$PYTHON" --version)"
    # Where an earlier run was interrupted there is half an environment: begin again.
    if ! "$PYTHON" -m venv --clear "$VENV"; then
        echo "could not create a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2
        return 1
    fi
}

install_into_environment() {
    local extras=$1 stamp state
    shift
    STEP="installing into $VENV"
    stamp=$VENV/.megamem-$extras
    state=$("$PY" - setup.py "$PWD" "$extras" "$@" <<'PY'
import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), *sys.argv[2:])
PY
    )
    if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
        say "already installed in $VENV: megamem[$extras]"
        return
    fi
    # setuptools and wheel first: megamem is built without isolation, so that nothing is downloaded for the build alone.
    "$PY" -m pip install -qq 'setuptools>=77' wheel || return
    if ! "$PY" -c 'import torch' 2>/dev/null; then
        say "installing PyTorch (the large one: minutes)"
        "$PY" -m pip install -qq "$(torch_to_install)" || return
    fi
    say "installing megamem[$extras]${*:+ with $*}"
    "$PY" -m pip install -qq --no-build-isolation -e ".[$extras]" "$@" || return
    printf '%s\n' "$state" >"$stamp"
}

# Without dependencies: Bridge's own hold what only a GPU machine can build. Its resiliency extension is built for a glibc
# newer than some distributions have, and pure Python as far as Bridge imports it; pip takes it if the platform is named.
install_bridge() {
    local core bridge extension site
    STEP="installing Megatron-Bridge into $VENV"
    core=$("$PY" -c 'from importlib.metadata import version; print(version("megatron-core"))') || return
    case $core in
        0.16.*) bridge=0.3.1 extension=0.4.1 ;;
        0.19.*) bridge=0.6.2 extension=0.6.0 ;;
        *)
            say "no Megatron-Bridge to install beside megatron-core $core; its tests are skipped"
            return
            ;;
    esac
    if "$PY" -c 'import sys
from importlib.metadata import version
sys.exit([version("megatron-bridge"), version("nvidia-resiliency-ext")] != sys.argv[1:])' "$bridge" "$extension" \
        2>/dev/null; then
        return
    fi
    say "installing megatron-bridge $bridge, without what it asks for"
    site=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return
    # Another release is taken out first: --target would leave its metadata there, and Megatron-Core reads the version.
    "$PY" -m pip uninstall -qq -y nvidia-resiliency-ext 2>/dev/null
    "$PY" -m pip install -qq --no-deps --upgrade --target "$site" --platform manylinux_2_39_x86_64 \
        --platform manylinux_2_31_x86_64 --only-binary=:all: "nvidia-resiliency-ext==$extension" || return
    "$PY" -m pip install -qq --no-deps "megatron-bridge==$bridge" || return
}

torch_to_install() {
    if [ "$(gpus)" -eq 0 ] && is_python "$PY" 11; then
        echo 'torch==2.13.0' # a build without CUDA, where the index has one
    else
        echo 'torch>=2.6'
    fi
}

# The sources are copied first: setuptools builds in place, and would put files into the wheel that are long deleted here.
build_wheel() {
    rm -rf "$1"
    mkdir -p "$1/source" || return
    cp -R megamem kernels patches setup.py pyproject.toml README.md "$1/source/" || return
    "$PY" -m pip wheel -qq --no-index --no-build-isolation --no-deps -w "$1" "$1/source" || return
    rm -rf "$1/source"
}
