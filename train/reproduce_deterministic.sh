#!/usr/bin/env bash
# The recipe twice, and the proof that both runs gave the same bits: exit status 0 if they did, 1 if not.
#   bash train/reproduce_deterministic.sh [--smoke] [OUT]      as train/reproduce.sh
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
smoke=()
if [ "${1:-}" = --smoke ]; then smoke=(--smoke); shift; fi
out=${1:-out/reproduce-deterministic}
for run in first second; do
    bash "$here/reproduce.sh" "${smoke[@]}" "$out/$run"
    # One download is enough.
    export DATA_2048=${DATA_2048:-$out/$run/data/2048} DATA_4096=${DATA_4096:-$out/$run/data/4096}
done
"${PYTHON:-python3}" -m wireframe verify "$out/first/run" "$out/second/run"
