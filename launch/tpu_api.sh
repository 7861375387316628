# shellcheck shell=bash
# What tpu_vm.sh and queued_resource.sh share: nodes of the Cloud TPU API. Sourced after lib.sh and lifecycle.sh.
# Hosts of a node find each other by the metadata that the API gives them.

tpu_api_flags() {
  flag runtime '' 'Runtime version; default: that of launch/tpus.tsv.'
  flag spot false 'Spot capacity, which may be preempted.'
  flag reserved false 'Capacity of a reservation.'
  flag internal-ips false 'No external addresses; needs Private Google Access, and Cloud NAT for the installation.'
  flag network '' 'VPC network.'
  flag subnetwork '' 'Subnetwork.'
  flag service-account '' 'Service account of the machines; it needs roles/storage.objectUser on the bucket.'
  flag labels '' 'Labels, KEY=VALUE,...'
}

tpu_api_check() {
  local name
  PROJECT=(${VALUE[project]:+"--project=${VALUE[project]}"})
  RUNTIME=${VALUE[runtime]:-$RUNTIME}
  CAPACITY=()
  ! { is spot && is reserved; } || die 2 '--spot and --reserved: expected one of them'
  for name in spot reserved internal-ips; do ! is $name || CAPACITY+=("--$name"); done
  for name in network subnetwork service-account labels; do
    [[ -z ${VALUE[$name]} ]] || CAPACITY+=("--$name=${VALUE[$name]}")
  done
  need gcloud
  case $VERB in
    create | run)
      check_workdir "$HOSTS"
      find_install tpu
    find_code 0
      is dry-run || check_zone "$ZONE"
      ;;
  esac
}

# check_zone ZONE: ends where gcloud answers that the zone does not offer the type.
check_zone() {
  local offered
  if ! offered=$(gcloud compute tpus accelerator-types list "--zone=$1" "${PROJECT[@]}" '--format=value(type)' 2>/dev/null) || [[ -z $offered ]]; then
    note "could not ask which TPUs $1 offers; going on"
  elif ! grep -qx "$TYPE" <<<"$offered"; then
    die 2 "--zone=$1 does not offer $TYPE; it offers $(tr '\n' ' ' <<<"$offered" | cut -c1-300)"
  fi
  note "quota is not checked: a project needs TPU quota for $TYPE in $1$(is spot && echo ', of the spot (preemptible) kind'), under IAM & Admin > Quotas"
}

node_state() {
  case $(ask gcloud compute tpus tpu-vm describe "${VALUE[name]}" "--zone=$ZONE" "${PROJECT[@]}" '--format=value(state)') in
    NONE) echo none ;;
    UNKNOWN) echo unknown ;;
    READY) echo ready ;;
    PREEMPTED | TERMINATED) echo lost ;;
    *) echo waiting ;;
  esac
}

machines_on() {
  run gcloud compute tpus tpu-vm ssh "${VALUE[name]}" "--zone=$ZONE" "${PROJECT[@]}" "--worker=$1" "--command=$2" --quiet
}

machines_copy() {
  run gcloud compute tpus tpu-vm scp "$@" "${VALUE[name]}:$REMOTE/" "--zone=$ZONE" "${PROJECT[@]}" --worker=all --quiet
}
