#!/usr/bin/env bash
# A training on a GKE cluster by XPK. It starts a workload again only on exit codes 42 and 127 to 255: 75 is translated.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=launch/manifest.sh
. "$LAUNCH_DIR/manifest.sh"

SUMMARY='Trains as an XPK workload on TPU slices of a cluster that XPK made.'
common_flags
google_flags 'Zone of the cluster; required.'
flag cluster '' 'Name of the cluster; required.'
flag slices 1 'Number of slices.'
image_flags
flag restarts 50 'Most restarts of the workload; the default of XPK is 0.'
flag priority medium 'very-low, low, medium, high or very-high.'
parse_flags "$@"
require zone accelerator cluster
require_whole slices restarts
SLICES=${VALUE[slices]}
[[ ${VALUE[priority]} =~ ^(very-low|low|medium|high|very-high)$ ]] || die 2 "--priority=${VALUE[priority]}: expected very-low, low, medium, high or very-high"
[[ ${VALUE[restarts]} != 0 ]] || die 2 '--restarts=0: a preempted workload would not start again; expected more'
# XPK makes slices of more than one chip of hosts with four.
read_card gke
if ((CHIPS_PER_HOST > 4)); then HOSTS=$((CHIPS / 4)); fi

NAME=${VALUE[name]}
CLUSTER=("--cluster=${VALUE[cluster]}" "--zone=${VALUE[zone]}" ${VALUE[project]:+"--project=${VALUE[project]}"})
need xpk
case $VERB in
  create | run)
    require image
    [[ ${VALUE[workdir]} == gs://?* ]] || die 2 "--workdir=${VALUE[workdir]}: a pod loses its disk; expected gs://BUCKET/PATH"
    # One word of a command has at most 128 KiB on Linux, and the archive is there as text.
    find_code $((64 << 10)) --carry-config
    unpack=''
    [[ -z $CODE ]] || unpack=$(unpack_code "echo $(code_text) | base64 -d")
    mapfile -d '' -t flags < <(train_flags /tmp/code)
    seconds=$(grace $((HOSTS * SLICES)))
    options=()
    if has_secrets; then
      # Names without values: XPK takes the values from this environment. It writes them into the manifest of the pods.
      scratch
      file=$SCRATCH/names
      for secret in "${SECRETS[@]}"; do [[ -z ${!secret:-} ]] || echo "$secret" >>"$file"; done
      is dry-run && options=(--env-file=NAMES) || options=("--env-file=$file")
    fi
    # exec: the shell of XPK passes SIGTERM to its child alone.
    run xpk workload create "${CLUSTER[@]}" "--workload=$NAME" "--tpu-type=$TYPE" "--num-slices=$SLICES" \
      "--docker-image=${VALUE[image]}" "--priority=${VALUE[priority]}" "--max-restarts=${VALUE[restarts]}" \
      "--termination-grace-period-seconds=$seconds" "${options[@]}" \
      "--command=${unpack}exec python -m ftjax.supervise --preflight --translate=75:42 -- python -m ftjax.train $(quote "${flags[@]}")"
    ;;
  status) run xpk workload list "${CLUSTER[@]}" "--filter-by-job=$NAME" ;;
  # XPK has no command for logs; its pods carry this label.
  logs) run kubectl logs -l "xpk.google.com/workload=$NAME,batch.kubernetes.io/job-completion-index=0" --tail=200 --prefix ;;
  stop) run xpk workload delete "${CLUSTER[@]}" "--workload=$NAME" --force ;;
esac
