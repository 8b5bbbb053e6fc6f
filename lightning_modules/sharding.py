"""FSDP2 with the whole model as one unit, and which other strategies of Lightning a model can be trained with."""

from __future__ import annotations

from functools import partial

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

STEPS = ("training_step", "validation_step", "test_step", "predict_step")
"""Within these the weights are whole, whatever of the model they call."""

TO_DO = (
    "give --trainer.strategy ddp, or -c configs/fsdp.yaml (in a script strategy=lightning_modules.WholeModelSharded())"
)


class WholeModelSharded(ModelParallelStrategy):
    """Weights, gradients and the optimizer's state sharded over all processes, with the whole model as one unit.

    Before each step the weights are gathered, and after its backward pass the gradients are averaged as under DDP and
    their shards kept (``torch.distributed.fsdp.fully_shard``). Within a step weights are whole: an equilibrium is
    solved without a word between processes, which evaluate its cell differently often. So memory is saved on what is
    kept between steps, gradients and the optimizer's state above all. Checkpoints are single files like those of one
    process, which either kind of run goes on from.

    Args:
        process_group_backend: that of torch.distributed; by default nccl on GPUs and gloo elsewhere.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )

    def setup_environment(self) -> None:
        """Make one mesh of all processes, and have Lightning shard the module over it, where it is time to."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        module = self.lightning_module
        # Of the module itself it would tell callbacks of every run, whatever its strategy, that it may be sharded.
        assert module is not None  # noqa: S101 - for the type checker
        shard = partial(shard_whole, module, self.device_mesh["data_parallel"])
        module.configure_model = shard  # type: ignore[method-assign]


def shard_whole(module: pl.LightningModule, mesh: DeviceMesh) -> None:
    """Make ``module`` one unit of FSDP2, once, whose steps see whole weights."""
    if isinstance(module, FSDPModule):
        return
    fully_shard(module, mesh=mesh)
    for name in STEPS:
        register_fsdp_forward_method(module, name)


def class_of(thing: object) -> type:
    """The class of ``thing`` without what ``fully_shard`` makes of it."""
    cls = type(thing)
    return cls.__mro__[2] if isinstance(thing, FSDPModule) else cls


def refuse_other_strategies(trainer: pl.Trainer) -> None:
    """Raise where processes would wait for each other within a solve, or checkpoints would not be single files.

    Raises:
        MisconfigurationException: the trainer's strategy is neither one device, nor DDP, nor ours; or ours is asked for
            what it cannot do.
    """
    strategy = trainer.strategy
    given = type(strategy).__name__
    if isinstance(strategy, WholeModelSharded):
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise MisconfigurationException(
                "averages of weights (configs/ema.yaml) are a whole copy of the model, which Lightning does not keep "
                f"of sharded weights; given: {given}. Leave the averages out, or give --trainer.strategy ddp"
            )
        return
    if isinstance(strategy, ModelParallelStrategy):
        raise MisconfigurationException(
            "an equilibrium model is sharded as a whole, by data parallelism only: processes that share a layer, by "
            "tensor parallelism or as units of FSDP, would wait for each other at each evaluation of a cell, and they "
            f"evaluate it differently often; given: {given}, whose default is tensor parallelism, with a folder of "
            f"shards as a checkpoint. What is needed instead: {TO_DO}"
        )
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise MisconfigurationException(
            "of Lightning's strategies an equilibrium model takes one device, ddp and its variants, and FSDP2 with the "
            "whole model as one unit; others gather weights layer by layer, and processes that evaluate a cell "
            f"differently often would wait for each other; given: {given}. What is needed instead: {TO_DO}"
        )
