"""Weights that are computed: the bound holds, they are computed once a solve, and what is behind them learns."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.problems import METHODS, SOLVERS, Method, generator, tight
from zoo.implicit import (
    DEQ,
    Anderson,
    FixedPointIteration,
    ImplicitGradient,
    Newton,
    SolverReport,
    SolverStatus,
    SpectralBound,
    fixed_point,
)
from zoo.implicit.parametrizations import ConvolutionBound, normalize_weights
from zoo.tanh import TanhCell

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def bounded_deq(method: Method | None = None, steep: float = 3.0) -> tuple[DEQ, Tensor]:
    """A cell whose free weight is far above its bound, in float64."""
    cell = TanhCell(4, contraction=0.8).double()
    with torch.no_grad():
        cell.linear.parametrizations.weight.original.mul_(steep)
    method = method or Method(tight(Anderson()), ImplicitGradient(tight(Anderson())))
    return DEQ(cell, method.solver, method.gradient), torch.randn(3, 4, dtype=torch.float64, generator=generator(1))


# ----------------------------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize("bound", [0.1, 0.9, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3), (1, 1)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_norm_is_bounded(bound: float, shape: tuple[int, int], scale: float) -> None:
    V = scale * torch.randn(*shape, dtype=torch.float64, generator=generator(0))
    W = SpectralBound(bound)(V)
    norm = torch.linalg.matrix_norm(V, ord=2)
    assert torch.linalg.matrix_norm(W, ord=2) <= bound * (1 + 1e-12)
    if norm <= bound:
        assert torch.equal(W, V)
    else:
        torch.testing.assert_close(W, V * (bound / norm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_norm_is_bounded_up_to_the_rounding_of_a_narrow_weight(dtype: torch.dtype, scale: float) -> None:
    V = (scale * torch.randn(6, 4, generator=generator(0))).to(dtype).requires_grad_()
    W = SpectralBound(0.9)(V)
    assert W.dtype == dtype
    assert torch.linalg.matrix_norm(W.double(), ord=2) <= 0.9 * (1 + 2 * torch.finfo(dtype).eps)
    W.sum().backward()
    assert V.grad is not None
    assert V.grad.isfinite().all()


def test_the_bound_is_computed_in_full_precision_in_autocast() -> None:
    V = 3 * torch.randn(6, 4, generator=generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        W = SpectralBound(0.9)(V)
    torch.testing.assert_close(W, SpectralBound(0.9)(V), rtol=0, atol=0)


def test_the_bound_holds_after_training_steps() -> None:
    deq, x = bounded_deq()
    optimizer = torch.optim.SGD(deq.parameters(), lr=1.0)
    for _ in range(5):
        optimizer.zero_grad()
        (-deq(x)[0].square().sum()).backward()
        optimizer.step()
        assert torch.linalg.matrix_norm(deq.cell.linear.weight, ord=2) <= 0.8 * (1 + 1e-12)


@pytest.mark.parametrize("scale", [0.05, 2.0], ids=["inside", "outside"])
def test_gradcheck_of_the_bound(scale: float) -> None:
    V = (scale * torch.randn(3, 4, dtype=torch.float64, generator=generator(2))).requires_grad_()
    assert torch.autograd.gradcheck(SpectralBound(0.7), V)


def test_a_weight_of_zeros_has_a_gradient() -> None:
    """Zero is a common initialisation; a bound over a norm of 0 would be NaN times 0."""
    V = torch.zeros(3, 3, requires_grad=True)
    SpectralBound(0.9)(V).sum().backward()
    assert torch.equal(V.grad, torch.ones(3, 3))


@pytest.mark.parametrize("bound", [0, -1.0, float("nan")])
def test_a_bound_is_positive(bound: float) -> None:
    with pytest.raises(ValueError, match=r"SpectralBound\(bound=...\) takes a positive number; given: "):
        SpectralBound(bound)


@pytest.mark.parametrize("shape", [(3, 3, 3, 3), (2, 3, 3), (3,)])
def test_only_a_matrix_has_this_norm(shape: tuple[int, ...]) -> None:
    """A convolution's kernel broadcasts against its norms over the last two dimensions: without an error, wrongly."""
    with pytest.raises(
        ValueError, match=r"matrix of shape \(m, n\); given: shape \(3|matrix of shape.*given: shape \(2"
    ):
        SpectralBound(0.9)(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_squares_of_extreme_weights_do_not_matter(dtype: torch.dtype, size: float) -> None:
    """1e30 squared is infinite in float32, 1e-30 squared is 0."""
    for bound, V in (
        (SpectralBound(0.9), torch.randn(5, 4, generator=generator(0)).to(dtype) * size),
        (ConvolutionBound(0.9), torch.randn(3, 2, 3, generator=generator(0)).to(dtype) * size),
    ):
        V.requires_grad_()
        W = bound(V)
        (grad,) = torch.autograd.grad(W.sum(), V)
        if size < 1:
            assert torch.equal(W, V)
            assert torch.equal(grad, torch.ones_like(V))
        else:
            torch.testing.assert_close(W, bound(V / size))
            (expected,) = torch.autograd.grad(bound(V / size).sum(), V)
            torch.testing.assert_close(grad * size, expected * size)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_reported_by_the_solve(value: float) -> None:
    """And does not stop in the eigenvalue decomposition, which would not say what is wrong."""
    deq, x = bounded_deq()
    deq.on_failure = "ignore"
    with torch.no_grad():
        deq.cell.linear.parametrizations.weight.original[1, 2] = value
    _, report = deq(x)
    assert (report.status == SolverStatus.NON_FINITE).all()
    kernel = torch.randn(2, 2, 3, 3, generator=generator(0))
    kernel[0, 1, 2, 0] = value
    assert ConvolutionBound(0.9)(kernel).isnan().all()


# ------------------------------------------------------------------------------------------------------ convolutions


def dense(layer: nn.Module, *shape: int) -> Tensor:
    """The matrix of a linear map on one sample of this shape."""
    basis = torch.eye(torch.Size(shape).numel(), dtype=torch.float64).reshape(-1, *shape)
    zero = layer(torch.zeros(1, *shape, dtype=torch.float64))
    return (layer(basis) - zero).flatten(1).mT.detach()


def steep(layer: nn.Module, seed: int = 0) -> nn.Module:
    """In float64, with weights of norms far above 1."""
    layer = layer.double()
    with torch.no_grad():
        layer.weight.normal_(generator=generator(seed)).mul_(3)
    return layer


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "same": (nn.Conv2d(3, 4, 3, padding=1), (3, 7, 6)),
    "valid": (nn.Conv2d(3, 4, 3), (3, 7, 6)),
    "wide padding": (nn.Conv2d(2, 3, 3, padding=4), (2, 5, 5)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 8, 7)),
    "strided more than wide": (nn.Conv2d(2, 2, 2, stride=3), (2, 7, 7)),
    "dilated": (nn.Conv2d(2, 2, 3, padding=2, dilation=2), (2, 7, 7)),
    "even": (nn.Conv2d(2, 3, (2, 4), padding=(1, 2)), (2, 6, 7)),
    "longer than the image": (nn.Conv2d(2, 2, 7, padding=3), (2, 4, 3)),
    "flat": (nn.Conv2d(2, 2, (1, 5), padding=(0, 2)), (2, 4, 9)),
    "pointwise": (nn.Conv2d(4, 3, 1), (4, 3, 3)),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 6, 6)),
    "circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 6)),
    "circular and strided": (nn.Conv2d(2, 3, 3, padding=1, stride=2, padding_mode="circular"), (2, 5, 6)),
    "circular and even": (nn.Conv2d(2, 2, 4, padding="same", padding_mode="circular"), (2, 5, 6)),
    "1d": (nn.Conv1d(3, 4, 5, padding=2), (3, 20)),
    "3d": (nn.Conv3d(2, 2, (3, 2, 3), padding=1), (2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, padding=1), (3, 6, 6)),
    "transposed and strided": (nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1), (3, 4, 5)),
    "transposed and grouped": (nn.ConvTranspose1d(4, 6, 4, groups=2, dilation=2), (4, 12)),
}
every_convolution = pytest.mark.parametrize("name", CONVOLUTIONS)


