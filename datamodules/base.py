"""What all sets share: three parts, and a loader for each stage of a Trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sized
from functools import cached_property, partial
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .processes import EvaluationSampler, Place, place_in_training, processes_of
from .training_loader import TrainingLoader, TrainingSampler

Sample = tuple[Tensor, Tensor]
D = TypeVar("D", bound=Dataset[tuple[Tensor, ...]])


class Splits(NamedTuple, Generic[D]):
    """The three parts of a set, as datasets."""

    train: D
    val: D
    test: D


class SplitDataModule(LightningDataModule, ABC, Generic[D]):
    """A set in three parts; a subclass says how they are loaded. The loaders work without a Trainer too.

    Training batches follow from the run's seed, see :class:`TrainingSampler`: torch's seed when the first training
    loader of a run is made, or that of the checkpoint that the run goes on from. In validation, test and prediction
    each of W processes has every W-th sample, and none twice.

    Args:
        batch_size: samples a batch, on each device.
        num_workers: processes that prepare batches; 0 prepares them in the training process.

    Attributes:
        augmentation: applied to the images of each training batch, and to nothing else; None leaves them as they are.
    """

    augmentation: Callable[[Tensor], Tensor] | None = None

    def __init__(self, batch_size: int = 64, num_workers: int = 0) -> None:
        super().__init__()
        # The subclass's arguments too, so that a checkpoint knows its data; this one a subclass sets for its user.
        self.save_hyperparameters(ignore=["eval_batch_size"])
        self.batch_size = whole_number("batch_size", batch_size, at_least=1)
        self.num_workers = whole_number("num_workers", num_workers, at_least=0)
        self._run_seed: int | None = None
        self._sampler: TrainingSampler | None = None
        self._joint_batch_before: int | None = None

    @property
    def eval_batch_size(self) -> int:
        """Samples a batch in validation, test and prediction, on each device."""
        return self.batch_size

    @abstractmethod
    def load(self) -> Splits[D]:
        """Read the set from disk."""

    @cached_property
    def splits(self) -> Splits[D]:
        """The three parts, read at the first use."""
        return self.load()

    def setup(self, stage: str | None = None) -> None:
        """Read the set now, so that a broken file is found before the first epoch; a fit is a new run."""
        _ = self.splits
        if stage == "fit":
            self._run_seed = self._sampler = self._joint_batch_before = None

    def state_dict(self) -> dict[str, Any]:
        """The run's seed, for checkpoints of a run that has one, and the samples of a batch, in all processes."""
        return {} if self._run_seed is None else {"run_seed": self._run_seed, "joint_batch": self._joint_batch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the run's seed."""
        self._run_seed, self._joint_batch_before = state_dict["run_seed"], state_dict.get("joint_batch")
        if self._sampler is not None:  # some strategies load checkpoints late
            self._sampler.run_seed = state_dict["run_seed"]

    def train_dataloader(self) -> TrainingLoader:
        """The training batches of this process. A loader that is made after another goes on with the next epoch.

        Raises:
            DataError: there are fewer samples than processes.
        """
        if self._run_seed is None:
            self._run_seed = torch.initial_seed()
            if self.trainer is not None:  # where nobody gave a seed, each process has its own
                self._run_seed = self.trainer.strategy.broadcast(self._run_seed)
        processes, rank = processes_of(self)
        augmentation = self.augmentation
        loader = TrainingLoader(
            self.splits.train,
            self.batch_size,
            default_collate if augmentation is None else partial(_collate_augmented, augmentation),
            run_seed=self._run_seed,
            epoch=0 if self._sampler is None else self._sampler.next_epoch,
            processes=processes,
            rank=rank,
            place=self._place,
            **self._options,
        )
        self._sampler = loader.sampler
        return loader

    @property
    def _joint_batch(self) -> int:
        return self.batch_size * processes_of(self)[0]

    def _place(self, asked: object) -> Place | None:
        return place_in_training(self, asked, "samples", self._joint_batch_before, self._joint_batch)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The validation batches of this process; :class:`DataError` as :meth:`train_dataloader`."""
        return self._evaluation("validation", self.splits.val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test batches of this process; :class:`DataError` as :meth:`train_dataloader`."""
        return self._evaluation("test", self.splits.test)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test set."""
        return self.test_dataloader()

    def _evaluation(self, part: str, dataset: D) -> DataLoader[tuple[Tensor, ...]]:
        processes, rank = processes_of(self)
        sampler = None if processes == 1 else EvaluationSampler(cast(Sized, dataset), processes, rank, part)
        return DataLoader(dataset, batch_size=self.eval_batch_size, sampler=sampler, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        """Of each loader."""
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


class LabelledDataModule(SplitDataModule[D]):
    """A set whose samples are images and classes; a subclass names the classes."""

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """One name a class, in the order of the labels."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def _collate_augmented(augmentation: Callable[[Tensor], Tensor], samples: list[Sample]) -> list[Tensor]:
    """``default_collate``, then one augmentation of the whole batch.

    Its random numbers come from torch's global generator, which a TrainingLoader seeds for each batch.
    """
    images, labels = default_collate(samples)
    return [augmentation(images), labels]


def whole_number(name: str, value: int, at_least: int) -> int:
    """``value``, if it is a whole number of at least that; else a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} is a whole number, at least {at_least}; given: {value!r}")
    return value
