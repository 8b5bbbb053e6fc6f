"""Normalised weights, by ``torch.nn.utils.parametrize``.

Torch itself has weight norm and spectral norm. Here are bounds that hold exactly, and a call for all layers of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations, parametrize

from .maps import full_precision

Kind = Literal["weight", "spectral", "contractive"]


class _Bound(nn.Module):
    """W = V min(1, bound / norm(V))."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        if not bound > 0:
            raise ValueError(f"{type(self).__name__}(bound=...) takes a positive number; given: {bound!r}")
        self.bound = bound

    def right_inverse(self, W: Tensor) -> Tensor:
        """The parameter that an assignment ``module.weight = W`` stores."""
        return W

    def extra_repr(self) -> str:
        return f"bound={self.bound}"

    def _scaled(self, V: Tensor, matrix: Callable[[Tensor], Tensor], slack: float = 1.0) -> Tensor:
        """V min(1, bound / (slack ||matrix(V)||_2)), where ``matrix`` is linear and its norm at least max |V|."""
        with full_precision(V.device):
            wide = V.to(torch.promote_types(V.dtype, torch.float32))
            # The norm of entries of size 1: squares of others overflow or vanish. Below the floor no norm is too large.
            peak = wide.detach().abs().amax().clamp_min(1e-6 * self.bound)
            squared_norm = _largest_eigenvalue(_gram(matrix(wide / peak)))  # >= 1, or below the floor
            scale = (self.bound / (slack * peak) * squared_norm.clamp_min(0.5).rsqrt()).clamp_max(1)
            return V * scale.to(V.dtype)


class SpectralBound(_Bound):
    """W = V min(1, bound / ||V||_2), so that ||W||_2 <= bound, exactly.

    With ``bound < 1`` and a cell z -> phi(Wz + x) whose phi has slopes in [-1, 1], the cell is a contraction: its
    equilibrium exists, is unique, and plain iteration finds it. The norm is the largest singular value itself, not a
    power-iteration estimate, at the price of one eigenvalue decomposition of V V^T a solve. A V that is not finite
    makes a W of NaN, which a solve reports.

    Args:
        bound: a positive number.

    Example:
        >>> torch.nn.utils.parametrize.register_parametrization(linear, "weight", SpectralBound(0.9))
    """

    def forward(self, V: Tensor) -> Tensor:
        """``(m, n)`` -> ``(m, n)``."""
        if V.dim() != 2:
            raise ValueError(
                f"SpectralBound takes a matrix of shape (m, n); given: shape {tuple(V.shape)}. "
                "The kernel of a convolution has its bound in ConvolutionBound"
            )
        return self._scaled(V, lambda V: V)


