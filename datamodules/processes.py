"""What a data module knows of its Trainer: how many processes there are, and how far the training is."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from pytorch_lightning import LightningDataModule
from torch.utils.data import DistributedSampler

from .idx import DataError

Place = tuple[int, int]
"""An epoch, and how many of its batches have been trained on."""


def processes_of(module: LightningDataModule) -> tuple[int, int]:
    """How many processes there are, and which of them this is."""
    return (1, 0) if module.trainer is None else (module.trainer.world_size, module.trainer.global_rank)


def place_in_training(module: LightningDataModule, loader: object) -> Place | None:
    """Where the next pass of this loader begins, if its module's Trainer trains with it now; else None.

    The Trainer counts batches when a step is done, and its checkpoints have this count. What a loader was asked for
    may be one more, where a step failed; and not in every case is a loader given its own state back in time: where the
    schedule asks for the length of the run, Lightning 2.6 forgets to.
    """
    trainer = module.trainer
    if trainer is None or not trainer.training or trainer.train_dataloader is not loader:
        return None
    return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready


class EvaluationSampler(DistributedSampler[int]):
    """Of several processes each has every W-th sample, in order, and none is repeated.

    Some processes may then have a sample more than others. Lightning leaves a loader with a sampler of this kind as it
    is, in validation, test and prediction.

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
