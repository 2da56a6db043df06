"""The scripts of launch/, against gcloud, kubectl, sbatch and srun that only note how they were called."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
COMMAND = ("--", "train", "--config", "configs/a b.py", "--workdir", "/runs/it's", "--config.seed=1")
REMOTE = r"bash qaperso/launch/worker.sh run train --config configs/a\ b.py --workdir /runs/it\'s --config.seed=1"
TPU = ("--name", "pod", "--type", "v5litepod-16", "--runtime", "v2-alpha-tpuv5-lite", "--poll", "0")
GKE = ("--name", "pod", "--image", "registry/q:1", "--accelerator", "tpu-v5-lite-podslice", "--topology", "4x4")
GKE += ("--hosts", "4", "--claim", "work")
SLURM = ("--nodes", "2", "--gpus", "8")
# Notes its words, and gives the first answer that is left for them: {"match", "out", "err", "code"}.
TOOL = """#!{python} -IS
import json, os, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open({calls!r}, "a") as file:
    file.write(json.dumps([words, "" if sys.stdin.isatty() or words[0] != "kubectl" else sys.stdin.read()]) + "\\n")
answers = json.load(open({answers!r}))
line = " ".join(words)
for answer in answers:
    if answer["match"] in line and not answer.get("used"):
        if not answer.get("always"):
            answer["used"] = True
            json.dump(answers, open({answers!r}, "w"))
        print(answer.get("out", ""), end="")
        print(answer.get("err", ""), end="", file=sys.stderr)
        sys.exit(answer.get("code", 0))
"""


class Tools:
    """Stand-ins for commands, first on PATH."""

    def __init__(self, folder: Path):
        self.folder, self.calls_file, self.answers = folder, folder / "calls", folder / "answers"
        self.calls_file.write_text("")
        (folder / "bin").mkdir()
        text = TOOL.format(python=sys.executable, calls=str(self.calls_file), answers=str(self.answers))
        for name in ("gcloud", "kubectl", "sbatch", "srun", "scontrol", "git"):
            path = folder / "bin" / name
            path.write_text(text)
            path.chmod(0o755)

    def run(self, script: str, *words: str, answers: Any = (), **variables: str) -> subprocess.CompletedProcess:
        """A script's end; `answers` are taken one after another by the calls they match."""
        self.answers.write_text(
            json.dumps([dict(zip(("match", "out", "code", "err"), a, strict=False)) for a in answers])
        )
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(LAUNCH / script), *words],
            env=os.environ | {"PATH": path, "TMPDIR": str(self.folder)} | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        """The words of each call so far."""
        return [json.loads(line)[0] for line in self.calls_file.read_text().splitlines()]

    def verbs(self) -> list[str]:
        """What gcloud was asked for, in short."""
        found = []
        for words in self.calls():
            if words[0] == "gcloud":
                remote = next(
                    (w.split()[-1] for w in words if w.startswith("--command=") and w.endswith("setup")), "run"
                )
                found.append(remote if words[4] == "ssh" else words[4])
        return found


@pytest.fixture
def tools(tmp_path) -> Tools:
    """New for each test."""
    return Tools(tmp_path)


def state(*names: str) -> list[tuple]:
    """Answers to gcloud's `describe`, one after another."""
    return [("describe", "", 1, "ERROR: NOT_FOUND: no such thing") if n == "NONE" else ("describe", n) for n in names]


