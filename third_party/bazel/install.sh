#!/usr/bin/env bash
# Installs Bazel 4.2.3 of Debian 12 with apt-get where it is missing; exit code 1, and a line why, where that cannot be.
set -euo pipefail
if command -v bazel-4 >/dev/null; then exit 0; fi
packages=(bazel-bootstrap bazel-rules-java bazel-rules-proto bazel-platforms)
command -v apt-get >/dev/null || { echo 'Bazel is left out: this is no Debian, it has no apt-get.'; exit 1; }
install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${packages[@]}" </dev/null 2>&1 >/dev/null; }
if ! install >/dev/null; then
  apt-get update -qq >/dev/null 2>&1 || true
  why=$(install) || { echo "Bazel is left out: apt-get installs no ${packages[0]}: $(tail -1 <<<"$why")"; exit 1; }
fi
command -v bazel-4 >/dev/null || { echo "Bazel is left out: ${packages[0]} has no bazel-4; Debian 12 has."; exit 1; }
