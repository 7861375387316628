# shellcheck shell=bash
# Shared functions of the launchers: flags, the card of TPU names, checks, dry runs. Sourced by them, after `set -euo pipefail`.
# No decision about training is made here: restarts on a host are those of ftjax.supervise.

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || {
  echo "error: bash ${BASH_VERSION} is too old; expected 4.4 or newer (macOS: brew install bash)" >&2
  exit 2
}
# A function that ends with `die` inside of $(...) ends the launcher only where the value is assigned by itself:
# x=$(f), never `command "--flag=$(f)"`, whose exit code is that of the command.
shopt -s inherit_errexit

LAUNCH_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PROGRAM=$(basename "$0")

declare -A VALUE=() DEFAULT=() HELP=()
FLAGS=()          # names, in the order of --help
VERBS=(create run status logs stop)
VERB=run
EXTRA=()          # after --: flags of ftjax.train
SUMMARY=''        # of --help
SECRETS=(HF_TOKEN WANDB_API_KEY)
LOCKS=()          # of find_install
CODE=''           # of find_code

note() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

# die CODE MESSAGE: ends the launcher. 2: a bad flag or setting; 1: something that may work later.
die() {
  local code=$1
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$code"
}

# flag NAME DEFAULT HELP: declares --NAME. A default of true or false makes a switch.
flag() {
  FLAGS+=("$1")
  DEFAULT[$1]=$2
  VALUE[$1]=$2
  HELP[$1]=$3
}

common_flags() {
  flag name '' 'Name of the run and of what is created for it: a-z, 0-9, -; required.'
  flag config '' 'Config file, or the name of a shipped one; required by create and run.'
  flag workdir '' 'Folder of the run; gs://BUCKET/PATH where there are several hosts; required by create and run.'
  flag code '' 'Files and folders of your own (comma-separated) that are on PYTHONPATH there; DIR/ is what is in DIR.'
  flag dry-run false 'Print the commands and manifests, one a line, and run none.'
}

google_flags() {
  flag project '' 'Google Cloud project; the default is that of gcloud.'
  flag zone '' "$1"
  flag accelerator '' 'Slice: v5litepod-16, v6e-8, v5p-8, tpu7x-8, v6e:4x4, ct6e-standard-4t ...; required.'
}

# What is installed on machines that have no image of ours.
install_flags() {
  flag wheel '' 'Wheel of ftjax; default: the only one in dist/ of the checkout.'
  flag lock '' 'Requirements with hashes (comma-separated, one for each Python); default: third_party/requirements/PLATFORM*.txt.'
}

usage() {
  printf '%s\n\nusage: %s [%s] --NAME=VALUE ... [-- --config.KEY=VALUE ...]\n\n' "$SUMMARY" "$PROGRAM" "$(join '|' "${VERBS[@]}")"
  local name shown
  for name in "${FLAGS[@]}"; do
    shown="--$name"
    case ${DEFAULT[$name]} in true | false) ;; *) shown+='=VALUE' ;; esac
    printf '  %-26s %s%s\n' "$shown" "${HELP[$name]}" "${DEFAULT[$name]:+ [${DEFAULT[$name]}]}"
  done
  printf '\nWhat follows -- is added to the command of ftjax.train. HF_TOKEN and WANDB_API_KEY are taken from the environment.\n'
}

join() {
  local by=$1 out='' word
  shift
  for word in "$@"; do out+="${out:+$by}$word"; done
  printf '%s' "$out"
}

# nearest WORD CANDIDATE ...: prints the candidate with the smallest edit distance, if it is near.
nearest() {
  printf '%s\n' "$@" | awk '
    NR == 1 { word = $0; next }
    {
      n = length(word); m = length($0)
      for (j = 0; j <= m; j++) d[0, j] = j
      for (i = 1; i <= n; i++) {
        d[i, 0] = i
        for (j = 1; j <= m; j++) {
          best = d[i - 1, j - 1] + (substr(word, i, 1) != substr($0, j, 1))
          if (d[i - 1, j] + 1 < best) best = d[i - 1, j] + 1
          if (d[i, j - 1] + 1 < best) best = d[i, j - 1] + 1
          d[i, j] = best
        }
      }
      if (found == "" || d[n, m] < least) { least = d[n, m]; found = $0 }
    }
    END { if (found != "" && least <= length(word) / 2) print found }'
}