class ConvolutionBound(_Bound):
    """W = V min(1, bound / n(V)) with n(V) >= the operator norm of a convolution with kernel V, on images of any size.

    The norm of a convolution on an unlimited plane is the maximum over frequencies w of ||H(w)||_2, where H(w) =
    sum_t V[:, :, t] exp(-i w t) (Sedghi, Gupta and Long, "The Singular Values of Convolutional Layers", ICLR 2019, take
    the frequencies of one image size). Zero padding of any width, strides, dilation and transposition only restrict
    that operator or its adjoint. H is looked at on a grid of N = 4k frequencies for k taps. Between them it can rise by
    a factor of at most 1 / cos(pi (k - 1) / 2N) an axis: |u* H(w) v| is that of a trigonometric polynomial of degree
    (k - 1) / 2, which falls from its maximum no faster than a cosine does (M. Riesz 1914). So n(V) exceeds that norm by
    at most 7 % for 3 x 3 taps, and 17 % for any in two dimensions.

    Circular padding is covered where the output is not larger than the input; other padding modes are not. The price is
    the eigenvalues of H H* at all points of half the grid, 84 for 3 x 3 taps, once a solve.

    Args:
        bound: a positive number.
        groups: those of the convolution. The bound holds with 1 too, but is then further from the norm.

    Example:
        >>> torch.nn.utils.parametrize.register_parametrization(conv, "weight", ConvolutionBound(0.9, conv.groups))
    """

    def __init__(self, bound: float, groups: int = 1) -> None:
        super().__init__(bound)
        self.groups = groups

    def forward(self, V: Tensor) -> Tensor:
        """``(m, n, *k)`` -> ``(m, n, *k)``."""
        if V.dim() < 3 or V.shape[0] % self.groups:
            raise ValueError(
                f"ConvolutionBound takes a kernel of shape (m, n, *k) with m divisible by groups={self.groups}; "
                f"given: shape {tuple(V.shape)}"
            )
        taps = V.shape[2:]
        grid = [4 * k if k > 1 else 1 for k in taps]
        slack = math.prod(1 / math.cos(math.pi * (k - 1) / (2 * N)) for k, N in zip(taps, grid, strict=True))
        return self._scaled(V, lambda V: self._largest_response(V, grid), slack)

    def extra_repr(self) -> str:
        return f"bound={self.bound}, groups={self.groups}"

    def _largest_response(self, V: Tensor, grid: Sequence[int]) -> Tensor:
        """The ``(m / groups, n)`` matrix H(w) of the largest norm, over the grid and the groups."""
        # V is real: H(-w) is the conjugate of H(w), so half of the last axis will do.
        w = 2 * math.pi / V.new_tensor(grid) * _points([*grid[:-1], grid[-1] // 2 + 1], V)  # (P, d)
        phases = torch.exp(-1j * (w.unsqueeze(1) * _points(V.shape[2:], V)).sum(dim=2))  # (P, T)
        V = V.flatten(2).unflatten(0, (self.groups, -1)).movedim(3, 0).to(phases.dtype)  # (T, groups, m / groups, n)
        with torch.no_grad():
            H = torch.tensordot(phases, V, dims=1)  # (P, groups, m / groups, n)
            largest = _largest_eigenvalue(_gram(H)).argmax()
        point, group = largest // self.groups, largest % self.groups
        response: Tensor = torch.tensordot(phases.index_select(0, point), V.index_select(1, group), dims=1)
        return response[0, 0]


def normalize_weights(
    module: nn.Module, kind: Kind = "weight", *, bound: float | None = None, exclude: str | Sequence[str] = ()
) -> list[str]:
    """Parametrise the weights of all linear layers and convolutions in ``module``, also the transposed ones.

    - ``"weight"``: W = g V / ||V|| for each output channel, with g = ||V|| at first, so that nothing changes
      (``torch.nn.utils.parametrizations.weight_norm``; Salimans and Kingma, NeurIPS 2016).
    - ``"spectral"``: W = V / s, where s is an estimate of ||V||_2 by one power iteration a solve in train mode; of a
      convolution, that of its kernel as a matrix (``torch.nn.utils.parametrizations.spectral_norm``; Miyato et al.,
      ICLR 2018). It guarantees no bound.
    - ``"contractive"``: the operator norm of each layer is at most ``bound``: :class:`SpectralBound`,
      :class:`ConvolutionBound`. Norms multiply along a chain of layers and add over a sum.

    A solve computes the weights once. Call this before an optimizer is made: it replaces parameters. Undo it, layer by
    layer, with ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")``.

    Args:
        module: it, or layers in it, are changed in place.
        kind: which normalisation.
        bound: a positive number, with ``"contractive"`` only.
        exclude: names of what to leave alone, as dotted names inside ``module`` or any run of their parts, with shell
            wildcards: ``"fuse"`` is ``fuse`` and ``net.fuse.0.conv``, but not ``post_fuse``; ``"*fuse"`` is all three.

    Returns:
        The names of the weights that are now normalised.

    Raises:
        ValueError: an argument is not as described; a pattern matches no layer; no layer is left; or a weight cannot
            be normalised (it already is, it is shared or lazy, its norm is 0, its padding has no bound). Then nothing
            is changed.

    Example:
        >>> normalize_weights(cell, "weight", exclude=("fuse_layers", "post_fuse_layers"))
        ['branches.0.conv1.weight', 'branches.0.conv2.weight']
    """
    if kind not in get_args(Kind):
        raise ValueError(f"normalize_weights(kind=...) takes one of {', '.join(get_args(Kind))}; given: {kind!r}")
    if (bound is not None) != (kind == "contractive"):
        raise ValueError(
            f"normalize_weights takes bound= with kind='contractive' only, and there always; given: {bound}"
        )
    layers = _layers(module, (exclude,) if isinstance(exclude, str) else exclude)
    _check_weights(module, layers)
    bounds = {} if bound is None else {name: _bound_of(name, layer, bound) for name, layer in layers.items()}
    if not bounds:
        _check_norms(kind, layers)
    for name, layer in layers.items():
        if name in bounds:
            parametrize.register_parametrization(layer, "weight", bounds[name])
        elif kind == "weight":
            parametrizations.weight_norm(layer, dim=_output_dim(layer))
        else:
            parametrizations.spectral_norm(layer)
    return [f"{name}.weight".lstrip(".") for name in layers]


def _layers(module: nn.Module, exclude: Sequence[str]) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | _ConvNd)
    }
    excluded = {pattern: {name for name in layers if fnmatchcase(f".{name}.", f"*.{pattern}.*")} for pattern in exclude}
    for pattern, names in excluded.items():
        if not names:
            raise ValueError(
                f"normalize_weights(exclude=...) takes names of layers, or parts of them; {pattern!r} matches none of "
                f"{', '.join(map(repr, layers))}"
            )
    left = {name: layer for name, layer in layers.items() if not any(name in names for names in excluded.values())}
    if not left:
        raise ValueError(
            f"normalize_weights finds no linear layer or convolution in this {type(module).__name__}, "
            f"besides {len(layers)} that are excluded"
        )
    return left


