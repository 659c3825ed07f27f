"""A worker that misbehaves on request: ``{"do": [what rank 0 does, what rank 1 does]}``."""

import faulthandler
import os
import random
import socket
import time
from typing import Any

import numpy as np

from lightrft.conformance.driver import wire
from lightrft.conformance.driver.worker_process import STACK_SIGNAL
from lightrft.conformance.scratch import scratch


def wait_forever() -> None:
    time.sleep(3600)


def obey(what: str, connection: socket.socket, answer: dict[str, Any]) -> None:
    if what == "hang":
        wait_forever()
    if what == "exit":
        print("these are my last words", flush=True)
        os._exit(3)
    if what == "be late":
        time.sleep(0.3)
    if what == "print":
        for _ in range(20):
            os.write(1, b"a line that nobody reads\n" * 5000)
        print("the end", flush=True)
    if what == "answer the last program":
        wire.send(connection, {**answer, "number": answer["number"] - 1, "rank": "an old one"})
    if what == "send garbage":
        connection.sendall((4).to_bytes(8) + b"{no}")
        wait_forever()
    if what == "send half":
        connection.sendall((400).to_bytes(8) + b"{")
        wait_forever()
    wire.send(connection, answer | extra_answer(what))


def extra_answer(what: str) -> dict[str, Any]:
    if what == "write":
        scratch("").mkdir()
        scratch("file").write_text("something")
    if what == "draw":
        return {"hash": hash("some words"), "drawn": [random.random(), float(np.random.rand())]}
    return {}


def main() -> None:
    connection_fd, stacks_fd = map(int, os.environ["LIGHTRFT_CONFORMANCE_FDS"].split(","))
    faulthandler.register(STACK_SIGNAL, file=stacks_fd, all_threads=True)
    connection, rank = socket.socket(fileno=connection_fd), int(os.environ["LIGHTRFT_CONFORMANCE_RANK"])
    wire.send(connection, {"number": 0})
    while True:
        command = wire.receive(connection)
        answer = {
            "number": command["number"],
            "rank": rank,
            "when": time.monotonic(),
            "pid": os.getpid(),
            "parent": os.getppid(),
        }
        if command["do"][rank] != "say nothing":
            obey(command["do"][rank], connection, answer)


if __name__ == "__main__":
    main()