did_you_mean() {
  local near
  near=$(nearest "$@")
  printf '%s' "${near:+; did you mean $near?}"
}

# parse_flags "$@": sets VERB, VALUE and EXTRA.
parse_flags() {
  local word name value
  while (($#)); do
    word=$1
    shift
    case $word in
      --) EXTRA=("$@"); break ;;
      --help | -h) usage; exit 0 ;;
      --*)
        name=${word#--}
        name=${name%%=*}
        [[ -v "DEFAULT[$name]" ]] || die 2 "--$name: no such flag of $PROGRAM$(did_you_mean "--$name" "${FLAGS[@]/#/--}")"
        if [[ $word == *=* ]]; then
          value=${word#*=}
        elif [[ ${DEFAULT[$name]} == true || ${DEFAULT[$name]} == false ]]; then
          value=true
        else
          (($#)) || die 2 "--$name: expected a value"
          value=$1
          shift
        fi
        if [[ ${DEFAULT[$name]} =~ ^(true|false)$ && ! $value =~ ^(true|false)$ ]]; then
          die 2 "--$name=$value: expected true or false"
        fi
        VALUE[$name]=$value
        ;;
      *)
        [[ " ${VERBS[*]} " == *" $word "* ]] || die 2 "$word: expected one of ${VERBS[*]}$(did_you_mean "$word" "${VERBS[@]}")"
        VERB=$word
        ;;
    esac
  done
  require name
  [[ ${VALUE[name]} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] \
    || die 2 "--name=${VALUE[name]}: expected a-z, 0-9 and -, beginning with a letter, at most 40 characters"
  case $VERB in
    create | run)
      require config workdir
      # A name of a shipped config has no suffix; an absolute path may be one of the hosts or of the image.
      [[ -f ${VALUE[config]} || ${VALUE[config]} == /* || ${VALUE[config]} != *.@(py|json) ]] \
        || die 2 "--config=${VALUE[config]}: no such file here; expected a file, the name of a shipped config, or an absolute path on the hosts"
      ;;
  esac
  local secret
  for word in "${EXTRA[@]}"; do
    for secret in "${SECRETS[@]}"; do
      [[ -z ${!secret:-} || $word != *"${!secret}"* ]] || die 2 "a flag after -- holds the value of $secret; it is passed by the environment alone"
    done
    case $word in
      --config=* | --workdir=*) die 2 "$word after --: give it before --" ;;
      --*) ;;
      *) die 2 "$word after --: expected flags of ftjax.train, like --config.seed=1" ;;
    esac
  done
}

require() {
  local name
  for name in "$@"; do
    [[ -n ${VALUE[$name]} ]] || die 2 "--$name is required; see $PROGRAM --help"
  done
}

is() { [[ ${VALUE[$1]} == true ]]; }

require_number() {
  local name
  for name in "$@"; do
    [[ ${VALUE[$name]} =~ ^[0-9]+(\.[0-9]+)?$ ]] || die 2 "--$name=${VALUE[$name]}: expected a number"
  done
}

require_whole() {
  local name
  for name in "$@"; do
    [[ ${VALUE[$name]} =~ ^(0|[1-9][0-9]{0,8})$ ]] || die 2 "--$name=${VALUE[$name]}: expected a whole number"
  done
}

# quote WORD ...: one line that a shell reads as these words.
quote() {
  local word out=''
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]]; then
      out+=" $word"
    elif [[ $word =~ ^(--[a-z.-]+=)(.*)$ && ${BASH_REMATCH[2]} != *$'\n'* ]]; then
      out+=" ${BASH_REMATCH[1]}'${BASH_REMATCH[2]//\'/\'\\\'\'}'"
    else
      out+=" '${word//\'/\'\\\'\'}'"
    fi
  done
  printf '%s' "${out# }"
}

# run COMMAND ...: runs it; in a dry run, prints it.
run() {
  if is dry-run; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# need TOOL ...: ends where one is not installed. A dry run needs none.
need() {
  local tool
  is dry-run && return
  for tool in "$@"; do
    command -v "$tool" >/dev/null || die 2 "$tool is not on PATH; install it, or use --dry-run to see what it would be asked"
  done
}

# ask COMMAND ...: prints the answer, NONE where there is no such thing, UNKNOWN where the command failed otherwise.
ask() {
  local errors answer
  errors=$(mktemp)
  if answer=$("$@" 2>"$errors"); then
    printf '%s\n' "$answer"
  elif grep -qiE 'not_found|not found' "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

# shellcheck disable=SC2034 # the variables are the launchers'
# read_card PLANE: from --accelerator (and --machine-type where a launcher has it), sets GEN, PREFIX, TYPE (PREFIX-N), CHIPS,
# TOPOLOGY ('' where the card has none), MACHINE, CHIPS_PER_HOST, HOSTS, RUNTIME, IMAGE, GKE_LABEL.
read_card() {
  local plane=$1 accel=${VALUE[accelerator]} machine=${VALUE[machine-type]:-} line
  require accelerator
  # generation|plane offered|prefix|cores per chip|runtime|image|label|machine|chips per host|hosts|topology
  line=$(awk -F'\t' -v accel="$accel" -v machine="$machine" -v plane="$plane" '
    function chips(t,   p, n, i, out) { n = split(t, p, "x"); out = 1; for (i = 1; i <= n; i++) out *= p[i]; return out }
    /^#/ || NF != 3 { next }
    { if (!($1 in seen)) { seen[$1] = 1; order[++count] = $1 } }
    $2 == "host" { hosts[$1] = hosts[$1] $3 "\n"; next }
    { card[$1, $2] = $3 }
    END {
      for (g = 1; g <= count; g++) {
        gen = order[g]; prefix = card[gen, "prefix"]; cores = card[gen, "counts"] == "cores" ? 2 : 1
        want = ""; number = 0; own = machine
        if (index(accel, gen ":") == 1) want = substr(accel, length(gen) + 2)
        else if (match(accel, "^" prefix "-[0-9]+$")) number = substr(accel, length(prefix) + 2)
        else if (match(accel, "^" gen "-[0-9]+$")) number = substr(accel, length(gen) + 2)
        n = split(hosts[gen], row, "\n"); size = 0
        for (i = 1; i < n; i++) if (index(row[i], accel " ") == 1) own = accel
        for (i = 1; i < n; i++) {
          m = split(row[i], f, " ")
          for (j = 3; j <= m; j++) {
            hit = (number && chips(f[j]) * cores == number) || (want == f[j]) || (own == accel && own == f[1] && chips(f[j]) == f[2])
            if (hit && !size) { size = chips(f[j]); shape = f[j]; kind = f[1]; per = f[2] }
          }
        }
        if (size && own != "" && own != kind) {
          kind = ""
          for (i = 1; i < n; i++) { split(row[i], f, " "); if (f[1] == own) { kind = own; per = f[2] } }
          if (kind == "") { print "no-machine|" gen "|" hosts[gen]; exit }
        }
        if (!size && number && n <= 1) { size = number / cores; per = card[gen, "hosts"]; kind = "-"; shape = "-" }
        if (!size && (number || want != "")) { print "no-size|" gen; exit }
        if (!size) continue
        if (size % per) { print "no-machine|" gen; exit }
        offered = index(" " card[gen, "planes"] " ", " " plane " ") ? "yes" : card[gen, "planes"]
        print gen "|" offered "|" prefix "|" cores "|" card[gen, "runtime"] "|" card[gen, "image"] "|" card[gen, "gke"] "|" kind "|" per "|" size / per "|" shape
        exit
      }
    }' "$LAUNCH_DIR/tpus.tsv" | tr '\n' ' ')
  case $line in
    '') die 2 "--accelerator=$accel: not a TPU of launch/tpus.tsv; expected a name like v5litepod-16, v6e-8, v5p-8, v6e:4x4 or ct6e-standard-4t$(card_hint)" ;;
    no-machine*) die 2 "--machine-type=$machine: does not make --accelerator=$accel; expected a machine type of that generation in launch/tpus.tsv" ;;
    no-size*) die 2 "--accelerator=$accel: there is no such size; there are $(card_sizes "${line#*|}"), and others in launch/tpus.tsv" ;;
  esac
  local offered cores
  IFS='|' read -r GEN offered PREFIX cores RUNTIME IMAGE GKE_LABEL MACHINE CHIPS_PER_HOST HOSTS TOPOLOGY <<<"${line% }"
  TOPOLOGY=${TOPOLOGY#-}
  CHIPS=$((HOSTS * CHIPS_PER_HOST))
  TYPE=$PREFIX-$((CHIPS * cores))
  [[ $offered == yes ]] || die 2 "--accelerator=$accel: $PROGRAM uses the control plane $plane, but $GEN is offered by: $offered"
}

card_hint() {
  local names
  mapfile -t names < <(card_names)
  did_you_mean "${VALUE[accelerator]}" "${names[@]}"
}

# The smallest accelerator types of a generation.
card_sizes() { card_names | awk -F: -v gen="${1%% *}" 'NF == 1 { last = $1 } NF == 2 && $1 == gen { print last }' | sort -t- -k2n | head -n 8 | tr '\n' ' ' | sed 's/ $//'; }

card_names() {
  awk -F'\t' '
    /^#/ { next }
    $2 == "prefix" { prefix[$1] = $3 }
    $2 == "counts" { per[$1] = $3 == "cores" ? 2 : 1 }
    $2 == "host" {
      n = split($3, f, " "); print f[1]
      for (i = 3; i <= n; i++) { m = split(f[i], p, "x"); c = 1; for (j = 1; j <= m; j++) c *= p[j]; print prefix[$1] "-" c * per[$1]; print $1 ":" f[i] }
    }' "$LAUNCH_DIR/tpus.tsv"
}

# check_workdir HOSTS: several hosts share the workdir, so it is in a bucket (or, for ssh and SLURM, on a shared disk: --shared-disk).
check_workdir() {
  local workdir=${VALUE[workdir]}
  case $workdir in
    gs://?*) ;;
    gs:*) die 2 "--workdir=$workdir: expected gs://BUCKET/PATH" ;;
    *)
      if (($1 > 1)) && [[ ${VALUE[shared-disk]:-false} != true ]]; then
        die 2 "--workdir=$workdir: $1 hosts write checkpoints together; expected gs://BUCKET/PATH${DEFAULT[shared-disk]:+, or --shared-disk for a folder that all of them mount}"
      fi
      ;;
  esac
}

# The flags of ftjax.train, each ended by a NUL; a config file of this machine is passed by its name on the host.
train_flags() {
  local config=${VALUE[config]}
  [[ -f $config ]] && config=${1:-.}/$(basename "$config")
  printf '%s\0' "--config=$config" "--workdir=${VALUE[workdir]}" "${EXTRA[@]}"
}

# find_install PLATFORM: sets WHEEL, LOCKS, and BUILD_LOCKS: the lock of what builds packages that have no wheel, if there is one.
find_install() {
  local root=$LAUNCH_DIR/.. file build
  WHEEL=${VALUE[wheel]}
  LOCKS=()
  if [[ -z $WHEEL ]]; then
    for file in "$root"/dist/ftjax-*.whl; do [[ -f $file ]] && WHEEL+="${WHEEL:+,}dist/$(basename "$file")"; done
    [[ $WHEEL != *,* ]] || die 2 "several wheels: $WHEEL; choose one with --wheel=FILE"
    [[ -z $WHEEL ]] || WHEEL=$root/$WHEEL
  fi
  if [[ -n ${VALUE[lock]} ]]; then
    IFS=, read -r -a LOCKS <<<"${VALUE[lock]}"
  else
    for file in "$root"/third_party/requirements/"$1"*.txt; do [[ -f $file ]] && LOCKS+=("$file"); done
  fi
  if is dry-run; then # paths of a placeholder keep the output independent of what has been built
    WHEEL=${WHEEL:-dist/ftjax.whl}
    ((${#LOCKS[@]})) || LOCKS=("third_party/requirements/$1.txt")
    [[ -n ${VALUE[wheel]} ]] || WHEEL=dist/ftjax.whl
    [[ -n ${VALUE[lock]} ]] || LOCKS=("third_party/requirements/$1.txt")
    BUILD_LOCKS=(third_party/requirements/build.txt)
    return
  fi
  [[ -f $WHEEL ]] || die 2 "${WHEEL:-no wheel in dist/}: no such file; build it with make wheel, or give --wheel=FILE"
  ((${#LOCKS[@]})) || die 2 "no lock third_party/requirements/$1*.txt; give --lock=FILE"
  for file in "${LOCKS[@]}"; do
    [[ -f $file ]] || die 2 "--lock: $file: no such file"
    grep -q -e '--hash=' "$file" || die 2 "--lock: $file has no hashes; expected requirements made with --generate-hashes"
  done
  # Beside the lock, else of the checkout.
  BUILD_LOCKS=()
  for build in "$(dirname "${LOCKS[0]}")/build.txt" "$root/third_party/requirements/build.txt"; do
    if [[ -f $build ]]; then
      # shellcheck disable=SC2034 # the launchers read it
      BUILD_LOCKS=("$build")
      break
    fi
  done
}

# A folder that is deleted when the launcher ends. Not to be called in $(...), which would be that end.
SCRATCH=''
scratch() {
  [[ -z $SCRATCH ]] || return 0
  SCRATCH=$(mktemp -d)
  trap 'rm -rf "$SCRATCH"' EXIT # also where a copy is interrupted
}

# find_code MOST [OPTION ...]: checks --code, and what the config needs of this machine; sets CODE to an archive, '' without
# --code. MOST: its largest size in bytes, 0 for any; the options are those of own_code.py. A snapshot: all hosts, and those of
# a later start, get the same code.
find_code() {
  local python words=() file list
  [[ -n ${VALUE[code]} || -f ${VALUE[config]} || ${#EXTRA[@]} -gt 0 ]] || return 0
  if ! python=$(command -v python3); then
    [[ -z ${VALUE[code]} ]] || die 2 'python3 is not on PATH; it packs --code'
    note 'python3 is not on PATH: not checked which modules of this machine the config needs'
    return 0
  fi
  scratch
  [[ ! -f ${VALUE[config]} ]] || words+=("--config=${VALUE[config]}")
  for file in "${LOCKS[@]}"; do words+=("--lock=$file"); done
  list=$("$python" -I "$LAUNCH_DIR/own_code.py" "--code=${VALUE[code]}" "--archive=$SCRATCH/code.tar.gz" \
    "--secrets=$(join , "${SECRETS[@]}")" "--most-packed=$1" "${@:2}" "${words[@]}" -- "${EXTRA[@]}") || exit $?
  [[ -f $SCRATCH/code.tar.gz ]] || return 0
  # shellcheck disable=SC2034 # the launchers read it
  CODE=$SCRATCH/code.tar.gz
  if is dry-run; then echo "# code.tar.gz: $list"; else note "code: $list"; fi
}

has_secrets() {
  local secret
  for secret in "${SECRETS[@]}"; do [[ -n ${!secret:-} ]] && return; done
  return 1
}

# write_secrets FILE: KEY='VALUE' lines that only the owner reads.
write_secrets() {
  local secret
  (umask 077 && : >"$1")
  for secret in "${SECRETS[@]}"; do
    [[ -z ${!secret:-} ]] || printf '%s=%q\n' "$secret" "${!secret}" >>"$1"
  done
}
