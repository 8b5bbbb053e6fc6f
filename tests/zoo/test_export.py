"""Graphs of whole models: run by onnxruntime, and as programs of torch.export, they do what the model does."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import zoo
from zoo.exporting import ExportError, example_inputs
from zoo.exporting.agreement import agreement
from zoo.exporting.tasks import Task
from zoo.implicit import DEQ, Anderson, Broyden, FixedPointIteration, Newton

CPU = ["CPUExecutionProvider"]


def digits(start: int, end: int) -> Tensor:
    return torch.tensor(load_digits().images[start:end]).float().unsqueeze(1) / 16


def texts(*given: bytes) -> Tensor:
    return torch.tensor([list(text) for text in given])


def moved(*pixels: int) -> tuple[Tensor, Tensor]:
    """A smooth image, and the same moved by so many pixels, once each."""
    coarse = torch.rand(1, 3, 10, 12, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(coarse, (32, 40), mode="bilinear", align_corners=True)
    return image.repeat(len(pixels), 1, 1, 1), torch.cat([image.roll(n, 3) for n in pixels])


class Case(NamedTuple):
    """A model with weights that ship, an example, a batch of another size, and an easy and a hard sample."""

    model: nn.Module
    example: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    easy: tuple[Tensor, ...]
    hard: tuple[Tensor, ...]


CASES: dict[str, Callable[[], Case]] = {
    "tanh": lambda: Case(  # with the solver that is traced soonest
        zoo.load_pretrained("tanh_deq.digits", solver=FixedPointIteration()),
        example=(digits(0, 2),),
        others=(digits(1500, 1520),),
        easy=(digits(1500, 1501),),
        hard=(torch.full((1, 1, 8, 8), 0.3),),
    ),
    "mdeq": lambda: Case(
        zoo.load_pretrained("mdeq_nano.digits"),
        example=(digits(0, 1),),
        others=(digits(1500, 1506),),
        easy=(digits(1500, 1501),),
        hard=(torch.zeros(1, 1, 8, 8),),
    ),
    "transformer": lambda: Case(
        zoo.load_pretrained("deq_transformer_nano.pydocs", solver=FixedPointIteration(tol=1e-3)),  # mdeq's is its own
        example=(texts(b"import torch", b"return False"),),
        others=(texts(b"the function", b"x9Q#z~ 7W\x01qk", b"            "),),
        easy=(texts(b"            "),),
        hard=(texts(b"the function"),),
    ),
    "flow": lambda: Case(
        zoo.load_pretrained("deq_flow_nano.synthetic"),
        example=moved(1, 3),
        others=moved(0, 2, 4),
        easy=moved(0),
        hard=moved(4),
    ),
}


class Graph(NamedTuple):
    case: Case
    session: onnxruntime.InferenceSession
    exported: Any

    def run(self, *inputs: Tensor) -> dict[str, np.ndarray]:
        named = {x.name: value.numpy() for x, value in zip(self.session.get_inputs(), inputs, strict=True)}
        names = [x.name for x in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, named), strict=True))


@pytest.fixture(scope="module", params=CASES)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    case = CASES[request.param]()
    model = case.model
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    before = copy.deepcopy(model.state_dict())
    exported = zoo.export(model, path, *case.example)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    return Graph(case, onnxruntime.InferenceSession(path, providers=CPU), exported)


def test_onnxruntime_gives_what_the_model_gives_in_as_many_steps(graph: Graph) -> None:
    name = next(iter(graph.exported.outputs))
    for batch in (graph.case.others, graph.case.easy):
        with torch.no_grad():
            wanted = graph.case.model(*batch)
            if name == "log_p":
                wanted = graph.case.model.vocabulary.log_probs(wanted[0])
        report = graph.case.model.deq.report
        found = graph.run(*batch)
        assert [*found] == [*graph.exported.outputs] == [name, "steps", "residual", "converged"]
        np.testing.assert_allclose(found[name], wanted, atol=1e-4 * max(1, float(wanted.abs().amax())))
        assert found["steps"].tolist() == report.steps.tolist()
        assert found["converged"].tolist() == report.converged.tolist()
        np.testing.assert_allclose(found["residual"], report.residual, rtol=0.02)


def test_onnxruntime_has_nothing_to_say_of_it(graph: Graph, capfd: pytest.CaptureFixture[str]) -> None:
    onnxruntime.InferenceSession(graph.exported.path, providers=CPU)
    assert capfd.readouterr().err == ""


def test_a_harder_input_takes_more_steps(graph: Graph) -> None:
    easy, hard = (graph.run(*batch) for batch in (graph.case.easy, graph.case.hard))
    assert hard["steps"] > easy["steps"]
    assert hard["converged"]
    assert easy["converged"]


def test_what_is_reported_is_what_was_compared(graph: Graph) -> None:
    for check in graph.exported.checks:
        assert check.difference < 1e-4
        assert len(check.steps) == check.batch
        assert check.steps == check.model_steps
    assert graph.exported.checks[1].batch == len(graph.case.example[0]) + 1


# ------------------------------------------------------------------------------------------------- toys, in many forms


class Cell(nn.Module):
    """f(z, x) = tanh(W z + x), on a state of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(0.2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(self.linear(torch.cat([z[0], z[1].flatten(1)], dim=1)) + x)
        return new[:, :2], new[:, 2:].unflatten(1, (1, 2))

    def initial_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x[:, :2]), torch.zeros_like(x[:, 2:]).unflatten(1, (1, 2))


