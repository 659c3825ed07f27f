"""`DeepspeedStrategy`: DeepSpeed ZeRO behind the contract of `StrategyBase`.

Chooses the ZeRO stage; each stage is a backend (`lightrft.deepspeed.zero_backend` and its neighbours). Only
`make_backend` loads DeepSpeed.
"""

from typing import Any

from typing_extensions import override

from lightrft.config import StrategyConfig
from lightrft.deepspeed import ds_config, patches, stage_limits
from lightrft.deepspeed.ds_environment import prepare_environment
from lightrft.strategy import StrategyBase
from lightrft.strategy.backend import Backend, World


class DeepspeedStrategy(StrategyBase):
    """ZeRO stages 0 to 3, on CPU and CUDA.

    A prepared model is the caller's own object, not a wrapper. At stages 1 to 3 with ``bf16``, DeepSpeed stores a model
    in training in bfloat16, its frozen parameters included, and keeps fp32 master weights of what trains. Stage 0 and
    models that do not train run under autocast and keep their type.
    """

    name = "deepspeed"
    supported_settings = frozenset({"zero_stage", "zpg", "overlap_comm", "grad_accum_dtype", "adam_offload"})

    @override
    def make_backend(self, config: StrategyConfig, world: World) -> Backend:
        """Make the backend of the setting ``zero_stage``. All ranks must call this.

        Raises:
            ConfigError: The stage does not support a setting, or the environment names another device.
            StrategyError: The installed DeepSpeed lacks something that the backend uses.
        """
        config = stage_limits.validate(config, world)
        prepare_environment(config, world)
        patches.require_deepspeed(adam_offload=config.adam_offload and config.zero_stage > 0)
        from lightrft.deepspeed.zero0_backend import Zero0Backend
        from lightrft.deepspeed.zero1_backend import Zero1Backend, Zero2Backend
        from lightrft.deepspeed.zero3_backend import Zero3Backend

        backend_class = (Zero0Backend, Zero1Backend, Zero2Backend, Zero3Backend)[config.zero_stage]
        return backend_class(config, world, train_config=self.get_ds_train_config, eval_config=self.get_ds_eval_config)

    @property
    def stage(self) -> int:
        """The setting ``zero_stage``, under LightRFT's name for it."""
        return self.config.zero_stage

    @override
    def get_ds_train_config(self, is_actor: bool = False) -> dict[str, Any]:
        """Return DeepSpeed's configuration of a model in training.

        A subclass that overrides this may add options of DeepSpeed. Called once for each model, as it is prepared.

        Args:
            is_actor: Has no effect; accepted because LightRFT's scripts pass it.
        """
        return ds_config.train_config(self.config, pin_memory=self.world.device.type == "cuda")

    @override
    def get_ds_eval_config(self, offload: bool = False) -> dict[str, Any]:
        """Return DeepSpeed's configuration of a model that does not train. A subclass may override this.

        Args:
            offload: Keep the model's shards in host memory.
        """
        return ds_config.eval_config(self.config, offload=offload, pin_memory=self.world.device.type == "cuda")
