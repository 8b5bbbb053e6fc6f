"""Weights that are computed from others (weight norm, spectral bounds): once a solve, with a graph where one is due.

Torch caches them within ``parametrize.cached()``, as autocast caches low-precision weights: with or without a graph, as
grad mode was where they were first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


@contextmanager
def computed_once(f: object) -> Iterator[None]:
    """Within this context parametrised weights of f are computed once, here and in the ambient grad mode.

    Left to themselves they would be computed, and cached, in the solver's no-grad loop: without a graph.
    """
    modules = f.modules() if isinstance(f, nn.Module) else ()
    parametrized = [m for m in modules if parametrize.is_parametrized(m)]
    if not parametrized:
        yield
        return
    with parametrize.cached():
        for m in parametrized:
            for name in cast(Any, m.parametrizations):
                getattr(m, name)
        yield


def forget_weights_without_graph() -> None:
    """Drop what was cached under no_grad, so that a recorded evaluation makes its weights anew, with a graph.

    That concerns autocast's low-precision weights, and parametrised ones within ``parametrize.cached()``, the
    caller's or our own, wherever f keeps them.
    """
    torch.clear_autocast_cache()
    cache = parametrize._cache  # noqa: SLF001 - torch has no public way to empty it
    for key in [key for key, weight in cache.items() if weight is not None and not weight.requires_grad]:
        del cache[key]


def with_present_weights(evaluate: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``evaluate``, for which parametrised weights are cached, or not, as they are here and now."""
    enabled, weights = parametrize._cache_enabled, dict(parametrize._cache)  # noqa: SLF001 - torch has no public way

    def here(z: Tensor) -> Tensor:
        around = parametrize._cache_enabled, parametrize._cache  # noqa: SLF001
        parametrize._cache_enabled, parametrize._cache = enabled, dict(weights)  # noqa: SLF001
        try:
            return evaluate(z)
        finally:
            parametrize._cache_enabled, parametrize._cache = around  # noqa: SLF001

    return here
