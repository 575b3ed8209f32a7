#!/usr/bin/env bash
# Train gates by the paper's recipe (configs/llama-8b-r1.yaml).
#
#   bash scripts/train_llama-8b-r1.sh [MODEL] [key=value ...]
#
# MODEL is a hub id or a local folder (default: deepseek-ai/DeepSeek-R1-Distill-Llama-8B).
# Settings and RLKV_VENV are those of scripts/train.sh, e.g. data=data/collected/train.jsonl resume=true
case " $* " in *" -h "* | *" --help "*) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit ;; esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" configs/llama-8b-r1.yaml "$@"
