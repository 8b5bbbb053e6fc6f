"""Records of what the original authors published: each is of the model that its file will be, and says where it is."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from commands import measuring
from tests.command_line import ROOT
from tests.zoo.parity import MANIFESTS as MANIFESTS_FOLDER
from tests.zoo.parity import manifest
from zoo.records import ORIGINAL

RECORDS = {record.name: record for record in zoo.list_weights(source=ORIGINAL)}

# Which keys and shapes a file has, by the notes in PUBLISHED.json.
MANIFESTS = {
    "deq_mdeq_imagenet_cls_XL": ["mdeq_xl_imagenet.imagenet"],
    "mdeqv1_imagenet_cls_XL": ["mdeq_xl_imagenet.imagenet_v1"],
    "mdeqv1_imagenet_cls_SMALL": ["mdeq_small_imagenet.imagenet"],
    "mdeqv1_cityscapes_seg_XL": ["mdeq_xl_cityscapes.cityscapes"],
    "mdeqv1_cityscapes_seg_SMALL": ["mdeq_small_cityscapes.cityscapes"],
    "torchdeq_mdeq_imagenet": ["mdeq_small_imagenet.imagenet_torchdeq"],
    "torchdeq_mdeq_cifar_large": ["mdeq_large.cifar10_torchdeq"],
    "deq_transformer_wt103": ["deq_transformer_wt103.wt103"],
    "deq_transformer_wt103_pre2021": ["deq_transformer_wt103.wt103_2019", "deq_transformer_wt103.wt103_pre2021"],
    "torchdeq_deqseq_wt103": [
        "deq_transformer_wt103.wt103_torchdeq_ift",
        "deq_transformer_wt103.wt103_torchdeq_ift_jr",
    ],
    "torchdeq_deqlm_wt103": ["deq_lm_wt103.wt103_torchdeq"],
    "deqflow_v1_base": ["deq_flow_base.chairs_v1", "deq_flow_base.things_v1"],
    "deqflow_v1_huge": [
        *("deq_flow_huge.chairs_v1", "deq_flow_huge.sintel_v1", "deq_flow_huge.kitti_v1"),
        *(f"deq_flow_huge.things_v1_{i}" for i in (1, 2, 3)),
    ],
    "deqflow_v2_base": ["deq_flow_base.things_torchdeq_1", "deq_flow_base.things_torchdeq_2"],
    "deqflow_v2_huge": [
        *("deq_flow_huge.chairs_v2", "deq_flow_huge.things_v2_1x", "deq_flow_huge.things_v2_3x"),
        *("deq_flow_huge.things_torchdeq_1x", "deq_flow_huge.things_torchdeq_3x"),
    ],
    "deqflow_v2_tiny": ["deq_flow_tiny.things_v2"],
}
CHOSEN = {"deq_flow_huge.kitti_v1": {"padding": "bottom"}}  # what no file tells, and belongs to the weights


def state_of(name: str) -> dict[str, Tensor]:
    """Zeros of the shapes of a published file, which take no memory."""
    listed = manifest(name)["state_dict"]
    state = {key: torch.zeros((), dtype=getattr(torch, e["dtype"])).expand(e["shape"]) for key, e in listed.items()}
    if "pos_emb.inv_freq" in state:
        state["pos_emb.inv_freq"] = 1 / 10000 ** (torch.arange(0, 700, 2, dtype=torch.float32) / 700)
    return state


@cache
def without_memory(name: str, arguments: str) -> nn.Module:
    """The model of a record, whose arguments are JSON; made once for all records that have the same."""
    with torch.device("meta"):
        return zoo.create_model(name, **json.loads(arguments))


# ----------------------------------------------------------------------------------------------- what the files will be


def test_every_record_has_a_manifest() -> None:
    named = [name for names in MANIFESTS.values() for name in names]
    assert sorted(named) == sorted(RECORDS)


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_record_is_of_the_model_that_its_file_will_be(name: str) -> None:
    model = zoo.load_original(state_of(name))
    spec = zoo.spec_of(model)
    for record in (RECORDS[each] for each in MANIFESTS[name]):
        read = json.loads(json.dumps(spec.arguments))
        assert (record.model, record.arguments) == (spec.model, {**read, **CHOSEN.get(record.name, {})})
        assert record.num_parameters == sum(parameter.numel() for parameter in model.parameters())
        made = without_memory(record.model, json.dumps(record.arguments)).state_dict()
        assert {k: v.shape for k, v in made.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_every_published_file_has_a_record() -> None:
    manifest("deqflow_v2_tiny")  # or skip
    published = json.loads((MANIFESTS_FOLDER / "PUBLISHED.json").read_text(encoding="utf-8"))
    known = {str(record.download).rpartition("/")[2] for record in RECORDS.values()}
    told = " ".join(entry["drive"] for entry in published if entry["drive"])
    assert known == {word.strip(",;") for word in told.split() if len(word) > 20}
    listed = [entry["filename"] for entry in published if isinstance(entry.get("filename"), list)]
    whole = {name for names in listed for name in names if name.startswith("deq-flow-") and " or " not in name}
    assert whole <= {record.file for record in RECORDS.values()}
    assert len(whole) > 8


# ------------------------------------------------------------------------------------------------------- what they say


@pytest.mark.parametrize("record", RECORDS.values(), ids=lambda record: record.name)
def test_a_record_is_complete(record: zoo.WeightsRecord) -> None:
    assert record.name.startswith(f"{record.model}.")
    assert record.sha256 is None
    assert not record.metrics
    assert str(record.download).startswith("https://drive.google.com/")
    assert str(record.origin).startswith("https://github.com/locuslab/")
    assert record.file
    assert Path(record.file).name == record.file
    assert record.notes
    assert record.licence.startswith("not stated for the weights")
    units = {"perplexity": 30, "epe": 10, "image": 10, "150": 30}  # of epe_per_image, and of a memory; else fractions
    for key, value in record.published.items():
        assert 0 < value < units.get(key.rpartition("_")[2], 1)
    config = next(word for word in record.recipe.split() if word.startswith("configs/"))
    assert (ROOT / config).is_file()
    assert len(record.classes or []) in (0, record.arguments.get("num_classes"))


ONE_OF_EACH = {(record.model, json.dumps(record.evaluation)): record for record in RECORDS.values()}


@pytest.mark.parametrize("record", ONE_OF_EACH.values(), ids=lambda record: record.name)
def test_a_record_can_be_evaluated(record: zoo.WeightsRecord) -> None:
    """Its task takes the model, and its data module exists; the data are not here."""
    evaluation: Any = record.evaluation
    model = without_memory(record.model, json.dumps(record.arguments))
    with torch.device("meta"):
        assert measuring._task(model, evaluation["task"]).model is model
    root = evaluation["data"]["init_args"]["root"]
    assert measuring._data(evaluation["data"], None, "elsewhere").root == "elsewhere" != root


# ------------------------------------------------------------------------------------------------------- to load them


@pytest.mark.parametrize("record", RECORDS.values(), ids=lambda record: record.name)
def test_what_to_get_and_where_to_put_it(
    record: zoo.WeightsRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEQ_ZOO_CACHE", str(tmp_path))
    with pytest.raises(zoo.WeightsError) as error:
        zoo.load_pretrained(record.name)
    put = tmp_path / "originals" / record.name / str(record.file)
    assert f"get {record.file} from {record.download}, and put it at {put}" in str(error.value)


def test_a_file_that_was_put_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEQ_ZOO_CACHE", str(tmp_path))
    name = "deq_flow_tiny.things_v2"
    record = RECORDS[name]
    shapes = state_of("deqflow_v2_tiny")
    state = {key: torch.rand(x.shape) if x.is_floating_point() else torch.ones_like(x) for key, x in shapes.items()}
    for key in state:
        if ".norm3." in key:
            state[key] = state[key.replace(".norm3.", ".downsample.1.")]
    record.path.parent.mkdir(parents=True)
    torch.save(state, record.path)
    model = zoo.load_pretrained(name, solver="Anderson")
    assert type(model.deq.solver).__name__ == "Anderson"
    plain = zoo.load_original(state)
    assert all(torch.equal(x, y) for x, y in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    record.path.write_bytes(record.path.read_bytes()[:-1] + b"x")
    with pytest.raises(zoo.WeightsError, match="sha256"):
        zoo.load_pretrained(name)
