#!/usr/bin/env bash
# Every method on the pocket reasoner at equal KV bytes, then tables and figures (docs/results/methods).
#
#   bash scripts/pocket_methods.sh GATES [OUTPUT] [key=value ...]
#
# GATES      RLKV's gates, such as docs/results/pocket/seed-1
# OUTPUT     folder for answers, tables/ and figures/ (default: runs/methods)
# key=value  more settings of `rlkv-eval run`: n=32 slots=64 for a small run on a CPU
# RLKV_VENV  environment to use (default: .venv), with RLKV and its evaluation installed: pip install -e . -e eval
# About four minutes on one H100.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help | "") sed -n '2,10s/^# \{0,1\}//p' scripts/pocket_methods.sh && exit ;; esac
source scripts/venv.sh

gates=$1 output=${2:-runs/methods}
use_venv --no-install
export PYTHONPATH="$PWD:$PWD/eval${PYTHONPATH:+:$PYTHONPATH}"
rlkv_eval="$python -m rlkv_eval.cli"

say "DuoAttention's gates, trained on retrieval"
$rlkv_eval train-duo configs/duo-pocket.yaml output="$output/duo" resume=true

say "all methods, and the full cache twice"
$rlkv_eval run model=pocket gates="$gates" options.duo.gates="$output/duo" \
    tasks=pocket,pocket_recall sparsities=0.25,0.5 noise_floor=true max_new_tokens=512 slots=512 dtype=float32 \
    methods=full,rlkv,ablation,duo,kvzip,random,h2o,rkv,streaming,random_eviction output="$output/answers" "${@:3}"

say "tables and figures"
$rlkv_eval tables "$output/answers" output="$output/tables"
$rlkv_eval figures "$output/answers" output="$output/figures"
