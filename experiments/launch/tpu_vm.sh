#!/usr/bin/env bash
# Trains on a Cloud TPU slice (spot capacity), on all of its hosts, until the run is done.
#
#   PROJECT=my-project ZONE=us-west4-a TPU=lathe TYPE=v5litepod-16 REPO=https://HOST/lathe.git \
#     experiments/launch/tpu_vm.sh --config=configs/matlm.py:paper --workdir=/mnt/runs/matlm \
#     --config.mesh.fsdp=16 --config.stages.0.accumulate=8
#
# Needs gcloud, logged in, and REPO, from which each host installs the project. The workdir must be on a file system that
# all hosts mount (Filestore); MOUNT is a command that mounts it. A slice that was taken away is asked for anew; a run
# continues from its last checkpoint. Ends with the run's code, and deletes the slice then, unless KEEP is set.
set -euo pipefail

: "${PROJECT:?}" "${ZONE:?}" "${TPU:?}" "${TYPE:?}" "${REPO:?}"
VERSION="${VERSION:-v2-alpha-tpuv5-lite}"
MOUNT="${MOUNT:-true}"
where=(--project="$PROJECT" --zone="$ZONE" --quiet)

state() {
  gcloud compute tpus queued-resources describe "$TPU" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo ABSENT
}

on_all() {
  gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --worker=all --command="$1"
}

remove() {
  gcloud compute tpus queued-resources delete "$TPU" "${where[@]}" --force
}

ask() {
  gcloud compute tpus queued-resources create "$TPU" "${where[@]}" --node-id="$TPU" \
    --accelerator-type="$TYPE" --runtime-version="$VERSION" --spot
  until [ "$(state)" = ACTIVE ]; do
    case "$(state)" in
      FAILED | SUSPENDED | ABSENT) return 1 ;;
    esac
    sleep 30
  done
  on_all "$MOUNT && { test -d lathe || git clone --depth 1 '$REPO' lathe; } && cd lathe && python3 -m venv .venv &&
    .venv/bin/pip install --quiet -c constraints.txt -e '.[tpu]'"
}

arguments=$(printf '%q ' "$@")
while :; do
  case "$(state)" in
    ACTIVE) ;;
    ABSENT) ask || { remove || true; sleep 60; continue; } ;;
    *) remove || true; sleep 30; continue ;;
  esac
  # Each host knows from its metadata which one it is; losing one ends the others, and until_done.sh starts them again.
  code=0
  on_all "cd lathe && PATH=\$PWD/.venv/bin:\$PATH experiments/launch/until_done.sh python -m experiments.train $arguments" ||
    code=$?
  case "$code" in
    0 | 1 | 2 | 3)
      if [ -z "${KEEP:-}" ]; then remove; fi
      exit "$code"
      ;;
  esac
  echo "the connection ended with code $code: the slice is $(state)" >&2
  sleep 30
done
