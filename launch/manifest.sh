# shellcheck shell=bash
# Manifests from templates, and what launchers of container images share. Sourced after lib.sh.
#
# In a template, a line with "# if: TAG" is kept where TAG is given, and __NAME__ stands for a value.

image_flags() {
  flag image '' 'Container image with ftjax, made with launch/docker; required by create and run.'
  flag checkpoint-gib 0 'Size of a checkpoint, all hosts together: parameters and optimizer state of ftjax.plan times devices.'
  flag save-gib-per-second 0.2 'Rate at which one host writes a checkpoint; 0.2 is a cautious value for a bucket.'
  flag grace-seconds '' 'Time that a stopped process has for its checkpoint; default: 120 + size / (rate x hosts), 600 without a size.'
}

# grace HOSTS: prints seconds.
grace() {
  require_number checkpoint-gib save-gib-per-second
  if [[ -n ${VALUE[grace-seconds]} ]]; then
    [[ ${VALUE[grace-seconds]} =~ ^[0-9]+$ ]] || die 2 "--grace-seconds=${VALUE[grace-seconds]}: expected a whole number"
    echo "${VALUE[grace-seconds]}"
    return
  fi
  awk -v size="${VALUE[checkpoint-gib]}" -v rate="${VALUE[save-gib-per-second]}" -v hosts="$1" 'BEGIN {
    if (size == 0) { print 600; exit }
    if (rate == 0) exit 1
    seconds = 120 + size / (rate * hosts)
    print int(seconds) + (seconds > int(seconds))
  }' || die 2 '--save-gib-per-second=0: expected more'
}

# code_text: the archive of --code as one line.
code_text() { base64 <"$CODE" | tr -d '\n'; }

# unpack_code READ: the shell text that unpacks the archive which the command READ prints, in front of the training's.
unpack_code() {
  # shellcheck disable=SC2016 # of the container's shell
  [[ -z $CODE ]] || printf 'mkdir -p /tmp/code && %s | tar -xz -C /tmp/code && export PYTHONPATH=/tmp/code${PYTHONPATH:+:$PYTHONPATH} && ' "$1"
}

# json WORD ...: a list of strings, which is YAML too.
json() {
  local word out=''
  for word in "$@"; do
    [[ $word != *[$'\n\t\r']* ]] || die 2 "a value with a line break or a tab: $(quote "$word")"
    word=${word//\\/\\\\}
    out+="${out:+, }\"${word//\"/\\\"}\""
  done
  printf '[%s]' "$out"
}

# render FILE [TAG | NAME=VALUE] ...: values are plain scalars of YAML, but for those that json and quote have made.
render() {
  local file=$1 word text
  shift
  for word in "$@"; do
    case $word in
      SCRIPT=* | ARGS=*) ;;
      FLAGS=*) [[ $word != *$'\n'* ]] || die 2 'a flag of ftjax.train holds a line break' ;;
      *=*) [[ $word =~ ^[A-Z_]+=[A-Za-z0-9._/:@~+,\ -]*$ && $word != *': '* ]] || die 2 "'${word#*=}' cannot stand in a manifest; expected letters, digits and . _ / : @ + , -" ;;
    esac
  done
  text=$(
    tags=' '
    for word in "$@"; do [[ $word == *=* ]] || tags+="$word "; done
    awk -v tags="$tags" '
      match($0, / +# if: [a-z]+$/) {
        tag = substr($0, RSTART, RLENGTH); sub(/.* /, "", tag)
        if (!index(tags, " " tag " ")) next
        $0 = substr($0, 1, RSTART - 1)
      }
      /^#/ { next }
      { print }' "$file"
  )
  for word in "$@"; do
    [[ $word != *=* ]] || text=${text//__${word%%=*}__/"${word#*=}"}
  done
  [[ ! $text =~ __[A-Z_]+__ ]] || die 1 "$file: no value for ${BASH_REMATCH[0]}"
  printf '%s\n' "$text"
}