@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh", "slurm.sh", "worker.sh"])
def test_help(tools, script):
    done = tools.run(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: launch/{script}") and not tools.calls()


def test_shellcheck():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, "shellcheck is not installed; pip install '.[test]'"
    done = subprocess.run(
        [found, "-x", *map(str, LAUNCH.glob("*.sh"))], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    for path in LAUNCH.glob("*.sh"):
        if path.name != "common.sh":  # which is sourced
            assert path.stat().st_mode & stat.S_IXUSR and "set -euo pipefail" in path.read_text()


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("tpu.sh", COMMAND, "--name is '', expected up to 40 lower-case letters"),
        ("tpu.sh", ("--name", "Pod", *TPU[2:], *COMMAND), "--name is 'Pod'"),
        ("tpu.sh", (*TPU[:2], *TPU[4:], *COMMAND), "--type is missing"),
        ("tpu.sh", ("--name",), "--name needs a value"),
        ("tpu.sh", (*TPU, "--restarts", "-1", *COMMAND), "--restarts is '-1', expected a whole number of 0 or more"),
        ("tpu.sh", TPU, "found '' after --, expected a command"),
        ("tpu.sh", (*TPU, "--", "chat"), "found 'chat' after --"),
        ("tpu.sh", (*TPU, "--zome", "x", *COMMAND), "unknown option '--zome'"),
        ("gke.sh", (*GKE, "--topology", "16", *COMMAND), "--topology is '16', expected a shape such as 4x4"),
        ("gke.sh", (*GKE, "--hosts", "none", *COMMAND), "--hosts is 'none', expected a whole number of 1"),
        ("gke.sh", (*GKE[:2], *COMMAND), "--claim is ''"),
        ("gke.sh", (*GKE, "--", "train", "a\nb"), "an argument has a line break in it"),
        ("slurm.sh", ("--nodes", "2", *COMMAND), "--gpus is 'nothing'"),
        (
            "slurm.sh",
            (*SLURM, "-p", "gpu", *COMMAND),
            "unknown option '-p'; options of sbatch are given as --KEY=VALUE",
        ),
    ],
)
def test_bad_arguments(tools, script, words, said):
    done = tools.run(script, *words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and said in done.stderr, done.stderr
    assert done.stdout == "" and not tools.calls()


def test_tpu_dry_run_prints_and_calls_nothing(tools):
    done = tools.run("tpu.sh", *TPU, "--zone", "us-west4-a", "--spot", "--dry-run", *COMMAND)
    assert done.returncode == 0 and not tools.calls()
    lines = done.stdout.splitlines()
    asked = "gcloud compute tpus queued-resources create pod --zone=us-west4-a --node-id=pod --accelerator-type=v5litepod-16"
    assert lines[0] == f"{asked} --runtime-version=v2-alpha-tpuv5-lite --spot"
    assert [line.split()[4] for line in lines] == [
        "create",
        "describe",
        lines[2].split()[4],
        "scp",
        "ssh",
        "ssh",
        "delete",
    ]
    # What is printed does what the script does: a shell reads back the very words.
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {lines[5]}"], capture_output=True, text=True
    ).stdout.splitlines()
    assert words[-1] == f"--command={REMOTE}" and "--worker=all" in words