@every_convolution
@pytest.mark.parametrize("bound", [0.9, 5.0])
def test_the_norm_of_a_convolution_is_bounded(name: str, bound: float) -> None:
    layer, shape = CONVOLUTIONS[name]
    layer = steep(copy.deepcopy(layer))
    free = torch.linalg.matrix_norm(dense(layer, *shape), ord=2)
    assert free > bound
    assert normalize_weights(layer, "contractive", bound=bound) == ["weight"]
    norm = torch.linalg.matrix_norm(dense(layer, *shape), ord=2)
    assert norm <= bound * (1 + 1e-12)
    if not any(word in name for word in ("strided", "longer", "3d")):  # where the image is not much of a plane
        assert norm > 0.7 * bound


@every_convolution
def test_a_convolution_within_its_bound_is_left_alone(name: str) -> None:
    """||H(w)||_2 is at most the sum of the norms of the taps."""
    layer, _ = CONVOLUTIONS[name]
    layer = steep(copy.deepcopy(layer))
    weight = layer.weight.detach().clone()
    taps = weight.flatten(2).movedim(2, 0)
    bound = 1.0824 ** (weight.dim() - 2) * torch.linalg.matrix_norm(taps, ord=2).sum()
    normalize_weights(layer, "contractive", bound=bound.item())
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("taps", [3, 4])
def test_on_an_image_of_the_grids_size_the_norm_is_known(taps: int) -> None:
    """The norm of a circular convolution on N x N is the largest one on a grid of N x N frequencies."""
    layer = steep(nn.Conv2d(2, 2, taps, padding="same", padding_mode="circular", bias=False))
    normalize_weights(layer, "contractive", bound=0.9)
    slack = 1 / torch.tensor(torch.pi * (taps - 1) / (8 * taps), dtype=torch.float64).cos() ** 2
    norm = torch.linalg.matrix_norm(dense(layer, 2, 4 * taps, 4 * taps), ord=2)
    torch.testing.assert_close(norm, 0.9 / slack)


