"""All families train and validate under Lightning's precision flags, with solver arithmetic in float32 at least."""

from __future__ import annotations

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from lightning_modules import EquilibriumModule
from lightning_modules.optimizers import make_optimizer
from tests.lightning_modules import flows, joint, texts
from tests.lightning_modules.runs import Steps
from zoo.implicit import Anderson, FixedPointIteration, ImplicitGradient

# Lightning says that there is no float16 autocast on a CPU; others of its notes are of other places.
pytestmark = pytest.mark.filterwarnings("ignore:.*precision='16-mixed'.*not supported on CPU:UserWarning")

DTYPES = {
    "32-true": (torch.float32, torch.float32),
    "64-true": (torch.float64, torch.float64),
    "bf16-mixed": (torch.float32, torch.float32),
    "16-mixed": (torch.float32, torch.float32),
    "bf16-true": (torch.bfloat16, torch.float32),
    "16-true": (torch.float16, torch.float32),
}
"""Of weights, and of solver arithmetic."""


class Batches(pl.LightningDataModule):
    """Two batches of two samples."""

    def __init__(self, make: joint.Make) -> None:
        super().__init__()
        self.samples = flows.pairs(4) if make is joint.flow else joint.images(4)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=2)

    val_dataloader = train_dataloader


def module_of(make: joint.Make, precision: str) -> EquilibriumModule:
    options: dict[str, Any] = {"jacobian_weight": 0.1}
    if precision == "16-true":  # whose range the penalty of random weights leaves
        options = {"optimizer_args": {"eps": 1e-4}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make(FixedPointIteration(max_steps=4), ImplicitGradient(Anderson(max_steps=4)), **options)
    for deq in module.equilibria().values():
        deq.on_failure = "ignore"
    return module


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("make", joint.FAMILIES)
def test_two_steps_and_a_validation(make: joint.Make, precision: str) -> None:
    module, steps = module_of(make, precision), Steps()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    data = texts.texts() if make is joint.transformer else Batches(make)
    few = {"max_steps": 2, "limit_val_batches": 1, "num_sanity_val_steps": 0, "val_check_interval": 2}
    run = joint.quiet(precision=precision, logger=steps, log_every_n_steps=1, **few)
    run.fit(module, datamodule=data)
    weights, arithmetic = DTYPES[precision]
    assert {p.dtype for p in module.parameters()} == {weights}
    (deq,) = module.equilibria().values()
    assert deq.report is not None
    assert deq.adjoint_report is not None
    assert {deq.report.residual.dtype, deq.adjoint_report.residual.dtype} == {arithmetic}
    losses = [logged["train/loss"] for logged in steps.logged] + [float(run.callback_metrics["val/loss"])]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    moved = [name for name, p in module.named_parameters() if not torch.equal(p, before[name].to(weights))]
    assert moved
    assert all(p.isfinite().all() for p in module.parameters())


def test_an_eps_that_float16_has_not_is_refused() -> None:
    """Adam would divide 0 by 0, and all weights would be NaN after one step."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"eps=1e-08 is 0 in torch\.float16, .*--model\.optimizer_args\.eps 1e-4"):
        make_optimizer("AdamW", [weight], 1e-3, 0.0, {})
    make_optimizer("AdamW", [weight], 1e-3, 0.0, {"eps": 1e-4})
    make_optimizer("SGD", [weight], 1e-3, 0.0, {})
