#!/usr/bin/env bash
# What a default build leaves out: lints, and the tests of what each feature adds. Open MPI and libclang
# (for mpi) and protoc (for tensorboard) are installed from Debian where they are missing and that is
# possible; else the feature is left out, and said so.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo=${1:-cargo}

has() {
  case $1 in
  mpi)
    command -v mpirun >/dev/null && command -v mpicc >/dev/null &&
      compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null
    ;;
  tensorboard) command -v protoc >/dev/null ;;
  esac
}

install() {
  local apt=(apt-get)
  command -v apt-get >/dev/null || return 1
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 1
    apt=(sudo -n apt-get)
  fi
  export DEBIAN_FRONTEND=noninteractive
  local packages=(libopenmpi-dev openmpi-bin libclang-dev protobuf-compiler)
  "${apt[@]}" install -y -q --no-install-recommends "${packages[@]}" >/dev/null 2>&1 ||
    { "${apt[@]}" update -q && "${apt[@]}" install -y -q --no-install-recommends "${packages[@]}"; } >&2
}

{ has mpi && has tensorboard; } || install || true
features=parquet
for feature in mpi tensorboard; do
  if has "$feature"; then
    features=$feature,$features
  else
    echo "features.sh: $feature is not checked: what it needs is not here and cannot be installed" >&2
  fi
done

"$cargo" clippy --all-targets --locked --features "$features" -- -D warnings
"$cargo" test --locked --features "$features" --lib --test root -- mpi:: tables:: events:: event_files
