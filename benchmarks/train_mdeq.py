"""An MDEQ that has an equilibrium, trained for a minute on real digits inside the benchmark.

At its initialisation the cell of ``mdeq_large`` does not contract: the spectral radius of df/dz is 1.1 to 1.3 where
Broyden's method gives up, at a relative residual of 0.5. A few steps with a penalty on the Jacobian, through an
unrolled cell, change that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from zoo.implicit import DEQ, jacobian_penalty
from zoo.mdeq import CLASSIFIERS, MDEQ, State

from .training_steps import Step


@dataclass(frozen=True)
class Recipe:
    """A model, and how it is trained before anything is measured.

    Attributes:
        name: in the tables.
        arguments: of :class:`~zoo.mdeq.MDEQ`; its dropout is off, since TorchDEQ knows nothing of the zoo's masks.
        size: pixels of an image's side.
        steps: of Adam, on batches of ``batch`` digits.
        applications: of the cell in a training step.
    """

    name: str
    arguments: Mapping[str, Any] = field(hash=False)
    size: int = 32
    batch: int = 8
    steps: int = 16
    applications: int = 3
    jacobian_weight: float = 2.0
    learning_rate: float = 1e-3


LARGE = Recipe("mdeq_large", CLASSIFIERS["mdeq_large"])
SMALL = Recipe(
    "a small MDEQ",
    {"channels": (32, 64, 64), "head_widths": (4, 8, 8), "final_width": 32, "expansion": 2},
    size=8,
    steps=20,
    learning_rate=3e-3,
)


@dataclass(frozen=True)
class TrainingStep(Step):
    """A step of an MDEQ: dL/dtheta of the cell and the stem, for one batch.

    Attributes:
        images: ``(B, 3, H, W)``.
        labels: ``(B,)``.
    """

    model: MDEQ
    images: Tensor
    labels: Tensor

    @property
    def deq(self) -> DEQ:
        return self.model.deq

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (*self.cell.parameters(), *self.model.stem.parameters())

    def injection(self) -> Tensor:
        """``(B, C_0, H, W)`` x of f(z, x), with its graph."""
        mean, std = (self.images.new_tensor(values).view(1, -1, 1, 1) for values in (self.model.mean, self.model.std))
        x: Tensor = self.model.stem((self.images - mean) / std)
        return x

    def inputs(self) -> tuple[Tensor]:
        return (self.injection(),)

    def loss(self, z: State) -> Tensor:
        return F.cross_entropy(self.model.head(z), self.labels)

    def whole_loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.images), self.labels)

    def double(self) -> TrainingStep:
        return replace(self, model=copy.deepcopy(self.model).double(), images=self.images.double())


@dataclass(frozen=True)
class Trained:
    """A step of a model that was trained, and the loss and penalty of the last training step."""

    step: TrainingStep
    loss: float
    penalty: float


def digits(size: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits, enlarged: images ``(1797, 3, size, size)`` in [0, 1], labels ``(1797,)``."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    large = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return large.expand(-1, 3, -1, -1).contiguous(), torch.as_tensor(data.target, dtype=torch.int64)


def trained(recipe: Recipe, seed: int = 0) -> Trained:
    """The model after ``recipe.steps`` steps, in train mode, with a batch that it was not trained on."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = MDEQ(**{**recipe.arguments, "dropout": 0.0, "unrolled": recipe.applications})
        images, labels = digits(recipe.size)
        batch = TrainingStep(model, images[-recipe.batch :], labels[-recipe.batch :])
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
        for _ in range(recipe.steps):
            rows = torch.randint(len(images) - recipe.batch, (recipe.batch,))
            step = TrainingStep(model, images[rows], labels[rows])
            x = step.injection()
            z, _ = model.deq(x)
            loss = step.loss(z)
            penalty = jacobian_penalty(step.cell, z, x).mean()
            optimizer.zero_grad()
            (loss + recipe.jacobian_weight * penalty).backward()
            optimizer.step()
    optimizer.zero_grad()
    model.deq.unrolled = None
    return Trained(batch, loss.item(), penalty.item())
