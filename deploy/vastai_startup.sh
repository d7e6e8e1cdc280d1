#!/usr/bin/env bash
# Fire-and-forget training on a rented machine: installs srde, downloads the rows, trains, and starts again after crashes.
#
# Meant for the "On-start Script" of Vast.ai, and for any Linux machine. It may be started as often as one likes: what is
# there is kept, a download goes on where it ended, and training resumes from the newest checkpoint. README.md, beside
# this file, explains the settings. Exit status: 0 done, 1 failed, 2 a setting is wrong, 75 stopped by a signal.

# shellcheck disable=SC2329 # traps and `retry` call functions by name
set +x # whoever traces this script must not see the secrets

# Settings: environment variables, or edit the right-hand sides. Secrets are safer in the environment.
HF_TOKEN="${HF_TOKEN:-}"                 # for gated models and private data on the Hugging Face hub
DATA_URL="${DATA_URL:-}"                 # http(s) URL of the training rows, JSONL
MAX_STEPS="${MAX_STEPS:-5000}"
WEBHOOK_URL="${WEBHOOK_URL:-}"           # Discord, Slack, or a server of yours
MODEL_NAME="${MODEL_NAME:-mistralai/Ministral-3-14B-Reasoning-2512}"
WORK_DIR="${WORK_DIR:-}"                 # empty: /workspace/srde where /workspace is, else ~/srde
OUTPUT_DIR="${OUTPUT_DIR:-}"             # empty: WORK_DIR/run
SRDE_SOURCE="${SRDE_SOURCE:-}"           # a folder, a git URL or a pip requirement; empty: the checkout this file lies in
SRDE_VENV="${SRDE_VENV:-}"               # virtual environment; empty: WORK_DIR/venv
MAX_RETRIES="${MAX_RETRIES:-4}"          # how often what failed is tried again
RETRY_SECONDS="${RETRY_SECONDS:-30}"     # pause before the first retry; each further one is twice as long, at most 10 minutes
TRAIN_ARGS="${TRAIN_ARGS:-}"             # further flags of srde train, separated by blanks

set -euo pipefail

readonly STOPPED=75 LONGEST_PAUSE=600 SHORTEST_SECRET=8 LONGEST_NAP=500
CHILD="" STOPPING=0 LOGGER=""

# Everything is a function, and the last line calls one: of a script that is piped into bash and cut off, nothing runs.

main() {
  prepare
  trap on_signal TERM INT HUP
  trap finish EXIT
  exec > >(exec 9>&-; write_log) 2>&1
  LOGGER=$!
  exec {NEVER}<> <(:) # a pipe to read from that never has anything

  say "starting: $MODEL_NAME, $MAX_STEPS steps, into $OUTPUT_DIR"
  if is_complete; then
    say "the run is complete: $OUTPUT_DIR"
    return
  fi
  retry "installing srde" install_srde
  local file
  file="$WORK_DIR/data/$(digest "$DATA_URL").jsonl"
  if [[ ! -e $file ]]; then
    retry "downloading the data" download "$file"
  fi
  train "$file"
  run_digest >"$WORK_DIR/completed"
  say "done: $OUTPUT_DIR"
}

# --- settings -------------------------------------------------------------------------------------------------------

