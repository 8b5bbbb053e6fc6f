"""Turn a Lightning checkpoint into weights of the zoo: a safetensors file, its record, and the table of all weights.

python examples/publish_weights.py runs/published/version_0/checkpoints/best.ckpt

The recorded metrics are measured on the file that was written, read back as a user would read it.
"""

import pydoc
import sys
from typing import Any

import pytorch_lightning as pl

import zoo
from lightning_modules.checkpoints import read_checkpoint
from zoo.cards import write_table
from zoo.records import WeightsRecord, save_record, weights_dir
from zoo.weight_files import sha256_of

# What a record says about the data: the tag of the name, what follows the model in the recipe, what it was
# trained on (of the data module and the length of its training part), and what the model takes.
DATA = {
    "DigitsDataModule": (
        "digits",
        "_digits.yaml",
        "scikit-learn digits: 1,257 training images of the fixed split in datamodules/digits.py",
        "images (B, 1, 8, 8) in [0, 1], that is scikit-learn's pixels / 16; the model normalises",
    ),
    "DigitScenesDataModule": (
        "digit_scenes",
        ".yaml",
        "scenes of the 1,257 training digits of scikit-learn, drawn anew in each epoch by datamodules/scenes.py",
        "images (B, 1, H, W) in [0, 1], bright strokes on black; the model normalises and pads",
    ),
    "PyDocsDataModule": (
        "pydocs",
        "_pydocs.yaml",
        "the documentation in Python {data.python_version}, topics of help() and docstrings: {bytes:,} training bytes "
        "of the fixed split in datamodules/pydocs.py",
        "the bytes of a text in UTF-8, int64 (B, L); generate() takes text",
    ),
    "SyntheticFlowDataModule": (
        "synthetic",
        "_synthetic_video.yaml ARGS='--model.weights_from CHECKPOINT', one of configs/deq_flow_nano_synthetic.yaml",
        "layers cut out of the training bands of scikit-learn's two photographs, moved anew in each epoch by "
        "datamodules/synthetic_flow.py",
        "two images (B, 3, H, W) in [0, 1], of any size; the model scales and pads",
    ),
}


def main(checkpoint: str, name: str | None = None) -> None:
    """Publish ``checkpoint``, a run of one of the default configurations."""
    made_by = read_checkpoint(checkpoint)["made_by"]
    task: Any = pydoc.locate(made_by["model"]["class_path"])
    source: Any = pydoc.locate(made_by["data"]["class_path"])
    data = source(**made_by["data"]["init_args"])
    module = task.load_from_checkpoint(checkpoint, weights_only=True, map_location="cpu")
    if (positions := getattr(module, "eval_memory_length", None)) is not None:  # a language model as it was validated
        made_of = zoo.spec_of(module.model)
        model = zoo.create_model(made_of.model, **{**made_of.arguments, "memory_length": positions})
        model.load_state_dict(module.model.state_dict())
        module.model = model.eval()
    tag, suffix, trained_on, preprocessing = DATA[source.__name__]
    name = name or f"{zoo.spec_of(module.model).model}.{tag}"
    path = weights_dir() / f"{name}.safetensors"
    spec = zoo.save_weights(module.model, path)
    draft = WeightsRecord(
        name=name,
        model=spec.model,
        arguments=spec.arguments,
        source="shipped",
        sha256=sha256_of(path.read_bytes()),
        num_parameters=sum(p.numel() for p in module.model.parameters()),
        trained_on=trained_on.format(data=data, bytes=len(data.splits.train)),
        recipe=f"make weights CONFIG=configs/{spec.model}{suffix}",
        metrics={},
        licence="MIT",
        preprocessing=preprocessing,
        classes=list(getattr(data, "class_names", ())) or None,
    )
    save_record(draft)
    module.model = zoo.load_pretrained(name)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    found = {**trainer.validate(module, data, verbose=False)[0], **trainer.test(module, data, verbose=False)[0]}
    wanted = ("accuracy", "miou", "pixel_accuracy", "bits_per_byte", "epe", "epe_zero", "converged")
    metrics = {key.replace("/", "_"): value for key, value in found.items() if key.rpartition("/")[2] in wanted}
    record = WeightsRecord(**{**vars(draft), "metrics": metrics})
    print(f"Wrote {path}, {save_record(record)} and {write_table()}: {metrics}")


if __name__ == "__main__":
    main(*sys.argv[1:])
