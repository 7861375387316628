#!/usr/bin/env bash
# A TPU of a queued resource (spot, reserved or on demand): waits for it, trains, and where it is preempted deletes and asks again.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=launch/lifecycle.sh
. "$LAUNCH_DIR/lifecycle.sh"
# shellcheck source=launch/tpu_api.sh
. "$LAUNCH_DIR/tpu_api.sh"

SUMMARY='Trains on a queued resource of the Cloud TPU API; with --watch asks again after a preemption, and resumes.'
common_flags
google_flags 'Zone, or several, comma-separated, to be tried in turn; required.'
install_flags
tpu_api_flags
flag valid-until '' 'Time after which an unanswered request fails, like 6h.'
flag zone-seconds 0 'With several zones: seconds to wait in one before trying the next; 0: until the request fails.'
lifecycle_flags
parse_flags "$@"
lifecycle_check
require_whole zone-seconds
require zone accelerator
read_card tpu-api
IFS=, read -r -a ZONES <<<"${VALUE[zone]}"
ZONE=${ZONES[0]}
tpu_api_check
ASKED=$SECONDS

resource_state() {
  ask gcloud compute tpus queued-resources describe "${VALUE[name]}" "--zone=$ZONE" "${PROJECT[@]}" '--format=value(state.state)'
}

machines_create() {
  local options=()
  [[ -z ${VALUE[valid-until]} ]] || options+=("--valid-until-duration=${VALUE[valid-until]}")
  run gcloud compute tpus queued-resources create "${VALUE[name]}" "--zone=$ZONE" "${PROJECT[@]}" "--node-id=${VALUE[name]}" \
    "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME" "${options[@]}" "${CAPACITY[@]}" --quiet
  ASKED=$SECONDS
}

machines_state() {
  case $(resource_state) in
    NONE) echo none ;;
    UNKNOWN) echo unknown ;;
    ACTIVE)
      case $(node_state) in
        none) echo waiting ;; # not there yet, or deleted by hand: the request will be SUSPENDED
        *) node_state ;;
      esac
      ;;
    SUSPENDED | FAILED) echo lost ;;
    *)
      if ((${#ZONES[@]} > 1 && ${VALUE[zone-seconds]} > 0 && SECONDS - ASKED > ${VALUE[zone-seconds]})); then echo lost; else echo waiting; fi
      ;;
  esac
}

# A suspended resource keeps its name until it is deleted. The next request is for the next zone.
machines_delete() {
  local try
  run gcloud compute tpus queued-resources delete "${VALUE[name]}" "--zone=$ZONE" "${PROJECT[@]}" --force --async --quiet
  is dry-run && return
  for try in {1..120}; do
    [[ $(resource_state) == NONE ]] && break
    sleep "${VALUE[poll]}"
  done
  ((try < 120)) || die 1 "${VALUE[name]} in $ZONE is still there after $try looks; delete it by hand"
  [[ $VERB == delete ]] || next_zone
}

next_zone() {
  ZONES=("${ZONES[@]:1}" "${ZONES[0]}")
  [[ $ZONE == "${ZONES[0]}" ]] || note "next zone: ${ZONES[0]}"
  ZONE=${ZONES[0]}
}

# Finds the zone of a resource that exists.
find_zone() {
  local zone
  ((${#ZONES[@]} > 1)) && ! is dry-run || return 0
  for zone in "${ZONES[@]}"; do
    ZONE=$zone
    [[ $(resource_state) == NONE ]] || return 0
  done
  ZONE=${ZONES[0]}
}

find_zone
lifecycle "$@"
