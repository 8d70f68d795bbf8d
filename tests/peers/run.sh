#!/usr/bin/env bash
# Asks the tools users have: transformers, optimum, onnxruntime-genai, onnx.checker, gguf-py.
# Makes a Python environment of about 6 GB in target/peers. Usage: tests/peers/run.sh SKIPGPT_EXPORT
set -euo pipefail
cd "$(dirname "$0")/../.."
run=$(realpath "$1")
python=target/peers/bin/python
if ! [ -x "$python" ]; then
  python3 -m venv target/peers
  "$python" -m pip install --quiet --disable-pip-version-check -r tests/peers/requirements.txt
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$run" import target/model/SmolLM2-135M-Instruct.Q4_1.gguf -o "$work/model"
"$python" tests/peers/import.py "$work/model" README.md
"$run" export --model "$work/model" -o "$work/dense"
"$run" export --model "$work/model" --router fixtures/smollm2-135m/router.pth -o "$work/routed"
"$run" export --model "$work/model" --logits last -o "$work/last"
for kind in dense routed last; do
  "$python" tests/peers/clients.py "$work/$kind" "$run"
done
