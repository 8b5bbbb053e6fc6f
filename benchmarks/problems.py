"""The equilibrium problems of the benchmark: fixed seeds, known spectral radii.

``python -m benchmarks.problems`` prints, for each of them, the spectral radius and the norm of the Jacobian J = df/dz
at z*, and the gains that ``calibrated_gain`` finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

CONV_WEIGHTS = Path(__file__).parent / "conv.safetensors"


@dataclass(frozen=True)
class Problem:
    """z = f(z, *inputs), and a loss of z* for the backward measurements.

    Attributes:
        name: in the tables.
        f: the cell, ``f(z, *inputs) -> z``.
        z0: the start, ``(B, ...)``, zeros.
        inputs: batch first.
        loss: scalar function of z*.
        max_steps: what solvers may take; it bounds the memory of those that keep one vector a step.
    """

    name: str
    f: nn.Module
    z0: Tensor
    inputs: tuple[Tensor, ...]
    loss: Callable[[Tensor], Tensor]
    max_steps: int = 1000

    def scaled(self, s: float) -> Problem:
        """The same problem in other units: z -> s f(z / s), with its solution at s z*."""
        return replace(self, name=f"{self.name} x {s:g}", f=Scaled(self.f, s))

    def solution(self) -> Tensor:
        """z* to the last digits, by plain iteration."""
        with torch.no_grad():
            z = self.z0
            for _ in range(20_000):
                fz: Tensor = self.f(z, *self.inputs)
                change, size = (fz - z).norm(), fz.norm()
                z = fz
                if change <= 20 * torch.finfo(z.dtype).eps * size:
                    break
            else:
                raise RuntimeError(f"plain iteration does not converge on {self.name}")
        return z

    def jacobians(self, z: Tensor) -> Tensor | None:
        """``(B, N, N)`` df/dz at z, if f can tell."""
        return self.f.jacobian(z, *self.inputs) if isinstance(self.f, TanhCell | LinearCell) else None


class LinearCell(nn.Module):
    """f(z, x) = A z + x."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.A.mT + x

    def jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        return self.A.detach().expand(z.shape[0], -1, -1)


class TanhCell(nn.Module):
    """f(z, x, gain) = tanh(gain W z + x), where each sample may have a gain ``(B, 1)`` of its own."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.W = nn.Parameter(W)

    def forward(self, z: Tensor, x: Tensor, gain: Tensor | None = None) -> Tensor:
        product = z @ self.W.mT
        return torch.tanh(product + x if gain is None else gain * product + x)

    def jacobian(self, z: Tensor, x: Tensor, gain: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            slope = 1 - self.forward(z, x, gain).square()
            return (slope if gain is None else gain * slope).unsqueeze(2) * self.W


class ConvCell(nn.Module):
    """f(z, x) = x + conv(relu(norm(conv(z)))), 3x3 convolutions."""

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        product: Tensor = self.conv2(torch.relu(self.norm(self.conv1(z))))
        return x + product

    def initial_state(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class NormConvCell(nn.Module):
    """f(z, x) = norm(conv(z) + x): one convolution and one normalisation, for overheads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, channels)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        value: Tensor = self.norm(self.conv(z) + x)
        return value


class NeighbourCell(nn.Module):
    """f(z, x) = tanh(v z + w shift(z) + x), entry by entry: few parameters and small intermediates."""

    def __init__(self, v: Tensor, w: Tensor) -> None:
        super().__init__()
        self.v = nn.Parameter(v)
        self.w = nn.Parameter(w)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.v * z + self.w * z.roll(1, dims=1) + x)


class Scaled(nn.Module):
    """s f(z / s, *inputs)."""

    def __init__(self, f: nn.Module, s: float) -> None:
        super().__init__()
        self.f = f
        self.s = s

    def forward(self, z: Tensor, *inputs: Tensor) -> Tensor:
        value: Tensor = self.s * self.f(z / self.s, *inputs)
        return value