@pytest.mark.parametrize("taps", [2, 3])
def test_between_frequencies_of_the_grid_the_norm_rises_as_far_as_is_allowed_for(taps: int) -> None:
    """H(w) = 1 + R e^(-i w (k - 1)), R a rotation that puts its largest norm, 2, in the middle between two of them."""
    angle = torch.tensor((taps - 1) * torch.pi / (4 * taps), dtype=torch.float64)
    V = torch.zeros(2, 2, taps, dtype=torch.float64)
    V[:, :, 0] = torch.eye(2)
    V[:, :, -1] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    torch.testing.assert_close(ConvolutionBound(1.0)(V), V / 2)
    torch.testing.assert_close(ConvolutionBound(2 + 1e-12)(V), V, rtol=0, atol=0)


def test_the_norm_of_the_kernel_as_a_matrix_is_no_bound() -> None:
    """Which is what spectral norm bounds, torch's own too."""
    layer = steep(nn.Conv2d(4, 4, 3, padding=1))
    with torch.no_grad():
        layer.weight.div_(torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2))
    assert torch.linalg.matrix_norm(dense(layer, 4, 8, 8), ord=2) > 1.3


def test_a_kernel_of_one_tap_has_the_bound_of_its_matrix() -> None:
    V = torch.randn(4, 3, dtype=torch.float64, generator=generator(0))
    torch.testing.assert_close(ConvolutionBound(0.9)(V[:, :, None, None])[:, :, 0, 0], SpectralBound(0.9)(V))


def test_without_groups_the_bound_is_only_further_from_the_norm() -> None:
    V = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator(0))
    assert (ConvolutionBound(0.9)(V).abs() <= ConvolutionBound(0.9, groups=2)(V).abs()).all()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scale", [0.02, 2.0], ids=["inside", "outside"])
