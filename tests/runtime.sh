#!/usr/bin/env bash
# Unpacks ONNX Runtime's shared library into target/runtime, where the tool and the tests look; with older
# versions (1.22 …), for which there are pins too, these into target/runtime-VERSION.
# Does nothing where the pinned version is already there. Usage: tests/runtime.sh PYTHON [VERSION...]
set -euo pipefail
python=${1:-python3}
shift || true
cd "$(dirname "$0")/.."

unpack() { # SUFFIX
  local requirements=fixtures/requirements-runtime$1.txt folder=target/runtime$1 version library wheels
  version=$(sed -n 's/^onnxruntime==\([0-9.]*\).*/\1/p' "$requirements")
  library=$folder/onnxruntime/capi/libonnxruntime.so.$version
  if [ -f "$library" ]; then
    echo "$library is there"
    return
  fi
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "runtime.sh: Python 3 with pip is needed to fetch ONNX Runtime $version;" \
      "Debian and Ubuntu: apt-get install python3-pip" >&2
    exit 2
  fi

  wheels=$(mktemp -d)
  # shellcheck disable=SC2064 # of this call
  trap "rm -rf '$wheels'" EXIT
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --implementation cp --python-version 3.11 --abi cp311 --platform manylinux_2_28_x86_64 \
    --require-hashes --dest "$wheels" --requirement "$requirements"

  # Unpacked beside its place and renamed, so that an interrupted run leaves no half library.
  rm -rf "$folder" "$folder.new"
  "$python" - "$wheels" "$folder.new" <<'PYTHON'
import pathlib, sys, zipfile

wheels, folder = map(pathlib.Path, sys.argv[1:])
(wheel,) = wheels.glob("onnxruntime-*.whl")
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name.startswith("onnxruntime/capi/libonnxruntime.so"):
            archive.extract(name, folder)
PYTHON
  mv "$folder.new" "$folder"
  rm -rf "$wheels"
  echo "$library unpacked"
}

for suffix in "" "${@/#/-}"; do
  unpack "$suffix"
done
