#!/usr/bin/env bash
# The test suite, environment included: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
bash launch/img2dataset.sh || echo "the tests that download pictures will be skipped" >&2
# three workers on two cores: a third of the time the tests wait for processes
python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 40 "$@"
