"""Diagnostics against eigenvalues that are known, maps with more equilibria than one, and pictures read back."""

from __future__ import annotations

import importlib.util
import io
import math
import sys
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils import _pytree as pytree

from tests.problems import PROBLEMS, Counting, flat, generator, slow_symmetric, tanh_problem, unflat
from zoo.implicit import DEQ, Anderson, FixedPointIteration, SolverReport, VariationalDropout, fixed_point, one_draw
from zoo.implicit.diagnostics import path_independence, spectral_radius
from zoo.implicit.plots import convergence_plot

Double = torch.float64


def linear(z: Tensor, A: Tensor) -> Tensor:
    """A map whose Jacobian is A, each sample with its own."""
    return torch.einsum("bij,bj->bi", A, z)


def radius_of(A: Tensor, dtype: torch.dtype = Double, **options: Any) -> Tensor:
    """What is found for ``(B, N, N)`` Jacobians A."""
    return spectral_radius(linear, torch.zeros(A.shape[:2], dtype=dtype), A.to(dtype), **options)


def largest(A: Tensor) -> Tensor:
    return torch.linalg.eigvals(A).abs().amax(dim=-1)


# -------------------------------------------------------------------------------------------------- known eigenvalues


def test_rotations() -> None:
    """Complex pairs, which the Rayleigh quotient of a power iteration does not see: it gives 0.9 cos(angle)."""
    angle = torch.arange(0, 360, 15, dtype=Double) * math.pi / 180
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).reshape(-1, 2, 2)
    torch.testing.assert_close(radius_of(0.9 * turn), torch.full((24,), 0.9, dtype=Double), rtol=1e-12, atol=0)
    planes = torch.block_diag(*(size * R for size, R in zip((0.9, 0.5, 0.1), turn[[3, 6, 10]], strict=True)))
    assert float(radius_of(planes[None])) == pytest.approx(0.9, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, Double], ids=str)
@pytest.mark.parametrize("size", [1, 2, 5, 20])
def test_exact_with_as_many_products_as_entries(size: int, dtype: torch.dtype) -> None:
    A = torch.randn(16, size, size, dtype=Double, generator=generator(size))
    found = radius_of(A, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), largest(A), rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=0)


def test_the_accuracy_that_is_documented() -> None:
    gaussian = torch.randn(5, 200, 200, dtype=Double, generator=generator(0))
    gaussian *= (0.9 / largest(gaussian))[:, None, None]
    symmetric = gaussian + gaussian.mT
    symmetric *= (0.9 / torch.linalg.eigvalsh(symmetric).abs().amax(dim=1))[:, None, None]
    orthogonal = 0.9 * torch.linalg.qr(gaussian).Q
    limits = ((gaussian, 0.088, 0.024), (symmetric, 0.017, 0.0005), (orthogonal, 0.089, 0.028))
    for A, error_20, error_40 in limits:
        for products, error in ((20, error_20), (40, error_40)):
            for dtype in (torch.float32, Double):
                seeds = (generator(seed) for seed in range(5))
                found = torch.cat([radius_of(A, dtype, products=products, generator=seed) for seed in seeds])
                assert (found - 0.9).abs().quantile(0.95) <= error
                assert A is gaussian or (found < 0.9 + 1e-5).all(), "never too high for a normal matrix"


def test_an_estimate_is_better_with_more_products() -> None:
    A = slow_symmetric(200, 0.9)[None]
    errors = [0.9 - float(radius_of(A, products=n, generator=generator(1))) for n in (2, 5, 10, 20, 40, 80)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.2
    assert errors[3] < 0.02
    assert abs(errors[-1]) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, Double], ids=str)
def test_eigenvalues_that_lie_close_together(dtype: torch.dtype) -> None:
    """All near 1: what is new in a product is a thousandth of it, and one pass of Gram-Schmidt loses it."""
    A = torch.eye(60, dtype=Double) + 1e-4 * torch.randn(8, 60, 60, dtype=Double, generator=generator(0))
    for products, error in ((20, 2e-3), (60, 1e-5)):
        torch.testing.assert_close(radius_of(A, dtype, products=products).double(), largest(A), rtol=0, atol=error)


