"""Training scripts as LightRFT writes them, with its arguments and the forms of its calls: PPO, GRPO and a reward model.

They are what a rank does in the tests of every strategy. Models, data and losses are small; the calls of the strategy and
their order are those of LightRFT's ``train_colocate.py`` and ``train_grm_vl.py``, and of the trainers that these use.
"""

import itertools
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from llamas import llama
from torch import nn
from torch.utils.data import Sampler

from lightrft.strategy import StrategyBase, get_strategy
from lightrft.strategy.rollout.fake_engine import FakeEngine

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()  # its monitor is a thread that stays
PROMPTS = [[3 + index, 5, 3 + (index * 7) % 13] for index in range(8)]
TEXTS = [[3 + (index * 5) % 13, 4, 9, 3 + (index * 3) % 14] for index in range(16)]
NEW_TOKENS = 4


def arguments(folder: Path, **given: Any) -> Namespace:
    """What the parser of ``train_colocate.py`` gives, with small numbers; ``folder`` has the pretrained model."""
    return Namespace(
        **{
            "pretrain": str(folder / "pretrain"), "critic_pretrain": None, "reward_pretrain": None, "remote_rm_url": None,
            "save_path": str(folder / "saved"), "ckpt_path": str(folder / "checkpoints"), "load_checkpoint": False,
            "max_ckpt_num": 3, "max_ckpt_mem": 1e8, "save_hf_ckpt": True, "disable_ds_ckpt": False,
            "engine_type": "fake", "engine_tp_size": 1, "enable_engine_sleep": True,
            "fsdp": False, "use_mp_opt": False, "fsdp_cpu_offload": False, "mixed_mm_data": False, "sp_size": 1,
            "zero_stage": 2, "zpg": 1, "grad_accum_dtype": None, "overlap_comm": False, "adam_offload": False,
            "bf16": False, "local_rank": -1, "seed": 42, "meta_init": False, "gradient_checkpointing": True,
            "micro_train_batch_size": 1, "train_batch_size": 4, "micro_rollout_batch_size": 2, "rollout_batch_size": 4,
            "num_episodes": 2, "max_epochs": 1, "n_samples_per_prompt": 1, "max_norm": 1.0, "l2": 0.01,
            "actor_learning_rate": 1e-2, "critic_learning_rate": 2e-2, "lr_warmup_ratio": 0.03, "adam_betas": (0.9, 0.95),
            "advantage_estimator": "gae", "use_kl_loss": False, "kl_estimator": "k1", "init_kl_coef": 0.1,
            "pretrain_data": None, "enable_ema": False, "freeze_prefix": False, "fused_linear_logprob": False,
            "reward_running_norm": False, "plot_every": 10, "use_tensorboard": None, "device": "cpu",
            **given,
        }
    )  # fmt: skip


# Models


def loads_sharded(ds_config: dict[str, Any] | None) -> Any:
    """As LightRFT's models do at ZeRO-3: transformers builds models sharded while the result is alive."""
    if ds_config is None or ds_config["zero_optimization"]["stage"] != 3:
        return None
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    return HfDeepSpeedConfig(ds_config)


class Actor(nn.Module):
    """A language model that gives log-probabilities of the last tokens."""

    def __init__(self, pretrain: str, ds_config: dict[str, Any] | None = None) -> None:
        super().__init__()
        _ = loads_sharded(ds_config)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            pretrain, trust_remote_code=True, attn_implementation="eager", dtype=torch.float32
        )
        self.model.config.use_cache = False

    def forward(
        self, sequences: torch.Tensor, num_actions: int, attention_mask: torch.Tensor, return_output: bool = False
    ) -> Any:
        position_ids = attention_mask.long().cumsum(-1) - 1
        output = self.model(sequences, attention_mask=attention_mask, position_ids=position_ids)
        log_probs = output["logits"][:, :-1].log_softmax(-1).gather(2, sequences[:, 1:, None]).squeeze(2)
        return (log_probs[:, -num_actions:], output) if return_output else log_probs[:, -num_actions:]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)


