#!/usr/bin/env bash
# Train gates as a config file says.
#
#   bash scripts/train.sh CONFIG.yaml [MODEL] [key=value ...]
#
# MODEL is a hub id or a local folder (default: the config's); further settings are passed on to rlkv train,
# e.g. window=16+64 data=data/collected/train.jsonl target_sparsity=0.5 resume=true
# RLKV_VENV names the environment to use (default: .venv; it is made if it is not there).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for argument in "$@"; do
    case $argument in -h | --help) sed -n '2,8s/^# \{0,1\}//p' scripts/train.sh && exit ;; esac
done
source scripts/venv.sh

config=${1:?give a config file such as configs/pocket.yaml}
shift
model=()
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
    model=("model=$1")
    shift
fi
use_venv train
export TOKENIZERS_PARALLELISM=false
exec "$python" -m rlkv.cli train "$config" "${model[@]}" "$@"
