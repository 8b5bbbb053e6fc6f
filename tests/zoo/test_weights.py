"""Weights: written, recorded, verified at each load, adapted; and those that ship are what their records say."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import yaml

import zoo
from tests.command_line import DIGITS, ROOT, Fitted, same
from tests.servers import Reply, serving
from tests.toy_weights import publish
from zoo import cards, records, weight_files
from zoo.implicit import Gradient, Newton, PhantomGradient, Solver, from_description
from zoo.originals.mdeq import original_name

TOY = "tanh_deq.toy"


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("choices", [{}, {"solver": Newton(tol=1e-3), "gradient": PhantomGradient(steps=2)}], ids=str)
def test_published_weights_are_loaded_bit_by_bit(weights_folder: Path, choices: dict[str, Any]) -> None:
    published = publish(mean=0.2, std=0.5, **choices)
    loaded = zoo.load_pretrained(TOY)
    assert same(state(loaded), state(published))
    assert zoo.spec_of(loaded) == zoo.spec_of(published)
    assert (loaded.deq.solver, loaded.deq.gradient) == (published.deq.solver, published.deq.gradient)
    assert (loaded.training, published.training) == (False, True)
    x = torch.rand(3, 64)
    assert same(loaded(x), published(x))


def test_the_file_says_what_it_is(weights_folder: Path) -> None:
    """Without the record, to whoever reads safetensors."""
    published = publish(solver=Newton(tol=1e-3))
    with safetensors.safe_open(weights_folder / f"{TOY}.safetensors", "pt") as file:
        header = file.metadata()
        assert set(file.keys()) == set(published.state_dict())
    made_of = json.loads(header["deq_zoo"])
    assert set(made_of) == {"model", "arguments", "digest"}
    assert made_of["model"] == "tanh_deq"
    arguments = made_of["arguments"]
    assert arguments == zoo.spec_of(published).arguments
    again = zoo.create_model(made_of["model"], **arguments)
    again.load_state_dict(safetensors.torch.load_file(weights_folder / f"{TOY}.safetensors"))


def test_loaded_weights_can_be_published_again(weights_folder: Path) -> None:
    publish()
    zoo.save_weights(zoo.load_pretrained(TOY), weights_folder / "copy.safetensors")
    headers, states = [], []
    for name in (TOY, "copy"):
        with safetensors.safe_open(weights_folder / f"{name}.safetensors", "pt") as file:
            headers.append(file.metadata())
            states.append({key: file.get_tensor(key) for key in sorted(file.keys())})
    assert headers[0] == headers[1]
    assert same(*states)


def test_a_model_made_by_hand_is_not_published(weights_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"was not made by zoo\.create_model"):
        zoo.save_weights(zoo.TanhDEQ(), weights_folder / "mine.safetensors")
    assert not list(weights_folder.iterdir())


def test_records_are_listed_as_they_were_saved(weights_folder: Path) -> None:
    for name in ("tanh_deq.b", "tanh_deq.a", "other.c"):
        publish(name)
    assert [record.name for record in zoo.list_weights()] == ["other.c", "tanh_deq.a", "tanh_deq.b"]
    assert [record.name for record in zoo.list_weights("tanh*")] == ["tanh_deq.a", "tanh_deq.b"]
    assert zoo.list_weights("*.d") == []
    (record,) = zoo.list_weights("*.a")
    assert dataclasses.asdict(record) == json.loads((weights_folder / "tanh_deq.a.json").read_text())
    assert record.path == weights_folder / "tanh_deq.a.safetensors"
    assert (record.arguments, record.classes) == ({"width": 6, "contraction": 0.7}, None)


def test_the_table_is_made_of_the_records(weights_folder: Path) -> None:
    publish()
    (record,) = zoo.list_weights()
    assert cards.write_cards() == weights_folder / "README.md"
    table = (weights_folder / "README.md").read_text()
    assert table == cards.markdown_table()
    (row,) = [line for line in table.splitlines() if line.startswith("| [")]
    assert row == (
        "| [`tanh_deq.toy`](cards/tanh_deq.toy.md) | 496 | nothing | val accuracy 0.5000, test accuracy 0.1235 "
        f"| images (B, 64) in [0, 1] | MIT | `none` | `{record.sha256[:12]}…` |"
    )


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("where", ["header", "first weight", "last weight"])
def test_a_flipped_bit_is_refused(weights_folder: Path, where: str) -> None:
    publish()
    file = weights_folder / f"{TOY}.safetensors"
    data = bytearray(file.read_bytes())
    recorded = weight_files.sha256_of(bytes(data))
    data[{"header": 20, "first weight": 8 + int.from_bytes(data[:8], "little"), "last weight": -1}[where]] ^= 1
    file.write_bytes(data)
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_pretrained(TOY)
    assert str(error.value) == (
        f"{file} is damaged or was replaced: its sha256 is {weight_files.sha256_of(bytes(data))}, "
        f"its record says {recorded}; nothing was loaded. "
        "Restore the file: git checkout -- checkpoints, or install the package again"
    )


def test_damage_after_the_first_load_is_found_too(weights_folder: Path) -> None:
    publish()
    zoo.load_pretrained(TOY)
    file = weights_folder / f"{TOY}.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(zoo.WeightsError, match="is damaged or was replaced"):
        zoo.load_pretrained(TOY)


def test_a_missing_file(weights_folder: Path) -> None:
    publish()
    (weights_folder / f"{TOY}.safetensors").unlink()
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_pretrained(TOY)
    assert str(error.value) == (
        f"the weights {TOY} ship in {weights_folder / TOY}.safetensors, which cannot be read "
        "(No such file or directory); restore the file: git checkout -- checkpoints, or install the package again"
    )


def test_the_record_of_other_weights(weights_folder: Path) -> None:
    publish(), publish("tanh_deq.other")
    (weights_folder / "tanh_deq.other.safetensors").rename(weights_folder / f"{TOY}.safetensors")
    with pytest.raises(zoo.WeightsError, match="is damaged or was replaced: its sha256 is"):
        zoo.load_pretrained(TOY)


@pytest.mark.parametrize(
    "written",
    ["{", "[]", '{"name": "tanh_deq.toy"}', '{"colour": "red"}', "3"],
    ids=["cut", "list", "too few", "other", "number"],
)
def test_a_broken_record(weights_folder: Path, written: str) -> None:
    (weights_folder / "mine.json").write_text(written)
    with pytest.raises(zoo.WeightsError, match=r"mine\.json is not a weights record: ."):
        zoo.list_weights()


def test_a_file_of_another_project(weights_folder: Path) -> None:
    publish()
    file = weights_folder / f"{TOY}.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, file)
    (record,) = zoo.list_weights()
    records.save_record(dataclasses.replace(record, sha256=weight_files.sha256_of(file.read_bytes())))
    with pytest.raises(zoo.WeightsError, match="does not say which model it belongs to: its header has no 'deq_zoo'"):
        zoo.load_pretrained(TOY)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tanh_deq.tou", {}, r"unknown weights 'tanh_deq.tou'. Did you mean 'tanh_deq.toy'\? Known: tanh_deq.toy\."),
        ("mdeq.imagenet", {}, r"unknown weights 'mdeq.imagenet'. Known: tanh_deq.toy\."),
        (TOY, {"widht": 3}, r"model 'tanh_deq' has no argument 'widht'. Did you mean 'width'\?"),
        (TOY, {"solver": "Newtn"}, r"unknown solver 'Newtn'. Did you mean 'Newton'\?"),
    ],
)
@pytest.mark.usefixtures("weights_folder")
def test_mistyped_names(name: str, arguments: dict[str, Any], message: str) -> None:
    publish()
    with pytest.raises(ValueError, match=f"^{message}"):
        zoo.load_pretrained(name, **arguments)


# ---------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.usefixtures("weights_folder")
def test_another_solver_keeps_the_weights() -> None:
    published = publish()
    loaded = zoo.load_pretrained(TOY, solver=Newton(tol=1e-6), gradient="UnrolledGradient", mean=0.5)
    assert same(state(loaded), state(published))
    assert loaded.deq.solver == Newton(tol=1e-6)
    assert loaded.mean == 0.5
    assert zoo.spec_of(loaded).arguments["gradient"]["class_path"] == "zoo.implicit.UnrolledGradient"


@pytest.mark.usefixtures("weights_folder")
@pytest.mark.parametrize("recorded", [{"num_classes": 10}, {}], ids=["recorded", "the default"])
def test_another_number_of_classes_leaves_the_classifier_at_random(recorded: dict[str, int]) -> None:
    published = publish(**recorded)
    with pytest.warns(zoo.ReinitializedWarning) as warned:
        loaded = zoo.load_pretrained(TOY, num_classes=3)
    assert str(warned[0].message) == (
        "tanh_deq.toy was trained for 10 classes, and 3 were asked for: "
        "classifier.weight, classifier.bias start at random"
    )
    assert warned[0].filename == __file__
    assert len(warned) == 1
    assert loaded(torch.rand(2, 64)).shape == (2, 3)
    ours, theirs = state(loaded), state(published)
    for key in ours.keys() - {"classifier.weight", "classifier.bias"}:
        assert same(ours[key], theirs[key])
    assert ours["classifier.weight"].any()


@pytest.mark.usefixtures("weights_folder")
@pytest.mark.parametrize("recorded", [{"num_classes": 10}, {}], ids=["recorded", "the default"])
def test_the_same_number_of_classes_keeps_the_classifier(recorded: dict[str, int]) -> None:
    published = publish(**recorded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = zoo.load_pretrained(TOY, num_classes=10)
    assert same(state(loaded), state(published))


@pytest.mark.usefixtures("weights_folder")
@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"width": 8}, "with width=8 changed; change only arguments that keep the shapes."),
        ({"contraction": None}, "with contraction=None changed; change only arguments that keep the shapes."),
        ({"in_features": 9, "num_classes": 10}, "with in_features=9, num_classes=10 changed;"),
    ],
    ids=["width", "contraction", "in_features"],
)
def test_another_shape_is_one_clear_error(overrides: dict[str, Any], told: str) -> None:
    publish()
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_pretrained(TOY, **overrides)
    assert str(error.value).startswith(f"the weights {TOY} do not fit the model tanh_deq {told}")
    assert "In the file" in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.__context__ is None


@pytest.mark.usefixtures("weights_folder")
def test_a_segmenter_and_an_image_classifier_get_another_classifier(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"channels": (8, 16), "stem_stride": 1, "expansion": 2, "post_affine": False}
    for name, rest in (("mdeq", {"head_widths": (2, 2), "final_width": 5}), ("mdeq_segmenter", {})):
        model = zoo.create_model(name, num_classes=5, **sizes, **rest)
        zoo.save_weights(model, tmp_path / "mine.safetensors")
        with pytest.warns(zoo.ReinitializedWarning, match=r"head\.classifier\.weight, head\.classifier\.bias start at"):
            loaded = zoo.load_pretrained(tmp_path / "mine.safetensors", num_classes=2)
        assert len(loaded.state_dict()["head.classifier.weight"]) == 2
        assert all(
            same(value, model.state_dict()[key])
            for key, value in loaded.state_dict().items()
            if not key.startswith("head.classifier.")
        )
        assert loaded.state_dict()["head.classifier.weight"].any()


# ------------------------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("form", ["path", "str", "file:", "file://", "folder", "relative"])
def test_paths(weights_folder: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = publish()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a folder" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes((weights_folder / f"{TOY}.safetensors").read_bytes())
    source = {
        "path": path,
        "str": str(path),
        "file:": f"file:{path}",
        "file://": path.as_uri(),
        "folder": path.parent,
        "relative": "a folder/model.safetensors",
    }[form]
    assert same(state(zoo.load_pretrained(source)), state(published))


def test_the_file_of_a_record_is_verified_by_it_too(weights_folder: Path) -> None:
    """Whichever way it is called; another file with a right digest is another file."""
    publish()
    path = weights_folder / f"{TOY}.safetensors"
    zoo.save_weights(zoo.create_model("tanh_deq", width=6), path)
    for source in (TOY, path, f"file:{path}", f"{weights_folder}/../{weights_folder.name}/{TOY}.safetensors"):
        with pytest.raises(zoo.WeightsError, match=r"its sha256 is .*, its record says "):
            zoo.load_pretrained(source)
    path.rename(weights_folder / "mine.safetensors")
    zoo.load_pretrained(weights_folder / "mine.safetensors")


@pytest.mark.parametrize("source", [TOY, "mine.safetensors", "mine.ckpt"])
def test_a_sha256_that_is_asked_for(weights_folder: Path, source: str, fitted: Fitted) -> None:
    publish()
    (weights_folder / "mine.safetensors").write_bytes((weights_folder / f"{TOY}.safetensors").read_bytes())
    (weights_folder / "mine.ckpt").write_bytes(Path(fitted.best).read_bytes())
    path = weights_folder / (f"{TOY}.safetensors" if source == TOY else source)
    wanted = weight_files.sha256_of(path.read_bytes())
    source = source if source == TOY else str(path)
    zoo.load_pretrained(source, sha256=wanted.upper())
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_pretrained(source, sha256="0" * 64)
    assert str(error.value).startswith(
        f"{path} is damaged or was replaced: its sha256 is {wanted}, and it was asked for {'0' * 64}; nothing was"
    )
    with pytest.raises(ValueError, match="a sha256 has 64 hexadecimal digits"):
        zoo.load_pretrained(source, sha256="12")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            "mien.safetensors",
            r"there is no file mien\.safetensors; near is mine\.safetensors\. load_pretrained takes a na",
        ),
        ("file:mine", r"there is no file mine; near is mine\.safetensors\. "),
        ("no/where/mine.ckpt", r"there is no file no/where/mine\.ckpt, nor a folder no/where\. "),
        ("empty", r"the folder empty has none of model\.safetensors, .*; there is: nothing\. "),
        ("full", r"the folder full has none of model\.safetensors, .*; there is: weights\.bin\. "),
    ],
)
@pytest.mark.usefixtures("weights_folder")
def test_mistyped_paths(source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.safetensors").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "weights.bin").touch()
    with pytest.raises(zoo.WeightsError, match=f"^{told}"):
        zoo.load_pretrained(source)


@pytest.mark.usefixtures("weights_folder")
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("tanh_deq", "Did you mean 'tanh_deq.toy'? Known: tanh_deq.toy."),
        (
            "torchvison:Raft_Large_Weights.C_T_V2",
            "Did you mean 'torchvision:'? Known: https:, http:, hf:, wandb:, file:",
        ),
        ("htps://host/mine.safetensors", "Did you mean 'https:'? Known: "),
        ("s3://bucket/mine.safetensors", "Known: https:, http:, hf:, wandb:, file:, torchvision:."),
    ],
)
def test_unknown_kinds_of_source(source: str, told: str) -> None:
    publish()
    with pytest.raises(ValueError, match=r"It takes a name of zoo\.list_weights\(\), a file, a f") as error:
        zoo.load_pretrained(source)
    assert str(error.value).startswith(f"unknown weights '{source}'. {told}")


@pytest.mark.parametrize("source", ["", "file:", "file://"])
def test_nothing_is_not_the_current_folder(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    zoo.save_weights(zoo.create_model("tanh_deq", width=6), "model.safetensors")
    with pytest.raises(ValueError, match=rf"^load_pretrained takes a name of .*; given: '{source}'$"):
        zoo.load_pretrained(source)
    zoo.load_pretrained(Path())


def test_no_message_tells_a_query(weights_folder: Path) -> None:
    """Which may hold a secret."""
    publish()
    with serving() as server:
        server.replies["/a.safetensors"] = Reply((weights_folder / f"{TOY}.safetensors").read_bytes())
        source = f"{server.url}/a.safetensors?token=SECRET"
        with pytest.warns(zoo.ReinitializedWarning, match=r"a\.safetensors was trained") as warned:
            zoo.load_pretrained(source, num_classes=3)
        assert "SECRET" not in str(warned[0].message)
        for arguments in ({"width": 8}, {"sha256": "0" * 64}):
            with pytest.raises(zoo.WeightsError) as error:
                zoo.load_pretrained(source, **arguments)
            assert "SECRET" not in str(error.value)
        server.replies["/a.safetensors"] = Reply(safetensors.torch.save({"a": torch.zeros(2)}))
        with pytest.raises(zoo.WeightsError) as error:
            zoo.load_pretrained(f"{source}2")
        assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "many", "sizes"),
    [
        ("resnet", "blocks", {"widths": [4]}),
        ("stacked_transformer", "layers", {"d_model": 8, "num_heads": 2, "d_inner": 8}),
        ("deq_transformer", "layers", {"d_model": 8, "num_heads": 2, "d_inner": 8}),
    ],
)
def test_a_file_cannot_ask_for_any_number_of_layers(
    model: str, many: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    """However right its digest is: it has no tensors for them."""
    path = tmp_path / "mine.safetensors"
    stranger = zoo.create_model(model, **sizes)
    stranger._zoo_spec = zoo.ModelSpec(model, {**sizes, many: 10**12})  # type: ignore[assignment]
    zoo.save_weights(stranger, path)
    with pytest.raises(zoo.WeightsError, match=rf"^{path} names a model '{model}' that cannot be made here: it has mo"):
        zoo.load_pretrained(path)
    with pytest.raises(zoo.WeightsError, match="it has more than"):
        zoo.load_pretrained(path, num_classes=3)


# ------------------------------------------------------------------------------------------------------------ originals


@pytest.fixture
def original(weights_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, torch.nn.Module]:
    """An original record, where its file belongs, and the model that is in it."""
    monkeypatch.setenv("DEQ_ZOO_CACHE", str(tmp_path / "cache"))
    model = zoo.create_model("mdeq_tiny", num_classes=10)
    record = zoo.WeightsRecord(
        name="mdeq_tiny.theirs",
        model="mdeq_tiny",
        arguments={"stem_stride": 1},
        source="original",
        sha256=None,
        num_parameters=1,
        trained_on="CIFAR-10",
        recipe="theirs",
        metrics={},
        licence="MIT",
        preprocessing="images",
        download="https://example.org/models",
        file="MDEQ_Tiny.pkl",
    )
    records.save_record(record)
    return record.path, model


def put(path: Path, model: torch.nn.Module) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({original_name(key, segmenter=False): value for key, value in model.state_dict().items()}, path)
    return weight_files.sha256_of(path.read_bytes())


def test_an_original_says_what_to_get_and_where_to_put_it(original: Any, tmp_path: Path) -> None:
    path, _ = original
    assert path == tmp_path / "cache" / "originals" / "mdeq_tiny.theirs" / "MDEQ_Tiny.pkl"
    elsewhere = tmp_path / "elsewhere" / path.relative_to(tmp_path / "cache")
    for given, wanted in ((None, path), (tmp_path / "elsewhere", elsewhere)):
        with pytest.raises(zoo.WeightsError) as error:
            zoo.load_pretrained("mdeq_tiny.theirs", cache_dir=given)
        assert str(error.value) == (
            "mdeq_tiny.theirs were published by the original authors, and have to be fetched by hand: get "
            f"MDEQ_Tiny.pkl from https://example.org/models, and put it at {wanted}; or give its path to "
            "zoo.load_original"
        )


def test_an_original_is_loaded_and_pinned(original: Any, tmp_path: Path) -> None:
    path, model = original
    digest = put(path, model)
    loaded = zoo.load_pretrained("mdeq_tiny.theirs", solver="Broyden")
    assert same(state(loaded), state(model))
    beside = path.with_name("MDEQ_Tiny.pkl.sha256")
    assert beside.read_text() == f"{digest}  MDEQ_Tiny.pkl\n"
    with pytest.warns(zoo.ReinitializedWarning, match="was trained for 10 classes, and 3 were asked for"):
        assert len(zoo.load_pretrained("mdeq_tiny.theirs", num_classes=3).state_dict()["head.classifier.weight"]) == 3
    put(path, zoo.create_model("mdeq_tiny", num_classes=10))
    with pytest.raises(
        zoo.WeightsError, match=rf"{beside} says, of its first use, {digest}; nothing was loaded\. Get MD"
    ):
        zoo.load_pretrained("mdeq_tiny.theirs")


def test_an_original_in_a_cache_that_is_only_read(original: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = original
    put(path, model)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert same(state(zoo.load_pretrained("mdeq_tiny.theirs")), state(model))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_an_original_of_a_recorded_sha256(original: Any) -> None:
    path, model = original
    digest = put(path, model)
    (record,) = zoo.list_weights()
    records.save_record(dataclasses.replace(record, sha256=digest))
    zoo.load_pretrained("mdeq_tiny.theirs")
    records.save_record(dataclasses.replace(record, sha256="0" * 64))
    with pytest.raises(zoo.WeightsError, match=f"its record says {'0' * 64}; nothing was loaded"):
        zoo.load_pretrained("mdeq_tiny.theirs")


def test_an_original_of_another_model(original: Any) -> None:
    """And then it is not pinned."""
    path, _ = original
    put(path, zoo.create_model("mdeq", channels=(8, 16), stem_stride=1, head_widths=(2, 2), final_width=5, expansion=2))
    with pytest.raises(zoo.WeightsError, match=r"is of a model mdeq, and mdeq_tiny\.theirs are weights of mdeq_tiny"):
        zoo.load_pretrained("mdeq_tiny.theirs")
    assert not path.with_name("MDEQ_Tiny.pkl.sha256").exists()


# --------------------------------------------------------------------------------------------- the weights that ship


def test_the_shipped_table_is_that_of_the_records() -> None:
    assert (ROOT / "checkpoints" / "README.md").read_text() == cards.markdown_table()


def test_every_shipped_file_has_a_record_and_a_table_row() -> None:
    shipped = {path.name for path in (ROOT / "checkpoints").iterdir() if path.is_file()}
    names = [record.name for record in zoo.list_weights(source="shipped")]
    assert "tanh_deq.digits" in names
    assert shipped == {"README.md", *(f"{name}.{kind}" for name in names for kind in ("json", "safetensors"))}


@pytest.mark.parametrize("record", zoo.list_weights(source="shipped"), ids=lambda record: record.name)
def test_a_shipped_record_describes_its_file(record: zoo.WeightsRecord) -> None:
    model = zoo.load_pretrained(record.name)
    # Made anew, since solvers may have learnt arguments since then.
    assert zoo.spec_of(model) == zoo.spec_of(zoo.create_model(record.model, **record.arguments))
    assert record.name.partition(".")[0] == record.model
    assert record.num_parameters == sum(p.numel() for p in model.parameters())
    assert record.source == "shipped"
    assert len(record.classes or []) == record.arguments.get("num_classes", 0)
    assert record.metrics
    units = {"byte": 8, "epe": 10, "zero": 10}  # bits and pixels; all else are fractions
    assert all(0 < value <= units.get(name.rpartition("_")[2], 1) for name, value in record.metrics.items())
    config = record.recipe.partition("CONFIG=")[2].partition(" ")[0] or DIGITS  # the default of ``make weights``
    recipe = yaml.safe_load((ROOT / config).read_text())["model"]["init_args"]
    assert model.deq.solver == from_description(recipe["solver"], Solver)
    assert model.deq.gradient == from_description(recipe["gradient"], Gradient)


MEASURE = """
import json, sys
blocked = ["pytorch_lightning", "lightning", "lightning_fabric", "torchmetrics", "lightning_modules", "datamodules"]
sys.modules.update(dict.fromkeys([*blocked, "sklearn"]))  # None: importing them raises
import torch, zoo

