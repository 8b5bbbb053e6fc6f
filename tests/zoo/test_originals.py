"""Published checkpoints: every format loads, every key lands in its place, and nothing else does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import zoo
from tests.command_line import same
from tests.zoo.parity import MANIFESTS as MANIFESTS_FOLDER
from tests.zoo.parity import manifest
from zoo.implicit import Anderson, PhantomGradient
from zoo.mdeq import CLASSIFIERS, SEGMENTERS
from zoo.originals.mdeq import original_name

State = dict[str, Tensor]

SMALL: dict[str, Any] = {"channels": (8, 16), "head_widths": (3, 4), "final_width": 6, "num_classes": 5}
POSTED: dict[str, Any] = {**SMALL, "post_affine": True, "expansion": 2}


def published(model: nn.Module, copies: bool = False) -> State:
    """A model's weights as locuslab/deq stores them, or, with the copies of the cell, as locuslab/mdeq does."""
    segmenter = isinstance(model, zoo.MDEQSegmenter)
    state = {original_name(key, segmenter=segmenter): value for key, value in model.state_dict().items()}
    return with_copies(state) if copies else state


def with_copies(state: State) -> State:
    """``state`` and what locuslab/mdeq stores besides: the cell again, and twice with products in place of factors."""
    cell = {key.removeprefix("fullstage."): value for key, value in state.items() if key.startswith("fullstage.")}
    plain = {
        key.replace("weight_v", "weight"): value + 0.1  # one update late
        for key, value in cell.items()
        if not key.endswith("weight_g")
    }
    named = {"fullstage_copy.": plain, "deq.func.": cell, "deq.func_copy.": plain}
    return {**state, **{prefix + key: value for prefix, part in named.items() for key, value in part.items()}}


def random_model(name: str = "mdeq", **arguments: Any) -> nn.Module:
    """A model all of whose tensors are random, the running statistics of BatchNorm too."""
    model = zoo.create_model(name, **arguments)
    for key, value in model.state_dict().items():
        value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else torch.tensor(len(key)))
    return model