def test_gradcheck_of_the_bound_of_a_convolution(scale: float, groups: int) -> None:
    V = (scale * torch.randn(4, 2, 3, 2, dtype=torch.float64, generator=generator(2))).requires_grad_()
    assert torch.autograd.gradcheck(ConvolutionBound(0.7, groups), V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bound_of_a_narrow_convolution(dtype: torch.dtype) -> None:
    V = (3 * torch.randn(4, 3, 3, 3, generator=generator(0))).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        W = ConvolutionBound(0.9)(V)
    assert W.dtype == dtype
    expected = ConvolutionBound(0.9)(V.double())
    torch.testing.assert_close(W.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    (grad,) = torch.autograd.grad(W.sum(), V)
    assert grad.isfinite().all()


@pytest.mark.parametrize("given", [(torch.ones(3, 3), 1), (torch.ones(3, 3, 3), 2)])
def test_only_a_kernel_has_the_bound_of_a_convolution(given: tuple[Tensor, int]) -> None:
    V, groups = given
    with pytest.raises(ValueError, match=r"takes a kernel of shape \(m, n, \*k\).*given: shape \(3, 3"):
        ConvolutionBound(0.9, groups)(V)


def test_a_contractive_convolution_is_a_contraction() -> None:
    """The cell tanh(conv(z) + x), with a weight on which plain iteration without the bound does not converge."""
    layer = steep(nn.Conv2d(3, 3, 3, padding=1))

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(layer(z) + x)

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=generator(1))
    solver = FixedPointIteration(tol=1e-8, max_steps=200)
    assert not fixed_point(f, torch.zeros_like(x), x, solver=solver, on_failure="ignore")[1].converged.any()
    normalize_weights(layer, "contractive", bound=0.9)
    z, report = fixed_point(f, torch.zeros_like(x), x, solver=solver)
    assert report.converged.all()
    for seed in range(5):
        other = torch.randn(z.shape, dtype=z.dtype, generator=generator(seed))
        assert (f(other, x) - f(z, x)).norm() <= 0.9 * (other - z).norm()


# --------------------------------------------------------------------------------------------------- whole modules


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3)) for _ in "ab")
        self.fuse = nn.ModuleDict({"up": nn.ConvTranspose2d(2, 4, 2, stride=2)})
        self.post_fuse = nn.Conv2d(4, 2, 1)
        self.norm = nn.GroupNorm(1, 2)
        self.head = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = sum(branch(x) for branch in self.branches)
        return self.head(self.norm(self.post_fuse(self.fuse["up"](y))).mean((2, 3)))


def branches(seed: int = 0) -> tuple[Branches, Tensor]:
    torch.manual_seed(seed)
    return Branches().double(), torch.randn(3, 2, 9, 9, dtype=torch.float64)


BRANCHES = [f"branches.{i}.{j}.weight" for i in (0, 1) for j in (0, 2)]
ALL = [*BRANCHES, "fuse.up.weight", "post_fuse.weight", "head.weight"]
KINDS: dict[str, dict[str, Any]] = {"weight": {}, "spectral": {}, "contractive": {"bound": 0.3}}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_all_layers_are_found(kind: Any) -> None:
    module, _ = branches()
    assert normalize_weights(module, kind, **KINDS[kind]) == ALL
    found = [f"{name}.weight" for name, layer in module.named_modules() if parametrize.is_parametrized(layer, "weight")]
    assert found == ALL
    assert all(p.dtype == torch.float64 for p in module.state_dict().values())


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("fuse", [*BRANCHES, "post_fuse.weight", "head.weight"]),
        (("*fuse", "head"), BRANCHES),
        ("branches.*.2", [name for name in ALL if not name.endswith("2.weight")]),
        (("branches", "branches.0", "up"), ["post_fuse.weight", "head.weight"]),
        (["2", "0"], ["fuse.up.weight", "post_fuse.weight", "head.weight"]),
    ],
)
def test_names_are_excluded_by_whole_parts(exclude: Any, left: list[str]) -> None:
    module, _ = branches()
    assert normalize_weights(module, exclude=exclude) == left
    wrapped = nn.ModuleDict({"net": branches()[0]})
    assert normalize_weights(wrapped, exclude=exclude) == [f"net.{name}" for name in left]


def test_weight_norm_changes_nothing_at_first() -> None:
    module, x = branches()
    before = module(x)
    normalize_weights(module)
    torch.testing.assert_close(module(x), before, rtol=0, atol=1e-14)


