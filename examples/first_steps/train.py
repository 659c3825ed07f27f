import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightrft.strategy import StrategyConfig, get_strategy

parser = StrategyConfig.add_arguments(argparse.ArgumentParser())
parser.set_defaults(train_batch_size=8, micro_train_batch_size=2, actor_learning_rate=1e-3, bf16=False)

with get_strategy(parser.parse_args()) as strategy:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2))
    optimizer = strategy.create_optimizer(model, lr=strategy.config.actor_learning_rate)
    model, optimizer, _ = strategy.prepare((model, optimizer, None))
    tokens = torch.arange(40 * 16).view(40, 16) % 61
    for batch in strategy.setup_dataloader(tokens, batch_size=2, pin_memory=False, shuffle=False):
        batch = batch.to(strategy.device)
        strategy.backward(model(batch, labels=batch).loss, model, optimizer)
        result = strategy.optimizer_step(optimizer, model)
        if result.applied:
            strategy.print(f"gradient norm {result.grad_norm:.5f}")
