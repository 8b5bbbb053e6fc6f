"""Training batches that follow from the run's seed, the epoch and their number: a run can go on anywhere, exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sized
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler

from .processes import Pass, Place, no_place, refuse_other_processes, refuse_too_few
from .randomness import random_numbers_of, seed_of


class Draw(NamedTuple):
    """A batch before it is made.

    Args:
        seed: of its random numbers.
        indices: its samples.
    """

    seed: int
    indices: list[int]


class TrainingSampler(DistributedSampler[Draw]):
    """The batches of a pass.

    The order of the N samples is a permutation that follows from the run's seed and the epoch. Batch k of W processes
    with B samples each is the k-th piece of W B consecutive entries of it; process r takes every W-th entry of the
    piece, from the r-th on. Two processes with B samples see together what one with 2 B sees. No sample comes twice in
    an epoch. The last piece may be shorter; of it so many samples are left out, W - 1 at most, that all processes have
    equally many. What is drawn for a batch follows from the run's seed, the epoch, k and r.

    Each pass is the next epoch, unless :meth:`set_epoch` or :meth:`load_state_dict` was called before it.

    Args:
        dataset: of N samples.
        batch_size: B.
        run_seed: the run's seed.
        epoch: of the first pass.
        processes: W.
        rank: r.
        shuffle: False takes the samples in the order they have.

    Attributes:
        epoch: of the pass that began last, of those that count, or of the first one.
        batches: how many of its batches were given.

    Raises:
        DataError: there are fewer samples than processes.
    """

    def __init__(
        self, dataset: Sized, batch_size: int, run_seed: int, epoch: int, processes: int, rank: int, shuffle: bool
    ) -> None:
        super().__init__(dataset, processes, rank, shuffle=shuffle)  # type: ignore[arg-type]
        refuse_too_few(len(dataset), processes, "training")
        self.batch_size = batch_size
        self.run_seed = run_seed
        self.used = len(dataset) - len(dataset) % processes
        self.epoch, self.batches = self._next = self._first = epoch, 0

    def __len__(self) -> int:
        return math.ceil(self.used / (self.batch_size * self.num_replicas))

    def __iter__(self) -> Iterator[Draw]:
        return self._draws(*self._first)

    def _draws(self, epoch: int, first: int) -> Iterator[Draw]:
        order = self.order(epoch)
        together = self.batch_size * self.num_replicas
        for k in range(first, len(self)):
            piece = order[k * together : (k + 1) * together]
            seed = seed_of("batch", self.run_seed, epoch, k, self.rank)
            yield Draw(seed, piece[self.rank :: self.num_replicas].tolist())

    def order(self, epoch: int) -> torch.Tensor:
        """The samples of an epoch, of all processes: int64 ``(N - N % W,)``."""
        N = len(cast(Sized, self.dataset))
        if not self.shuffle:
            return torch.arange(self.used)
        generator = torch.Generator().manual_seed(seed_of("order", self.run_seed, epoch))
        return torch.randperm(N, generator=generator)[: self.used]

    @property
    def next_epoch(self) -> int:
        """Which epoch the next pass is."""
        return self._next[0]

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch."""
        if self._next[0] != epoch:
            self._next = epoch, 0

    def begin(self, place: Place | None, counts: bool = True) -> None:
        """Begin a pass, there if a place is given. If it does not count, the state stays that of the one before."""
        self._first = self._next if place is None else place
        self._next = self._first[0] + 1, 0
        if counts:
            self.epoch, self.batches = self._first

    def state_dict(self) -> dict[str, int]:
        """The run's seed, the epoch, and how many of its batches were given."""
        return {"run_seed": self.run_seed, "epoch": self.epoch, "batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next pass goes on there; where the epoch had ended, it is the epoch after it."""
        self.run_seed, self.epoch, self.batches = state["run_seed"], state["epoch"], state["batches"]
        self._next = (self.epoch, self.batches) if self.batches < len(self) else (self.epoch + 1, 0)
        self._first = self._next


class DrawnBatches(Dataset[Any]):
    """Batches, by what the sampler says of them; by a number, that sample.

    Args:
        dataset: of samples.
        batch_size: of the batches that the sampler says.
        collate: makes a batch of a list of samples.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.collate = collate

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, which: Draw | int) -> Any:
        if not isinstance(which, Draw):
            return self.dataset[which]
        with random_numbers_of(which.seed):
            of_a_batch = getattr(self.dataset, "__getitems__", None)
            samples = of_a_batch(which.indices) if of_a_batch else [self.dataset[index] for index in which.indices]
            return self.collate(samples)


class TrainingLoader(DataLoader[Any]):
    """A DataLoader for training whose batches are bit for bit the same for any number of workers.

    Order and random numbers are those of :class:`TrainingSampler`; nothing that is drawn elsewhere changes them, and
    they change nothing elsewhere. A Trainer's checkpoints have its state, and a run that goes on from one sees the
    batches that it would have seen. Passes of a user while a Trainer trains, as to update batch normalization, are
    whole epochs, and do not count in that state.

    Where it is given to a Trainer itself, Lightning may make it anew, from its attributes: for ``overfit_batches`` and
    prediction. It then gives the dataset and the sampler that it finds in it.

    Args:
        dataset: of samples, or that of another TrainingLoader, whose batches then have its size and are made as its.
        batch_size: samples a batch, in each process.
        collate_fn: makes a batch of a list of samples.
        run_seed: the run's seed.
        epoch: of the first pass.
        processes: how many there are.
        rank: which of them this is.
        place: where a pass of this loader is to begin, given the pass; where it gives None, it is the next epoch.
        shuffle: False takes the samples in their order: what Lightning asks for with ``overfit_batches``.
        sampler: what Lightning then gives with it, a SequentialSampler, or that of another TrainingLoader, for its
            order; nothing else.
        options: of the DataLoader.

    Raises:
        DataError: there are fewer samples than processes; or, when a pass begins, another number of processes is there.
        ValueError: the sampler is another one.
    """

    sampler: TrainingSampler

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None,
        collate_fn: Callable[[list[Any]], Any],
        *,
        run_seed: int,
        epoch: int = 0,
        processes: int = 1,
        rank: int = 0,
        place: Callable[[object], Place | None] = no_place,
        shuffle: bool = True,
        sampler: Sampler[Any] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(sampler, TrainingSampler):
            shuffle, epoch = sampler.shuffle, sampler.next_epoch
        elif sampler is not None and (shuffle or type(sampler) is not SequentialSampler):
            raise ValueError(
                f"a TrainingLoader has a sampler of its own; given: {sampler!r}. Where Lightning gave it: give the "
                "Trainer the data module itself (datamodule=...), or a loader that is not for training"
            )
        if isinstance(dataset, DrawnBatches):
            batch_size, collate_fn, dataset = dataset.batch_size, dataset.collate, dataset.dataset
        if batch_size is None:
            raise ValueError("batch_size is a whole number, at least 1; given: None")
        sized = cast(Sized, dataset)
        own = TrainingSampler(sized, batch_size, run_seed, epoch, processes, rank, shuffle)
        # A pass draws a seed for its workers, of which nothing follows here: not from the generator of the user.
        options.setdefault("generator", torch.Generator())
        # A sampler that gives whole batches, as torch's documentation has it: without batch_size, and collated already.
        super().__init__(
            DrawnBatches(dataset, batch_size, collate_fn), None, sampler=own, collate_fn=_as_it_is, **options
        )
        # Lightning makes a loader anew from attributes that are named as the arguments are.
        self.run_seed, self.epoch, self.processes, self.rank, self.place = run_seed, epoch, processes, rank, place
        self._trains = False

    def __iter__(self) -> Pass[Any]:  # type: ignore[override]
        """A pass, begun when its first batch is asked for."""
        return Pass(self._pass)

    def _pass(self, asked: Pass[Any]) -> Iterator[Any]:
        refuse_other_processes(self.processes)
        place = self.place(asked)
        counts = place is not None or not self._trains
        self._trains = self._trains or place is not None
        self.sampler.begin(place, counts)
        # A pass that does not count has workers of its own: those that stay serve one pass at a time.
        return self._counted(super().__iter__()) if counts else self._get_iterator()

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.sampler.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """See :class:`TrainingSampler`."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See :class:`TrainingSampler`."""
        self.sampler.load_state_dict(state)


def _as_it_is(batch: Any) -> Any:
    return batch
