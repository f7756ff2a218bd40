#!/usr/bin/env bash
# The three-stage recipe from data to HSS.
#   bash train/reproduce.sh [OUT]            the published sampled sets, from the hub (log in and accept the terms first)
#   DATA_2048=... DATA_4096=... bash train/reproduce.sh [OUT]      the same sets from elsewhere
#   bash train/reproduce.sh --smoke [OUT]    the same path in small on synthetic scenes, for a CPU, about two minutes
# Run it again to go on where it stopped. More options of `wireframe train` in OPTIONS, the interpreter in PYTHON.
set -euo pipefail
smoke=0
if [ "${1:-}" = --smoke ]; then smoke=1; shift; fi
out=${1:-out/reproduce}
wireframe=("${PYTHON:-python3}" -m wireframe)
read -r -a options <<< "${OPTIONS:-}"

if [ $smoke = 1 ]; then
    # One core, so that the bits are those of any machine with the same processor and software.
    train=(--smoke --threads 1 --data "$out/64" --data "$out/128")
    score=(--dev-val 4 --threshold 0.05)
    data=$out/128
    "${wireframe[@]}" synth "$out/raw" --seed 2 --count 28 --preset training
    for points in 64 128; do
        "${wireframe[@]}" prepare "$out/raw" "$out/$points" --points $points --depth-points 2000
    done
else
    data=${DATA_4096:-hf://datasets/usm3d/s23dr-2026-sampled_4096_v2}
    train=(--data "${DATA_2048:-hf://datasets/usm3d/s23dr-2026-sampled_2048_v2}" --data "$data")
    score=()
fi
"${wireframe[@]}" train "${train[@]}" --out "$out/run" "${options[@]}"
"${wireframe[@]}" eval "$data" --model "$out/run/model" --split dev-val "${score[@]}" --out "$out/dev-val.json" --worst 20
echo "report: $out/run/report.html"
