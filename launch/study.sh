#!/usr/bin/env bash
# The comparison of training-time methods: bash launch/study.sh; repeating the command goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export OMP_NUM_THREADS=1 # one core for each run

for seed in 301 302 303; do
    scenes="runs/study/scenes-$seed"
    [ -d "$scenes" ] || memfilter prepare scenes "$scenes" --seed="$seed" --duplicates=20 --repeats=200 --distinct=2000
    memfilter prepare groups "$scenes"
done
memfilter sweep configs/sweeps/study.yaml --out=runs/study --processes="$(nproc)" --evaluate="--distinct=40 --seeds=4 --steps=10"
memfilter report runs/study
