"""The tanh layer: the smallest deep equilibrium model.

Kolter, Duvenaud and Johnson, "Deep Implicit Layers" (NeurIPS 2020 tutorial), chapter 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import InputError
from .implicit import DEQ, Gradient, Solver, SpectralBound
from .registry import register_model


class TanhCell(nn.Module):
    """f(z, x) = tanh(W z + x).

    Args:
        width: n, the size of z and x.
        contraction: if given, W is parametrised so that its spectral norm is at most this number. Below 1 the cell is
            a contraction: one equilibrium, and every solver finds it.

    Shape:
        z, x and the output are ``(B, n)``.
    """

    def __init__(self, width: int, contraction: float | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        if contraction is not None:
            # "unsafe" leaves out a trial, which takes six times the weight's memory.
            parametrize.register_parametrization(self.linear, "weight", SpectralBound(contraction), unsafe=True)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)

    def initial_state(self, x: Tensor) -> Tensor:
        """z0 = 0, ``(B, n)``, in the dtype of the weights also where autocast made x narrower."""
        return torch.zeros_like(x, dtype=next(self.parameters()).dtype)

    def jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        """df/dz = diag(1 - tanh^2(W z + x)) W, ``(B, n, n)``; Newton solves with I minus this."""
        slope = 1 - self.forward(z, x).square()
        return slope.unsqueeze(2) * self.linear.weight


class TanhDEQ(nn.Module):
    """A classifier: flatten -> linear -> equilibrium of tanh(W z + x) -> linear.

    The three layers of the tutorial's chapter 1 are three choices of solver and gradient:
    ``FixedPointIteration`` with ``UnrolledGradient``, ``Newton`` with ``UnrolledGradient``, and ``Newton`` (or
    ``Anderson``) with ``ImplicitGradient``.

    Args:
        in_features: entries of one input, all dimensions but the batch together.
        width: n, the size of the equilibrium.
        num_classes: outputs.
        contraction: see :class:`TanhCell`.
        mean, std: the model normalises its input itself, to (x - mean) / std.
        solver, gradient: see :class:`~zoo.implicit.DEQ`.

    The defaults take the 8x8 digits of scikit-learn.

    Shape:
        input ``(B, ...)``, images with values in [0, 1]; output ``(B, num_classes)``, logits.

    Attributes:
        deq: the equilibrium layer; ``deq.report`` tells of the last solve.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        in_features: int = 64,
        width: int = 128,
        num_classes: int = 10,
        contraction: float | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("width", width), ("num_classes", num_classes)):
            if size < 1:
                raise ValueError(f"TanhDEQ({name}=...) takes an integer >= 1; given: {size!r}")
        if not std > 0:
            raise ValueError(f"TanhDEQ(std=...) takes a number > 0; given: {std!r}")
        self.mean = mean
        self.std = std
        self.injection = nn.Linear(in_features, width)
        self.deq = DEQ(TanhCell(width, contraction), solver, gradient)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """``(B, ...)`` -> logits ``(B, num_classes)``.

        Raises:
            InputError: the image is not floating, or has another number of entries than ``in_features``.
        """
        if not image.is_floating_point():
            raise InputError(f"TanhDEQ takes floating images in [0, 1]; given: {image.dtype}. Use image.float() / 255")
        entries = image.shape[1:].numel()
        if image.dim() == 0 or entries != self.injection.in_features:
            raise InputError(
                f"this TanhDEQ takes a batch of inputs of {self.injection.in_features} entries (in_features); "
                f"given: shape {tuple(image.shape)}, that is {entries} entries a sample"
            )
        x = image.reshape(image.shape[0], entries)
        z, _ = self.deq(self.injection((x - self.mean) / self.std))
        logits: Tensor = self.classifier(z)
        return logits


register_model("tanh_deq", TanhDEQ)
