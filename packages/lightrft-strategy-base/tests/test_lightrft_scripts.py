"""What LightRFT's scripts ask of a strategy beyond its API: attributes, types, the form of arguments and results."""

import sys
import warnings
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import lightrft_checks
import pytest
import torch
from export_models import llama
from torch import nn
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM

from lightrft.config import ArgumentError, ArgumentTypeError, EngineError, StrategyConfig
from lightrft.strategy import Completion, EngineBase, EngineCapabilities, FakeStrategy, Prompt, Sampling, get_strategy
from lightrft.strategy.rollout.engine import is_engine
from lightrft.strategy.rollout.engine_placeholder import EnginePlaceholder
from lightrft.strategy.rollout.rollout import _digest


class Wrapper(nn.Module):
    """As LightRFT wraps a model."""

    def __init__(self, head: bool = False):
        super().__init__()
        self.model = llama()
        if head:
            self.head = nn.Linear(2, 1)

    def forward(self, tokens_BT):
        return self.model(tokens_BT).logits


class Echo(EngineBase):
    """Completes each prompt with its last token, and remembers the prompts."""

    capabilities = EngineCapabilities(multimodal=True, audio=True)
    expected_weights = None

    def __init__(self):
        super().__init__(has_weights=True)
        self.prompts = []

    @classmethod
    def build(cls, request):
        return cls()

    def _generate(self, prompts, sampling):
        self.prompts += prompts
        return [completion((prompt.token_ids or (0,)), (prompt.token_ids or (0,))[-1:]) for prompt in prompts]

    def _load(self, buckets):
        for _ in buckets:
            pass

    def _sleep(self, level):
        pass

    def _wake(self, parts):
        pass

    def _shutdown(self):
        pass


def completion(prompt, output):
    return Completion(
        prompt_token_ids=prompt, output_token_ids=output, logprobs=None, finish_reason="stop", weight_version=0
    )


@pytest.fixture
def strategy():
    with FakeStrategy(bf16=False, train_batch_size=1) as made:
        yield made


# Settings


def script_args(**more):
    return Namespace(strategy="fake", bf16=False, train_batch_size=1, fsdp=False, **more)


def test_a_path_as_critic_pretrain_trains_the_critic_and_args_keep_it():
    args = script_args(critic_pretrain="some/critic")
    with get_strategy(args) as made:
        actor, critic = nn.Linear(2, 2), nn.Linear(2, 1)
        _, (_, optimizer, scheduler), _, _ = made.prepare_models_and_optimizers(actor, critic, None, None, args, 10)
        assert optimizer is not None and scheduler is not None
        assert made.args.critic_pretrain == "some/critic"


@pytest.mark.parametrize("nothing", [None, "", False])
def test_no_path_as_critic_pretrain_leaves_the_critic_as_it_is(nothing):
    with get_strategy(script_args(critic_pretrain=nothing)) as made:
        _, critic, _, _ = made.prepare_models_and_optimizers(
            nn.Linear(2, 2), nn.Linear(2, 1), None, None, made.args, 10
        )
        assert critic[1:] == (None, None)


def test_settings_that_only_a_trainer_reads_are_named_once_in_one_line():
    given = script_args(plot_every=10, use_tensorboard="runs", advantage_estimator="gae", n_samples_per_prompt=8)
    with pytest.warns(UserWarning, match="which only stores them") as seen:
        get_strategy(given).close()
    assert [str(warning.message) for warning in seen] == [
        "get_strategy: advantage_estimator, plot_every, use_tensorboard have no effect on the strategy, which only stores them in "
        "strategy.config for a trainer such as LightRFT's"
    ]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(2):
            get_strategy(given).close()
    assert len(seen) == 1


def test_every_setting_of_a_trainer_says_so():
    described = {
        name: "Read by LightRFT's trainer" in (field.description or "")
        for name, field in StrategyConfig.model_fields.items()
        if StrategyConfig.owner(name) == "trainer" and name not in ("extra_args", "fused_linear_logprob")
    }
    assert described and all(described.values())


