#!/usr/bin/env bash
# Runs Bazel 4.2.3 of Debian on this checkout: debian.sh PYTHON COMMAND ARGUMENT...   PYTHON has the packages of the lock.
#   third_party/bazel/debian.sh .venv/bin/python test //:ci
# Not `bazel`, which reads .bazelversion and asks for that one. What Bazel writes lies below FTJAX_BAZEL_ROOT, or in a temporary folder that
# is removed; programs that jax compiles below FTJAX_TEST_CACHE, which all tests share, or in a temporary folder too.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,3s/^# //p' "$0"; exit 2; }
cd "$(dirname "$0")/../.."
python=$1 command=$2
shift 2
bazel=$(command -v bazel-4) || { echo "debian.sh: bazel-4 is not installed; make bazel installs it, on Debian 12"; exit 2; }
[ -x "$python" ] || { echo "debian.sh: '$python' is no Python; make env makes .venv/bin/python"; exit 2; }
scratch=$(mktemp -d)
# Folders that a sandbox left are not all writable.
trap 'chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT
folder=$(cd "$(dirname "$python")" && pwd)
programs=${FTJAX_TEST_CACHE:-$scratch/programs}
mkdir -p "$programs"
options=("--action_env=PATH=$folder:/usr/bin:/bin")
if [ "$command" = test ]; then
  options+=("--test_env=FTJAX_TEST_CACHE=$programs" "--sandbox_writable_path=$programs")
fi
PATH="$folder:$PATH" "$bazel" --nohome_rc --nosystem_rc --noworkspace_rc --bazelrc=third_party/bazel/debian.bazelrc \
  "--output_user_root=${FTJAX_BAZEL_ROOT:-$scratch/bazel}" "$command" "${options[@]}" "$@" 2> >(grep --line-buffered -v -e 'rc files are no longer' -e '^/etc/bazel/bazelrc$' -e 'Xverify:none' >&2)
