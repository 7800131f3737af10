#!/usr/bin/env bash
# Cross-builds the C++ tests for aarch64 and runs them under qemu-user: on a core of armv8.0, on one
# with int8 dot products (as Kunpeng 920) and on one with everything. Tries to install Debian's
# cross compiler and emulator where they are missing and we may; skips, loudly, where that fails.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
command -v ninja >/dev/null && export CMAKE_GENERATOR=Ninja

compiler=aarch64-linux-gnu-g++
emulator() { command -v qemu-aarch64-static || command -v qemu-aarch64; }

if ! { command -v "$compiler" && emulator; } >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -q && apt-get install -y -q g++-aarch64-linux-gnu qemu-user-static; } \
      >"$work/apt.log" 2>&1 || tail -3 "$work/apt.log"
  fi
fi
if ! { command -v "$compiler" && emulator; } >/dev/null; then
  echo "== SKIPPED: aarch64 tests (no $compiler or qemu-user; Debian: g++-aarch64-linux-gnu qemu-user-static)"
  exit 0
fi

# Static, so that the emulator needs no aarch64 root file system. The emulated processor is chosen
# by QEMU_CPU below.
cmake -S "$root" -B "$work/build" -DSFA_ONNX_TESTS=ON \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$compiler" \
  -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR="$(emulator)" >/dev/null
cmake --build "$work/build" --parallel "$(nproc)" >/dev/null

export SFA_TEST_ROUNDS=${SFA_TEST_ROUNDS:-25}
for cpu in cortex-a72 neoverse-n1 max; do
  echo "== C++ tests, aarch64 under qemu-user, processor $cpu"
  QEMU_CPU=$cpu ctest --test-dir "$work/build" --verbose --no-tests=error |
    grep -E 'paths|pack:|indexer |cache_write:|threads:|FAILED|tests passed|test_.*\.cc'
done
QEMU_CPU=cortex-a72 "$(emulator)" "$work/build/kernels/tests/test_core" | grep -q 'neon' ||
  { echo "the NEON path was not among those tested"; exit 1; }
