#!/usr/bin/env bash
# Lints all shell scripts, YAML files and Dockerfiles of the checkout: `make lint-launch`.
# usage: third_party/lint.sh [shellcheck|yamllint|hadolint ...]    The tools are looked for on PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools=("$@")
((${#tools[@]})) || tools=(shellcheck yamllint hadolint)

# Files of the checkout, or of unpacked sources, each ended by a NUL.
files() {
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard
  else
    find . -type f -not -path './.venv*' -printf '%P\0'
  fi
}

scripts=() yaml=() dockerfiles=()
while IFS= read -r -d '' file; do
  [[ -f $file ]] || continue
  case $file in
    *.yaml | *.yml) yaml+=("$file") ;;
    */Dockerfile | Dockerfile | *.Dockerfile) dockerfiles+=("$file") ;;
    *.py | *.md | *.txt | *.json | *.jsonl | *.npz | *.png) ;;
    *)
      line=''
      IFS= read -r line <"$file" 2>/dev/null || true
      [[ ! $line =~ ^('#!'.*[/ ](ba|da)?sh($|\ )|'# shellcheck shell=') ]] || scripts+=("$file")
      ;;
  esac
done < <(files)

code=0
for tool in "${tools[@]}"; do
  command -v "$tool" >/dev/null || { echo "error: $tool is not on PATH; make lint-launch installs it" >&2; exit 2; }
  case $tool in
    shellcheck) count=${#scripts[@]} command=(shellcheck --external-sources "${scripts[@]}") ;;
    yamllint) count=${#yaml[@]} command=(yamllint --strict --config-file third_party/yamllint.yaml "${yaml[@]}") ;;
    hadolint) count=${#dockerfiles[@]} command=(hadolint "${dockerfiles[@]}") ;;
    *) echo "error: $tool: expected shellcheck, yamllint or hadolint" >&2; exit 2 ;;
  esac
  ((count > 0)) || { echo "error: $tool: no files" >&2; exit 2; }
  echo "$tool: $count files"
  "${command[@]}" || code=1
done
exit "$code"
