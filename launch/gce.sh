#!/usr/bin/env bash
# TPUs of Compute Engine (v5p, v6e, TPU7x): one host, or a slice of hosts as a managed group with a workload policy.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=launch/lifecycle.sh
. "$LAUNCH_DIR/lifecycle.sh"

SUMMARY='Trains on TPU machines of Compute Engine (v5p, v6e, TPU7x).'
common_flags
google_flags 'Zone; required.'
install_flags
flag machine-type '' 'Machine type, where the slice can be made of several (v6e-8: ct6e-standard-8t is one host, ct6e-standard-4t are two).'
flag spot false 'Spot capacity, which may be preempted.'
flag flex-start '' 'Flex-start for at most this long, up to 7d; the machines are deleted then.'
flag request-valid-for 2h 'With --flex-start: how long the request of one host waits for capacity, at most 2h.'
flag reservation '' 'Name of a reservation.'
flag disk-size 200GB 'Boot disk; the default of the image, 10 GB, is too small.'
flag disk-type '' 'Type of the boot disk; default: hyperdisk-balanced on v6e, else that of the service.'
flag service-account '' 'Service account of the machines; it needs roles/storage.objectUser on the bucket.'
flag network '' 'VPC network.'
flag subnetwork '' 'Subnetwork.'
flag port 8476 'Port of process 0 for the others.'
flag iap false 'ssh through Identity-Aware Proxy, for machines without external addresses.'
lifecycle_flags
parse_flags "$@"
lifecycle_check
require zone accelerator
require_number port
read_card gce
NAME=${VALUE[name]}
ZONE=${VALUE[zone]}
REGION=${ZONE%-*}
PROJECT=(${VALUE[project]:+"--project=${VALUE[project]}"})
((HOSTS == 1)) || require project # resources are named by full URLs
PLACE="projects/${VALUE[project]}/regions/$REGION"
API=https://www.googleapis.com/compute/v1

count=0
for name in spot flex-start reservation; do [[ ${VALUE[$name]} == false || -z ${VALUE[$name]} ]] || count=$((count + 1)); done
((count <= 1)) || die 2 '--spot, --flex-start and --reservation: expected one of them'
[[ ${VALUE[flex-start]} =~ ^([0-9]+[smhd])?$ ]] || die 2 "--flex-start=${VALUE[flex-start]}: expected a duration like 24h or 7d"
need gcloud
case $VERB in
  create | run)
    check_workdir "$HOSTS"
    find_install tpu
    find_code 0
    if ! is dry-run; then
      offered=$(gcloud compute machine-types list "--zones=$ZONE" "--filter=name=$MACHINE" "${PROJECT[@]}" '--format=value(name)' 2>/dev/null) \
        || { note "could not ask which machine types $ZONE offers; going on"; offered=$MACHINE; }
      [[ $offered == "$MACHINE" ]] || die 2 "--zone=$ZONE does not offer $MACHINE"
      note "quota is not checked: a project needs quota for the chips of $MACHINE in $REGION, under IAM & Admin > Quotas"
    fi
    ;;
esac

# Flags that a machine and the template of machines share.
machine_flags() {
  local disk=${VALUE[disk-type]} name
  [[ -n $disk || $GEN != v6e ]] || disk=hyperdisk-balanced
  printf '%s\n' "--machine-type=$MACHINE" "--image-family=$IMAGE" --image-project=ubuntu-os-accelerator-images \
    --maintenance-policy=TERMINATE "--boot-disk-size=${VALUE[disk-size]}" ${disk:+"--boot-disk-type=$disk"} --scopes=cloud-platform
  if is spot; then
    printf '%s\n' --provisioning-model=SPOT --instance-termination-action=DELETE
  elif [[ -n ${VALUE[flex-start]} ]]; then
    printf '%s\n' --provisioning-model=FLEX_START "--max-run-duration=${VALUE[flex-start]}" --instance-termination-action=DELETE
    ((HOSTS > 1)) || printf '%s\n' "--request-valid-for-duration=${VALUE[request-valid-for]}"
  elif [[ -n ${VALUE[reservation]} ]]; then
    printf '%s\n' --provisioning-model=RESERVATION_BOUND --reservation-affinity=specific "--reservation=${VALUE[reservation]}"
  fi
  for name in service-account network; do
    [[ -z ${VALUE[$name]} ]] || printf '%s\n' "--$name=${VALUE[$name]}"
  done
  [[ -z ${VALUE[subnetwork]} ]] || printf '%s\n' "--subnet=${VALUE[subnetwork]}"
}

# exists COMMAND ...: of a describe command; false in a dry run.
exists() { ! is dry-run && "$@" "${PROJECT[@]}" >/dev/null 2>&1; }

machines_create() {
  local flags
  mapfile -t flags < <(machine_flags)
  if ((HOSTS == 1)); then
    # --async: a client that is killed leaves no doubt about what was asked for.
    run gcloud compute instances create "$NAME" "--zone=$ZONE" "${PROJECT[@]}" "${flags[@]}" --async --quiet
    return
  fi
  # Policy and template of an earlier group may be of another topology or capacity. There is no group that uses them.
  ! exists gcloud compute instance-templates describe "$NAME" "--region=$REGION" \
    || run gcloud compute instance-templates delete "$NAME" "--region=$REGION" "${PROJECT[@]}" --quiet || return
  ! exists gcloud compute resource-policies describe "$NAME" "--region=$REGION" \
    || run gcloud compute resource-policies delete "$NAME" "--region=$REGION" "${PROJECT[@]}" --quiet || return
  run gcloud compute resource-policies create workload-policy "$NAME" "--region=$REGION" "${PROJECT[@]}" \
    --type=HIGH_THROUGHPUT "--accelerator-topology=$TOPOLOGY" --accelerator-topology-mode=AUTO_CONNECT --quiet || return
  run gcloud compute instance-templates create "$NAME" "--instance-template-region=$REGION" "${PROJECT[@]}" "${flags[@]}" --quiet || return
  run gcloud compute instance-groups managed create "$NAME" "--zone=$ZONE" "${PROJECT[@]}" \
    "--template=$API/$PLACE/instanceTemplates/$NAME" "--workload-policy=$API/$PLACE/resourcePolicies/$NAME" \
    "--size=$HOSTS" --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing --quiet
}

