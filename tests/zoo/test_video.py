"""Streams of frames: states that move on with their own flow, warm starts, features that are computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from tests.zoo.flows import images, model
from zoo.implicit import FixedPointIteration
from zoo.video import FlowState, moved_on


def state(flow: Tensor, C: int = 3) -> FlowState:
    B, _, h, w = flow.shape
    return FlowState(torch.randn(B, C, h, w, generator=torch.Generator().manual_seed(0)), flow)


def test_what_moves_by_whole_places_is_shifted() -> None:
    before = state(torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 5, 6))
    after = moved_on(before)
    torch.testing.assert_close(after.h[:, :, :-1, 2:], before.h[:, :, 1:, :-2])
    torch.testing.assert_close(after.flow, before.flow)
    torch.testing.assert_close(after.h[:, :, -1], before.h[:, :, -1])  # nothing arrives there
    torch.testing.assert_close(after.h[:, :, :, :2], before.h[:, :, :, :2])


def test_what_stays_is_unchanged() -> None:
    before = state(torch.zeros(2, 2, 4, 5))
    for found, expected in zip(moved_on(before), before, strict=True):
        torch.testing.assert_close(found, expected)


def test_what_moves_between_places_is_shared_by_its_distance() -> None:
    flow = torch.zeros(1, 2, 1, 4)
    flow[0, 0, 0, 1] = 1.25  # from 1 to 2.25
    flow[0, 0, 0, 3] = 9.0  # out of the image
    before = FlowState(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), flow)
    h = moved_on(before).h.flatten()
    assert h.tolist() == pytest.approx([1.0, 2.0, (0.75 * 2 + 3) / 1.75, 2.0])  # place 3 gets a quarter of 2 alone


def test_each_sample_moves_by_itself() -> None:
    before = state(torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(1)))
    joint = moved_on(before)
    for b in range(3):
        alone = moved_on(FlowState(before.h[b : b + 1], before.flow[b : b + 1]))
        torch.testing.assert_close(joint.h[b : b + 1], alone.h)


def video(T: int = 4, B: int = 1) -> Tensor:
    return images(B, T, 3, 32, 40)


def test_without_warm_start_a_stream_gives_what_pairs_give() -> None:
    flow = model()
    frames = video(B=2)
    found = flow.video(frames, warm_start=False)
    assert found.shape == (2, 3, 2, 32, 40)
    for t in range(3):
        with torch.no_grad():
            expected = flow(frames[:, t], frames[:, t + 1])
        torch.testing.assert_close(found[:, t], expected, rtol=1e-4, atol=1e-4)


def test_a_warm_start_takes_fewer_steps_to_the_same_flow() -> None:
    """In a scene that does not change, a solve from the equilibrium has next to nothing to do."""
    flow = model(contracting=True, solver=FixedPointIteration(tol=1e-5, max_steps=100))
    frames = [images(1, 3, 32, 40)] * 4
    steps: dict[bool, list[int]] = {}
    flows: dict[bool, list[Tensor]] = {}
    for warm_start in (False, True):
        stream = flow.stream(warm_start)
        flows[warm_start], steps[warm_start] = [], []
        for frame in frames:
            if (found := stream(frame)) is not None:
                flows[warm_start].append(found)
                steps[warm_start].append(int(flow.deq.report.steps[0]))
    assert steps[True][0] == steps[False][0]
    assert steps[True][1] < steps[False][1]
    torch.testing.assert_close(flows[True][2], flows[False][2], rtol=1e-3, atol=1e-3)


def test_features_of_a_frame_are_computed_once() -> None:
    flow = model()
    calls = []
    flow.feature_encoder.register_forward_hook(lambda *_: calls.append(1))
    flow.video(video(T=4))
    assert len(calls) == 4


def test_nothing_is_recorded() -> None:
    flow = model()
    assert not flow.video(video()).requires_grad


def test_a_failed_solve_does_not_spoil_the_frames_after_it() -> None:
    flow = model()
    frames = video(T=5).clone()
    frames[:, 1] = torch.nan
    flow.deq.on_failure = "ignore"
    found = flow.video(frames)
    assert found[:, 3].isfinite().all()


def test_a_new_video_begins_after_a_reset() -> None:
    flow = model()
    stream = flow.stream()
    assert stream(images(1, 3, 32, 40)) is None
    with pytest.raises(zoo.InputError, match=r"one shape: \(1, 3, 32, 40\) until now; given: \(1, 3, 32, 48\)"):
        stream(images(1, 3, 32, 48))
    assert stream(images(1, 3, 32, 40)) is not None  # the refused frame changed nothing
    stream.reset()
    assert stream(images(1, 3, 32, 48)) is None


def test_no_videos_at_all() -> None:
    assert model(unrolled=2).video(images(0, 4, 3, 32, 40)).shape == (0, 3, 2, 32, 40)


def test_a_list_is_no_video() -> None:
    with pytest.raises(zoo.InputError, match=r"given: list.*torch.stack\(frames, dim=1\)"):
        model().video([images(1, 3, 32, 40)] * 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(4, 3, 32, 40), (1, 1, 3, 32, 40)])
def test_a_video_has_frames(shape: tuple[int, ...]) -> None:
    with pytest.raises(zoo.InputError, match=r"takes frames \(B, T, 3, H, W\) with T >= 2"):
        model().video(images(*shape))


def test_a_start_is_of_the_same_size() -> None:
    flow = model()
    _, start = flow.estimate(*images(2, 1, 3, 32, 40))
    arguments: Any = images(2, 1, 3, 64, 40)
    with pytest.raises(zoo.InputError, match=r"h \(1, 8, 8, 5\) and flow \(1, 2, 8, 5\); given: \(1, 8, 4, 5\)"):
        flow.estimate(*arguments, start=start)


def test_an_estimate_goes_on_from_its_start() -> None:
    flow = model(unrolled=2)
    pair = images(2, 1, 3, 32, 40)
    _, halfway = flow.estimate(*pair)
    found, _ = flow.estimate(*pair, start=halfway)
    flow.deq.unrolled = 4
    torch.testing.assert_close(found, flow(*pair))
