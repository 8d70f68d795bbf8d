#!/usr/bin/env bash
# Assembles a CUDA toolkit out of PyPI's wheels in target/cuda-toolkit, for machines that have none:
# compiler, headers, libraries under the names a linker looks for, and a libcuda.so to link with.
# Does nothing where it is there. Usage: tests/gpu/toolkit.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
requirements=fixtures/requirements-cuda.txt
toolkit=$PWD/target/cuda-toolkit

# Of what goes in, so that another pin or another version of this script makes it anew.
made_of=$(cat "$requirements" tests/gpu/toolkit.sh <(grep -A1 '"cudarc"' Cargo.lock) |
  sha256sum | cut -d' ' -f1)
if [ "$(cat "$toolkit/made-of" 2>/dev/null || true)" = "$made_of" ]; then
  echo "$toolkit is there"
  exit 0
fi
for tool in cc:gcc "$python:python3"; do
  if ! command -v "${tool%%:*}" >/dev/null; then
    echo "toolkit.sh: ${tool%%:*} is needed; Debian and Ubuntu: apt-get install ${tool##*:}" >&2
    exit 2
  fi
done
if ! "$python" -m pip --version >/dev/null 2>&1; then
  echo "toolkit.sh: Python 3 with pip is needed; Debian and Ubuntu: apt-get install python3-pip" >&2
  exit 2
fi

wheels=$(mktemp -d)
trap 'rm -rf "$wheels" "$toolkit.new"' EXIT
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux2014 manylinux_2_17 manylinux2010 manylinux_2_12; do
  platforms+=(--platform "${platform}_x86_64")
done
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --implementation py --python-version 3 --abi none "${platforms[@]}" \
  --require-hashes --dest "$wheels" --requirement "$requirements"

rm -rf "$toolkit.new"
"$python" - "$wheels" "$toolkit.new" <<'PYTHON'
import os, pathlib, re, sys, zipfile

wheels, toolkit = map(pathlib.Path, sys.argv[1:])
ROOT = "nvidia/cu13/"
for wheel in sorted(wheels.glob("*.whl")):
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if not entry.filename.startswith(ROOT) or entry.is_dir():
                continue
            place = toolkit / entry.filename.removeprefix(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, place.open("wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
            # The wheels do not always say which files can be run.
            if place.parent.name == "bin":
                place.chmod(0o755)
# A linker looks for libcublas.so; the wheels have libcublas.so.13.
for library in sorted((toolkit / "lib").glob("lib*.so.*")):
    plain = library.with_name(re.sub(r"\.so\..*", ".so", library.name))
    if not plain.exists():
        plain.symlink_to(library.name)
(toolkit / "lib64").symlink_to("lib")
PYTHON

# The driver comes with the GPU. To link, its names are enough: those that cudarc declares. Every
# function answers CUDA_ERROR_STUB_LIBRARY (34), so that a program that gets here says so.
cudarc=$(cargo metadata --format-version 1 --locked --features cuda | "$python" -c '
import json, pathlib, sys
packages = json.load(sys.stdin)["packages"]
print(pathlib.Path(next(p["manifest_path"] for p in packages if p["name"] == "cudarc")).parent)')
mkdir -p "$toolkit.new/lib/stubs"
grep -ohE 'fn cu[A-Z][A-Za-z0-9_]*\(' "$cudarc/src/driver/sys/mod.rs" | sort -u |
  sed -E 's/fn (.*)\(/int \1(void) { return 34; }/' >"$toolkit.new/lib/stubs/libcuda.c"
cc -shared -fPIC -O1 -w -Wl,-soname,libcuda.so.1 \
  -o "$toolkit.new/lib/stubs/libcuda.so" "$toolkit.new/lib/stubs/libcuda.c"

echo "$made_of" >"$toolkit.new/made-of"
rm -rf "$toolkit"
mv "$toolkit.new" "$toolkit"
echo "$toolkit assembled: $("$toolkit/bin/nvcc" --version | sed -n 's/.*release \([^,]*\).*/CUDA \1/p')"
