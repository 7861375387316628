#!/usr/bin/env bash
# Builds an image by launch/docker/Dockerfile and trains in it, without a docker service and without an image registry:
#   tests/docker_images.sh [cpu|tpu|cuda]        as root on Debian; apt-get install buildah mmdebstrap
#
# The base is Debian with python3, made by mmdebstrap. The wheel is that of the commit which is checked out; PYTHON (default:
# .venv/bin/python) has the packages of build.txt. pip in the build has the settings and certificates of this machine.
set -euo pipefail
platform=${1:-cpu}
suite=${SUITE:-bookworm}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ $platform =~ ^(cpu|tpu|cuda)$ ]] || { echo "error: $platform: expected cpu, tpu or cuda" >&2; exit 2; }
for tool in buildah mmdebstrap git; do
  command -v "$tool" >/dev/null || { echo "error: $tool is not on PATH; apt-get install buildah mmdebstrap git" >&2; exit 2; }
done
((EUID == 0)) || { echo 'error: expected root, for mmdebstrap and the chroot of buildah' >&2; exit 2; }

work=$(mktemp -d "${TMPDIR:-/tmp}/ftjax-image-XXXXXX")
# A store of its own, so that no image of this machine is used or changed.
buildah() { command buildah --root "$work/store" --runroot "$work/run" "$@"; }
# The store is deleted as a folder, which is quicker than by image; nothing of it may be mounted then.
cleanup() {
  local place
  while read -r place; do umount "$place" || umount --lazy "$place" || true; done \
    < <(awk -v work="$work/" 'index($2, work) == 1 { print $2 }' /proc/self/mounts | tac)
  if grep -qF " $work/" /proc/self/mounts; then
    echo "error: $work is still mounted; it is not deleted" >&2
  else
    rm -rf --one-file-system "$work"
  fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM
export BUILDAH_ISOLATION=chroot TMPDIR=$work

echo "== the base: Debian $suite with python3"
mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv,python-is-python3 "$suite" "$work/base.tar"
container=$(buildah from scratch)
buildah add --quiet "$container" "$work/base.tar" / >/dev/null
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
buildah commit --quiet "$container" localhost/python:base >/dev/null
buildah rm "$container" >/dev/null
rm "$work/base.tar"
digest=$(buildah inspect --type=image --format '{{.FromImageDigest}}' localhost/python:base)

echo "== the wheel"
git clone --quiet "$root" "$work/context"
"$work/context/third_party/wheel.sh" "${PYTHON:-$root/.venv/bin/python}" "$work/context/dist"
wheel=$(basename "$work"/context/dist/*.whl)

echo "== the image ftjax:$platform from localhost/python@$digest"
mounts=()
for file in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf; do [[ ! -f $file ]] || mounts+=("--volume=$file:$file:ro"); done
buildah build --quiet --pull-never --file "$work/context/launch/docker/Dockerfile" "${mounts[@]}" \
  --build-arg=BASE_IMAGE=localhost/python "--build-arg=BASE_DIGEST=$digest" \
  "--build-arg=LOCK=third_party/requirements/$platform.txt" "--build-arg=WHEEL=dist/$wheel" --tag "ftjax:$platform" "$work/context"
buildah images

echo "== a training in it, as the user of the image"
container=$(buildah from --pull-never "localhost/ftjax:$platform")
inside() { buildah run --env=JAX_PLATFORMS=cpu "$container" -- "$@"; }
user=$(inside id -u)
[[ $user == 10001 ]] || { echo "error: the image runs as user $user; expected 10001" >&2; exit 1; }
inside python -m ftjax train --config=tiny_sft --workdir=/runs/tiny
inside test -s /runs/tiny/export/model.safetensors
inside pip check
echo "== ftjax:$platform was built, and trained as user $user"
