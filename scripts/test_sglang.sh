#!/usr/bin/env bash
# Install the released SGLang's CPU engine and test the serving plugin on it: the pocket reasoner over the OpenAI API.
#
#   bash scripts/test_sglang.sh [pytest arguments ...]
#
# --slow             200 prompts and not 20; the other arguments go to pytest
# RLKV_SGLANG_VENV   environment to use (default: .venv-sglang; 3.2 GB, a minute or two to install)
# SGLang 0.5.17 wants a transformers of its own, so this is not the environment of scripts/test.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help) sed -n '2,9s/^# \{0,1\}//p' scripts/test_sglang.sh && exit ;; esac
source scripts/venv.sh

select=(-m "not slow")
[ "${1:-}" = --slow ] && select=() && shift
venv=${RLKV_SGLANG_VENV:-.venv-sglang}
started=$SECONDS
if [ ! -x "$venv/bin/python" ]; then
    say "making a virtual environment in $venv"
    "${PYTHON:-python3}" -m venv "$venv"
fi
python=$(cd "$venv/bin" && pwd)/python
say "installing SGLang's CPU engine"
pip() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip torch==2.13.0 transformers==5.12.1 accelerate safetensors scipy pillow psutil requests tqdm regex ninja ipython
pip --no-deps -r sglang/requirements-cpu.txt
pip pytest pytest-timeout pytest-xdist hypothesis
pip -e .
pip --no-deps -e sglang/

say "pytest on SGLang $("$python" -c 'from importlib.metadata import version; print(version("sglang"))')"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false
"$python" -m pytest -x -q --durations=5 "${select[@]}" tests/test_sglang_*.py tests/test_serving_*.py "$@"
say "the plugin's checks passed in $((SECONDS - started)) s"
