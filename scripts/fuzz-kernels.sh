#!/usr/bin/env bash
# libFuzzer on the core's C ABI and on the binding inside onnxruntime, under AddressSanitizer and
# UndefinedBehaviorSanitizer, then the core's threads under ThreadSanitizer.
#
#     scripts/fuzz-kernels.sh [SECONDS]     each target; default 60; corpus: kernels/tests/fuzz/*.tar.gz
#
# CLANG: the compiler (default: clang++-19, else clang++), installed from Debian where it is missing
# and we may; PYTHON: an interpreter with onnxruntime (default: python3). CORPUS: a folder for what
# is found, kept; without it, it goes. SEED: the fuzzer's, so that a check meets the same inputs again
# (default: another one each time). AVX512=1: checks in the AVX-512 paths, too. What is missing
# is skipped, loudly.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
seconds=${1:-60}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
corpus=${CORPUS:-$work/corpus}
command -v ninja >/dev/null && export CMAKE_GENERATOR=Ninja

clang=${CLANG:-$(command -v clang++-19 || command -v clang++ || true)}
if [ -z "$clang" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  { apt-get update -q && apt-get install -y -q --no-install-recommends clang-19 libclang-rt-19-dev; } \
    >"$work/apt.log" 2>&1 || tail -3 "$work/apt.log"
  clang=$(command -v clang++-19 || true)
fi
if [ -z "$clang" ]; then
  echo "== SKIPPED: fuzzing (no clang; Debian: clang-19 libclang-rt-19-dev)"
  exit 0
fi

# The AVX-512 paths take minutes to compile with checks: without, unless AVX512=1 asks for them.
plain=ON
[ "${AVX512:-0}" = 1 ] && plain=OFF
if [ "$plain" = ON ]; then
  export SFA_FUZZ_UNCHECKED=avx512
  if grep -q avx512f /proc/cpuinfo; then export SFA_ONNX_ISA=avx2; fi
fi

build() {  # NAME SANITIZERS TARGETS
  cmake -S "$root" -B "$work/$1" -DCMAKE_CXX_COMPILER="$clang" -DSFA_ONNX_TESTS=ON \
    -DSFA_ONNX_FUZZ=ON -DSFA_ONNX_FUZZ_PLAIN_AVX512=$plain \
    -DSFA_ONNX_SANITIZE="fuzzer-no-link,$2" >/dev/null
  # shellcheck disable=SC2086
  cmake --build "$work/$1" --parallel "$(nproc)" --target $3 >/dev/null
}

fuzz() {  # NAME TARGET OPTIONS
  mkdir -p "$corpus/$2" "$work/found"
  tar -xf "$root/kernels/tests/fuzz/$2.tar.gz" -C "$corpus/$2"
  echo "== fuzzing, $2, $1: $seconds seconds"
  if ! "$work/$1/kernels/tests/$2" -max_total_time="$seconds" -max_len=600 -timeout=60 \
    -seed="${SEED:-0}" -print_final_stats=1 -verbosity=0 -artifact_prefix="$work/found/" "${@:3}" "$corpus/$2" \
    >"$work/log" 2>&1; then
    tail -40 "$work/log"
    for file in "$work"/found/*; do echo "$(basename "$file"): $(base64 -w0 "$file")"; done
    exit 1
  fi
  grep -E 'number_of_executed_units|peak_rss' "$work/log" || true
}

build address address,undefined "fuzz_core fuzz_ort"
fuzz address fuzz_core
runtime=$("$python" -c 'import glob, onnxruntime as o
print(*glob.glob(o.__path__[0] + "/capi/libonnxruntime.so*")[:1])' 2>/dev/null || true)
if [ -n "$runtime" ]; then
  # The runtime itself is not instrumented, and keeps things on purpose: no search for leaks.
  SFA_FUZZ_ONNXRUNTIME=$runtime ASAN_OPTIONS=quarantine_size_mb=16 \
    fuzz address fuzz_ort -detect_leaks=0
else
  echo "== SKIPPED: fuzzing the binding ($python has no onnxruntime)"
fi
build thread thread fuzz_core
fuzz thread fuzz_core
