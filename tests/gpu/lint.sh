#!/usr/bin/env bash
# Checks the Rust code of the `cuda` feature, tests included, without a CUDA toolkit: a stub writes
# empty kernels, and nothing is linked. Usage: tests/gpu/lint.sh [CARGO]
#
# A target directory of its own: candle's build remembers kernels by their sources, and would take
# the stub's for real ones.
set -euo pipefail
cd "$(dirname "$0")/../.."
export NVCC=$PWD/tests/gpu/nvcc-stub.sh CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13000
"${1:-cargo}" clippy --package skipgpt-export --all-targets --locked --features cuda \
  --target-dir target/lint-cuda -- -D warnings
