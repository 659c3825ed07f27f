"""What a rank does in the tests of preparing models, on any strategy."""

from collections.abc import Callable
from typing import Any

import torch
import training
from exports import in_training, opened
from llamas import llama
from programs import tokens
from torch import nn
from torch._dynamo.utils import counters

from lightrft.config import LightRFTError


class Critic(nn.Module):
    """Values from the backbone of another model."""

    _no_split_modules = ["LlamaDecoderLayer"]

    def __init__(self, actor: Any) -> None:
        super().__init__()
        self.backbone, self.head = actor.model, nn.Linear(16, 1)


def refusals(strategy: str, path: str, **settings: Any) -> dict[str, str]:
    """The errors for models that share parameters with one in training, and for save_pretrained of a prepared model."""
    with opened(strategy, **settings) as made:
        actor = llama(tied=False)
        critic, reference = Critic(actor), llama(tied=False)
        reference.model.embed_tokens.weight = actor.model.embed_tokens.weight
        optimizer = made.create_optimizer(critic, lr=1e-2)
        model: Any
        model, _ = in_training(made, actor)
        folder = f"{path}{made.get_rank()}"
        calls: dict[str, Callable[[], object]] = {
            "critic": lambda: made.prepare((critic, optimizer, None)),
            "critic that does not train": lambda: made.prepare(critic),
            "reference": lambda: made.prepare(reference),
            "save_pretrained": lambda: model.save_pretrained(folder),
            "save_pretrained of a part": lambda: model.model.save_pretrained(folder),
            "state_dict": lambda: model.state_dict(),
        }
        said = {name: str(error) for name, call in calls.items() if (error := _refusal(call)) is not None}
        in_training(made, llama(), updates=1)  # goes on
    after = {
        "state_dict after close": lambda: model.state_dict(),
        "save_pretrained after close": lambda: model.save_pretrained(folder),
    }
    return said | {name: str(error) for name, call in after.items() if (error := _refusal(call)) is not None}


def _refusal(call: Callable[[], object]) -> LightRFTError | None:
    try:
        call()
    except LightRFTError as error:
        return error
    return None


def weight_outside_forward(strategy: str, **settings: Any) -> tuple[str, bool]:
    """The error of a loss that multiplies by the weight of a layer itself, and whether an update follows it."""
    with opened(strategy, **settings) as made:
        model, optimizer = in_training(made, llama())
        inputs_BT = tokens(0, made.get_rank())
        hidden_BTH = model(inputs_BT, output_hidden_states=True).hidden_states[-1]
        said = "no error"
        try:
            hidden_BTH @ model.model.layers[0].self_attn.q_proj.weight.T
        except Exception as error:  # noqa: BLE001 - of torch, whichever it is
            said = f"{type(error).__name__}: {error}"
        made.backward(model(inputs_BT, labels=inputs_BT).loss, model, optimizer)
        return said, made.optimizer_step(optimizer, model).applied


def compiled(strategy: str, path: str, **settings: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """The weights of a model after an update, those of the same model compiled, and how many graphs were compiled."""
    weights = []
    for build in (llama, lambda: torch.compile(llama(), backend="eager")):
        torch._dynamo.reset()
        counters.clear()
        with opened(strategy, **settings) as made:
            model, _ = in_training(made, build(), updates=1)
            weights.append(training.full_parameters(made, model))
            made.save_model(model, None, path)
    graphs = counters["frames"]["ok"]
    torch._dynamo.reset()
    return weights[0], weights[1], graphs
