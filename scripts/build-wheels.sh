#!/usr/bin/env bash
# Builds what is released into a folder (default dist/): the sdist, and one wheel each for x86-64 and
# aarch64, the foreign one with Debian's cross compiler. The same commit gives the same bytes. Every
# library is checked: no symbol newer than manylinux2014 knows, no C++ runtime, and it loads - the
# foreign one under qemu-user.
# Usage: scripts/build-wheels.sh [folder] [native]     native: this machine's wheel alone
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mkdir -p "${1:-$root/dist}" && cd "${1:-$root/dist}" && pwd)
only=${2:-all}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
here=$(uname -m)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 1700000000)}
export SOURCE_DATE_EPOCH

# A clean copy: no build folder or cached object of the working tree comes in.
mkdir "$work/tree"
copy() {
  cd "$root"
  if git rev-parse --git-dir >/dev/null 2>&1; then
    git ls-files -z | tar --null -T - -cf -
  else
    tar -cf - --exclude=build .
  fi
}
copy | tar -xf - -C "$work/tree"
# One name for the folder in every build, whatever it is called here.
export CXXFLAGS="-ffile-prefix-map=$work/tree=."

check() { # wheel, architecture
  mkdir "$work/$2" && python3 -m zipfile -e "$1" "$work/$2"
  local library="$work/$2/sfa_onnx/runtime/lib/libsfa_onnx_ops.so" size
  python3 "$root/scripts/wheel_symbols.py" "$library"
  size=$(stat -c %s "$1")
  [ "$size" -lt 2000000 ] || { echo "$1: $size bytes, expected < 2,000,000" >&2; exit 1; }
  find "$work/$2" -path '*dist-info/licenses/LICENSE' | grep -q . || { echo "$1: no licence" >&2; exit 1; }
  local program="$work/load-$2" compiler=g++ run=()
  if [ "$2" != "$here" ]; then
    compiler=$2-linux-gnu-g++
    run=("$(command -v "qemu-$2-static" || command -v "qemu-$2")" -L "/usr/$2-linux-gnu")
  fi
  "$compiler" -o "$program" "$root/scripts/load_library.cc" -ldl
  echo "$(basename "$1"): $size bytes, kernel path $("${run[@]}" "$program" "$library")"
}

python3 -m pip install -q --target "$work/build-tools" build >/dev/null 2>&1 || true
PYTHONPATH="$work/build-tools" python3 -m build --sdist -o "$work/sdist" "$work/tree" >/dev/null 2>&1
for sdist in "$work"/sdist/*.tar.gz; do
  basename "$sdist"
  mv "$sdist" "$out"
done

for arch in x86_64 aarch64; do
  settings=()
  if [ "$arch" != "$here" ]; then
    [ "$only" = all ] || continue
    settings=(-C cmake.define.CMAKE_SYSTEM_NAME=Linux -C "cmake.define.CMAKE_SYSTEM_PROCESSOR=$arch"
      -C "cmake.define.CMAKE_CXX_COMPILER=$arch-linux-gnu-g++")
  fi
  SFA_ONNX_PLATFORM="manylinux2014_$arch" \
    python3 -m pip wheel -q --no-deps -w "$work/wheels" "${settings[@]}" "$work/tree"
  wheel=$(echo "$work"/wheels/*"manylinux2014_$arch.whl")
  check "$wheel" "$arch"
  mv "$wheel" "$out"
done
