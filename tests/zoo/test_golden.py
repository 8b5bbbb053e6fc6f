"""Golden outputs: each shipped weight, loaded, computes what it computed when it was published.

``tests/golden/NAME.safetensors`` holds small real inputs, the outputs and the steps of each sample. To write one anew,
because other weights are published or a model is meant to compute something else::

    python -m tests.zoo.test_golden NAME
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import datamodules
import zoo
from zoo.implicit import DEQ
from zoo.language import TextModel
from zoo.records import SHIPPED, find_record

FOLDER = Path(__file__).resolve().parents[1] / "golden"
TOLERANCE = 1e-4
"""Largest difference of an output, in units of the largest value. The solves' own tolerances, 1e-4 to 1e-2, are no
limit to it as long as they make the same steps: other kernels, another number of threads and float64 change the outputs
by up to 1e-6, and no step."""
MOST_BYTES = 100_000

Inputs = dict[str, Tensor]


def digits() -> Inputs:
    data = datamodules.DigitsDataModule(batch_size=8)
    return {"image": next(iter(data.test_dataloader()))[0]}


def scene() -> Inputs:
    data = datamodules.DigitScenesDataModule(batch_size=1, val_size=1, test_size=1)
    return {"image": next(iter(data.test_dataloader()))[0]}


def text() -> Inputs:
    data = datamodules.PyDocsDataModule(eval_batch_size=2, eval_segment_length=40)
    return {"tokens": next(iter(data.test_dataloader()))[0]}


def frames() -> Inputs:
    data = datamodules.SyntheticFlowDataModule(batch_size=1, height=48, width=64, val_size=1, test_size=1)
    first, second, *_ = next(iter(data.test_dataloader()))
    return {f"image{n}": (255 * image).round().to(torch.uint8) for n, image in enumerate((first, second), start=1)}


INPUTS: dict[str, Callable[[], Inputs]] = {
    "datamodules.DigitsDataModule": digits,
    "datamodules.DigitScenesDataModule": scene,
    "datamodules.PyDocsDataModule": text,
    "datamodules.SyntheticFlowDataModule": frames,
}


def outputs(name: str, inputs: Inputs) -> dict[str, Tensor]:
    """What the model gives, the steps of each sample, and the evaluations of each solve."""
    model, reports = zoo.load_pretrained(name), []
    for layer in model.modules():
        if isinstance(layer, DEQ):
            layer.register_forward_hook(lambda layer, given, returned: reports.append(returned[1]))
    with torch.no_grad():
        output = read(model, inputs["tokens"]) if isinstance(model, TextModel) else model(**inputs)
    return {
        "output": output,
        "steps": torch.cat([report.steps for report in reports]),
        "evaluations": torch.tensor([report.evaluations for report in reports]),
    }


def read(model: Any, tokens: Tensor) -> Tensor:
    """The states of a text in two segments: the second with the memory of the first."""
    first, second = tokens.chunk(2, dim=1)
    h, memory = model(first)
    return torch.cat([h, model(second, memory)[0]], dim=1)


def write(name: str) -> Path:
    """Compute the golden outputs of these weights, and write them."""
    evaluation = find_record(name).evaluation
    assert evaluation is not None
    inputs = INPUTS[evaluation["data"]["class_path"]]()
    path = FOLDER / f"{name}.safetensors"
    path.write_bytes(safetensors.torch.save({**inputs, **outputs(name, inputs)}))
    return path


SHIPPED_NAMES = [record.name for record in zoo.list_weights(source=SHIPPED)]


def test_each_shipped_weight_has_a_golden_file_and_no_other() -> None:
    assert len(SHIPPED_NAMES) >= 5
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"{name}.safetensors" for name in SHIPPED_NAMES]
    assert all(path.stat().st_size < MOST_BYTES for path in FOLDER.iterdir())


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_it_computes_what_it_computed(name: str) -> None:
    golden = safetensors.torch.load((FOLDER / f"{name}.safetensors").read_bytes())
    wanted = {key: golden.pop(key) for key in ("output", "steps", "evaluations")}
    found = outputs(name, golden)
    assert found["steps"].tolist() == wanted["steps"].tolist()
    assert found["evaluations"].tolist() == wanted["evaluations"].tolist()
    assert found["output"].shape == wanted["output"].shape
    scale = wanted["output"].abs().max()
    assert (found["output"] - wanted["output"]).abs().max() <= TOLERANCE * scale
    others = {key: value.flip(0) if len(value) > 1 else value.flip(-1) for key, value in golden.items()}
    assert (outputs(name, others)["output"] - wanted["output"]).abs().max() > 100 * TOLERANCE * scale


if __name__ == "__main__":
    for given in sys.argv[1:]:
        print(write(given))