class ConvClassifier(nn.Module):
    """The parts of the trained convolutional model: image ``(B, 1, 8, 8)`` -> x -> z* -> logits ``(B, 10)``."""

    channels, size = 32, 12

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, self.channels, 3, padding=1)
        self.cell = ConvCell(self.channels)
        self.head = nn.Linear(self.channels * 9, 10)
        with torch.no_grad():
            self.cell.conv2.weight *= 0.2  # training starts from a contraction, and x weighs enough to keep it one
            self.encoder.weight *= 4

    def encode(self, image: Tensor) -> Tensor:
        """The input x ``(B, 32, 12, 12)`` of the cell; the image is enlarged first."""
        large = nn.functional.interpolate(image, size=(self.size, self.size), mode="bilinear", align_corners=False)
        x: Tensor = self.encoder(large)
        return x

    def classify(self, z: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(torch.relu(z), 3)
        logits: Tensor = self.head(pooled.flatten(1))
        return logits


# ------------------------------------------------------------------------------------------------------ the matrices


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(size: int, g: torch.Generator) -> Tensor:
    """Independent entries: the eigenvalues fill a disc of radius 1 (Ginibre), the worst case for acceleration."""
    G = torch.randn(size, size, dtype=torch.float64, generator=g)
    return torch.div(G, size**0.5)


def symmetric(size: int, g: torch.Generator) -> Tensor:
    """Real eigenvalues, a semicircle over [-1, 1]."""
    G = gaussian(size, g)
    return (G + G.mT) / 8**0.5


def orthogonal(size: int, g: torch.Generator) -> Tensor:
    Q, R = torch.linalg.qr(gaussian(size, g))
    return torch.mul(Q, R.diagonal().sign())


def outliers(size: int, g: torch.Generator) -> Tensor:
    """Symmetric, the eigenvalues uniform in [-0.4, 0.4] but for ten, from 0.5 to 1: the shape of trained layers."""
    Q, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=g))
    bulk = torch.empty(size - 10, dtype=torch.float64).uniform_(-0.4, 0.4, generator=g)
    eigenvalues = torch.cat([bulk, torch.linspace(0.5, 1, 10, dtype=torch.float64)])
    return torch.matmul(Q * eigenvalues, Q.mT)


# ------------------------------------------------------------------------------------------------------ the problems


def linear(make: Callable[[int, torch.Generator], Tensor], name: str, radius: float = 0.95) -> Problem:
    """The map z = A z + x with A scaled to this spectral radius; B = 16, n = 100."""
    g = generator(0)
    A = make(100, g)
    A = A * (radius / torch.linalg.eigvals(A).abs().max())
    x = torch.randn(16, 100, dtype=torch.float64, generator=g)
    return Problem(name, LinearCell(A), torch.zeros_like(x), (x,), _random_loss(x, g))


@dataclass(frozen=True)
class TanhRecipe:
    """z = tanh(gain W z + b), with b normal of standard deviation ``spread``."""

    name: str
    make: Callable[[int, torch.Generator], Tensor]
    size: int
    batch: int
    radius: float
    gain: float
    spread: float = 0.5

    def problem(self, gain: float | None = None) -> Problem:
        g = generator(0)
        W = self.make(self.size, g) * (self.gain if gain is None else gain)
        x = self.spread * torch.randn(self.batch, self.size, dtype=torch.float64, generator=g)
        return Problem(self.name, TanhCell(W), torch.zeros_like(x), (x,), _random_loss(x, g))


# The gains make the worst sample's spectral radius at z* what ``radius`` says.
TANH = TanhRecipe("tanh", gaussian, 100, 16, radius=0.95, gain=1.1390)
SYMMETRIC = TanhRecipe("symmetric", symmetric, 200, 32, radius=0.9, gain=1.1568)
GINIBRE = TanhRecipe("ginibre", gaussian, 200, 32, radius=0.9, gain=1.0951)
OUTLIERS = TanhRecipe("outliers", outliers, 200, 32, radius=0.98, gain=0.994, spread=0.1)


