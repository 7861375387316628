#!/usr/bin/env bash
# Follows the README as a new user does: in a fresh Debian, without root, with an empty home.
#   tests/fresh_debian.sh [WAY ...]        as root on Debian; apt-get install mmdebstrap git
#
# WAYs (default: install wheel demo):
#   install   clone, venv, `pip install .`, a training from scratch ("Install" of README.md)
#   wheel     `make wheel`; then the wheel and cpu.txt with hashes, in another folder (docs/building.md)
#   demo      clone, `make demo` ("Quickstart"); about 20 minutes on two cores
#   test      clone, `make test`
#
# The user has the Debian packages that the README asks for and no others. The clone is of the commit that is checked out. pip in
# the chroot has the settings, certificates and package folders of this machine; its downloads are kept in $CACHE
# (default: a temporary folder).
set -euo pipefail
packages=git,make,python3,python3-venv
suite=${SUITE:-bookworm}
source=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ways=("$@")
((${#ways[@]})) || ways=(install wheel demo)
for way in "${ways[@]}"; do
  [[ $way =~ ^(install|wheel|demo|test)$ ]] || { echo "error: $way: expected install, wheel, demo or test" >&2; exit 2; }
done
for tool in mmdebstrap git setpriv; do
  command -v "$tool" >/dev/null || { echo "error: $tool is not on PATH; apt-get install mmdebstrap git util-linux" >&2; exit 2; }
done
((EUID == 0)) || { echo 'error: expected root, to make a chroot' >&2; exit 2; }

work=$(mktemp -d "${TMPDIR:-/tmp}/ftjax-debian-XXXXXX")
root=$work/root mounts=()

# Folders of this machine are mounted, so they are unmounted before anything is deleted, and what cannot be unmounted is kept.
cleanup() {
  local i link
  for link in /proc/[0-9]*/root; do # what still runs in the chroot
    [[ $(readlink "$link" 2>/dev/null) != "$root" ]] || kill -KILL "$(basename "$(dirname "$link")")" 2>/dev/null || true
  done
  for ((i = ${#mounts[@]} - 1; i >= 0; i--)); do umount "${mounts[i]}" || umount --lazy "${mounts[i]}" || true; done
  if grep -qF " $work/" /proc/self/mounts; then
    echo "error: $work is still mounted; it is not deleted" >&2
  else
    rm -rf --one-file-system "$work"
  fi
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# attach SOURCE TARGET [OPTION ...]
attach() {
  if [[ -d $1 ]]; then mkdir -p "$2"; else mkdir -p "$(dirname "$2")" && touch "$2"; fi
  mount "${@:3}" "$1" "$2"
  mounts+=("$2")
}

echo "== a fresh Debian $suite with $packages"
mmdebstrap --quiet --variant=minbase --include="ca-certificates,$packages" "$suite" "$root"
chroot "$root" useradd --create-home --shell /bin/bash user
cp /etc/resolv.conf "$root/etc/resolv.conf"
mkdir -p "$root/proc" "$root/dev/shm"
attach proc "$root/proc" -t proc
attach tmpfs "$root/dev/shm" -t tmpfs

# Where pip of this machine looks: its settings, its certificates, and folders that they name.
settings=$(mktemp "$work/settings-XXXXXX")
env -u PYTHONPATH python3 -m pip config list >"$settings" 2>/dev/null || true
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
grep -v cert "$settings" | sed -n "s/^global\.\([a-z-]*\)='\(.*\)'$/\1 = \2/p" | sed 's/\\n/\n  /g' >"$work/pip.conf" || true
{ echo '[global]'; cat "$work/pip.conf"; echo 'cert = /etc/ssl/certs/ca-certificates.crt'; } >"$root/etc/pip.conf"
while read -r place; do
  [[ ! -e $place ]] || attach "$place" "$root$place" --bind -o ro
done < <(grep -oE '/(opt|etc/xdg|srv|mnt)/[A-Za-z0-9_./-]+' "$settings" | sed 's#/simple$##' | sort -u)
cache=${CACHE:-$work/cache}
mkdir -p "$cache"
attach "$cache" "$root/home/user/.cache/pip" --bind
chown user: "$cache" 2>/dev/null || true
chroot "$root" chown user: /home/user /home/user/.cache /home/user/.cache/pip

# as_user COMMANDS: a login shell of the user, with nothing of this environment.
as_user() {
  printf '%s\n' "-- $1" | sed 's/^/   /'
  chroot "$root" setpriv --reuid=user --regid=user --init-groups --reset-env bash -lc "set -euo pipefail; cd; $1" </dev/null
}

git clone --quiet --no-hardlinks "$source" "$root/home/user/origin"
chroot "$root" chown -R user: /home/user/origin
as_user 'id -un; python3 --version; ls -A'

for way in "${ways[@]}"; do
  SECONDS=0
  echo "== $way"
  case $way in
    install)
      as_user 'git clone -q origin install
        cd install && python3 -m venv .venv && . .venv/bin/activate
        pip install -q .
        ftjax --version
        python -m ftjax.train --config=tiny_sft --workdir=runs/tiny
        python -m ftjax.generate --model=runs/tiny --prompt="7 + 5 ="'
      ;;
    wheel)
      as_user 'test -d checkout || git clone -q origin checkout; cd checkout && make wheel && ls dist'
      as_user 'mkdir apart && cd apart && cp ../checkout/dist/*.whl ../checkout/third_party/requirements/{build,cpu}.txt .
        python3 -m venv env && . env/bin/activate
        python -m pip install -q --no-deps --use-pep517 --require-hashes -r build.txt
        python -m pip install -q --no-deps --use-pep517 --require-hashes --no-build-isolation -r cpu.txt
        python -m pip install -q --no-deps ftjax-*.whl
        pip check
        ftjax train --config=tiny_sft --workdir=runs/tiny'
      ;;
    demo)
      as_user 'test -d checkout || git clone -q origin checkout; cd checkout && make demo && ls runs/demo runs/demo/export
        . .venv/bin/activate
        python -m ftjax.generate --model=runs/demo --prompt="Name three colours."'
      ;;
    test) as_user 'test -d checkout || git clone -q origin checkout; cd checkout && make test' ;;
  esac
  echo "== $way took $SECONDS s"
done
