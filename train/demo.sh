#!/usr/bin/env bash
# Makes everything the demo ships: synthetic scenes -> sampled rows -> model and dummies. About an hour on two cores.
# Usage: bash train/demo.sh [work folder]
set -euo pipefail
work=${1:-out/demo-training}
wireframe synth "$work/raw" --seed 1 --count 3000 --shard-size 250 --set colmap_points=8000
wireframe prepare "$work/raw" "$work/rows" --points 512 --depth-points 8000
wireframe train --config train/configs/demo.json --data "$work/rows" --out "$work/run" --threads 2
python -m wireframe.train.export "$work/run/model" "$work/rows" wireframe/assets/demo_model
