"""Two processes under DDP are one process on the joint batch: every family, every gradient, and what training adds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor

from lightning_modules import EquilibriumModule
from tests.command_line import same
from tests.lightning_modules import joint
from tests.lightning_modules.joint import STEPS, TOL
from zoo.implicit import (
    GMRES,
    Anderson,
    BiCGSTAB,
    Broyden,
    ImplicitGradient,
    NeumannGradient,
    PhantomGradient,
    UnrolledGradient,
)

# From Python 3.12 a fork of a process with threads is warned of; Lightning's ddp_fork is such a fork.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning"),
]

GRADIENTS = {
    "anderson": ImplicitGradient(Anderson(tol=TOL, max_steps=STEPS)),
    "gmres": ImplicitGradient(GMRES(tol=TOL, max_steps=STEPS)),
    "bicgstab": ImplicitGradient(BiCGSTAB(tol=TOL, max_steps=STEPS)),
    "broyden": ImplicitGradient(Broyden(tol=TOL, max_steps=STEPS)),
    "neumann": NeumannGradient(3),
    "phantom": PhantomGradient(2, 0.8),
    "phantom-advance": PhantomGradient(2, 0.8, advance=True),
    "unrolled": UnrolledGradient(),
}
COMMON = ("anderson", "phantom", "unrolled")
"""One of each kind; what an adjoint solver does in several processes is no matter of the family."""


def trained(
    make: joint.Make,
    processes: int,
    folder: Path,
    *,
    batches: int = 20,
    callback: Callable[[], pl.Callback] = pl.Callback,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> list[dict[str, Tensor]]:
    """The weights of each process after so many batches."""
    folder.mkdir()
    several = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {}
    torch.manual_seed(1)
    run = joint.quiet(callback(), joint.KeepWeights(folder), **several, **(trainer or {}))
    run.fit(joint.made(make, **options), datamodule=joint.FAMILIES[make][0](batches))
    return joint.kept(folder, processes)


def check(make: joint.Make, folder: Path, **arguments: Any) -> dict[str, Tensor]:
    """Two processes end where one does; its weights."""
    (one,) = trained(make, 1, folder / "one", **arguments)
    first, second = trained(make, 2, folder / "two", **arguments)
    assert same(first, second)
    start = {name: value for name, value in arguments.items() if name in ("freeze", "shrink")}
    joint.assert_close(first, one, joint.made(make, **start))
    return one


@pytest.mark.parametrize(
    ("make", "gradient"),
    [
        *((joint.tanh, gradient) for gradient in GRADIENTS),
        *((make, each) for make in joint.FAMILIES if make is not joint.tanh for each in COMMON),
    ],
)
def test_every_family_and_every_gradient(make: joint.Make, gradient: str, tmp_path: Path) -> None:
    many = make is joint.tanh or gradient == "anderson"  # they take their time
    check(make, tmp_path, batches=20 if many else 6, gradient=GRADIENTS[gradient])


class Converges(pl.Callback):
    """Each solve of training, forward and adjoint, comes to its end."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        for deq in cast(EquilibriumModule, module).equilibria().values():
            for report in (deq.report, deq.adjoint_report):
                assert report is not None
                assert report.converged.all()


@pytest.mark.parametrize(("make", "shrink"), [(joint.tanh, 1.0), (joint.transformer, 0.3)])
def test_solves_that_converge(make: joint.Make, shrink: float, tmp_path: Path) -> None:
    """As many steps as it takes, which are not the same in the two processes."""
    solver = Anderson(tol=1e-12, max_steps=200)
    check(make, tmp_path, callback=Converges, solver=solver, gradient=ImplicitGradient(solver), shrink=shrink)


def test_with_the_jacobian_penalty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes draw probes of their own; here all samples have the same ones."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.linspace(-1, 1, x.shape[1]).to(x).expand_as(x))
    stages = {"pretrain_steps": 2, "jacobian_pretrain_weight": 0.2, "max_steps_jitter": 2}
    found = check(joint.tanh, tmp_path, jacobian_weight=0.5, jacobian_frequency=0.7, **stages)
    (without,) = trained(joint.tanh, 1, tmp_path / "without")
    assert not same(found, without)


@pytest.mark.parametrize("make", [joint.tanh, joint.mdeq])
def test_with_accumulated_gradients(make: joint.Make, tmp_path: Path) -> None:
    found = check(make, tmp_path, trainer={"accumulate_grad_batches": 2})
    (without,) = trained(make, 1, tmp_path / "without")
    assert not same(found, without)


def test_with_averages_of_weights(tmp_path: Path) -> None:
    found = check(joint.tanh, tmp_path, callback=lambda: EMAWeightAveraging(decay=0.8))
    (without,) = trained(joint.tanh, 1, tmp_path / "without")
    assert not same(found, without)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (joint.tanh, ["injection.*"]),
        (joint.mdeq, ["stem.*", "deq.cell.branches.*"]),
        (joint.transformer, ["vocabulary.*", "deq.*.output.*"]),
    ],
)
def test_with_frozen_parts(make: joint.Make, parts: list[str], tmp_path: Path) -> None:
    """DDP waits for no gradient of theirs."""
    check(make, tmp_path, freeze=parts)
