"""Parts of a model that training leaves as they are."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def freeze(model: nn.Module, *patterns: str) -> list[str]:
    """Leave the parameters of these names as they are: they require no gradient.

    A normalisation with running statistics all of whose parameters are frozen, or that has none and whose place the
    patterns name, keeps its statistics and normalises by them: it stays in eval mode, whatever ``model.train()`` says.

    Where neither the equilibrium's cell nor what comes before it requires a gradient, training solves no adjoint
    equation.

    Args:
        model: which is changed in place.
        patterns: shell wildcards on the names of ``model.named_parameters()``, like ``"stem.*"``; ``*`` takes dots too.

    Returns:
        the names of all parameters that the patterns match.

    Raises:
        ValueError: there is no pattern, or one matches no parameter; the message names what is near.
    """
    return _set(model, patterns, frozen=True)


def unfreeze(model: nn.Module, *patterns: str) -> list[str]:
    """Let the parameters of these names be trained again, and the statistics beside them; see :func:`freeze`."""
    return _set(model, patterns, frozen=False)


def freeze_statistics(model: nn.Module) -> None:
    """Leave the running statistics of all normalisations as they are, and normalise by them in training too."""
    for _, norm in _norms(model):
        _keep(norm)


def frozen_statistics(model: nn.Module) -> list[str]:
    """The names of the normalisations whose running statistics are frozen."""
    return [name for name, norm in _norms(model) if "train" in vars(norm)]


def _set(model: nn.Module, patterns: tuple[str, ...], *, frozen: bool) -> list[str]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check(type(model).__name__, patterns, list(parameters))

    def meant(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    found = [name for name in parameters if meant(name)]
    for name in found:
        parameters[name].requires_grad_(not frozen)
    for name, norm in _norms(model):
        own = [parameter.requires_grad for parameter in norm.parameters(recurse=False)]
        if frozen and (not any(own) if own else meant(f"{name}.running_mean")):
            _keep(norm)
        elif not frozen and (any(own) if own else meant(f"{name}.running_mean")):
            _release(norm, model.training)
    return found


def _check(model: str, patterns: tuple[str, ...], names: list[str]) -> None:
    parts = [name.split(".") for name in names]
    begin = f"Its parameters begin with: {', '.join(dict.fromkeys(part[0] for part in parts))}."
    if not patterns:
        raise ValueError(f"give patterns of the names of parameters of this {model}, like {parts[0][0]}.*. {begin}")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"give patterns one by one, freeze(model, *patterns); given: {pattern!r}")
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            continue
        groups = [".".join((*part[:k], "*")) for part in parts for k in range(1, len(part))]
        close = difflib.get_close_matches(pattern, [*dict.fromkeys(groups), *names], n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"no parameter of this {model} has a name like {pattern!r}.{hint} {begin}")


# ------------------------------------------------------------------------------------------------- running statistics


def _norms(model: nn.Module) -> Iterator[tuple[str, _NormBase]]:
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            yield name, module


def _keep(norm: _NormBase) -> None:
    vars(norm)["train"] = partial(_stay_in_eval, norm)  # a copy of the norm, or one from a pickle, has its own
    norm.eval()


def _stay_in_eval(norm: _NormBase, mode: bool = True) -> _NormBase:  # noqa: ARG001 - as Module.train has it
    """What ``norm.train(mode)`` does while its statistics are frozen."""
    norm.training = False
    return norm


def _release(norm: _NormBase, training: bool) -> None:
    vars(norm).pop("train", None)
    norm.train(training)
