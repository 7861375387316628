# shellcheck shell=bash
# The life of a run on machines that are reached by ssh: create, install, start, watch, create again. Sourced after lib.sh.
#
# A launcher defines its machines by these functions:
#   machines_create            creates them; may return before they are ready
#   machines_state             prints none, waiting, ready, lost (delete and create again) or unknown (ask again)
#   machines_delete            deletes them
#   machines_reset             makes lost ones anew, where deleting is not the way; may be missing
#   machines_on WHICH COMMAND  runs a shell command on host number WHICH, or on all
#   machines_copy FILE ...     copies files into $REMOTE of all hosts
#   machines_flags             prints, for each host, a line of flags that ftjax.train needs there to find the others
# A launcher without machines_flags has hosts that find each other by the metadata of their machines.

REMOTE=.ftjax/${VALUE[name]:-run} # below the home folder of the hosts

lifecycle_flags() {
  flag watch false 'Stay, create lost machines again and start there again; ends when the training has ended.'
  flag detach false 'With --watch: stay in the background, with a log in ~/.ftjax/NAME.launch.log.'
  flag poll 60 'Seconds between two looks of --watch.'
  flag starts 50 'Most starts of one --watch.'
  flag after-done auto 'What becomes of the machines when --watch ends: delete, keep; auto deletes if the workdir is on gs://.'
  flag stop-seconds 300 'Seconds that stop waits for a checkpoint.'
  VERBS+=(delete)
}

lifecycle_check() {
  require_number poll
  require_whole starts stop-seconds
  ! is detach || is watch || die 2 '--detach: expected with --watch; without it the launcher returns when the training has started'
  [[ ${VALUE[after-done]} =~ ^(auto|delete|keep)$ ]] || die 2 "--after-done=${VALUE[after-done]}: expected auto, delete or keep"
  REMOTE=.ftjax/${VALUE[name]}
}

# Copies all that a host needs, and installs it.
machines_install() {
  local files=("$LAUNCH_DIR/host.sh" "$WHEEL" "${LOCKS[@]}" "${BUILD_LOCKS[@]}") code=0
  is dry-run && files[0]=launch/host.sh
  [[ -f ${VALUE[config]} ]] && files+=("${VALUE[config]}")
  if [[ -n $CODE ]]; then files+=("$(is dry-run && echo code.tar.gz || echo "$CODE")"); fi
  # Also the secrets and the code of an earlier start, which may be no longer wanted there.
  machines_on all "mkdir -p $REMOTE && chmod 700 $REMOTE && rm -f $REMOTE/*.whl $REMOTE/*.txt $REMOTE/secrets.env $REMOTE/code.tar.gz" || return
  if has_secrets; then
    if is dry-run; then
      files+=(secrets.env) # written from the environment, with mode 600
    else
      scratch
      write_secrets "$SCRATCH/secrets.env"
      files+=("$SCRATCH/secrets.env")
    fi
  fi
  machines_copy "${files[@]}" || code=$?
  rm -f "${SCRATCH:-/nowhere}/secrets.env"
  ((code == 0)) || return "$code"
  machines_on all "bash $REMOTE/host.sh boot"
}

machines_start() {
  local flags lines of_hosts line host=0 pids=() pid code=0
  mapfile -d '' -t flags < <(train_flags)
  if ! declare -F machines_flags >/dev/null; then
    machines_on all "bash $REMOTE/host.sh start $(quote "${flags[@]}")"
    return
  fi
  of_hosts=$(machines_flags && echo .) || return # the last empty line is kept
  mapfile -t lines <<<"${of_hosts%$'\n'.}"
  for line in "${lines[@]}"; do
    if is dry-run; then
      machines_on $host "bash $REMOTE/host.sh start $(quote "${flags[@]}")${line:+ $line}"
    else
      machines_on $host "bash $REMOTE/host.sh start $(quote "${flags[@]}")${line:+ $line}" &
      pids+=($!)
    fi
    host=$((host + 1))
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return $code
}

# Waits until the machines are ready; creates those that are lost again. 1: they did not become ready. Without --watch a create
# that fails is the end: most often a flag is wrong, or there is no quota.
wait_until_ready() {
  local state last='' tries=0 most=${VALUE[starts]}
  while :; do
    state=$(machines_state)
    [[ $state == "$last" ]] || note "${VALUE[name]}: $state"
    last=$state
    case $state in
      ready)
        # shellcheck disable=SC2034 # gce.sh reads it
        WAS_READY=true
        return 0
        ;;
      lost)
        note "${VALUE[name]}: removing what is left of it, and creating it again"
        machines_renew
        ;;
      none)
        tries=$((tries + 1))
        if ((tries > most)); then return 1; fi
        if machines_create; then continue; fi
        note "create failed (try $tries); if it names a quota, ask for more of it, or try another zone"
        is watch || return 1
        ;;
    esac
    sleep "${VALUE[poll]}"
  done
}

WAS_READY=false

machines_renew() {
  # shellcheck disable=SC2034
  WAS_READY=false
  if declare -F machines_reset >/dev/null; then machines_reset; else machines_delete; fi
}

