"""Training batches: whose samples they are, what they are drawn from, and where a pass goes on."""

from __future__ import annotations

import itertools
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler, default_collate

from datamodules import DataError, DigitScenesDataModule, DigitsDataModule, SyntheticFlowDataModule
from datamodules.base import SplitDataModule, Splits
from datamodules.processes import EvaluationSampler
from datamodules.randomness import random_numbers_of
from datamodules.training_loader import TrainingLoader, TrainingSampler
from tests.datamodules.loading import two_workers


class Numbers(Dataset[Tensor]):
    """Samples 0, 1, 2, ..., and with each of them a number of torch, ``random`` and numpy."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, torch.rand(()), random.random(), np.random.rand()], dtype=torch.float64)  # noqa: NPY002


class NumbersData(SplitDataModule[Numbers]):
    def __init__(self, sizes: tuple[int, int, int] = (12, 5, 3), batch_size: int = 2, num_workers: int = 0) -> None:
        super().__init__(batch_size, num_workers)
        self.sizes = sizes

    def load(self) -> Splits[Numbers]:
        return Splits(*map(Numbers, self.sizes))


def loader(size: int = 10, batch_size: int = 2, run_seed: int = 7, **arguments) -> TrainingLoader:
    return TrainingLoader(Numbers(size), batch_size, default_collate, run_seed=run_seed, **arguments)


def flat(pieces) -> list[int]:
    return list(itertools.chain.from_iterable(pieces))


def samples(batches) -> list[list[int]]:
    return [batch[:, 0].int().tolist() for batch in batches]


# ---------------------------------------------------------------------------------------------------------- the samples


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 5),
    processes=st.integers(1, 4),
    run_seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 1000),
)
def test_processes_see_together_what_one_with_their_joint_batch_sees(size, batch_size, processes, run_seed, epoch):
    if size < processes:
        return
    arguments = {"size": size, "run_seed": run_seed, "epoch": epoch}
    parts = [
        samples(loader(batch_size=batch_size, processes=processes, rank=rank, **arguments)) for rank in range(processes)
    ]
    joint = samples(loader(batch_size=batch_size * processes, **arguments))
    together = [flat(zip(*pieces, strict=True)) for pieces in zip(*parts, strict=True)]
    left_out = len(joint[-1]) - len(together[-1]) if len(joint) == len(together) else len(joint[-1])
    assert left_out == size % processes
    assert flat(together) == flat(joint)[: size - left_out]
    assert sorted(flat(joint)) == list(range(size))
    assert all(len(piece) == batch_size for part in parts for piece in part[:-1])
    assert {len(loader(batch_size=batch_size, processes=processes, **arguments)), *map(len, parts)} == {len(together)}


def test_the_order_follows_from_the_seed_and_the_epoch():
    orders = {(seed, epoch): samples(loader(run_seed=seed, epoch=epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len({str(order) for order in orders.values()}) == 4
    torch.manual_seed(5)
    assert samples(loader(run_seed=1, epoch=1)) == orders[1, 1]
    assert samples(loader(run_seed=1, shuffle=False)) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_fewer_samples_than_processes():
    message = (
        "the training set has 3 samples, fewer than the 4 processes: those without any would not join in what the "
        r"others do together\. Use 3 processes or fewer \(--trainer\.devices 3\)"
    )
    with pytest.raises(DataError, match=message):
        loader(size=3, processes=4, rank=1)
    assert len(loader(size=4, processes=4, rank=3)) == 1


# --------------------------------------------------------------------------------------------------- the random numbers


def test_each_batch_draws_its_own_numbers_and_disturbs_nobody():
    draws = [list(loader(epoch=epoch, processes=2, rank=rank)) for epoch in (0, 1) for rank in (0, 1)]
    numbers = torch.cat([batch for batches in draws for batch in batches])[:, 1:]
    assert len(numbers.flatten().unique()) == 3 * 2 * 10
    for number in (1, 2):
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(number)
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
        batches = loader(processes=2, rank=1)
        assert all(torch.equal(batch, expected) for batch, expected in zip(batches, draws[1], strict=True))
        after = random.getstate(), np.random.get_state()  # noqa: NPY002
        assert str((states[1], states[2])) == str(after)
        assert torch.equal(torch.get_rng_state(), states[0])


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize(
    "data",
    [
        NumbersData,
        lambda num_workers: DigitsDataModule(batch_size=300, num_workers=num_workers),
        lambda num_workers: DigitScenesDataModule(batch_size=7, train_size=20, num_workers=num_workers),
        lambda num_workers: SyntheticFlowDataModule(4, num_workers, 16, 24, train_size=10, val_size=1, test_size=1),
    ],
    ids=["numbers", "digits", "scenes", "flow"],
)
@two_workers[0]
@two_workers[1]
def test_workers_change_no_bit(data, num_workers):
    torch.manual_seed(3)
    with_workers, alone = data(num_workers=num_workers).train_dataloader(), data(num_workers=0).train_dataloader()
    for _ in range(2):
        for batch, expected in zip(with_workers, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))


# ----------------------------------------------------------------------------------------------------- where it goes on


def test_each_pass_is_the_next_epoch_unless_it_is_told():
    epochs = [samples(loader(epoch=epoch)) for epoch in range(5)]
    one = loader()
    assert [samples(one) for _ in range(3)] == epochs[:3]
    next(iter(one))  # and left
    assert samples(one) == epochs[4]
    one.sampler.set_epoch(1)
    assert [samples(one) for _ in range(2)] == epochs[1:3]
    one.sampler.set_epoch(3)  # what it is already
    assert samples(one) == epochs[3]


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=two_workers)])
@pytest.mark.parametrize("given_out", range(8))
def test_a_pass_goes_on_where_it_was(given_out, num_workers):
    whole = loader(num_workers=num_workers)
    expected = torch.cat([*whole, *whole, *whole])
    again = loader(num_workers=num_workers)
    before = list(itertools.islice(itertools.chain(again, again), given_out))
    resumed = loader(run_seed=99, num_workers=num_workers)
    resumed.load_state_dict(again.state_dict())
    assert resumed.state_dict() == again.state_dict()
    found = torch.cat([*before, *itertools.chain(resumed, resumed, resumed)])
    assert torch.equal(found[: len(expected)], expected)


def test_a_module_goes_on_with_its_epochs_and_its_seed():
    """Whether a loop asks for one loader, or for one an epoch, as in plain PyTorch it may."""
    torch.manual_seed(3)
    one, each = NumbersData().train_dataloader(), NumbersData()
    for _ in range(3):
        assert len(each.train_dataloader()) == 6, "asking is no pass"
        assert samples(each.train_dataloader()) == samples(one)
        torch.manual_seed(4)
    other = NumbersData()
    other.load_state_dict(each.state_dict())
    assert other.train_dataloader().sampler.run_seed == one.sampler.run_seed == 3
    each.setup("fit")
    assert each.train_dataloader().sampler.run_seed == 4, "a fit is a run of its own"
    assert NumbersData().state_dict() == {}


def test_a_checkpoint_that_is_loaded_late_still_counts():
    """As some strategies do it, when there is a loader already."""
    torch.manual_seed(3)
    module, expected = NumbersData(), samples(loader(size=12, run_seed=11))
    made = module.train_dataloader()
    module.load_state_dict({"run_seed": 11})
    assert samples(made) == expected


# ------------------------------------------------------------------------------------------------------- the evaluation


def on(rank: int, processes: int, module: NumbersData) -> NumbersData:
    """The module as the process of this rank has it."""
    strategy = SimpleNamespace(broadcast=lambda value: value)
    module.trainer = SimpleNamespace(world_size=processes, global_rank=rank, training=False, strategy=strategy)
    return module


@pytest.mark.parametrize("part", ["val", "test", "predict"])
def test_no_sample_is_evaluated_twice(part):
    parts = [samples(getattr(on(rank, 3, NumbersData()), f"{part}_dataloader")()) for rank in range(3)]
    size = 5 if part == "val" else 3
    assert [flat(part_) for part_ in parts] == [list(range(rank, size, 3)) for rank in range(3)]
    with pytest.raises(DataError, match=f"the {'validation' if part == 'val' else 'test'} set has {size} samples"):
        getattr(on(0, 6, NumbersData()), f"{part}_dataloader")()


def test_an_empty_part_is_empty_for_all():
    assert list(on(1, 2, NumbersData((12, 0, 3))).val_dataloader()) == []


# ------------------------------------------------------------------------------------------------------------ a Trainer


class Recorder(LightningModule):
    """Keeps the samples of each step."""

    def __init__(self, folder=None) -> None:
        super().__init__()
        self.net = nn.Linear(1, 1)
        self.folder = folder
        self.seen: dict[str, list[list[int]]] = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"] += samples([batch])
        return self.net(batch[:, :1].float()).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"] += samples([batch])

    def test_step(self, batch, batch_idx):
        self.seen["test"] += samples([batch])

    def on_fit_end(self):
        if self.folder is not None:
            torch.save(self.seen, self.folder / f"{self.global_rank}.pt")

    on_test_end = on_fit_end

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(folder, **arguments) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    own = {"accelerator": "cpu", "num_sanity_val_steps": 0, "default_root_dir": folder, "devices": 1}
    return Trainer(**{**own, **quiet, **arguments})


def test_a_trainer_trains_the_epochs_as_they_are(tmp_path):
    torch.manual_seed(3)
    epochs = [samples(loader(size=12, run_seed=3, epoch=epoch)) for epoch in range(3)]
    model = Recorder()
    trainer(tmp_path, max_epochs=3, limit_train_batches=4).fit(model, datamodule=NumbersData())
    assert model.seen["train"] == [*epochs[0][:4], *epochs[1][:4], *epochs[2][:4]]
    anew = Recorder()
    trainer(tmp_path, max_epochs=3, reload_dataloaders_every_n_epochs=1).fit(anew, datamodule=NumbersData())
    assert anew.seen["train"] == flat(epochs)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling:UserWarning")
def test_a_trainer_overfits_on_the_same_batches(tmp_path):
    model = Recorder()
    trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(model, datamodule=NumbersData())
    assert model.seen["train"] == [[0, 1], [2, 3]] * 2


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_of_a_trainer(tmp_path):
    """Lightning puts no sampler in place of these, and has nothing to warn of; nobody gave a seed, and it is one."""
    torch.manual_seed(3)
    run = trainer(tmp_path, devices=2, strategy="ddp_fork", max_epochs=2)
    run.fit(Unseeded(tmp_path), datamodule=NumbersData((13, 5, 3)))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    joint = [samples(loader(size=13, batch_size=4, run_seed=40, epoch=epoch)) for epoch in range(2)]
    expected = [piece[:4] for epoch in joint for piece in epoch[:3]]
    found = zip(*(rank["train"] for rank in ranks), strict=True)
    assert [flat(zip(*pieces, strict=True)) for pieces in found] == expected
    assert [flat(rank["val"]) for rank in ranks] == [[0, 2, 4] * 2, [1, 3] * 2]
    run.test(Recorder(tmp_path), datamodule=NumbersData((13, 5, 3)), verbose=False)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert [flat(rank["test"]) for rank in ranks] == [[0, 2], [1]]


class Unseeded(Recorder):
    """Each process has another seed, as those have that nobody gave one."""

    def setup(self, stage):
        torch.manual_seed(40 + self.trainer.global_rank)


def test_what_others_ask_of_a_loader():
    one = NumbersData().train_dataloader()
    assert isinstance(one, DataLoader)
    assert isinstance(one.sampler, TrainingSampler)
    assert len(one) == 6
    assert len(one.dataset) == 12
    assert one.dataset[3][0] == 3
    with pytest.raises(ValueError, match="a TrainingLoader has a sampler of its own; given"):
        loader(sampler=EvaluationSampler(range(5), 1, 0, "test"))


class Passing(Recorder):
    """A user who makes passes of his own over the training loader, wherever he can."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: dict[str, list[list[list[int]]]] = {}
        self.states: list[dict[str, int]] = []

    def look(self, where: str) -> None:
        before = self.trainer.train_dataloader.state_dict()
        self.passes.setdefault(where, []).append(samples(self.trainer.train_dataloader))
        if where not in ("start", "epoch_start"):
            assert self.trainer.train_dataloader.state_dict() == before

    def on_train_start(self):
        self.look("start")

    def on_train_epoch_start(self):
        self.look("epoch_start")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 2:
            self.look("batch_end")

    def on_train_epoch_end(self):
        self.look("epoch_end")

    def on_train_end(self):
        self.look("end")


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=two_workers)])
def test_passes_of_a_user_are_whole_and_change_nothing(num_workers, tmp_path):
    torch.manual_seed(3)
    model = Passing()
    trainer(tmp_path, max_epochs=2).fit(model, datamodule=NumbersData(num_workers=num_workers))
    assert model.seen["train"] == flat(samples(loader(size=12, run_seed=3, epoch=epoch)) for epoch in range(2))
    assert {where: len(found) for where, found in model.passes.items()} == {
        **dict.fromkeys(("start", "end"), 1),
        **dict.fromkeys(("epoch_start", "batch_end", "epoch_end"), 2),
    }
    for found in model.passes.values():
        assert all(sorted(flat(batches)) == list(range(12)) for batches in found)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling:UserWarning")
