#!/usr/bin/env bash
# nvcc for several cards: candle's build names one, and this adds the others to what is compiled to
# machine code. PTX stays that of the first, which the driver compiles for any later card.
# Used by build.sh, with REAL_NVCC and MORE_COMPUTE_CAPS.
set -euo pipefail
arguments=("$@")
for argument in "$@"; do
  if [ "$argument" = -c ]; then
    for cap in $MORE_COMPUTE_CAPS; do
      arguments+=("-gencode=arch=compute_$cap,code=sm_$cap")
    done
  fi
done
exec "$REAL_NVCC" "${arguments[@]}"
