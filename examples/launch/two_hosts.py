"""Two hosts train together: two network namespaces on one machine, joined by a virtual cable.

``python two_hosts.py [arguments of train.py]``, as root, on Linux with iproute2. Each "host" runs torchrun.sh as on two
machines, and the ranks meet over the network between them. Then one process makes the same updates alone, and the
weights must be the same, bit for bit.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

FOLDER = Path(__file__).parent
TRAIN = FOLDER / "train.py"
HOSTS = {
    f"lightrft-a-{os.getpid()}": ("veth-lrft-a", "10.213.77.1"),
    f"lightrft-b-{os.getpid()}": ("veth-lrft-b", "10.213.77.2"),
}
"""The namespaces, with the interface and the address in each; no other namespace sees these, or the port."""
RENDEZVOUS = "10.213.77.1:29477"
SECONDS = 240


def ip(*arguments: str) -> None:
    """Run iproute2's ``ip``."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def network() -> Iterator[None]:
    """Two namespaces with an address each, and a cable between them."""
    (first, (cable, _)), (second, (other, _)) = HOSTS.items()
    with ExitStack() as made:
        for host in HOSTS:
            ip("netns", "add", host)
            made.callback(ip, "netns", "delete", host)
        ip("link", "add", cable, "netns", first, "type", "veth", "peer", "name", other, "netns", second)
        for host, (interface, address) in HOSTS.items():
            ip("-n", host, "addr", "add", f"{address}/24", "dev", interface)
            for name in ("lo", interface):
                ip("-n", host, "link", "set", name, "up")
        yield


def start(number: int, arguments: list[str]) -> subprocess.Popen[str]:
    """Run torchrun.sh on one host, with one process."""
    host, (interface, _) = list(HOSTS.items())[number]
    environment = {
        **os.environ, "NNODES": str(len(HOSTS)), "NODE_RANK": str(number), "NPROC_PER_NODE": "1",
        "RDZV_ENDPOINT": RENDEZVOUS, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = ["ip", "netns", "exec", host, str(FOLDER / "torchrun.sh"), str(TRAIN), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> None:
    """End torchrun with its ranks, which are in sessions of their own: it ends them after SIGTERM."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def together(arguments: list[str]) -> str:
    """What the two hosts print."""
    processes = [start(number, arguments) for number in range(2)]
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            end(process)
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise SystemExit(f"a host failed:\n{errors[-4000:]}")
    return "".join(output for output, _ in outputs)


def weights(text: str) -> str:
    """Return the hash of the weights from the output ``text``."""
    match = re.search(r"weights (\w+)", text)
    if match is None:
        raise SystemExit(f"no weights in: {text}")
    return match[1]


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # leaves no namespaces and processes
    with network():
        joint = together(sys.argv[1:])
    alone = subprocess.run(
        [sys.executable, str(TRAIN), "--strategy=fake"], capture_output=True, text=True,
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    print(f"two hosts:   {joint.strip()}\none process: {alone.strip()}")
    if weights(joint) != weights(alone):
        raise SystemExit("the weights differ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
