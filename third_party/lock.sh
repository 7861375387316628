#!/usr/bin/env bash
# Writes requirements/*.txt: what pyproject.toml asks for, with exact versions and hashes. Needs uv.
# usage: third_party/lock.sh [--upgrade]    Without --upgrade, versions change only where they must.
#
# Each file serves every supported Python, by markers, and every machine that a package has wheels
# for. test.txt is resolved first and constrains the others: what is installed is what is tested.
set -euo pipefail
cd "$(dirname "$0")/.."
locks=third_party/requirements

lock() {  # lock NAME [ARGUMENT of uv ...]
  echo "locking $1 ..."
  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
    --no-strip-extras "${@:2}" pyproject.toml --output-file "$locks/$1.txt"
}

runs=(--extra gcs --extra rewards --extra eval)
lock test --extra test "$@"
lock cpu "${runs[@]}" --constraint "$locks/test.txt" "$@"
for name in tpu cuda plan; do
  lock "$name" "${runs[@]}" --extra "$name" --constraint "$locks/cpu.txt" "$@"
done

# The extra [build] without ftjax's own dependencies, which uv has no option for.
echo 'locking build ...'
python3 -c '
import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["optional-dependencies"]["build"], sep="\n")' | uv pip compile --quiet --universal --python-version 3.11 \
  --generate-hashes --no-header --no-strip-extras --constraint "$locks/test.txt" "$@" \
  - --output-file "$locks/build.txt"

# Linters, in an environment of their own.
echo 'locking lint ...'
uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-strip-extras \
  --constraint "$locks/test.txt" "$@" "$locks/lint.in" --output-file "$locks/lint.txt"

# The documentation is built without ftjax's dependencies.
echo 'locking docs ...'
uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
  --no-strip-extras --constraint "$locks/test.txt" "$@" "$locks/docs.in" \
  --output-file "$locks/docs.txt"
