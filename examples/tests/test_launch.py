"""The recipes in examples/launch: each starts two ranks, which make the same updates as one process."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pages
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples/launch"
STAND_INS = Path(__file__).parent / "slurm_stand_ins"
SECONDS = 600
PROGRAMS = os.pathsep.join([str(STAND_INS), str(Path(sys.executable).parent), os.environ["PATH"]])


def start(*command, folder=None, **variables):
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": PROGRAMS, **variables
    }  # fmt: skip
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [str(part) for part in command]
    return subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **streams)


def outcomes(*processes):
    """The exit code, output and errors of each. Ends those that remain, with the processes that they started."""
    try:
        streams = [process.communicate(timeout=SECONDS) for process in processes]
        return [(process.returncode, *texts) for process, texts in zip(processes, streams, strict=True)]
    finally:
        for process in processes:
            end(process)


def end(process):
    """End all processes of its group, and of torchrun, whose ranks are in sessions of their own: it ends them after SIGTERM."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()


def weights(*processes):
    """The hash of the weights that the one process of rank 0 prints."""
    ended = outcomes(*processes)
    assert [code for code, _, _ in ended] == [0] * len(processes), "\n".join(errors[-4000:] for *_, errors in ended)
    (digest,) = re.findall(r"weights (\w+)", "".join(output for _, output, _ in ended))
    return digest


@pytest.fixture(scope="module")
def alone():
    """The weights of one process."""
    return weights(start(sys.executable, LAUNCH / "train.py", "--strategy=fake"))


@pytest.fixture
def resumable(tmp_path):
    """The script of the page on preemption."""
    (block,) = [block for block in pages.blocks((ROOT / "docs/how-to/preemption.md").read_text("utf-8")) if block.title]
    script = tmp_path / block.title
    script.write_text(block.text)
    return script


def updates(text):
    return [int(number) for number in re.findall(r"update (\d+):", text)]


@pytest.fixture
def manifests():
    """The Service and the Job."""
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    return service, job


def namespaces_can_be_made():
    if shutil.which("ip") is None or os.geteuid():
        return False
    name = f"lightrft-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=True)
    return made


needs_namespaces = pytest.mark.skipif(
    not namespaces_can_be_made(), reason="needs root, iproute2 and network namespaces"
)


@needs_namespaces
def test_two_hosts_removes_only_what_it_made():
    def names():
        return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout

    hosts = runpy.run_path(LAUNCH / "two_hosts.py")
    with hosts["network"]():
        with pytest.raises(subprocess.CalledProcessError), hosts["network"]():
            pass
        assert [host in names() for host in hosts["HOSTS"]] == [True, True]
    assert [host in names() for host in hosts["HOSTS"]] == [False, False]


def test_ranks_of_a_test_that_takes_too_long_are_ended(tmp_path, monkeypatch):
    script = tmp_path / "wait.py"
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    place = {"RDZV_ENDPOINT": f"127.0.0.1:{pages.free_port()}", "NPROC_PER_NODE": "1"}
    process = start(LAUNCH / "torchrun.sh", script, **place)
    rank = int(process.stdout.readline())
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        outcomes(process)
    assert not Path(f"/proc/{rank}").exists()


@needs_namespaces
def test_torchrun_on_two_hosts():
    ((code, output, errors),) = outcomes(start(sys.executable, LAUNCH / "two_hosts.py"))
    assert code == 0, errors[-4000:]
    assert "two hosts:" in output and "one process:" in output


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        ([], {}, "expected a training script"),
        (["train.py"], {"NNODES": "2"}, "expected NODE_RANK and RDZV_ENDPOINT"),
        (["train.py"], {"NNODES": "2", "NODE_RANK": "1"}, "expected NODE_RANK and RDZV_ENDPOINT"),
    ],
)
def test_torchrun_needs_a_script_and_a_meeting_point(arguments, variables, said):
    ((code, _, errors),) = outcomes(start(LAUNCH / "torchrun.sh", *arguments, **variables))
    assert code == 2 and said in errors and errors.count("\n") == 1


JOB = os.getpid()
SLURM = {
    "SLURM_JOB_ID": str(JOB), "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2",
    "SLURM_CPUS_PER_TASK": "1",
}  # fmt: skip


def test_slurm_starts_one_rank_for_each_task(alone):
    command = ("bash", LAUNCH / "slurm.sbatch", LAUNCH / "train.py", "--strategy=fsdp")
    assert weights(start(*command, **SLURM)) == alone


