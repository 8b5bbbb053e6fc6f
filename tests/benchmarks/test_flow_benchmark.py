"""The benchmark of DEQ flow: what it compares computes the same, and its counts are those of the solves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zoo
from benchmarks import flow
from benchmarks.flow_speed import OURS, TorchvisionLoop, solved
from benchmarks.flow_steps import AGAIN, CORRECTED, IMPLICIT, PHANTOM, UNROLLED, Images, created, spread
from benchmarks.flow_video import _least, played, video
from benchmarks.flow_weights import SMALL, Loaded, loaded
from lightning_modules.checkpoints import CheckpointError
from zoo.flow import DEQFlow
from zoo.implicit import FixedPointIteration


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    zoo.save_weights(created("deq_flow_nano"), path)
    return str(path)


@pytest.fixture(scope="module")
def found(weights: str) -> Loaded:
    return loaded(replace(SMALL, weights=weights))


@pytest.fixture(scope="module")
def still(found: Loaded) -> Loaded:
    """A model that sees no motion, so that its solves converge, and frames that do not change."""
    torch.manual_seed(0)
    model = zoo.create_model("deq_flow_nano", weight_norm=False).eval()
    assert isinstance(model, zoo.DEQFlow)
    for p in model.deq.cell.update_block.flow_head.conv2.parameters():  # type: ignore[union-attr]
        torch.nn.init.zeros_(p)
    return replace(found, model=model, frames=found.frames[:, :1].expand_as(found.frames))


def test_both_loops_compute_the_same() -> None:
    model = created("deq_flow_nano").eval()
    one, two = Images(2, 40, 64).drawn()
    loop = TorchvisionLoop(model)
    model.deq.unrolled = 5
    with torch.no_grad():
        torch.testing.assert_close(loop(one, two, 5), model(one, two), rtol=1e-4, atol=1e-4)
        assert (loop(one, two, 4) - loop(one, two, 5)).abs().max() > 1e-2


def test_no_solve_stops_early() -> None:
    model = created("deq_flow_nano").eval()
    one, two = Images(1, 32, 32).drawn()
    with torch.no_grad():
        solved(model, one, two, 7)
    assert model.deq.report is not None
    assert model.deq.report.evaluations == 8


@given(st.integers(1, 8), st.integers(1, 60))
def test_losses_are_equally_spaced(count: int, steps: int) -> None:
    states = [0, *spread(count, steps), steps]
    gaps = [b - a for a, b in pairwise(states)]
    assert min(gaps) >= 1
    if steps >= count:
        assert len(gaps) == count
        assert max(gaps) - min(gaps) <= 1


def test_sequences_are_those_of_the_recipe(found: Loaded) -> None:
    assert found.frames.shape == (2, 4, 3, 32, 48)
    assert found.flow.shape == (2, 3, 2, 32, 48)
    assert not found.model.training


def test_a_cold_start_is_the_model_s_own_call(found: Loaded) -> None:
    solver = FixedPointIteration(tol=0, max_steps=3)
    result = played(found, solver, solver, warm_start=False)
    assert (result.evaluations, result.solved) == (4, 0)
    found.model.deq.solver, found.model.deq.on_failure = solver, "ignore"
    pairs = found.frames[:, 1:-1].flatten(0, 1), found.frames[:, 2:].flatten(0, 1)
    with torch.no_grad():
        errors = (found.model(*pairs) - found.flow[:, 1:].flatten(0, 1)).norm(dim=1)
    assert result.epe == pytest.approx(float(errors.mean()), rel=1e-4)


@pytest.fixture
def from_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm start is the whole state in which the pair before ended, the hidden one too."""
    monkeypatch.setattr(DEQFlow, "next_start", lambda self, state: state)


@pytest.mark.usefixtures("from_the_end")
def test_where_nothing_changes_such_a_start_is_the_end(still: Loaded) -> None:
    tight, loose = FixedPointIteration(tol=1e-6, check_every=1), FixedPointIteration(tol=1e-3, check_every=1)
    warm = played(still, tight, loose, warm_start=True)
    cold = played(still, tight, loose, warm_start=False)
    assert (warm.evaluations, warm.solved) == (1, 1)
    assert cold.evaluations > 3
    assert cold.solved == 1
    assert warm.epe == pytest.approx(float(still.flow[:, 1:].norm(dim=2).mean()), rel=1e-5)


@pytest.mark.usefixtures("from_the_end")
def test_fewer_evaluations_are_counted(still: Loaded) -> None:
    result = video(replace(flow.QUICK.video, most=40), still)
    assert result["least"] == {"cold": 2, "warm": 2}, "the flow is 0 from the start"
    assert result["ratio"] == result["ratio_with_first"] == 1
    for item in result["tolerances"]:
        assert item["ratio"] == item["cold"]["evaluations"] > 3


@pytest.mark.parametrize(
    ("epes", "least"),
    [([3.0, 2.0, 1.0], 5), ([1.0, 2.0, 1.0], 5), ([3.0, 1.0, 1.0], 3), ([1.0, 1.0, 1.0], 2), ([1.0, 1.0, 2.0], None)],
)
def test_the_fewest_evaluations_are_those_from_which_on_it_stays_good(epes: list[float], least: int | None) -> None:
    assert _least([1, 2, 4], epes, 1.01) == least


def test_weights_that_are_not_there() -> None:
    with pytest.raises(CheckpointError, match="there is none at nowhere"):
        loaded(replace(SMALL, weights="nowhere.ckpt"))


def test_a_quick_run(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow.main(["--quick", "--weights", weights, "--out", str(tmp_path)])
    text = (tmp_path / "flow.md").read_text()
    assert text in capsys.readouterr().out
    assert weights in text
    assert (tmp_path / "flow.png").stat().st_size > 1000
    data = json.loads((tmp_path / "flow.json").read_text())
    assert list(data)[1:] == list(flow.MEASUREMENTS)

    (training,) = data["training"].values()
    peaks = training["bytes"]
    for way in (IMPLICIT, PHANTOM, CORRECTED, AGAIN):
        assert peaks[way][1] == pytest.approx(peaks[way][0], rel=0.01), "memory does not grow with the steps"
        assert peaks[way][1] > training["encoders"]
    assert peaks[UNROLLED][1] > 1.2 * peaks[UNROLLED][0]
    assert peaks[PHANTOM][1] <= peaks[IMPLICIT][1] < peaks[UNROLLED][1] / 1.2
    assert training["ratio"][PHANTOM] == peaks[UNROLLED][1] / peaks[PHANTOM][1]
    assert all(seconds > 0 for seconds in training["seconds"].values())

    (inference,) = data["inference"].values()
    assert inference["ways"][OURS]["iteration_ratio"] == inference["ways"][OURS]["call_ratio"] == 1
    assert all(math.isfinite(x) for way in inference["ways"].values() for x in way.values())
    assert len(data["video"]["epe"]["cold"]) == len(data["video"]["depths"])
    for item in data["solvers"]["ways"].values():
        assert 1 <= item["warm"]["evaluations"] <= 13
        assert 1 < item["cold"]["evaluations"] <= 13
