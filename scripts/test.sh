#!/usr/bin/env bash
# Install and test: ruff, mypy and pytest. Any failure ends the script with a non-zero status.
#
#   bash scripts/test.sh [--no-install] [--slow] [pytest arguments ...]
#
# --no-install  use the environment as it is          --slow  also run the tests marked slow
# RLKV_VENV     environment to use (default: .venv)   RLKV_TEST_WORKERS  test processes (default: 2)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

extras=dev,train,eval
select=(-m "not slow")
arguments=()
for argument in "$@"; do
    case $argument in
        --no-install) extras=--no-install ;;
        --slow) select=() ;;
        -h | --help) sed -n '2,7s/^# \{0,1\}//p' scripts/test.sh && exit ;;
        *) arguments+=("$argument") ;;
    esac
done

started=$SECONDS
use_venv "$extras"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # one core for each test process
export TOKENIZERS_PARALLELISM=false

say "ruff: lint"
"$python" -m ruff check .
say "ruff: format"
"$python" -m ruff format --check .
say "mypy: types"
"$python" -m mypy rlkv eval/rlkv_eval
say "pytest"
"$python" -m pytest -x -q --durations=10 -n "${RLKV_TEST_WORKERS:-2}" --dist loadgroup "${select[@]}" "${arguments[@]}"
say "all checks passed in $((SECONDS - started)) s"
