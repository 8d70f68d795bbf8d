#!/usr/bin/env bash
# Checks the Rust code of the `cuda` feature, tests included, without a CUDA toolkit: a stub writes
# empty kernels, and nothing is linked. Usage: tests/gpu/lint.sh [CARGO]
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo=${1:-cargo}
export NVCC=$PWD/tests/gpu/nvcc-stub.sh CUDA_COMPUTE_CAP=90 CUDARC_CUDA_VERSION=13000
# Candle's build remembers kernels by their sources, and would take the stub's for real ones.
trap '"$cargo" clean --quiet --locked --package candle-kernels' EXIT
"$cargo" clippy --package skipgpt-export --all-targets --locked --features cuda -- -D warnings
