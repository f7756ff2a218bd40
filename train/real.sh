#!/usr/bin/env bash
# Makes the model for scenes as hard as real ones: 8,000 of them -> sampled rows -> model -> its thresholds.
# Hours on a CPU; every part goes on where it stopped. Usage: bash train/real.sh [work folder]
set -euo pipefail
work=${1:-out/real}
wireframe synth "$work/raw" --preset real --size 320x240 --set colmap_points=12000 --seed 1 --count 8000
wireframe prepare "$work/raw" "$work/rows" --points 1024
wireframe train --config real --init wireframe/assets/demo_model --data "$work/rows" --out "$work/run" --threads 1
wireframe synth "$work/tuning" --preset real --seed 2 --count 200
wireframe predict "$work/tuning" "$work/tuning.npz" --format segments --model "$work/run/model"
wireframe tune "$work/tuning.npz" "$work/run/model"
python -m wireframe.train.export "$work/run/model" "$work/rows" wireframe/assets/model --dtype bfloat16
python -m wireframe.bench.held_out wireframe/assets/model --out "$work/held-out"
