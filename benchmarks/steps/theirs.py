"""The training step of Hugging Face's Trainer under DeepSpeed, without the Trainer.

The DeepSpeed config is the ZeRO-3 example of transformers' documentation; transformers' own code fills in its ``auto``
values. ``zero_allow_untested_optimizer`` and ``steps_per_print`` are accelerate's. The optimizer is the Trainer's
default (torch's fused AdamW) with the Trainer's two parameter groups. Loss and order of calls follow
``Trainer.training_step`` and ``accelerate.utils.DeepSpeedEngineWrapper``.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmscale.dist import World, start_deepspeed

LEARNING_RATE = 1e-12
"""Too small to change float32 weights, so that the losses of any step can be compared."""
DOCUMENTED: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""Source: transformers' documentation, "DeepSpeed", the example for ZeRO-3."""


def trainer_config(model: Any, zero_stage: int, precision: str, world_size: int) -> dict[str, Any]:
    """Return the config that the Trainer passes to ``deepspeed.initialize``.

    At stage 0 ``zero_optimization`` contains the stage only.
    """
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    class Filled(HfTrainerDeepSpeedConfig):
        """Config look-ups that accelerate would supply; this benchmark does not need accelerate."""

        def __init__(self, config: dict[str, Any]) -> None:
            self.config, self._dtype, self.mismatches = config, None, []

        def find_config_node(self, ds_key_long: str) -> tuple[Any, str]:
            *nodes, key = ds_key_long.split(".")
            block: Any = self.config
            for node in nodes:
                block = None if block is None else block.get(node)
            return block, key

        def get_value(self, ds_key_long: str, default: Any = None) -> Any:
            block, key = self.find_config_node(ds_key_long)
            return default if block is None else block.get(key, default)

        def is_true(self, ds_key_long: str) -> bool:
            return bool(self.get_value(ds_key_long))

        def is_zero3(self) -> bool:
            return self.get_value("zero_optimization.stage") == 3

    config = copy.deepcopy(DOCUMENTED)
    zero = config["zero_optimization"] if zero_stage else {}
    config["zero_optimization"] = {"stage": zero_stage, **zero}
    arguments = SimpleNamespace(
        world_size=world_size,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_grad_norm=1.0,
        learning_rate=LEARNING_RATE,
        adam_beta1=0.9,
        adam_beta2=0.95,
        adam_epsilon=1e-8,
        weight_decay=0.1,
        save_on_each_node=False,
        fp16=False,
        fp16_full_eval=False,
        bf16=precision == "bf16",
        bf16_full_eval=False,
        get_warmup_steps=lambda steps: 0,
    )
    filled = Filled(config)
    filled.trainer_config_process(arguments)
    filled.trainer_config_finalize(arguments, model, num_training_steps=1000)
    return filled.config | {"zero_allow_untested_optimizer": True, "steps_per_print": float("inf")}


class TheirEngine:
    """A Hugging Face model in the DeepSpeed engine of its Trainer. All ranks must make the same calls."""

    def __init__(self, model: Any, zero_stage: int, precision: str, world: World) -> None:
        start_deepspeed(world)
        import deepspeed

        self.world = world
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
        config = trainer_config(model, zero_stage, precision, world.world_size)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.engine.train()

    def train_step(self, batch: dict[str, Tensor], global_weight: float) -> float:
        """Run one step on one microbatch; return this rank's part of the mean loss over all ranks."""
        loss = self.engine(**batch, num_items_in_batch=torch.tensor(global_weight)).loss
        self.engine.set_gradient_accumulation_boundary(is_boundary=True)
        # As in the Trainer: the sum is divided by the tokens of all ranks, and DeepSpeed divides by the ranks again.
        self.engine.backward(loss * self.world.world_size, scale_wrt_gas=False)
        self.engine.step()
        return float(loss.detach())

    def close(self) -> None:
        """Remove DeepSpeed's hooks from the model."""
        self.engine.destroy()


def parameters_of(model: nn.Module) -> int:
    """Count the values of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