def test_weight_norm_has_one_length_for_each_output_channel() -> None:
    module, _ = branches()
    normalize_weights(module)
    shapes = {name: module.get_submodule(name).parametrizations.weight.original0.shape for name in parametrized(module)}
    assert shapes["branches.0.0"] == (3, 1, 1, 1)
    assert shapes["fuse.up"] == (1, 4, 1, 1)
    assert shapes["head"] == (5, 1)
    with torch.no_grad():
        module.head.parametrizations.weight.original0.fill_(2.0)
        module.fuse["up"].parametrizations.weight.original0.fill_(3.0)
    torch.testing.assert_close(module.head.weight.norm(dim=1), torch.full((5,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(
        module.fuse["up"].weight.transpose(0, 1).flatten(1).norm(dim=1), torch.full((4,), 3.0, dtype=torch.float64)
    )


def test_published_weights_of_weight_norm_load() -> None:
    """As ``weight_g`` and ``weight_v``; W = v g / |v|."""
    module, _ = branches()
    normalize_weights(module, exclude="branches")
    state = module.state_dict()
    v = torch.randn(5, 2, dtype=torch.float64)
    for key in ("original0", "original1"):
        del state[f"head.parametrizations.weight.{key}"]
    module.load_state_dict(state | {"head.weight_g": torch.ones(5, 1), "head.weight_v": v})
    torch.testing.assert_close(module.head.weight, v / v.norm(dim=1, keepdim=True))


def test_spectral_norm_is_near_1() -> None:
    layer = steep(nn.Linear(30, 20))
    normalize_weights(layer, "spectral")
    assert (torch.linalg.matrix_norm(layer.weight, ord=2) - 1).abs() < 0.1
    kernel = steep(nn.ConvTranspose2d(6, 5, 3))
    normalize_weights(kernel, "spectral")
    matrix = kernel.weight.transpose(0, 1).flatten(1)
    assert (torch.linalg.matrix_norm(matrix, ord=2) - 1).abs() < 0.1


@every_kind
def test_the_first_step_reaches_all_weights(kind: Any) -> None:
    module, x = branches()
    normalize_weights(module, kind, **KINDS[kind])
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x).square().sum().backward()
    optimizer.step()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        if "weight" in name:
            assert (parameter - before[name]).abs().max() > 0, name


@every_kind
def test_round_trips(kind: Any) -> None:
    """deepcopy, and a state dict into a module that is normalised likewise."""
    module, x = branches()
    normalize_weights(module, kind, **KINDS[kind])
    module.eval()
    twin = copy.deepcopy(module)
    other, _ = branches(seed=1)
    normalize_weights(other.eval(), kind, **KINDS[kind])
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(twin(x), module(x))
    assert torch.equal(other(x), module(x))
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in module.parameters()})


@every_kind
def test_it_can_be_undone(kind: Any) -> None:
    module, x = branches()
    names = normalize_weights(module, kind, **KINDS[kind])
    module.eval()
    value = module(x)
    for name in names:
        parametrize.remove_parametrizations(module.get_submodule(name.rpartition(".")[0]), "weight")
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in Branches().named_parameters()}
    torch.testing.assert_close(module(x), value, rtol=0, atol=1e-14)
    assert normalize_weights(module, kind, **KINDS[kind]) == names


@every_kind
def test_a_solve_with_a_normalised_cell_learns(kind: Any) -> None:
    torch.manual_seed(0)
    cell = TanhCell(4).double()
    with torch.no_grad():
        cell.linear.weight.mul_(0.5)
    normalize_weights(cell, kind, **({"bound": 0.9} if kind == "contractive" else {}))
    deq = DEQ(cell.eval(), tight(Anderson()), ImplicitGradient(tight(Anderson())))
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator(1))
    deq(x)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in cell.parameters())


# ------------------------------------------------------------------------------------------------------------ refusals


def parametrized(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if parametrize.is_parametrized(layer)]


@every_kind
def test_twice_is_once_too_often(kind: Any) -> None:
    module, _ = branches()
    normalize_weights(module, kind, exclude=[name.removesuffix(".weight") for name in ALL[:-1]], **KINDS[kind])
    with pytest.raises(
        ValueError, match=r"the weight of 'head' is parametrised already; first undo that, with .*remove"
    ):
        normalize_weights(module)
    assert parametrized(module) == ["head"]


@every_kind
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": ("fuse", "heads")}, r"'heads' matches none of 'branches.0.0', .*'head'"),
        ({"exclude": ("*",)}, r"finds no linear layer or convolution in this Branches, besides 7 that are excluded"),
    ],
)
def test_patterns_match(kind: Any, arguments: dict[str, Any], message: str) -> None:
    module, _ = branches()
    with pytest.raises(ValueError, match=message):
        normalize_weights(module, kind, **KINDS[kind], **arguments)
    assert parametrized(module) == []


