#!/usr/bin/env bash
# Train gates by the paper's recipe (configs/qwen3-4b-thinking.yaml).
#
#   bash scripts/train_qwen3-4b-thinking.sh [MODEL] [key=value ...]
#
# MODEL is a hub id or a local folder (default: Qwen/Qwen3-4B-Thinking-2507).
# Settings and RLKV_VENV are those of scripts/train.sh, e.g. data=data/collected/train.jsonl resume=true
case " $* " in *" -h "* | *" --help "*) sed -n '2,7s/^# \{0,1\}//p' "$0" && exit ;; esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" configs/qwen3-4b-thinking.yaml "$@"
