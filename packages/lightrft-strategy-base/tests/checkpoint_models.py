"""Small models in training, and their weights, for tests of checkpoints."""

import torch
from torch import nn


def in_training(strategy, kind=None, width=4, **settings):
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    optimizer = (kind or torch.optim.AdamW)(model.parameters(), **{"lr": 0.01, **settings})
    strategy.prepare((model, optimizer, None))
    return model, optimizer


def update(strategy, model, optimizer, count=1):
    for _ in range(count):
        strategy.backward(model(torch.randn(4, 3)).pow(2).mean(), model, optimizer)
        strategy.optimizer_step(optimizer, model)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
