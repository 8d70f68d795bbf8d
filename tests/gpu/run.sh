#!/usr/bin/env bash
# The GPU round: everything that has to be seen on a card, in parts of under 8 minutes, each one JSON
# document on standard output and in OUT.
#
#   tests/gpu/run.sh BINARY ORT MODEL OUT [PART…]
#
#   BINARY  skipgpt-export, built by `make cuda`
#   ORT     a directory with libonnxruntime.so.1.31.1 and libonnxruntime_providers_*.so, or
#           onnxruntime-gpu's wheel, which is unpacked into OUT
#   MODEL   a llama checkpoint directory (SmolLM2-135M), or its GGUF file, which is imported into OUT
#   OUT     a directory for artifacts and results; what is there is used again
#   PART    doctor train-smol train-1b verify-f32 verify-f16 verify-bf16 verify-int4 bench-prefill
#           bench-decode bench-batch; all where none is given
#
# Environment:
#   PROVIDER=cuda|cpu   cpu tries the round where there is no card
#   SMALL=1             settings that take seconds
#   ROUTER=FILE         routers of MODEL [fixtures/smollm2-135m/router.pth]
#   TEXT="FILE…"        text to train on [the documentation]
#   PYTHON=python3      with torch and transformers, for what training is measured against
#   LIMIT=470           seconds a part may take
set -uo pipefail
[ $# -ge 4 ] || { sed -n '2,24s/^# \{0,1\}//p' "$0" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$(dirname "$here")")
binary=$(realpath "$1") ort=$(realpath "$2") model=$(realpath "$3")
mkdir -p "$4" && out=$(realpath "$4")
shift 4
provider=${PROVIDER:-cuda} python=${PYTHON:-python3} limit=${LIMIT:-470}
router=$(realpath "${ROUTER:-$root/fixtures/smollm2-135m/router.pth}")
read -ra text <<<"${TEXT:-$(echo "$root"/docs/*.md "$root/README.md")}"
small=${SMALL:-}

# NVIDIA's libraries of the Python packages here, wherever pip put them, before the system's.
packages=$("$python" - <<'PYTHON'
import pathlib, site, sys
roots = [*site.getsitepackages(), site.getusersitepackages(), *sys.path]
found = []
for root in filter(None, roots):
    for folder in sorted(pathlib.Path(root).glob("nvidia/*/lib")):
        if str(folder) not in found:
            found.append(str(folder))
# CUDA 13's packages first: others may have libraries of an older CUDA beside them.
print(":".join(sorted(found, key=lambda path: "/cu13/" not in path)))
PYTHON
)
# A toolkit made by `make cuda` has all but cuDNN.
for folder in "$root/target/cuda-toolkit/lib"; do
  [ -d "$folder" ] && packages=$packages${packages:+:}$folder
done
export LD_LIBRARY_PATH="${packages}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

if [[ $ort == *.whl ]]; then
  [ -d "$out/ort" ] || "$python" -m zipfile -e "$ort" "$out/ort"
  ort=$out/ort
fi
export ORT_DYLIB_PATH=$ort
if [ -f "$model" ]; then
  [ -d "$out/model" ] || "$binary" import "$model" -o "$out/model" >&2
  model=$out/model
fi

if [ -n "$small" ]; then
  windows=2 window=64 steps=3 peer_steps=2 wide=(2 64 128 4 2)
  verify=(--decode-steps 2 --greedy-tokens 4)
  prefill=prefill:16,prefill:32 decode=decode:1:16 batch=decode:2:16
  bench=(--rounds 1 --steps 2 --prefills 1 --warmup 1 --force-skip 0,40)
else
  windows=16 window=1024 steps=20 peer_steps=10 wide=(16 2048 8192 32 8)
  verify=()
  prefill=prefill:512,prefill:2048 decode=decode:1:128 batch=decode:8:128,decode:32:128
  bench=(--rounds 2 --steps 32 --prefills 8 --warmup 8 --force-skip "0,25,40,60")
fi
case $provider in
  cuda) precision=bf16 torch_dtype=bfloat16 ;;
  cpu) precision=f32 torch_dtype=float32 ;;
  *) echo "run.sh: PROVIDER is $provider; expected cuda or cpu" >&2 && exit 2 ;;
esac

# artifact NAME OPTION…: exports once, prints the directory.
artifact() {
  local name=$1
  shift
  [ -d "$out/$name" ] || "$binary" export --model "$model" --provider "$provider" "$@" -o "$out/$name" >&2 || return
  echo "$out/$name"
}

doctor() {
  # What is missing is the result, not a failure.
  "$binary" doctor --json "$out/doctor.report" >&2 || true
  cat "$out/doctor.report"
}