def test_there_is_something_to_normalise() -> None:
    with pytest.raises(ValueError, match="finds no linear layer or convolution in this GroupNorm, besides 0"):
        normalize_weights(nn.GroupNorm(1, 2))


@pytest.mark.parametrize(
    ("kind", "bound", "message"),
    [
        ("batch", None, "takes one of weight, spectral, contractive; given: 'batch'"),
        ("contractive", None, "takes bound= with kind='contractive' only, and there always; given: None"),
        ("weight", 0.9, "takes bound= with kind='contractive' only, and there always; given: 0.9"),
        ("contractive", 0.0, r"\(bound=...\) takes a positive number; given: 0.0"),
    ],
)
def test_kinds_and_bounds(kind: Any, bound: float | None, message: str) -> None:
    module, _ = branches()
    with pytest.raises(ValueError, match=message):
        normalize_weights(module, kind, bound=bound)
    assert parametrized(module) == []


def test_a_shared_weight_is_refused_and_a_shared_layer_is_one_layer() -> None:
    module, _ = branches()
    module.again = module.head
    module.head.weight = nn.Parameter(module.head.weight.detach())
    assert normalize_weights(copy.deepcopy(module)) == ALL
    module.other = nn.Embedding(5, 2)
    module.other.weight = module.head.weight
    with pytest.raises(ValueError, match=r"one weight is shared by head.weight and other.weight, .*exclude it"):
        normalize_weights(module)
    assert parametrized(module) == []
    assert normalize_weights(module, exclude="head") == ALL[:-1]


def test_a_lazy_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the weight of '1' has no shape yet; call the module once"):
        normalize_weights(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))


def test_a_norm_of_zero_is_refused_where_it_divides() -> None:
    """A row of zeros has no direction; the weight would be NaN."""
    module, _ = branches()
    with torch.no_grad():
        module.head.weight[2] = 0
    with pytest.raises(ValueError, match=r"the weight of 'head' has a norm of 0, for one output channel at least"):
        normalize_weights(module)
    assert parametrized(module) == []
    assert normalize_weights(copy.deepcopy(module), "spectral") == ALL
    assert normalize_weights(copy.deepcopy(module), "contractive", bound=0.9) == ALL
    nn.init.zeros_(module.head.weight)
    with pytest.raises(ValueError, match="the weight of 'head' has a norm of 0"):
        normalize_weights(module, "spectral")


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(2, 2, 3, padding="same", padding_mode="replicate"),
        nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode="circular"),
    ],
    ids=["reflect", "replicate", "wide circular"],
)
def test_paddings_that_repeat_pixels_have_no_bound(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(2, 2), layer)
    with pytest.raises(ValueError, match=r"no bound is known for the convolution '1', with padding=.*padding_mode="):
        normalize_weights(module, "contractive", bound=0.9)
    assert parametrized(module) == []
    assert normalize_weights(module, "weight") == ["0.weight", "1.weight"]


# ----------------------------------------------------------------------------------------------------------- in a DEQ


@every_method
def test_gradcheck_through_the_bound_and_the_solve(method: Method) -> None:
    deq, x = bounded_deq(method)

    def solve(original: Tensor, x: Tensor) -> Tensor:
        z, _ = torch.func.functional_call(deq, {"cell.linear.parametrizations.weight.original": original}, (x,))
        return z

    original = deq.cell.linear.parametrizations.weight.original.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        solve, (original, x.requires_grad_()), eps=1e-5, atol=1e-7, rtol=1e-6, fast_mode=True
    )


@every_method
@pytest.mark.parametrize("enabled", [True, False])
def test_computed_once_a_call(method: Method, enabled: bool) -> None:
    deq, x = bounded_deq(method)
    calls = []
    deq.cell.linear.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(enabled):
        _, report = deq(x)
        assert len(calls) == 1
        assert report.evaluations > 3
        deq(x)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
