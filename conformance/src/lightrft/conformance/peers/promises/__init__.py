"""The promises: each is a check that runs in the driver, followed by the programs that it runs on the ranks."""

from lightrft.conformance.peers.promises import checkpoints, damage, data, failures, parameters, updates
from lightrft.conformance.peers.registry import PROMISES, Promise

FAMILIES = {
    "Updates": updates,
    "Parameters": parameters,
    "Data and numbers": data,
    "Checkpoints": checkpoints,
    "Damage": damage,
    "Failures": failures,
}
"""The modules, in the order of the table."""


def by_family() -> dict[str, list[Promise]]:
    """All promises, in the order of the table."""
    return {
        title: [promise for promise in PROMISES.values() if promise.check.__module__ == module.__name__]
        for title, module in FAMILIES.items()
    }