def test_slurm_tells_each_task_its_rank(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(
        "import os, sys\n"
        "names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')\n"
        "os.write(1, f\"{' '.join([*(os.environ[name] for name in names), *sys.argv[1:]])}\\n\".encode())\n"
    )
    command = ("bash", LAUNCH / "slurm.sbatch", script, "--name=a b")
    ((code, output, errors),) = outcomes(start(*command, **{**SLURM, "SLURM_NTASKS": "4"}))
    assert code == 0, errors
    assert sorted(output.splitlines()) == [
        f"{rank} 4 {rank % 2} 127.0.0.1 {20000 + JOB % 10000} --name=a b" for rank in range(4)
    ]  # fmt: skip


def test_slurm_fails_if_a_rank_fails(tmp_path):
    script = tmp_path / "fail.py"
    script.write_text("import os, sys\nsys.exit(int(os.environ['RANK']) * 3)\n")
    ((code, output, _),) = outcomes(start("bash", LAUNCH / "slurm.sbatch", script, **SLURM))
    assert (code, output) == (3, "")


def test_slurm_requeues_a_job_that_saved_and_continues_it(resumable):
    command = ("bash", LAUNCH / "slurm.sbatch", resumable, "--strategy=fsdp")
    ((code, output, errors),) = outcomes(start(*command, "--preempt-at=2", folder=resumable.parent, **SLURM))
    assert code == 75, errors[-4000:]
    assert updates(output) == [1, 2, 3] and output.endswith(f"saved global_step3\nrequeued {JOB}\n")
    ((code, output, errors),) = outcomes(start(*command, folder=resumable.parent, **SLURM))
    assert code == 0, errors[-4000:]
    assert updates(output) == [4, 5, 6] and "requeued" not in output


def test_slurm_requeues_a_job_whose_ranks_end_one_after_the_other(tmp_path):
    script = tmp_path / "stop.py"
    script.write_text("import os, sys, time\ntime.sleep(int(os.environ['RANK']) / 2)\nsys.exit(75)\n")
    ((code, output, _),) = outcomes(start("bash", LAUNCH / "slurm.sbatch", script, **SLURM))
    assert (code, output) == (75, f"requeued {JOB}\n")


def test_kubernetes_pods_find_each_other(manifests):
    service, job = manifests
    spec = job["spec"]
    variables = {each["name"]: each for each in pod(job)["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(variables["NNODES"]["value"])
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert spec["template"]["spec"]["subdomain"] == name
    assert variables["RDZV_ENDPOINT"]["value"] == f"{job['metadata']['name']}-0.{name}:{port}"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]


def start_pods(job, script, *arguments, folder=None):
    """Start what each pod of the Job would."""
    entry = re.search(r'^ENTRYPOINT \["/opt/lightrft/(.*)"\]$', (LAUNCH / "Dockerfile.cuda").read_text(), re.MULTILINE)
    place = {
        "RDZV_ENDPOINT": f"127.0.0.1:{pages.free_port()}",
        "NPROC_PER_NODE": "1",
    }  # no such host names here, no GPU
    pods = []
    for index in range(job["spec"]["completions"]):
        variables = {each["name"]: each.get("value", str(index)) for each in pod(job)["env"]}
        pods.append(start(ROOT / entry[1], script, *arguments, folder=folder, **variables | place))
    return pods


def test_kubernetes_pods_train_together(manifests, alone):
    _, job = manifests
    script, *arguments = pod(job)["args"]
    assert weights(*start_pods(job, LAUNCH / script, *arguments)) == alone


def test_kubernetes_starts_pods_that_saved_again_and_they_continue(manifests, resumable):
    _, job = manifests
    stopped = outcomes(*start_pods(job, resumable, "--strategy=fsdp", "--preempt-at=2", folder=resumable.parent))
    rules = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if rule.get("onExitCodes")]
    (ignored,) = [rule["onExitCodes"] for rule in rules if rule["action"] == "Ignore"]
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never", "needed by podFailurePolicy"
    assert (ignored["containerName"], ignored["operator"]) == (pod(job)["name"], "In")
    assert {code for code, *_ in stopped} == set(ignored["values"]), stopped
    assert updates("".join(output for _, output, _ in stopped)) == [1, 2, 3]
    continued = outcomes(*start_pods(job, resumable, "--strategy=fsdp", folder=resumable.parent))
    assert {code for code, *_ in continued} == {0}, continued
    assert updates("".join(output for _, output, _ in continued)) == [4, 5, 6]


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (75, 75), (3, 1)])
def test_torchrun_ends_as_its_ranks_do(tmp_path, code, expected):
    script = tmp_path / "end.py"
    script.write_text(f"raise SystemExit({code})\n")
    place = {"RDZV_ENDPOINT": f"127.0.0.1:{pages.free_port()}", "NPROC_PER_NODE": "2"}
    ((ended, _, errors),) = outcomes(start(LAUNCH / "torchrun.sh", script, **place))
    assert ended == expected, errors[-4000:]


def test_torchrun_asks_to_be_started_again_after_sigterm(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    place = {"RDZV_ENDPOINT": f"127.0.0.1:{pages.free_port()}", "NPROC_PER_NODE": "1"}
    process = start(LAUNCH / "torchrun.sh", script, **place)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    ((code, _, errors),) = outcomes(process)
    assert code == 75, errors[-4000:]


def pod(job):
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container
