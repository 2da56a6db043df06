#!/usr/bin/env bash
# Runs a command on a TPU slice of a GKE cluster, as a JobSet that starts all workers again when one fails.
set -euo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

usage() {
  cat <<'END'
usage: launch/gke.sh --name NAME --image IMAGE --accelerator LABEL --topology SHAPE --hosts N --claim CLAIM [OPTION ...]
                     -- train|evaluate [ARGUMENT ...]

Creates a JobSet (jobset.x-k8s.io/v1alpha2, which the cluster must have installed) that runs python -m qaperso.COMMAND on all
hosts of a TPU slice. When a host fails or is taken away, all start again and go on from the newest checkpoint; bad input
(exit code 2) ends it.

  --name NAME          of the JobSet
  --image IMAGE        with the package and jax[tpu] in it
  --accelerator LABEL  cloud.google.com/gke-tpu-accelerator of the nodes, such as tpu-v5-lite-podslice
  --topology SHAPE     cloud.google.com/gke-tpu-topology of the nodes, such as 4x4
  --hosts N            hosts of the slice
  --claim CLAIM        persistent volume claim, mounted on all hosts at --mount; give a --workdir below it
  --mount PATH         default: /work
  --chips C            TPU chips of each host (default: 4)
  --restarts R         default: 10
  --namespace SPACE    default: that of kubectl's configuration
  --spot               on nodes that may be taken away
  --dry-run            print the manifest, and create nothing
  --help
END
}

name='' image='' accelerator='' topology='' hosts='' claim='' mount=/work chips=4 restarts=10 spot=false dry_run=false space=()
while (($#)); do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --spot) spot=true ;;
    --dry-run) dry_run=true ;;
    --name | --image | --accelerator | --topology | --hosts | --claim | --mount | --chips | --restarts | --namespace)
      given=$(value "$@")
      case $1 in
        --namespace) space=("$1=$given") ;;
        *) declare "${1#--}=$given" ;;
      esac
      shift
      ;;
    --)
      shift
      break
      ;;
    *) fail "unknown option '$1'; see launch/gke.sh --help" ;;
  esac
  shift
done
name --name "$name"
name --claim "$claim"
for option in image accelerator topology; do
  [[ -n ${!option} ]] || fail "--$option is missing; see launch/gke.sh --help"
done
[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "--topology is '$topology', expected a shape such as 4x4"
number --hosts "${hosts:-nothing}" 1
number --chips "$chips" 1
number --restarts "$restarts" 0
command_words "$@"

# yaml WORD: as a YAML string.
yaml() {
  [[ $1 != *$'\n'* ]] || fail "an argument has a line break in it: $(quoted "$1")"
  printf "'%s'" "${1//\'/\'\'}"
}

manifest() {
  local word
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $hosts
          parallelism: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: qaperso
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(yaml "$accelerator")
                cloud.google.com/gke-tpu-topology: $(yaml "$topology")
END
  if [[ $spot == true ]]; then
    cat <<END
                cloud.google.com/gke-spot: 'true'
              tolerations:
                - key: cloud.google.com/gke-spot
                  operator: Equal
                  value: 'true'
                  effect: NoSchedule
END
  fi
  cat <<END
              containers:
                - name: qaperso
                  image: $(yaml "$image")
                  command:
                    - python
                    - -m
                    - qaperso.$1
END
  if (($# > 1)); then
    printf '                  args:\n'
    for word in "${@:2}"; do
      printf '                    - %s\n' "$(yaml "$word")"
    done
  fi
  cat <<END
                  env:
                    - name: QAPERSO_DISTRIBUTED
                      value: '1'
                  resources:
                    limits:
                      google.com/tpu: $chips
                  volumeMounts:
                    - name: work
                      mountPath: $(yaml "$mount")
              volumes:
                - name: work
                  persistentVolumeClaim:
                    claimName: $claim
END
}

for word in "$@" "$image" "$accelerator" "$mount"; do yaml "$word" >/dev/null; done
if [[ $dry_run == true ]]; then
  manifest "$@"
  exit 0
fi
code=0
answer=$(manifest "$@" | kubectl create "${space[@]}" -f - 2>&1) || code=$?
if ((code)); then
  case $answer in
    *AlreadyExists* | *'already exists'*)
      fail "a JobSet called $name exists; give another --name, or: $(quoted kubectl delete jobset "$name" "${space[@]}")"
      ;;
    *'no matches for kind'*) fail "the cluster has no JobSet installed; see https://jobset.sigs.k8s.io" ;;
    *)
      printf '%s\n' "$answer" >&2
      exit "$code"
      ;;
  esac
fi
say "$answer"
say "its output: $(quoted kubectl logs "${space[@]}" --follow "--selector=jobset.sigs.k8s.io/jobset-name=$name")"
