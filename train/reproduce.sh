#!/usr/bin/env bash
# The three-stage recipe from data to HSS.
#   bash train/reproduce.sh [OUT]            downloads the published sampled sets (accept their terms, `hf auth login`)
#   DATA_2048=... DATA_4096=... bash train/reproduce.sh [OUT]      the same sets, already here
#   bash train/reproduce.sh --smoke [OUT]    the same path in small on synthetic scenes, for a CPU
# Run it again to go on where it stopped. More options of `wireframe train` in OPTIONS, the interpreter in PYTHON.
set -euo pipefail
smoke=0
if [ "${1:-}" = --smoke ]; then smoke=1; shift; fi
out=${1:-out/reproduce}
wireframe=("${PYTHON:-python3}" -m wireframe)
read -r -a options <<< "${OPTIONS:-}"

# A download that breaks off must not be trained on: it has another dev val.
download() {
    command -v hf > /dev/null || { echo "no command hf: pip install huggingface_hub, then hf auth login" >&2; exit 2; }
    hf download --repo-type dataset "usm3d/s23dr-2026-sampled_$1_v2" --include "*train*" --local-dir "$out/data/$1"
}

if [ $smoke = 1 ]; then
    "${wireframe[@]}" synth "$out/raw" --seed 2 --count 28 --preset training
    for points in 64 128; do
        "${wireframe[@]}" prepare "$out/raw" "$out/$points" --points $points --depth-points 2000
    done
    # One thread, so that the bits are those of any machine with the same processor and software.
    train=(--smoke --threads 1 --data "$out/64" --data "$out/128")
else
    [ -n "${DATA_2048:-}" ] || download 2048
    [ -n "${DATA_4096:-}" ] || download 4096
    train=(--data "${DATA_2048:-$out/data/2048}" --data "${DATA_4096:-$out/data/4096}")
fi
# Every stage is scored on its held-out rows when it ends.
"${wireframe[@]}" train "${train[@]}" --out "$out/run" ${options[@]+"${options[@]}"}
echo "report: $out/run/report.html"
