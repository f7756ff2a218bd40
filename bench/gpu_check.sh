#!/usr/bin/env bash
# One offline command for a CUDA machine: builds the extension in place, runs the gpu tests, then the GPU benchmarks.
#   bash bench/gpu_check.sh            results go to bench/results/gpu_check
#   OUT=folder PYTHON=python3.12 bash bench/gpu_check.sh
#   bash bench/gpu_check.sh kernels attention      these steps alone
#   bash bench/gpu_check.sh contract fingerprint   training by the contract, and its bits: three minutes, by name only
#   bash bench/gpu_check.sh step-tests             the step's operations and graph: by name only
#   bash bench/gpu_check.sh step-1                 a step of stage 1 beside its rivals: by name only
#   bash bench/gpu_check.sh step-3                 the same of stage 3
#   bash bench/gpu_check.sh model-compiled         inference beside torch.compile: by name only
# Three files: summary.txt, a line a step; steps.log, all they said; bench.jsonl, a row a measurement. Calls that name
# their steps add to all three. None is the checkout's: rows to keep are appended to bench/results/DEVICE.jsonl by hand.
# Needs torch, triton, numpy, pybind11, ninja, setuptools, pytest, pytest-benchmark and a C++ compiler; no network, and
# nothing is installed. nvcc is looked for in CUDA_HOME, PATH and /usr/local/cuda; without it the CUDA module is left out.
# Every step has its own time limit and the sum is below 9 minutes for each of these calls. A failed step does not stop
# the next ones; the exit status is 1 if any failed. Without a CUDA device the steps say "skipped: no CUDA device".
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 1
for name in "$@"; do
    grep -Eq "^(step|by-name) $name [0-9]+ " "${BASH_SOURCE[0]}" && continue
    echo "$name is no step; steps: $(grep -Eo '^(step|by-name) [a-z0-9-]+' "${BASH_SOURCE[0]}" | cut -d ' ' -f 2 | paste -sd ' ')" >&2
    exit 2
done
OUT=${OUT:-$ROOT/bench/results/gpu_check}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 1
cd "$ROOT" || exit 1
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# cuBLAS reads this when CUDA starts; without it deterministic products are an error.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