torch.set_num_threads(1)
models = {record.name: zoo.load_pretrained(record.name) for record in zoo.list_weights("*.digits", source="shipped")}

del sys.modules["sklearn"]
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

digits = load_digits()
labels = digits.target
rest, test = train_test_split(np.arange(1797), test_size=360, stratify=labels, random_state=0)
train, val = train_test_split(rest, test_size=180, stratify=labels[rest], random_state=0)
images, labels = torch.from_numpy(digits.images / 16).float().unsqueeze(1), torch.from_numpy(labels)
measured = {}
for name, model in models.items():
    hits = {}
    with torch.no_grad():
        for part, index in {"val": val, "test": test}.items():
            right = model(images[index]).argmax(dim=1) == labels[index]
            hits[f"{part}_accuracy"] = int(right.sum()) / len(index)
    measured[name] = {"metrics": hits, "summary": model.deq.report.summary()}
print(json.dumps(measured))
"""


def test_shipped_weights_reach_their_recorded_accuracy_without_lightning() -> None:
    """In a new process, with nothing of this project but ``zoo``, and the split of scikit-learn's own two lines."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEASURE],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert {"tanh_deq.digits", "mdeq_nano.digits"} <= measured.keys()
    for name, found in measured.items():
        (record,) = zoo.list_weights(name)
        recorded = {key: value for key, value in record.metrics.items() if key.endswith("accuracy")}
        assert found["metrics"] == pytest.approx(recorded, abs=1e-6)
        assert found["summary"].startswith("360 of 360 samples converged in ")


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    model = zoo.create_model("tanh_deq", width=6)
    files = [tmp_path / f"{i}.safetensors" for i in range(8)]
    for file in files:
        zoo.save_weights(model, file)
    assert len({file.read_bytes() for file in files}) == 1
