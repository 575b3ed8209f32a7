#!/usr/bin/env bash
# Draw the paper's tables and figures: from the authors' published files, and from results of our own.
#
#   bash scripts/paper_tables.sh [OUTPUT] [RESULTS ...]
#
# OUTPUT      folder for tables/ and figures/ (default: paper)
# RESULTS     output folders of `rlkv-eval run`, one for each model (default: none)
# RLKV_SHARED_DATA  folder with published/ and gates/ (default: ../shared/data); what is not there is left out
# RLKV_VENV   environment to use (default: .venv), with RLKV and its evaluation installed: pip install -e . -e eval
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help) sed -n '2,9s/^# \{0,1\}//p' scripts/paper_tables.sh && exit ;; esac
source scripts/venv.sh

output=${1:-paper}
results=("${@:2}")
data=${RLKV_SHARED_DATA:-../shared/data}
sources=()
[ -d "$data/published" ] && sources+=(published="$data/published")
[ -d "$data/gates" ] && sources+=(gates="$data/gates")
if [ ${#results[@]} -gt 0 ]; then
    sources+=(results="$(IFS=, && echo "${results[*]}")")
fi
if [ ${#sources[@]} -eq 0 ]; then
    echo "nothing to draw from: $data has no published/ or gates/ (set RLKV_SHARED_DATA), and no results are named" >&2
    exit 2
fi

use_venv --no-install
export PYTHONPATH="$PWD:$PWD/eval${PYTHONPATH:+:$PYTHONPATH}"
say "tables in $output/tables"
"$python" -m rlkv_eval.cli tables "${sources[@]}" output="$output/tables"
say "figures in $output/figures"
"$python" -m rlkv_eval.cli figures "${sources[@]}" output="$output/figures"
