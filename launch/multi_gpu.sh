#!/usr/bin/env bash
# All GPUs of this machine: bash launch/multi_gpu.sh --config configs/sd14_laion.yaml [settings of train_filtered.py]
# NPROC=2 takes so many. On CPUs: NPROC=2 ACCELERATE_USE_CPU=true bash launch/multi_gpu.sh ...
# SIGTERM and SIGUSR1 may be sent to this script: torchrun passes them on and ends when the checkpoint is made. Its exit
# code is 1 then, as after an error; the same command with --checkpoint.resume=true goes on.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}" # seconds for the checkpoint, not 30
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1              # or torchrun dies of SIGUSR1 alone
exec torchrun --standalone --nproc-per-node="${NPROC:-gpu}" "$(dirname "$0")/../train_filtered.py" "$@"