@cache
def conv_model() -> tuple[ConvClassifier, Tensor, Tensor]:
    """The trained model in float64, and 16 test digits ``(16, 1, 8, 8)`` with their labels.

    ``benchmarks.train_conv`` made it: 93 % of the test set right, spectral radii of these digits from 0.71 to 0.88.
    """
    tensors = load_file(CONV_WEIGHTS)
    images, labels = tensors.pop("images"), tensors.pop("labels")
    model = ConvClassifier()
    model.load_state_dict(tensors)
    return model.double(), images.double(), labels


def conv() -> Problem:
    """The equilibrium of the trained convolutional model on 16 test digits; d = 4608."""
    model, images, labels = conv_model()
    with torch.no_grad():
        x = model.encode(images)
    return Problem(
        "conv",
        model.cell,
        torch.zeros_like(x),
        (x,),
        lambda z: nn.functional.cross_entropy(model.classify(z), labels),
        max_steps=250,
    )


def mixed() -> Problem:
    """16 samples of one tanh layer whose gains spread their spectral radii from 0.2 to 0.98."""
    return _spread("mixed", 100, torch.linspace(0.2, 1.13, 16, dtype=torch.float64))


def few_hard(batch: int = 256, size: int = 400) -> Problem:
    """A batch of which 6 % is hard: gain 1.05 beside gains from 0.3 to 0.5."""
    hard = round(0.06 * batch)
    gains = torch.linspace(0.3, 0.5, batch, dtype=torch.float64)
    gains[torch.randperm(batch, generator=generator(1))[:hard]] = 1.05
    return replace(_spread("few hard", size, gains), max_steps=200)


SOLVED: dict[str, Callable[[], Problem]] = {
    "linear": lambda: linear(gaussian, "linear"),
    "orthogonal": lambda: linear(orthogonal, "orthogonal"),
    "tanh": TANH.problem,
    "symmetric": SYMMETRIC.problem,
    "ginibre": GINIBRE.problem,
    "outliers": OUTLIERS.problem,
    "conv": conv,
}
"""Problems that are solved to a tolerance."""


def tanh_overhead(size: int, dtype: torch.dtype) -> Problem:
    """The map z = tanh(W z + x), B = 64: an evaluation is almost free at n = 100."""
    g = generator(0)
    W = 0.9 * gaussian(size, g)
    x = torch.randn(64, size, dtype=torch.float64, generator=g)
    return _cast(Problem(f"tanh {size}", TanhCell(W), torch.zeros_like(x), (x,), _random_loss(x, g)), dtype)