class Toy(nn.Module):
    def __init__(self, cell: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        self.deq = DEQ(cell or Cell(), **options)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        (a, b), _ = self.deq(x)
        return {"a": a, "b": b}


def inputs(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))


def test_the_loop_ends_early_in_a_program_that_is_read_again(tmp_path: Path) -> None:
    toy = Toy(solver=Broyden(memory=3, max_steps=10**9))  # hours, if it did not
    exported = zoo.export(toy, tmp_path / "toy.pt2", inputs(3))
    assert exported.inputs == {"x": ("batch", 4)}
    assert exported.outputs == {
        "output_a": ("batch", 2), "output_b": ("batch", 1, 2),
        "steps": ("batch",), "residual": ("batch",), "converged": ("batch",),
    }  # fmt: skip
    program = torch.export.load(tmp_path / "toy.pt2").module()
    for batch in (1, 6):
        x = inputs(batch, seed=batch)
        with torch.no_grad():
            wanted, found = toy(x), program(x)
        torch.testing.assert_close(found["output_a"], wanted["a"])
        torch.testing.assert_close(found["output_b"], wanted["b"])
        assert found["steps"].tolist() == toy.deq.report.steps.tolist()


def test_an_unrolled_cell_and_computed_weights(tmp_path: Path) -> None:
    toy = Toy(unrolled=3)
    zoo.implicit.normalize_weights(toy.deq.cell, "contractive", bound=0.5)  # by a decomposition that ONNX has not
    exported = zoo.export(toy.train(), tmp_path / "toy.onnx", inputs(2))
    assert exported.checks[0].steps == (3, 3)
    assert exported.checks[0].compared == 2  # converged or not
    assert toy.training
    assert nn.utils.parametrize.is_parametrized(toy.deq.cell.linear)
    assert "Loop" not in {node.op_type for node in onnx.load(tmp_path / "toy.onnx").graph.node}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zeros_overflows_and_what_is_not_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    """Operators of ONNX and of onnxruntime treat these in ways of their own."""

    class Unbounded(Cell):
        def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = super().forward(z, torch.zeros_like(x))
            return a + x[:, :2], b + x[:, 2:].unflatten(1, (1, 2))

    solver = FixedPointIteration() if dtype == torch.float32 else Anderson(memory=2)
    toy = Toy(Unbounded(), solver=solver, on_failure="ignore").to(dtype)
    rows = [0, torch.nan, torch.inf, -torch.inf, 1e20, torch.finfo(dtype).max, torch.finfo(dtype).tiny, 1]
    x = torch.tensor(rows, dtype=dtype).unsqueeze(1).repeat(1, 4)
    zoo.export(toy, tmp_path / "toy.onnx", inputs(2).to(dtype), check=False)
    session = onnxruntime.InferenceSession(tmp_path / "toy.onnx", providers=CPU)
    a, _, steps, residual, converged = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        wanted = toy(x)["a"]
    report = toy.deq.report
    assert converged.tolist() == report.converged.tolist()
    assert steps.tolist() == report.steps.tolist()
    assert np.isinf(residual).tolist() == report.residual.isinf().tolist()
    np.testing.assert_allclose(a, wanted, rtol=1e-4)


def test_a_model_without_an_equilibrium(tmp_path: Path) -> None:
    model = zoo.create_model("resnet", widths=(4, 8), in_channels=1)
    exported = zoo.export(model, tmp_path / "resnet.pt2", torch.rand(2, 1, 8, 8))
    assert [*exported.outputs] == ["output"]
    assert exported.checks[0].steps == ()


