#!/usr/bin/env bash
# SGLang with a head mask against stock SGLang: equal KV bytes, equal work, engines taking turns on one GPU.
#
#   bash scripts/bench_efficiency.sh gates=GATES [key=value ...]
#   bash scripts/bench_efficiency.sh gates=GATES works=bound kv_gib=15 chunk=-1              memory-bound, long answers
#   bash scripts/bench_efficiency.sh gates=GATES works=load kv_gib=15 rate=7                 Poisson arrivals
#   bash scripts/bench_efficiency.sh gates=GATES arms=stock,0,0.5 works=alone:3,ample:3 kv_gib=6.25 running=72 memory=0.97
#
# arms       stock and sparsities (default: stock,0.5)     together=false  one engine after the other (80 GB hold two
#                                                          of 15 GiB, three of 6.25 GiB)
# works      of benchmarks/serve_work.py, :3 for three turns; profile: kernels of a decoding step
# out        folder of results (runs/efficiency)           RLKV_PYTHON     interpreter with SGLang and the plugin
# Others are settings of benchmarks/serve_sglang.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in "" | -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0" && exit ;; esac

export PYTHONPATH="$PWD:$PWD/sglang${PYTHONPATH:+:$PYTHONPATH}"
exec "${RLKV_PYTHON:-python}" benchmarks/serve_compare.py "$@"
