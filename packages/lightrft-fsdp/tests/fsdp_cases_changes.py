"""What scripts do to a prepared model between updates: freezing, hooks, evaluations. Each beside plain torch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import fsdp_cases
import pytest
import torch
import training
from fsdp_models import Layered, layered
from programs import Program, loss_of, tokens
from torch import nn

from lightrft.config import LightRFTError, StrategyError
from lightrft.fsdp import gathered_parameter

Script = Callable[[Layered, Callable[[], None]], None]
"""Changes a model, and calls its second argument for one update."""


def evaluate(model: nn.Module, mode: Callable[[], AbstractContextManager[object]] = torch.no_grad) -> None:
    with mode():
        model(tokens(9))


def compared(script: str, micro_batches: int = 1, hook: str | None = None) -> tuple[list[float], list[float], float]:
    """The norms with FSDP2 and with plain torch, and by how much the weights differ.

    Evaluates the model after each backward, too: FSDP2 keeps the root gathered.
    """
    program = Program(accumulation_steps=micro_batches)
    ranks, norms, wanted, plain = [], [], [], layered()
    optimizer_of = {"lr": 1e-2, "weight_decay": 0.0}
    with fsdp_cases.strategy(program) as made:
        ranks = list(range(made.world_size))
        model = layered()
        if hook:
            HOOKS[hook](model)
            HOOKS[hook](plain)
        prepared, optimizer = fsdp_cases.prepared(made, model)
        for group in optimizer.param_groups:
            group.update(optimizer_of)
        reference = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], **optimizer_of)
        of_reference = list(reference.param_groups[0]["params"])

        def update() -> None:
            for micro in range(micro_batches):
                position = (len(norms), micro)
                made.backward(loss_of(prepared, tokens(*position, made.get_rank())), prepared, optimizer)
                evaluate(prepared)
                norm = made.optimizer_step(optimizer, prepared).grad_norm
            assert norm is not None
            norms.append(norm)

        def plain_update() -> None:
            for micro in range(micro_batches):
                for rank in ranks:
                    loss = loss_of(plain, tokens(len(wanted), micro, rank))
                    (loss / (micro_batches * len(ranks))).backward()
            trainable = [p for p in of_reference if p.requires_grad]
            for p in of_reference:
                p.grad = (torch.zeros_like(p) if p.grad is None else p.grad) if p.requires_grad else None
            wanted.append(float(nn.utils.get_total_norm([p.grad for p in trainable if p.grad is not None])))
            reference.step()
            reference.zero_grad()

        SCRIPTS[script](prepared, update)
        SCRIPTS[script](plain, plain_update)
        got = training.full_parameters(made, prepared)
    return norms, wanted, max(float((got[n] - p.detach()).abs().max()) for n, p in plain.named_parameters())


def frozen_after_an_evaluation(model: Layered, update: Callable[[], None]) -> None:
    update()
    evaluate(model)
    model.embed.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    update()
    update()


def off_and_on(model: Layered, update: Callable[[], None]) -> None:
    """A reference pass: what trains is frozen for it, as PEFT does with modules that it saves."""
    for _ in range(2):
        model.head.requires_grad_(False)
        evaluate(model)
        model.head.requires_grad_(True)
        update()


def all_frozen_at_first(model: Layered, update: Callable[[], None]) -> None:
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.requires_grad_(False)
    evaluate(model)
    model.requires_grad_(True)
    for parameter in [*model.frozen.parameters()] if frozen else []:
        parameter.requires_grad_(False)
    update()
    update()


def by_parameters_kept_from_before(model: Layered, update: Callable[[], None]) -> None:
    """The caller's own list was made while the model was sharded, or while it was gathered."""
    sharded = [model.head.weight]
    evaluate(model)
    gathered = [model.head.weight]
    for kept in (sharded, gathered):
        for now in (False, True):
            for parameter in kept:
                parameter.requires_grad_(now)
            update()
            evaluate(model)


