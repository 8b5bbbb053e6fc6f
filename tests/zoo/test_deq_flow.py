"""DEQ flow: equations, sizes, padding, inputs, gradients, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.optical_flow import raft_large

import zoo
from tests.zoo.flows import SMALL, images, model
from zoo.correlation import look_up
from zoo.flow import DEQFlow, FlowCell, pixel_grid
from zoo.implicit import FixedPointIteration, ImplicitGradient, PhantomGradient, Trajectory, UnrolledGradient

# ---------------------------------------------------------------------------------------------------------------- cell


def test_the_cell_is_its_equation() -> None:
    """f written out, from torch's functions and the cell's parameters."""
    torch.manual_seed(0)
    sizes = {key: SMALL[key] for key in ("corr_widths", "flow_widths", "motion_width", "head_width", "corr_levels")}
    cell = FlowCell(8, **sizes, corr_radius=1, gma=False, all_grad=True, weight_norm=True).double()
    h, v, context = (torch.randn(2, C, 4, 5, dtype=torch.float64) for C in (8, 2, 8))
    pyramid = tuple(torch.randn(2, 20, *size, dtype=torch.float64) for size in ((4, 5), (2, 2)))
    block: Any = cell.update_block

    def conv(x: Tensor, layer: Any) -> Tensor:
        V = layer.parametrizations.weight.original1
        g = layer.parametrizations.weight.original0
        W = V * (g / V.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
        return F.conv2d(x, W, layer.bias, padding=tuple(k // 2 for k in W.shape[2:]))

    encoder = block.motion_encoder
    seen = look_up(pyramid, pixel_grid(v) + v, 1)
    seen = conv(conv(seen, encoder.convcorr1[0]).relu(), encoder.convcorr2[0]).relu()
    moved = conv(conv(v, encoder.convflow1[0]).relu(), encoder.convflow2[0]).relu()
    m = torch.cat([conv(torch.cat([seen, moved], dim=1), encoder.conv[0]).relu(), v], dim=1)
    new = h
    for gru in (block.recurrent_block.convgru1, block.recurrent_block.convgru2):
        hu = torch.cat([new, context, m], dim=1)
        z, r = conv(hu, gru.convz).sigmoid(), conv(hu, gru.convr).sigmoid()
        q = conv(torch.cat([r * new, context, m], dim=1), gru.convq).tanh()
        new = (1 - z) * new + z * q
    step = conv(conv(new, block.flow_head.conv1).relu(), block.flow_head.conv2)
    found_h, found_v = cell((h, v), context, pyramid)
    torch.testing.assert_close(found_h, new)
    torch.testing.assert_close(found_v, v + step)


def test_global_motion_is_its_equation() -> None:
    flow = model(gma=True).double()
    with torch.no_grad():
        flow.deq.cell.aggregate.gamma.fill_(0.7)  # type: ignore[union-attr, operator]
    context = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    qk = flow.attention.to_qk(context).view(1, 2, 8, 16)  # type: ignore[union-attr, operator]
    A = torch.einsum("bci,bcj->bij", qk[:, 0], qk[:, 1]).div(math.sqrt(8)).softmax(dim=2)
    found = flow.attention(context)  # type: ignore[misc]
    torch.testing.assert_close(found, A)
    m = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    aggregate: Any = flow.deq.cell.aggregate
    v = F.conv2d(m, aggregate.to_v.weight).flatten(2)
    expected = m + 0.7 * torch.einsum("bij,bcj->bci", A, v).view_as(m)
    torch.testing.assert_close(aggregate(m, A), expected)


@pytest.mark.parametrize("gma", [False, True])
def test_every_parameter_gets_a_gradient(gma: bool) -> None:
    flow = model(gma=gma, unrolled=3).train()
    if gma:
        with torch.no_grad():
            flow.deq.cell.aggregate.gamma.fill_(0.1)  # type: ignore[union-attr, operator]
    sum(f.square().mean() for f in flow(*images(2, 2, 3, 32, 40), trajectory=[1, 2])).backward()  # type: ignore[union-attr]
    assert [name for name, p in flow.named_parameters() if p.grad is None] == []


# --------------------------------------------------------------------------------------------------------------- model


def test_it_is_rafts_loop_on_rafts_modules() -> None:
    """torchvision's RAFT with a hidden state that starts at 0 gives the same flows after 1, 2 and 3 updates."""
    torch.manual_seed(0)
    theirs = raft_large().eval()
    ours = DEQFlow(all_grad=False, weight_norm=False, unrolled=3).eval()
    ours.feature_encoder.load_state_dict(theirs.feature_encoder.state_dict())
    context = {
        key: value[128:] if key.startswith("conv.") else value
        for key, value in theirs.context_encoder.state_dict().items()
    }
    ours.context_encoder.load_state_dict(context)
    ours.deq.cell.update_block.load_state_dict(theirs.update_block.state_dict())  # type: ignore[union-attr, operator]
    ours.mask_predictor.load_state_dict(theirs.mask_predictor.state_dict())
    with torch.no_grad():
        theirs.context_encoder.conv.weight[:128] = 0
        theirs.context_encoder.conv.bias[:128] = 0
        image1, image2 = images(2, 1, 3, 128, 136)
        expected = theirs(2 * image1 - 1, 2 * image2 - 1, num_flow_updates=3)
        found = ours(image1, image2, trajectory=[1, 2])
    for ours_k, theirs_k in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_k, theirs_k, rtol=1e-4, atol=1e-3)


