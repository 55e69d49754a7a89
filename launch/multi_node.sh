#!/usr/bin/env bash
# All GPUs of several machines. On each of them, here the first of two:
#   MASTER_ADDR=node0 MASTER_PORT=29500 NNODES=2 NODE_RANK=0 bash launch/multi_node.sh --config my.yaml [settings]
# MASTER_ADDR is the machine with NODE_RANK=0. NPROC, signals and exit codes as in multi_gpu.sh: a signal to one machine
# ends the run on all. run_dir must be a directory that all of them see.
set -euo pipefail
for name in MASTER_ADDR MASTER_PORT NNODES NODE_RANK; do
    [ -n "${!name:-}" ] || { echo "error: $name is not set, see the head of $0" >&2; exit 1; }
done
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}" # seconds for the checkpoint, not 30
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1              # or torchrun dies of SIGUSR1 alone
exec torchrun --nnodes="$NNODES" --node-rank="$NODE_RANK" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" \
    --nproc-per-node="${NPROC:-gpu}" "$(dirname "$0")/../train_filtered.py" "$@"
