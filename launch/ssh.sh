#!/usr/bin/env bash
# Machines that exist already, reached by ssh: GPU hosts, workstations, a TPU VM made otherwise.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=launch/lifecycle.sh
. "$LAUNCH_DIR/lifecycle.sh"

SUMMARY='Trains on a list of machines that are reached by ssh; one process each.'
common_flags
flag hosts '' 'Machines, [USER@]HOST,...; the first is process 0; required.'
flag coordinator '' 'Address of process 0 as the others reach it, HOST:PORT; default: the first host, port 8476.'
flag platform cuda 'Which lock is installed: cpu, cuda or tpu.'
flag shared-disk false 'The workdir is on a disk that all hosts mount at the same place.'
flag ssh-option '' 'One option of ssh and scp, like StrictHostKeyChecking=accept-new.'
install_flags
lifecycle_flags
parse_flags "$@"
lifecycle_check
require hosts
IFS=, read -r -a HOST_NAMES <<<"${VALUE[hosts]}"
[[ ${VALUE[platform]} =~ ^(cpu|cuda|tpu)$ ]] || die 2 "--platform=${VALUE[platform]}: expected cpu, cuda or tpu"
[[ ${VALUE[coordinator]} =~ ^(|.+:[0-9]+)$ ]] || die 2 "--coordinator=${VALUE[coordinator]}: expected HOST:PORT"
for host in "${HOST_NAMES[@]}"; do
  [[ $host =~ ^[A-Za-z0-9_.@:-]+$ && $host != -* ]] || die 2 "--hosts: '$host' is not [USER@]HOST"
done
need ssh scp
case $VERB in
  create | run)
    check_workdir "${#HOST_NAMES[@]}"
    find_install "${VALUE[platform]}"
    find_code 0
    ;;
esac
OPTIONS=(-o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=30)
[[ -z ${VALUE[ssh-option]} ]] || OPTIONS+=(-o "${VALUE[ssh-option]}")

machines_create() { :; } # they exist

machines_delete() { note 'the machines are yours: nothing is deleted'; }

machines_state() {
  local host
  for host in "${HOST_NAMES[@]}"; do
    ssh "${OPTIONS[@]}" "$host" true </dev/null || { echo waiting; return; }
  done
  echo ready
}

# Quickly refused or unreachable hosts are seen by --watch as waiting.
machines_on() {
  local host pids=() pid code=0
  if [[ $1 != all ]]; then
    run ssh "${OPTIONS[@]}" "${HOST_NAMES[$1]}" "$2"
    return
  fi
  for host in "${HOST_NAMES[@]}"; do
    if is dry-run; then
      run ssh "${OPTIONS[@]}" "$host" "$2"
    else
      # shellcheck disable=SC2029 # the command is complete here
      ssh "${OPTIONS[@]}" "$host" "$2" </dev/null &
      pids+=($!)
    fi
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return $code
}

machines_copy() {
  local host
  for host in "${HOST_NAMES[@]}"; do run scp -q -p "${OPTIONS[@]}" "$@" "$host:$REMOTE/" || return; done
}

machines_flags() {
  local i address=${VALUE[coordinator]:-${HOST_NAMES[0]#*@}:8476} count=${#HOST_NAMES[@]}
  for ((i = 0; i < count; i++)); do
    ((count == 1)) && echo || echo "--coordinator=$address --num_processes=$count --process_id=$i"
  done
}

lifecycle "$@"
