"""A model as a function of plain tensors with named outputs: first as it is, then as it will be traced."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from zoo.errors import InputError
from zoo.flow import DEQFlow
from zoo.implicit import DEQ, Solver, SolverReport
from zoo.implicit.exported import ExportableDEQ, GraphReport
from zoo.implicit.exported_steps import steps_of
from zoo.language import TextModel

from .errors import ExportError

_CHECKS = ("check_images", "check_tokens", "check_memory")
"""Methods of models that look at values, which a graph cannot. What they refuse, the example was not."""


class Task(nn.Module):
    """A copy of a model, in eval mode, that takes tensors and gives a dictionary of them.

    Args:
        model: not changed.
        inputs: an example of what it is called with.

    Attributes:
        example: the tensors in these inputs.
        input_names: of each of them, after the model's own arguments.
        layer: the name of the equilibrium in the model, if it has one.
        solver: its solver.
        is_unrolled: whether it is not solved, but its cell applied a number of times.

    Raises:
        ExportError: the model cannot be a graph; the message says why.
        InputError: the inputs hold something else than tensors with the samples in dimension 0.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        layers = [name for name, layer in model.named_modules() if isinstance(layer, DEQ)]
        if len(layers) > 1:
            raise ExportError(
                f"a graph has the report of one equilibrium, and this {type(model).__name__} has {len(layers)}: "
                f"{', '.join(layers)}. Export its parts"
            )
        self.model = copy.deepcopy(model).eval()
        self.layer = layers[0] if layers else None
        self.solver: Solver | None = None
        self.is_unrolled = False
        if self.layer is not None:
            deq = cast(DEQ, self.model.get_submodule(self.layer))
            deq.on_failure = "ignore"  # the outputs tell
            self.solver, self.is_unrolled = deq.solver, deq.unrolled is not None
            if not self.is_unrolled:
                try:
                    steps_of(deq.solver)
                except ValueError as error:
                    raise ExportError(str(error)) from None
        leaves, self._structure = pytree.tree_flatten(inputs)
        self.example = tuple(leaves)
        _check_tensors(self.example)
        try:
            named = inspect.signature(model.forward).bind(*inputs).arguments
        except TypeError as error:
            raise InputError(f"{type(model).__name__} is not called with {len(inputs)} inputs: {error}") from None
        self.input_names = [name for key, value in named.items() for name in _named(key, value)]

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The outputs by name, with the report of the solve after those of the model."""
        inputs = pytree.tree_unflatten(tensors, self._structure)
        if self.layer is None:
            return _outputs(self.model, inputs)
        reports: list[GraphReport | SolverReport] = []
        layer = self.model.get_submodule(self.layer)
        watching = layer.register_forward_hook(lambda _, __, output: reports.append(output[1]))
        try:
            outputs = _outputs(self.model, inputs)
        finally:
            watching.remove()
        return outputs | {name: getattr(reports[-1], name) for name in GraphReport._fields}

    def as_graph(self) -> Task:
        """The same, in a form that can be traced."""
        graph = copy.deepcopy(self)
        for module in list(graph.modules()):
            if parametrize.is_parametrized(module):
                _keep_computed_weights(module)
        for name in _CHECKS:
            if hasattr(graph.model, name):
                setattr(graph.model, name, lambda *_: None)
        if graph.layer is not None:
            deq = cast(DEQ, graph.model.get_submodule(graph.layer))
            graph.model.set_submodule(graph.layer, ExportableDEQ(deq))
        return graph.requires_grad_(requires_grad=False)


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """What the model gives; of a language model what users ask for, and not the states that it is read off."""
    if isinstance(model, DEQFlow):
        return {"flow": model(*inputs)}
    if not isinstance(model, TextModel):
        return _named("output", model(*inputs))
    h, memory = model(*inputs)
    log_p = {"log_p": model.vocabulary.log_probs(h)}
    return log_p | _named("new_memory", memory) if len(inputs) > 1 else log_p


def _keep_computed_weights(module: nn.Module) -> None:
    """Put parameters of their present values in the places of parametrised weights.

    Torch's own ``remove_parametrizations`` changes the class of the module, which the original has as well.
    """
    names = list(cast(Any, module.parametrizations))
    weights = {name: getattr(module, name).detach().clone() for name in names}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight))


def _named(name: str, values: Any) -> dict[str, Tensor]:
    return {_name(name, path): x for path, x in pytree.tree_flatten_with_path(values)[0]}


def _name(name: str, path: Any) -> str:
    """``memory`` and the key ``.z`` make ``memory_z``."""
    return re.sub(r"\W+", "_", name + pytree.keystr(path)).rstrip("_")


def _check_tensors(example: tuple[Any, ...]) -> None:
    given = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in example]
    if not all(isinstance(x, Tensor) and x.dim() > 0 for x in example) or len({len(x) for x in example}) != 1:
        raise InputError(
            "export takes example inputs that are tensors with one row a sample, as many in each; given: "
            f"{', '.join(map(str, given)) or 'none'}"
        )
    if not len(example[0]):
        raise InputError(f"export takes an example of one sample at least; given: {', '.join(map(str, given))}")
