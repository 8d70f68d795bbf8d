#!/usr/bin/env bash
# The whole way on a real model: import, export dense and routed, verify both, generate, compare.
# Usage: tests/demo.sh SKIPGPT_EXPORT
set -euo pipefail
cd "$(dirname "$0")/.."
run=$(realpath "$1")
demo=target/demo
router=fixtures/smollm2-135m/router.pth
adapter=fixtures/smollm2-135m/adapter
prompt="It is a truth universally acknowledged, that"
rm -rf "$demo"
mkdir -p "$demo"

step() { printf '\n$ skipgpt-export %s\n' "$*" >&2; "$run" "$@"; }
seconds() { # FILE COMMAND...: runs the command, leaves its seconds in FILE
  local file=$1 start
  shift
  start=$(date +%s%N)
  "$@"
  awk -v ns=$(($(date +%s%N) - start)) 'BEGIN { printf "%.1f", ns / 1e9 }' >"$file"
}

step import target/model/SmolLM2-135M-Instruct.Q4_1.gguf -o "$demo/model"
for kind in dense routed; do
  source=(--model "$demo/model")
  [ $kind = dense ] || source+=(--router "$router" --adapter "$adapter")
  seconds "$demo/$kind.seconds" step export "${source[@]}" -o "$demo/$kind" >"$demo/$kind.export"
  head -n 1 "$demo/$kind.export"
  step verify "$demo/$kind" "${source[@]}" --greedy-tokens 16 | tail -n 1
  step generate "$demo/$kind" --prompt "$prompt" --max-new-tokens 64 --json "$demo/$kind.json"
done

printf '\n%-8s %14s %18s %10s %16s\n' artifact 'tokens/s' 'modules skipped' size 'export seconds'
for kind in dense routed; do
  python3 - "$kind" "$demo" <<'PY'
import json, pathlib, sys
kind, demo = sys.argv[1], pathlib.Path(sys.argv[2])
report = json.loads((demo / f"{kind}.json").read_text())
shares = [s for s in (report["decode_skipped"] or {}).values() if s is not None]
skipped = f"{100 * sum(shares) / len(shares):.1f} %" if shares else "none routed"
size = sum(f.stat().st_size for f in (demo / kind).iterdir()) / 1e6
speed = report["decode_tokens_per_second"]
seconds = (demo / f"{kind}.seconds").read_text()
print(f"{kind:8} {speed:14.1f} {skipped:>18} {size:7.0f} MB {seconds:>16}")
PY
done