# Prints the state of the training on host 0; unreachable if ssh fails. A machine whose disk is new has no host.sh.
training_state() {
  machines_on 0 "if [ -f $REMOTE/host.sh ]; then bash $REMOTE/host.sh status; else echo not started; fi" 2>/dev/null </dev/null \
    | tail -n 1 | grep . || echo unreachable
}

# Until the training has ended: waits for machines, installs, starts, looks. Returns the exit code of the training.
watch() {
  local most=${VALUE[starts]} starts=0 failures=0 state stale code
  while ((starts < most)); do
    if ! wait_until_ready; then
      note "${VALUE[name]}: not ready after ${VALUE[starts]} creates"
      return 1
    fi
    starts=$((starts + 1))
    if machines_install && machines_start; then
      failures=0
    else
      failures=$((failures + 1))
      if ((failures == 3)); then
        note "${VALUE[name]}: install or start failed $failures times in a row"
        return 1
      fi
      note "${VALUE[name]}: install or start failed; trying again in ${VALUE[poll]} s"
      sleep "${VALUE[poll]}"
      continue
    fi
    stale=0
    while :; do
      sleep "${VALUE[poll]}"
      state=$(machines_state)
      if [[ $state == lost || $state == none ]]; then
        note "${VALUE[name]}: the machines are $state"
        break
      fi
      [[ $state == ready ]] || continue
      state=$(training_state)
      case $state in
        running* | unreachable) stale=0 ;;
        'exited 0') note "${VALUE[name]}: done"; return 0 ;;
        'stopped '*) note "${VALUE[name]}: stopped by hand"; return 75 ;;
        'exited '[2345])
          code=${state#exited }
          note "${VALUE[name]}: ended with $code, which another start would not change; see the logs"
          return "$code"
          ;;
        'exited 75' | lost | 'not started')
          # A preemption: the machines vanish within a minute or two. Else they run on, and it is started again.
          stale=$((stale + 1))
          if ((stale > 3)); then break; fi
          ;;
        *)
          note "${VALUE[name]}: $state; ftjax.supervise gave up, its reasons are in restarts.jsonl of the workdir"
          return "${state#exited }"
          ;;
      esac
    done
  done
  note "${VALUE[name]}: still not done after $starts starts"
  return 1
}

# after_done CODE: deletes the machines, or prints that they are kept. The log goes with them: after a failure its end is printed.
after_done() {
  case ${VALUE[after-done]}-${VALUE[workdir]} in
    delete-* | auto-gs://*) (($1 == 0)) || machines_on 0 "bash $REMOTE/host.sh logs 100" >&2 </dev/null || true ;;
  esac
  case ${VALUE[after-done]}-${VALUE[workdir]} in
    delete-* | auto-gs://*) machines_delete || note "not all was deleted, and may cost money; see $PROGRAM status" ;;
    *) note "the machines of ${VALUE[name]} are kept, and cost money: $PROGRAM delete --name=${VALUE[name]} ..." ;;
  esac
}

# In the background, away from the terminal.
detach() {
  local log=$HOME/.ftjax/${VALUE[name]}.launch.log new=()
  mkdir -p "$HOME/.ftjax"
  ! command -v setsid >/dev/null || new=(setsid)
  FTJAX_DETACHED=1 "${new[@]}" nohup bash "$0" "$@" >>"$log" 2>&1 </dev/null &
  note "watching in the background, process $!; log $log"
}

# shellcheck disable=SC2153 # VERB is set by parse_flags
# lifecycle "$@": does what the verb asks.
lifecycle() {
  local code=0
  case $VERB in
    create) dry_or_missing && machines_create ;;
    run)
      if is dry-run; then
        machines_create
        echo "# when it is ready:"
        machines_install
        machines_start
        ! is watch || { echo "# when it is lost, before the same again:"; machines_renew; }
      elif is watch; then
        if is detach && [[ -z ${FTJAX_DETACHED:-} ]]; then
          detach "$@"
          return
        fi
        trap '' HUP
        trap 'note "interrupted: the machines stay, and cost money; the same command watches again, $PROGRAM delete deletes them"; exit 130' INT TERM
        watch || code=$?
        after_done "$code"
        exit "$code"
      else
        wait_until_ready || die 1 "${VALUE[name]}: not ready; see $PROGRAM status, and $PROGRAM delete for what there is of it"
        { machines_install && machines_start; } \
          || die 1 "${VALUE[name]}: install or start failed; the machines stay, and cost money: $PROGRAM delete --name=${VALUE[name]} ..."
        note "started; $PROGRAM status|logs|stop|delete --name=${VALUE[name]} with the same flags of the place"
      fi
      ;;
    status)
      is dry-run || printf 'machines: %s\n' "$(machines_state)"
      machines_on all "bash $REMOTE/host.sh status"
      ;;
    logs) machines_on 0 "bash $REMOTE/host.sh logs 200" ;;
    stop)
      machines_on all "bash $REMOTE/host.sh stop ${VALUE[stop-seconds]}"
      note "the machines stay, and cost money; $PROGRAM delete deletes them"
      ;;
    delete) machines_delete ;;
  esac
}

dry_or_missing() {
  local state
  is dry-run && return
  state=$(machines_state)
  [[ $state == none ]] || die 2 "${VALUE[name]} exists already ($state); choose another --name, or delete it"
}
