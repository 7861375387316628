#!/usr/bin/env bash
# A training on GPU nodes of a SLURM cluster: submits train.sbatch.
set -euo pipefail
# shellcheck source=launch/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=launch/manifest.sh
. "$LAUNCH_DIR/manifest.sh"

SUMMARY='Trains on nodes of a SLURM cluster; requeued when it is preempted or at its time limit, and resumes.'
common_flags
flag nodes 1 'Number of nodes; one process each.'
flag gpus-per-node 8 'GPUs of a node; 0 for none.'
flag cpus-per-task '' 'CPUs of a process.'
flag partition '' 'Partition.'
flag account '' 'Account.'
flag qos '' 'Quality of service.'
flag time '' 'Time limit, like 24:00:00.'
flag python '' 'Python of an environment with ftjax, on a disk that the nodes mount; required by create and run.'
flag setup '' 'A shell file that each job sources first, for modules.'
flag grace-seconds 300 'Seconds before the time limit at which the run is asked to save and end.'
flag log '' 'Log file; default: WORKDIR/slurm.log.'
flag shared-disk true 'The workdir is on a disk that all nodes mount.'
parse_flags "$@"
[[ ${VALUE[nodes]} =~ ^[1-9][0-9]*$ ]] || die 2 "--nodes=${VALUE[nodes]}: expected a whole number from 1"
[[ ${VALUE[gpus-per-node]} =~ ^[0-9]+$ ]] || die 2 "--gpus-per-node=${VALUE[gpus-per-node]}: expected a whole number"
[[ ${VALUE[grace-seconds]} =~ ^[0-9]+$ ]] || die 2 "--grace-seconds=${VALUE[grace-seconds]}: expected a whole number"

NAME=${VALUE[name]}
LOG=${VALUE[log]}
[[ -n $LOG || ${VALUE[workdir]} != /* ]] || LOG=${VALUE[workdir]}/slurm.log
# The code is read where it is, as the config file is: the nodes mount the disk. sbatch exports the environment.
add_code() {
  local path found=''
  local paths
  IFS=, read -r -a paths <<<"${VALUE[code]}"
  environment=()
  for path in "${paths[@]}"; do
    [[ -e $path ]] || die 2 "--code=$path: no such file or folder"
    [[ -d $path && ($path == */ || $path =~ (^|/)\.\.?$) ]] || path=$(dirname "$path")
    path=$(cd "$path" && pwd)
    [[ ":$found:" == *":$path:"* ]] || found+="${found:+:}$path"
  done
  [[ -z $found ]] || environment=(env "PYTHONPATH=$found${PYTHONPATH:+:$PYTHONPATH}")
}

need sbatch squeue scancel
case $VERB in
  create | run)
    require python
    check_workdir "${VALUE[nodes]}"
    [[ ${VALUE[workdir]} == gs://* || ${VALUE[workdir]} == /* ]] || die 2 "--workdir=${VALUE[workdir]}: expected gs://BUCKET/PATH, or an absolute path on a shared disk"
    [[ -n $LOG ]] || die 2 '--log is required with a workdir on gs://'
    [[ $LOG != *%* ]] || die 2 "--log=$LOG: SLURM reads % as a pattern; expected none"
    is dry-run || [[ -x ${VALUE[python]} ]] || die 2 "--python=${VALUE[python]}: no such program on this machine"
    options=("--nodes=${VALUE[nodes]}" "--signal=B:TERM@${VALUE[grace-seconds]}" "--output=$LOG" --export=ALL)
    [[ ${VALUE[gpus-per-node]} == 0 ]] || options+=("--gpus-per-node=${VALUE[gpus-per-node]}")
    for name in cpus-per-task partition account qos time; do [[ -z ${VALUE[$name]} ]] || options+=("--$name=${VALUE[$name]}"); done
    add_code
    [[ ! -f ${VALUE[config]} ]] || VALUE[config]=$(cd "$(dirname "${VALUE[config]}")" && pwd)/$(basename "${VALUE[config]}")
    mapfile -d '' -t flags < <(train_flags "$(dirname "${VALUE[config]}")")
    script=$LAUNCH_DIR/train.sbatch
    is dry-run && script=launch/train.sbatch
    is dry-run || mkdir -p "$(dirname "$LOG")"
    [[ -z ${VALUE[setup]} ]] || export FTJAX_SETUP=${VALUE[setup]}
    # The environment of sbatch, with secrets, is that of the job (--export=ALL).
    run "${environment[@]}" sbatch --parsable "--job-name=$NAME" "${options[@]}" "$script" "${VALUE[python]}" "${flags[@]}"
    ;;
  status) run squeue --me "--name=$NAME" ;;
  logs)
    [[ -n $LOG ]] || die 2 'logs: expected --log, or the --workdir of the run'
    run tail -n 200 "$LOG"
    ;;
  # SIGTERM to the steps, and SIGKILL after the KillWait of the cluster; a cancelled job is not requeued.
  stop) run scancel --me "--name=$NAME" ;;
esac
