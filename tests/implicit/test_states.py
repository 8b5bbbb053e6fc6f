"""States: every nested structure, shape and layout goes in and comes out; what is no state is refused by name."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.problems import METHODS, SOLVERS, Method, generator
from zoo.implicit import DEQ, Anderson, FixedPointIteration, ImplicitGradient, Newton, PhantomGradient, fixed_point
from zoo.implicit.state import StateView

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
thorough = settings(deadline=None, derandomize=True, database=None, max_examples=60)


class Point(NamedTuple):
    x: Tensor
    y: Tensor


def halve(z: Any, *inputs: Any) -> Any:
    """A contraction for any structure; its solution is 2."""
    return pytree.tree_map(lambda t: 0.5 * t + 1, z)


# ------------------------------------------------------------------------------------------------------- round trips


@st.composite
def states(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> Any:
    """Nested tuples, lists and dicts of tensors with 0 to 3 trailing dimensions and one batch size of 0 to 4."""
    batch = draw(st.integers(0, 4))
    shapes = st.lists(st.integers(1, 4), max_size=3)
    leaves = st.builds(
        lambda shape, dtype, seed: torch.randn(batch, *shape, dtype=dtype, generator=generator(seed)),
        shapes,
        st.sampled_from(dtypes),
        st.integers(0, 1000),
    )
    nested = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=3),
            st.lists(inner, min_size=1, max_size=3).map(tuple),
            st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3),
        ),
        max_leaves=5,
    )
    return draw(nested)


@thorough
@given(states())
def test_flatten_and_unflatten_are_inverse(state: Any) -> None:
    view = StateView(state)
    leaves, spec = pytree.tree_flatten(state)
    matrix = view.flatten(state)
    assert matrix.shape == (leaves[0].shape[0], sum(x.shape[1:].numel() for x in leaves)) == (view.batch, view.size)
    assert matrix.dtype == view.dtype == max((x.dtype for x in leaves), key=lambda dtype: dtype.itemsize)
    back, back_spec = pytree.tree_flatten(view.unflatten(matrix))
    assert back_spec == spec
    for x, y in zip(leaves, back, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
    torch.testing.assert_close(view.round(matrix), matrix, rtol=0, atol=0)


@thorough
@given(states(dtypes=(torch.float32,)), st.sampled_from(list(METHODS.values())))
def test_a_deq_returns_what_its_state_looks_like(z0: Any, method: Method) -> None:
    z, report = DEQ(Halving(), type(method.solver)(), method.gradient)(z0=z0)
    assert_alike(z, z0)
    for leaf in pytree.tree_leaves(z):
        torch.testing.assert_close(leaf, torch.full_like(leaf, 2.0), rtol=0, atol=1e-3)
    assert report.residual.shape == (pytree.tree_leaves(z0)[0].shape[0],)


@thorough
@given(states(), st.sampled_from([Anderson(), FixedPointIteration()]))
def test_a_state_of_mixed_dtypes_keeps_them(z0: Any, solver: Any) -> None:
    z, report = fixed_point(halve, z0, solver=solver)
    assert_alike(z, z0)
    assert report.residual.dtype == max((x.dtype for x in pytree.tree_leaves(z0)), key=lambda dtype: dtype.itemsize)


class Halving(nn.Module):
    def forward(self, z: Any) -> Any:
        return halve(z)


def assert_alike(z: Any, z0: Any) -> None:
    """Same structure, shapes, dtypes and device."""
    found, spec = pytree.tree_flatten(z)
    given_leaves, given_spec = pytree.tree_flatten(z0)
    assert spec == given_spec
    for x, y in zip(found, given_leaves, strict=True):
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device)


@pytest.mark.parametrize(
    "z0",
    [
        Point(torch.zeros(2, 3), torch.zeros(2)),
        OrderedDict(b=torch.zeros(2, 1), a=torch.zeros(2, 2)),
        ((((torch.zeros(2, 2),),),), {"k": [torch.zeros(2, 0)]}),
    ],
    ids=["namedtuple", "OrderedDict", "deep"],
)
@every_method
def test_other_containers(z0: Any, method: Method) -> None:
    z, _ = fixed_point(halve, z0, solver=type(method.solver)(), gradient=method.gradient)
    assert type(z) is type(z0)
    assert_alike(z, z0)


# ------------------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("shape", [(2, 3), (2,), (2, 3, 4), (2, 3, 4, 5), (0, 3)])
def test_one_contiguous_tensor_is_viewed_and_not_copied(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    matrix = StateView(x).flatten(x)
    assert matrix.shape == (shape[0], math.prod(shape[1:]))
    assert matrix.data_ptr() == x.data_ptr()
    assert StateView(x).unflatten(matrix).data_ptr() == x.data_ptr()


CHANNELS_LAST = [((2, 3, 4, 5), torch.channels_last), ((2, 3, 2, 4, 5), torch.channels_last_3d)]


@pytest.mark.parametrize(("shape", "layout"), CHANNELS_LAST)
def test_a_channels_last_tensor_is_viewed_and_not_copied(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = torch.randn(shape).contiguous(memory_format=layout)
    view = StateView(x)
    matrix = view.flatten(x)
    assert matrix.data_ptr() == x.data_ptr()
    assert matrix.is_contiguous()
    back = view.unflatten(matrix)
    assert back.is_contiguous(memory_format=layout)
    assert torch.equal(back, x)


@every_method
@pytest.mark.parametrize(("shape", "layout"), CHANNELS_LAST)
def test_a_channels_last_state_stays_so(method: Method, shape: tuple[int, ...], layout: torch.memory_format) -> None:
    seen = []

    def f(z: Tensor, x: Tensor) -> Tensor:
        seen.append(z.is_contiguous(memory_format=layout))
        return 0.5 * z + x

    z0 = torch.zeros(shape, dtype=torch.float64).contiguous(memory_format=layout)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    z, _ = fixed_point(f, z0, x, solver=type(method.solver)(), gradient=method.gradient)
    assert all(seen)
    assert z.is_contiguous(memory_format=layout)
    torch.testing.assert_close(z, 2 * x, rtol=1e-2, atol=1e-2)
    z.sum().backward()


def test_a_map_may_return_another_layout() -> None:
    z0 = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 4, 5)
    z, _ = fixed_point(lambda z, x: (0.5 * z + x).contiguous(), z0, x, solver=FixedPointIteration(tol=1e-6))
    assert z.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(z, 2 * x, rtol=1e-4, atol=1e-4)


def test_a_state_that_is_not_contiguous() -> None:
    z0 = torch.zeros(4, 3).mT
    x = torch.randn(3, 4)
    z, _ = fixed_point(lambda z, x: 0.5 * z + x, z0, x, solver=Anderson(tol=1e-6))
    torch.testing.assert_close(z, 2 * x, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- what f may not do


@every_solver
@pytest.mark.parametrize(
    ("f", "error", "parts"),
    [
        (lambda z: z.reshape(2, 12), ValueError, ["(2, 3, 4)", "(2, 12)"]),
        (lambda z: z.mT, ValueError, ["(2, 3, 4)", "(2, 4, 3)"]),
        (lambda z: z[:1], ValueError, ["(2, 3, 4)", "(1, 3, 4)"]),
        (lambda z: z.double(), TypeError, ["(2, 3, 4)", "torch.float32", "torch.float64", "z0"]),
        (lambda z: z.half(), TypeError, ["torch.float32", "torch.float16"]),
        (lambda z: z.long(), TypeError, ["torch.float32", "torch.int64"]),
        (lambda z: (z, z), TypeError, ["given tensor", "returned (tensor, tensor)"]),
        (lambda z: {"z": z}, TypeError, ["given tensor", "returned {'z': tensor}"]),
        (lambda _: None, TypeError, ["NoneType", "tensor was expected"]),
        (lambda _: 1.0, TypeError, ["float", "tensor was expected"]),
    ],
    ids=["reshape", "transpose", "batch", "double", "half", "long", "tuple", "dict", "None", "number"],
)
def test_a_map_that_changes_the_state_is_refused(solver: Any, f: Any, error: type[Exception], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        fixed_point(f, torch.zeros(2, 3, 4), solver=solver)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("batch", [0, 2])
def test_the_tensor_that_changed_is_named(batch: int) -> None:
    z0 = {"hidden": torch.zeros(batch, 2), "memory": [torch.zeros(batch, 3)]}
    with pytest.raises(ValueError, match=r"state\['memory'\]\[0\] has shape \(\d, 3\), f returned shape \(\d, 4\)"):
        fixed_point(lambda z: {"hidden": z["hidden"], "memory": [z["memory"][0].new_zeros(batch, 4)]}, z0)


def test_a_changed_structure_is_shown() -> None:
    z0 = (torch.zeros(2, 1), {"a": torch.zeros(2, 2)})
    with pytest.raises(TypeError, match=r"given \(tensor, {'a': tensor}\) and returned \(tensor, {'b': tensor}\)"):
        fixed_point(lambda z: (z[0], {"b": z[1]["a"]}), z0)
    with pytest.raises(TypeError, match=r"given \(tensor, {'a': tensor}\) and returned \[tensor, {'a': tensor}\]"):
        fixed_point(list, z0)


@pytest.mark.parametrize("gradient", [ImplicitGradient(), PhantomGradient()], ids=str)
def test_a_map_that_changes_the_state_at_the_recorded_evaluation_only(gradient: Any) -> None:
    """The solver has finished; the evaluation of the gradient is checked no less."""
    x = torch.ones(2, 3, requires_grad=True)

    def f(z: Tensor, x: Tensor) -> Tensor:
        fz = 0.5 * z + x
        return fz.mT if torch.is_grad_enabled() else fz

    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        fixed_point(f, torch.zeros(2, 3), x, gradient=gradient)


# ----------------------------------------------------------------------------------------------------- what is no state


@pytest.mark.parametrize(
    ("z0", "error", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "state has dtype torch.int64.*real floating"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "state has dtype torch.bool"),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "state has dtype torch.complex64"),
        (torch.zeros(()), ValueError, r"state has no dimension.*batch first"),
        ((), TypeError, "holds no tensor"),
        ({}, TypeError, "holds no tensor"),
        (None, TypeError, "NoneType"),
        (3.0, TypeError, "state is of type float"),
        ([torch.zeros(2), "two"], TypeError, r"state\[1\] is of type str"),
        (
            {"a": torch.zeros(2, 3), "b": torch.zeros(3, 3)},
            ValueError,
            r"state\['a'\].*\(2, 3\).*state\['b'\].*\(3, 3\)",
        ),
        ((torch.zeros(2), torch.zeros(2, device="meta")), ValueError, "one device.*cpu.*meta"),
    ],
    ids=["int", "bool", "complex", "0-d", "empty tuple", "empty dict", "None", "number", "text", "batches", "devices"],
)
def test_what_is_no_state_is_refused(z0: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fixed_point(halve, z0)


def test_choices_of_the_wrong_kind_are_refused() -> None:
    z0 = torch.zeros(1, 1)
    with pytest.raises(TypeError, match=r"solver= takes a solver object.*given: 'anderson'"):
        fixed_point(halve, z0, solver="anderson")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"gradient= takes a gradient object.*given: Newton"):
        fixed_point(halve, z0, gradient=Newton())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="solver= takes a solver object"):
        DEQ(Halving(), solver=Anderson)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"ImplicitGradient\(solver=...\) takes a solver"):
        ImplicitGradient(solver=PhantomGradient())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_failure must be one of ignore, warn, raise; given: 'shout'"):
        fixed_point(halve, z0, on_failure="shout")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_failure must be one of"):
        DEQ(Halving(), on_failure="shout")  # type: ignore[arg-type]
