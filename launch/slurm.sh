#!/usr/bin/env bash
# Submits a command as a SLURM job of one process a GPU that is queued again when it is preempted, timed out or failed.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/slurm.sh --nodes N --gpus G [OPTION ...] [SBATCH OPTION ...] -- train|evaluate [ARGUMENT ...]

Runs python -m qaperso.COMMAND as N x G processes, one a GPU. Ten minutes before the job's time is up, or when it is
preempted, the run saves, and the job is queued again and goes on from there. Ends when the command is done (0) or its input
is bad (2), or when it failed too often. --workdir must be on storage that all nodes share.

  --nodes N            nodes
  --gpus G             GPUs of each
  --name NAME          of the job (default: qaperso)
  --python FILE        the interpreter, on the nodes (default: python3)
  --restarts R         how often the job may start again, saved runs left out (default: 10)
  --dry-run            print the sbatch command, and run nothing
  --help

Options of the form --KEY=VALUE that are none of these go to sbatch: --partition=P, --time=24:00:00, --account=A, ...
END
}

nodes='' gpus='' name=qaperso python=python3 restarts=10 dry_run=false others=()
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --dry-run) dry_run=true ;;
    --nodes | --gpus | --name | --python | --restarts)
      given=$(value "$@")
      declare "${1#--}=$given"
      shift
      ;;
    --)
      shift
      break
      ;;
    --*=*) others+=("$1") ;;
    *) fail "unknown option '$1'; options of sbatch are given as --KEY=VALUE, see launch/slurm.sh --help" ;;
  esac
  shift
done
number --nodes "${nodes:-nothing}" 1
number --gpus "${gpus:-nothing}" 1
number --restarts "$restarts" 0
name --name "$name"
command_words "$@"

submit=(sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$gpus" "--gpus-per-node=$gpus" --requeue
  --open-mode=append --signal=TERM@600 "${others[@]}" "$here/slurm_job.sh" "$python" "$restarts" "$@")
if [[ $dry_run == true ]]; then
  show "${submit[@]}"
else
  "${submit[@]}"
fi