class Critic(transformers.LlamaPreTrainedModel):  # type: ignore[misc]
    """A value for each of the last tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = transformers.LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, sequences: torch.Tensor, num_actions: int, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.model(sequences, attention_mask=attention_mask).last_hidden_state
        values: torch.Tensor = self.score(states).squeeze(-1)[:, :-1]
        return values[:, -num_actions:]


def critic_of(pretrain: str, ds_config: dict[str, Any] | None) -> Any:
    """A critic with a new head, initialised as LightRFT does."""
    sharded = loads_sharded(ds_config)
    model = Critic.from_pretrained(pretrain, attn_implementation="eager", dtype=torch.float32)
    weight, start = model.score.weight, torch.linspace(-0.3, 0.3, model.config.hidden_size)[None]
    if sharded is None:
        weight.data.copy_(start)
    else:
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                weight.data.copy_(start)
    return model


class LeaderEngine(FakeEngine):
    """An engine that only the first of the ranks that share it holds."""

    leader_only = True


# Trainer


class SamplingParams:
    """Of vLLM: attributes, with a default for each."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(n=1, temperature=1.0, top_p=1.0, top_k=0, max_tokens=16, min_tokens=0, ignore_eos=False)
        self.__dict__.update(skip_special_tokens=True, include_stop_str_in_output=False, truncate_prompt_tokens=None)
        self.__dict__.update(spaces_between_special_tokens=True, detokenize=True, logprobs=None, **given)


