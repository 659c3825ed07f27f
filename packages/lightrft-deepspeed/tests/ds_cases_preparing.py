"""What a rank does in `test_deepspeed_preparing`."""

import ds_cases
import torch
import training
from programs import DECAY, RATE, Mixed, Program, loss_of, mixed, tokens
from torch import nn

from lightrft.config import StrategyError


def prepared_for_training(persist: bool, **settings: object) -> list[dict[str, torch.Tensor]]:
    with ds_cases.strategy(Program(), persist, **settings) as made:
        model: nn.Module = mixed(3 + made.get_rank())
        model, _, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        assert isinstance(made.unwrap_model(model), Mixed)
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in mixed().named_parameters()]
        return [training.full_parameters(made, model, dtype) for dtype in (torch.float32, torch.bfloat16)]


def called_before_and_after(**settings: object) -> list[torch.Tensor]:
    with ds_cases.strategy(Program(), persist=False, **settings) as made:
        model: nn.Module = mixed()
        outputs = [model(tokens(1))]
        model = made.prepare_model(model, is_training=True)
        outputs.append(model(tokens(1)))
        made.create_optimizer(model, lr=RATE)
        outputs.append(model(tokens(1)))
        copy = made.prepare(mixed())
        outputs += [copy(tokens(1)), copy(tokens(1))]
        return [output.detach().float() for output in outputs]


def with_an_empty_parameter(**settings: object) -> None:
    with ds_cases.strategy(Program(), persist=False, **settings) as made:
        model = nn.Linear(2, 2)
        model.register_parameter("nothing", nn.Parameter(torch.zeros(0, 2)))
        made.prepare((model, made.create_optimizer(model, lr=RATE), None))


def built_on_rank_0_alone(in_training: bool, **settings: object) -> dict[str, torch.Tensor]:
    with ds_cases.strategy(Program(), persist=False, **settings) as made:
        with made.init_model_context(meta_init=True):
            model: nn.Module = Mixed() if made.get_rank() else mixed()
        assert made.get_rank() == 0 or all(tensor.is_meta for tensor in model.parameters())
        if in_training:
            model, _, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        else:
            model = made.prepare(model)
        assert made.unwrap_model(model).head.weight is made.unwrap_model(model).embed.weight
        model(tokens(0))
        return training.full_parameters(made, model)


def for_inference(dtype: torch.dtype, **settings: object) -> tuple[dict[str, torch.Tensor], int, bool]:
    with ds_cases.strategy(Program(), persist=False, **settings) as made:
        frozen = made.prepare(mixed().to(dtype))
        model, optimizer, _ = made.prepare((mixed(), None, None))
        optimizer = made.create_optimizer(model, lr=RATE)
        for update in range(2):
            loss = loss_of(model, tokens(update)) + (model(tokens(0)) - frozen(tokens(0))).float().square().mean()
            made.backward(loss, model, optimizer)
            assert made.optimizer_step(optimizer, model).applied
        same = {name: tensor.clone() for bucket in made.full_parameters(frozen) for name, tensor in bucket}
        held = sum(shard.values.numel() for shard in made.backend.shards(made.unwrap_model(frozen)))
        return same, held, any(tensor.requires_grad or tensor.grad is not None for tensor in frozen.parameters())


def averaged(**settings: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.dtype, torch.Tensor]:
    program = Program(updates=3)
    beta = 0.7
    with ds_cases.strategy(program, persist=True, **settings) as made:
        model: nn.Module = mixed()
        average = made.prepare(mixed())
        average(tokens(0))  # leaves small parameters gathered, at stage 3
        model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        wanted = training.full_parameters(made, average)
        for update in range(3):
            made.backward(program.loss(model, update, 0, made.get_rank()), model, optimizer)
            made.optimizer_step(optimizer, model)
            made.moving_average(model, average, beta)
            now = training.full_parameters(made, model)
            trained = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
            for name in trained:
                wanted[name].mul_(beta).add_(now[name], alpha=1 - beta)
        outputs = average(tokens(5)).detach().float()
        return training.full_parameters(made, average), wanted, next(average.parameters()).dtype, outputs


