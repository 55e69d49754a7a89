#!/usr/bin/env bash
# Fine-tunes the embedded model twice, without a filter and with evidence, and writes runs/quickstart/report.html.
# Repeating the command goes on from the last checkpoint; remove runs/quickstart to begin anew. Data and training settings
# are those of configs/quickstart.yaml; filter, run_dir and checkpoints are set here.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
export HF_HUB_OFFLINE=1 # nothing is needed from there
runs=runs/quickstart
export OMP_NUM_THREADS=1 # one core for each of the two runs

[ -d "$runs/scenes" ] || memfilter prepare scenes "$runs/scenes"

fine_tune() { # name, settings of the filter
    local name="$1"
    shift
    trap : INT TERM # which what it runs has got too, and is waited for
    # a run that is finished stays as it is
    python train_filtered.py --config configs/quickstart.yaml --run_dir "$runs/$name" --checkpoint.resume=true \
        --checkpoint.every=4000 "$@"
    [ -f "$runs/$name/evaluation.json" ] || memfilter evaluate "$runs/$name"
}

# A shell gives what it starts in the background no Ctrl-C. Each of the two has a process group of its own, which is told as a
# whole, and waited for: it makes a checkpoint.
off='' evidence=''
trap 'trap "" INT TERM; kill -- ${off:+-$off} ${evidence:+-$evidence} 2>/dev/null || true; wait; exit 143' INT TERM
set -m
# tau=inf drops nothing and still measures the norm
fine_tune off --filter.tau=inf &
off=$!
fine_tune evidence --filter.method=evidence > "$runs/evidence.log" 2>&1 &
evidence=$!
set +m
failed=0
wait $off || failed=1
wait $evidence || { failed=1; tail -n 20 "$runs/evidence.log" >&2; }
[ $failed = 0 ] || { echo "the quickstart failed" >&2; exit 1; }

memfilter report "$runs/off" "$runs/evidence" "$runs/report.html"