def test_settings_are_attributes_too(strategy):
    names = ["seed", "max_norm", "micro_train_batch_size", "train_batch_size", "bf16", "adam_offload", "zpg",
             "grad_accum_dtype", "overlap_comm", "engine_type"]  # fmt: skip
    assert {name: getattr(strategy, name) for name in names} == {name: getattr(strategy.config, name) for name in names}
    with pytest.raises(AttributeError):
        strategy.seed = 1


def test_without_deepspeed_there_is_no_configuration_of_it(strategy):
    assert strategy.get_ds_train_config(is_actor=True) is None
    assert strategy.get_ds_eval_config(offload=False) is None


# Preparing


def test_a_model_that_was_prepared_before_gets_its_optimizer_and_schedule(strategy):
    actor = Wrapper()
    actor.is_actor = True
    actor = strategy.prepare_model(actor, is_training=True)
    (same, optimizer, scheduler), _, _, _ = strategy.prepare_models_and_optimizers(
        actor, None, [], None, strategy.args, 10
    )
    assert same is actor
    rate = scheduler.get_last_lr()
    strategy.backward(actor(torch.tensor([[1, 2, 3]])).mean(), actor, optimizer)
    assert strategy.optimizer_step(optimizer, actor, scheduler, name="actor").applied
    assert scheduler.get_last_lr() != rate


def test_an_average_that_is_still_wrapped_moves_without_gathering(strategy, monkeypatch):
    actor, average = Wrapper(), Wrapper()
    before = [parameter.detach().clone() for parameter in average.parameters()]
    (actor, optimizer, scheduler), _, _, _ = strategy.prepare_models_and_optimizers(
        actor, None, [], None, strategy.args, 10
    )
    optimizer.param_groups[0]["lr"] = 0.1
    average = strategy.prepare(average, is_rlhf=True)
    strategy.backward(actor(torch.tensor([[1, 2, 3]])).square().mean(), actor, optimizer)
    strategy.optimizer_step(optimizer, actor, scheduler)
    monkeypatch.setattr(strategy.backend, "gathered", None)
    strategy.moving_average(actor, average, 0.75, "cpu")
    for old, new, averaged in zip(before, actor.model.parameters(), average.parameters(), strict=True):
        assert torch.allclose(averaged, 0.75 * old + 0.25 * new)
    assert any(not torch.equal(old, averaged) for old, averaged in zip(before, average.parameters(), strict=True))


@pytest.mark.parametrize("marked", [False, True])
def test_a_wrapped_model_is_saved_as_the_model_in_it(strategy, tmp_path, marked):
    wrapper = strategy.prepare(Wrapper())
    if marked:
        wrapper.is_actor = True  # as scripts of reward models do before they save
    path = strategy.save_model(wrapper, None, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in wrapper.model.state_dict().items())
    streamed = {name for bucket in strategy.full_parameters(wrapper) for name, _ in bucket}
    assert "model.embed_tokens.weight" in streamed
    with torch.no_grad():
        wrapper.model.model.embed_tokens.weight.zero_()
    strategy.load_model(wrapper, path)
    assert torch.equal(wrapper.model.model.embed_tokens.weight, opened["model.embed_tokens.weight"])


def test_a_wrapper_with_a_head_is_saved_with_its_head_unless_it_is_marked(strategy, tmp_path):
    wrapper = strategy.prepare(Wrapper(head=True))
    strategy.save_model(wrapper, None, tmp_path / "whole")
    assert not (tmp_path / "whole" / "config.json").exists()
    wrapper.is_actor = True
    with pytest.warns(UserWarning, match=r"only its .model is written, without head.weight, head.bias \(2 outside"):
        strategy.save_model(wrapper, None, tmp_path / "inner")
    assert (tmp_path / "inner" / "config.json").exists()


# Data