# All hosts of a slice are needed: one that has stopped makes the slice lost. That the chips are connected is not asked here;
# the pre-flight does it by a real gather.
machines_state() {
  local states
  if ((HOSTS == 1)); then
    states=$(ask gcloud compute instances describe "$NAME" "--zone=$ZONE" "${PROJECT[@]}" '--format=value(status)')
  else
    states=$(ask gcloud compute instance-groups managed list-instances "$NAME" "--zone=$ZONE" "${PROJECT[@]}" '--format=value(instanceStatus)')
  fi
  case $states in
    *NONE*) echo none ;;
    *UNKNOWN*) echo unknown ;;
    *STOPPING* | *STOPPED* | *TERMINATED* | *SUSPENDED* | *SUSPENDING*) echo lost ;;
    *)
      # Machines of a spot group that were taken back and deleted are no longer listed.
      if (($(grep -cx RUNNING <<<"$states") == HOSTS)); then
        echo ready
      elif [[ $WAS_READY == true ]] && (($(grep -c . <<<"$states") < HOSTS)); then
        echo lost
      else
        echo waiting
      fi
      ;;
  esac
}

# The group is deleted, and not its machines: it would make them again.
machines_delete() {
  if ((HOSTS == 1)); then
    run gcloud compute instances delete "$NAME" "--zone=$ZONE" "${PROJECT[@]}" --quiet
    return
  fi
  local code=0
  run gcloud compute instance-groups managed delete "$NAME" "--zone=$ZONE" "${PROJECT[@]}" --quiet || code=$?
  run gcloud compute instance-templates delete "$NAME" "--region=$REGION" "${PROJECT[@]}" --quiet || code=$?
  run gcloud compute resource-policies delete "$NAME" "--region=$REGION" "${PROJECT[@]}" --quiet || code=$?
  return $code
}

# Of a slice that lost a host: to no host, and back to all.
machines_reset() {
  local try
  ((HOSTS > 1)) || { machines_delete; return; }
  run gcloud compute instance-groups managed resize "$NAME" "--zone=$ZONE" "${PROJECT[@]}" --size=0 --quiet
  if ! is dry-run; then
    for try in {1..120}; do
      [[ -z $(ask gcloud compute instance-groups managed list-instances "$NAME" "--zone=$ZONE" "${PROJECT[@]}" '--format=value(name)') ]] && break
      sleep "${VALUE[poll]}"
    done
    ((try < 120)) || die 1 "$NAME still has machines after $try looks; delete the group by hand"
  fi
  run gcloud compute instance-groups managed resize "$NAME" "--zone=$ZONE" "${PROJECT[@]}" "--size=$HOSTS" --quiet
}

# Names of the hosts, one a line, sorted: the order of the processes. Fails where not all of them are there.
host_names() {
  local i names
  if ((HOSTS == 1)); then
    echo "$NAME"
  elif is dry-run; then
    for ((i = 0; i < HOSTS; i++)); do echo "HOST$i"; done
  else
    names=$(gcloud compute instance-groups managed list-instances "$NAME" "--zone=$ZONE" "${PROJECT[@]}" '--format=value(name)' | sort) || return
    (($(grep -c . <<<"$names") == HOSTS)) || { note "$NAME: expected $HOSTS machines; got ${names:-none}"; return 1; }
    printf '%s\n' "$names"
  fi
}

SSH=("--zone=$ZONE" "${PROJECT[@]}" --quiet)
! is iap || SSH+=(--tunnel-through-iap)

machines_on() {
  local names name pids=() pid code=0
  names=$(host_names) || return
  mapfile -t names <<<"$names"
  if [[ $1 != all ]]; then
    run gcloud compute ssh "${names[$1]:?no such host}" "${SSH[@]}" "--command=$2"
    return
  fi
  for name in "${names[@]}"; do
    if is dry-run; then
      run gcloud compute ssh "$name" "${SSH[@]}" "--command=$2"
    else
      gcloud compute ssh "$name" "${SSH[@]}" "--command=$2" </dev/null &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return $code
}

machines_copy() {
  local names name
  names=$(host_names) || return
  mapfile -t names <<<"$names"
  for name in "${names[@]}"; do run gcloud compute scp "$@" "$name:$REMOTE/" "${SSH[@]}" || return; done
}

# The coordinator is named: the metadata of such slices has host names, whose order need not be that of the chips.
machines_flags() {
  local names i
  names=$(host_names) || return
  mapfile -t names <<<"$names"
  for ((i = 0; i < ${#names[@]}; i++)); do
    ((HOSTS == 1)) && echo || echo "--coordinator=${names[0]}:${VALUE[port]} --num_processes=$HOSTS --process_id=$i"
  done
}

lifecycle "$@"
