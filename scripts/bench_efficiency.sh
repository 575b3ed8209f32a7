#!/usr/bin/env bash
# Serving throughput of SGLang with a head mask against stock SGLang: equal KV bytes, equal work, one arm after the other.
#
#   bash scripts/bench_efficiency.sh gates=GATES [key=value ...]     settings: python benchmarks/serve_sglang.py, Config
#
# RLKV_ARMS    sparsities to serve (default: 0.25 0.5 0.75)   RLKV_OUT  folder of results (default: runs/efficiency)
# RLKV_PYTHON  interpreter with SGLang and the plugin         Example: rate=4 requests=400 prompt=256 output=2048
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in "" | -h | --help) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit ;; esac

python=${RLKV_PYTHON:-python}
out=${RLKV_OUT:-runs/efficiency}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/sglang${PYTHONPATH:+:$PYTHONPATH}"
arguments=()
for argument in "$@"; do [[ $argument == gates=* ]] || arguments+=("$argument"); done

"$python" benchmarks/serve_sglang.py arm=stock out="$out/stock.json" "${arguments[@]}" > "$out/stock.log" 2>&1
for sparsity in ${RLKV_ARMS:-0.25 0.5 0.75}; do
    "$python" benchmarks/serve_sglang.py arm=rlkv sparsity="$sparsity" out="$out/rlkv-$sparsity.json" "$@" \
        > "$out/rlkv-$sparsity.log" 2>&1
done
"$python" benchmarks/serve_table.py "$out"
