#!/usr/bin/env bash
# Runs a command on all workers of a Cloud TPU slice, and gets another slice when this one is preempted.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/tpu.sh --name NAME --type TYPE --runtime VERSION [OPTION ...] -- train|evaluate [ARGUMENT ...]

Asks for a slice as a queued resource, waits for it, copies the committed code to every worker, installs it, and runs
python -m qaperso.COMMAND on all of them. When the slice is taken away it asks for another one, and the run goes on from its
newest checkpoint; --workdir must be on storage that all workers and later slices share. Ends when the command is done (0) or
its input is bad (2), or when it failed too often on a slice that was there.

  --name NAME          of the queued resource and its node
  --type TYPE          of the slice, such as v5litepod-16
  --runtime VERSION    of the workers' system, such as v2-alpha-tpuv5-lite
  --zone ZONE          default: that of gcloud's configuration
  --project PROJECT    default: that of gcloud's configuration
  --spot               a slice that may be taken away
  --restarts R         failures in a row on a slice that stayed (default: 5)
  --poll SECONDS       between looks at a slice that is not there yet (default: 30)
  --keep               leave the slice when the command is done; otherwise it is deleted
  --dry-run            print the commands for a slice that comes at once, and run none
  --help
END
}

name='' type='' runtime='' restarts=5 poll=30 spot=false keep=false dry_run=false where=()
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --spot) spot=true ;;
    --keep) keep=true ;;
    --dry-run) dry_run=true ;;
    --name | --type | --runtime | --restarts | --poll | --zone | --project)
      given=$(value "$@")
      case $1 in
        --zone | --project) where+=("$1=$given") ;;
        *) declare "${1#--}=$given" ;;
      esac
      shift
      ;;
    --)
      shift
      break
      ;;
    *) fail "unknown option '$1'; see launch/tpu.sh --help" ;;
  esac
  shift
done
name --name "$name"
[[ -n $type ]] || fail "--type is missing, such as v5litepod-16"
[[ -n $runtime ]] || fail "--runtime is missing, such as v2-alpha-tpuv5-lite"
number --restarts "$restarts" 0
number --poll "$poll" 0
command_words "$@"

create=(gcloud compute tpus queued-resources create "$name" "${where[@]}" "--node-id=$name" "--accelerator-type=$type"
  "--runtime-version=$runtime")
if [[ $spot == true ]]; then create+=(--spot); fi
describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
delete=(gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet)
# A worker that is gone must not leave its connection hanging.
ssh=(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --quiet --ssh-flag=-oServerAliveInterval=30)
code_file=qaperso.tar.gz
copy=(gcloud compute tpus tpu-vm scp "${TMPDIR:-/tmp}/$name-$code_file" "$name:$code_file" "${where[@]}" --worker=all --quiet)
setup=("${ssh[@]}" "--command=rm -rf qaperso && mkdir qaperso && tar -xzf $code_file -C qaperso && bash qaperso/launch/worker.sh setup")
work=("${ssh[@]}" "--command=bash qaperso/launch/worker.sh run $(quoted "$@")")
pack=(git -C "$here/.." archive --format=tar.gz "--output=${TMPDIR:-/tmp}/$name-$code_file" HEAD)

if [[ $dry_run == true ]]; then
  show "${create[@]}"
  show "${describe[@]}"
  show "${pack[@]}"
  show "${copy[@]}"
  show "${setup[@]}"
  show "${work[@]}"
  if [[ $keep == false ]]; then show "${delete[@]}"; fi
  exit 0
fi

# state: of the queued resource, NONE where there is no such thing.
state() {
  local answer
  if answer=$("${describe[@]}" 2>&1); then
    printf '%s' "$answer"
  elif [[ $answer == *NOT_FOUND* || $answer == *'not found'* ]]; then
    printf 'NONE'
  else
    fail "gcloud cannot say how $name is: $answer"
  fi
}

ask() {
  local answer
  if answer=$("${create[@]}" 2>&1); then return 0; fi
  case $answer in
    *ALREADY_EXISTS* | *'already exists'*)
      # As a queued resource it was not there: it is another's node, or somebody has just asked for it.
      clashes=$((clashes + 1))
      ((clashes < 3)) || fail "a TPU called $name exists that is no queued resource; give another --name"
      ;;
    *[Qq]uota*) fail "the quota does not allow $type: $answer" ;;
    *) fail "gcloud cannot ask for $name: $answer" ;;
  esac
}

failures=0 clashes=0 ready=false
while true; do
  now=$(state)
  case $now in
    ACTIVE) ;;
    NONE)
      say "asking for $name, a $type"
      ready=false
      ask
      sleep "$poll"
      continue
      ;;
    SUSPENDED | FAILED)
      say "$name is $now: asking for another one"
      ready=false
      "${delete[@]}" || fail "$name cannot be deleted; see above"
      continue
      ;;
    *)
      say "$name is $now"
      ready=false
      sleep "$poll"
      continue
      ;;
  esac
  clashes=0 code=0
  if [[ $ready == false ]]; then
    say "installing on all workers of $name"
    if "${pack[@]}" && "${copy[@]}" && "${setup[@]}"; then ready=true; else code=1; fi
  fi
  if ((code == 0)); then
    "${work[@]}" || code=$?
  fi
  case $code in
    0)
      say "done"
      if [[ $keep == false ]]; then "${delete[@]}"; fi
      exit 0
      ;;
    2)
      say "bad input, see above; $name is still there: $(quoted "${delete[@]}")"
      exit 2
      ;;
  esac
  if [[ $(state) != ACTIVE ]]; then
    say "$name was taken away"
    failures=0
    continue
  fi
  failures=$((failures + 1))
  if ((failures > restarts)); then
    say "failed $failures times in a row with exit code $code; $name is still there: $(quoted "${delete[@]}")"
    exit "$code"
  fi
  say "failed with exit code $code; starting again, $((restarts - failures)) restarts left"
  sleep "$poll"
done