@every_method
def test_torchs_own_parametrizations_learn(method: Method, name: str) -> None:
    """Though the solve runs under no_grad; the reference recomputes the weight at each of many plain iterations."""
    cell = TanhCell(4).double()
    with torch.no_grad():
        cell.linear.weight.mul_(0.5)
    getattr(parametrizations, name)(cell.linear)
    scale = 0.6 if name == "orthogonal" else 1.0
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator(1))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cell

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.inner(scale * z, x)

        def initial_state(self, x: Tensor) -> Tensor:
            return self.inner.initial_state(x)

    deq = DEQ(Scaled(), method.solver, method.gradient).eval()
    parameters = list(deq.parameters())
    z, _ = deq(x)
    found = torch.autograd.grad(z.square().sum(), parameters, retain_graph=True)
    state = torch.zeros_like(x)
    for _ in range(100):
        state = deq.cell(state, x)
    for ours, reference in zip(found, torch.autograd.grad(state.square().sum(), parameters), strict=True):
        assert reference.abs().max() > 0
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-8)


def test_nothing_stays_cached_after_a_call() -> None:
    deq, x = bounded_deq()
    first, _ = deq(x)
    with torch.no_grad():
        deq.cell.linear.parametrizations.weight.original.copy_(0.1 * torch.eye(4, dtype=torch.float64))
    second, _ = deq(x)
    expected, _ = DEQ(TanhCellOf(0.1 * torch.eye(4, dtype=torch.float64)), tight(Anderson()))(x)
    torch.testing.assert_close(second.detach(), expected.detach(), rtol=0, atol=1e-11)
    assert (first - second).abs().max() > 0.1


def TanhCellOf(weight: Tensor) -> TanhCell:  # noqa: N802
    cell = TanhCell(weight.shape[0]).to(weight.dtype)
    with torch.no_grad():
        cell.linear.weight.copy_(weight)
    return cell


# ------------------------------------------------------------------------------------------------------- round trips


def used(contraction: float | None) -> tuple[DEQ, Tensor]:
    """A DEQ that has solved and differentiated, and so holds two reports."""
    deq = DEQ(TanhCell(4, contraction).double(), Newton(), ImplicitGradient(Anderson(tol=1e-3)), on_failure="ignore")
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator(1))
    deq(x, trace=True)[0].sum().backward()
    assert deq.adjoint_report is not None
    return deq, x


def assert_same(copied: DEQ, deq: DEQ, x: Tensor) -> None:
    assert (copied.solver, copied.gradient, copied.on_failure) == (deq.solver, deq.gradient, deq.on_failure)
    assert isinstance(copied.report, SolverReport)
    assert {id(p) for p in copied.parameters()}.isdisjoint({id(p) for p in deq.parameters()})
    results = []
    for module in (copied, deq):
        module.zero_grad()
        z, _ = module(x)
        z.sum().backward()
        results.append([z.detach(), *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("contraction", [None, 0.9])
def test_deepcopy(contraction: float | None) -> None:
    deq, x = used(contraction)
    assert_same(copy.deepcopy(deq), deq, x)


def saved_and_loaded(module: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copying", [lambda deq: pickle.loads(pickle.dumps(deq)), saved_and_loaded])  # noqa: S301
def test_pickle_and_torch_save(copying: Any) -> None:
    deq, x = used(None)
    assert_same(copying(deq), deq, x)


def test_torch_does_not_pickle_parametrized_modules_and_says_what_to_do() -> None:
    deq, _ = used(0.9)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(deq)


@pytest.mark.parametrize("contraction", [None, 0.9])
def test_state_dict(contraction: float | None) -> None:
    deq, x = used(contraction)
    buffer = io.BytesIO()
    torch.save(deq.state_dict(), buffer)
    buffer.seek(0)
    other, _ = used(contraction)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same(other, deq, x)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_choices_are_values(solver: Any) -> None:
    """Equal, hashable, frozen, picklable."""
    twin = pickle.loads(pickle.dumps(solver))  # noqa: S301
    assert twin == solver
    assert hash(twin) == hash(solver)
    assert {twin: 1}[solver] == 1
    with pytest.raises(AttributeError):
        solver.tol = 1.0


def test_the_choices_of_a_deq_are_shown() -> None:
    text = repr(DEQ(TanhCell(2, 0.5), Newton(tol=1e-3)))
    assert "solver=Newton(tol=0.001" in text
    assert "gradient=ImplicitGradient(solver=Anderson(" in text
    assert "bound=0.5" in text
    assert parametrize.is_parametrized(TanhCell(2, 0.5).linear)
