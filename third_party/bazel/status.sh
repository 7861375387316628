#!/usr/bin/env bash
# What //:wheel reads of the checkout; Bazel runs this (--workspace_status_command) and keeps what it prints in stable-status.txt.
# MODIFIED is yes where files differ from the commit, or are not in it: Bazel builds the files, not the commit.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -e .git ] && commit=$(git rev-parse --verify --quiet HEAD 2>/dev/null); then
  epoch=$(git log -1 --format=%ct) changes=$(git status --porcelain)
fi
echo "STABLE_FTJAX_COMMIT ${commit:-unknown}"
[ -z "${epoch:-}" ] || echo "STABLE_FTJAX_EPOCH $epoch"
[ -z "${changes:-}" ] || echo "STABLE_FTJAX_MODIFIED yes"
