#!/usr/bin/env bash
# Prints the digest of a base image, from the registry that has it: digest.sh [IMAGE]
set -euo pipefail
image=${1:-python:3.12-slim-bookworm}
asked=''

try() {
  local digest
  command -v "$1" >/dev/null || return 1
  asked+=" $1"
  digest=$("$@" 2>/dev/null) && [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] && echo "$digest"
}

try docker buildx imagetools inspect "$image" --format '{{.Manifest.Digest}}' && exit
try skopeo inspect --format '{{.Digest}}' "docker://docker.io/library/$image" && exit
try crane digest "$image" && exit
if [[ -n $asked ]]; then why="no registry answered$asked"; else why="none of docker (with buildx), skopeo and crane is installed"; fi
echo "error: no digest of $image: $why" >&2
exit 1