def conv_overhead(dtype: torch.dtype) -> Problem:
    """The map z = norm(conv(z) + x), 32 channels of 32 x 32, B = 16."""
    g = generator(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell = NormConvCell(32).double()
    x = torch.randn(16, 32, 32, 32, dtype=torch.float64, generator=g)
    return _cast(Problem("conv 32x32", cell, torch.zeros_like(x), (x,), _random_loss(x, g)), dtype)


OVERHEAD: dict[str, Callable[[torch.dtype], Problem]] = {
    "tanh 100": lambda dtype: tanh_overhead(100, dtype),
    "tanh 1024": lambda dtype: tanh_overhead(1024, dtype),
    "conv 32x32": conv_overhead,
}
"""Problems on which a fixed number of steps is timed."""


def memory_problem() -> Problem:
    """A state of (8, 4096) that no solver brings to a residual of 0 within some hundred steps."""
    g = generator(0)
    v, w = 0.49 * torch.rand(2, 4096, dtype=torch.float64, generator=g) + 0.005
    x = 0.1 * torch.randn(8, 4096, dtype=torch.float64, generator=g)
    return Problem("neighbours", NeighbourCell(v, w), torch.zeros_like(x), (x,), _random_loss(x, g))


def _spread(name: str, size: int, gains: Tensor) -> Problem:
    g = generator(0)
    W = gaussian(size, g)
    x = 0.2 * torch.randn(len(gains), size, dtype=torch.float64, generator=g)
    return Problem(name, TanhCell(W), torch.zeros_like(x), (x, gains.unsqueeze(1)), _random_loss(x, g))


def _random_loss(z: Tensor, g: torch.Generator) -> Callable[[Tensor], Tensor]:
    """sum(R z), with random rows of R of unit norm."""
    R = torch.randn(z.shape, dtype=z.dtype, generator=g)
    R = R / R.flatten(1).norm(dim=1).view(-1, *[1] * (z.dim() - 1))
    return lambda z: (R.to(z.dtype) * z).sum()


def _cast(problem: Problem, dtype: torch.dtype) -> Problem:
    return replace(
        problem,
        f=problem.f.to(dtype),
        z0=problem.z0.to(dtype),
        inputs=tuple(x.to(dtype) for x in problem.inputs),
    )


# ------------------------------------------------------------------------------------------------------ what they are


def spectral_radii(problem: Problem, vectors: int = 60) -> Tensor:
    """``(B,)`` the spectral radius of df/dz at z*, from dense eigenvalues, or by Arnoldi with so many products."""
    z = problem.solution()
    J = problem.jacobians(z)
    if J is not None:
        return _largest(J)
    z_in = z.requires_grad_()
    fz = problem.f(z_in, *problem.inputs)
    batch = z.shape[0]
    q = torch.randn(z.shape, dtype=z.dtype, generator=generator(0)).flatten(1)
    Q = (q / q.norm(dim=1, keepdim=True)).unsqueeze(2)  # (B, N, k)
    H = z.new_zeros(batch, vectors + 1, vectors)
    for k in range(vectors):
        (w,) = torch.autograd.grad(fz, z_in, Q[:, :, k].view_as(z), retain_graph=True)
        w = w.flatten(1).unsqueeze(2)
        for _ in range(2):  # twice is enough
            h = Q.mT @ w
            w = w - Q @ h
            H[:, : k + 1, k] += h.squeeze(2)
        norm = w.norm(dim=1, keepdim=True)
        H[:, k + 1, k] = norm.flatten()
        Q = torch.cat((Q, w / norm), dim=2)
    return _largest(H[:, :vectors])


def _largest(matrices: Tensor) -> Tensor:
    return torch.amax(torch.linalg.eigvals(matrices).abs(), dim=1)


def calibrated_gain(recipe: TanhRecipe) -> float:
    """The gain that gives the worst sample the recipe's spectral radius, by the secant method."""
    low, high = recipe.radius, 1.1 * recipe.radius
    below = float(spectral_radii(recipe.problem(low)).max()) - recipe.radius
    for _ in range(20):
        above = float(spectral_radii(recipe.problem(high)).max()) - recipe.radius
        if abs(above) < 1e-7:
            return high
        low, high, below = high, high - above * (high - low) / (above - below), above
    raise RuntimeError(f"no gain gives {recipe.name} the radius {recipe.radius}")


def main() -> None:
    torch.set_num_threads(1)
    for recipe in (TANH, SYMMETRIC, GINIBRE, OUTLIERS):
        print(f"{recipe.name:12} gain {calibrated_gain(recipe):.4f}")
    for make in (*SOLVED.values(), mixed, few_hard):
        problem = make()
        radii = spectral_radii(problem)
        line = f"{problem.name:12} {tuple(problem.z0.shape)!s:18} radius {radii.min():.3f} to {radii.max():.3f}"
        if (J := problem.jacobians(problem.solution())) is not None:
            line += f", norm up to {torch.linalg.matrix_norm(J, ord=2).max():.2f}"
        print(line)


if __name__ == "__main__":
    main()
