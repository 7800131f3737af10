#!/usr/bin/env bash
# C++ tests of the kernels: plain, then under AddressSanitizer + UndefinedBehaviorSanitizer, then
# under ThreadSanitizer. Then the same instrumented library inside onnxruntime, fed with garbage.
#
# PYTHON: interpreter with the project's test requirements (default: python3); without onnxruntime
# the last step is skipped, loudly.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
command -v ninja >/dev/null && export CMAKE_GENERATOR=Ninja

build() {  # NAME SANITIZERS
  cmake -S "$root" -B "$work/$1" -DSFA_ONNX_TESTS=ON -DSFA_ONNX_SANITIZE="$2" >/dev/null
  cmake --build "$work/$1" --parallel "$(nproc)" >/dev/null
  echo "== C++ tests, $1"
  ctest --test-dir "$work/$1" --output-on-failure --no-tests=error
}

build plain ""
# Sanitized code is 3 to 20 times slower: fewer rounds, other cases.
SFA_TEST_ROUNDS=60 SFA_TEST_SEED=2 build address address,undefined
SFA_TEST_ROUNDS=20 SFA_TEST_SEED=3 build thread thread

echo "== operator tests in onnxruntime, library under AddressSanitizer"
if "$python" -c 'import onnxruntime, pytest, hypothesis' 2>/dev/null; then
  # The interpreter itself is not instrumented: preload the runtime, and ignore what it leaks.
  cd "$root"
  # libstdc++ as well, or exceptions thrown by onnxruntime find no one to catch them.
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)" \
    ASAN_OPTIONS=detect_leaks=0 \
    SFA_ONNX_LIBRARY=$work/address/kernels/libsfa_onnx_ops.so \
    "$python" -m pytest -q -n 0 -p no:cacheprovider \
    tests/test_ort_untrusted.py tests/test_ort_refusals.py tests/test_ort_pack.py \
    tests/test_ort_indexer.py tests/test_ort_cache_write.py
else
  echo "SKIPPED: $python has no onnxruntime, pytest and hypothesis"
fi
