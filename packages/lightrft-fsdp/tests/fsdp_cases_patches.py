"""What a rank does in `test_fsdp_patches`."""

import dataclasses

import fsdp_cases
import pytest
import torch
import training
from programs import Program

from lightrft.config import LightRFTError
from lightrft.fsdp import patches


def times_checked() -> int:
    """How often two strategies, one after the other, check torch."""
    patches.require_fsdp.cache_clear()
    calls: list[object] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(patches, "require", lambda *args: calls.append(args))
        for _ in range(2):
            with fsdp_cases.strategy(Program()):
                pass
    patches.require_fsdp.cache_clear()
    return len(calls)


def without_the_patch_of_muon() -> tuple[bool, str]:
    """Whether AdamW trains where torch lacks what the patch replaces, and what preparing Muon raises there."""
    renamed = dataclasses.replace(patches.MUON, target="torch.optim._muon:renamed")
    program = Program(updates=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(patches, "MUON", renamed)
        with fsdp_cases.strategy(program) as made:
            results = training.run(program, made, *fsdp_cases.prepared(made))
            model = fsdp_cases.matrices()
            with pytest.raises(LightRFTError) as caught:
                made.prepare((model, torch.optim.Muon(model.parameters(), lr=1e-2), None))
    return all(result.applied for result in results), str(caught.value)
