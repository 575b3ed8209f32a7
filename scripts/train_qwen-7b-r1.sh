#!/usr/bin/env bash
# Train gates by the paper's recipe (configs/qwen-7b-r1.yaml).
#
#   bash scripts/train_qwen-7b-r1.sh [MODEL] [key=value ...]      (scripts/train.sh says what they mean)
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" configs/qwen-7b-r1.yaml "$@"