@dataclass
class Outcome:
    """The results of a script."""

    prompts: list[list[int]] = field(default_factory=list)
    """Those that this rank completed."""
    rewards: list[float] = field(default_factory=list)
    """The mean of each rollout, over all ranks."""
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    status: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Trainer:
    """PPO with a critic, or GRPO without: what the trainers of LightRFT call, in their order."""

    strategy: StrategyBase
    actor: Any
    critic: Any
    reward_model: Any
    initial_model: Any
    ema_model: Any
    actor_optim: Any
    critic_optim: Any
    actor_scheduler: Any
    critic_scheduler: Any
    pretrain_dataloader: Any
    outcome: Outcome = field(default_factory=Outcome)

    def fit(self, args: Namespace, prompts_dataloader: Any, consumed_samples: int, rollouts: int | None) -> None:
        """All episodes; ``rollouts`` stops after so many."""
        from lightrft.utils import DistributedSampler  # type: ignore[import-not-found]

        per_episode = len(PROMPTS) // args.rollout_batch_size
        steps = consumed_samples // args.rollout_batch_size + 1
        start_episode = consumed_samples // args.rollout_batch_size // per_episode
        consumed_samples = consumed_samples % (per_episode * args.rollout_batch_size)
        for episode in range(start_episode, args.num_episodes):
            if isinstance(prompts_dataloader.sampler, DistributedSampler):
                prompts_dataloader.sampler.set_epoch(
                    episode, consumed_samples=0 if episode > start_episode else consumed_samples
                )
            for prompts in prompts_dataloader:
                items = self.make_experience_list(prompts, steps)
                self.outcome.status.append(self.ppo_train(args, items))
                self.save_checkpoints(args, steps)
                if steps == rollouts:
                    return
                steps += 1

    @torch.no_grad()
    def make_experience_list(self, prompts: list[list[int]], step: int) -> list[dict[str, Any]]:
        strategy, args = self.strategy, self.strategy.args
        assert strategy.inference_engine is not None, "Inference engine required"
        engine: Any = strategy.inference_engine
        longest = min(8192, engine.llm_engine.model_config.max_model_len)
        shared = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "ignore_eos": True, "skip_special_tokens": False}
        of_vllm = SamplingParams(
            **shared,
            max_tokens=NEW_TOKENS,
            min_tokens=1,
            include_stop_str_in_output=True,
            truncate_prompt_tokens=longest,
        )
        of_sglang = {
            **shared, "n": 1, "max_new_tokens": NEW_TOKENS, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "repetition_penalty": 1.0, "spaces_between_special_tokens": True,
        }  # fmt: skip
        outputs = strategy.gather_and_generate(
            sampling_params=of_vllm if step % 2 else of_sglang, all_prompt_token_ids=prompts, all_prompts=None,
            sleep_engine=args.enable_engine_sleep, all_images=None, all_videos=None, images_num=None, videos_num=None,
        )  # fmt: skip
        self.outcome.prompts += prompts
        outputs = strategy.sp_data_processor.preprocess(outputs)
        sequences = torch.tensor([output.prompt_token_ids + list(output.output_token_ids) for output in outputs])
        batch = {"sequences": sequences.to(strategy.device), "num_actions": NEW_TOKENS}
        batch["attention_mask"] = torch.ones_like(batch["sequences"])
        self.actor.eval()
        action_log_probs = self.actor(**batch)
        strategy.reload_model(self.initial_model)
        base_action_log_probs = self.initial_model(**batch)
        strategy.offload_model(self.initial_model)
        for reward_model in self.reward_model:
            strategy.reload_model(reward_model)
        scores = sum(reward_model(**batch).mean(1) for reward_model in self.reward_model)
        for reward_model in self.reward_model:
            strategy.offload_model(reward_model)
        rewards = (batch["sequences"][:, -NEW_TOKENS:] % 3 == 0).float().mean(1) + 0.1 * scores
        everybodys = strategy.all_gather(rewards)
        self.outcome.rewards.append(everybodys.mean().item())
        rewards = (rewards - everybodys.mean()) / (everybodys.std() + 1e-6)
        advantages = rewards[:, None] - args.init_kl_coef * (action_log_probs - base_action_log_probs)
        if self.critic is not None:
            self.critic.eval()
            values = self.critic(**batch)
            advantages, returns = advantages - values, advantages
        else:
            values = returns = torch.zeros_like(advantages)
        strategy.report_memory("after rollout engine generation")
        names = {"old": action_log_probs, "advantages": advantages, "values": values, "returns": returns}
        rows = {**names, "sequences": batch["sequences"], "attention_mask": batch["attention_mask"]}
        items = [{name: tensor[row : row + 1] for name, tensor in rows.items()} for row in range(len(outputs))]
        return strategy.sp_data_processor.postprocess(items)

    def ppo_train(self, args: Namespace, items: list[dict[str, Any]]) -> dict[str, float]:
        self.strategy.maybe_load_optimizer(self.actor_optim)
        status_mean: dict[str, float] = {}
        for _, item in itertools.product(range(args.max_epochs), items):
            status = self.training_step_actor(item)
            if self.critic is not None:
                status.update(self.training_step_critic(item))
            status["response_length"] = float(NEW_TOKENS)
            status["kl"] *= status["response_length"]
            status = self.strategy.all_reduce(status)
            status["kl"] /= status["response_length"]
            status_mean = {name: status_mean.get(name, 0.0) + value / len(items) for name, value in status.items()}
        self.strategy.maybe_offload_optimizer(self.actor_optim)
        self.strategy.print("PPO Train TIMECOST")
        self.strategy.update_engine_weights(self.actor)
        return status_mean

    def training_step_actor(self, item: dict[str, Any]) -> dict[str, float]:
        self.actor.train()
        action_log_probs, _ = self.actor(
            item["sequences"], NEW_TOKENS, attention_mask=item["attention_mask"], return_output=True
        )
        ratio = (action_log_probs - item["old"]).exp()
        advantages = item["advantages"]
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        self.strategy.backward(loss, self.actor, self.actor_optim)
        if self.pretrain_dataloader is not None:
            texts = torch.tensor(next(self.pretrain_dataloader), device=self.strategy.device)
            log_probs = self.actor(texts, texts.shape[1] - 1, attention_mask=torch.ones_like(texts))
            self.strategy.backward(0.05 * -log_probs.mean(), self.actor, self.actor_optim)
        self.strategy.optimizer_step(self.actor_optim, self.actor, self.actor_scheduler, name="actor")
        if self.ema_model:
            self.strategy.moving_average(self.actor, self.ema_model, 0.5, self.strategy.device.type)
        kl = (action_log_probs - item["old"]).detach().mean().item()
        return {"policy_loss": loss.item(), "actor_lr": self.actor_scheduler.get_last_lr()[0], "kl": kl}

    def training_step_critic(self, item: dict[str, Any]) -> dict[str, float]:
        self.critic.train()
        values = self.critic(item["sequences"], num_actions=NEW_TOKENS, attention_mask=item["attention_mask"])
        loss = (values - item["returns"]).square().mean()
        self.strategy.backward(loss, self.critic, self.critic_optim)
        self.strategy.optimizer_step(self.critic_optim, self.critic, self.critic_scheduler, name="critic")
        return {"critic_loss": loss.item(), "critic_lr": self.critic_scheduler.get_last_lr()[0]}

    def save_checkpoints(self, args: Namespace, steps: int) -> None:
        tag, client_states = f"global_step{steps}", {"consumed_samples": steps * args.rollout_batch_size}
        limits = (args.max_ckpt_num, args.max_ckpt_mem)
        self.strategy.save_ckpt(self.actor.model, os.path.join(args.ckpt_path, "_actor"), tag, *limits, client_states)
        if self.critic is not None:
            self.strategy.save_ckpt(self.critic, os.path.join(args.ckpt_path, "_critic"), tag, *limits)
        if args.save_hf_ckpt:
            self.strategy.save_model(self.actor, None, os.path.join(args.ckpt_path, f"{tag}_hf"))


