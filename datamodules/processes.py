"""What a data module knows of its Trainer: how many processes there are, and how far the training is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Generic, TypeVar

import torch.distributed
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DistributedSampler, SequentialSampler

from .idx import DataError

B = TypeVar("B")
Place = tuple[int, int]
"""An epoch, and how many of its batches have been trained on."""


def processes_of(module: LightningDataModule) -> tuple[int, int]:
    """How many processes there are, and which of them this is."""
    return (1, 0) if module.trainer is None else (module.trainer.world_size, module.trainer.global_rank)


class Pass(Iterator[B], Generic[B]):
    """A pass over a loader, begun when its first batch is asked for: only then Lightning has said which epoch it is.

    Args:
        begin: the batches of this pass.
    """

    def __init__(self, begin: Callable[[Pass[B]], Iterator[B]]) -> None:
        self._begin = begin
        self._batches: Iterator[B] | None = None

    def __next__(self) -> B:
        if self._batches is None:
            self._batches = self._begin(self)
        return next(self._batches)


def no_place(asked: object) -> None:
    """What a loader without a module knows of where a pass is to begin."""


def place_in_training(
    module: LightningDataModule, asked: object, unit: str, before: int | None, now: int
) -> Place | None:
    """Where this pass begins, if it is the one that the module's Trainer trains with; else, as for a user's, None.

    Where it is within an epoch, and a joint batch, of all processes, has ``now`` of its units in place of the
    ``before`` of the checkpoint that the run goes on from, that is said: the rest of the epoch cannot be the same.

    The Trainer counts batches when a step is done, and its checkpoints have this count. What a loader was asked for
    may be one more, where a step failed; and not in every case is a loader given its own state back in time: where the
    schedule asks for the length of the run, Lightning 2.6 forgets to.
    """
    trainer = module.trainer
    if trainer is None or not trainer.training:
        return None
    # Only the loop itself knows which passes are its own, and Lightning 2.6 gives them no public name.
    begun = getattr(trainer.fit_loop._combined_loader, "_iterator", None)  # noqa: SLF001
    if begun is None or all(own is not asked for own in begun.iterators):
        return None
    epoch, batches = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready
    if batches > 0 and before not in (None, now):
        rank_zero_warn(
            f"training goes on within an epoch, after {batches} batches that had {before} {unit}, of all processes "
            f"together, and have {now} now: of this epoch some is seen twice, or not at all. To go on exactly, let "
            f"batch_size times the number of processes be {before}"
        )
    return epoch, batches


class EvaluationSampler(DistributedSampler[int], SequentialSampler):
    """Of several processes each has every W-th sample, in order, and none is repeated.

    Some processes may then have a sample more than others. Lightning leaves a loader with a sampler of this kind as it
    is, in validation, test and prediction, and with ``overfit_batches``.

    Args:
        dataset: of N samples.
        processes: W.
        rank: the first sample of this process.
        part: what an error calls the dataset.

    Raises:
        DataError: there are fewer samples than processes.
    """

    def __init__(self, dataset: Sized, processes: int, rank: int, part: str) -> None:
        super().__init__(dataset, processes, rank, shuffle=False)  # type: ignore[arg-type]
        refuse_too_few(len(dataset), processes, part)
        self.indices = range(rank, len(dataset), processes)
        self.num_samples, self.total_size = len(self.indices), len(dataset)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def refuse_too_few(samples: int, processes: int, part: str) -> None:
    """Raise DataError if a process would have none of the samples, though there are some."""
    if 0 < samples < processes:
        raise DataError(
            f"the {part} set has {samples} samples, fewer than the {processes} processes: those without any would not "
            f"join in what the others do together. Use {samples} processes or fewer (--trainer.devices {samples})"
        )


def refuse_other_processes(processes: int) -> None:
    """Raise DataError if a loader that was made for so many processes is used by another number of them."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    there = torch.distributed.get_world_size()
    if there != processes:
        raise DataError(
            f"this training loader was made for {processes} process(es), and there are {there}: they would not share "
            "the samples as they should. Give the Trainer the data module itself (datamodule=...), which knows of the "
            "processes"
        )
