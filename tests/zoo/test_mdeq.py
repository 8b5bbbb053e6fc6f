"""The multiscale models: equations, shapes, padding, starts, dropout, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import zoo
from zoo.implicit import Anderson, FixedPointIteration, ImplicitGradient, UnrolledGradient, one_draw
from zoo.mdeq import CLASSIFIERS, MDEQ, SEGMENTERS, GroupNorm, MDEQCell, MDEQSegmenter

SMALL: dict[str, Any] = {"channels": (8, 16), "in_channels": 2, "expansion": 2}


def classifier(**changes: Any) -> MDEQ:
    torch.manual_seed(0)
    return MDEQ(**{**SMALL, "head_widths": (2, 3), "final_width": 6, "num_classes": 5, **changes})


def segmenter(**changes: Any) -> MDEQSegmenter:
    torch.manual_seed(0)
    return MDEQSegmenter(**{**SMALL, "num_classes": 5, "stem_stride": 1, "unrolled": 2, **changes})


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def state(cell: MDEQCell, B: int, H: int, W: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    sizes = [(B, C, H >> i, W >> i) for i, C in enumerate(cell.channels)]
    return tuple(torch.randn(size, generator=generator, dtype=dtype) for size in sizes)


# ---------------------------------------------------------------------------------------------------------------- cell


def test_the_cell_is_its_equation() -> None:
    """f written out for two branches, from torch's functions and the cell's parameters."""
    F = torch.nn.functional
    cell = MDEQCell((8, 16), expansion=2, groups=4, post_affine=True, weight_norm=()).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    z, x = state(cell, 2, 4, 6), torch.randn(2, 8, 4, 6, dtype=torch.float64)

    def norm(t: Tensor, groups: int, layer: Any) -> Tensor:
        return F.group_norm(t, groups, layer.weight, layer.bias)

    def alone(i: int, x: Tensor | float) -> Tensor:
        b: Any = cell.branches[i]
        t = F.conv2d(norm(F.conv2d(z[i], b.conv1.weight, padding=1), 4, b.norm1).relu(), b.conv2.weight, padding=1) + x
        return norm((norm(t, 4, b.norm2) + z[i]).relu(), 4, b.norm3)

    fuse: Any = cell.fuse
    h0, h1 = alone(0, x), alone(1, 0.0)
    up = norm(F.conv2d(h1, fuse[0][1][0].weight), 4, fuse[0][1][1]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    down = norm(F.conv2d(h0, fuse[1][0][0].weight, stride=2, padding=1), 4, fuse[1][0][1])
    expected = [
        norm(F.conv2d(y.relu(), post[1].weight), 2, post[2])
        for y, post in zip((h0 + up, down + h1), cell.post, strict=True)  # type: ignore[index, union-attr]
    ]
    for f_i, e_i in zip(cell(z, x), expected, strict=True):
        torch.testing.assert_close(f_i, e_i, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_any_number_of_branches(n: int) -> None:
    cell = MDEQCell((8,) * n, expansion=1, weight_norm=("branches", "fuse", "post")).double()
    z = state(cell, 2, 8, 16)
    out = cell(z, torch.zeros(2, 8, 8, 16, dtype=torch.float64))
    assert [f_i.shape for f_i in out] == [z_i.shape for z_i in z]


def test_the_start_is_zero_in_the_dtype_of_the_weights() -> None:
    start = MDEQCell((8, 16)).double().initial_state(torch.zeros(3, 8, 4, 6))
    assert [tuple(z_i.shape) for z_i in start] == [(3, 8, 4, 6), (3, 16, 2, 3)]
    assert all(z_i.dtype == torch.float64 and not z_i.any() for z_i in start)


def test_the_weights_are_normalised_where_asked() -> None:
    parts = {part: MDEQCell((8, 8), expansion=1, weight_norm=(part,)) for part in ("branches", "fuse", "post")}
    for part, cell in parts.items():
        for name, module in cell.named_modules():
            if isinstance(module, nn.Conv2d):
                assert parametrize.is_parametrized(module) == name.startswith(part)


def test_weights_are_computed_once_a_solve() -> None:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model = classifier(solver=FixedPointIteration(max_steps=7), gradient=ImplicitGradient()).eval()
    model.deq.on_failure = "ignore"
    conv: Any = model.deq.cell.branches[0].conv1
    conv.parametrizations.weight[0].register_forward_hook(count)
    with torch.no_grad():
        model(images(2, 2, 8, 8))
    assert model.deq.report is not None
    assert model.deq.report.evaluations > 3
    assert calls == 1


def test_a_channel_stays_dropped_for_a_whole_solve() -> None:
    cell = MDEQCell((8, 8), expansion=1, dropout=0.5).double().train()
    z, x = state(cell, 2, 4, 4), torch.zeros(2, 8, 4, 4, dtype=torch.float64)
    with one_draw():
        a, b = cell(z, x), cell(z, x)
    c = cell(z, x)
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a[0], c[0])
    cell.eval()
    assert all(map(torch.equal, cell(z, x), cell(z, x)))


# ------------------------------------------------------------------------------------------------------------- models


@settings(max_examples=12, deadline=None)
@given(
    B=st.integers(1, 3),
    H=st.integers(4, 11),
    W=st.integers(4, 11),
    stride=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(B=1, H=4, W=4, stride=2, dtype=torch.float32)  # one pixel in branch 1, and one channel a group
def test_any_size_of_image(B: int, H: int, W: int, stride: int, dtype: torch.dtype) -> None:
    x = images(B, 2, H, W, dtype=dtype)
    logits = classifier(stem_stride=stride, unrolled=2).to(dtype).eval()(x)
    maps = segmenter(stem_stride=stride).to(dtype).eval()(x)
    assert (logits.shape, logits.dtype) == ((B, 5), dtype)
    assert (maps.shape, maps.dtype) == ((B, 5, H, W), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_group_of_one_value_becomes_its_bias_whatever_the_batch(dtype: torch.dtype) -> None:
    norm, torchs = GroupNorm(8, 8).to(dtype), nn.GroupNorm(8, 8).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(8))
    torchs.load_state_dict(norm.state_dict())
    x = images(2, 8, 1, 1, dtype=dtype).requires_grad_()
    torch.testing.assert_close(norm(x[:1]), torchs(x)[:1], rtol=0, atol=0)
    close = {"rtol": 0, "atol": 1e-2 if dtype == torch.bfloat16 else 1e-3}
    torch.testing.assert_close(norm(x[:1]), norm.bias.view(1, 8, 1, 1), **close)
    norm(x[:1]).sum().backward()
    assert not x.grad.any()  # type: ignore[union-attr]
    torch.testing.assert_close(norm(x[0].expand(3, 8, 4, 5)), torchs(x[0].expand(3, 8, 4, 5)), rtol=0, atol=0)


def test_padding_repeats_the_edge_and_is_cropped() -> None:
    model = segmenter(channels=(8, 8, 8)).eval()  # multiples of 4
    x = images(1, 2, 5, 8)
    padded = torch.cat([x, x[:, :, -1:].expand(-1, -1, 3, -1)], dim=2)
    torch.testing.assert_close(model(x), model(padded)[:, :, :5], rtol=0, atol=0)


def test_the_model_normalises() -> None:
    x = images(2, 2, 8, 8)
    mean, std = (0.2, 0.7), (0.5, 0.1)
    plain, model = classifier(unrolled=2).eval(), classifier(unrolled=2, mean=mean, std=std).eval()
    given = (x - torch.tensor(mean).view(1, 2, 1, 1)) / torch.tensor(std).view(1, 2, 1, 1)
    torch.testing.assert_close(model(x), plain(given))
    assert not torch.allclose(model(x), plain(x))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model = classifier(unrolled=4).double().eval()
    x = images(4, 2, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(x)[2:3], model(x[2:3]), rtol=1e-10, atol=1e-12)


def test_where_training_starts() -> None:
    """Un-normalised convolutions ~ N(0, 0.01^2), biases too; normalised ones as torch starts them, with g = ||v||."""
    torch.manual_seed(0)
    model = zoo.create_model("mdeq_tiny")
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if parametrize.is_parametrized(module):
            original: Any = module.parametrizations["weight"]
            g, v = original.original0, original.original1
            torch.testing.assert_close(g, torch.norm_except_dim(v, 2, 0))
            bound = v[0].numel() ** -0.5  # uniform in +- fan_in^-1/2
            assert 0.9 * bound < v.abs().max() <= bound
        else:
            assert 0.008 < module.weight.std() < 0.012
            assert module.bias is None or 0 < module.bias.std() < 0.02
    for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm | nn.BatchNorm2d) and m.affine):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()


def test_the_unrolled_model_is_the_baseline() -> None:
    model, x = classifier().double().eval(), images(2, 2, 8, 8, dtype=torch.float64)
    model.deq.unrolled = 3
    injection = model.stem(x)
    z = model.deq.cell.initial_state(injection)
    for _ in range(3):
        z = model.deq.cell(z, injection)
    torch.testing.assert_close(model(x), model.head(z))


def test_training_reaches_every_parameter() -> None:
    for model in (classifier(unrolled=3), segmenter(unrolled=3)):
        model(images(4, 2, 8, 8)).square().sum().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_implicit_gradient_is_that_of_many_unrolled_steps() -> None:
    """For a cell made contractive, like those of the parity data: large biases before its norms."""
    grads = []
    for gradient in (ImplicitGradient(Anderson(tol=1e-13, max_steps=200)), UnrolledGradient()):
        model = classifier(solver=FixedPointIteration(tol=1e-13, max_steps=300), gradient=gradient).double().eval()
        with torch.no_grad():
            for branch in model.deq.cell.branches:
                branch.norm2.bias.fill_(10.0)
                branch.norm3.weight.fill_(0.15)
                branch.norm3.bias.fill_(10.0)
        model(images(3, 2, 8, 8, dtype=torch.float64)).square().sum().backward()
        assert model.deq.report is not None
        assert model.deq.report.converged.all()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-7, atol=1e-12)


def test_all_sizes_are_registered() -> None:
    assert set(zoo.list_models("mdeq*")) == {*CLASSIFIERS, *SEGMENTERS}
    for name in ("mdeq_tiny", "mdeq_small_imagenet", "mdeq_xl_cityscapes"):
        with torch.device("meta"):
            model = zoo.create_model(name)
        assert zoo.spec_of(model).model == name


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        (torch.zeros(1, 3, 8, 8), ["(B, 2, H, W)", "in_channels", "(1, 3, 8, 8)"]),
        (torch.zeros(2, 8, 8), ["(B, 2, H, W)", "(2, 8, 8)"]),
        (torch.zeros(1, 2, 8, 8, dtype=torch.uint8), ["torch.uint8", "image.float() / 255"]),
        (torch.zeros(1, 2, 8, 3), ["at least 4 x 4", "8 x 3", "stem_stride"]),
    ],
)
def test_images_that_do_not_fit(image: Tensor, parts: list[str]) -> None:
    for model in (classifier(stem_stride=2), segmenter(stem_stride=2)):
        with pytest.raises(zoo.InputError) as error:
            model(image)
        assert all(part in str(error.value) for part in [type(model).__name__, *parts]), error.value


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"channels": (8, 12)}, ["channels", "multiple of groups=8", "(8, 12)"]),
        ({"channels": ()}, ["channels", "()"]),
        ({"groups": 3}, ["groups", "even", "3"]),
        ({"stem_stride": 3}, ["stem_stride", "1, 2 or 4", "3"]),
        ({"in_channels": 0}, ["in_channels", ">= 1", "0"]),
        ({"expansion": 1.5}, ["expansion", "1.5"]),
        ({"weight_norm": ("branch",)}, ["weight_norm", "branches, fuse, post", "branch"]),
        ({"weight_norm": "branches"}, ["weight_norm", "list"]),
        ({"mean": (0.1, 0.2, 0.3)}, ["mean", "2 channels", "(0.1, 0.2, 0.3)"]),
        ({"std": 0}, ["std", "> 0"]),
        ({"num_classes": 0}, ["num_classes", "0"]),
        ({"dropout": 2.0}, ["[0, 1]", "2.0"]),
        ({"unrolled": 0}, ["unrolled", "0"]),
    ],
)
def test_sizes_that_make_no_sense(changes: dict[str, Any], parts: list[str]) -> None:
    for make in (classifier, segmenter):
        if make is classifier and "channels" in changes and len(changes["channels"]) != 2:
            continue
        with pytest.raises(ValueError, match=r"\S") as error:
            make(**changes)
        assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("momentum", [0.0, -1.0, 1.5])
def test_a_momentum_out_of_range(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"bn_momentum.*\(0, 1\].*{momentum}"):
        segmenter(bn_momentum=momentum)


def test_one_head_width_a_branch() -> None:
    with pytest.raises(ValueError, match=r"head_widths, as many as channels.*\(2,\)"):
        classifier(head_widths=(2,))
