#!/usr/bin/env bash
# The comparison of training-time methods: bash launch/study.sh; repeating the command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export HF_HUB_OFFLINE=1 # nothing is needed from there
export OMP_NUM_THREADS=1 # one core for each run

for seed in 311 312 313; do
    of_seed="runs/clipart/a-$seed" # benchmarks/evidence.py has them there too
    [ -d "$of_seed/scenes" ] || memfilter prepare scenes "$of_seed/scenes" --seed="$seed" --duplicates=20 --repeats=200 --distinct=2000
    memfilter prepare groups "$of_seed/scenes"
    memfilter cache --data.path="$of_seed/scenes" --data.cache="$of_seed/cache"
done
python benchmarks/study.py --begin # what docs/results has is not run again
failed=0 # a run that fails fails the sweep, and what the others say is shown all the same
memfilter sweep configs/sweeps/study.yaml --out=runs/study --processes="$(env -u OMP_NUM_THREADS nproc)" \
    --evaluate="--distinct=40 --seeds=4 --steps=10" || failed=$?
memfilter report runs/study
exit $failed
