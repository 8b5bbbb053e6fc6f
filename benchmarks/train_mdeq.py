"""An MDEQ that has an equilibrium, trained for a minute on real digits inside the benchmark.

At its initialisation the cell of ``mdeq_large`` does not contract: the spectral radius of df/dz is 1.1 to 1.3 where
Broyden's method gives up, at a relative residual of 0.5. A few steps with a penalty on the Jacobian, through an
unrolled cell, change that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.implicit import GMRES, Broyden, ImplicitGradient, fixed_point, jacobian_penalty, spectral_radius
from zoo.mdeq import CLASSIFIERS, MDEQ, MDEQCell, State

Gradient = tuple[Tensor, ...]


_TIGHT = Broyden(tol=1e-5, max_steps=200)


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
class TrainingStep:
    """What a training step computes: dL/dtheta of the cell and the stem, for one batch.

    Attributes:
        images: ``(B, 3, H, W)``.
        labels: ``(B,)``.
    """

    model: MDEQ
    images: Tensor
    labels: Tensor

    @property
    def cell(self) -> MDEQCell:
        return cast(MDEQCell, self.model.deq.cell)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (*self.cell.parameters(), *self.model.stem.parameters())

    def injection(self) -> Tensor:
        """``(B, C_0, H, W)`` x of f(z, x), with its graph."""
        mean, std = (self.images.new_tensor(values).view(1, -1, 1, 1) for values in (self.model.mean, self.model.std))
        x: Tensor = self.model.stem((self.images - mean) / std)
        return x

    def loss(self, z: State) -> Tensor:
        return F.cross_entropy(self.model.head(z), self.labels)

    def gradient(self, z: State) -> Gradient:
        return torch.autograd.grad(self.loss(z), self.parameters)

    def double(self) -> TrainingStep:
        return replace(self, model=copy.deepcopy(self.model).double(), images=self.images.double())

    @cached_property
    def reference(self) -> tuple[State, Gradient]:
        """z* and the gradient in float64, where both solves have relative residuals of at most 1e-9.

        Raises:
            ConvergenceError: the model has no equilibrium that is found.
        """
        with torch.no_grad():
            x = self.injection()
            near, _ = fixed_point(self.cell, self.cell.initial_state(x), x, solver=_TIGHT)
        step = self.double()
        x = step.injection()
        solver, adjoint = replace(_TIGHT, tol=1e-9), ImplicitGradient(GMRES(tol=1e-9, restart=60, max_steps=200))
        z0 = tuple(z_i.double() for z_i in near)
        z, _ = fixed_point(step.cell, z0, x, solver=solver, gradient=adjoint, on_failure="raise")
        return tuple(z_i.detach() for z_i in z), step.gradient(z)

    def spectral_radii(self) -> Tensor:
        """``(B,)`` of df/dz at z*."""
        with torch.no_grad():
            x = self.injection()
        z = tuple(z_i.to(x.dtype) for z_i in self.reference[0])
        return spectral_radius(self.cell, z, x, products=15, generator=torch.Generator().manual_seed(0))


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