@pytest.mark.parametrize("block", [2, 3, 4])
def test_jordan_blocks(block: int) -> None:
    """Their eigenvalues are found to the root of rounding; with a zero one too."""
    shift = torch.diag(torch.ones(block - 1, dtype=Double), 1)
    eigenvalues = torch.tensor([0.9, -0.9, 2.0, 0.0], dtype=Double)
    A = eigenvalues[:, None, None] * torch.eye(block, dtype=Double) + shift
    torch.testing.assert_close(radius_of(A), eigenvalues.abs(), rtol=0, atol=10 * 1e-16 ** (1 / block))


@pytest.mark.parametrize("dtype", [torch.float32, Double], ids=str)
def test_a_krylov_space_that_ends_early_ends_sample_by_sample(dtype: torch.dtype) -> None:
    """Ranks 0, 1 and 2, a multiple of the identity, a projection, and one matrix of full rank in one batch."""
    g = generator(5)
    u, v = torch.randn(2, 15, dtype=Double, generator=g)
    Q = torch.linalg.qr(torch.randn(15, 15, dtype=Double, generator=g)).Q
    eye, full = torch.eye(15, dtype=Double), torch.randn(15, 15, dtype=Double, generator=g)
    projection = 3 * Q[:, :4] @ Q[:, :4].mT
    A = torch.stack([0 * eye, torch.outer(u, v), torch.outer(u, v) - torch.outer(v, u), -0.7 * eye, projection, full])
    minor = (u.square().sum() * v.square().sum() - (u @ v) ** 2).sqrt()
    known = torch.stack([u.new_tensor(0), (u @ v).abs(), minor, u.new_tensor(0.7), u.new_tensor(3), largest(full)])
    found = radius_of(A, dtype)
    torch.testing.assert_close(found.double(), known, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=0)
    assert found[0] == 0


