"""Diagnostics of an equilibrium: how fast f contracts there, and whether it depends on where the solve started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .compiled import eagerly
from .computed_weights import forget_weights_without_graph
from .dropout import VariationalDropout, current_draws
from .equilibrium import fixed_point
from .maps import FlatMap, full_precision, module_of
from .solvers import Solver
from .solvers.base import _is_number, is_count
from .solvers.krylov import orthogonalized
from .state import State, StateView


def spectral_radius(
    f: Callable[..., State],
    z: State,
    *inputs: State,
    products: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The largest |eigenvalue| of J = df/dz at z, for each sample. Below 1, plain iteration converges near z.

    Arnoldi's method (Quart. Appl. Math. 9, 1951) on J^T, whose eigenvalues are those of J, so that one recorded
    evaluation of f and ``products`` vector-Jacobian products are enough. Complex pairs are found like real
    eigenvalues.

    With ``products >= N`` exact up to rounding (which a defective J magnifies: m equal eigenvalues in one Jordan block
    are found to about the m-th root of it). With fewer an estimate, mostly from below; never above for a normal J.
    Measured on 50 random matrices of size 200 and radius 0.9, with 20 start vectors each: the mean error, and what 99 %
    of the errors stay within.

    ============================  =============  =============  =============
    products                      20             40             100
    ============================  =============  =============  =============
    independent Gaussian entries  -0.025, 0.088  -0.001, 0.024  0.000, 0.000
    symmetric Gaussian            -0.002, 0.017  0.000, 0.000   0.000, 0.000
    0.9 x orthogonal              -0.054, 0.089  -0.016, 0.028  -0.001, 0.003
    ============================  =============  =============  =============

    Works in every grad mode, inference mode included, and leaves no gradient anywhere. Keeps ``products`` vectors of
    the size of the state.

    Args:
        f: the cell.
        z: where the Jacobian is taken, usually z*; any pytree state.
        inputs: further arguments of f.
        products: vector-Jacobian products, at least 1; more than N are not made.
        generator: draws the start vector, which all samples share, so that the result of a sample does not depend on
            what else is in its batch; torch's global generator by default.

    Returns:
        ``(B,)`` in the precision of solver arithmetic, without a graph; 0 where f does not depend on z, and NaN for a
        sample whose Jacobian is not finite.

    Raises:
        ValueError: ``products`` is not an integer >= 1.
    """
    if not is_count(products, at_least=1):
        raise ValueError(f"spectral_radius(products=...) takes an integer >= 1; given: {products!r}")
    with torch.inference_mode(mode=False):
        z, inputs = pytree.tree_map_only(Tensor, _constant, (z, inputs))
        view = StateView(z)
        flat_map = FlatMap(f, view, inputs)
        forget_weights_without_graph()  # those of inference mode cannot be saved for the products
        with torch.enable_grad(), full_precision(view.device), eagerly():
            z_in = view.flatten(z).requires_grad_()
            fz = flat_map(z_in)
        if not fz.requires_grad or z_in.numel() == 0:
            return z_in.new_zeros(view.batch)
        start_device = view.device if generator is None else generator.device
        start = torch.randn(view.size, dtype=view.dtype, device=start_device, generator=generator).to(view.device)

        def product(v: Tensor) -> Tensor:
            (found,) = torch.autograd.grad(fz, z_in, v, retain_graph=True, allow_unused=True, materialize_grads=True)
            return found

        with torch.no_grad(), full_precision(view.device):
            H = _arnoldi(product, start.expand(view.batch, -1), min(products, view.size)).cpu()
            finite = H.isfinite().all(dim=2).all(dim=1)
            H = torch.where(finite[:, None, None], H, 0)  # for one of them eigvals may refuse the whole batch
            radius = torch.linalg.eigvals(H).abs().amax(dim=1)
            return torch.where(finite, radius, torch.nan).to(view.device)


