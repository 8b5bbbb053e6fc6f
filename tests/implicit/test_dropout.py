"""Variational dropout: one mask a solve, which nobody resets."""

from __future__ import annotations

import asyncio
import copy
import itertools
import pickle
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.problems import SOLVERS, contraction, generator, tight
from zoo.implicit import Anderson, ImplicitGradient, PhantomGradient, Solver, fixed_point, jacobian_penalty
from zoo.implicit.dropout import Draws, VariationalDropout, current_draws, one_draw, use_draws

FEATURE, CHANNEL, LOCKED, TOKEN = (), (2, 3), (1,), (2,)


class DroppingCell(nn.Module):
    """f(z, x) = A (m * z) + x, with z* = (I - A diag(m))^-1 x for each sample."""

    def __init__(self, p: float = 0.3, shared_dims: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.A = nn.Parameter((1 - p) * contraction(4, 0.7))
        self.dropout = VariationalDropout(p, shared_dims)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.dropout(z) @ self.A.mT + x

    def solution(self, mask: Tensor, x: Tensor) -> Tensor:
        return torch.linalg.solve(torch.eye(4, dtype=x.dtype) - self.A * mask.unsqueeze(1), x)


def samples(batch: int = 5) -> Tensor:
    return torch.randn(batch, 4, dtype=torch.float64, generator=generator(1))


def mask_of(module: nn.Module, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return module(torch.ones(shape, dtype=dtype))


# -------------------------------------------------------------------------------------------------------- in a solve


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_the_equilibrium_is_that_of_the_masked_map(solver: Solver) -> None:
    cell, x = DroppingCell(), samples()
    with one_draw():
        z, report = fixed_point(cell, torch.zeros_like(x), x, solver=tight(solver, 1e-12))
        mask = mask_of(cell.dropout, *x.shape)
    assert report.converged.all()
    assert 0 < (mask == 0).sum() < mask.numel()
    torch.testing.assert_close(z, cell.solution(mask, x), rtol=0, atol=1e-10)


def test_the_next_solve_has_other_masks() -> None:
    cell, x = DroppingCell(), samples()
    results = []
    for _ in range(3):
        with one_draw():
            results.append(fixed_point(cell, torch.zeros_like(x), x)[0].detach())
    assert all((a - b).abs().amax(dim=1).min() > 1e-3 for a, b in itertools.pairwise(results))


@pytest.mark.parametrize(
    "gradient", [ImplicitGradient(tight(Anderson())), PhantomGradient(60)], ids=["implicit", "phantom"]
)
def test_gradients_are_those_of_the_masked_map(gradient: Any) -> None:
    cell, x = DroppingCell(), samples().requires_grad_()
    R = torch.randn(5, 4, dtype=torch.float64, generator=generator(2))
    with one_draw():
        z, _ = fixed_point(cell, torch.zeros_like(x), x, solver=tight(Anderson()), gradient=gradient)
        mask = mask_of(cell.dropout, *x.shape)
    found = torch.autograd.grad((R * z).sum(), (x, cell.A))  # the masks are in the graph, wherever that is run
    expected = torch.autograd.grad((R * cell.solution(mask, x)).sum(), (x, cell.A))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_jacobian_penalty_sees_the_masks_of_the_solve() -> None:
    """With one feature and f(z) = z m / 2 + x the penalty is 0 just where the mask is."""
    dropout, x = VariationalDropout(0.5), samples(64)[:, :1]

    def f(z: Tensor, x: Tensor) -> Tensor:
        return 0.25 * dropout(z) + x

    with one_draw():
        z, _ = fixed_point(f, torch.zeros_like(x), x, solver=tight(Anderson()))
        penalty = jacobian_penalty(f, z, x)
    dropped = (z - x).abs().squeeze(1) < 1e-12
    assert 10 < dropped.sum() < 54
    assert torch.equal(penalty == 0, dropped)


# ------------------------------------------------------------------------------------------------------------- draws


def test_without_a_draw_each_call_has_its_own_mask() -> None:
    dropout = VariationalDropout(0.5)
    assert current_draws() is None
    assert not torch.equal(mask_of(dropout, 100), mask_of(dropout, 100))


def test_an_inner_draw_joins_the_outer_one() -> None:
    dropout = VariationalDropout(0.5)
    with one_draw() as outer:
        first = mask_of(dropout, 100)
        with one_draw() as inner:
            assert inner is outer is current_draws()
            assert torch.equal(mask_of(dropout, 100), first)
        assert torch.equal(mask_of(dropout, 100), first)
    assert current_draws() is None
    with one_draw():
        assert not torch.equal(mask_of(dropout, 100), first)


def test_a_draw_ends_with_an_error() -> None:
    with pytest.raises(KeyError), one_draw(), one_draw():
        raise KeyError
    assert current_draws() is None


def test_modules_and_shapes_have_masks_of_their_own() -> None:
    """A smaller last batch needs nothing; a module that is called twice applies one mask."""
    one, other = VariationalDropout(0.5), VariationalDropout(0.5)
    with one_draw():
        first = mask_of(one, 8, 16)
        assert mask_of(one, 3, 16).shape == (3, 16)
        assert not torch.equal(mask_of(other, 8, 16), first)
        assert not torch.equal(mask_of(one, 8, 8), first[:, :8])
        assert not torch.equal(mask_of(copy.deepcopy(one), 8, 16), first)
        assert torch.equal(one(mask_of(one, 8, 16)), first.square())


def test_masks_can_be_used_again_later() -> None:
    dropout = VariationalDropout(0.5)
    with one_draw() as draws:
        first = mask_of(dropout, 100)
    enter = use_draws(draws)
    with enter, enter:  # one object, entered again
        assert torch.equal(mask_of(dropout, 100), first)
    with one_draw():
        other = mask_of(dropout, 100)
        with use_draws(draws):
            assert torch.equal(mask_of(dropout, 100), first)
        with use_draws(None):
            assert current_draws() is None
            assert not torch.equal(mask_of(dropout, 100), mask_of(dropout, 100))
        assert torch.equal(mask_of(dropout, 100), other)
    assert not torch.equal(first, other)


def test_activations_are_recomputed_under_the_masks_of_the_solve() -> None:
    cell, x = DroppingCell(), samples().requires_grad_()

    def again() -> tuple[Any, Any]:
        return nullcontext(), use_draws(current_draws())

    def f(z: Tensor, x: Tensor) -> Tensor:
        return checkpoint(cell, z, x, use_reentrant=False, context_fn=again)

    with one_draw():
        z, _ = fixed_point(f, torch.zeros_like(x), x, solver=tight(Anderson()), gradient=PhantomGradient(60))
        mask = mask_of(cell.dropout, *x.shape)
    found = torch.autograd.grad(z.square().sum(), (x, cell.A))
    expected = torch.autograd.grad(cell.solution(mask, x).square().sum(), (x, cell.A))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_threads_and_tasks_have_draws_of_their_own() -> None:
    seen: list[Draws | None] = []
    with one_draw():
        thread = threading.Thread(target=lambda: seen.append(current_draws()))
        thread.start()
        thread.join()
    assert seen == [None]

    async def task() -> Draws | None:
        with one_draw() as draws:
            await asyncio.sleep(0)
            assert current_draws() is draws
            await asyncio.sleep(0)
            return draws

    async def both() -> list[Draws | None]:
        return await asyncio.gather(task(), task())

    first, second = asyncio.run(both())
    assert first is not second


# -------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("shared_dims", [FEATURE, LOCKED, TOKEN])
@pytest.mark.parametrize("order", ["all first", "rows first"])
@pytest.mark.parametrize("rows", [[0, 3], [4, 1, 2], [2], [], [0, 1, 2, 3, 4]], ids=str)
def test_samples_keep_their_masks_when_others_leave(shared_dims: tuple[int, ...], order: str, rows: list[int]) -> None:
    dropout, chosen = VariationalDropout(0.5, shared_dims), torch.tensor(rows, dtype=torch.int64)
    with one_draw() as draws:
        whole = mask_of(dropout, 5, 6, 7) if order == "all first" else None
        with use_draws(draws.of_rows(chosen, 5)):
            some = [mask_of(dropout, len(rows), 6, 7) for _ in range(2)]
        whole = mask_of(dropout, 5, 6, 7) if whole is None else whole
    assert torch.equal(some[0], whole[chosen])
    assert torch.equal(some[1], whole[chosen])


def test_rows_can_be_set_on_the_draws_themselves() -> None:
    dropout = VariationalDropout(0.5)
    with one_draw() as draws:
        whole = mask_of(dropout, 5, 9)
        draws.batch = 5
        for rows in ([0, 1], [3, 4]):
            draws.rows = torch.tensor(rows)
            assert torch.equal(mask_of(dropout, 2, 9), whole[rows])
        draws.rows = None
        assert torch.equal(mask_of(dropout, 5, 9), whole)


def test_a_solve_in_a_cell_counts_in_the_rows_that_are_left() -> None:
    dropout = VariationalDropout(0.5)
    with one_draw() as draws:
        whole = mask_of(dropout, 6, 9)
        outer = draws.of_rows(torch.tensor([1, 2, 5]), 6)
        with use_draws(outer.of_rows(torch.tensor([2, 0]), 3)):
            assert torch.equal(mask_of(dropout, 2, 9), whole[[5, 1]])
        with use_draws(outer.of_rows(None, 3)):
            assert torch.equal(mask_of(dropout, 3, 9), whole[[1, 2, 5]])
        for view in (outer.of_rows(None, 2), outer.of_rows(torch.tensor([7, 4]), 8)):  # not of these samples
            with use_draws(view), pytest.raises(ValueError, match="has a tensor with 2 rows"):
                mask_of(dropout, 2, 9)


def test_what_all_samples_share_has_a_mask_of_one_row() -> None:
    """Say an embedding of positions, (1, T, C), beside a state (B, T, C)."""
    dropout = VariationalDropout(0.5)
    with one_draw() as draws:
        shared = mask_of(dropout, 1, 50)
        for rows in ([0, 2], [2]):
            with use_draws(draws.of_rows(torch.tensor(rows), 4)):
                assert torch.equal(mask_of(dropout, 1, 50), shared)


def test_a_tensor_that_is_not_of_samples_is_refused_when_some_have_left() -> None:
    """The mask of tokens ``(B * T, C)`` would change with the rows, and the solve not converge, in silence."""
    dropout = VariationalDropout(0.5)
    with one_draw() as draws:
        assert mask_of(dropout, 4 * 3, 5).shape == (12, 5)
        refused = pytest.raises(ValueError, match="a tensor with 6 rows where 2 samples of a larger batch")
        with use_draws(draws.of_rows(torch.tensor([0, 2]), 4)), refused:
            mask_of(dropout, 2 * 3, 5)


def test_a_solve_whose_rows_leave_has_the_result_of_one_whose_rows_stay() -> None:
    cell, x = DroppingCell(), samples()
    with one_draw() as draws, torch.no_grad():
        z, _ = fixed_point(cell, torch.zeros_like(x), x, solver=tight(Anderson()))
        rows = torch.tensor([3, 0])
        with use_draws(draws.of_rows(rows, 5)):
            some, _ = fixed_point(cell, torch.zeros_like(x[rows]), x[rows], solver=tight(Anderson()))
    torch.testing.assert_close(some, z[rows], rtol=0, atol=1e-11)


# ------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("shared_dims", "mask_shape"),
    [(FEATURE, (40, 8, 10, 4)), (CHANNEL, (40, 8, 1, 1)), (LOCKED, (40, 1, 10, 4)), (-1, (40, 8, 10, 1))],
)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_distribution(shared_dims: Any, mask_shape: tuple[int, ...], p: float) -> None:
    """Zeros with probability p, else 1 / (1 - p), the same over the shared dimensions and independent elsewhere."""
    mask = mask_of(VariationalDropout(p, shared_dims), 40, 8, 10, 4)
    first = mask[tuple(slice(n) for n in mask_shape)]
    assert torch.equal(mask, first.expand_as(mask))
    assert set(first.unique().tolist()) == {0.0, 1 / (1 - p)}
    kept = (first != 0).double()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert (kept.mean() - (1 - p)).abs() < 4 * deviation
    for dim in range(4):  # neighbours along each dimension are as often both kept as by chance
        if kept.shape[dim] > 1:
            both = (kept * kept.roll(1, dim)).mean()
            assert (both - (1 - p) ** 2).abs() < 4 * ((1 - p) ** 2 * (1 + 2 * p) / kept.numel()) ** 0.5


def test_masks_come_from_the_global_generator() -> None:
    dropout = VariationalDropout(0.5)
    torch.manual_seed(3)
    first = mask_of(dropout, 100)
    torch.manual_seed(3)
    with one_draw():
        assert torch.equal(mask_of(dropout, 100), first)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_result_has_the_dtype_of_the_argument(dtype: torch.dtype) -> None:
    dropout = VariationalDropout(0.3)
    x = torch.randn(50, 3, generator=generator(1)).to(dtype).requires_grad_()
    with one_draw():
        y = dropout(x)
        kept = mask_of(dropout, 50, 3) != 0
    assert y.dtype == dtype
    y.sum().backward()
    scale = torch.tensor(1 / 0.7, dtype=dtype)
    assert torch.equal(x.grad, kept * scale)
    assert torch.equal(y.detach(), x.detach() * kept * scale)


def test_a_mask_in_another_dtype_is_the_same_mask() -> None:
    """A penalty is often taken outside of the autocast region that the solve was in."""
    dropout = VariationalDropout(0.3)
    with one_draw():
        narrow, wide = (mask_of(dropout, 100, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    assert torch.equal(narrow != 0, wide != 0)
    assert wide.max() == 1 / 0.7  # not rounded in between


def test_masks_are_on_the_device_of_the_argument() -> None:
    with one_draw():
        y = VariationalDropout(0.5)(torch.ones(4, 3, device="meta", dtype=torch.bfloat16))
    assert y.device.type == "meta"
    assert (y.shape, y.dtype) == ((4, 3), torch.bfloat16)


def test_memory_format_stays() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for shared_dims in (FEATURE, CHANNEL):
        assert VariationalDropout(0.5, shared_dims)(x).is_contiguous(memory_format=torch.channels_last)


def test_nothing_happens_in_eval_mode_and_with_p_0() -> None:
    x = torch.randn(4, 3)
    state = torch.random.get_rng_state()
    assert VariationalDropout(0.5).eval()(x) is x
    assert VariationalDropout(0)(x) is x
    assert torch.equal(torch.random.get_rng_state(), state)


def test_p_1_drops_all() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = VariationalDropout(1)(x)
    assert torch.equal(y.detach(), torch.zeros(4, 3))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 3))


def test_an_empty_batch() -> None:
    with one_draw():
        assert mask_of(VariationalDropout(0.5), 0, 3).shape == (0, 3)


@pytest.mark.parametrize("shared_dims", [FEATURE, LOCKED])
def test_gradcheck(shared_dims: tuple[int, ...]) -> None:
    dropout = VariationalDropout(0.5, shared_dims)
    x = samples().requires_grad_()
    with one_draw():
        assert torch.autograd.gradcheck(lambda x: dropout(x).sin(), x)
        assert torch.autograd.gradgradcheck(lambda x: dropout(x).sin(), x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_mask_drawn_without_gradients_serves_with_them(context: Any) -> None:
    dropout, x = VariationalDropout(0.5), torch.ones(5, 4, requires_grad=True)
    with one_draw() as draws:
        rows = torch.tensor([1, 2])
        with context():
            mask = mask_of(dropout, 5, 4, dtype=torch.float32).clone()
            with use_draws(part := draws.of_rows(rows, 5)):
                dropout(torch.ones(2, 4))
        dropout(x).sum().backward()
        assert torch.equal(x.grad, mask)
        with use_draws(part):
            (grad,) = torch.autograd.grad(dropout(x[rows]).sum(), x)
        assert torch.equal(grad[rows], mask[rows])


# ---------------------------------------------------------------------------------------------------- other machinery


def test_copies_and_pickles() -> None:
    dropout = VariationalDropout(0.25, (2, 3))
    with one_draw():
        mask_of(dropout, 2, 3, 4, 4)
        for twin in (copy.deepcopy(dropout), pickle.loads(pickle.dumps(dropout))):  # noqa: S301
            assert (twin.p, twin.shared_dims) == (0.25, (2, 3))
            assert mask_of(twin, 2, 3, 4, 4).shape == (2, 3, 4, 4)
    assert dropout.state_dict() == {}
    assert repr(dropout) == "VariationalDropout(p=0.25, shared_dims=(2, 3))"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch.func.jacfwd's own
def test_jacobians_by_torch_func() -> None:
    """Also when it is they who ask for the mask first, which must not be left one of their own wrapped tensors."""
    cell, x = DroppingCell(), samples()
    with one_draw() as draws:
        J = torch.func.jacrev(lambda z: cell(z, x).sum(0))(torch.zeros_like(x)).movedim(1, 0)
        for tensor in (*draws._kept.values(), *draws._scaled.values()):
            assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        mask = mask_of(cell.dropout, *x.shape)
        torch.testing.assert_close(J, cell.A * mask.unsqueeze(1))
        # torch.vmap, which this is made with, refuses to draw; now there is nothing to draw.
        J = torch.func.jacfwd(lambda z: cell(z, x).sum(0))(torch.zeros_like(x)).movedim(1, 0)
        torch.testing.assert_close(J, cell.A * mask.unsqueeze(1))


def test_vmap_does_not_draw() -> None:
    for randomness in ("error", "different"):
        with one_draw(), pytest.raises(RuntimeError, match="randomness"):
            torch.vmap(VariationalDropout(0.5), randomness=randomness)(torch.ones(3, 4))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # torch.compile's own
def test_compiled_cells_have_no_graph_break_and_no_new_graph_for_new_masks() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    cell, x = DroppingCell(), samples().requires_grad_()
    compiled = torch.compile(cell, backend=backend, fullgraph=True, dynamic=False)
    for _ in range(3):
        with one_draw():
            mask = mask_of(cell.dropout, *x.shape)
            z, report = fixed_point(compiled, torch.zeros_like(x), x, solver=tight(Anderson()))
            assert torch.equal(mask_of(cell.dropout, *x.shape), mask)
        assert report.converged.all()
        torch.testing.assert_close(z, cell.solution(mask, x), rtol=0, atol=1e-10)
    assert len(graphs) <= 2  # with and without gradients
    torch.compiler.reset()


def test_compiled_calls_outside_of_a_draw_have_masks_of_their_own() -> None:
    torch.compiler.reset()
    dropout = VariationalDropout(0.5)
    twice = torch.compile(lambda x: (dropout(x), dropout(x)), backend="aot_eager", fullgraph=True)
    x = torch.ones(200, requires_grad=True)
    first, second = twice(x)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert torch.equal(x.grad, first.detach())
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), "0.5", None])
def test_p_is_a_probability(p: Any) -> None:
    with pytest.raises(ValueError, match=r"VariationalDropout\(p=...\) takes a probability in \[0, 1\]; given: "):
        VariationalDropout(p)


@pytest.mark.parametrize("shared_dims", [0, (1, 0)])
def test_samples_share_no_mask(shared_dims: Any) -> None:
    with pytest.raises(ValueError, match=r"takes dimensions other than 0, the batch"):
        VariationalDropout(0.5, shared_dims)


@pytest.mark.parametrize(("shared_dims", "shape"), [(3, (2, 3, 4)), (-3, (2, 3, 4)), (-4, (2, 3, 4)), ((1, 2), (2, 3))])
def test_shared_dimensions_exist(shared_dims: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"needs a tensor that has these dimensions besides .*given: shape \(2, 3"):
        mask_of(VariationalDropout(0.5, shared_dims), *shape)


def test_arguments_are_floating_and_have_a_batch() -> None:
    with pytest.raises(TypeError, match=r"takes a floating tensor; given: torch.int64"):
        VariationalDropout(0.5)(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="dimension 0 is the batch; given: a scalar"):
        VariationalDropout(0.5)(torch.ones(()))
