#!/bin/sh
# What `make parity` does: makes the environment of the reference libraries and runs reproduce.py in it. Left out, with exit code 0, where
# that environment cannot be had: torch's CPU build is on PyTorch's own index alone, and the lock has its hash for one platform.
#   parity.sh FTJAX_PYTHON [PARITY_PYTHON]
set -eu
ours=$1 python=${2:-python3.11} venv=.venv-parity requirements=third_party/requirements
torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $requirements/parity.txt)
leave_out() { echo "make parity: SKIPPED: $1"; exit 0; }
locked() { cat $requirements/parity.txt $requirements/parity-ppo.txt; }

if ! locked | cmp -s - $venv/locked.txt; then
  "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
    leave_out "'$python' is no Python 3.11, which third_party/requirements/parity.txt is locked for; try make parity PARITY_PYTHON=/path/to/python3.11"
  echo "Making $venv from $requirements/parity.txt ..."
  rm -rf $venv
  "$python" -m venv $venv
  $venv/bin/python -m pip install --quiet --dry-run --no-deps --disable-pip-version-check "$torch" >/dev/null 2>&1 ||
    leave_out "pip finds no $torch for $(uname -sm); PIP_EXTRA_INDEX_URL may name PyTorch's CPU index, PIP_FIND_LINKS a folder with the wheel"
  $venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --use-pep517 --require-hashes -r $requirements/parity.txt
  $venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --target $venv/trl-1.9 \
    -r $requirements/parity-ppo.txt
  locked > $venv/locked.txt
fi
PYTHONPATH=tests:. exec $venv/bin/python tests/parity/reproduce.py "$ours"
