# Sourced by the other scripts: sets $python to an interpreter that has RLKV installed with the extras named.
#
#   say MESSAGE            print a line that stands out
#   use_venv [EXTRAS]      make or reuse a virtual environment; "--no-install" as EXTRAS leaves its packages alone
#
# RLKV_VENV names the environment to use (default: .venv in the repository), PYTHON the interpreter to make it with.

export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # waiting threads yield: fast on shared cores too

say() { printf '\n==> %s\n' "$*"; }

use_venv() {
    local extras=${1:-} venv=${RLKV_VENV:-.venv} base=${PYTHON:-python3}
    if [ ! -x "$venv/bin/python" ]; then
        if [ "$extras" = --no-install ]; then
            echo "no Python environment at $venv: run without --no-install once, or set RLKV_VENV" >&2
            return 1
        fi
        "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "$base is $("$base" --version 2>&1); RLKV needs Python 3.11 or newer: set PYTHON=python3.12, say" >&2
            return 1
        }
        say "making a virtual environment in $venv with $("$base" --version)"
        "$base" -m venv "$venv"
    fi
    python=$(cd "$venv/bin" && pwd)/python
    [ "$extras" = --no-install ] && return
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if ! has_nvidia && ! "$python" -c 'import torch' 2>/dev/null; then
        # Named exactly, this is a small CPU build where the package index has one; a range may pull gigabytes of CUDA.
        say "no NVIDIA GPU here: installing torch 2.13.0"
        "$python" -m pip install --quiet torch==2.13.0
    fi
    say "installing RLKV${extras:+ with $extras} into $venv"
    local packages=(-e ".${extras:+[$extras]}")
    case ",$extras," in *,eval,*) packages+=(-e eval) ;; esac # the extra holds what rlkv_eval needs
    "$python" -m pip install --quiet "${packages[@]}"
}

has_nvidia() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }
