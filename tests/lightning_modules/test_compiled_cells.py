"""``--model.compile true``: what is iterated is compiled, and nothing else about a run changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

from lightning_modules import EquilibriumModule, ImageClassifier, compiled_cells
from tests.lightning_modules import flows, joint, texts
from tests.lightning_modules.runs import train

pytestmark = [  # of torch's compiler, which hides the last one itself, unless warnings are errors
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """All of torch.compile but the generation of code, and how often something was compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    in_place = compiled_cells.compile_in_place
    monkeypatch.setattr(compiled_cells, "compile_in_place", lambda cells: in_place(cells, backend=counter))
    with torch._functorch.config.patch(enable_autograd_cache=False):
        yield counter
    torch._dynamo.reset()


class Uneven(pl.LightningDataModule):
    """Four samples in batches of three and one, to train and to validate."""

    def __init__(self, make: joint.Make) -> None:
        super().__init__()
        self.samples = flows.pairs(4) if make is joint.flow else joint.images(4)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=3)

    val_dataloader = test_dataloader = train_dataloader


class KeepGradients(pl.Callback):
    """Those of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})


def made(make: joint.Make, **options: Any) -> EquilibriumModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make(joint.SHORT, joint.GRADIENT, jacobian_weight=0.1, schedule="constant", **options)
    for deq in module.equilibria().values():
        deq.on_failure = "ignore"
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-3)  # type: ignore[method-assign]
    return module


def fitted(make: joint.Make, **options: Any) -> tuple[EquilibriumModule, list[dict[str, Tensor]]]:
    """A module after two steps and a validation; their gradients."""
    torch.manual_seed(1)
    module, kept = made(make, **options), KeepGradients()
    data = texts.texts() if make is joint.transformer else Uneven(make)
    run = joint.quiet(kept, max_steps=2, limit_val_batches=1, num_sanity_val_steps=0)
    run.fit(module, datamodule=data)
    return module, kept.steps


@pytest.mark.parametrize("make", joint.FAMILIES)
def test_every_family_trains_as_it_does_eagerly(make: joint.Make, compiled: CompileCounterWithBackend) -> None:
    eager, expected = fitted(make)
    assert compiled.frame_count == 0
    module, found = fitted(make, compile=True)
    assert 0 < compiled.frame_count <= 8, "with and without a graph, of sizes that differ"
    assert list(module.state_dict()) == list(eager.state_dict())
    for one, other in zip(found, expected, strict=True):
        assert list(one) == list(other)
        size = max(float(g.abs().max()) for g in other.values())
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=0, atol=1e-5 * size)


def test_a_long_run_compiles_no_more(compiled: CompileCounterWithBackend) -> None:
    class Count(pl.Callback):
        def on_train_epoch_end(self, *args: Any) -> None:
            counts.append(compiled.frame_count)

    counts: list[int] = []
    run = joint.quiet(Count(), max_epochs=4, limit_val_batches=1.0)
    module, data = made(joint.tanh, compile=True), Uneven(joint.tanh)
    run.fit(module, datamodule=data)
    assert counts == [counts[0]] * 4
    assert counts[0] <= 6
    run.test(module, datamodule=data, verbose=False)
    assert compiled.frame_count <= 8


def test_with_averages_a_checkpoint_and_two_processes(compiled: CompileCounterWithBackend, tmp_path: Path) -> None:
    run = joint.quiet(EMAWeightAveraging(decay=0.5), max_epochs=2, limit_val_batches=1.0)
    run.fit(made(joint.tanh, compile=True), datamodule=Uneven(joint.tanh))
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    assert loaded.hparams["compile"] is True
    loaded.model.deq.on_failure = "ignore"
    before = compiled.frame_count
    run = joint.quiet(strategy="ddp_fork", devices=2, max_epochs=1, limit_val_batches=1)
    run.fit(loaded, datamodule=Uneven(joint.tanh))
    assert compiled.frame_count == before, "the processes compiled for themselves"


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MisconfigurationException, match=r"no C\+\+ compiler: none of g\+\+, .*leave compile out"):
        train(made(joint.tanh, compile=True), loader=DataLoader(joint.images(4), batch_size=2))


@pytest.mark.skipif(compiled_cells.find_compiler() is None, reason="no C++ compiler")
def test_for_real() -> None:
    torch._dynamo.reset()
    _, expected = fitted(joint.tanh)
    _, found = fitted(joint.tanh, compile=True)
    for one, other in zip(found, expected, strict=True):
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=0, atol=1e-5)
