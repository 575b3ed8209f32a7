#!/usr/bin/env bash
# Accuracy of the full cache, twice: what the sparse runs are compared with, and the noise between two equal runs.
#
#   bash scripts/bench_base.sh MODEL [TASKS] [key=value ...]
#   bash scripts/bench_base.sh deepseek-ai/DeepSeek-R1-Distill-Llama-8B
#   bash scripts/bench_base.sh pocket pocket n=16
#
# MODEL      hub id, local folder, or pocket
# TASKS      such as gsm8k,math500 (default: the four of the paper's main table)
# key=value  any setting of `rlkv-eval run --help`, such as methods=full,h2o,rkv,streaming or noise_floor=false
# RLKV_VENV  environment to use (default: .venv)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/venv.sh

if [ $# -lt 1 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    sed -n '2,11s/^# \{0,1\}//p' scripts/bench_base.sh
    [ $# -gt 0 ] && exit 0
    exit 2
fi
model=$1
shift
tasks=gsm8k,math500,aime24,mbpp
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then tasks=$1 && shift; fi

use_venv --no-install
export PYTHONPATH=.:eval${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m rlkv_eval.cli run model="$model" tasks="$tasks" methods=full noise_floor=true \
    output="runs/benchmark/$(basename "$model")" "$@"
