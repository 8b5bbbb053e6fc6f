"""FSDP2 with the whole model as one unit: two processes are one process on the joint batch; the rest is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import EMAWeightAveraging
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_modules import WholeModelSharded
from lightning_modules.sharding import class_of, refuse_other_strategies
from tests.command_line import same
from tests.lightning_modules import joint
from zoo.implicit import PhantomGradient

# From Python 3.12 a fork of a process with threads is warned of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
]


def under_torchrun(action: Callable[[], None]) -> None:
    """``action`` in two processes that are told what torchrun tells: Lightning itself would run the tests twice."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_process, args=(action, port), nprocs=2, start_method="fork")


def _process(rank: int, action: Callable[[], None], port: int) -> None:
    torch.set_num_threads(1)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in told.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="here")
    action()


class Keep(joint.KeepWeights):
    """The weights, a checkpoint, and what was measured."""

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        super().on_train_end(trainer, module)
        trainer.save_checkpoint(self.folder / "run.ckpt")
        measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save(measured, self.folder / f"measured{trainer.global_rank}.pt")


def trained(
    make: joint.Make, sharded: bool, folder: Path, *, start: Path | None = None, epochs: int = 1, **options: Any
) -> list[dict[str, Tensor]]:
    """The weights of each process after epochs of 6 batches, by SGD with momentum."""
    folder.mkdir()

    def run() -> None:
        torch.manual_seed(1)
        module = joint.made(make, **options)
        module.configure_optimizers = lambda: torch.optim.SGD(  # type: ignore[method-assign]
            module.parameters(), lr=joint.FAMILIES[make][1] / 2, momentum=0.5
        )
        several: dict[str, Any] = {"strategy": WholeModelSharded(), "devices": 2} if sharded else {}
        validating = {"limit_val_batches": 1.0, "num_sanity_val_steps": 1}
        trainer = joint.quiet(Keep(folder), max_epochs=epochs, **validating, **several)
        trainer.fit(module, datamodule=joint.FAMILIES[make][0](6), ckpt_path=start, weights_only=start and True)

    if sharded:
        under_torchrun(run)
    else:
        run()
    return joint.kept(folder, 2 if sharded else 1)


@pytest.mark.parametrize("make", joint.FAMILIES)
def test_two_processes_with_shards_are_one_process_on_the_joint_batch(make: joint.Make, tmp_path: Path) -> None:
    (one,) = trained(make, False, tmp_path / "one")
    first, second = trained(make, True, tmp_path / "two")
    assert same(first, second)
    joint.assert_close(first, one, joint.made(make))
    contents = [torch.load(tmp_path / name / "run.ckpt", weights_only=True) for name in ("one", "two")]
    for key in ("deq_zoo_classes", "deq_zoo_model", "hyper_parameters"):
        assert same(contents[0][key], contents[1][key]), key
    assert list(contents[0]["state_dict"]) == list(contents[1]["state_dict"])
    measured = [torch.load(tmp_path / name / "measured0.pt", weights_only=True) for name in ("one", "two")]
    names = ["val/loss", "val/steps", "val/spectral_radius"]
    assert [measured[1][name] for name in names[:2]] == pytest.approx([measured[0][name] for name in names[:2]])
    assert set(names) <= set(measured[1])


@pytest.mark.parametrize("sharded", [False, True])
def test_either_kind_of_run_goes_on_from_the_other(sharded: bool, tmp_path: Path) -> None:
    trained(joint.tanh, not sharded, tmp_path / "begun")
    found = trained(joint.tanh, sharded, tmp_path / "went_on", start=tmp_path / "begun" / "run.ckpt", epochs=2)
    (whole,) = trained(joint.tanh, False, tmp_path / "whole", epochs=2)
    for weights in found:
        joint.assert_close(weights, whole, joint.made(joint.tanh))


def test_the_jacobian_penalty_and_phantom_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.linspace(-1, 1, x.shape[1]).to(x).expand_as(x))
    options: dict[str, Any] = {"jacobian_weight": 0.5, "gradient": PhantomGradient(2, 0.8), "pretrain_steps": 2}
    (one,) = trained(joint.tanh, False, tmp_path / "one", **options)
    first, second = trained(joint.tanh, True, tmp_path / "two", **options)
    (without,) = trained(joint.tanh, False, tmp_path / "without", **{**options, "jacobian_weight": 0.0})
    assert same(first, second)
    assert not same(one, without)
    joint.assert_close(first, one, joint.made(joint.tanh))


class FakeTrainer:
    """What is asked of a trainer."""

    def __init__(self, strategy: Any, *callbacks: pl.Callback) -> None:
        self.strategy, self.callbacks = strategy, list(callbacks)


def test_what_else_shards_is_refused_with_the_way_out() -> None:
    refused = {
        ModelParallelStrategy(): "ModelParallelStrategy, whose default is tensor parallelism",
        FSDPStrategy(): "given: FSDPStrategy",
        DeepSpeedStrategy.__new__(DeepSpeedStrategy): "given: DeepSpeedStrategy",
        object(): "given: object",
    }
    for strategy, text in refused.items():
        with pytest.raises(MisconfigurationException, match=rf"{text}.*-c configs/fsdp\.yaml"):
            refuse_other_strategies(FakeTrainer(strategy))  # type: ignore[arg-type]
    refuse_other_strategies(FakeTrainer(DDPStrategy(), EMAWeightAveraging()))  # type: ignore[arg-type]
    with pytest.raises(MisconfigurationException, match="Leave the averages out"):
        refuse_other_strategies(FakeTrainer(WholeModelSharded(), EMAWeightAveraging()))  # type: ignore[arg-type]


def test_it_is_refused_before_training_begins() -> None:
    trainer = joint.quiet(strategy=ModelParallelStrategy(), devices=1)
    with mock.patch.dict(os.environ), pytest.raises(MisconfigurationException, match="is sharded as a whole"):
        trainer.fit(joint.made(joint.tanh), datamodule=joint.FAMILIES[joint.tanh][0](1))
    assert not torch.distributed.is_initialized()


def test_class_of() -> None:
    assert class_of(joint.made(joint.tanh)).__name__ == "ImageClassifier"
