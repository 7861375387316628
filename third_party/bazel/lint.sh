#!/usr/bin/env bash
# Formats and lints BUILD, .bzl, MODULE.bazel and WORKSPACE files by buildifier, which npm installs from package-lock.json into
# third_party/bazel/node_modules: `make lint-bazel`.
# usage: third_party/bazel/lint.sh [fix]    Without fix, only reports; exit code 4 if a file is not formatted or has a warning,
# 3 if npm cannot install buildifier.
set -euo pipefail
cd "$(dirname "$0")/../.."
case "${1:-}" in
  '') mode=check ;;
  fix) mode=fix ;;
  *) sed -n '4,5s/^# //p' "third_party/bazel/$(basename "$0")" >&2; exit 2 ;;
esac
buildifier=third_party/bazel/node_modules/.bin/buildifier
if [ ! -x "$buildifier" ]; then
  command -v npm >/dev/null || { echo 'buildifier is left out: there is no npm, which installs it.'; exit 3; }
  npm ci --prefix third_party/bazel --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null ||
    { echo 'buildifier is left out: npm does not install it.'; exit 3; }
fi
mapfile -d '' files < <(find . \( -name '.?*' -o -name node_modules -o -path ./runs -o -path ./dist -o -path ./build \) -prune -o \
  -type f \( -name BUILD -o -name '*.bzl' -o -name MODULE.bazel -o -name WORKSPACE \) -print0 | sort -z)
exec "$buildifier" -mode="$mode" -lint=warn -warnings=all "${files[@]}"