# training MODEL BATCH: tokens a second of router tuning, the first steps left out, beside PyTorch's.
training() {
  local checkpoint=$1 batch=$2 run=$out/run-$RANDOM
  "$binary" train router --model "$checkpoint" --text "${text[@]}" -o "$run" \
    --device "$provider" --base-dtype "$precision" --steps "$steps" --batch "$batch" \
    --window "$window" --hold-out 0 --save-every 0 --eval-every 0 >&2 || return
  "$python" "$here/peer.py" "$checkpoint" --device "$provider" --dtype "$torch_dtype" \
    --batch "$batch" --window "$window" --steps "$peer_steps" --warmup 1 >"$out/peer.json" ||
    echo null >"$out/peer.json"
  "$python" - "$run/metrics.jsonl" "$out/peer.json" "$batch" "$window" "$precision" <<'PYTHON'
import json, pathlib, statistics, sys
metrics, peer, batch, window, precision = sys.argv[1:]
lines = [json.loads(line) for line in pathlib.Path(metrics).read_text().splitlines()]
steps = [line for line in lines if line["kind"] == "step"]
speeds = [step["tokens_per_second"] for step in steps[max(1, len(steps) // 4):]]
# What transformers says on standard output comes before.
peer = json.loads(pathlib.Path(peer).read_text().strip().splitlines()[-1])
own = statistics.median(speeds)
print(json.dumps({
    "batch": int(batch), "window": int(window), "precision": precision, "steps": len(speeds),
    "tokens_per_second": own, "losses": [step["prediction"] for step in steps],
    "pytorch": peer, "over_pytorch": own / peer["tokens_per_second"] if peer else None,
}))
PYTHON
  rm -rf "$run"
}

train_smol() { training "$model" "$windows"; }

train_1b() {
  local wide_model=$out/llama-1b
  [ -d "$wide_model" ] || "$python" "$here/random_llama.py" "$wide_model" "$model" "${wide[@]}" >&2 || return
  training "$wide_model" $((windows > 4 ? windows / 4 : windows))
}

# verifying DTYPE: every dispatch against the checkpoint.
verifying() {
  local dtype=$1 dispatch directory code results=()
  if [ "$provider$dtype" = cpubf16 ]; then
    echo '{"refused": "ONNX Runtime multiplies no bf16 on the CPU provider"}'
    return
  fi
  for dispatch in masked gathered conditional; do
    directory=$(artifact "$dtype-$dispatch" --router "$router" --dtype "$dtype" --dispatch "$dispatch") || return
    "$binary" verify "$directory" --model "$model" --router "$router" --provider "$provider" \
      --device "$provider" "${verify[@]}" --json "$directory.verify" >"$directory.log" 2>&1
    code=$?
    tail -n 1 "$directory.log" >&2
    # A mismatch (1) has a report; what could not be done (2) has a message.
    [ $code -le 1 ] || "$python" -c 'import json, sys; print(json.dumps({"error": sys.stdin.read()}))' \
      <"$directory.log" >"$directory.verify"
    results+=("$dispatch=$directory.verify")
  done
  "$python" - "${results[@]}" <<'PYTHON'
import json, pathlib, sys
results = (argument.split("=", 1) for argument in sys.argv[1:])
print(json.dumps({name: json.loads(pathlib.Path(path).read_text()) for name, path in results}))
PYTHON
}

# benching WORKLOADS: every dispatch beside the dense artifact, in f16 (f32 on the processor).
benching() {
  local dtype=f16 dispatch routed=() dense
  [ "$provider" = cpu ] && dtype=f32
  dense=$(artifact "$dtype-dense" --dtype "$dtype") || return
  for dispatch in masked gathered conditional; do
    routed+=("$(artifact "$dtype-$dispatch" --router "$router" --dtype "$dtype" --dispatch "$dispatch")") || return
  done
  "$binary" bench "${routed[@]}" --baseline "$dense" --provider "$provider" --workload "$1" \
    "${bench[@]}" --no-memory --json "$out/bench.report" >&2 || return
  cat "$out/bench.report"
}

run_part() {
  case $1 in
    doctor) doctor ;;
    train-smol) train_smol ;;
    train-1b) train_1b ;;
    verify-*) verifying "${1#verify-}" ;;
    bench-prefill) benching "$prefill" ;;
    bench-decode) benching "$decode" ;;
    bench-batch) benching "$batch" ;;
    *) echo "run.sh: there is no part $1" >&2 && return 2 ;;
  esac
}

# One part, in a process of its own that the limit can end with all that it started.
if [ "${ROUND_PART:-}" ]; then
  run_part "$ROUND_PART"
  exit
fi

[ $# -gt 0 ] || set -- doctor train-smol train-1b verify-f32 verify-f16 verify-bf16 verify-int4 \
  bench-prefill bench-decode bench-batch
failed=0
for part in "$@"; do
  started=$(date +%s)
  ROUND_PART=$part timeout --kill-after=10 "$limit" \
    "$0" "$binary" "$ort" "$model" "$out" >"$out/$part.result" 2>"$out/$part.log"
  code=$?
  [ $code = 0 ] || failed=1
  "$python" - "$part" "$code" $(($(date +%s) - started)) "$provider" "$out" <<'PYTHON' | tee "$out/$part.json"
import json, pathlib, subprocess, sys
part, code, seconds, provider, out = sys.argv[1:]
out = pathlib.Path(out)
try:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
except (OSError, subprocess.CalledProcessError):
    card = None
text = (out / f"{part}.result").read_text()
try:
    result = json.loads(text)
except ValueError:
    result = None
log = (out / f"{part}.log").read_text(errors="replace")[-2000:]
print(json.dumps({
    "part": part, "provider": provider, "card": card, "seconds": int(seconds), "exit": int(code),
    "result": result, **({"log": log} if int(code) or result is None else {}),
}))
PYTHON
done
exit $failed
