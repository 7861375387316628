#!/usr/bin/env bash
# A container on this machine: builds the image, trains in it.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

SUMMARY='Trains in a container of this machine; build makes the image from the wheel and a lock.'
VERBS=(build create run status logs stop)
common_flags
flag platform cpu 'cpu, cuda or tpu.'
flag image '' 'Name of the image; default: ftjax:PLATFORM.'
flag base python:3.12-slim-bookworm 'With build: base image.'
flag digest '' 'With build: digest of the base image, sha256:...; make docker-digest prints it; required.'
flag workdir-volume '' 'Folder of this machine that is /runs in the container; default: the workdir, which then is /runs/NAME.'
flag stop-seconds 300 'Seconds that stop waits for a checkpoint.'
install_flags
parse_flags "$@"
[[ ${VALUE[platform]} =~ ^(cpu|cuda|tpu)$ ]] || die 2 "--platform=${VALUE[platform]}: expected cpu, cuda or tpu"
require_whole stop-seconds
NAME=${VALUE[name]}
IMAGE=${VALUE[image]:-ftjax:${VALUE[platform]}}
need docker

# Paths below the checkout, which is the build context.
inside() {
  local path
  if is dry-run; then path=$1; else path=$(realpath --relative-to="$LAUNCH_DIR/.." "$1"); fi
  [[ $path != ../* ]] || die 2 "$1: expected a file in the checkout, which is the build context"
  printf '%s' "$path"
}

# The code is mounted where it is, and read only.
add_code() {
  local path paths found='' number=0
  IFS=, read -r -a paths <<<"${VALUE[code]}"
  for path in "${paths[@]}"; do
    if [[ -d $path && ($path == */ || $path =~ (^|/)\.\.?$) ]]; then
      number=$((number + 1))
      found+=":/code-$number"
      options+=("--volume=$(realpath "$path"):/code-$number:ro")
    else
      [[ :$found: == *:/code:* ]] || found+=:/code
      options+=("--volume=$(realpath "$path"):/code/$(basename "$path"):ro")
    fi
  done
  [[ -z $found ]] || options+=("--env=PYTHONPATH=${found#:}")
}

case $VERB in
  build)
    [[ ${VALUE[digest]} =~ ^sha256:[0-9a-f]{64}$ ]] || die 2 "--digest=${VALUE[digest]}: expected sha256: and 64 hexadecimal digits of ${VALUE[base]}; make docker-digest asks the registry"
    find_install "${VALUE[platform]}"
    ((${#LOCKS[@]} == 1)) || die 2 "several locks: ${LOCKS[*]}; choose the one for the Python of ${VALUE[base]} with --lock=FILE"
    context=$LAUNCH_DIR/..
    is dry-run && context=.
    lock=$(inside "${LOCKS[0]}")
    wheel=$(inside "$WHEEL")
    run docker build --file "$context/launch/docker/Dockerfile" "--build-arg=BASE_IMAGE=${VALUE[base]}" "--build-arg=BASE_DIGEST=${VALUE[digest]}" \
      "--build-arg=LOCK=$lock" "--build-arg=WHEEL=$wheel" --tag "$IMAGE" "$context"
    ;;
  create | run)
    options=(--stop-timeout="${VALUE[stop-seconds]}" --cap-drop=ALL --security-opt=no-new-privileges)
    workdir=${VALUE[workdir]}
    if [[ $workdir != gs://* ]]; then
      folder=${VALUE[workdir-volume]:-$workdir}
      [[ $folder == /* ]] || folder=$PWD/$folder
      is dry-run || mkdir -p "$folder"
      [[ -n ${VALUE[workdir-volume]} ]] || workdir=/runs/$NAME
      if is dry-run; then options+=(--user=UID:GID); else options+=("--user=$(id -u):$(id -g)"); fi
      options+=("--volume=$folder:$([[ -n ${VALUE[workdir-volume]} ]] && echo /runs || echo "/runs/$NAME")")
    fi
    case ${VALUE[platform]} in
      cpu) options+=(--env=JAX_PLATFORMS=cpu) ;;
      cuda) options+=(--gpus=all --shm-size=8g) ;;
      # The TPU devices are given to privileged containers alone.
      tpu) options=(--stop-timeout="${VALUE[stop-seconds]}" --privileged --network=host --user=0) ;;
    esac
    # Names without values: docker takes them from this environment.
    for secret in "${SECRETS[@]}"; do [[ -z ${!secret:-} ]] || options+=("--env=$secret"); done
    config=${VALUE[config]}
    if [[ -f $config ]]; then options+=("--volume=$(realpath "$config"):/config/$(basename "$config"):ro"); fi
    find_code 0
    add_code
    VALUE[workdir]=$workdir
    mapfile -d '' -t flags < <(train_flags /config)
    # The container of an earlier start, which has ended, would keep the name.
    if ! is dry-run && [[ -n $(docker ps --all --quiet "--filter=name=^$NAME\$" --filter=status=exited) ]]; then docker rm "$NAME" >/dev/null; fi
    run docker run --detach "--name=$NAME" "${options[@]}" --entrypoint=python "$IMAGE" -m ftjax.supervise --preflight -- python -m ftjax.train "${flags[@]}"
    ;;
  status) run docker ps --all "--filter=name=^$NAME\$" ;;
  logs) run docker logs --tail=200 "$NAME" ;;
  stop) run docker stop --time="${VALUE[stop-seconds]}" "$NAME" ;;
esac
