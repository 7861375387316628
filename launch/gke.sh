#!/usr/bin/env bash
# A training on Kubernetes as a JobSet: TPU slices of GKE, GPU nodes, or CPUs.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=launch/manifest.sh
. "$LAUNCH_DIR/manifest.sh"

SUMMARY='Trains as a JobSet on a Kubernetes cluster that kubectl reaches; the nodes exist, or are made by autoscaling.'
common_flags
flag accelerator '' 'TPU slice: v5litepod-16, v6e:4x4, v5p-8, tpu7x-8 ...'
flag machine-type '' 'Machine type of the nodes, where a slice can be made of several.'
flag slices 1 'Number of TPU slices.'
flag platform tpu 'tpu, cuda or cpu.'
flag hosts 1 'With cuda and cpu: number of pods.'
flag per-host 8 'With cuda: GPUs of a pod; with cpu: its CPUs.'
flag gpu '' 'With cuda: value of the node label cloud.google.com/gke-accelerator, like nvidia-h100-80gb.'
flag spot false 'Tolerates spot nodes.'
image_flags
flag queue '' 'LocalQueue of Kueue.'
flag priority '' 'PriorityClass.'
flag restarts 50 'Most restarts of the whole JobSet.'
flag namespace default 'Namespace.'
flag service-account '' 'Kubernetes service account that may write to the bucket (Workload Identity).'
flag claim '' 'Persistent volume claim that is mounted at /runs, for a workdir below it.'
flag root false 'Run as root, where the nodes give accelerators to root alone.'
parse_flags "$@"
require_whole slices hosts per-host restarts
SLICES=${VALUE[slices]}

NAME=${VALUE[name]}
KUBECTL=(kubectl "--namespace=${VALUE[namespace]}")
TAGS=()
case ${VALUE[platform]} in
  tpu)
    require accelerator
    read_card gke
    CHIPS=$CHIPS_PER_HOST
    TAGS=(tpu "LABEL=$GKE_LABEL" "TOPOLOGY=$TOPOLOGY")
    ;;
  cuda | cpu)
    HOSTS=${VALUE[hosts]}
    CHIPS=${VALUE[per-host]}
    TAGS=("${VALUE[platform]}")
    ((SLICES == 1)) || die 2 "--slices=$SLICES: only TPUs have slices; expected --hosts"
    [[ -z ${VALUE[gpu]} ]] || TAGS+=(gpu "LABEL=${VALUE[gpu]}")
    ;;
  *) die 2 "--platform=${VALUE[platform]}: expected tpu, cuda or cpu" ;;
esac

# On TPUs the processes find each other by what GKE puts into the environment; elsewhere the first pod is named.
container_script() {
  local others=''
  if [[ ${VALUE[platform]} != tpu ]] && ((HOSTS > 1)); then
    others=" --coordinator=$NAME-train-0-0.$NAME:8476 --num_processes=$HOSTS --process_id=\$JOB_COMPLETION_INDEX"
  fi
  unpack_code 'cat /config/code.tar.gz'
  printf '%s' "exec python -m ftjax.supervise --preflight -- python -m ftjax.train \"\$@\"$others"
}

config_map() {
  printf -- '---\napiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: %s-config\n' "$NAME"
  [[ -z $CODE ]] || printf 'binaryData:\n  code.tar.gz: %s\n' "$(code_text)"
  [[ -f ${VALUE[config]} ]] || return 0
  printf 'data:\n  %s: |2\n' "$(basename "${VALUE[config]}")"
  sed 's/^/    /' "${VALUE[config]}"
}

