#!/usr/bin/env bash
# A TPU VM or a TPU VM pod by the Cloud TPU API, and the training on it. v2 to v6e.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=launch/lifecycle.sh
. "$LAUNCH_DIR/lifecycle.sh"
# shellcheck source=launch/tpu_api.sh
. "$LAUNCH_DIR/tpu_api.sh"

SUMMARY='Trains on a TPU VM or a TPU VM pod of the Cloud TPU API (v2 to v6e; TPU7x: gce.sh).'
common_flags
google_flags 'Zone; required.'
install_flags
tpu_api_flags
lifecycle_flags
parse_flags "$@"
lifecycle_check
require zone accelerator
read_card tpu-api
ZONE=${VALUE[zone]}
tpu_api_check

machines_create() {
  run gcloud compute tpus tpu-vm create "${VALUE[name]}" "--zone=$ZONE" "${PROJECT[@]}" "--accelerator-type=$TYPE" \
    "--version=$RUNTIME" "${CAPACITY[@]}" --quiet
}

machines_state() { node_state; }

machines_delete() { run gcloud compute tpus tpu-vm delete "${VALUE[name]}" "--zone=$ZONE" "${PROJECT[@]}" --quiet; }

lifecycle "$@"