def test_a_sampler_is_an_instance_of_lightrfts_if_a_script_imported_that(strategy, monkeypatch):
    class DistributedSampler(Sampler):
        def set_epoch(self, epoch, consumed_samples=0):
            raise AssertionError("the strategy's own is called")

    module = ModuleType("lightrft.utils")
    module.DistributedSampler = DistributedSampler
    before = strategy.setup_dataloader(list(range(8)), 2)
    assert not isinstance(before.sampler, DistributedSampler)
    monkeypatch.setitem(sys.modules, "lightrft.utils", module)
    loader = strategy.setup_dataloader(list(range(8)), 2, True, False)
    assert isinstance(loader.sampler, DistributedSampler)
    loader.sampler.set_epoch(1, consumed_samples=4)
    assert (loader.epoch, torch.cat(list(loader)).tolist()) == (1, [4, 5, 6, 7])


# Rollouts


def test_a_list_can_be_added_to_token_ids():
    one = completion((1, 2), [3])
    assert one.prompt_token_ids + list(one.output_token_ids) == [1, 2, 3]
    assert [0] * 2 + one.prompt_token_ids == [0, 0, 1, 2]
    assert one.prompt_token_ids + one.output_token_ids == (1, 2, 3) == (*one.prompt_token_ids, 3)
    assert hash(one) == hash(completion((1, 2), (3,)))


def test_the_sampling_parameters_of_lightrft_are_read():
    shared = {"n": 1, "temperature": 0.0, "max_new_tokens": 4, "skip_special_tokens": False}
    assert Sampling.of({**shared, "spaces_between_special_tokens": True}) == Sampling.of(shared)
    assert Sampling.of({"truncate_prompt_tokens": 8192}).truncate_prompt_tokens == 8192
    for value in (0, -1, "8"):
        with pytest.raises(ArgumentError, match="truncate_prompt_tokens"):
            Sampling(truncate_prompt_tokens=value)


def test_truncation_keeps_the_last_tokens_of_a_prompt():
    engine = Echo()
    done = engine.generate([Prompt(token_ids=(1, 2, 3)), Prompt(token_ids=(4,))], Sampling(truncate_prompt_tokens=2))
    assert [one.prompt_token_ids for one in done] == [(2, 3), (4,)]
    assert engine.generate([Prompt(text="ab")], Sampling(truncate_prompt_tokens=2))
    for prompt in (Prompt(text="abc"), Prompt(token_ids=(1, 2, 3), text="x", images=(1,))):
        with pytest.raises(EngineError, match=r"truncate_prompt_tokens=2 can shorten, got (text|media) in prompt 0"):
            engine.generate([prompt], Sampling(truncate_prompt_tokens=2))


def test_the_longest_sequence_is_where_vllm_has_it(strategy):
    engine = Echo()
    assert min(8192, engine.llm_engine.model_config.max_model_len) == 8192
    engine.max_model_len = 32
    assert engine.llm_engine.model_config.max_model_len == 32


def test_a_rank_whose_engine_is_on_another_rank_has_a_placeholder():
    placeholder = EnginePlaceholder(max_model_len=64)
    assert is_engine(placeholder) and placeholder.llm_engine.model_config.max_model_len == 64
    calls = {
        "generate": ([], Sampling()), "update_weights": ([],), "invalidate_weights": ("",), "sleep": (), "wake_up": (), "shutdown": (),
    }  # fmt: skip
    for call, arguments in calls.items():
        with pytest.raises(EngineError, match=rf"inference_engine.{call}: .* Call strategy.\w+ on all ranks"):
            getattr(placeholder, call)(*arguments)


def test_a_sync_without_an_engine_does_nothing_whatever_the_model(strategy, capsys):
    strategy.update_engine_weights(nn.Linear(1, 1))
    assert "update_engine_weights: there is no engine" in capsys.readouterr().out
    with pytest.raises(ArgumentTypeError, match="update_engine_weights: expected actor to be a torch Module"):
        strategy.update_engine_weights("actor")