# ------------------------------------------------------------------------------------------------------ what is read


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_sizes_are_read_off_the_shapes(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    widths = st.lists(st.integers(1, 5), min_size=n, max_size=n)
    arguments: dict[str, Any] = {
        "channels": tuple(8 * width for width in data.draw(widths)),
        "in_channels": data.draw(st.integers(1, 4)),
        "expansion": data.draw(st.integers(1, 3)),
        "num_classes": data.draw(st.integers(1, 5)),
        "post_affine": data.draw(st.booleans()),
        "weight_norm": tuple(
            part for part in ("branches", "fuse", "post") if (part != "fuse" or n > 1) and data.draw(st.booleans())
        ),
    }
    stride = {"stem_stride": data.draw(st.sampled_from([1, 2, 4]))}
    name = data.draw(st.sampled_from(["mdeq", "mdeq_segmenter"]))
    if name == "mdeq":
        arguments |= {"head_widths": tuple(data.draw(widths)), "final_width": data.draw(st.integers(1, 9))}
    model = random_model(name, **arguments, **stride)
    loaded = zoo.load_original(published(model, copies=data.draw(st.booleans())), **stride)
    assert zoo.spec_of(loaded) == zoo.ModelSpec(name, {**arguments, **stride})
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


# Where two models have the same sizes, the name is the first one's.
MANIFESTS = {
    "deq_mdeq_cifar10_cls_TINY": "mdeq_tiny",
    "deq_mdeq_cifar10_cls_LARGE": "mdeq_large",
    "deq_mdeq_cifar10_cls_LARGE_reg": "mdeq_large",
    "deq_mdeq_imagenet_cls_SMALL": "mdeq_small_imagenet",
    "deq_mdeq_imagenet_cls_SMALL_reg": "mdeq_small_reg_imagenet",
    "deq_mdeq_imagenet_cls_LARGE": "mdeq_large_imagenet",
    "deq_mdeq_imagenet_cls_LARGE_reg": "mdeq_large_reg_imagenet",
    "deq_mdeq_imagenet_cls_XL": "mdeq_xl_imagenet",
    "deq_mdeq_cityscapes_seg_SMALL": "mdeq_small_cityscapes",
    "deq_mdeq_cityscapes_seg_LARGE": "mdeq_large_cityscapes",
    "deq_mdeq_cityscapes_seg_XL": "mdeq_xl_cityscapes",
    "mdeqv1_cifar10_cls_TINY": "mdeq_tiny",
    "mdeqv1_cifar10_cls_LARGE": "mdeq_large",
    "mdeqv1_imagenet_cls_SMALL": "mdeq_small_imagenet",
    "mdeqv1_imagenet_cls_LARGE": "mdeq_xl_imagenet",
    "mdeqv1_imagenet_cls_XL": "mdeq_xl_imagenet",
    "mdeqv1_cityscapes_seg_SMALL": "mdeq_small_cityscapes",
    "mdeqv1_cityscapes_seg_LARGE": "mdeq_large_cityscapes",
    "mdeqv1_cityscapes_seg_XL": "mdeq_xl_cityscapes",
    "torchdeq_mdeq_cifar_small": "mdeq_tiny",
    "torchdeq_mdeq_cifar_large": "mdeq_large",
    "torchdeq_mdeq_imagenet": "mdeq_small_imagenet",
}
COPIES = ("fullstage_copy.", "deq.func.", "deq.func_copy.", "loss.criterion.")


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_manifest(name: str) -> None:
    """A tensor filled with its own number under every key: all numbers but the copies' are found, each once."""
    listed = manifest(name)
    state: State = {}
    for number, (key, entry) in enumerate(listed["state_dict"].items()):
        source = key.replace("deq.func.", "fullstage.").replace("deq.func_copy.", "fullstage_copy.")
        value = torch.tensor(number, dtype=getattr(torch, entry["dtype"])).expand(entry["shape"])
        state[key] = state[source] if source != key else value
    model = zoo.load_original(state)
    assert zoo.spec_of(model).model == MANIFESTS[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == listed["n_params"]
    kept = {key: value for key, value in state.items() if not any(copy in key for copy in COPIES)}
    landed = {}
    for value in model.state_dict().values():
        number = value.reshape(-1)[0]
        assert bool((value == number).all())
        assert value.is_contiguous()
        landed[int(number)] = value.shape
    assert landed == {int(value.reshape(-1)[0]): value.shape for value in kept.values()}
    assert len(model.state_dict()) == len(kept)


def test_the_manifests_are_all_that_there_are() -> None:
    manifest("deq_mdeq_cifar10_cls_TINY")  # or skip
    assert {file.stem for file in MANIFESTS_FOLDER.glob("*mdeq*.json")} == set(MANIFESTS)


# By reference/architectures.md, section 4, and the manifests.
PARAMETERS = {
    "mdeq_tiny": 158_890,
    "mdeq_large": 11_097_438,
    "mdeq_large_reg": 11_097_438,
    "mdeq_small_imagenet": 16_808_936,
    "mdeq_small_reg_imagenet": 18_613_496,
    "mdeq_large_imagenet": 67_063_624,
    "mdeq_large_reg_imagenet": 67_061_224,
    "mdeq_xl_imagenet": 90_463_280,
    "mdeq_small_cityscapes": 8_968_467,
    "mdeq_large_cityscapes": 55_955_859,
    "mdeq_xl_cityscapes": 79_551_755,
}


def test_every_published_size_is_counted() -> None:
    of_the_zoo = {"mdeq", "mdeq_segmenter", "mdeq_nano", "mdeq_nano_scenes"}
    assert {*CLASSIFIERS, *SEGMENTERS} - of_the_zoo == set(PARAMETERS)
    assert set(MANIFESTS.values()) == set(PARAMETERS) - {"mdeq_large_reg"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = zoo.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_a_registered_size_brings_what_no_shape_tells() -> None:
    loaded = zoo.load_original(published(random_model("mdeq_tiny", num_classes=3, post_affine=True)))
    spec = zoo.spec_of(loaded)
    tiny = CLASSIFIERS["mdeq_tiny"]
    assert spec.model == "mdeq_tiny"
    assert {key: spec.arguments[key] for key in ("mean", "std", "dropout", "stem_stride")} == {
        key: tiny[key] for key in ("mean", "std", "dropout", "stem_stride")
    }
    assert (spec.arguments["num_classes"], spec.arguments["post_affine"]) == (3, True)


# ------------------------------------------------------------------------------------------------- wrappers and copies


def ddp(state: State) -> State:
    return {f"module.{key}": value for key, value in state.items()}


def with_loss(state: State) -> State:
    return {**{f"model.{key}": value for key, value in state.items()}, "loss.criterion.weight": torch.ones(5)}


def training(state: State) -> dict[str, Any]:
    return {"epoch": 3, "state_dict": state, "best_acc1": torch.tensor(0.5), "optimizer": {"state": {}}}


def of_torchdeq(state: State) -> State:
    return {key.replace("fullstage.", "full_stage."): value for key, value in state.items()}


WRAPPERS: dict[str, Callable[[State], dict[str, Any]]] = {
    "bare": lambda state: state,
    "ddp": ddp,
    "training": training,
    "training, ddp": lambda state: training(ddp(state)),
    "with loss": with_loss,
    "ddp, with loss": lambda state: ddp(with_loss(state)),
    "copies": with_copies,
    "copies, with loss": lambda state: with_loss(with_copies(state)),
    "torchdeq": lambda state: training(ddp(of_torchdeq(state))),
    "torchdeq, bare": of_torchdeq,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_wrapper(wrapper: str) -> None:
    model = random_model(**POSTED)
    given = WRAPPERS[wrapper](published(model))
    names = list(given)
    assert same(dict(zoo.load_original(given).state_dict()), dict(model.state_dict()))
    assert list(given) == names


@pytest.mark.parametrize("file", ["a.pkl", "a.pth.tar", "old.pth", "a.safetensors"])
def test_every_file(file: str, tmp_path: Path) -> None:
    model = random_model(**POSTED)
    state = {key: value.clone() for key, value in with_copies(published(model)).items()}
    path = tmp_path / file
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=file != "old.pth")
    for source in (path, str(path)):
        assert same(dict(zoo.load_original(source).state_dict()), dict(model.state_dict()))


def test_the_model_has_its_own_memory_and_precision() -> None:
    state = {key: value.clone() for key, value in published(random_model(**SMALL)).items()}
    state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    before = {key: value.clone() for key, value in state.items()}
    loaded = zoo.load_original(state)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32, torch.int64}
    for value in loaded.state_dict().values():
        value.add_(1)
    assert same(state, before)


def test_weight_norm_is_a_way_to_store_the_same_function() -> None:
    """Plain weights, those of branches and post-fusion normalised (locuslab), or all (torchdeq): one function."""
    plain = published(zoo.create_model("mdeq", **{**SMALL, "weight_norm": ()}))
    x, z = torch.rand(2, 8, 4, 6).double(), (torch.rand(2, 8, 4, 6).double(), torch.rand(2, 16, 2, 3).double())
    outputs = []
    for stages in (
        (),
        ("branches",),
        ("branches", "post_fuse_layers"),
        ("branches", "fuse_layers", "post_fuse_layers"),
    ):
        state = dict(plain)
        for key in plain:
            if key.startswith(tuple(f"fullstage.{stage}." for stage in stages)) and plain[key].dim() == 4:
                W = state.pop(key)
                state[f"{key}_g"] = torch.linalg.vector_norm(W, dim=(1, 2, 3), keepdim=True)
                state[f"{key}_v"] = W * (1 + torch.rand(len(W), 1, 1, 1))
        cell = zoo.load_original(state).double().deq.cell
        outputs.append(cell(z, x))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_arguments_of_the_model() -> None:
    state = published(random_model(**{**SMALL, "stem_stride": 2}))
    solver, gradient = Anderson(tol=1e-3), PhantomGradient(steps=2)
    loaded = zoo.load_original(state, stem_stride=2, solver=solver, gradient=gradient, mean=0.5, dropout=0.1, groups=4)
    assert (loaded.deq.solver, loaded.deq.gradient, loaded.mean, loaded.multiple) == (solver, gradient, (0.5,), 4)
    assert (loaded.deq.cell.branches[0].dropout.p, loaded.deq.cell.branches[0].norm1.num_groups) == (0.1, 4)
    assert zoo.spec_of(zoo.load_original(state, stem_stride=4, channels=[8, 16])).arguments["channels"] == [8, 16]
    with pytest.raises(ValueError, match=r"model 'mdeq' has no argument 'sovler'\. Did you mean 'solver'"):
        zoo.load_original(state, stem_stride=2, sovler=solver)
    with pytest.raises(TypeError, match="argument 'dropout' of model 'mdeq' takes float; given: 'a'"):
        zoo.load_original(state, stem_stride=2, dropout="a")


@pytest.mark.parametrize(
    "override",
    [
        {"num_classes": 7},
        {"channels": (8, 8)},
        {"expansion": 3},
        {"post_affine": True},
        {"weight_norm": ()},
        {"stem_stride": 2},  # with a 1x1 convolution that the checkpoint does not have
    ],
    ids=str,
)
def test_overrides_that_change_shapes(override: dict[str, Any]) -> None:
    state = published(random_model(**SMALL))
    (key, value) = next(iter(override.items()))
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        zoo.load_original(state, **override)
    assert str(error.value).startswith(f"the given mapping does not fit a model with {key}={value!r}: in it ")
    assert "Read off it are channels=(8, 16), in_channels=3, expansion=5, post_affine=False" in str(error.value)


@pytest.mark.parametrize("arguments", [{"stem_stride": 4}, {"channels": (8, 8, 8), "head_widths": (3, 3, 3)}], ids=str)
def test_the_stride_of_the_stem_has_to_be_said(arguments: dict[str, Any]) -> None:
    state = published(random_model(**{**SMALL, **arguments}))
    with pytest.raises(ValueError, match=r"the given mapping has the sizes of no registered model.* stem_stride=1, 2"):
        zoo.load_original(state)
    stem_stride = arguments.get("stem_stride", 1)
    assert zoo.load_original(state, stem_stride=stem_stride).stem_stride == stem_stride


# ------------------------------------------------------------------------------------------------------------ saving


def test_what_was_loaded_is_saved_as_the_zoo_s_own(weights_folder: Path) -> None:
    model = zoo.load_original(published(random_model(**POSTED), copies=True), mean=0.3, solver=Anderson(tol=1e-3))
    path = weights_folder / "mdeq.original.safetensors"
    spec = zoo.save_weights(model, path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["deq_zoo"])
    assert len(header.pop("digest")) == 64
    zoo.records.save_record(
        zoo.WeightsRecord(
            name="mdeq.original",
            source="shipped",
            sha256=zoo.weight_files.sha256_of(path.read_bytes()),
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            trained_on="nothing",
            recipe="none",
            metrics={},
            licence="MIT",
            preprocessing="images (B, 3, H, W) in [0, 1]",
            **header,
        )
    )
    again = zoo.load_pretrained("mdeq.original")
    assert (spec.model, header["model"], zoo.spec_of(again).model) == ("mdeq",) * 3
    assert again.deq.solver == model.deq.solver == Anderson(tol=1e-3)
    x = torch.rand(2, 3, 8, 8)
    assert same(again(x), model(x))


# ---------------------------------------------------------------------------------------------------------- refusals


def refusal(source: Any, **overrides: Any) -> str:
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_original(source, **overrides)
    return str(error.value)


FC = "fullstage.branches.0.blocks.0.conv1.weight_v"


def test_unknown_keys() -> None:
    state = published(random_model(**SMALL))
    extra = {"fullstage.branches.0.blocks.0.gn4.bias": torch.ones(3), "zzz": torch.ones(1)}
    assert refusal({**state, **extra}) == (
        "the given mapping is no complete checkpoint of an MDEQ model: in it 2 keys are unknown: "
        "'fullstage.branches.0.blocks.0.gn4.bias' (near 'fullstage.branches.0.blocks.0.gn3.bias'), 'zzz'"
    )
    many = {f"{FC}{k}": torch.ones(1) for k in range(9)}
    message = refusal({**state, **many})
    assert "in it 9 keys are unknown: " in message
    assert message.count(f"near {FC!r}") == 3
    assert message.endswith("and 6 more")


@pytest.mark.parametrize("part", ["downsample.1.running_mean", FC, "classifier.bias", "post_fuse_layers.1", "incre_"])
def test_missing_keys(part: str) -> None:
    state = {key: value for key, value in published(random_model(**SMALL)).items() if part not in key}
    message = refusal(state)
    assert message.startswith("the given mapping is no complete checkpoint of an MDEQ model: ")
    assert "missing" in message
    assert part in message


def test_a_stage_that_is_half_normalised() -> None:
    state = published(random_model(**SMALL))
    state[FC.removesuffix("_v")] = state.pop(FC)
    del state[FC.replace("_v", "_g")]
    message = refusal(state)
    assert "1 key is unknown: 'fullstage.branches.0.blocks.0.conv1.weight'" in message
    assert f"2 keys are missing: {FC.replace('_v', '_g')!r}, {FC!r}" in message


def test_wrong_shapes_and_kinds() -> None:
    state = published(random_model(**SMALL))
    assert refusal({**state, "downsample.4.bias": torch.ones(9)}).endswith(
        "in it 1 key has another shape or kind: 'downsample.4.bias' is float32 (9,) and should be float32 (8,)"
    )
    assert refusal({**state, "downsample.4.bias": torch.ones(8, dtype=torch.int8)}).endswith(
        "in it 1 key has another shape or kind: 'downsample.4.bias' is int8 (8,) and should be float32 (8,)"
    )
    assert "has shape (3,) for classifier.weight" in refusal({**state, "classifier.weight": torch.ones(3)})
    assert "has sizes that no MDEQ model has: MDEQ(channels=...) takes" in refusal(
        {**state, FC: torch.ones(40, 9, 3, 3)}
    )


def test_copies_that_differ() -> None:
    state = published(random_model(**SMALL), copies=True)
    alias = FC.replace("fullstage", "deq.func")
    assert refusal({**state, alias: state[alias] + 1}).startswith(
        f"the given mapping has two different values for one weight: {alias} and {FC}; nothing was loaded"
    )
    copy = "deq.func_copy.branches.0.blocks.0.gn1.bias"
    source = copy.replace("deq.func_copy", "fullstage_copy")
    assert f"{copy} and {source}" in refusal({**state, copy: state[copy] + 1})
    reshaped = {**state, copy: torch.ones(2), source: torch.ones(2)}
    assert f"has shape (2,) for {source}, and (40,) for that of fullstage" in refusal(reshaped)
    del state[alias]
    assert refusal(state) == (
        "the given mapping has a copy of fullstage.* in deq.func.* that is not complete: 1 names are in one of them "
        "only, like 'branches.0.blocks.0.conv1.weight_v'"
    )


def test_two_prefixes_for_one_key() -> None:
    state = published(random_model(**SMALL))
    assert refusal({**state, f"module.{FC}": state[FC]}).startswith(f"the given mapping has two tensors for {FC!r}")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the given mapping is empty: it has no weights"),
        ({"state_dict": {}}, "the given mapping is empty: it has no weights"),
        (
            {"state_dict": [1]},
            "the given mapping holds no state dict, that is a mapping of names to tensors, by itself",
        ),
        ({"epoch": 3}, "the given mapping is no state dict, that is a mapping of names to tensors, and has none under"),
        ({3: torch.ones(1)}, "the given mapping is no state dict, that is a mapping of names to tensors, and has none"),
        (
            {"module.layer1.0.conv1.weight": torch.ones(1), "module.fc.bias": torch.ones(1)},
            "the given mapping is of no family that load_original knows (MDEQ, DEQ transformer, DEQ-Flow): its 2 keys "
            "are like 'layer1.0.conv1.weight', 'fc.bias'",
        ),
    ],
    ids=["empty", "empty inside", "list", "no tensors", "no names", "ResNet"],
)
def test_what_is_no_checkpoint(given: dict[Any, Any], message: str) -> None:
    assert refusal(given).startswith(message)


