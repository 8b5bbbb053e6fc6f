"""Nothing outlives its Python references: no cycle that waits for the garbage collector, no buffer left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.problems import GRADIENTS, SOLVERS, Method, tanh_problem
from zoo.implicit import DEQ, FixedPointIteration, ImplicitGradient, PhantomGradient, UnrolledGradient, fixed_point

METHODS = {f"{name}-{kind}": Method(s, make(s)) for name, s in SOLVERS.items() for kind, make in GRADIENTS.items()}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@pytest.fixture(autouse=True)
def _without_garbage_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


class Saved:
    """One tensor that a graph keeps for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Recorder:
    """Weak references to all tensors that graphs keep, from here on."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[Saved]] = []

    def pack(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor.detach())  # the output of a node, with its graph, would make a cycle through the node
        self.references.append(weakref.ref(saved))
        return saved

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, lambda saved: saved.tensor)

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.references)


@every_method
@pytest.mark.parametrize("until", ["forward", "backward", "retained backward", "create_graph", "second derivative"])
def test_everything_dies_with_its_references(method: Method, until: str) -> None:
    p = tanh_problem()
    cell = p.cell
    x = p.inputs[0].detach().requires_grad_()
    del p
    deq = DEQ(cell, method.solver, method.gradient)
    recorder = Recorder()
    with recorder.hooks():
        z, report = deq(x)
        loss = z.square().sum()
        tensors = [x, z, loss]
        if until == "backward":
            loss.backward()
        if until == "retained backward":
            loss.backward(retain_graph=True)
        if until in {"create_graph", "second derivative"}:
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            tensors.append(first)
            if until == "second derivative":
                (second,) = torch.autograd.grad(first.sum(), x)
                assert second.any()
            del first
    assert recorder.references
    references = [weakref.ref(tensor) for tensor in tensors]
    del x, z, loss, tensors
    assert [reference() is None for reference in references] == [True] * len(references)
    assert recorder.alive() == 0
    assert deq.report is report


@every_method
def test_a_backward_pass_frees_the_graph_while_its_result_is_still_held(method: Method) -> None:
    p = tanh_problem()
    recorder = Recorder()
    with recorder.hooks():
        z, _ = DEQ(p.cell, method.solver, method.gradient)(*p.inputs)
        assert recorder.alive() > 0
        z.sum().backward()
    assert recorder.alive() == 0
    assert z.grad_fn is not None


@every_method
def test_a_backward_pass_leaves_gradients_where_they_were_asked_for_only(method: Method) -> None:
    p = tanh_problem()
    z, _ = DEQ(p.cell, method.solver, method.gradient)(*p.inputs)
    leaves = leaves_behind(z)
    assert {id(leaf) for leaf in p.leaves} <= {id(leaf) for leaf in leaves}
    z.sum().backward()
    wanted = {id(leaf) for leaf in p.leaves}
    for leaf in leaves:
        assert (leaf.grad is not None) == (id(leaf) in wanted)


def leaves_behind(output: Tensor) -> list[Tensor]:
    """All leaf tensors of a graph."""
    seen: set[Any] = set()
    stack, leaves = [output.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(upstream for upstream, _ in node.next_functions)
    return leaves


def test_what_the_graph_keeps_does_not_grow_with_the_steps() -> None:
    p = tanh_problem()

    def kept(steps: int, gradient: Any) -> int:
        recorder = Recorder()
        with recorder.hooks():
            z, _ = fixed_point(
                p.cell,
                p.z0,
                *p.inputs,
                solver=FixedPointIteration(tol=0, max_steps=steps),
                gradient=gradient,
                on_failure="ignore",
            )
            count = recorder.alive()
        assert z.requires_grad
        return count

    assert kept(40, ImplicitGradient()) == kept(3, ImplicitGradient()) > 0
    assert kept(40, PhantomGradient(2)) == kept(3, PhantomGradient(2)) > kept(3, PhantomGradient(1)) > 0
    assert kept(40, UnrolledGradient()) > kept(3, UnrolledGradient())


@pytest.mark.parametrize("max_steps", [5, 50])
def test_without_gradients_nothing_is_kept(max_steps: int) -> None:
    p = tanh_problem()
    recorder = Recorder()
    with recorder.hooks(), torch.no_grad():
        fixed_point(p.cell, p.z0, *p.inputs, solver=FixedPointIteration(max_steps=max_steps), on_failure="ignore")
    assert not recorder.references
