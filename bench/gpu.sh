#!/usr/bin/env bash
# What only a GPU can show, in one command of under nine minutes: a build, the test suite on the GPU (among it
# CUDA-graph capture and 30 runs that must agree to the bit), compute-sanitizer on a quick subset, the machine code
# of the CUDA module, counters of the two main kernels from ncu, benchmarks.
#
#   bench/gpu.sh [FOLDER]      the results' folder (default: bench/results); PYTHON names the interpreter
#
# Uses the environment of $PYTHON (torch with CUDA, pytest, pybind11, ninja) and installs into a folder of its own.
# Fails if a step fails; says at the end what could not run, and why.
set -uo pipefail
cd "$(dirname "$0")/.."

results=$(realpath -m "${1:-bench/results}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
limit=525
failed=0
report=()

left() { echo $((limit - SECONDS)); }
note() { report+=("$1"); printf '%s\n' "$1"; }

# step NAME SECONDS COMMAND...: runs it, at most so long and not past the limit.
step() {
    local name=$1 most=$2 begin=$SECONDS status=0
    shift 2
    if [ "$(left)" -lt 15 ]; then
        note "not run  $name: the nine minutes are over"
        return 1
    fi
    if [ "$most" -gt "$(left)" ]; then most=$(left); fi
    printf '\n=== %s (%d s)\n' "$name" "$SECONDS"
    timeout --kill-after=5 "$most" "$@" || status=$?
    case $status in
        0) note "passed   $name, $((SECONDS - begin)) s" ;;
        124 | 137) note "stopped  $name: not through after $most s" ;;
        *) note "FAILED   $name, exit status $status" && failed=1 ;;
    esac
    return "$status"
}

if ! "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "bench/gpu.sh: torch of $python finds no GPU; nothing was run" >&2
    exit 2
fi
"$python" -c '
import torch, triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'

cuda=0
if command -v nvcc >/dev/null; then cuda=1; else note "not run  CUDA C++ kernels: no nvcc"; fi
export MMFAST_CUDA=$cuda PYTHONPATH=$work/site PIP_DISABLE_PIP_VERSION_CHECK=1
step "build" 150 "$python" -m pip install --quiet --no-deps --no-build-isolation --target "$work/site" . || exit 1

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
pytest=("$python" -P -m pytest -q -p no:cacheprovider --disable-warnings)
# Not the emulation: what it shows, it shows anywhere.
kernels='(triton or cuda or gpu or graph) and not emulated'
ops=(tests/test_every_op.py)
for file in kernels/[a-z]*.py; do ops+=("tests/test_$(basename "$file")"); done
step "tests of the kernels, CUDA graphs, 30 runs" 150 "${pytest[@]}" "${workers[@]}" "${ops[@]}" -k "$kernels"

if command -v compute-sanitizer >/dev/null; then
    # Every kernel once or twice; the sanitizer slows a kernel by an order of magnitude or more.
    for tool in memcheck racecheck initcheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "compute-sanitizer, $tool" 45 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all --print-limit 20 \
            "$python" tests/sanitized.py
    done
else
    note "not run  compute-sanitizer: not installed"
fi

if [ "$cuda" = 1 ]; then
    step "machine code of the CUDA module" 60 "$python" tools/inspect_cuda.py || true
fi

if command -v ncu >/dev/null; then
    # Bandwidth reached and how busy each pipe was, the matrix units' among them, in per cent.
    sections=(--section SpeedOfLight --section MemoryWorkloadAnalysis --section ComputeWorkloadAnalysis)
    mkdir -p "$results"
    step "ncu, shapley_values and duc_loss" 90 \
        ncu --target-processes all --kernel-name 'regex:shapley|duc|info_nce' "${sections[@]}" \
        --print-details all --csv --log-file "$results/ncu.csv" "$python" -P -m mmfast.bench.profiled &&
        cat "$results/ncu.csv"
else
    note "not run  hardware counters: ncu is not installed"
fi

# What is measured after an op is written at once, so a run that is cut short loses only the rest.
step "benchmarks" 300 "$python" -P -m mmfast bench --device cuda --out "$results"

if [ "$(left)" -gt 40 ]; then
    step "the rest of the test suite" 200 "${pytest[@]}" "${workers[@]}" tests -k "not ($kernels)"
else
    note "not run  the rest of the test suite, which needs no GPU: the nine minutes are over"
fi

printf '\n=== summary (%d s)\n' "$SECONDS"
printf '%s\n' "${report[@]}"
exit "$failed"