def written_through_shards(**settings: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    with ds_cases.strategy(Program(), persist=True, **settings) as made:
        model: nn.Module = mixed()
        model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        made.backward(loss_of(model, tokens(0)), model, optimizer)
        made.optimizer_step(optimizer, model)
        other = dict(mixed(11).named_parameters())
        inner = made.unwrap_model(model)
        made.backend.reshard(inner)
        for shard in made.backend.shards(inner):
            assert shard.shape == other[shard.name].shape
            shard.values.copy_(shard.of(other[shard.name].detach()))
        made.backend.sync_from_master(inner)
        outputs = model(tokens(5)).detach().float()
        return training.full_parameters(made, model), training.full_parameters(made, model, torch.bfloat16), outputs


def actor_and_critic(**settings: object) -> list[dict[str, torch.Tensor]]:
    program = Program(updates=4, accumulation_steps=2, max_norm=0.3)
    other = Program(updates=4, accumulation_steps=2, max_norm=0.3, poisoned=(1,))
    with ds_cases.strategy(program, persist=False, **settings) as made:
        pairs = []
        for seed in (3, 4):
            model = mixed(seed)
            pairs.append(made.prepare((model, made.create_optimizer(model, lr=RATE, weight_decay=DECAY), None))[:2])
        (actor, actor_optimizer), (critic, critic_optimizer) = pairs
        for update, micro, _ in program.micro_batches():
            training.backward(program, made, actor, actor_optimizer, update, micro)
            training.backward(other, made, critic, critic_optimizer, update, micro)
            made.optimizer_step(critic_optimizer, critic)
            made.optimizer_step(actor_optimizer, actor)
        return [training.full_parameters(made, actor), training.full_parameters(made, critic)]


def alone(seed: int, program: Program, **settings: object) -> dict[str, torch.Tensor]:
    with ds_cases.strategy(program, persist=False, **settings) as made:
        model: nn.Module = mixed(seed)
        optimizer = made.create_optimizer(model, lr=RATE, weight_decay=DECAY)
        model, optimizer, _ = made.prepare((model, optimizer, None))
        training.run(program, made, model, optimizer)
        return training.full_parameters(made, model)


def with_groups(empty: bool, stepped: bool, optimizer_class: str, **settings: object) -> None:
    with ds_cases.strategy(Program(), **settings) as made:
        model = mixed()
        groups: list[dict[str, object]] = [
            {"params": [tensor for tensor in model.parameters() if tensor.requires_grad]}
        ]
        optimizer = getattr(torch.optim, optimizer_class)([*groups, {"params": []}] if empty else groups, lr=RATE)
        if stepped:
            loss_of(model, tokens(0)).backward()
            optimizer.step()
        made.prepare((model, optimizer, None))


class Lookup(nn.Module):
    """Makes sparse gradients by a functional embedding, which preparing cannot see."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.ones(4, 2)), nn.BatchNorm1d(2)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.norm(nn.functional.embedding(indices, self.table, sparse=True)).sum()


def with_sparse_gradient(**settings: object) -> None:
    with ds_cases.strategy(Program(), persist=False, **settings) as made:
        model: nn.Module = Lookup()
        model, optimizer, _ = made.prepare((model, torch.optim.SGD(model.parameters(), lr=RATE), None))
        made.backward(model(torch.tensor([1, 2])), model, optimizer)
        made.optimizer_step(optimizer, model)  # where stage 1 reduces


def prepared_twice(**settings: object) -> None:
    model = mixed()
    for _ in range(2):
        with ds_cases.strategy(Program(), **settings) as made:
            made.prepare(model)


def with_optimizer(name: str, **settings: object) -> None:
    with ds_cases.strategy(Program(), persist=True, **settings) as made:
        model = mixed()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.ndim == 2]
        made.prepare((model, getattr(torch.optim, name)(trained, lr=0.0), None))


def written_by_script(
    bf16: bool, how: str, **settings: object
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights before and after an update with rate 0, after one was halved between two updates."""
    with ds_cases.strategy(Program(), persist=how == "gathered", bf16=bf16, **settings) as made:
        from deepspeed.runtime.zero import GatheredParameters

        model: nn.Module = mixed()
        model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        made.backward(loss_of(model, tokens(0)), model, optimizer)
        made.optimizer_step(optimizer, model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = training.full_parameters(made, model)
        if how == "gathered":
            with GatheredParameters([model.out.weight], modifier_rank=0), torch.no_grad():
                if made.get_rank() == 0:
                    model.out.weight[:3] *= 0.5
        else:
            with torch.no_grad():
                model.out.weight[:3] *= 0.5
        made.backward(loss_of(model, tokens(1)), model, optimizer)
        made.optimizer_step(optimizer, model)
        return before, training.full_parameters(made, model)


def written_to_sharded(path: str, **settings: object) -> list[str]:
    """The errors of the same update twice, and whether it is made after the weights were loaded."""
    said = []
    with ds_cases.strategy(Program(), persist=False, **settings) as made:
        model: nn.Module = mixed()
        model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        with torch.no_grad():
            model.out.weight.mul_(0.5)
        made.backward(loss_of(model, tokens(1)), model, optimizer)
        for _ in range(2):
            try:
                made.optimizer_step(optimizer, model)
            except StrategyError as error:
                said.append(str(error))
        made.save_model(model, None, path)
        made.load_model(model, path)
        said.append(str(made.optimizer_step(optimizer, model).applied))
    return said


def penalty_on_a_parameter(beside_a_forward: bool) -> str:
    """The error for a loss that uses a large parameter directly, outside the model's forward."""
    with ds_cases.strategy(Program(), persist=False, zero_stage=3) as made:
        model: nn.Module = mixed()
        model, optimizer, _ = made.prepare((model, made.create_optimizer(model, lr=RATE), None))
        loss = model.get_parameter("hidden.weight").square().sum()
        if beside_a_forward:
            loss = loss + loss_of(model, tokens(0))
        try:
            made.backward(loss, model, optimizer)
        except StrategyError as error:
            return str(error)
    raise AssertionError("nothing was raised")