# Scripts


def models_of(args: Namespace, strategy: StrategyBase) -> tuple[Any, Any, Any, Any, Any]:
    """Actor, critic, reference, average and reward models; with ``fsdp``, actor and reference are prepared already."""
    ds_train_cfg: Any = strategy.get_ds_train_config(is_actor=True) if not args.fsdp else None
    ds_eval_cfg: Any = strategy.get_ds_eval_config(offload=False) if not args.fsdp else None
    with strategy.init_model_context(meta_init=args.meta_init):
        strategy.print(f"Initializing models with meta_init={args.meta_init}")
        actor: Any = Actor(args.pretrain, ds_config=ds_train_cfg)
    if args.fsdp:
        actor.is_actor = True
        actor = strategy.prepare_model(actor, is_training=True)
    if args.freeze_prefix:
        for name, param in actor.model.named_parameters():
            if name.startswith("model.layers.0"):
                param.requires_grad = False
    critic = critic_of(args.critic_pretrain, ds_train_cfg) if args.critic_pretrain else None
    initial_model: Any = Actor(args.pretrain, ds_config=ds_eval_cfg)
    if args.fsdp:
        initial_model = strategy.prepare_model(initial_model, is_training=False, shard_size=strategy.world_size)
        strategy.offload_model(initial_model)
    ema_model: Any = Actor(args.pretrain, ds_config=ds_eval_cfg) if args.enable_ema else None
    reward_models: Any = [Actor(args.pretrain, ds_config=ds_eval_cfg)]
    strategy.report_memory("after loaded reward models in main entry")
    return actor, critic, initial_model, ema_model, reward_models


