"""What a save or a load may change on a rank, as digests."""

import random

import numpy as np
import torch

from lightrft.conformance.interpreter.disk import disk
from lightrft.conformance.interpreter.session import Session, operation
from lightrft.conformance.interpreter.training import optimizer_state
from lightrft.conformance.values import digest, plain


@operation
def fingerprint(session: Session) -> dict[str, object]:
    """Everything that a load may change on this rank: weights, optimizer, scheduler, random states, positions."""
    values = random_state(session)
    for model, entry in sorted(session.models.items()):
        module = session.strategy.unwrap_model(entry.model)
        parts: dict[str, object] = dict(session.weights(entry.model))
        parts |= {f"buffer {name}": buffer for name, buffer in module.named_buffers()}
        parts |= {f"gradient of {name}": parameter.grad for name, parameter in module.named_parameters()}
        parts |= optimizer_state(session, entry)
        for number, group in enumerate(entry.optimizer.param_groups if entry.optimizer is not None else ()):
            parts |= {f"{name} of group {number}": value for name, value in group.items() if name != "params"}
        if entry.scheduler is not None:
            parts |= {f"scheduler {name}": value for name, value in entry.scheduler.state_dict().items()}
        values |= {f"model {model}: {name}": plain(value) for name, value in parts.items()}
    for name, value in session.memory.items():
        if hasattr(value, "consumed_samples"):
            values |= {f"loader {name}: {part}": position for part, position in value.state_dict().items()}
    return values


@operation
def random_state(session: Session) -> dict[str, object]:
    """Digests of the random states of this process."""
    numpy = np.random.get_state(legacy=False)
    words = numpy["state"]["key"].tobytes()
    states = {
        "Python": repr(random.getstate()),  # as one text, because a digest of 625 numbers takes long
        "NumPy": [words, numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]],
        "torch": torch.get_rng_state(),
    }
    return {f"{library}'s generator": digest(state) for library, state in states.items()}


@operation
def record_weights(session: Session, model: str, name: str) -> None:
    """Write a digest of the weights to disk, for later processes."""
    weights_digest = _digest_of_weights(session, model)
    if session.rank == 0:
        (disk() / f"{name}.weights").write_text(weights_digest)


@operation
def recorded_weights(session: Session, model: str) -> list[str]:
    """The names under which these weights were recorded."""
    weights_digest = _digest_of_weights(session, model)
    return sorted(path.stem for path in disk().glob("*.weights") if path.read_text() == weights_digest)


def _digest_of_weights(session: Session, model: str) -> str:
    return digest([tensor for _, tensor in session.weights(session.models[model].model)])
