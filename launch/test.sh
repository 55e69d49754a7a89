#!/usr/bin/env bash
# The test suite, environment included: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
python -m pytest "$@"