# ------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("problem", PROBLEMS)
def test_pytree_states(problem: str) -> None:
    p = PROBLEMS[problem]()
    z, _ = DEQ(p.cell)(*p.inputs)
    J = torch.autograd.functional.jacobian(lambda m: flat(p.cell(unflat(m, p.z0), *p.inputs)).sum(0), flat(z))
    torch.testing.assert_close(spectral_radius(p.cell, z, *p.inputs), largest(J.movedim(1, 0)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolutions(layout: torch.memory_format) -> None:
    """The eigenvalues of a circular convolution are the Fourier coefficients of its kernel."""
    kernels = torch.randn(2, 1, 3, 3, dtype=Double, generator=generator(0))

    def f(z: Tensor, gain: Tensor) -> Tensor:
        padded = nn.functional.pad(z, (1, 1, 1, 1), mode="circular")
        return gain * nn.functional.conv2d(padded, kernels, groups=2)

    placed = torch.zeros(2, 5, 4, dtype=Double)
    placed[:, :3, :3] = kernels[:, 0]
    gain = torch.tensor([1.0, 0.1, -3.0], dtype=Double)
    z = torch.zeros(3, 2, 5, 4, dtype=Double).contiguous(memory_format=layout)
    found = spectral_radius(f, z, gain[:, None, None, None], products=40)
    torch.testing.assert_close(found, gain.abs() * torch.fft.fft2(placed).abs().max(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_states_and_autocast(dtype: torch.dtype) -> None:
    A = torch.randn(4, 10, 10, generator=generator(0))
    z, known = torch.zeros(4, 10), largest(A)
    narrow = spectral_radius(linear, z.to(dtype), A.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        cast = spectral_radius(linear, z, A)
    for found in (narrow, cast):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, known, rtol=0.03, atol=0)
        assert not torch.allclose(found, known, rtol=1e-6), "f itself is computed in low precision"


def test_autocast_reaches_f_only() -> None:
    A = torch.randn(4, 10, 10, generator=generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = spectral_radius(lambda z, A: (A * z[:, None]).sum(2), torch.zeros(4, 10), A)
    torch.testing.assert_close(found, largest(A), rtol=1e-4, atol=0)


@pytest.mark.parametrize("z", [torch.zeros(0, 3), torch.zeros(2, 0)], ids=["no sample", "no entry"])
def test_nothing(z: Tensor) -> None:
    assert torch.equal(spectral_radius(torch.tanh, z), torch.zeros(z.shape[0]))


def test_f_that_does_not_depend_on_z() -> None:
    x, bias = torch.randn(3, 5), nn.Parameter(torch.ones(5))
    for f in (lambda z, x: x.clone(), lambda z, x: x + bias, lambda z, x: 0 * z, lambda z, x: torch.sign(z)):
        assert torch.equal(spectral_radius(f, x, x), torch.zeros(3))
    pair = (torch.randn(3, 2), torch.randn(3, 4))
    nilpotent = spectral_radius(lambda z: (z[1][:, :2], pair[1]), pair)
    assert (nilpotent < 1e-3).all(), "a Jordan block of size 2, in float32"
    torch.testing.assert_close(spectral_radius(lambda z: (2 * z[0], pair[1]), pair), torch.full((3,), 2.0))
    torch.testing.assert_close(spectral_radius(lambda z: z, x), torch.ones(3))


# ------------------------------------------------------------------------------------- one sample, and the rest of them


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_jacobian_that_is_not_finite_is_that_samples_own_affair(bad: float) -> None:
    A = torch.randn(4, 6, 6, dtype=Double, generator=generator(0))
    known = radius_of(A, generator=generator(1))
    for place in ((2, 0, 0), (2, 3, 5)):
        broken = A.clone()
        broken[place] = bad
        found = radius_of(broken, generator=generator(1))
        assert found.isnan().tolist() == [False, False, True, False]
        assert torch.equal(found[[0, 1, 3]], known[[0, 1, 3]])


def test_eigvals_sees_finite_matrices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For some others it raises, for some it does not."""
    seen = []
    eigvals = torch.linalg.eigvals
    monkeypatch.setattr(torch.linalg, "eigvals", lambda H: eigvals(seen.append(H) or H))
    assert radius_of(torch.tensor([1.0, math.nan])[:, None, None].expand(2, 3, 3)).isnan().tolist() == [False, True]
    assert [bool(H.isfinite().all()) for H in seen] == [True]


def test_jacobians_whose_squares_overflow_or_vanish() -> None:
    scale = torch.tensor([1.0, 1e30, 1e-30])
    A = torch.randn(6, 6, generator=generator(0))
    found = radius_of(scale[:, None, None] * A, torch.float32)
    torch.testing.assert_close(found / scale, largest(A).expand(3), rtol=1e-4, atol=0)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    A = torch.randn(5, 50, 50, dtype=Double, generator=generator(0))
    together = radius_of(A, generator=generator(1))
    alone = torch.cat([radius_of(A[[i]], generator=generator(1)) for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=0)


def test_the_generator_decides() -> None:
    A = torch.randn(2, 100, 100, generator=generator(0))
    first, again, other = (radius_of(A, torch.float32, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    radius_of(A, torch.float32, generator=generator(1))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was left alone"


# ------------------------------------------------------------------------------------------------- cost and grad modes


class CountsProducts(torch.autograd.Function):
    """z, and how often something was propagated back through it."""

    products = 0

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        CountsProducts.products += 1
        return g


@pytest.mark.parametrize(
    ("size", "products", "made"), [(50, None, 20), (50, 7, 7), (50, 1, 1), (3, None, 3), (3, 2, 2)]
)
def test_products_and_evaluations_are_counted(size: int, products: int | None, made: int) -> None:
    A = torch.randn(2, size, size, generator=generator(0))
    f = Counting(lambda z: linear(CountsProducts.apply(z), A))
    CountsProducts.products = 0
    spectral_radius(f, torch.zeros(2, size), **({} if products is None else {"products": products}))
    assert CountsProducts.products == made
    assert f.calls == 1


@pytest.mark.parametrize("products", [0, -1, 2.0, True, None])
def test_at_least_one_product(products: Any) -> None:
    with pytest.raises(ValueError, match=rf"spectral_radius\(products=...\) takes an integer >= 1; given: {products}"):
        spectral_radius(torch.tanh, torch.zeros(1, 1), products=products)


MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_every_grad_mode(mode: str, frozen: bool) -> None:
    """State and inputs made in that mode, and a cell in evaluation mode."""
    p = tanh_problem()
    expected = spectral_radius(p.cell, p.z0, *p.inputs)
    p.cell.eval().requires_grad_(not frozen)
    with MODES[mode]():
        x = p.inputs[0] * 1
        z, _ = DEQ(p.cell)(x, z0=torch.zeros_like(p.z0))
        z = torch.zeros_like(z)
        found = spectral_radius(p.cell, z, x)
        assert torch.is_inference_mode_enabled() == (mode == "inference")
        assert torch.is_grad_enabled() == (mode == "grad")
    assert not found.requires_grad
    assert not found.is_inference()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert all(t.grad is None for t in (*p.cell.parameters(), *p.inputs))


def test_the_callers_graph_is_left_alone() -> None:
    p = tanh_problem()
    z, _ = DEQ(p.cell)(*p.inputs)
    expected = torch.autograd.grad(z.sum(), p.leaves, retain_graph=True)
    spectral_radius(p.cell, z, *p.inputs)
    for ours, theirs in zip(torch.autograd.grad(z.sum(), p.leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


class NormalisedCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.weight_norm(nn.Linear(6, 6))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


def test_weights_that_inference_mode_has_cached() -> None:
    """By ``parametrize.cached``, or by autocast: no graph can save such tensors."""
    cell, plain, x = NormalisedCell(), nn.Linear(6, 6), torch.randn(3, 6)
    expected, expected_plain = spectral_radius(cell, x, x), spectral_radius(plain, x)
    with torch.inference_mode(), parametrize.cached():
        cell(x, x)
        torch.testing.assert_close(spectral_radius(cell, x, x), expected, rtol=1e-4, atol=0)
        cell(x, x)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain(x)
        torch.testing.assert_close(spectral_radius(plain, x), expected_plain, rtol=0.05, atol=0)
        plain(x)
    assert all(parameter.grad is None for parameter in (*cell.parameters(), *plain.parameters()))


# -------------------------------------------------------------------------------------------------- path independence

PLAIN = FixedPointIteration(tol=1e-12, max_steps=300)


def two_answers(z: Tensor) -> Tensor:
    """Each entry has the stable equilibria +-0.957504, and 0, which is unstable."""
    return torch.tanh(2 * z)


ANSWER = 0.9575040240772687


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_contraction_is_path_independent(problem: str) -> None:
    p = PROBLEMS[problem](batch=3)
    z = unflat(p.solution(), p.z0)
    result = path_independence(p.cell, z, *p.inputs, solver=Anderson(tol=1e-10), scale=3.0)
    assert result.cosines.shape == result.converged.shape == (5, 3)
    assert result.converged.all()
    torch.testing.assert_close(result.score, torch.ones(3, dtype=Double), rtol=0, atol=1e-9)
    assert not result.cosines.requires_grad


def test_a_map_with_two_equilibria_is_not() -> None:
    z = torch.full((1, 1), ANSWER, dtype=Double)
    result = path_independence(two_answers, z, solver=PLAIN, starts=200, generator=generator(0))
    assert result.cosines.shape == (200, 1), "one sample has no neighbour to start from"
    assert result.converged.all()
    torch.testing.assert_close(result.cosines.abs(), torch.ones(200, 1, dtype=Double))
    assert abs(float(result.score)) < 4 / 200**0.5, "half of the starts lead to either answer"

    wide = torch.full((3, 500), ANSWER, dtype=Double)
    result = path_independence(two_answers, wide, solver=PLAIN, generator=generator(0))
    assert result.cosines[:4].abs().max() < 4 / 500**0.5
    torch.testing.assert_close(result.cosines[4], torch.ones(3, dtype=Double), msg="all have the same z*")


def test_the_last_start_is_the_equilibrium_of_another_sample() -> None:
    z = ANSWER * torch.tensor([[1.0], [1.0], [-1.0]], dtype=Double)
    result = path_independence(two_answers, z, solver=PLAIN)
    assert result.cosines[-1].tolist() == [-1, 1, -1]


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_the_starts_have_the_size_of_z(scale: float) -> None:
    """In each tensor of each sample; of 1 where that is 0."""
    seen: list[Any] = []

    def f(z: Any) -> Any:
        seen.append(z)
        return pytree.tree_map(torch.clone, z)

    size = torch.tensor([[1.0], [30.0], [0.0]])
    z = {"a": size.expand(3, 4000), "b": 0.1 * size[:, :, None].expand(3, 50, 80)}
    path_independence(f, z, starts=2, scale=scale, generator=generator(0))
    for start in seen[:2]:
        for name, expected in (("a", [1.0, 30.0, 1.0]), ("b", [0.1, 3.0, 1.0])):
            found = start[name].flatten(1).std(dim=1)
            torch.testing.assert_close(found, scale * torch.tensor(expected), rtol=0.05, atol=0)
    assert not torch.equal(seen[0]["a"], seen[1]["a"])
    assert torch.equal(seen[2]["a"], z["a"].roll(1, dims=0))


def test_zero_is_a_direction_of_its_own() -> None:
    zero = torch.zeros(1, 4, dtype=Double)
    result = path_independence(lambda z: 0 * z, zero, solver=PLAIN)
    assert result.cosines.flatten().tolist() == [1.0] * 4, "both are 0"
    assert result.converged.all()
    result = path_independence(two_answers, zero, solver=PLAIN)
    assert result.cosines.flatten().tolist() == [0.0] * 4, "one is 0: from there nothing moves, from elsewhere all does"


def test_a_solve_that_did_not_converge_says_so() -> None:
    p = tanh_problem()
    z = p.solution()
    result = path_independence(p.cell, z, *p.inputs, solver=FixedPointIteration(tol=1e-9, max_steps=2))
    assert not result.converged.any()
    assert (result.score < 1).all()


@pytest.mark.parametrize("mode", MODES)
def test_path_independence_in_every_grad_mode(mode: str) -> None:
    p = tanh_problem()
    expected = path_independence(p.cell, p.solution(), *p.inputs, generator=generator(0))
    with MODES[mode]():
        z, _ = fixed_point(p.cell, p.z0, *p.inputs, solver=Anderson(tol=1e-12))
        found = path_independence(p.cell, z, *p.inputs, generator=generator(0))
    assert not found.score.requires_grad
    torch.testing.assert_close(found.cosines, expected.cosines)
    assert all(t.grad is None for t in (*p.cell.parameters(), *p.inputs))


def test_path_independence_of_an_empty_batch() -> None:
    p = tanh_problem(batch=0)
    result = path_independence(p.cell, p.z0, *p.inputs)
    assert result.score.shape == (0,)
    assert result.cosines.shape == result.converged.shape == (4, 0)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"starts": 0}, r"path_independence\(starts=...\) takes an integer >= 1; given: 0"),
        ({"starts": 1.5}, r"path_independence\(starts=...\) takes an integer >= 1; given: 1.5"),
        ({"scale": 0.0}, r"path_independence\(scale=...\) takes a number > 0; given: 0.0"),
        ({"scale": math.inf}, r"path_independence\(scale=...\) takes a number > 0; given: inf"),
    ],
)
def test_path_independence_refuses(option: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        path_independence(torch.tanh, torch.zeros(1, 1), **option)
    with pytest.raises(TypeError, match="solver= takes a solver object"):
        path_independence(torch.tanh, torch.zeros(1, 1), solver="Anderson")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------- plots


def report_of(trace: Tensor | None, converged: int = 2) -> SolverReport:
    """The report of 3 samples with this trace."""
    _, report = fixed_point(torch.cos, torch.zeros(3, 1))
    return replace(report, converged=torch.arange(3) < converged, trace=trace)


def test_the_plot_shows_the_trace() -> None:
    nan = math.nan
    trace = torch.tensor([[1.0, 2.0, 4.0], [nan, nan, nan], [1e-2, 3e-2, math.inf], [0.0, 1e-3, nan]])
    figure = convergence_plot({"mine": report_of(trace), "other": report_of(torch.ones(2, 3), converged=3)}, tol=1e-4)
    assert type(figure) is Figure
    (axes,) = figure.axes
    mine, other, line = axes.get_lines()
    assert list(mine.get_xdata()) == [1, 3, 4], "evaluations, where the residual was looked at"
    assert list(mine.get_ydata()) == pytest.approx([2.0, 1e-2, 1e-3])
    assert list(other.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == [1e-4, 1e-4]
    assert mine.get_color() != other.get_color()
    assert mine.get_marker() != other.get_marker()
    band = axes.collections[0]
    corners = {(x, round(y, 6)) for x, y in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 1.0), (1, 4.0), (3, 0.01), (3, 0.03), (4, 0.001)}, "0 stands at the lowest other residual"
    assert band.get_facecolor()[0].tolist() == pytest.approx(to_rgba(mine.get_color(), 0.12))
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("evaluations of f", "residual, in the solver's norm")
    assert axes.get_title() == "Convergence of the fixed-point solve"
    legend = axes.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        *("mine (2 of 3 converged)", "other (3 of 3 converged)", "tol = 0.0001")
    ]
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    assert picture.getvalue().startswith(b"\x89PNG")


def test_the_plot_of_real_solves() -> None:
    p = tanh_problem()
    solvers = {"plain": FixedPointIteration(tol=1e-8), "anderson": Anderson(tol=1e-8)}
    with torch.no_grad():
        reports = {
            name: fixed_point(p.cell, p.z0, *p.inputs, solver=solver, trace=True)[1] for name, solver in solvers.items()
        }
    (axes,) = convergence_plot(reports).axes
    for line, report in zip(axes.get_lines(), reports.values(), strict=True):
        assert line.get_xdata()[0] == 1
        assert line.get_xdata()[-1] == report.evaluations
        assert line.get_ydata()[-1] == float(report.residual.median()) <= 1e-8


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1.0])
def test_a_trace_with_nothing_to_draw_is_still_a_picture(value: float) -> None:
    figure = convergence_plot({"lost": report_of(torch.full((2, 3), value))}, tol=0.0)
    figure.savefig(io.BytesIO(), format="png")
    assert figure.axes[0].get_legend().get_texts()[0].get_text() == "lost (2 of 3 converged)"


def test_more_solvers_than_colours() -> None:
    (axes,) = convergence_plot({str(i): report_of(torch.ones(2, 3)) for i in range(20)}).axes
    looks = {(line.get_color(), line.get_linestyle()) for line in axes.get_lines()}
    assert len(looks) == 20


def test_the_plot_goes_where_it_is_told() -> None:
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    axes = right.add_subplot()
    axes.set_title("mine")
    assert convergence_plot({"a": report_of(torch.ones(2, 3))}, axes=axes) is figure
    assert len(axes.get_lines()) == 1
    assert axes.get_title() == "mine"
    assert not left.axes


def test_the_plot_touches_nothing_global(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pyplot, and no setting of matplotlib."""
    before = dict(mpl.rcParams)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    convergence_plot({"a": report_of(torch.ones(2, 3))})
    assert dict(mpl.rcParams) == before


def test_the_file_is_read_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.find_spec("zoo.implicit.plots")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match="convergence_plot draws with matplotlib; install it: pip install matplotlib"):
        module.convergence_plot({"a": report_of(torch.ones(2, 3))})


def test_reports_that_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"the report 'a' has no trace; solve with trace=True"):
        convergence_plot({"a": report_of(None)})
    _, empty = fixed_point(torch.cos, torch.zeros(0, 1), trace=True)
    with pytest.raises(ValueError, match="the report 'a' is of an empty batch"):
        convergence_plot({"a": empty})
    with pytest.raises(ValueError, match="was given no report"):
        convergence_plot({})
    with pytest.raises(TypeError, match=r"takes a mapping of names to solver reports.* given: SolverReport"):
        convergence_plot(report_of(torch.ones(2, 3)))  # type: ignore[arg-type]


def test_path_independence_refuses_masks_that_change() -> None:
    cell = nn.Sequential(nn.Linear(3, 3), VariationalDropout(0.5))
    z = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="would draw other masks each time"):
        path_independence(cell, z)
    with one_draw():
        path_independence(cell, z)
    path_independence(cell.eval(), z)
