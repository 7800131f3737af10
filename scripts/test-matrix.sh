#!/usr/bin/env bash
# Every runtime we say we work with, one row a version: the operators on each onnxruntime, the whole
# road on each onnx and Python, the exports on each transformers and torch.
#
#   scripts/test-matrix.sh [ROW...]      default: all rows; `scripts/test-matrix.sh --list` names them
#
# WORK keeps the environments between runs. Rows whose interpreter or wheel cannot be had here are
# named, and count as failures unless SKIP_MISSING=1.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${WORK:-$(mktemp -d)}

# row | interpreter | pinned packages | tests | those of them (a pytest expression; default: all)
operators="test_ort_versions test_ort_ops test_ort_pack test_ort_refusals test_ort_untrusted test_ort_indexer test_ort_cache_write"
road="test_reference test_schema test_model test_fuse_api test_kv_convert test_compare test_portable test_flavour test_handover"
exports="test_road test_examples test_torch_ops test_torch_native"
rows() {
  for v in 1.20.1 1.22.1 1.23.2 1.24.4 1.27.0; do echo "ort-$v|python3|onnxruntime==$v|$operators"; done
  echo "ort-newest|python3|onnxruntime|$operators"
  for v in 1.19.1 1.20.1 1.21.0 1.22.0; do echo "onnx-$v|python3|onnx==$v|$road"; done
  echo "onnx-newest|python3|onnx|$road"
  for v in 3.11 3.12 3.13; do echo "python-$v|python$v||$road"; done
  for v in 5.23.0 5.24.0; do
    echo "transformers-$v|python3|torch==2.13.0 onnxscript transformers==$v|$exports"
  done
  # The exporter that transformers brings (generate.py, too) asks for torch 2.11, the demo model's script for an
  # exporter that leaves a batch of any size open.
  echo "torch-2.9.1|python3|torch==2.9.1 onnxscript transformers==5.23.0|$exports|not hf and not packaged_demo and not int8_pages"
  echo "torch-2.13.0|python3|torch==2.13.0 onnxscript transformers==5.23.0|$exports"
  echo "torch-newest|python3|torch onnxscript transformers|$exports"
}
if [ "${1:-}" = --list ]; then rows | cut -d'|' -f1; exit 0; fi

if [ -z "${SFA_ONNX_LIBRARY:-}" ]; then
  cmake -S "$root" -B "$work/build" -DCMAKE_BUILD_TYPE=Release >/dev/null &&
    cmake --build "$work/build" --parallel >/dev/null || exit 1
  export SFA_ONNX_LIBRARY=$work/build/kernels/libsfa_onnx_ops.so
fi

# Examples run with an installed package; this one stands in for it.
mkdir -p "$work/package" && ln -sfn "$root/sfa_onnx" "$work/package/sfa_onnx"

failed=""
run_row() { # name interpreter packages tests selection
  local env=$work/env-$1 packages files=()
  if ! command -v "$2" >/dev/null; then
    echo "== $1: no $2 here"
    [ -n "${SKIP_MISSING:-}" ]
    return
  fi
  read -ra packages <<<"$3"
  if [ ! -f "$env/ready" ]; then
    "$2" -m venv "$env" && "$env/bin/pip" install -q "${packages[@]}" numpy ml_dtypes onnx onnxruntime \
      onnx-graphsurgeon rich argcomplete pytest hypothesis pyyaml && touch "$env/ready" || return 1
  fi
  for test in $4; do files+=("tests/$test.py"); done
  echo "== $1: $("$env/bin/python" -c 'import sys, onnx, onnxruntime as o
print("Python", sys.version.split()[0], "onnx", onnx.__version__, "onnxruntime", o.__version__)')"
  # Every environment exports its own models.
  (cd "$root" && PYTHONPATH=$work/package SFA_ONNX_ZOO_CACHE="$env/zoo" "$env/bin/python" -m pytest -q -p no:cacheprovider -o addopts= -k "$5" "${files[@]}")
}

while IFS='|' read -r name interpreter packages tests chosen <&3; do
  if [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; then continue; fi
  run_row "$name" "$interpreter" "$packages" "$tests" "$chosen" || failed="$failed $name"
done 3< <(rows)
[ -z "$failed" ] || { echo "FAILED:$failed"; exit 1; }
echo "all rows passed"
