"""torch.hub on the checkout: every entry is listed, documented and loaded."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.command_line import ROOT

LARGE = 20_000_000  # parameters; larger models are built without memory
RECORDS = zoo.list_weights()


def load(entry: str, *args: Any, **kwargs: Any) -> torch.nn.Module:
    model = torch.hub.load(str(ROOT), entry, *args, source="local", **kwargs)
    assert isinstance(model, torch.nn.Module)
    return model


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


@pytest.fixture
def on_github(monkeypatch: pytest.MonkeyPatch) -> str:
    """A repository's name; ``list`` and ``help`` take no folder, so that the checkout stands in for what they fetch."""
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *_, **__: str(ROOT))
    return "owner/deq-zoo"


def test_every_model_and_every_weight_is_an_entry(on_github: str) -> None:
    assert sorted(torch.hub.list(on_github)) == sorted([*zoo.list_models(), *(record.name for record in RECORDS)])


def test_every_entry_is_documented(on_github: str) -> None:
    for name in zoo.list_models():
        told = torch.hub.help(on_github, name)
        assert told.startswith(f"The model {name} of the zoo.")
        assert told.count("Args:") == 2, "those of the entry, and the model's own"
        for record in zoo.list_weights(f"{name}.*"):
            assert f"- '{record.name.removeprefix(name)[1:]}': {record.trained_on}" in told
    for record in RECORDS:
        told = torch.hub.help(on_github, record.name)
        assert told.startswith(f"{record.model} with the weights {record.name}, ")
        assert record.licence in told


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_model_is_made(name: str) -> None:
    with torch.device("meta"):
        wanted = zoo.create_model(name)
    size = sum(p.numel() for p in wanted.parameters())
    with torch.device("meta" if size > LARGE else "cpu"):
        model = load(name)
    assert zoo.spec_of(model) == zoo.spec_of(wanted)
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in wanted.state_dict().items()
    }


@pytest.mark.parametrize("record", zoo.list_weights(source="shipped"), ids=lambda record: record.name)
def test_every_weight_that_ships_is_loaded(record: zoo.WeightsRecord) -> None:
    wanted, tag = zoo.load_pretrained(record.name), record.name.removeprefix(f"{record.model}.")
    for model in (load(record.name), load(record.model, weights=tag), load(record.model, record.name)):
        assert same_weights(model, wanted)
        assert zoo.spec_of(model) == zoo.spec_of(wanted)
        assert not model.training


@pytest.mark.parametrize("record", zoo.list_weights(source="original"), ids=lambda record: record.name)
def test_every_original_says_what_to_get(
    record: zoo.WeightsRecord, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DEQ_ZOO_CACHE", str(tmp_path))
    with pytest.raises(zoo.WeightsError) as error:
        load(record.name)
    assert str(record.file) in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_the_one_that_ships_and_arguments() -> None:
    model = load("mdeq_nano", weights=True, solver="Broyden")
    assert same_weights(model, zoo.load_pretrained("mdeq_nano.digits"))
    assert type(model.deq.solver).__name__ == "Broyden"
    with pytest.warns(zoo.ReinitializedWarning):
        assert load("tanh_deq", weights="digits", num_classes=3).classifier.out_features == 3
    assert load("tanh_deq", weights=False, width=3).injection.out_features == 3


def test_a_file(tmp_path: Path) -> None:
    model = zoo.create_model("tanh_deq", width=3)
    zoo.save_weights(model, tmp_path / "x.safetensors")
    assert same_weights(load("tanh_deq", weights=str(tmp_path / "x.safetensors")), model)
    with pytest.raises(ValueError, match="are of tanh_deq, not of mdeq_nano; load them by that name"):
        load("mdeq_nano", weights=str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    ("entry", "weights", "told"),
    [
        ("mdeq_nano", "digitz", "mdeq_nano has no weights 'digitz'. Did you mean 'digits'?"),
        ("resnet", "digits", "resnet has no weights 'digits'. Known: none"),
        (
            "resnet",
            True,
            "weights=True takes the one set of weights that ships for a model, and resnet has 0; give its",
        ),
        ("mdeq_nano", "tanh_deq.digits", "weights='tanh_deq.digits' are of tanh_deq, not of mdeq_nano"),
        ("mdeq_nano", "", "mdeq_nano has no weights ''. Known: digits."),
        ("mdeq_nano", "mdeq_nano.digitz", "unknown weights 'mdeq_nano.digitz'. Did you mean 'mdeq_nano.digits'?"),
    ],
)
def test_mistaken_weights(entry: str, weights: str | bool, told: str) -> None:
    with pytest.raises(ValueError, match="weights") as error:
        load(entry, weights=weights)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"pretrained": True}, "mdeq_nano has no argument 'pretrained': weights=True takes the one set that ships"),
        ({"offline": True}, "offline= is about weights, and mdeq_nano without weights= starts at random"),
        ({"sha256": "a" * 64}, "sha256= is about weights"),
        ({"weight": "digits"}, "mdeq_nano has no argument 'weight'. Did you mean 'weights'? Known: weights, "),
        ({"channel": (8, 16)}, "mdeq_nano has no argument 'channel'. Did you mean 'channels'?"),
    ],
)
def test_mistaken_arguments(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match="mdeq_nano") as error:
        load("mdeq_nano", **arguments)
    assert str(error.value).startswith(told)


def test_a_file_of_another_model_is_refused_without_a_warning(tmp_path: Path) -> None:
    zoo.save_weights(zoo.create_model("tanh_deq", width=3), tmp_path / "x.safetensors")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match="are of tanh_deq, not of mdeq_nano"):
            load("mdeq_nano", weights=str(tmp_path / "x.safetensors"), num_classes=3)
    assert said == []


@pytest.mark.parametrize(("entry", "weights"), [("tanh_deq", {"weights": "digits"}), ("tanh_deq.digits", {})])
def test_a_warning_has_the_line_of_the_user(entry: str, weights: dict[str, str]) -> None:
    with pytest.warns(zoo.ReinitializedWarning) as said:
        torch.hub.load(str(ROOT), entry, source="local", num_classes=3, **weights)
    assert [each.filename for each in said] == [__file__]


def test_the_entries_have_their_names() -> None:
    import hubconf

    for name in (*zoo.list_models(), *(record.name for record in RECORDS)):
        assert getattr(hubconf, name).__name__ == name
    assert list(inspect.signature(hubconf.tanh_deq).parameters) == ["weights", "arguments"]
