#!/usr/bin/env bash
# Builds the wheel of the commit that is checked out: `make wheel`.
# usage: third_party/wheel.sh PYTHON FOLDER
#
# From `git archive`, so that files which are not committed, the umask and line endings of the
# checkout do not matter.
set -euo pipefail
python=$1 output=$2
root=$(cd "$(dirname "$0")/.." && pwd)
git -C "$root" rev-parse --verify --quiet HEAD >/dev/null ||
  { echo 'make wheel builds a commit, and here is none; third_party/build_wheel.py builds from any folder' >&2; exit 2; }
if [ -n "$(git -C "$root" status --porcelain)" ]; then
  echo 'Changes that are not committed are not in the wheel.' >&2
fi
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
git -C "$root" -c core.autocrlf=false archive --format=tar HEAD | tar -x -C "$tree"
"$python" "$tree/third_party/build_wheel.py" --source="$tree" --output="$output" \
  --epoch="$(git -C "$root" log -1 --format=%ct)" --commit="$(git -C "$root" rev-parse HEAD)"
