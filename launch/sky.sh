#!/usr/bin/env bash
# A training as a managed job of SkyPilot: TPUs of Google Cloud, or GPUs of any cloud that it knows.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=launch/manifest.sh
. "$LAUNCH_DIR/manifest.sh"

SUMMARY='Trains as a managed job of SkyPilot, which looks for capacity and recovers from preemptions.'
common_flags
flag accelerator '' 'TPU slice (v6e-8, v5litepod-16 ...), or GPUs like H100:8; required.'
flag infra '' 'CLOUD[/REGION[/ZONE]]; TPUs: gcp.'
flag nodes 1 'Number of machines, for GPUs.'
flag spot false 'Spot machines.'
flag disk-size 200 'Disk in GB.'
install_flags
parse_flags "$@"
[[ ${VALUE[nodes]} =~ ^[1-9][0-9]*$ ]] || die 2 "--nodes=${VALUE[nodes]}: expected a whole number from 1"
[[ ${VALUE[disk-size]} =~ ^[1-9][0-9]*$ ]] || die 2 "--disk-size=${VALUE[disk-size]}: expected a whole number of GB"

NAME=${VALUE[name]}
NODES=${VALUE[nodes]}

task() {
  local tags=() accelerators=${VALUE[accelerator]} infra=${VALUE[infra]} platform=cuda flags host=$LAUNCH_DIR/host.sh words
  require accelerator
  if [[ $accelerators =~ ^[A-Za-z0-9-]+:[0-9]+$ && ! $accelerators =~ ^(v[2-6]|tpu) ]]; then
    tags=(gpu)
    check_workdir "$NODES"
  else
    read_card tpu-api
    platform=tpu
    # The default of SkyPilot for v5e is the runtime of v5p; see launch/tpus.tsv.
    tags=(tpu "RUNTIME=$RUNTIME")
    accelerators=tpu-$TYPE:1
    infra=${infra:-gcp}
    ((NODES == 1)) || die 2 "--nodes=$NODES: a TPU slice is one node of SkyPilot; expected a larger --accelerator"
    check_workdir "$HOSTS"
  fi
  [[ ${VALUE[workdir]} == gs://* ]] || die 2 "--workdir=${VALUE[workdir]}: recovered jobs start on new machines; expected gs://BUCKET/PATH"
  find_install "$platform"
  ((${#LOCKS[@]} == 1)) || die 2 "several locks: ${LOCKS[*]}; choose the one for the Python of the machines with --lock=FILE"
  is dry-run && host=launch/host.sh
  [[ ! -f ${VALUE[config]} ]] || tags+=(config)
  [[ -z $infra ]] || tags+=(infra)
  if [[ -n $CODE ]]; then tags+=(code "CODE=$(is dry-run && echo code.tar.gz || echo "$CODE")"); fi
  ((${#BUILD_LOCKS[@]} == 0)) || tags+=(build)
  mapfile -d '' -t flags < <(train_flags)
  words=$(quote "${flags[@]}")
  render "$LAUNCH_DIR/skypilot.yaml" "${tags[@]}" accelerators "NAME=$NAME" "NODES=$NODES" "INFRA=$infra" \
    "ACCELERATORS=$accelerators" "SPOT=${VALUE[spot]}" "DISK=${VALUE[disk-size]}" "HOST=$host" \
    "BUILD_LOCK=${BUILD_LOCKS[0]:-}" "WHEEL_NAME=$(basename "$WHEEL")" "WHEEL=$WHEEL" "LOCK_NAME=$(basename "${LOCKS[0]}")" "LOCK=${LOCKS[0]}" \
    "CONFIG_NAME=$(basename "${VALUE[config]}")" "CONFIG=${VALUE[config]}" "FLAGS=$words"
}

need sky
case $VERB in
  create | run)
    find_code 0
    text=$(task)
    options=()
    # A name without a value: SkyPilot takes the value from the environment.
    for secret in "${SECRETS[@]}"; do [[ -z ${!secret:-} ]] || options+=(--secret "$secret"); done
    if is dry-run; then
      printf '%s\n' "$text"
      run sky jobs launch --yes --detach-run "--name=$NAME" "${options[@]}" TASK.yaml
    else
      scratch
      file=$SCRATCH/task.yaml
      printf '%s\n' "$text" >"$file"
      sky jobs launch --yes --detach-run "--name=$NAME" "${options[@]}" "$file"
    fi
    ;;
  status) run sky jobs queue ;;
  logs) run sky jobs logs "--name=$NAME" --no-follow ;;
  stop) run sky jobs cancel --yes "--name=$NAME" ;;
esac
