"""GRPO on arithmetic questions: SmolLM2 learns to answer in the requested format, on any strategy and any engine.

Group-normalised advantages, clipped ratio, k3 estimate of the KL divergence from the initial model (Shao et al.,
"DeepSeekMath", 2024). The questions of a step, the completions sampled for them and the groups used for training
depend only on the seed, not on the number of ranks, so a run is the same on one process and on two.

Shapes: B sequences, T tokens of prompt and response, R tokens of response.
"""

import argparse
import copy
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from display import Display
from task import Question, questions, reward
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lightrft.strategy import Completion, Sampling, StrategyBase, StrategyConfig, get_strategy

CLIP, KL_WEIGHT = 0.2, 0.02
MAX_TOKENS = 14
"""Maximum length of a response; the longest correct one has 12 tokens."""


def main() -> None:
    args = arguments()
    disable_progress_bar()
    strategy = get_strategy(args)
    with strategy, Display(args.output, args.steps, title(args, strategy), speaks=strategy.is_rank_0()) as display:
        tokenizer = AutoTokenizer.from_pretrained(args.pretrain)
        actor = AutoModelForCausalLM.from_pretrained(args.pretrain, dtype=torch.float32)
        initial = strategy.prepare(copy.deepcopy(actor))
        optimizer = strategy.create_optimizer(actor, lr=args.actor_learning_rate, betas=args.adam_betas)
        actor, optimizer, _ = strategy.prepare((actor, optimizer, None))
        strategy.setup_inference_engine(args, actor=actor)

        training, held_out = questions()
        deck = shuffled(training, args.seed, args.steps * args.prompts)
        display.record(0, exact_match=exact_match(strategy, tokenizer, held_out))

        for step in range(1, args.steps + 1):
            with display.phase("rollout"):
                asked = deck[(step - 1) * args.prompts : step * args.prompts]
                sampling = Sampling(n=args.n_samples_per_prompt, max_tokens=MAX_TOKENS, seed=args.seed + step)
                rollout = gather(strategy, tokenizer, ask(strategy, tokenizer, asked, sampling), asked, args)
            with display.phase("train"):
                facts = update(strategy, actor, initial, optimizer, chosen(rollout, args, step), args)
            with display.phase("sync"):
                strategy.update_engine_weights(actor)
            last = step % args.eval_every == 0 or step == args.steps
            accuracy = exact_match(strategy, tokenizer, held_out) if last else None
            display.record(step, reward=rollout["rewards"].mean().item(), exact_match=accuracy, **facts)


# Rollout


def ask(
    strategy: StrategyBase, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question], sampling: Sampling
) -> list[Completion]:
    """Return the completions of this rank's share of the questions."""
    local = asked[strategy.get_rank() :: strategy.world_size]
    prompts = [tokenizer(question.prompt, add_special_tokens=False)["input_ids"] for question in local]
    return strategy.gather_and_generate(sampling, all_prompt_token_ids=prompts)


