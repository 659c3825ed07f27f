"""A language model as people train it: transformers' Llama, with gradient checkpointing and generation."""

import ds_cases_models as cases
import pytest
from llamas import Actor, llama
from programs import Program, furthest, reference, relative
from workers import Workers


@pytest.mark.parametrize(
    ("bf16", "checkpointing"), [(False, None), (False, "reentrant"), (False, "not reentrant"), (True, "not reentrant")]
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_llama_trains_as_in_plain_torch(two: Workers, stage: int, bf16: bool, checkpointing: str | None) -> None:
    program = Program(updates=4, accumulation_steps=2)
    got = two.run(cases.trained, program=program, checkpointing=checkpointing, zero_stage=stage, bf16=bf16)
    wanted = reference(program, 2, Actor)
    wanted.parameters = {name.removeprefix("model."): tensor for name, tensor in wanted.parameters.items()}
    assert furthest(got[0], got[1]) == 0
    assert got[0].parameters.keys() == wanted.parameters.keys()
    assert relative(got[0], wanted, llama) < (0.1 if bf16 else 5e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_model_in_training_can_generate(two: Workers, stage: int) -> None:
    for wanted, got in two.run(cases.generated, zero_stage=stage):
        assert got == wanted
