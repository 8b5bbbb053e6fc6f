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


def test_what_moves_by_whole_pixels_is_shifted() -> None:
    flow = torch.zeros(1, 2, 5, 6)
    flow[:, 0], flow[:, 1] = 2.0, -1.0
    flow[:, 0, 3, 1] = 3.0  # from (1, 3) to (4, 2)
    after = moved_on(flow)
    expected = flow.clone()
    expected[:, 0, 3, 1] = 3.0  # nothing comes there: (-1, 4) is outside
    expected[:, 0, 2, 3] = 2.0  # where it would have gone with the others nothing arrives
    expected[:, 0, 2, 4] = 2.5  # two arrive
    torch.testing.assert_close(after, expected)


def test_what_stays_is_unchanged() -> None:
    still = torch.zeros(2, 2, 4, 5)
    assert torch.equal(moved_on(still), still)


def test_what_moves_between_pixels_is_shared_by_its_distance() -> None:
    flow = torch.zeros(1, 2, 1, 4)
    flow[0, 0, 0] = torch.tensor([0.0, 1.25, 0.0, 9.0])  # from 1 to 2.25; the last one leaves the image
    assert moved_on(flow)[0, 0].flatten().tolist() == pytest.approx([0, 1.25, 0.75 * 1.25 / 1.75, 1.25])


def test_each_sample_moves_by_itself() -> None:
    flow = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moved_on(flow), torch.cat([moved_on(one) for one in flow.split(1)]))


def test_the_next_start_is_the_flow_moved_on_in_places_of_eight_pixels() -> None:
    flow = model()
    state = FlowState(torch.randn(2, 8, 4, 5), torch.randn(2, 2, 4, 5))
    start = flow.next_start(state)
    pixels = moved_on(flow.upsampled(state)).detach()
    torch.testing.assert_close(start.flow, pixels.unflatten(2, (4, 8)).unflatten(4, (5, 8)).mean(dim=(3, 5)) / 8)
    assert not start.h.any()
    state.flow[0, 0, 0, 0] = torch.nan
    assert not flow.next_start(state).flow[0].any()
    torch.testing.assert_close(flow.next_start(state).flow[1], start.flow[1])


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


def test_a_warm_start_begins_at_the_flow_of_the_pair_before_and_ends_at_the_same_flow() -> None:
    flow = model(contracting=True, solver=FixedPointIteration(tol=1e-6, max_steps=100))
    frames = video(T=4, B=2)
    starts: list[Any] = []
    flow.deq.register_forward_pre_hook(lambda _, x, options: starts.append(options["z0"]), with_kwargs=True)
    warm = flow.video(frames)
    first, second, third = starts
    assert first is None
    for t, start in ((1, second), (2, third)):
        _, state = flow.estimate(frames[:, t - 1], frames[:, t])
        for found, expected in zip(start, flow.next_start(state), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        assert start[1].abs().max() > 0
    torch.testing.assert_close(warm, flow.video(frames, warm_start=False), rtol=1e-3, atol=1e-3)


def test_features_of_a_frame_are_computed_once() -> None:
    flow = model()
    calls = []
    flow.feature_encoder.register_forward_hook(lambda *_: calls.append(1))
    flow.video(video(T=4))
    assert len(calls) == 4


def test_a_few_steps_from_the_second_pair_on() -> None:
    flow = model(contracting=True)
    stream, frames = flow.stream(steps=2), video(T=4)
    made = []
    for t in range(4):
        found = stream(frames[:, t])
        made.append(None if found is None else flow.deq.report.steps.tolist())
    assert made[0] is None
    assert made[1] > [2]
    assert made[2:] == [[2], [2]]
    assert flow.deq.unrolled is None
    with pytest.raises(ValueError, match=r"stream\(steps=...\) takes an integer >= 1"):
        flow.stream(steps=0)


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
