#!/usr/bin/env bash
# Builds the tool with its `cuda` feature, on a machine with a GPU or without one, into
# target/cuda/release/skipgpt-export. Usage: tests/gpu/build.sh [CARGO [PYTHON]]
#
# The toolkit is the one of CUDA_HOME, or of the nvcc in PATH, or else one assembled from PyPI.
# CUDA_COMPUTE_CAP: the cards to build for, one number (90 where not given) or several with spaces or
# commas ("80 90"): code for each, and for later cards what the driver makes of the first one's.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo=${1:-cargo}
python=${2:-python3}

if [ -n "${CUDA_HOME:-}" ] && [ -x "$CUDA_HOME/bin/nvcc" ]; then
  nvcc=$CUDA_HOME/bin/nvcc
elif command -v nvcc >/dev/null; then
  nvcc=$(readlink -f "$(command -v nvcc)")
else
  tests/gpu/toolkit.sh "$python"
  nvcc=$PWD/target/cuda-toolkit/bin/nvcc
fi
CUDA_HOME=$(dirname "$(dirname "$nvcc")")
export CUDA_HOME PATH="$CUDA_HOME/bin:$PATH"

read -ra caps <<<"$(tr ',' ' ' <<<"${CUDA_COMPUTE_CAP:-90}")"
mapfile -t caps < <(printf '%s\n' "${caps[@]}" | sort -n)
export CUDA_COMPUTE_CAP=${caps[0]}
export NVCC=$nvcc
if [ ${#caps[@]} -gt 1 ]; then
  export NVCC=$PWD/tests/gpu/nvcc.sh REAL_NVCC=$nvcc MORE_COMPUTE_CAPS="${caps[*]:1}"
fi
# candle's kernels are compiled on half the cores unless told.
export CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-$(nproc)}

# Of the linker: the libraries need each other, and lie where no system looks.
export LD_LIBRARY_PATH="$CUDA_HOME/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
echo "CUDA of $CUDA_HOME, for compute capability ${caps[*]}"
"$cargo" build --release --locked --features cuda --bin skipgpt-export --target-dir target/cuda
binary=target/cuda/release/skipgpt-export
echo "$binary: $(stat -c %s "$binary") bytes"
