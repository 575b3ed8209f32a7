#!/usr/bin/env bash
# Train gates by the paper's recipe (configs/qwen3-4b-thinking.yaml).
#
#   bash scripts/train_qwen3-4b-thinking.sh [MODEL] [key=value ...]      (scripts/train.sh says what they mean)
exec bash "$(dirname "${BASH_SOURCE[0]}")/train.sh" configs/qwen3-4b-thinking.yaml "$@"
