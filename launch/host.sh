#!/usr/bin/env bash
# Runs on the machine that trains; copied there by the launchers, into the folder of one run.
#
#   host.sh boot                       makes a Python environment from the wheel and the locks beside this file
#   host.sh start [FLAG ...]           starts ftjax.supervise with ftjax.train in the background; FLAGs are of ftjax.train
#   host.sh foreground [FLAG ...]      the same in the foreground, for systems that watch it themselves
#   host.sh status | logs [LINES] | stop [SECONDS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

LEAST_FREE_MB=${FTJAX_LEAST_FREE_MB:-10000} # environment and compile cache; root disks of 10 GB are too small

fail() {
  printf 'error: %s: %s\n' "$(hostname)" "$*" >&2
  exit 1
}

# The newest Python >= 3.11 that can make environments.
find_python() {
  local found
  for found in python3.13 python3.12 python3.11 python3 "$HOME"/.local/share/uv/python/*/bin/python3; do
    if "$found" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      command -v "$found"
      return
    fi
  done
  return 1
}

# Images of Ubuntu 22.04 have Python 3.10: uv brings a newer one, else the distribution's package does.
install_python() {
  find_python >/dev/null && return
  echo "no Python >= 3.11 with venv here; installing one" >&2
  if python3 -m pip install --quiet --user uv >&2 && "$HOME/.local/bin/uv" python install --quiet 3.12 >&2; then
    find_python >/dev/null && return
  fi
  sudo -n apt-get update -qq >&2 && sudo -n apt-get install -y -qq python3.12-venv python3-pip >&2 && find_python >/dev/null && return
  sudo -n apt-get install -y -qq python3.11-venv >&2 || true
  find_python >/dev/null || fail "no Python >= 3.11: neither uv nor apt could install one; without an external address the machine needs Cloud NAT"
}

# The lock for this Python: cpu-3.12.txt, tpu-py312.txt ..., else the only one.
find_lock() {
  local version=$1 lock found=()
  for lock in *.txt; do [[ $lock == *"$version"* || $lock == *"${version/./}"* ]] && found+=("$lock"); done
  if ((${#found[@]} == 0)); then
    for lock in *.txt; do [[ $lock == build.txt ]] || found+=("$lock"); done
  fi
  ((${#found[@]} == 1)) && [[ -f ${found[0]} ]] || fail "no lock for Python $version among $(echo ./*.txt)"
  echo "${found[0]}"
}

# The user's own modules, as they were when the launcher started.
unpack_code() {
  rm -rf code code.new
  [[ -f code.tar.gz ]] || return 0
  mkdir code.new
  tar -xzf code.tar.gz -C code.new --no-same-owner || fail "cannot unpack $PWD/code.tar.gz"
  mv code.new code
}

boot() {
  local free python version lock key locks isolation=()
  local pip=(env/bin/python -m pip install --quiet --disable-pip-version-check --no-deps)
  if is_running; then
    echo "$(hostname): process $(cat pid) runs; its environment is kept"
    return
  fi
  unpack_code
  free=$(df -Pm . | awk 'NR == 2 { print $4 }')
  ((free >= LEAST_FREE_MB)) || fail "$free MB free in $PWD, expected $LEAST_FREE_MB; make the boot disk larger"
  install_python
  python=$(find_python)
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  lock=$(find_lock "$version")
  locks=("$lock")
  [[ ! -f build.txt ]] || locks+=(build.txt)
  key=$(cat "${locks[@]}" ./*.whl | sha256sum | cut -c1-16)-$version
  [[ ! -f build.txt ]] || isolation=(--no-build-isolation)
  if [[ $(cat env/.made-from 2>/dev/null) == "$key" ]]; then
    echo "$(hostname): the environment is up to date ($key)"
    return
  fi
  rm -rf env
  "$python" -m venv env
  # What builds packages that have no wheel is locked too; without that lock pip fetches it.
  [[ ! -f build.txt ]] || "${pip[@]}" --use-pep517 --require-hashes -r build.txt
  "${pip[@]}" --use-pep517 --require-hashes "${isolation[@]}" -r "$lock"
  "${pip[@]}" ./*.whl
  env/bin/python -m pip check >/dev/null || fail "pip check: $(env/bin/python -m pip check | head -3)"
  echo "$key" >env/.made-from
  echo "$(hostname): installed ($key)"
}

is_running() { [[ -f pid ]] && kill -0 "$(cat pid)" 2>/dev/null && grep -qz ftjax.supervise "/proc/$(cat pid)/cmdline" 2>/dev/null; }

# In the background: its own session, so that a closed ssh connection does not reach it.
start() {
  if is_running; then
    echo "$(hostname): already running, process $(cat pid)"
    return
  fi
  rm -f exit_code pid stopped
  setsid nohup bash ./host.sh supervised "$@" >>log 2>&1 </dev/null &
  local try
  for try in {1..100}; do
    [[ -f pid || -f exit_code ]] && break
    sleep 0.1
  done
  [[ -f pid ]] || fail "did not start within 10 s ($try tries); see $PWD/log"
  echo "$(hostname): started, process $(cat pid), log $PWD/log"
}

set_environment() {
  export PYTHONUNBUFFERED=1
  [[ ! -d code ]] || export PYTHONPATH=$PWD/code${PYTHONPATH:+:$PYTHONPATH}
  [[ -f secrets.env ]] || return 0
  set -a
  # shellcheck source=/dev/null
  . ./secrets.env
  set +a
}

foreground() {
  local python=$PWD/env/bin/python
  set_environment
  exec "$python" -m ftjax.supervise --preflight -- "$python" -m ftjax.train "$@"
}

supervised() {
  local python=$PWD/env/bin/python code=0
  set_environment
  "$python" -m ftjax.supervise --preflight -- "$python" -m ftjax.train "$@" &
  echo $! >pid.new && mv pid.new pid
  wait $! || code=$?
  echo "$code" >exit_code.new && mv exit_code.new exit_code
}

# Processes that descend from one.
descendants() {
  local child
  for child in $(pgrep -P "$1"); do
    echo "$child"
    descendants "$child"
  done
}

# One line: running PID | exited CODE | stopped CODE (by the verb stop) | lost (it ended without an exit code: the machine restarted) | not started.
status() {
  # The exit code is written a moment after the end.
  for _ in {1..20}; do
    if is_running || [[ -f exit_code || ! -f pid ]]; then break; fi
    sleep 0.1
  done
  if is_running; then
    echo "running $(cat pid)"
  elif [[ -f exit_code ]]; then
    echo "$([[ -f stopped ]] && echo stopped || echo exited) $(cat exit_code)"
  elif [[ -f pid ]]; then
    echo lost
  else
    echo 'not started'
  fi
}

# SIGTERM saves a checkpoint; what still runs after SECONDS is killed.
stop() {
  local seconds=${1:-300} pid
  if is_running; then
    pid=$(cat pid)
    : >stopped
    kill -TERM "$pid"
    for ((i = 0; i < seconds * 10; i++)); do
      is_running || break
      sleep 0.1
    done
    if is_running; then
      echo "$(hostname): still running after $seconds s; killed" >&2
      # shellcheck disable=SC2046 # one word for each process
      kill -KILL "$pid" $(descendants "$pid") 2>/dev/null || true
      sleep 0.5
    fi
  fi
  status
}

case ${1:-} in
  boot | start | foreground | supervised | status | stop) "$@" ;;
  logs) tail -n "${2:-50}" log ;;
  *) fail "expected boot, start, status, logs or stop; got ${1:-nothing}" ;;
esac