def test_tpu_slice_is_asked_for_waited_for_used_and_deleted(tools):
    answers = state("NONE", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = tools.run("tpu.sh", *TPU, *COMMAND, answers=answers)
    assert done.returncode == 0, done.stderr
    assert tools.verbs() == [*"describe create".split(), *["describe"] * 4, *"scp setup run delete".split()]
    (run,) = [
        w for words in tools.calls() for w in words if w.startswith("--command=bash qaperso/launch/worker.sh run")
    ]
    assert run == f"--command={REMOTE}"


def test_tpu_slice_that_is_taken_away_is_replaced(tools):
    """In the middle of the run; the restarts of a slice that stays are not used up by it."""
    answers = [*state("ACTIVE", "SUSPENDED", "SUSPENDED", "NONE", "CREATING", "ACTIVE"), ("worker.sh run", "", 255)]
    done = tools.run("tpu.sh", *TPU, "--restarts", "0", "--keep", *COMMAND, answers=answers)
    assert done.returncode == 0, done.stderr
    expected = "describe scp setup run describe describe delete describe create describe describe scp setup run"
    assert tools.verbs() == expected.split()
    assert "pod was taken away" in done.stderr and "pod is SUSPENDED: asking for another one" in done.stderr


def test_tpu_run_that_fails_on_a_slice_that_stays(tools):
    failing = [("worker.sh run", "", 134)] * 3
    done = tools.run("tpu.sh", *TPU, "--restarts", "2", *COMMAND, answers=[*state(*["ACTIVE"] * 9), *failing])
    assert done.returncode == 134 and "failed 3 times in a row with exit code 134; pod is still there" in done.stderr
    # Installed once, and never deleted: somebody will want to look.
    assert [v for v in tools.verbs() if v != "describe"] == ["scp", "setup", "run", "run", "run"]


def test_tpu_bad_input_ends_it(tools):
    done = tools.run(
        "tpu.sh", *TPU, *COMMAND, answers=[*state("ACTIVE"), ("worker.sh run", "", 2, "error: no such config\n")]
    )
    assert done.returncode == 2 and "error: no such config" in done.stderr
    assert tools.verbs() == ["describe", "scp", "setup", "run"]


def test_tpu_installation_that_fails_is_tried_again(tools):
    answers = [*state(*["ACTIVE"] * 4), ("worker.sh setup", "", 1)]
    assert tools.run("tpu.sh", *TPU, *COMMAND, answers=answers).returncode == 0
    assert [v for v in tools.verbs() if v != "describe"] == ["scp", "setup", "scp", "setup", "run", "delete"]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (
            [*state("NONE"), ("create", "", 1, "Quota limit 'TPUV5' has been exceeded.")],
            "the quota does not allow v5litepod",
        ),
        (
            [*state("NONE"), ("create", "", 1, "INVALID_ARGUMENT: type")],
            "gcloud cannot ask for pod: INVALID_ARGUMENT: type",
        ),
        ([("describe", "", 1, "you are not logged in")], "gcloud cannot say how pod is: you are not logged in"),
        (
            [a for _ in range(3) for a in (*state("NONE"), ("create", "", 1, "ALREADY_EXISTS: node"))],
            "a TPU called pod exists that is no queued resource",
        ),
    ],
)
def test_tpu_requests_that_cannot_be_met(tools, answers, said):
    done = tools.run("tpu.sh", *TPU, *COMMAND, answers=answers)
    assert done.returncode == 2 and f"error: {said}" in done.stderr, done.stderr
    assert set(tools.verbs()) <= {"describe", "create"}


def test_tpu_somebody_else_was_quicker(tools):
    answers = [*state("NONE", "ACTIVE"), ("create", "", 1, "ALREADY_EXISTS: pod")]
    assert tools.run("tpu.sh", *TPU, *COMMAND, answers=answers).returncode == 0