def updates_alone(model: Layered, update: Callable[[], None]) -> None:
    for _ in range(3):
        update()


def hooked_later(model: Layered, update: Callable[[], None]) -> None:
    update()
    handle = model.layers[1].up.weight.register_hook(lambda gradient: gradient * 3)
    model.head.weight.register_hook(lambda gradient: gradient * 3)
    update()
    evaluate(model)
    handle.remove()
    model.head.weight.register_hook(lambda gradient: gradient / 2)
    update()


def evaluated_in_inference_mode(model: Layered, update: Callable[[], None]) -> None:
    for _ in range(2):
        evaluate(model, torch.inference_mode)
        update()


SCRIPTS: dict[str, Script] = {
    script.__name__: script
    for script in (
        frozen_after_an_evaluation, off_and_on, all_frozen_at_first, by_parameters_kept_from_before, updates_alone, hooked_later,
        evaluated_in_inference_mode,
    )
}  # fmt: skip


def some_rows(model: Layered) -> None:
    keep = torch.zeros(model.embed.num_embeddings, 1)
    keep[5:9] = 1
    model.embed.weight.register_hook(lambda gradient: gradient * keep)


def one_removed(model: Layered) -> None:
    weight = model.layers[0].down.weight
    weight.register_hook(lambda gradient: gradient * 5).remove()
    weight.register_hook(lambda gradient: gradient * 2)


HOOKS: dict[str, Callable[[Layered], None]] = {"some rows": some_rows, "one removed": one_removed}


def removed_by_its_handle() -> list[int]:
    """How often a hook that was set before preparing was called in each of two updates; it is removed between them."""
    calls = [0, 0]
    with fsdp_cases.strategy(Program()) as made:
        model = layered()
        updates: list[int] = []

        def hook(gradient: torch.Tensor) -> None:
            assert gradient.shape == (13, 6)
            calls[len(updates)] += 1

        handle = model.layers[0].up.weight.register_hook(hook)
        model.layers[0].up.weight.expert = True  # type: ignore[attr-defined]
        prepared, optimizer = fsdp_cases.prepared(made, model)
        for update in range(2):
            assert model.layers[0].up.weight.expert  # type: ignore[attr-defined]
            made.backward(loss_of(prepared, tokens(update)), prepared, optimizer)
            made.optimizer_step(optimizer, prepared)
            updates.append(update)
            handle.remove()
    return calls


def accumulated(after: bool) -> tuple[str, str]:
    """The error for a hook on the accumulated gradient, set before or after preparing."""
    with fsdp_cases.strategy(Program()) as made:
        model = layered()
        if not after:
            model.layers[0].up.weight.register_post_accumulate_grad_hook(lambda parameter: None)
        try:
            prepared, _ = fsdp_cases.prepared(made, model)
            model.layers[0].up.weight.register_post_accumulate_grad_hook(lambda parameter: None)
            prepared(tokens(0))
        except LightRFTError as error:
            return type(error).__name__, str(error)
    raise AssertionError("nothing was raised")


def frozen_after_a_refused_forward() -> list[bool]:
    """Whether a parameter is frozen that the script froze after the first forward pass was refused, before and after the next."""
    with fsdp_cases.strategy(Program()) as made:
        model = layered()
        prepared, _ = fsdp_cases.prepared(made, model)
        handle = model.layers[0].norm.weight.register_post_accumulate_grad_hook(lambda parameter: None)
        try:
            prepared(tokens(0))
        except LightRFTError:
            handle.remove()
        model.layers[0].down.weight.requires_grad_(False)
        seen = [not model.layers[0].down.weight.requires_grad]
        prepared(tokens(0))
        return [*seen, not model.layers[0].down.weight.requires_grad]


def _through_parts(model: Layered) -> torch.Tensor:
    """A layer and parts of another one, called outside the model's forward."""
    states = model.layers[0](model.embed(tokens(1)))
    states = model.layers[1].down(model.layers[1].up(states))
    logits: torch.Tensor = model.head(states)
    return logits


