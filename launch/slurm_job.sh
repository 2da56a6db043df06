#!/usr/bin/env bash
# The job that slurm.sh submits: one start of all processes, then done, or in the queue again.
set -euo pipefail

if (($# < 3)) || [[ $1 == -* ]]; then
  echo "usage: sbatch ... launch/slurm_job.sh PYTHON RESTARTS COMMAND [ARGUMENT ...]; launch/slurm.sh does that" >&2
  [[ ${1-} == --help || ${1-} == -h ]] && exit 0
  exit 2
fi
python=$1 restarts=$2
shift 2

# A task that fails ends the others itself. --wait is for one that hangs; srun's own kill on a bad exit would hide the
# failed task's exit code behind those of the killed ones.
code=0
QAPERSO_DISTRIBUTED=1 srun --kill-on-bad-exit=0 --wait=90 "$python" -m "qaperso.$1" "${@:2}" || code=$?
case $code in
  0 | 2) exit "$code" ;;
  143) echo "stopped after saving; queued again" >&2 ;;
  *)
    if ((${SLURM_RESTART_COUNT:-0} >= restarts)); then
      echo "failed with exit code $code after ${SLURM_RESTART_COUNT:-0} restarts: giving up" >&2
      exit "$code"
    fi
    echo "failed with exit code $code; queued again" >&2
    ;;
esac
scontrol requeue "$SLURM_JOB_ID"
