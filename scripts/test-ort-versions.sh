#!/bin/sh
# Runs the operator tests on several onnxruntime releases with one and the same library.
#
#   scripts/test-ort-versions.sh [VERSION...]      default: 1.20.1 1.22.1 1.23.2 1.24.4 and newest
#
# PYTHON chooses the interpreter (3.11 or newer); WORK keeps the environments between runs.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
work=${WORK:-$(mktemp -d)}
[ $# -gt 0 ] || set -- 1.20.1 1.22.1 1.23.2 1.24.4 newest

if [ -z "${SFA_ONNX_LIBRARY:-}" ]; then
  cmake -S "$root" -B "$work/build" -DCMAKE_BUILD_TYPE=Release >/dev/null
  cmake --build "$work/build" --parallel >/dev/null
  SFA_ONNX_LIBRARY=$work/build/kernels/libsfa_onnx_ops.so
  export SFA_ONNX_LIBRARY
fi

failed=""
for version in "$@"; do
  env=$work/ort-$version
  spec=onnxruntime$([ "$version" = newest ] || echo "==$version")
  if [ ! -x "$env/bin/python" ]; then
    "$python" -m venv "$env"
    "$env/bin/pip" install -q "$spec" numpy ml_dtypes onnx onnx-graphsurgeon rich \
      pytest hypothesis
  fi
  echo "== onnxruntime $("$env/bin/python" -c 'import onnxruntime as o; print(o.__version__)')"
  (cd "$root" && "$env/bin/python" -m pytest -q -p no:cacheprovider -o addopts= \
    tests/test_ort_versions.py tests/test_ort_ops.py tests/test_ort_pack.py \
    tests/test_ort_refusals.py tests/test_ort_untrusted.py) || failed="$failed $version"
done
[ -z "$failed" ] || { echo "FAILED on:$failed"; exit 1; }
echo "all releases passed: $*"