SUMMARY=$OUT/summary.txt LOG=$OUT/steps.log ROWS=$OUT/bench.jsonl
[ $# -gt 0 ] || rm -f "$ROWS" "$SUMMARY" "$LOG"
touch "$SUMMARY" "$LOG" || exit 1
failed=0

say() { echo "$*" | tee -a "$SUMMARY"; }

# said: what the present step has put into the log so far. (No grep -q behind it: that would break the pipe.)
said() { tail -n "+$first" "$LOG"; }

wanted=" $* "

# step NAME SECONDS COMMAND...: runs the command under the limit and adds its line to the summary.
step() {
    local name=$1 limit=$2 status note="" start=$SECONDS
    shift 2
    [ "$wanted" = "  " ] || [ "$name" = machine ] || [[ $wanted == *" $name "* ]] || return 0
    echo "== $name" >> "$LOG"
    first=$(($(wc -l < "$LOG") + 1))
    timeout --kill-after=3 "$limit" "$@" >> "$LOG" 2>&1 < /dev/null
    status=$?
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        note="; stopped at its limit of $limit s"
    elif [ "$status" -eq 0 ] && [ "$cuda" = none ] && said | grep "no CUDA device" > /dev/null; then
        note="; skipped: no CUDA device"
    fi
    [ "$status" -eq 0 ] || failed=1
    # What it said last: the counts of pytest, or the error.
    note="$note; $(said | tail -n 1 | cut -c 1-300)"
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
    if ! command -v nvcc > /dev/null && [ -z "${CUDA_HOME:-}" ] && [ -x /usr/local/cuda/bin/nvcc ]; then
        export CUDA_HOME=/usr/local/cuda
    fi
    if command -v nvcc > /dev/null || [ -x "${CUDA_HOME:-}/bin/nvcc" ]; then
        export WIREFRAME_CUDA=1
    else
        echo "no nvcc: wireframe._C_cuda is left out"
        export WIREFRAME_CUDA=0
    fi
    "$PYTHON" setup.py -q build_ext --inplace || return
    # A failing C++ compiler is no error of an installation, but it is one here.
    "$PYTHON" -c 'import sys; from wireframe.kernels import native
print(*map(native.describe, native.NAMES), sep="; ")
sys.exit(native.problem() is not None)'
}

gpu_tests() { "$PYTHON" -m pytest -p no:cacheprovider -q -m gpu "$@"; }

# All that the parts of a step said, then their last lines as one. (awk ends a line that was broken off.)
parts_said() {
    local part
    awk 1 "$1"/*
    for part in "$1"/*; do tail -n 1 "$part" | awk 1; done | paste -sd "|"
    rm -r "$1"
}

# Most of the time of these tests is compilation, on one core a process; what one compiles, the others find.
kernels() {
    local files=(tests/test_gpu_kernels.py tests/test_atomic_attention.py) part process processes=() failed=0 scratch
    # Every test is in one of them.
    local parts=(
        "budget" "scene_alone" "processes" "attention and not budget and not scene_alone"
        "not attention and not budget and not scene_alone and not processes"
    )
    scratch=$(mktemp -d) || return
    # The limit of the step: what was said until then is all there is to see where the time went.
    trap 'parts_said "$scratch"; exit 143' TERM
    for part in "${!parts[@]}"; do
        gpu_tests "${files[@]}" --durations=5 -k "${parts[part]}" > "$scratch/$part" 2>&1 &
        processes+=($!)
    done
    for process in "${processes[@]}"; do
        wait "$process" || failed=$?
    done
    parts_said "$scratch"
    return "$failed"
}

# Most of the time of these tests is starting processes. They share the GPU.
contract() {
    local process processes=() failed=0 scratch part parts=("test_a_ or test_b_ or test_c_" "test_d_ or signal" "killed")
    scratch=$(mktemp -d) || return
    trap 'parts_said "$scratch"; exit 143' TERM
    for part in "${!parts[@]}"; do
        gpu_tests tests/test_contract.py --durations=3 -k "${parts[part]}" > "$scratch/$part" 2>&1 &
        processes+=($!)
    done
    gpu_tests tests/test_gpu_dropout.py tests/test_train_data.py tests/test_checkpoints.py > "$scratch/rest" 2>&1 &
    processes+=($!)
    for process in "${processes[@]}"; do
        wait "$process" || failed=$?
    done
    parts_said "$scratch"
    return "$failed"
}

# What a step is made of, and that a graph has the bits of single steps. What one process compiles, the others find.
step-tests() {
    local process processes=() failed=0 scratch part
    scratch=$(mktemp -d) || return
    trap 'parts_said "$scratch"; exit 143' TERM
    for part in residual_norm adamw_step linear_gelu point_features kvpacked step_model; do
        gpu_tests "tests/test_gpu_$part.py" --durations=3 > "$scratch/$part" 2>&1 &
        processes+=($!)
    done
    gpu_tests tests/test_steps.py tests/test_checkpoints.py --durations=3 > "$scratch/steps" 2>&1 &
    processes+=($!)
    for process in "${processes[@]}"; do
        wait "$process" || failed=$?
    done
    parts_said "$scratch"
    return "$failed"
}

# Every row is written when it is there, and the goals' rivals come first: the limit costs the last ones at most.
step-table() { "$PYTHON" -m wireframe bench step --stage "$1" --seconds 330 --out "$ROWS"; }

# races PART SECONDS EXPRESSION: every race's rows are written when it is over.
races() {
    "$PYTHON" -m wireframe bench "$1" --device cuda --repeats 3 --seconds "$2" -k "$3" --out "$ROWS"
}

# The rows of the README's table; it needs pyarrow and safetensors.
fingerprint() {
    "$PYTHON" -m wireframe verify --rerun smoke --steps 3 --device cuda --threads 1 &&
        "$PYTHON" -m wireframe verify --rerun base --steps 3 --device cuda --threads 8
}

# timeout starts programs, not functions.
export PYTHON ROWS
export -f machine build gpu_tests parts_said kernels contract fingerprint step-tests step-table races

cuda=unknown
step machine 15 bash -c machine
said | tee -a "$SUMMARY"
said | grep "^device: none" > /dev/null && cuda=none
step build 50 bash -c build
step tests 50 bash -c "gpu_tests tests/test_gpu.py tests/test_gpu_fusion.py"
step kernels 95 bash -c kernels
step sanitizer 40 bash -c "gpu_tests tests/test_gpu_sanitizer.py"
# The benchmarks compile no further rival after their time, and name what they left out.
step attention 125 bash -c "races kernels 60 qk_norm"
step transport 75 bash -c "races kernels 35 'sinkhorn or segment_matching'"
step model 30 bash -c "races pipeline 1 'perceiver or wireframe or predict_segments'"
step fusion 30 bash -c "races kernels 1 'not (qk_norm or sinkhorn or segment_matching)'"

by-name() { [[ $wanted != *" $1 "* ]] || step "$@"; }

by-name contract 200 bash -c contract
by-name fingerprint 200 bash -c fingerprint
by-name step-tests 200 bash -c step-tests
by-name model-compiled 200 bash -c "races pipeline 120 perceiver"
by-name step-1 500 bash -c "step-table 1"
by-name step-3 500 bash -c "step-table 3"

say "results: $OUT"
exit "$failed"