def colocate(args: Namespace, rollouts: int | None = None) -> Outcome:
    """``train_colocate.py``: PPO if ``critic_pretrain`` is set, else GRPO. ``rollouts`` stops after so many."""
    with lightrft_utils(), get_strategy(args) as strategy:
        actor, critic, initial_model, ema_model, reward_models = models_of(args, strategy)
        pretrain_dataloader = None
        if args.pretrain_data:
            pretrain_dataloader = itertools.cycle(
                iter(strategy.setup_dataloader(TEXTS, args.micro_train_batch_size, True, True, list))
            )
        prompts_dataloader = strategy.setup_dataloader(
            PROMPTS, args.rollout_batch_size // strategy.world_size, True, True, collate_fn=list
        )
        max_steps = len(PROMPTS) // args.train_batch_size * args.max_epochs * args.num_episodes
        actor.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (
            (actor, actor_optim, actor_scheduler),
            (critic, critic_optim, critic_scheduler),
            reward_models,
            initial_model,
        ) = strategy.prepare_models_and_optimizers(actor, critic, reward_models, initial_model, args, max_steps)
        if ema_model:
            ema_model._offload = True
            ema_model = strategy.prepare(ema_model, is_rlhf=True)

        consumed_samples = 0
        if args.load_checkpoint and os.path.exists(os.path.join(args.ckpt_path, "_actor")):
            _, states = strategy.load_ckpt(
                actor.model, os.path.join(args.ckpt_path, "_actor"), optimizer=actor_optim, scheduler=actor_scheduler
            )
            if args.critic_pretrain:
                strategy.load_ckpt(critic, os.path.join(args.ckpt_path, "_critic"))
            consumed_samples = states["consumed_samples"]
        strategy.setup_inference_engine(args, engine_type=args.engine_type, actor=actor)
        trainer = Trainer(
            strategy, actor, critic, reward_models, initial_model, ema_model, actor_optim, critic_optim, actor_scheduler,
            critic_scheduler, pretrain_dataloader,
        )  # fmt: skip
        trainer.fit(args, prompts_dataloader, consumed_samples, rollouts)
        strategy.save_model(ema_model if args.enable_ema else actor, None, args.save_path)
        if args.critic_pretrain:
            strategy.save_model(critic, None, args.save_path + "_critic")
        trainer.outcome.weights = weights_of(strategy, actor)
        return trainer.outcome


def weights_of(strategy: StrategyBase, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a prepared model, as it is saved."""
    return {name: tensor.clone() for bucket in strategy.full_parameters(model) for name, tensor in bucket}


def reward_model(args: Namespace) -> Outcome:
    """``train_grm_vl.py``: a generative reward model, which is marked as an actor only to be saved."""
    with lightrft_utils(), get_strategy(args) as strategy:
        ds_train_cfg: Any = strategy.get_ds_train_config(is_actor=True) if not args.fsdp else None
        model: Any = Actor(args.pretrain, ds_config=ds_train_cfg)
        loader = strategy.setup_dataloader(TEXTS, batch_size=1, pin_memory=True, shuffle=True, collate_fn=list)
        model, optimizer, scheduler = strategy.prepare_reward_model(model, args=args, max_steps=4)
        outcome, step, consumed_samples = Outcome(), 1, 0
        if args.load_checkpoint and os.path.exists(args.ckpt_path):
            _, states = strategy.load_ckpt(model, args.ckpt_path)
            consumed_samples = states["consumed_samples"]
        loader.sampler.set_epoch(0, consumed_samples=consumed_samples)  # type: ignore[attr-defined]
        model.train()
        for batch in loader:
            texts = torch.tensor(batch, device=strategy.device)
            loss = -model(texts, texts.shape[1] - 1, attention_mask=torch.ones_like(texts)).mean()
            strategy.backward(loss, model, optimizer)
            strategy.optimizer_step(optimizer, model, scheduler)
            logs = {"loss": loss.item(), "lr": scheduler.get_last_lr()[0]}
            outcome.status.append({name: strategy.all_reduce(value) for name, value in logs.items()})
            if step % strategy.accumulated_gradient == 0:
                global_step = step // strategy.accumulated_gradient
                states = {"consumed_samples": global_step * args.train_batch_size}
                strategy.save_ckpt(
                    model, args.ckpt_path, f"global_step{global_step}", args.max_ckpt_num, args.max_ckpt_mem, states
                )
            step += 1
        model.is_actor = True  # To unwrap the base model correctly
        strategy.save_model(model, None, args.save_path + "/final_checkpoint")
        outcome.weights = weights_of(strategy, model)
        return outcome


@contextmanager
def lightrft_utils() -> Iterator[None]:
    """``lightrft.utils`` as LightRFT's clone has it, as far as its trainers use it here."""

    class DistributedSampler(Sampler[int]):
        """The strategy's sampler is an instance of it."""

    module: Any = ModuleType("lightrft.utils")
    module.DistributedSampler = DistributedSampler
    sys.modules["lightrft.utils"] = module
    try:
        yield
    finally:
        del sys.modules["lightrft.utils"]


def pretrained(folder: Path) -> Path:
    """``folder`` with the pretrained model of the scripts."""
    llama().save_pretrained(folder / "pretrain")
    return folder