def _check_weights(module: nn.Module, layers: dict[str, nn.Module]) -> None:
    owners: dict[Tensor, list[str]] = {}
    for prefix, owner in module.named_modules():  # each once, wherever it is used
        for name, parameter in owner.named_parameters(prefix, recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append(name)
    for name, layer in layers.items():
        weight = dict(layer.named_parameters(recurse=False)).get("weight")
        if weight is None:
            raise ValueError(
                f"the weight of {name!r} is parametrised already; first undo that, with "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
            )
        if is_lazy(weight):
            raise ValueError(f"the weight of {name!r} has no shape yet; call the module once before normalize_weights")
        if len(owners[weight]) > 1:
            raise ValueError(
                f"one weight is shared by {' and '.join(owners[weight])}, and would not be when it is parametrised in "
                "one place; exclude it"
            )


def _check_norms(kind: Kind, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        zero = torch.norm_except_dim(weight.detach(), 2, _output_dim(layer)) == 0
        if not weight.is_meta and (zero.any() if kind == "weight" else zero.all()):
            raise ValueError(
                f"the weight of {name!r} has a norm of 0, for one output channel at least, and would be divided by it; "
                "exclude it, or give it other initial values"
            )


def _output_dim(layer: nn.Module) -> int:
    return 1 if isinstance(layer, _ConvTransposeNd) else 0


def _bound_of(name: str, layer: nn.Module, bound: float) -> _Bound:
    if not isinstance(layer, _ConvNd):
        return SpectralBound(bound)
    spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    fits = isinstance(layer.padding, str) or all(2 * n <= m for n, m in zip(layer.padding, spans, strict=True))
    if layer.padding_mode != "zeros" and not (layer.padding_mode == "circular" and fits):
        raise ValueError(
            f"no bound is known for the convolution {name!r}, with padding={layer.padding} and "
            f"padding_mode={layer.padding_mode!r}: use 'zeros', or 'circular' with no more padding than keeps the size"
        )
    return ConvolutionBound(bound, layer.groups)


def _points(sizes: Sequence[int], like: Tensor) -> Tensor:
    """All integer points of a box of these sizes, ``(prod(sizes), len(sizes))``."""
    return torch.cartesian_prod(*(torch.arange(n, dtype=like.dtype, device=like.device) for n in sizes)).reshape(
        -1, len(sizes)
    )


def _gram(A: Tensor) -> Tensor:
    """A A* or A* A, the smaller one."""
    return A @ A.mH if A.shape[-2] <= A.shape[-1] else A.mH @ A


def _largest_eigenvalue(G: Tensor) -> Tensor:
    """``(*, n, n)`` -> ``(*)``; NaN where G is not finite, which the decomposition would refuse."""
    finite = G.isfinite().all(dim=-1).all(dim=-1)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None, None], G, 0))
    return torch.where(finite, eigenvalues[..., -1], torch.nan)
