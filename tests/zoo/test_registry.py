"""Names of models: listing, making by name, refusing with a hint, and the spec that makes the same model again."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import nn

import zoo
from zoo import registry
from zoo.implicit import Anderson, ImplicitGradient, Newton, PhantomGradient, UnrolledGradient


class Toy(nn.Module):
    """A constructor with one argument of each kind."""

    def __init__(
        self,
        size: int = 2,
        scale: float = 1.0,
        label: str | None = None,
        mode: Literal["a", "b"] = "a",
        sizes: tuple[int, ...] = (),
        untyped=None,
    ) -> None:
        super().__init__()
        self.given = (size, scale, label, mode, sizes, untyped)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    zoo.register_model("toy_base", Toy)
    zoo.register_model("toy_large", Toy, size=5, label="large")


def test_every_family_is_listed() -> None:
    families = [name for family in ("deq_*", "mdeq*", "stacked*") for name in zoo.list_models(family)]
    assert zoo.list_models() == sorted([*families, "resnet", "tanh_deq"])
    assert zoo.list_models("tanh*") == ["tanh_deq"]
    assert {"mdeq", "mdeq_tiny", "mdeq_xl_cityscapes"} < set(zoo.list_models("mdeq*"))
    assert zoo.list_models("raft*") == []
    assert zoo.list_models("*nano*", zoo.DEQTransformer) == ["deq_transformer_nano"]


@pytest.mark.usefixtures("toys")
def test_lists_are_sorted_and_filtered() -> None:
    assert zoo.list_models("t*") == ["tanh_deq", "toy_base", "toy_large"]
    assert zoo.list_models("*y_b*") == ["toy_base"]
    assert zoo.list_models("toy_?????") == ["toy_large"]


@pytest.mark.usefixtures("toys")
def test_a_name_has_its_preset_and_what_is_given_beats_it() -> None:
    assert zoo.create_model("toy_base").given == (2, 1.0, None, "a", (), None)
    assert zoo.create_model("toy_large").given == (5, 1.0, "large", "a", (), None)
    assert zoo.create_model("toy_large", size=7).given == (7, 1.0, "large", "a", (), None)
    assert zoo.spec_of(zoo.create_model("toy_large", size=7)).arguments == {"size": 7, "label": "large"}


@pytest.mark.usefixtures("toys")
def test_a_function_is_a_builder_too() -> None:
    def build(depth: int = 1) -> nn.Module:
        return nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))

    zoo.register_model("toy_stack", build)
    model = zoo.create_model("toy_stack", depth=3)
    assert len(model) == 3
    assert zoo.spec_of(model) == zoo.ModelSpec("toy_stack", {"depth": 3})
    with pytest.raises(TypeError, match=r"argument 'depth' of model 'toy_stack' takes int; given: '3' \(str\)"):
        zoo.create_model("toy_stack", depth="3")


@pytest.mark.usefixtures("toys")
def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"a model named 'toy_base' is registered already, by Toy"):
        zoo.register_model("toy_base", Toy)


# --------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tanh_dec", {}, "unknown model 'tanh_dec'. Did you mean 'tanh_deq'? zoo.list_models() lists all "),
        ("perceptron", {}, "unknown model 'perceptron'. zoo.list_models() lists all "),
        ("tanh_deq", {"widht": 3}, "model 'tanh_deq' has no argument 'widht'. Did you mean 'width'? Known: in"),
        ("tanh_deq", {"solver": "Andersn"}, "unknown solver 'Andersn'. Did you mean 'Anderson'?"),
        ("tanh_deq", {"gradient": "Newton"}, "unknown gradient 'Newton'. Known: ImplicitGradient,"),
        (
            "tanh_deq",
            {"solver": {"class_path": "Anderson", "init_args": {"tool": 1}}},
            "Anderson has no argument 'tool'. Did you mean 'tol'?",
        ),
    ],
)
def test_unknown_names(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        zoo.create_model(name, **arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": "8"}, "argument 'width' of model 'tanh_deq' takes int; given: '8' (str)"),
        ({"width": 8.0}, "argument 'width' of model 'tanh_deq' takes int; given: 8.0 (float)"),
        ({"width": True}, "argument 'width' of model 'tanh_deq' takes int; given: True (bool)"),
        ({"width": None}, "argument 'width' of model 'tanh_deq' takes int; given: None (NoneType)"),
        ({"mean": "0"}, "argument 'mean' of model 'tanh_deq' takes float; given: '0' (str)"),
        ({"mean": False}, "argument 'mean' of model 'tanh_deq' takes float; given: False (bool)"),
        ({"contraction": "0.9"}, "argument 'contraction' of model 'tanh_deq' takes float or None; given: '0.9' (str)"),
        ({"solver": 3}, "a solver is described by a name or a mapping; given: 3"),
    ],
)
def test_wrong_types(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as error:
        zoo.create_model("tanh_deq", **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 24}, "'channels' of model 'mdeq_tiny' takes a list of int; given: 24 (int)"),
        ({"channels": None}, "'channels' of model 'mdeq_tiny' takes a list of int; given: None (NoneType)"),
        ({"channels": (8, 1.5)}, "'channels' of model 'mdeq_tiny' takes a list of int; given: (8, 1.5) (tuple)"),
        ({"weight_norm": "fuse"}, "'weight_norm' of model 'mdeq_tiny' takes a list of str; given: 'fuse' (str)"),
        ({"mean": "a"}, "'mean' of model 'mdeq_tiny' takes float or a list of float; given: 'a' (str)"),
        ({"mean": [0.1, "b"]}, "'mean' of model 'mdeq_tiny' takes float or a list of float; given: [0.1, 'b'] (list)"),
    ],
)
def test_wrong_types_in_lists(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as error:
        zoo.create_model("mdeq_tiny", **arguments)
    assert str(error.value) == f"argument {message}"


@pytest.mark.usefixtures("toys")
def test_right_types() -> None:
    for name, value in [
        ("scale", 2),  # a whole number is a number
        ("label", None),
        ("mode", "c"),  # the constructor's business, like all that is no plain type
        ("sizes", [1, 2]),
        ("untyped", object()),
    ]:
        assert value in zoo.create_model("toy_base", **{name: value}).given


# ------------------------------------------------------------------------------------------------------------- specs


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"width": 8, "num_classes": 3, "contraction": 0.5, "mean": 0.1, "std": 2},
        {"width": 8, "solver": Newton(tol=1e-3), "gradient": ImplicitGradient(Anderson(memory=4))},
        {"width": 8, "solver": "Newton", "gradient": {"class_path": "PhantomGradient", "init_args": {"steps": 3}}},
        {"width": 8, "solver": None, "gradient": UnrolledGradient()},
    ],
    ids=str,
)
def test_a_spec_makes_the_model_again(arguments: dict[str, Any]) -> None:
    model = zoo.create_model("tanh_deq", **arguments)
    spec = zoo.spec_of(model)
    again = zoo.create_model(spec.model, **spec.arguments)
    assert zoo.spec_of(again) == spec
    assert (again.deq.solver, again.deq.gradient) == (model.deq.solver, model.deq.gradient)
    assert (again.mean, again.std) == (model.mean, model.std)
    again.load_state_dict(model.state_dict())
    x = torch.rand(3, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_a_spec_is_plain_data() -> None:
    model = zoo.create_model("tanh_deq", solver=Newton(tol=1e-3), gradient=PhantomGradient(steps=2))
    assert zoo.spec_of(model) == zoo.ModelSpec(
        "tanh_deq",
        {
            "solver": {
                "class_path": "zoo.implicit.Newton",
                "init_args": {
                    "tol": 1e-3,
                    "norm": "relative",
                    "max_steps": 50,
                    "compact": False,
                    "bfloat16_until": None,
                },
            },
            "gradient": {
                "class_path": "zoo.implicit.PhantomGradient",
                "init_args": {"steps": 2, "damping": 1.0, "advance": False},
            },
        },
    )


def test_a_model_made_by_hand_has_no_spec() -> None:
    with pytest.raises(ValueError, match=r"this TanhDEQ was not made by zoo.create_model or zoo.load_pretrained"):
        zoo.spec_of(zoo.TanhDEQ())


def test_random_weights_are_random_and_seeded() -> None:
    torch.manual_seed(3)
    first, second = (zoo.create_model("tanh_deq", width=4) for _ in range(2))
    torch.manual_seed(3)
    third = zoo.create_model("tanh_deq", width=4)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert torch.equal(first.classifier.weight, third.classifier.weight)
    assert first.training


def test_the_builder_of_a_name() -> None:
    assert registry.builder_of("mdeq_nano") is zoo.MDEQ
    with pytest.raises(ValueError, match=r"unknown model 'mdeq_nan'. Did you mean 'mdeq_nano'"):
        registry.builder_of("mdeq_nan")
