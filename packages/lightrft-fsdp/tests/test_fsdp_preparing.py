"""What becomes of a model: its weights, on all ranks, at rest and away."""

import fsdp_cases as cases
import preparing
import pytest
import torch
from fsdp_models import layered
from programs import tokens
from torch import nn
from workers import Workers


def equal(got: dict[str, torch.Tensor], model: nn.Module) -> bool:
    """Whether ``got`` has what a saved ``model`` has, tied weights once, and nothing else."""
    wanted = {name: tensor.detach() for name, tensor in model.state_dict().items() if name != "head.weight"}
    return got.keys() == wanted.keys() and all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("settings", [{}, {"fsdp_shard_size": 1}, {"fsdp_cpu_offload": True}], ids=str)
def test_the_weights_are_rank_0s(two: Workers, settings: dict[str, object]) -> None:
    for got in two.run(cases.prepared_in_two_ways, **settings):
        assert all(equal(weights, layered()) for weights in got)


@pytest.mark.parametrize("in_training", [True, False])
def test_a_model_that_only_rank_0_built_is_complete_on_every_rank(two: Workers, in_training: bool) -> None:
    wanted = layered()(tokens(1)).detach()
    for got, output in two.run(cases.built_on_rank_0_alone, in_training=in_training):
        assert equal(got, layered())
        torch.testing.assert_close(output, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"fsdp_shard_size": 1}, {"fsdp_cpu_offload": True}], ids=str)
def test_training_with_offload_cycles_equals_training_without(two: Workers, settings: dict[str, object]) -> None:
    with_them, without = (two.run(cases.moved_about, cycles=cycles, **settings)[0] for cycles in (True, False))
    assert all(torch.equal(with_them[name], tensor) for name, tensor in without.items())


def test_a_weight_used_outside_the_forward_pass_raises_what_the_documentation_explains(two: Workers) -> None:
    for error, goes_on in two.run(preparing.weight_outside_forward, strategy="fsdp"):
        assert "got mixed torch.Tensor and DTensor" in error
        assert goes_on