def test_a_language_model_with_its_memory(tmp_path: Path) -> None:
    model = zoo.create_model(
        "deq_transformer", d_model=8, num_heads=2, d_inner=8, memory_length=5, vocab_size=11, unrolled=2
    )
    tokens = torch.arange(8).view(2, 4)
    with torch.no_grad():
        memory = model(torch.arange(10).view(2, 5))[1]
        h, new = model(tokens, memory)
    exported = zoo.export(model, tmp_path / "text.pt2", tokens, memory)
    assert [*exported.inputs] == ["tokens", "memory_z", "memory_u"]
    assert [*exported.outputs][:3] == ["log_p", "new_memory_z", "new_memory_u"]
    found = torch.export.load(tmp_path / "text.pt2").module()(tokens, *memory)
    torch.testing.assert_close(found["log_p"], model.vocabulary.log_probs(h), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["new_memory_z"], new.z, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- what is refused


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = DEQ(Cell()), DEQ(Cell())


@pytest.mark.parametrize(
    ("model", "file", "given", "message"),
    [
        (Toy(), "toy.pt", [inputs(2)], r"writes .onnx and .pt2 files; given: 'toy.pt'"),
        (Toy(solver=Newton()), "toy.pt2", [inputs(2)], "Newton has no form as a graph.*FixedPointIteration, Anderson"),
        (Toy(solver=Anderson(bfloat16_until=5e-3)), "toy.pt2", [inputs(2)], "bfloat16_until=None"),
        (TwoLayers(), "two.pt2", [inputs(2)], "one equilibrium.*has 2: first, second"),
        (Toy(), "toy.pt2", [inputs(2), inputs(2)], "Toy is not called with 2 inputs: too many positional arguments"),
        (Toy(), "nowhere/toy.pt2", [inputs(2)], "there is no folder .*nowhere; make it"),
        (Toy(), "toy.pt2", [], "what a Toy takes is not known"),
        (Toy(), "toy.pt2", [3], "one row a sample.*given: int"),
        (Toy(), "toy.pt2", [inputs(0)], "one sample at least"),
        (Toy().bfloat16(), "toy.pt2", [inputs(2).bfloat16()], r"Export model.float\(\)"),
        (zoo.create_model("mdeq_nano"), "m.pt2", [], r"give the graph's height and width, >= 1: size=\(H, W\)"),
        (zoo.create_model("mdeq_nano"), "m.pt2", [torch.rand(2, 3, 8, 8)], "with 1 channels"),
        (zoo.create_model("deq_transformer_nano"), "t.pt2", [], r"how many positions L >= 1 the graph takes"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_nothing_is_written(
    model: nn.Module, file: str, given: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.export(model, tmp_path / file, *given)
    assert not [*tmp_path.iterdir()]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"need onnx and onnxscript and onnxruntime.*requirements-export.txt.*\.pt2"):
        zoo.export(Toy(), tmp_path / "toy.onnx", inputs(2))


def test_a_graph_that_does_something_else_is_refused() -> None:
    task = Task(Toy(), (inputs(2),))

    def run(off: float, more: int) -> Callable[..., dict[str, Tensor]]:
        def graph(x: tuple[Tensor, ...]) -> dict[str, Tensor]:
            with torch.no_grad():
                found = task(*x)
            return found | {"output_a": found["output_a"] + off, "steps": found["steps"] + more}

        return graph

    agreed = agreement(task, run(0, 0), task.example, 1e-4)
    assert (agreed.difference, agreed.compared) == (0, 2)
    with pytest.raises(ExportError, match=r"output_a differs from the model's by 1\.0e-03, more than 1\.0e-04"):
        agreement(task, run(1e-3, 0), task.example, 1e-4)
    with pytest.raises(ExportError, match="does not solve as the model does"):
        agreement(task, run(0, 1), task.example, 1e-4)
    with pytest.raises(ExportError, match="differs from the model's by nan"):
        agreement(task, run(torch.nan, 0), task.example, 1e-4)

    def unsolved(x: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return run(0, 0)(x) | {"converged": torch.zeros(2, dtype=torch.bool), "residual": torch.ones(2)}

    with pytest.raises(
        ExportError, match=r"sample 0 has converged is False with a residual of 1\.0e\+00, and in the mod"
    ):
        agreement(task, unsolved, task.example, 1e-4)


def test_what_was_not_compared_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exported = zoo.export(Toy(solver=FixedPointIteration(tol=0, max_steps=2)), tmp_path / "toy.pt2", inputs(2))
    assert all(check.compared == 0 and np.isnan(check.difference) for check in exported.checks)
    assert f"{tmp_path / 'toy.pt2'} was not compared with the model" in caplog.text


@pytest.mark.filterwarnings("ignore::zoo.implicit.ConvergenceWarning")  # of random weights
@pytest.mark.parametrize("name", ["tanh_deq", "mdeq_nano", "mdeq_nano_scenes", "deq_flow_nano", "resnet"])
def test_examples_are_what_models_take(name: str) -> None:
    model = zoo.create_model(name).eval()
    images = example_inputs(model, (32, 40) if name != "tanh_deq" else (8, 8), batch=3)
    with torch.no_grad():
        assert len(model(*images)) == 3
    assert all(image.amin() >= 0 and image.amax() <= 1 for image in images)
