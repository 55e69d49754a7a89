#!/usr/bin/env bash
# img2dataset in an environment of its own, .venv-img2dataset, which is made at the first call: it pins webdataset<0.3.
# bash launch/img2dataset.sh [img2dataset's arguments]; `memfilter prepare laion download` finds the environment itself.
# PYTHON=python3.11 chooses the interpreter, 3.11 or 3.12; EXTRA="ray" or "pyspark" adds a distributor for many machines,
# and EXTRA= takes it away.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=launch/img2dataset-requirements.txt
python="${PYTHON:-python3}" venv=.venv-img2dataset
# what was added stays where nothing is said of it
EXTRA="${EXTRA-$(cut -d' ' -f3- $venv/.installed 2>/dev/null || true)}"
wanted="$(cksum < $requirements) $EXTRA"
if [ "$(cat $venv/.installed 2>/dev/null)" != "$wanted" ]; then
    # img2dataset imports imghdr, which Python 3.13 has no more
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
        || { echo "error: img2dataset needs Python 3.11 or 3.12, $python is $("$python" -V 2>&1): set PYTHON" >&2; exit 1; }
    echo "installing into $venv" >&2
    "$python" -m venv --clear $venv
    # shellcheck disable=SC2086
    $venv/bin/python -m pip install --quiet --requirement $requirements $EXTRA
    echo "$wanted" > $venv/.installed
fi
[ $# = 0 ] || exec $venv/bin/img2dataset "$@"
