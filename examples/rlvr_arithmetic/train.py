"""GRPO on arithmetic questions: SmolLM2 learns to answer in the requested format, on any strategy and any engine.

Group-normalised advantages, clipped ratio, k3 estimate of the KL divergence from the initial model (Shao et al.,
"DeepSeekMath", 2024), and a loss per token (Yu et al., "DAPO", 2025): every token of an update weighs the same, however the
sequences are divided into micro-batches and ranks. The questions of a step, the completions sampled for them and the groups
used for training depend only on the seed, not on the number of ranks, so a run is the same on one process and on two.

Shapes: B sequences, T tokens of prompt and response.
"""

import argparse
import copy
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from display import Display
from task import Question, questions, reward
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from lightrft.strategy import Completion, Sampling, StrategyBase, StrategyConfig, get_strategy

CLIP, KL_WEIGHT = 0.2, 0.02
MAX_TOKENS = 14
"""Maximum length of a response; the longest correct one has 12 tokens."""
NOT_PREDICTED = -100
"""Target where no token of a response is predicted."""


def main() -> None:
    args = arguments()
    disable_progress_bar()
    strategy = get_strategy(args)
    strategy.print(strategy.config.summary())
    with (
        strategy,
        Display(Path(args.log_dir), args.steps, title(args, strategy), is_shown=strategy.is_rank_0()) as display,
    ):
        tokenizer = AutoTokenizer.from_pretrained(args.pretrain)
        actor = AutoModelForCausalLM.from_pretrained(args.pretrain, dtype=torch.float32)
        initial = strategy.prepare(copy.deepcopy(actor))
        optimizer = strategy.create_optimizer(actor, lr=args.actor_learning_rate, betas=args.adam_betas)
        actor, optimizer, _ = strategy.prepare((actor, optimizer, None))
        strategy.setup_inference_engine(args, actor=actor)

        training, held_out = questions()
        deck = shuffled(training, args.seed, args.steps * args.prompts)
        for step in range(args.steps + 1):
            metrics: dict[str, Any] = {}
            if step > 0:
                asked = deck[(step - 1) * args.prompts : step * args.prompts]
                sampling = Sampling(n=args.n_samples_per_prompt, max_tokens=MAX_TOKENS, seed=args.seed + step)
                rollout = gather(strategy, tokenizer, ask(strategy, tokenizer, asked, sampling), asked, args)
                metrics = update(strategy, actor, initial, optimizer, chosen(rollout, args, step), args)
                metrics["reward"] = rollout["rewards"].mean()
                strategy.update_engine_weights(actor)
            if step % args.eval_every == 0 or step == args.steps:
                metrics["exact_match"] = exact_match(strategy, tokenizer, held_out)
            strategy.log(metrics, step)
            display.show(step)


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
    prompts = [list(completion.prompt_token_ids) for completion in completions]
    outputs = [list(completion.output_token_ids) for completion in completions]
    width = MAX_TOKENS + max(len(tokenizer(problem.prompt, add_special_tokens=False)["input_ids"]) for problem in asked)
    rows = {
        "position": torch.tensor(
            [asked.index(local[index // samples]) * samples + index % samples for index in range(len(texts))]
        ),
        "tokens": padded([prompt + output for prompt, output in zip(prompts, outputs, strict=True)], width),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts]),
        "lengths": torch.tensor([len(prompt) + len(output) for prompt, output in zip(prompts, outputs, strict=True)]),
        "old_logprobs": padded(
            [[0.0] * len(prompt) + list(completion.logprobs or ()) for prompt, completion in zip(prompts, completions, strict=True)],
            width, torch.float32,
        ),
        "rewards": torch.tensor(rewards),
    }  # fmt: skip
    everyone = strategy.all_gather(rows)
    order = everyone["position"].argsort()
    return {name: rows[order] for name, rows in everyone.items()}


def padded(rows: Sequence[Sequence[float]], width: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return ``rows`` as one tensor, padded with 0."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=dtype).reshape(len(rows), width)


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
) -> dict[str, Any]:  # fmt: skip
    """Make the updates of one rollout, each from this rank's share of the next sequences, in planned micro-batches.

    Returns metrics; the strategy logs those of its own calls by itself, such as the gradient norm.
    """
    sums = dict.fromkeys(("divergence", "items", "tokens", "planned", "fixed"), 0.0)
    count = len(batch["lengths"])
    shortest = batch["lengths"].argsort()[:1].tolist()
    for start in range(0, count, args.train_batch_size):
        end = min(start + args.train_batch_size, count)
        ranks = strategy.sequence_parallel  # those that share sequences have the same share
        share = list(range(start + ranks.data_rank, end, ranks.data_ranks))
        lengths = batch["lengths"][share].tolist()
        plan = strategy.plan_micro_batches(lengths, max_tokens=args.max_tokens_per_micro_batch, padded=True)
        for micro_batch in plan:
            rows = [share[index] for index in micro_batch.indices] or shortest  # a filler passes through the model too
            micro = micro_batch_of(batch, rows, strategy.device)
            with torch.no_grad():
                micro["initial_logprobs"] = response_logprobs(strategy, initial, micro)
            logprobs_BT = response_logprobs(strategy, actor, micro)
            loss, divergence, items = (micro_batch.weight * value for value in grpo_loss(logprobs_BT, micro, args))
            strategy.backward(loss, actor, optimizer, denominator=items)
            strategy.optimizer_step(optimizer, actor, name="actor", boundary=micro_batch.last)
            sums["divergence"] += divergence.item()
            sums["items"] += items.item()
        sums["tokens"] += sum(lengths)
        sums["planned"] += sum(micro_batch.tokens for micro_batch in plan)
        sums["fixed"] += tokens_of_fixed(lengths, args.max_tokens_per_micro_batch)
    sums = {name: value / strategy.sequence_parallel.size for name, value in strategy.all_reduce(sums, "sum").items()}
    planned, fixed = (sums[name] - sums["tokens"] for name in ("planned", "fixed"))
    return {
        "kl": sums["divergence"] / max(1.0, sums["items"]),
        "tokens": sums["tokens"],
        "padding": {"planned": planned, "fixed": fixed, "fraction": planned / max(1.0, sums["tokens"])},
    }


def tokens_of_fixed(lengths: Sequence[int], max_tokens: int) -> int:
    """Return the tokens, padding included, of micro-batches in order, each of as many sequences as fit for certain."""
    size = max_tokens // max(lengths, default=1)
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return sum(len(batch) * max(batch) for batch in batches)


def micro_batch_of(
    batch: dict[str, torch.Tensor], rows: Sequence[int], device: torch.device
) -> dict[str, torch.Tensor]:
    """Return ``rows`` of the batch, without columns that are all padding, with masks of tokens and of response tokens."""
    micro = {name: tensor[rows].to(device) for name, tensor in batch.items()}
    columns_T = torch.arange(int(batch["lengths"][rows].max()), device=device)
    micro |= {name: micro[name][:, : len(columns_T)] for name in ("tokens", "old_logprobs")}
    micro["mask"] = columns_T < micro["lengths"][:, None]
    micro["in_response"] = micro["mask"] & (columns_T >= micro["prompt_lengths"][:, None])
    return micro


def response_logprobs(strategy: StrategyBase, model: PreTrainedModel, micro: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the log-probability of each response token, (B, T - 1); 0 elsewhere, where the LM head does not run."""
    targets_BT = micro["tokens"].where(micro["in_response"], NOT_PREDICTED)
    return strategy.token_log_probs(model, micro["tokens"], micro["mask"].long(), targets=targets_BT[:, 1:]).log_probs


def grpo_loss(
    logprobs_BT: torch.Tensor, micro: dict[str, torch.Tensor], args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss and the KL divergence, summed over tokens, and the number of items that they are sums over.

    An item is a token of a response. With ``--loss-normalisation sequence`` it is a response: the tokens of each together
    weigh 1.
    """
    mask_BT = micro["in_response"][:, 1:]
    share_BT = mask_BT / mask_BT.sum(dim=1, keepdim=True) if args.loss_normalisation == "sequence" else mask_BT.float()
    ratio_BT = (logprobs_BT - micro["old_logprobs"][:, 1:]).exp()
    advantages_B1 = micro["advantages"][:, None]
    gain_BT = torch.minimum(ratio_BT * advantages_B1, ratio_BT.clamp(1 - CLIP, 1 + CLIP) * advantages_B1)
    difference_BT = micro["initial_logprobs"] - logprobs_BT
    divergence_BT = difference_BT.exp() - difference_BT - 1  # k3: unbiased, and never negative
    loss = (share_BT * (KL_WEIGHT * divergence_BT - gain_BT)).sum()
    return loss, (share_BT * divergence_BT.detach()).sum(), share_BT.sum()


# The script


def shuffled(training: Sequence[Question], seed: int, count: int) -> list[Question]:
    """Return at least ``count`` questions: epochs of all questions, each in a new random order."""
    stream = random.Random(seed)
    deck: list[Question] = []
    while len(deck) < count:
        deck += stream.sample(training, len(training))
    return deck


def title(args: argparse.Namespace, strategy: StrategyBase) -> str:
    shared = f", {args.sp_size} to a sequence" if args.sp_size > 1 else ""
    return f"{strategy.name}, {strategy.world_size} rank{'s' * (strategy.world_size > 1)}{shared}, {args.engine_type}"


def arguments() -> argparse.Namespace:
    parser = StrategyConfig.add_arguments(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--pretrain", required=True, help="directory of the model to train")
    parser.add_argument("--steps", type=count, default=8, help="rollouts")
    parser.add_argument("--prompts", type=count, default=16, help="questions of one rollout")
    parser.add_argument("--updates-per-rollout", type=count, default=2)
    parser.add_argument(
        "--max-tokens-per-micro-batch",
        type=count,
        default=256,
        help="sequences x longest, prompts and padding included",
    )
    parser.add_argument(
        "--loss-normalisation", choices=("token", "sequence"), default="token",
        help="mean over all tokens of an update, or over sequences of the means over their tokens",
    )  # fmt: skip
    parser.add_argument("--eval-every", type=count, default=2, help="steps between measurements on held-out questions")
    parser.add_argument("--engine", dest="engine_type", default="transformers", help="rollout engine")
    parser.set_defaults(
        strategy="fsdp", engine_type="transformers", bf16=False, train_batch_size=32, micro_train_batch_size=16,
        actor_learning_rate=2e-5, fused_linear_logprob=True, log_dir="runs/rlvr_arithmetic",
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