def _arnoldi(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """``(B, steps, steps)`` H = V^T A V, upper Hessenberg, where V is an orthonormal basis of the Krylov space of A.

    Where the space ends early, the rows and columns of H after it are 0.
    """
    batch, size = start.shape
    V = start.new_zeros(batch, steps, size)
    H = start.new_zeros(batch, steps, steps)
    rounding = 10 * torch.finfo(start.dtype).eps
    V[:, 0] = start / _length(start)
    for k in range(steps):
        w = product(V[:, k])
        known = V[:, : k + 1]
        length = _length(w)
        w, H[:, : k + 1, k] = orthogonalized(w, known)
        if k + 1 < steps:
            rest = _length(w)
            goes_on = rest > rounding * length
            H[:, k + 1, k] = torch.where(goes_on, rest, 0).squeeze(1)
            V[:, k + 1] = torch.where(goes_on, w / rest, 0)
    return H


def _length(x: Tensor) -> Tensor:
    """``(B, N)`` -> ``(B, 1)`` Euclidean norms, also of rows whose squares overflow or vanish."""
    peak = x.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    length: Tensor = peak * torch.linalg.vector_norm(x / peak, dim=1, keepdim=True)
    return length


def _constant(x: Tensor) -> Tensor:
    """``x`` without its graph, and fit to be saved in one."""
    return x.clone() if x.is_inference() else x.detach()


@dataclass(frozen=True)
class PathIndependence:
    """How well the equilibria reached from S other starts agree with z*.

    Attributes:
        cosines: ``(S, B)`` cosine similarity of each with z*; 1 where both are 0, 0 where one of them is.
        converged: ``(S, B)`` whether the solve from that start converged. A cosine below 1 without it says that the
            solver needs more steps, not that there is another equilibrium.
    """

    cosines: Tensor
    converged: Tensor

    @property
    def score(self) -> Tensor:
        """``(B,)`` the mean cosine of each sample: 1 when the start does not matter."""
        return self.cosines.mean(dim=0)


def path_independence(
    f: Callable[..., State],
    z: State,
    *inputs: State,
    solver: Solver | None = None,
    starts: int = 4,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> PathIndependence:
    """Does the start matter? Solves again from other starts, and compares what is reached with z.

    The asymptotic alignment score of Anil et al., "Path Independent Equilibrium Models Can Better Exploit Test-Time
    Computation" (NeurIPS 2022, arXiv 2211.09961). The starts are ``starts`` Gaussian ones of the size of z, and, in a
    batch of at least 2, the equilibrium of another sample (z rolled by one along the batch). A cosine does not see
    lengths, and means nothing where z* is 0 but for rounding.

    Args:
        f: the cell.
        z: the equilibrium that was reached from the usual start; any pytree state.
        inputs: further arguments of f.
        solver: what solves from each start; ``Anderson()`` by default. Give it ``max_steps`` enough for a bad start.
        starts: Gaussian starts, at least 1.
        scale: their standard deviation, as a multiple of the root mean square of z in each tensor of each sample (of
            1 where that is 0).
        generator: draws them; torch's global generator by default.

    Returns:
        :class:`PathIndependence`, whose ``score`` is ``(B,)``. Nothing has a graph.

    Raises:
        ValueError: ``starts`` or ``scale`` is out of its range.
        TypeError: ``solver`` is no solver.
    """
    cell = module_of(f)
    if current_draws() is None and cell is not None:
        for name, module in cell.named_modules():
            if isinstance(module, VariationalDropout) and module.training and module.p > 0:
                raise ValueError(
                    f"path_independence solves several times, and {name or 'the cell'}, a VariationalDropout in "
                    "training mode, would draw other masks each time: put the cell in eval mode, or make the first "
                    "solve and this call within one_draw()"
                )
    if not is_count(starts, at_least=1):
        raise ValueError(f"path_independence(starts=...) takes an integer >= 1; given: {starts!r}")
    if not (_is_number(scale) and 0 < scale < float("inf")):
        raise ValueError(f"path_independence(scale=...) takes a number > 0; given: {scale!r}")
    view = StateView(z)
    with torch.no_grad():
        z_star = view.flatten(z)
        draw_device = view.device if generator is None else generator.device
        deviation = scale * torch.cat([_size(part) for part in z_star.split(view.sizes, dim=1)], dim=1)
        others = [
            deviation * torch.randn(z_star.shape, dtype=view.dtype, device=draw_device, generator=generator).to(z_star)
            for _ in range(starts)
        ]
        if view.batch > 1:
            others.append(z_star.roll(1, dims=0))
        cosines, converged = [], []
        for z0 in others:
            reached, report = fixed_point(f, view.unflatten(z0), *inputs, solver=solver, on_failure="ignore")
            cosines.append(_cosine(z_star, view.flatten(reached)))
            converged.append(report.converged)
        return PathIndependence(torch.stack(cosines), torch.stack(converged))


def _size(x: Tensor) -> Tensor:
    """The root mean square of each row, in each place of it."""
    size = x.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(size > 0, size, 1).expand_as(x)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """``(B, N)``, ``(B, N)`` -> ``(B,)``."""
    length_x, length_y = _length(x), _length(y)
    tiny = torch.finfo(x.dtype).tiny
    cosine = (x / length_x.clamp_min(tiny) * (y / length_y.clamp_min(tiny))).sum(dim=1)
    return torch.where((length_x + length_y).squeeze(1) == 0, 1, cosine)
