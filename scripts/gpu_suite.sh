#!/usr/bin/env bash
# The kernels' GPU tests, then their benchmark, in under ten minutes on one Hopper GPU.
#   scripts/gpu_suite.sh [FOLDER]   FOLDER (default gpu_suite/) gets tests.log, kernels.md and bench.log
#   PYTHON=/path/to/python          the interpreter (default: .venv's if there is one that sees the GPU, else python3)
#   EXTRA=/path/to/folder           packages to add: pytest and hypothesis, or peers to compare with
#                                   (pip install --target FOLDER --no-deps pytest pluggy iniconfig pygments packaging
#                                    hypothesis sortedcontainers sgl-deep-gemm apache-tvm-ffi torchao liger-kernel)
# Needs torch with CUDA, triton, a C compiler (for triton's launchers), pytest and hypothesis; nothing else of
# requirements/. Exit code 2: something of that is missing; 1: a test or a benchmark's check failed; 3: time ran out.
set -uo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
readonly FOLDER=${1:-gpu_suite} TESTS_S=${TESTS_S:-270} BENCH_S=${BENCH_S:-290}
export PYTHONPATH="$PWD${EXTRA:+:$EXTRA}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONDONTWRITEBYTECODE=1
unset TRITON_INTERPRET

missing() {
    printf 'gpu_suite: %s\n' "$1" >&2
    exit 2
}

sees_gpu() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ] && sees_gpu .venv/bin/python; then PYTHON=.venv/bin/python; fi
fi
command -v "$PYTHON" >/dev/null || missing "no $PYTHON: set PYTHON to an interpreter that has torch"
"$PYTHON" -c 'import torch' 2>/dev/null || missing "$PYTHON has no torch: set PYTHON to an interpreter that has it"
sees_gpu "$PYTHON" || missing "torch of $PYTHON sees no GPU: run this on a machine with a Hopper GPU"
"$PYTHON" -c 'import sys, torch; sys.exit(torch.cuda.get_device_capability() < (9, 0))' ||
    missing "the GPU's compute capability is below 9.0 (Hopper), which the kernels need"
for package in triton pytest hypothesis; do
    "$PYTHON" -c "import $package" 2>/dev/null || missing "$PYTHON has no $package: put it into a folder and set EXTRA to it"
done
command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || missing "no C compiler, which triton needs: set CC"

mkdir -p "$FOLDER" || exit 2
"$PYTHON" -c 'import torch, triton; print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'

# Without the project's pytest settings and outer conftest.py, which ask for more packages. The interpreter's own tests
# and the offline compile check belong to machines without a GPU.
timeout -k 10 "$TESTS_S" "$PYTHON" -m pytest -c /dev/null --rootdir . --confcutdir tests/policy -p no:cacheprovider \
    --import-mode=importlib -q --durations=10 tests/policy/kernels/test_gpu.py tests/policy/kernels \
    --ignore tests/policy/kernels/test_interpreter.py --ignore tests/policy/kernels/test_compile.py \
    2>&1 | tee "$FOLDER/tests.log"
tests=${PIPESTATUS[0]}
[ "$tests" -eq 124 ] && echo "gpu_suite: the tests did not end within $TESTS_S s (TESTS_S)" >&2

timeout -k 10 $((BENCH_S + 60)) "$PYTHON" -m scripts.bench_kernels --budget-s "$BENCH_S" --out "$FOLDER/kernels.md" \
    2> >(tee "$FOLDER/bench.log" >&2)
bench=$?

echo "gpu_suite: tests ended with $tests, benchmark with $bench; see $FOLDER/"
if [ "$tests" -eq 124 ] || [ "$bench" -eq 3 ] || [ "$bench" -eq 124 ]; then exit 3; fi
if [ "$tests" -ne 0 ] || [ "$bench" -ne 0 ]; then exit 1; fi