def gather(
    strategy: StrategyBase, tokenizer: PreTrainedTokenizerBase, completions: Sequence[Completion], asked: Sequence[Question],
    args: argparse.Namespace,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Return all ranks' completions, with their rewards, in the order of the questions."""
    local = asked[strategy.get_rank() :: strategy.world_size]
    samples = args.n_samples_per_prompt
    texts = [tokenizer.decode(completion.output_token_ids) for completion in completions]
    rewards = [reward(local[index // samples], text) for index, text in enumerate(texts)]
    width = max(len(tokenizer(question.prompt, add_special_tokens=False)["input_ids"]) for question in asked)
    rows = {
        "position": torch.tensor(
            [asked.index(local[index // samples]) * samples + index % samples for index in range(len(texts))]
        ),
        "prompts": padded([completion.prompt_token_ids for completion in completions], width, left=True),
        "responses": padded([completion.output_token_ids for completion in completions], MAX_TOKENS),
        "old_logprobs": padded([completion.logprobs or () for completion in completions], MAX_TOKENS, torch.float32),
        "rewards": torch.tensor(rewards),
    }
    everyone = strategy.all_gather(rows)
    order = everyone["position"].argsort()
    return {name: rows[order] for name, rows in everyone.items()}


def padded(
    rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype = torch.int64, *, left: bool = False
) -> torch.Tensor:
    """Return ``rows`` as one tensor, padded with -1, which is not a token or the log-probability of a sample."""
    filled = [[*[-1] * (width - len(row)), *row] if left else [*row, *[-1] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=dtype).reshape(len(rows), width)


def exact_match(strategy: StrategyBase, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question]) -> float:
    """Return the fraction of questions that greedy decoding answers correctly, in the requested format."""
    local = asked[strategy.get_rank() :: strategy.world_size]
    completions = ask(strategy, tokenizer, asked, Sampling(temperature=0.0, max_tokens=MAX_TOKENS))
    correct = [
        reward(question, tokenizer.decode(completion.output_token_ids))
        for question, completion in zip(local, completions, strict=True)
    ]
    total: float = strategy.all_reduce(sum(correct), "sum")
    return total / len(asked)


# Training


def chosen(rollout: dict[str, torch.Tensor], args: argparse.Namespace, step: int) -> dict[str, torch.Tensor]:
    """Return the sequences of this step's updates, with advantages: whole groups, those whose rewards differ first.

    A group in which all rewards are equal has zero advantages: it is used only to fill up the last batch.
    """
    groups = rollout["rewards"].view(-1, args.n_samples_per_prompt)
    spread = groups.std(dim=1, keepdim=True)
    advantages = (groups - groups.mean(dim=1, keepdim=True)) / (spread + 1e-4)
    order = list(range(len(groups)))
    random.Random(args.seed * 1009 + step).shuffle(order)
    order.sort(key=lambda group: not spread[group])
    groups_per_update = args.train_batch_size // args.n_samples_per_prompt
    updates = min(args.updates_per_rollout, math.ceil(int((spread > 0).sum()) / groups_per_update))
    picked = torch.tensor(order[: updates * groups_per_update], dtype=torch.int64)
    rows = (picked[:, None] * args.n_samples_per_prompt + torch.arange(args.n_samples_per_prompt)).flatten()
    return {**{name: tensor[rows] for name, tensor in rollout.items()}, "advantages": advantages.flatten()[rows]}


def update(
    strategy: StrategyBase, actor: PreTrainedModel, initial: PreTrainedModel, optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor], args: argparse.Namespace,
) -> dict[str, float]:  # fmt: skip
    """Make the updates of one rollout; each micro-batch is this rank's share of the next sequences."""
    divergences, norms, skipped = [], [], 0
    size, ranks = args.micro_train_batch_size, strategy.world_size
    for start in range(0, len(batch["rewards"]), size * ranks):
        rows = slice(start + strategy.get_rank(), start + size * ranks, ranks)
        micro = {name: tensor[rows].to(strategy.device) for name, tensor in batch.items()}
        with torch.no_grad():
            micro["initial_logprobs"] = response_logprobs(initial, micro)
        loss, divergence = grpo_loss(response_logprobs(actor, micro), micro)
        strategy.backward(loss, actor, optimizer)
        result = strategy.optimizer_step(optimizer, actor)
        divergences.append(divergence.item())
        skipped += result.skipped
        norms += [result.grad_norm] if result.applied else []
    kl = strategy.all_reduce(sum(divergences) / max(1, len(divergences)))
    return {"kl": kl, "grad_norm": sum(norms) / max(1, len(norms)), "skipped": skipped}


def response_logprobs(model: PreTrainedModel, micro: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-probability of each response token, (B, R); the LM head runs only on response positions."""
    tokens_BT = torch.cat([micro["prompts"], micro["responses"]], dim=1)
    mask_BT = (tokens_BT >= 0).long()
    logits_BRV = model(
        tokens_BT.clamp(min=0), attention_mask=mask_BT, position_ids=(mask_BT.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False, logits_to_keep=MAX_TOKENS + 1,
    ).logits[:, :-1]  # fmt: skip
    chosen_BR1 = micro["responses"].clamp(min=0)[..., None]
    return logits_BRV.float().log_softmax(dim=-1).gather(-1, chosen_BR1).squeeze(-1)


def grpo_loss(logprobs_BR: torch.Tensor, micro: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and the KL divergence, each averaged over the tokens of a sequence, then over sequences."""
    mask_BR = micro["responses"] >= 0
    ratio_BR = (logprobs_BR - micro["old_logprobs"]).where(mask_BR, 0.0).exp()
    advantages_B1 = micro["advantages"][:, None]
    gain_BR = torch.minimum(ratio_BR * advantages_B1, ratio_BR.clamp(1 - CLIP, 1 + CLIP) * advantages_B1)
    difference_BR = micro["initial_logprobs"] - logprobs_BR
    divergence_BR = difference_BR.exp() - difference_BR - 1  # k3: unbiased, and never negative

    def mean(values_BR: torch.Tensor) -> torch.Tensor:
        return (values_BR.where(mask_BR, 0.0).sum(dim=1) / mask_BR.sum(dim=1)).mean()

    return mean(KL_WEIGHT * divergence_BR - gain_BR), mean(divergence_BR.detach())


# The script


def shuffled(training: Sequence[Question], seed: int, count: int) -> list[Question]:
    """Return at least ``count`` questions: epochs of all questions, each in a new random order."""
    stream = random.Random(seed)
    deck: list[Question] = []
    while len(deck) < count:
        deck += stream.sample(training, len(training))
    return deck


def title(args: argparse.Namespace, strategy: StrategyBase) -> str:
    return f"{strategy.name}, {strategy.world_size} rank{'s' * (strategy.world_size > 1)}, {args.engine_type}"


def arguments() -> argparse.Namespace:
    parser = StrategyConfig.add_arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--pretrain", required=True, help="directory of the model to train")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/rlvr_arithmetic"), help="directory for metrics and the plot"
    )
    parser.add_argument("--steps", type=count, default=8, help="rollouts")
    parser.add_argument("--prompts", type=count, default=16, help="questions of one rollout")
    parser.add_argument("--updates-per-rollout", type=count, default=2)
    parser.add_argument("--eval-every", type=count, default=2, help="steps between measurements on held-out questions")
    parser.add_argument("--engine", dest="engine_type", default="transformers", help="rollout engine")
    parser.set_defaults(
        strategy="fsdp", engine_type="transformers", bf16=False, train_batch_size=32, micro_train_batch_size=16,
        actor_learning_rate=2e-5,
    )  # fmt: skip
    return parser.parse_args()


def count(text: str) -> int:
    """Parse an integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
