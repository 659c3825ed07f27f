"""The code of LightRFT's own design document where every backend is installed; the first block after unpacking triples.

On FakeStrategy the same blocks are among the tests of lightrft-strategy-base.
"""

import os
import subprocess
import sys

import pytest

BASIC = """
from argparse import Namespace
import torch
from torch import nn
from lightrft.strategy import get_strategy

class Layer(nn.Linear): ...
class Model(nn.Module):
    _no_split_modules = ["Layer"]
    def __init__(self):
        super().__init__()
        self.layer = Layer(2, 1)
    def forward(self, inputs):
        return self.layer(inputs)

args = Namespace(%s bf16=False, train_batch_size=2, micro_train_batch_size=1, actor_learning_rate=1e-2)
strategy = get_strategy(args)
(actor, actor_optimizer, actor_scheduler), _, reward_models, initial_model = strategy.prepare_models_and_optimizers(
    Model(), None, None, Model(), args, 10
)
for batch in torch.ones(4, 1, 2):
    loss = actor(batch).mean()
    strategy.backward(loss, actor, actor_optimizer)
    result = strategy.optimizer_step(actor_optimizer, actor, actor_scheduler)
print(type(strategy).__name__, result.applied)
strategy.close()
"""
DRIVEN = """
from lightrft.strategy import StrategyConfig, get_strategy
config = StrategyConfig(seed=42, max_norm=1.0, micro_train_batch_size=4, train_batch_size=32, bf16=True, zero_stage=2)
strategy = get_strategy(config)
print(type(strategy).__name__, strategy.accumulated_gradient)
strategy.close()
"""


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        (BASIC % "fsdp=True,", "FSDPV2Strategy True"),
        (BASIC % "", "DeepspeedStrategy True"),
        (BASIC % "fsdp=True, zero_stage=3,", "FSDPV2Strategy True"),
        (DRIVEN, "DeepspeedStrategy 8"),
    ],
    ids=["fsdp", "deepspeed", "both", "driven"],
)
def test_a_block_runs(code, printed):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert printed in done.stdout
