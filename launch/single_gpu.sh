#!/usr/bin/env bash
# One GPU: bash launch/single_gpu.sh --config configs/sd14_laion.yaml [settings of train_filtered.py]
# CUDA_VISIBLE_DEVICES=1 takes another; ACCELERATE_USE_CPU=true takes none. Exit codes are train_filtered.py's.
set -euo pipefail
exec python "$(dirname "$0")/../train_filtered.py" "$@"