def test_prompts_that_differ_in_audio_are_different_prompts():
    sounds = [[Prompt(text="hear", audios=((sound, 16000),))] for sound in ("one", "other")]
    assert [_digest(prompts, Sampling()) for prompts in sounds] == [None, None]
    assert _digest([Prompt(text="hear")], Sampling()) is not None


def test_a_script_replaces_how_prompts_with_media_are_built(strategy, monkeypatch):
    monkeypatch.setattr("lightrft.strategy.rollout.rollout.engine_class", lambda name: Echo)
    engine = strategy.setup_inference_engine()
    original, asked = strategy._build_multimodal_inputs, []

    def with_audio(all_prompts, all_images=None, images_num=None, all_videos=None, videos_num=None):
        asked.append((all_images, images_num))
        assert original(
            all_prompts=all_prompts, all_images=all_images, images_num=images_num, all_videos=None, videos_num=None
        )[0] == {"prompt": "hear", "multi_modal_data": {"image": ["sound"], "video": []}}
        return [
            {"prompt": text, "multi_modal_data": {"audio": [(audio, 16000)]}}
            for text, audio in zip(all_prompts, all_images, strict=True)
        ]

    strategy._build_multimodal_inputs = with_audio
    strategy.gather_and_generate(
        {"max_tokens": 1, "truncate_prompt_tokens": 8192}, [[1, 2]], ["hear"], ["sound"], images_num=[1]
    )
    strategy.gather_and_generate({"max_tokens": 1}, [[1, 2]])
    assert asked == [(["sound"], [1])]
    assert engine.prompts == [Prompt(text="hear", audios=(("sound", 16000),)), Prompt(token_ids=(1, 2))]
    engine.capabilities = EngineCapabilities(multimodal=True)
    with pytest.raises(EngineError, match="expected prompts without audio"):
        strategy.gather_and_generate({"max_tokens": 1}, [[1, 2]], ["hear"], ["sound"], images_num=[1])
    with pytest.raises(ArgumentError, match="multi_modal_data with image, video, audio, got 'smell'"):
        strategy.engine_generate_local({}, None, [{"prompt": "x", "multi_modal_data": {"smell": [1]}}])


# Checkpoints


def test_saving_within_an_update_names_the_remedy(tmp_path: Path):
    with FakeStrategy(bf16=False, train_batch_size=2) as made:
        model = nn.Linear(2, 1)
        optimizer = made.create_optimizer(model, lr=0.1)
        model, optimizer, _ = made.prepare((model, optimizer, None))
        made.backward(model(torch.ones(1, 2)).mean(), model, optimizer)
        made.optimizer_step(optimizer, model)
        with pytest.raises(Exception, match=r"1 of 2 micro-batches.*boundary=True to the last optimizer_step"):
            made.save_ckpt(model, tmp_path, "global_step1", 3, 1e8, {"consumed_samples": 1})
        made.backward(model(torch.ones(1, 2)).mean(), model, optimizer)
        made.optimizer_step(optimizer, model, boundary=True)
        made.save_ckpt(model, tmp_path, "global_step1", 3, 1e8, {"consumed_samples": 1})
        _, states = made.load_ckpt(model, tmp_path)
        assert states == {"consumed_samples": 1}


# Whole scripts


@pytest.mark.filterwarnings("ignore:get_strategy.*have no effect on the strategy:UserWarning")
@pytest.mark.parametrize("script", lightrft_checks.SCRIPTS)
def test_a_script_that_trains_with_rollouts(tmp_path, script):
    lightrft_checks.check_colocate(lightrft_checks.run_here, script, tmp_path, strategy="fake")


@pytest.mark.filterwarnings("ignore:get_strategy.*have no effect on the strategy:UserWarning")
def test_a_script_that_trains_a_reward_model(tmp_path):
    lightrft_checks.check_reward_model(lightrft_checks.run_here, tmp_path, strategy="fake")