def test_worker_ends_what_an_earlier_connection_left(tmp_path):
    """And becomes the run itself, as one of several processes."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$QAPERSO_DISTRIBUTED $*"\n')
    python.chmod(0o755)
    left = subprocess.Popen(["bash", "-c", "exec -a qaperso.train sleep 60"])
    (tmp_path / "run.pid").write_text(f"{left.pid}\n")
    words = ["bash", str(tmp_path / "launch" / "worker.sh"), "run", "train", "--workdir", "a b"]
    with subprocess.Popen(words, env=os.environ | {"PYTHON": str(python)}, stdout=subprocess.PIPE, text=True) as done:
        assert left.wait(timeout=30) == -signal.SIGTERM
        assert done.stdout.read() == "1 -m qaperso.train --workdir a b\n"
    assert done.returncode == 0 and (tmp_path / "run.pid").read_text() == f"{done.pid}\n"
    # A number that belongs to somebody else by now is left alone.
    (tmp_path / "run.pid").write_text("1\n")
    assert subprocess.run(words, env=os.environ | {"PYTHON": str(python)}, stdout=subprocess.DEVNULL).returncode == 0


def test_gke_manifest(tools):
    done = tools.run("gke.sh", *GKE, "--spot", "--restarts", "7", "--dry-run", *COMMAND)
    assert done.returncode == 0 and not tools.calls()
    made = yaml.safe_load(done.stdout)
    assert (made["apiVersion"], made["kind"], made["metadata"]["name"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet", "pod")
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 7
    (group,) = made["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert job["completions"] == job["parallelism"] == 4 and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" == pod["tolerations"][0]["value"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "qaperso.train"] and container["args"] == list(COMMAND[2:])
    assert (
        container["resources"]["limits"] == {"google.com/tpu": 4}
        and rule["onExitCodes"]["containerName"] == container["name"]
    )
    assert container["env"] == [{"name": "QAPERSO_DISTRIBUTED", "value": "1"}]
    assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "work"}
    assert container["volumeMounts"] == [{"name": "work", "mountPath": "/work"}]
    plain = yaml.safe_load(tools.run("gke.sh", *GKE, "--dry-run", "--", "evaluate").stdout)
    pod = plain["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "tolerations" not in pod and "args" not in pod["containers"][0]


def test_gke_creates_what_the_dry_run_prints(tools):
    shown = tools.run("gke.sh", *GKE, "--dry-run", *COMMAND).stdout
    done = tools.run("gke.sh", *GKE, "--namespace", "lab", *COMMAND, answers=[("create", "jobset created\n")])
    assert done.returncode == 0, done.stderr
    ((words, given),) = [json.loads(line) for line in tools.calls_file.read_text().splitlines()]
    assert words == ["kubectl", "create", "--namespace=lab", "-f", "-"] and given == shown
    assert "jobset created" in done.stderr and "kubectl logs --namespace=lab --follow" in done.stderr


@pytest.mark.parametrize(
    ("err", "code", "said"),
    [
        (
            'jobsets "pod" already exists',
            2,
            "a JobSet called pod exists; give another --name, or: kubectl delete jobset pod",
        ),
        ('no matches for kind "JobSet"', 2, "the cluster has no JobSet installed"),
        ("Unable to connect to the server", 1, "Unable to connect to the server"),
    ],
)
def test_gke_refusals(tools, err, code, said):
    done = tools.run("gke.sh", *GKE, *COMMAND, answers=[("create", "", 1, err)])
    assert done.returncode == code and said in done.stderr


def test_slurm_submission(tools):
    words = (*SLURM, "--partition=gpu", "--time=24:00:00", "--python", "/env/bin/python", "--restarts", "3")
    done = tools.run("slurm.sh", *words, *COMMAND)
    assert done.returncode == 0
    (call,) = tools.calls()
    assert call[:5] == ["sbatch", "--job-name=qaperso", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"]
    assert {"--requeue", "--open-mode=append", "--signal=TERM@600", "--partition=gpu", "--time=24:00:00"} <= set(call)
    assert call[call.index("--time=24:00:00") + 1 :] == [
        str(LAUNCH / "slurm_job.sh"),
        "/env/bin/python",
        "3",
        *COMMAND[1:],
    ]
    shown = tools.run("slurm.sh", *words, "--dry-run", *COMMAND).stdout
    read = subprocess.run(["bash", "-c", f"printf '%s\\n' {shown}"], capture_output=True, text=True).stdout.splitlines()
    assert read == call and len(tools.calls()) == 1


@pytest.mark.parametrize(
    ("code", "count", "requeued"),
    [(0, "0", False), (2, "0", False), (143, "0", True), (143, "99", True), (134, "2", True), (134, "3", False)],
)
def test_slurm_job_is_queued_again_where_that_helps(tools, code, count, requeued):
    variables = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": count}
    done = tools.run("slurm_job.sh", "python3", "3", *COMMAND[1:], answers=[("srun", "", code)], **variables)
    assert done.returncode == (0 if requeued else code)
    calls = tools.calls()
    assert calls[0][0] == "srun" and calls[0][-len(COMMAND[2:]) - 3 :] == [
        "python3",
        "-m",
        "qaperso.train",
        *COMMAND[2:],
    ]
    assert calls[1:] == ([["scontrol", "requeue", "17"]] if requeued else [])


def test_no_names_of_anybodys_projects():
    """Zones, projects, buckets, partitions and images come from arguments."""
    for path in LAUNCH.glob("*.sh"):
        text = path.read_text()
        assert not re.search(
            r"gs://|gcr\.io|pkg\.dev|us-(central|west|east)\d|europe-west|CLOUDSDK_CORE_PROJECT=", text
        ), path