manifest() {
  local flags script name arguments seconds
  mapfile -d '' -t flags < <(train_flags /config)
  script=$(json "$(container_script)")
  arguments=$(json "${flags[@]}")
  seconds=$(grace "$HOSTS")
  ! is spot || TAGS+=(spot)
  ! is root || TAGS+=(root)
  ((SLICES == 1)) || TAGS+=(slices)
  [[ -z ${VALUE[service-account]} ]] || TAGS+=(account)
  for name in queue priority claim; do [[ -z ${VALUE[$name]} ]] || TAGS+=("$name"); done
  [[ ! -f ${VALUE[config]} && -z $CODE ]] || TAGS+=(config)
  [[ ! " ${TAGS[*]} " =~ \ (config|claim|cuda)\  ]] || TAGS+=(volumes)
  [[ " ${TAGS[*]} " != *' config '* ]] || config_map
  render "$LAUNCH_DIR/jobset.yaml" "${TAGS[@]}" "NAME=$NAME" "QUEUE=${VALUE[queue]}" "RESTARTS=${VALUE[restarts]}" \
    "SLICES=$SLICES" "HOSTS=$HOSTS" "GRACE=$seconds" "ACCOUNT=${VALUE[service-account]}" \
    "PRIORITY=${VALUE[priority]}" "IMAGE=${VALUE[image]}" "SCRIPT=${script:1:-1}" "ARGS=$arguments" \
    "SECRET=$NAME-secrets" "CHIPS=$CHIPS" "CLAIM=${VALUE[claim]}"
}

# kubectl apply writes the whole ConfigMap into an annotation too, which may have 256 KiB; the archive is there as text.
MOST_PACKED=$((150 << 10))

# An apply to a JobSet that has ended starts nothing: what is left of that one is deleted, and the run resumes. One that has
# not ended is left alone.
make_room() {
  local conditions
  conditions=$(ask "${KUBECTL[@]}" get jobset "$NAME" -o 'jsonpath={.status.conditions[?(@.status=="True")].type}')
  case " $conditions " in
    *' NONE '*) ;;
    *' UNKNOWN '*) die 1 "kubectl could not be asked for the JobSet $NAME; nothing was changed" ;;
    *' Completed '* | *' Failed '*)
      note "the JobSet $NAME has ended ($conditions); deleting what is left of it, and starting again"
      delete_jobset
      ;;
    *)
      note "the JobSet $NAME has not ended: it is left as it is; $PROGRAM stop --name=$NAME ends it with a checkpoint"
      exit 0
      ;;
  esac
}

# Waits for the pods too: another JobSet of this name may be created then.
delete_jobset() { run "${KUBECTL[@]}" delete jobset "$NAME" --cascade=foreground --wait; }

# The values go through standard input alone.
put_secrets() {
  local secret
  has_secrets || return 0
  if is dry-run; then
    echo "# standard input: ${SECRETS[*]} of the environment, as NAME=VALUE; not shown"
    run "${KUBECTL[@]}" create secret generic "$NAME-secrets" --from-env-file=/dev/stdin
    return
  fi
  "${KUBECTL[@]}" delete secret "$NAME-secrets" --ignore-not-found >/dev/null
  for secret in "${SECRETS[@]}"; do [[ -z ${!secret:-} ]] || printf '%s=%s\n' "$secret" "${!secret}"; done \
    | "${KUBECTL[@]}" create secret generic "$NAME-secrets" --from-env-file=/dev/stdin
}

need kubectl
case $VERB in
  create | run)
    require image
    case ${VALUE[workdir]} in /runs | /runs/*) [[ -z ${VALUE[claim]} ]] || DEFAULT[shared-disk]=true VALUE[shared-disk]=true ;; esac
    check_workdir $((HOSTS * SLICES))
    [[ ${VALUE[workdir]} == gs://* || -n ${VALUE[claim]} ]] || die 2 "--workdir=${VALUE[workdir]}: a pod loses its disk; expected gs://BUCKET/PATH, or /runs/... with --claim"
    find_code "$MOST_PACKED"
    text=$(manifest)
    is dry-run || make_room
    put_secrets
    if is dry-run; then
      printf '%s\n' "$text"
      run "${KUBECTL[@]}" apply -f -
    else
      "${KUBECTL[@]}" apply -f - <<<"$text"
    fi
    ;;
  status)
    run "${KUBECTL[@]}" get jobset "$NAME" -o wide
    run "${KUBECTL[@]}" get pods -l "jobset.sigs.k8s.io/jobset-name=$NAME" -o wide
    ;;
  logs) run "${KUBECTL[@]}" logs -l "jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0" --tail=200 --prefix ;;
  # The pods get SIGTERM, save a checkpoint, and end within the grace period.
  # No secret is left behind.
  stop)
    delete_jobset
    run "${KUBECTL[@]}" delete secret "$NAME-secrets" --ignore-not-found
    ;;
esac
