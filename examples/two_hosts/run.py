"""Two hosts train together: two network namespaces on one machine, joined by a virtual cable.

``python run.py [arguments of train.py]``, as root, on Linux with iproute2. Each "host" starts torchrun as one
would on two machines, with the ordinary rendezvous over the network between them; then one process alone
makes the same updates, and the weights must be the same, bit for bit.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRAIN = Path(__file__).parent / "train.py"
HOSTS = {"lightrft-a": ("veth-lrft-a", "10.213.77.1"), "lightrft-b": ("veth-lrft-b", "10.213.77.2")}
PORT = 29477
SECONDS = 240


def ip(*arguments: str) -> None:
    """Run iproute2's ``ip``."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def network() -> Iterator[None]:
    """Two namespaces with an address each, and a cable between them."""
    (first, (cable, _)), (second, (other, _)) = HOSTS.items()
    try:
        ip("netns", "add", first)
        ip("netns", "add", second)
        ip("link", "add", cable, "netns", first, "type", "veth", "peer", "name", other, "netns", second)
        for host, (interface, address) in HOSTS.items():
            ip("-n", host, "addr", "add", f"{address}/24", "dev", interface)
            for name in ("lo", interface):
                ip("-n", host, "link", "set", name, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host], stderr=subprocess.DEVNULL, check=False)


def start(number: int, arguments: list[str]) -> subprocess.Popen[str]:
    """torchrun on one host, with one process."""
    host, (interface, _) = list(HOSTS.items())[number]
    first = HOSTS["lightrft-a"][1]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={number}", "--nproc-per-node=1",
        f"--master-addr={first}", f"--master-port={PORT}",
    ]  # fmt: skip
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
    command = ["ip", "netns", "exec", host, *torchrun, str(TRAIN), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(arguments: list[str]) -> str:
    """What the two hosts print."""
    processes = [start(number, arguments) for number in range(2)]
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
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
