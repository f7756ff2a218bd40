#!/usr/bin/env bash
# One offline command for a CUDA machine: builds what there is, runs the gpu tests, then the GPU benchmarks.
#   bash bench/gpu_check.sh            results go to bench/results
#   OUT=folder PYTHON=python3.12 bash bench/gpu_check.sh
# Needs torch, triton, numpy, pybind11, ninja, setuptools and pytest; no network, and nothing is installed.
# Every step has its own time limit and their sum is below 9 minutes. A failed step does not stop the next
# ones; the exit status is 1 if any failed. Without a CUDA device the steps say "skipped: no CUDA device".
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
OUT=${OUT:-$ROOT/bench/results}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
cd "$ROOT" || exit 1
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# cuBLAS reads this when CUDA starts; without it deterministic products are an error.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

SUMMARY=$OUT/summary.txt
rm -f "$OUT"/{machine,build,tests,gpu_ops}.log "$OUT/gpu_ops.jsonl"
: > "$SUMMARY"
failed=0

say() { echo "$*" | tee -a "$SUMMARY"; }

# step NAME SECONDS COMMAND...: runs the command under the limit and adds its line to the summary.
step() {
    local name=$1 limit=$2 status note="" start=$SECONDS
    shift 2
    timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1 < /dev/null
    status=$?
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        note="; stopped at its limit of $limit s"
    elif [ "$status" -eq 0 ] && [ "$cuda" = none ] && grep -q "no CUDA device" "$OUT/$name.log"; then
        note="; skipped: no CUDA device"
    fi
    [ "$status" -eq 0 ] || failed=1
    # What it said last: the counts of pytest, or the error.
    note="$note; $(tail -n 1 "$OUT/$name.log" | cut -c 1-200)"
    say "$name: exit status $status, $((SECONDS - start)) s$note"
}

machine() {
    command -v nvidia-smi > /dev/null && nvidia-smi
    "$PYTHON" - << 'END'
import importlib.util, platform
import numpy, torch
print(f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}")
if importlib.util.find_spec("triton"):
    import triton
    print(f"triton {triton.__version__}")
else:
    print("triton is not installed")
if torch.cuda.is_available():
    capability = "sm_%d%d" % torch.cuda.get_device_capability()
    print(f"device: {torch.cuda.get_device_name()}, {capability}, CUDA {torch.version.cuda} in torch")
else:
    print("device: none")
END
}

build() {
    local sources
    sources=$(find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')
    if [ -n "$sources" ]; then
        echo "csrc/ holds code that this script does not build yet:" $sources
        return 1
    fi
    echo "nothing to build: csrc/ holds no code yet"
}

# timeout starts programs, not functions.
export PYTHON
export -f machine build

cuda=unknown
step machine 60 bash -c machine
cat "$OUT/machine.log" | tee -a "$SUMMARY"
grep -q "^device: none" "$OUT/machine.log" && cuda=none
step build 20 bash -c build
step tests 200 "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu tests/test_gpu.py
step gpu_ops 200 "$PYTHON" -m wireframe.bench.gpu_ops --out "$OUT/gpu_ops.jsonl"

say "results: $OUT"
exit "$failed"