def test_a_trainer_may_be_given_a_loader_itself(tmp_path):
    torch.manual_seed(3)
    model = Recorder()
    trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(
        model, NumbersData().train_dataloader(), NumbersData().val_dataloader()
    )
    assert model.seen["train"] == [[0, 1], [2, 3]] * 2
    torch.manual_seed(3)
    found = trainer(tmp_path).predict(Predicting(), NumbersData().train_dataloader())
    assert found == samples(loader(size=12, run_seed=3))


class Predicting(Recorder):
    def predict_step(self, batch, batch_idx):
        return samples([batch])[0]


class Refused(Recorder):
    """Under several processes a pass is refused, and the process that sees it says so."""

    def on_fit_start(self):
        with pytest.raises(DataError, match=r"made for 1 process\(es\), and there are 2: .* \(datamodule=\.\.\.\)"):
            next(iter(self.given))
        torch.save("refused", self.folder / f"{self.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_loader_that_knows_of_one_process_is_refused_by_two(tmp_path):
    model = Refused(tmp_path)
    model.given = NumbersData().train_dataloader()
    run = trainer(tmp_path, devices=2, strategy="ddp_fork", max_epochs=0)
    run.fit(model, datamodule=NumbersData())
    assert {path.name for path in tmp_path.glob("*.pt")} == {"0.pt", "1.pt"}


def test_evaluation_is_left_as_it_is_by_overfitting():
    sampler = EvaluationSampler(range(5), 2, 0, "test")
    assert isinstance(sampler, SequentialSampler)
    assert (len(sampler), sampler.num_samples, sampler.total_size) == (3, 3, 5)


def test_an_error_leaves_the_generators_where_they_were():
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    expected = torch.rand(()), random.random(), np.random.rand()  # noqa: NPY002
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)
    with pytest.raises(IndexError), random_numbers_of(5):
        raise IndexError
    assert (torch.rand(()), random.random(), np.random.rand()) == expected  # noqa: NPY002


def test_a_loader_can_be_pickled():
    again = pickle.loads(pickle.dumps(loader()))  # noqa: S301 - it is our own
    assert samples(again) == samples(loader())