def test_what_is_no_source() -> None:
    with pytest.raises(
        TypeError, match=r"takes a path or a state dict; given: MDEQ\. Of a module, give its state_dict"
    ):
        zoo.load_original(zoo.create_model("mdeq_tiny"))


def test_what_the_zoo_wrote_itself(tmp_path: Path) -> None:
    model = zoo.create_model("mdeq", **SMALL)
    zoo.save_weights(model, tmp_path / "mine.safetensors")
    written = "was written by this zoo, not by the original authors. "
    for own in (model.state_dict(), tmp_path / "mine.safetensors"):
        assert f"{written}Load shipped weights with zoo.load_pretrained" in refusal(own)
    checkpoint = {
        "pytorch-lightning_version": "2.6",
        "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
    }
    torch.save(checkpoint, tmp_path / "best.ckpt")
    message = refusal(tmp_path / "best.ckpt")
    assert message.startswith(f"{tmp_path / 'best.ckpt'} {written}Load this Lightning checkpoint with the class that")
    assert "ImageClassifier.load_from_checkpoint" in message


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_of_more_than_weights(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "a.pth"
    given = {"state_dict": published(random_model(**SMALL)), "args": argparse.Namespace(a=1), "model": nn.Linear(1, 1)}
    torch.save(given, path, _use_new_zipfile_serialization=not old)
    message = refusal(path)
    assert message.startswith(f"{path} holds more than tensors and plain data, so loading it could run code")
    asked = "argparse.Namespace, torch.nn.modules.linear.Linear"
    assert f"nothing was loaded. It asks for {asked}. Where you trust its source, open it yourself" in message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_cannot_be_read(tmp_path: Path, suffix: str) -> None:
    assert "cannot be read: " in refusal(tmp_path / f"none{suffix}")
    assert "cannot be read: " in refusal(tmp_path)


@given(content=st.binary(max_size=60))
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_something_else(tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / f"noise{suffix}"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path} ")


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(published(random_model(**SMALL)), path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert refusal(path).startswith(f"{path} is damaged, or not a file that torch.save wrote: ")
