#!/usr/bin/env bash
# Stands in for nvcc where only Rust code is to be checked: writes empty files where kernels would be.
# Used by lint.sh. Nothing that is built with it runs.
set -euo pipefail
what='' output='' folder=. sources=()
while [ $# -gt 0 ]; do
  case $1 in
    --version) echo "Cuda compilation tools, release 13.0, V13.0.0" && exit 0 ;;
    --ptx | -c | --lib) what=$1 ;;
    -o) output=$2 && shift ;;
    --output-directory) folder=$2 && shift ;;
    *.cu) sources+=("$1") ;;
  esac
  shift
done
case $what in
  --ptx) for source in "${sources[@]}"; do : >"$folder/$(basename "$source" .cu).ptx"; done ;;
  -c) : >"$output" ;;
  --lib) printf '!<arch>\n' >"$output" ;;
  *) echo "nvcc-stub.sh: expected --ptx, -c or --lib" >&2 && exit 2 ;;
esac
