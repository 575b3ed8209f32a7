#!/usr/bin/env bash
# Accuracy with a head mask: `rlkv-eval run` with the method rlkv, for one model. A killed run goes on where it was.
#
#   bash scripts/bench_rlkv.sh MODEL GATES [TASKS] [SPARSITIES] [key=value ...]
#   bash scripts/bench_rlkv.sh deepseek-ai/DeepSeek-R1-Distill-Llama-8B gates/llama-8b-r1
#   bash scripts/bench_rlkv.sh pocket docs/results/pocket/seed-1 pocket 0.25,0.5 n=16
#
# MODEL       hub id, local folder, or pocket            GATES  gates folder or table
# TASKS       such as gsm8k,math500 (default: the four of the paper's main table)
# SPARSITIES  default 0.2,0.4,0.6,0.8                    key=value  any setting of `rlkv-eval run --help`
# METHOD=name   another method of `rlkv-eval run` instead of rlkv
# RLKV_VENV     environment to use (default: .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

if [ $# -lt 2 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    sed -n '2,12s/^# \{0,1\}//p' scripts/bench_rlkv.sh
    [ $# -gt 0 ] && [ "${1#-}" != "$1" ] && exit 0
    exit 2
fi
model=$1 gates=$2
shift 2
tasks=gsm8k,math500,aime24,mbpp sparsities=0.2,0.4,0.6,0.8
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then tasks=$1 && shift; fi
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then sparsities=$1 && shift; fi

use_venv --no-install
export PYTHONPATH=.:eval${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m rlkv_eval.cli run model="$model" gates="$gates" tasks="$tasks" methods="${METHOD:-rlkv}" \
    sparsities="$sparsities" output="runs/benchmark/$(basename "$model")" "$@"