prepare() {
  local here=""
  if [[ -z $WORK_DIR ]]; then
    WORK_DIR="${HOME:-/root}/srde"
    if [[ -d /workspace && -w /workspace ]]; then WORK_DIR=/workspace/srde; fi
  fi
  : "${OUTPUT_DIR:=$WORK_DIR/run}" "${SRDE_VENV:=$WORK_DIR/venv}"
  if [[ -z $SRDE_SOURCE && -f ${BASH_SOURCE[0]:-} ]]; then
    here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    if [[ -f $here/pyproject.toml ]]; then SRDE_SOURCE=$here; fi
  fi

  local name
  for name in MAX_STEPS MAX_RETRIES RETRY_SECONDS; do
    [[ ${!name} =~ ^(0|[1-9][0-9]{0,8})$ ]] || refuse "$name" "must be a whole number"
  done
  ((MAX_STEPS > 0)) || refuse MAX_STEPS "must be at least 1"
  [[ $DATA_URL =~ ^https?://[!-~]+$ ]] || refuse DATA_URL "must be the http(s) URL of the training rows"
  [[ -n $SRDE_SOURCE || -x $SRDE_VENV/bin/srde ]] ||
    refuse SRDE_SOURCE "must say where srde is installed from: a folder, a git URL or a pip requirement"
  for name in curl flock sha256sum; do
    command -v "$name" >/dev/null || refuse "$name" "must be installed"
  done

  mkdir -p "$WORK_DIR/data" "$OUTPUT_DIR"
  # Held until the last process that has inherited it ends, so a training that outlives this script keeps others away.
  exec 9>"$WORK_DIR/startup.lock"
  flock --nonblock 9 || {
    echo "vastai_startup.sh: another one is at work in $WORK_DIR (process $(cat "$WORK_DIR/startup.pid" 2>/dev/null))" >&2
    exit 1
  }
  echo $$ >"$WORK_DIR/startup.pid"

  # Empty ones would count as set; what is unset is found by the programs themselves.
  if [[ -n $HF_TOKEN ]]; then export HF_TOKEN; else unset HF_TOKEN; fi
  if [[ -n $WEBHOOK_URL ]]; then export WEBHOOK_URL; else unset WEBHOOK_URL; fi
}

refuse() {
  echo "vastai_startup.sh: $1 $2. See deploy/README.md." >&2
  exit 2
}

digest() {
  printf '%s' "$1" | sha256sum | cut -c 1-16
}

run_digest() {
  digest "$MODEL_NAME|$DATA_URL|$MAX_STEPS|$OUTPUT_DIR|$TRAIN_ARGS"
}

is_complete() {
  [[ -f $WORK_DIR/completed && -f $OUTPUT_DIR/adapter_model.safetensors ]] &&
    [[ $(<"$WORK_DIR/completed") == "$(run_digest)" ]]
}

# --- log, notifications, signals ------------------------------------------------------------------------------------

say() {
  printf '%s\n' "$*"
}

# Copies its input with times to standard output and to the log, without the secrets.
write_log() {
  trap '' TERM INT HUP PIPE # it ends with its input: what is said last is logged too
  local line name
  local -a secrets=()
  for name in $(compgen -e); do
    if [[ $name =~ (^|_)(TOKEN|KEY|SECRET|PASSWORD)$ || $name == WEBHOOK_URL ]]; then secrets+=("${!name}"); fi
  done
  if [[ -n ${WEBHOOK_URL:-} ]]; then secrets+=("/${WEBHOOK_URL#*://*/}" "${WEBHOOK_URL##*/}"); fi
  secrets+=("$DATA_URL")
  if [[ $DATA_URL == *\?* ]]; then secrets+=("${DATA_URL#*\?}"); fi # the signature of a signed URL
  exec 8>>"$WORK_DIR/startup.log"
  while IFS= read -r line || [[ -n $line ]]; do
    line=${line%$'\r'}
    line=${line##*$'\r'} # of a progress bar, the last state
    for name in "${secrets[@]}"; do
      if ((${#name} >= SHORTEST_SECRET)); then line=${line//"$name"/[hidden]}; fi
    done
    # A full disk or a reader that has gone ends the log and not the run.
    printf '%(%F %T)T %s\n' -1 "$line" >&8 2>/dev/null || true
    printf '%(%F %T)T %s\n' -1 "$line" 2>/dev/null || true
  done
}

# Says what srde train cannot say itself.
notify_failed() {
  if [[ -z ${WEBHOOK_URL:-} ]]; then return; fi
  local name text body
  name="$(basename "$OUTPUT_DIR")"
  if [[ -x $SRDE_VENV/bin/python ]] && "$SRDE_VENV/bin/python" -c 'import srde.monitor.notify' 2>/dev/null; then
    "$SRDE_VENV/bin/python" -m srde.monitor.notify failed "$1" --run "$name" </dev/null || true
    return
  fi
  # Without srde nobody checks where a host leads to: only hosts whose certificate proves who they are, or what is allowed.
  name="$(json_text "$name")" text="$(json_text "$1")"
  case "$WEBHOOK_URL" in
    https://discord.com/* | https://discordapp.com/*)
      body='{"content": "**failed** '"$name: $text"'", "allowed_mentions": {"parse": []}}'
      ;;
    https://hooks.slack.com/*) body='{"text": "failed '"$name: $text"'"}' ;;
    *)
      if [[ ${WEBHOOK_ALLOW_PRIVATE:-} != 1 ]]; then
        say "no notification: srde is not installed, and only it may send to this webhook"
        return
      fi
      body='{"event": "failed", "run": "'"$name"'", "text": "'"$text"'", "facts": {}, "time": '"$(date +%s)}"
      ;;
  esac
  curl --silent --show-error --fail --output /dev/null --noproxy '*' --proto '=http,https' --max-time 15 \
    --header 'Content-Type: application/json' --data-binary "$body" --config <(curl_option url "$WEBHOOK_URL") \
    </dev/null || say "the notification was not delivered"
}

json_text() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '%s' "${text//[[:cntrl:]]/ }"
}

# A line of a curl configuration. Options are given in this way, and not as arguments, because `ps` shows those to everybody.
curl_option() {
  local value=${2//\\/\\\\}
  printf '%s = "%s"\n' "$1" "${value//\"/\\\"}"
}

on_signal() {
  STOPPING=1
  if [[ -n $CHILD ]]; then kill -TERM "$CHILD" 2>/dev/null || true; fi
}

finish() {
  local status=$?
  trap - EXIT
  trap '' TERM INT HUP
  rm -f "$WORK_DIR/startup.pid"
  exec >&- 2>&-
  wait "$LOGGER" || true
  exit "$status"
}

# Runs a command so that a signal to this script reaches it at once; its exit status. In the background, its standard
# input is /dev/null, and not this script that bash may be reading from there.
run() {
  local status=0 milliseconds=5 nap
  "$@" &
  CHILD=$!
  if ((STOPPING)); then kill -TERM "$CHILD" 2>/dev/null || true; fi # the signal came before there was a child
  # Not `wait` alone: bash loses the status of a command that ends just when a signal interrupts its `wait`.
  while kill -0 "$CHILD" 2>/dev/null; do
    printf -v nap '0.%03d' "$milliseconds"
    read -r -t "$nap" -u "$NEVER" || true
    if ((milliseconds < LONGEST_NAP)); then milliseconds=$((milliseconds * 5 / 4)); fi
  done
  wait "$CHILD" || status=$?
  CHILD=""
  return "$status"
}

leave_if_stopping() {
  if ((STOPPING)); then
    say "stopped; the next start goes on from here"
    exit "$STOPPED"
  fi
}

# Waits before the n-th retry.
pause() {
  local seconds=$RETRY_SECONDS n
  for ((n = 1; n < $1 && seconds < LONGEST_PAUSE; n++)); do seconds=$((seconds * 2)); done
  if ((seconds > LONGEST_PAUSE)); then seconds=$LONGEST_PAUSE; fi
  say "trying again in $seconds s"
  run sleep "$seconds" || true
  leave_if_stopping
}

# Does a step of the preparation, and gives up after the last retry. A step returns 3 when another try would fail alike.
retry() {
  local what=$1 status n
  shift
  for ((n = 1; ; n++)); do
    status=0
    "$@" || status=$?
    if ((status == 0)); then return; fi
    leave_if_stopping
    say "$what failed (attempt $n/$((MAX_RETRIES + 1)))"
    if ((status == 3 || n > MAX_RETRIES)); then
      notify_failed "$what failed; see startup.log"
      exit 1
    fi
    pause "$n"
  done
}

# --- installation ---------------------------------------------------------------------------------------------------

# The functions below run where `set -e` does not reach, as conditions of `retry`: each command says what its failure means.

install_srde() {
  local mark="$SRDE_VENV/.srde-startup" source=$SRDE_SOURCE python wanted have="the user's own"
  wanted="$(digest "$SRDE_SOURCE")"
  if [[ -e $mark ]]; then have="$(<"$mark")"; fi
  if [[ -x $SRDE_VENV/bin/srde && $have != installing ]] &&
    [[ -z $SRDE_SOURCE || $have == "$wanted" || $have == "the user's own" ]]; then
    run "$SRDE_VENV/bin/srde" --version
    return
  fi
  [[ -n $SRDE_SOURCE ]] || { say "the installation was not finished: set SRDE_SOURCE again"; return 3; }
  python="$(find_python)" || { say "Python 3.11 or newer must be installed"; return 3; }
  run "$python" -m venv "$SRDE_VENV" || return
  echo installing >"$mark" || return
  if [[ $SRDE_SOURCE =~ ^(git\+|git@|ssh://) || $SRDE_SOURCE =~ \.git(@[^/]+)?$ ]]; then
    clone || return
    source="$WORK_DIR/source"
  fi
  local -a pip=("$SRDE_VENV/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off)
  if [[ -f $source/constraints.txt ]]; then pip+=(--constraint "$source/constraints.txt"); fi
  # torch comes first and alone, so that no later requirement can choose another build of it
  run "${pip[@]}" torch || return
  run "${pip[@]}" "$source" || return
  run "$SRDE_VENV/bin/srde" --version || return
  echo "$wanted" >"$mark"
}

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  return 1
}

clone() {
  local url=${SRDE_SOURCE#git+}
  local -a branch=()
  if [[ $url =~ ^(.*\.git)@([^/]+)$ ]]; then
    url=${BASH_REMATCH[1]}
    branch=(--branch "${BASH_REMATCH[2]}")
  fi
  rm -rf "$WORK_DIR/source" || return
  GIT_TERMINAL_PROMPT=0 run git clone --quiet --depth 1 "${branch[@]}" -- "$url" "$WORK_DIR/source"
}

# --- data -----------------------------------------------------------------------------------------------------------

# Downloads DATA_URL under a temporary name and renames it when it is whole: a file under its final name is never a part.
download() {
  local file=$1 part="$1.part" headers="$1.headers" resumed="$1.headers.resumed" host validator status=0
  local -a flags=() options=()
  host="${DATA_URL#*://}" host="${host%%[/?#]*}" host="${host##*@}"
  options=("$(curl_option url "$DATA_URL")")
  if [[ $host == huggingface.co && $DATA_URL == https://* && -n ${HF_TOKEN:-} ]]; then
    options+=("$(curl_option oauth2-bearer "$HF_TOKEN")") # curl takes it off when it is sent on to another host
  fi
  if [[ $DATA_URL == https://* ]]; then flags=(--proto-redir '=https'); else flags=(--proto-redir '=http,https'); fi
  validator="$(validator_of "$headers")"
  rm -f "$resumed"
  if [[ -s $part && -n $validator ]]; then
    say "downloading from $host, going on at byte $(stat -c %s "$part")"
    flags+=(--continue-at - --header "If-Range: $validator" --dump-header "$resumed")
  else
    say "downloading from $host"
    rm -f "$part"
    flags+=(--dump-header "$headers")
  fi
  # Less than 1 kB/s for a minute is a connection that hangs.
  run curl --silent --show-error --fail --location --globoff --proto '=http,https' "${flags[@]}" --connect-timeout 30 \
    --speed-limit 1024 --speed-time 60 --output "$part" --config <(printf '%s\n' "${options[@]}") || status=$?
  # 33: it sends the whole file, since it has another one now or cannot send parts; 416: nothing is left to send.
  if ((status == 33)) || { ((status == 22)) && grep -q '^HTTP/[0-9.]* 416' "$resumed" 2>/dev/null; }; then
    say "the server does not go on where it ended: from the beginning"
    rm -f "$part"
  fi
  if ((status != 0)); then return 1; fi
  if [[ ! -s $part ]] || ! is_jsonl "$part"; then
    rm -f "$part"
    say "what DATA_URL gave is empty, or does not begin with a JSON object"
    return 3
  fi
  mv -f "$part" "$file" || return
  rm -f "$headers" "$resumed"
  say "$(stat -c %s "$file") bytes of data"
}

# What tells whether the server still has the same file: its strong ETag, or else its date.
validator_of() {
  [[ -f $1 ]] || return 0
  tr -d '\r' <"$1" | awk '
    /^HTTP\// { tag = ""; date = "" }
    tolower($1) == "etag:" && $2 !~ /^W\// { tag = $2 }
    tolower($1) == "last-modified:" { sub(/^[^:]*: */, ""); date = $0 }
    END { print tag != "" ? tag : date }'
}

# An error page of a server is found here; every single row is checked by srde train before it trains.
is_jsonl() {
  "$SRDE_VENV/bin/python" - "$1" <<'PYTHON'
import json, sys

with open(sys.argv[1], encoding="utf-8-sig", errors="replace") as file:
    first = next((line for line in file if line.strip()), "")
try:
    sys.exit(not isinstance(json.loads(first), dict))
except ValueError:
    sys.exit(1)
PYTHON
}

# --- training -------------------------------------------------------------------------------------------------------

# Runs srde train until it is done. Each attempt resumes from the newest checkpoint: that is what srde train does.
train() {
  local file=$1 status n
  local -a more=()
  read -r -d '' -a more <<<"$TRAIN_ARGS" || true # read ends with 1 at the end of its input
  for ((n = 1; ; n++)); do
    leave_if_stopping
    export SRDE_ATTEMPT="$n/$((MAX_RETRIES + 1))"
    say "training, attempt $SRDE_ATTEMPT"
    status=0
    run "$SRDE_VENV/bin/srde" train --model_name_or_path "$MODEL_NAME" --train_file "$file" --output_dir "$OUTPUT_DIR" \
      --max_steps "$MAX_STEPS" "${more[@]}" || status=$?
    if ((status == 0)); then return; fi
    say "srde train ended with status $status"
    if ((status == STOPPED || status == 130)); then exit "$STOPPED"; fi
    leave_if_stopping
    if ((status == 2)); then
      notify_failed "srde train does not take these flags; see startup.log"
      exit 1
    fi
    if ((n > MAX_RETRIES)); then
      notify_failed "gave up after $n attempts; the last one ended with status $status"
      exit 1
    fi
    pause "$n"
  done
}

main "$@"
exit
