#!/usr/bin/env bash
# Runs a command of this project until it is done, and starts it again whenever it was stopped or killed.
#
#   experiments/launch/until_done.sh python -m experiments.train --config=... --workdir=...
#
# A run continues from its last checkpoint, so the same command is the right one every time. What starting again
# would not change ends the loop with the same code: 1 a defect, 2 a mistake, 3 a loss that diverged. Environment:
# MOST_STARTS (default 1000), PAUSE seconds between them (default 10). SIGTERM and SIGINT are passed on, and end it.
set -u

if [ "$#" -eq 0 ]; then
  echo "usage: $0 COMMAND [ARGUMENT...]" >&2
  exit 2
fi

child=""
stopping=""
# shellcheck disable=SC2329  # the trap runs it
stop() {
  stopping=yes
  if [ -n "$child" ]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap stop TERM INT

code=75
for start in $(seq 1 "${MOST_STARTS:-1000}"); do
  "$@" &
  child=$!
  if [ -n "$stopping" ]; then kill -TERM "$child" 2>/dev/null || true; fi
  # A signal interrupts `wait`; the command may need a while to save.
  while :; do
    wait "$child"
    kill -0 "$child" 2>/dev/null || break
  done
  # What an interrupted `wait` returns is the signal's code; bash keeps the command's own.
  wait "$child"
  code=$?
  child=""
  if [ -n "$stopping" ]; then exit "$code"; fi
  case "$code" in
    0 | 1 | 2 | 3) exit "$code" ;;
  esac
  echo "start $start ended with code $code; starting again in ${PAUSE:-10} s" >&2
  sleep "${PAUSE:-10}" &
  child=$!
  wait "$child"
  child=""
  if [ -n "$stopping" ]; then exit "$code"; fi
done
exit "$code"