COUNTS = {
    "deq_flow_tiny": 2_490_976,
    "deq_flow_base": 5_242_816,
    "deq_flow_large": 8_673_664,
    "deq_flow_huge": 13_394_752,
    "deq_flow_gigantic": 23_248_960,
}
"""architectures.md, section 5; version 1 has narrower flow heads."""
FIRST_VERSION = {"deq_flow_large": 8_449_920, "deq_flow_huge": 12_799_808, "deq_flow_gigantic": 21_914_176}


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [(name, {}, count) for name, count in COUNTS.items()]
    + [(name, {"head_width": 256}, count) for name, count in FIRST_VERSION.items()]
    + [("deq_flow_base", {"gma": True}, 5_783_617)],
)
def test_sizes_are_the_published_ones(name: str, arguments: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        flow = zoo.create_model(name, **arguments)
    assert sum(p.numel() for p in flow.parameters()) == count


@settings(max_examples=10, deadline=None)
@given(B=st.integers(0, 2), H=st.integers(1, 50), W=st.integers(1, 50), padding=st.sampled_from(["both", "bottom"]))
def test_images_of_any_size(B: int, H: int, W: int, padding: str) -> None:
    flow = model(unrolled=1, padding=padding)
    assert flow(*images(2, B, 3, H, W)).shape == (B, 2, H, W)


def test_padding_repeats_the_border_where_it_is_said() -> None:
    """An image that is padded by hand gives the flow of the image that is not, cut out."""
    image1, image2 = images(2, 1, 3, 37, 43)
    for padding, pads in (("both", (2, 3, 1, 2)), ("bottom", (2, 3, 0, 3))):
        flow = model(unrolled=2, padding=padding)
        left, right, top, bottom = pads
        whole = flow(*(F.pad(image, pads, mode="replicate") for image in (image1, image2)))
        assert whole.shape[2:] == (37 + top + bottom, 43 + left + right)
        torch.testing.assert_close(flow(image1, image2), whole[:, :, top : top + 37, left : left + 43])


def test_bytes_are_floats_times_255() -> None:
    flow = model(unrolled=2)
    whole = torch.randint(256, (2, 1, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flow(*whole), flow(*(whole / 255)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_of_another_precision_are_computed_in_that_of_the_weights(dtype: torch.dtype) -> None:
    flow = model(unrolled=2)
    pair = images(2, 1, 3, 32, 40).bfloat16()
    found, state = flow.estimate(*pair.to(dtype))
    assert found.dtype == torch.float32
    expected, _ = flow.estimate(*pair.float())
    torch.testing.assert_close(found, expected)
    start = zoo.FlowState(*(x.double() for x in state))
    torch.testing.assert_close(
        flow.estimate(*pair.float(), start=start)[0], flow.estimate(*pair.float(), start=state)[0]
    )


def test_features_can_be_normalised() -> None:
    features = model(normalize_features=True).features(images(2, 3, 40, 48))
    torch.testing.assert_close(features.mean(dim=(2, 3)), torch.zeros(2, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(features.var(dim=(2, 3), correction=0), torch.ones(2, 8), rtol=1e-2, atol=0)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    flow = model(contracting=True)
    image1, image2 = images(2, 3, 3, 32, 40)
    joint = flow(image1, image2)
    for b in range(3):
        torch.testing.assert_close(joint[b : b + 1], flow(image1[b : b + 1], image2[b : b + 1]), rtol=1e-4, atol=1e-4)


def test_a_trajectory_ends_with_the_equilibrium() -> None:
    flow = model(solver=FixedPointIteration(tol=1e-30, max_steps=4, norm="absolute"))
    pair = images(2, 1, 3, 32, 40)
    flows = flow(*pair, trajectory=Trajectory([1, 2], gradient=PhantomGradient(steps=1, advance=False)))
    assert len(flows) == 3
    flow.deq.unrolled = 1
    torch.testing.assert_close(flows[0], flow(*pair))
    flow.deq.unrolled = 2
    torch.testing.assert_close(flows[1], flow(*pair))


def test_the_flow_is_a_constant_to_the_cell_in_training_where_not_all_gradients_are_asked_for() -> None:
    found = {}
    for all_grad in (True, False):
        flow = model(all_grad=all_grad, unrolled=2).double()
        inputs = flow.injection(*torch.rand(3, 1, 8, 4, 4, dtype=torch.float64))
        for training in (True, False):
            z = tuple(x.requires_grad_() for x in flow.deq.cell.initial_state(*inputs))  # type: ignore[operator]
            h, v = flow.deq.cell.train(training)(z, *inputs)
            found[all_grad, training] = torch.autograd.grad((h.sum() + v.sum()), z[1], allow_unused=True)[0]
    assert found[False, True] is None
    for key in ((True, True), (True, False), (False, False)):
        assert found[key].abs().sum() > 0


def test_the_implicit_gradient_is_that_of_a_long_unrolled_solve() -> None:
    solver = FixedPointIteration(tol=1e-12, max_steps=200)
    flow = model(contracting=True, solver=solver, gradient=ImplicitGradient(solver)).double()
    pair = images(2, 1, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for gradient in (ImplicitGradient(solver), UnrolledGradient()):
        flow.deq.gradient = gradient
        gradients.append(torch.autograd.grad(flow(*pair).square().sum(), list(flow.parameters())))
    for implicit, unrolled in zip(*gradients, strict=True):
        torch.testing.assert_close(implicit, unrolled, rtol=1e-6, atol=1e-9)


def test_autocast_rounds_and_keeps_the_state_wide() -> None:
    flow = model(unrolled=3)
    pair = images(2, 1, 3, 32, 40)
    exact, _ = flow.estimate(*pair)
    with torch.autocast("cpu", torch.bfloat16):
        found, state = flow.estimate(*pair)
    assert state.flow.dtype == state.h.dtype == torch.float32
    torch.testing.assert_close(found.float(), exact, rtol=0.1, atol=0.1)
    assert not torch.equal(found.float(), exact)
    found.float().sum().backward()


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("image1", "image2", "message"),
    [
        (torch.rand(3, 32, 32), torch.rand(3, 32, 32), r"given: shape \(3, 32, 32\). Of one image .*unsqueeze"),
        (torch.rand(1, 1, 32, 32), torch.rand(1, 1, 32, 32), r"of grey ones .* image.expand\(-1, 3, -1, -1\)"),
        (torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 40), r"the same shape and dtype; given: \(1, 3, 32, 32\)"),
        (torch.rand(1, 3, 32, 32), torch.rand(2, 3, 32, 32), "the same shape and dtype"),
        (torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32).double(), "of torch.float32 and .* of torch.float64"),
        (torch.ones(1, 3, 32, 32).long(), torch.ones(1, 3, 32, 32).long(), r"or uint8 ones; given: torch.int64"),
        (torch.rand(1, 3, 0, 32), torch.rand(1, 3, 0, 32), "at least one pixel"),
        (
            torch.rand(1, 3, 8, 8) * 255,
            torch.rand(1, 3, 8, 8) * 255,
            r"in \[0, 1\]; given: values up to .* image / 255",
        ),
        ("a.png", "b.png", "given: str"),
    ],
)
def test_wrong_images_are_refused(image1: Any, image2: Any, message: str) -> None:
    with pytest.raises(zoo.InputError, match=message):
        model()(image1, image2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, r"DEQFlow\(hidden=...\) takes an integer >= 1; given: 0"),
        ({"corr_levels": 1.5}, "corr_levels"),
        ({"motion_width": 2}, "integer >= 3, two channels of which are the flow itself; given: 2"),
        ({"encoder_widths": (8, 8)}, r"encoder_widths=...\) takes 4 integers >= 1; given: \(8, 8\)"),
        ({"encoder_widths": (8, 4, 4, 4)}, r"whose shortcut is the identity; given: \(8, 4, 4, 4\)"),
        ({"corr_widths": (8, 0)}, "takes 2 integers >= 1"),
        ({"padding": "left"}, "takes one of both, bottom; given: 'left'"),
        ({"all_grad": False, "gradient": ImplicitGradient()}, "leaves a part of the derivative of the cell out"),
    ],
)
def test_wrong_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DEQFlow(**{**SMALL, **arguments})
