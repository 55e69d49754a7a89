#!/usr/bin/env bash
# DeepSpeed ZeRO: bash launch/deepspeed.sh STAGE --config configs/sd14_laion.yaml [settings of train_filtered.py]
# STAGE is 1, 2, 2_offload or 3 (with --train.ema_half_life=0): configs/deepspeed/zeroSTAGE.json. The rest is
# multi_gpu.sh, or, where NNODES is set, multi_node.sh. Needs pip install '.[deepspeed]'.
# On CPUs: NPROC=2 DS_ACCELERATOR=cpu bash launch/deepspeed.sh 2 ...
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
ACCELERATE_DEEPSPEED_CONFIG_FILE="$here/../configs/deepspeed/zero${1:-}.json"
[ -f "$ACCELERATE_DEEPSPEED_CONFIG_FILE" ] || { echo "usage: $0 1|2|2_offload|3 [settings]" >&2; exit 1; }
export ACCELERATE_DEEPSPEED_CONFIG_FILE ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO3_INIT=false
script=multi_gpu.sh
[ -z "${NNODES:-}" ] || script=multi_node.sh
exec bash "$here/$script" "${@:2}"
