#!/usr/bin/env bash
# One worker of a TPU slice: tpu.sh runs this on each of them, in the folder it unpacked the code into.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch/worker.sh setup              makes .venv and installs the package with its TPU libraries
       launch/worker.sh run COMMAND ...    runs python -m qaperso.COMMAND as one of the slice's processes

A run that an earlier connection left behind is ended first: it saves, or is killed after GRACE seconds (default 120).
PYTHON_VERSION (default 3.12) is what setup installs; PYTHON (default .venv/bin/python) is what run uses.
END
}

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# alive: whether the process of run.pid is a run of ours.
alive() {
  local words
  [[ -r run.pid ]] && words=$(tr '\0' ' ' 2>/dev/null <"/proc/$(<run.pid)/cmdline") && [[ $words == *qaperso.* ]]
}

end_earlier() {
  local seconds=0
  alive || return 0
  kill -TERM "$(<run.pid)" || true
  while alive; do
    if ((seconds >= ${GRACE:-120})); then
      kill -KILL "$(<run.pid)" || true
    fi
    sleep 1
    seconds=$((seconds + 1))
  done
}

case ${1-} in
  setup)
    python3 -m pip install --quiet --user uv
    python3 -m uv venv --quiet --allow-existing --python "${PYTHON_VERSION:-3.12}" .venv
    python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
    ;;
  run)
    shift
    end_earlier
    echo "$$" >run.pid
    export QAPERSO_DISTRIBUTED=1
    exec "${PYTHON:-.venv/bin/python}" -m "qaperso.$1" "${@:2}"
    ;;
  -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