def hooks_run_in_steps() -> int:
    """How many hooks of parts two updates run: they are for calls outside the model's forward."""
    calls: list[nn.Module] = []
    make_hook = gathered_parameter._gather_or_refuse

    def counting(*args: Any) -> Callable[[nn.Module, Any], None]:
        hook = make_hook(*args)

        def counted(part: nn.Module, inputs: Any) -> None:
            calls.append(part)
            hook(part, inputs)

        return counted

    with pytest.MonkeyPatch.context() as monkeypatch, fsdp_cases.strategy(Program()) as made:
        monkeypatch.setattr(gathered_parameter, "_gather_or_refuse", counting)
        prepared, optimizer = fsdp_cases.prepared(made)
        for update in range(2):
            made.backward(loss_of(prepared, tokens(update)), prepared, optimizer)
            made.optimizer_step(optimizer, prepared)
        in_steps = len(calls)
        with torch.no_grad():
            prepared.get_submodule("layers.0.up")(torch.ones(1, 2, 6))
        assert len(calls) == in_steps + 1  # hooks that run are counted
    return in_steps


def parts() -> tuple[torch.Tensor, torch.Tensor, dict[str, str]]:
    """Outputs of parts that are called outside the model's forward, and errors of training through them."""
    errors = {}
    with fsdp_cases.strategy(Program()) as made:
        model = layered()
        prepared, optimizer = fsdp_cases.prepared(made, model)
        with torch.inference_mode():
            outputs = _through_parts(model)
        made.backward(loss_of(prepared, tokens(0)), prepared, optimizer)
        losses = {
            "part": lambda: _through_parts(model).mean(),
            "part of a layer": lambda: model.layers[1].up(torch.ones(1, 2, 6)).mean(),
            "tied part": lambda: model.head(torch.ones(1, 2, 6)).mean(),
            "penalty": lambda: model.layers[0].up.weight.square().sum() + loss_of(prepared, tokens(0)),
        }
        for name, loss in losses.items():
            try:
                made.backward(loss(), prepared, optimizer)
            except LightRFTError as error:
                errors[name] = str(error)
        assert made.optimizer_step(optimizer, prepared).applied
    return outputs.clone(), _through_parts(layered()).detach(), errors


def saved_and_loaded_in_inference_mode(path: str) -> float:
    """By how much an update after saving and loading under inference_mode differs from one without."""
    got = []
    for mode in (torch.inference_mode, torch.no_grad):
        with fsdp_cases.strategy(Program()) as made:
            prepared, optimizer = fsdp_cases.prepared(made)
            for update in range(2):
                made.backward(loss_of(prepared, tokens(update)), prepared, optimizer)
                made.optimizer_step(optimizer, prepared)
                with mode():
                    folder = f"{path}/{mode.__name__}{update}"
                    made.save_ckpt(prepared, folder, optimizer=optimizer)
                    made.load_ckpt(prepared, folder, optimizer=optimizer)
            got.append(training.full_parameters(made, prepared))
    return max(float((got[0][name] - tensor).abs().max()) for name, tensor in got[1].items())


def written_while_gathered() -> list[str]:
    """Errors of the next forward pass and of the next update, after writes that followed an evaluation; then none."""
    errors = []
    with fsdp_cases.strategy(Program()) as made:
        model, optimizer = fsdp_cases.prepared(made)

        def update() -> None:
            made.backward(loss_of(model, tokens(made.get_rank())), model, optimizer)
            made.optimizer_step(optimizer, model)

        for then in (lambda: evaluate(model), update):
            update()
            evaluate(model)
            with torch.no_grad():
                model.get_parameter("embed.weight")[3:].zero_()
            with pytest.raises(StrategyError) as caught:
                then()
            errors.append(str(caught.value))
        update()
        return errors
