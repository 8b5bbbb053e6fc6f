"""From a model's name, arguments and tensors to the model: compared before anything is allocated, and then filled."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .errors import WeightsError
from .registry import ModelSpec, create_model, spec_of

_REGISTERED, _SPARE = 4, 100  # a parameter is registered up to three times on its way to one that is normalised


def without_memory(spec: ModelSpec, overrides: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> nn.Module:
    """The model, its tensors without memory: a file of a few bytes can ask for one that no machine has room for.

    Args:
        spec: which the file names.
        overrides: arguments that the user changes.
        state: the tensors of the file.
        where: they come from, for messages.

    Raises:
        WeightsError: the model of the file cannot be made, or has many more tensors than the file.
        Exception: what the constructor raises, if there are overrides.
    """
    try:
        with torch.device("meta"), _at_most(_SPARE + _REGISTERED * len(state)):
            return create_model(spec.model, **{**spec.arguments, **overrides})
    except Exception as error:
        if overrides:
            raise
        raise WeightsError(
            f"{where} names a model {spec.model[:80]!r} that cannot be made here: {_first_line(error)}; nothing was "
            "loaded. It needs a zoo that has this model"
        ) from None


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Let a model be made that has no more parameters than so many; one of 10^12 layers would be made for ever."""
    registered = 0
    thread = threading.get_ident()

    def count_one(_module: nn.Module, _name: str, _parameter: nn.Parameter) -> None:
        nonlocal registered
        registered += threading.get_ident() == thread
        if registered > count:
            raise WeightsError(f"it has more than {count} parameters, and the file has no tensors for them")

    hook = register_module_parameter_registration_hook(count_one)
    try:
        yield
    finally:
        hook.remove()


def keys_of_other_classes(model: nn.Module, state: Mapping[str, Tensor], num_classes: int | None) -> list[str]:
    """What of the classifier is for another number of classes."""
    prefix = f"{getattr(model, 'classifier_name', '')}."
    keys = [key for key in model.state_dict() if key.startswith(prefix) and key in state and state[key].dim()]
    return keys if num_classes is not None and any(len(state[key]) != num_classes for key in keys) else []


def refuse_misfits(
    model: nn.Module, state: Mapping[str, Tensor], fresh: list[str], where: str, overrides: Mapping[str, Any]
) -> None:
    from .originals.common import problems

    expected = {key: value for key, value in model.state_dict().items() if key not in fresh}
    if not (different := problems({key: state[key] for key in state if key not in fresh}, expected)):
        return
    given = ", ".join(f"{key}={value!r}" for key, value in overrides.items())
    raise WeightsError(
        f"the weights {where} do not fit the model {spec_of(model).model}"
        + (f" with {given} changed; change only arguments that keep the shapes" if given else " that they name")
        + f". In the file {different}; nothing was loaded"
    )


def fill(model: nn.Module, state: Mapping[str, Tensor], fresh: list[str]) -> nn.Module:
    """The model with these tensors, and random ones for the keys that are fresh.

    Args:
        model: with memory or without.
        state: all others.
        fresh: keys of the model.
    """
    expected = model.state_dict()
    if all(value.is_meta for value in expected.values()):
        if not fresh and _is_all_in_its_state(model):
            # Nothing is drawn that is overwritten: a model takes no more memory than its file.
            own = {
                key: torch.empty(x.shape, dtype=x.dtype, device="cpu").copy_(state[key].detach())
                for key, x in expected.items()
            }
            model.load_state_dict(own, assign=True)
            return model
        spec = spec_of(model)
        model = create_model(spec.model, **spec.arguments)
    model.load_state_dict({**state, **{key: model.state_dict()[key] for key in fresh}})
    return model


def _is_all_in_its_state(model: nn.Module) -> bool:
    """Whether the model has each of its tensors once, and in its state dict."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    beside = any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())
    return (
        not beside
        and {name for name, _ in tensors} == model.state_dict().keys()
        and len({*map(id, dict(tensors).values())}) == len(tensors)
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:300] or type(error).__name__
