"""Turn a Lightning checkpoint into weights of the zoo: a safetensors file, its record, and the table of all weights.

python examples/publish_weights.py runs/published/version_0/checkpoints/best.ckpt

The recorded metrics are measured on the file that was written, read back as a user would read it, on the data of the
checkpoint; ``cli.py evaluate`` measures them again. Weights that are there already are replaced with ``--force`` only.
"""

import argparse
import tempfile
from pathlib import Path

from pytorch_lightning import LightningDataModule

import datamodules
import lightning_modules
import zoo
from commands.measuring import METRICS, evaluation_of, measure, public_class
from lightning_modules import EquilibriumModule
from lightning_modules.checkpoints import read_checkpoint
from zoo.cards import write_cards
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


def main() -> None:
    """Publish a run of one of the default configurations."""
    parser = argparse.ArgumentParser(description="Publish a checkpoint of one of the default configurations.")
    parser.add_argument("checkpoint", help="a .ckpt of a run")
    parser.add_argument("name", nargs="?", help="of the weights; by default the model and the tag of its data")
    parser.add_argument("--force", action="store_true", help="replace weights of this name")
    args = parser.parse_args()

    made_by = read_checkpoint(args.checkpoint)["made_by"]
    evaluation = evaluation_of(made_by)
    task = public_class(made_by["model"]["class_path"], lightning_modules, EquilibriumModule)
    source = public_class(made_by["data"]["class_path"], datamodules, LightningDataModule)
    module = task.load_from_checkpoint(args.checkpoint, weights_only=True, map_location="cpu")
    spec = module.inference_spec()
    tag, suffix, trained_on, preprocessing = DATA[source.__name__]
    name = args.name or f"{spec.model}.{tag}"
    path = weights_dir() / f"{name}.safetensors"
    if not args.force and any(file.exists() for file in (path, path.with_suffix(".json"))):
        parser.error(f"{path} or its record is there already: give another name, or --force to replace it")

    model = zoo.create_model(spec.model, **spec.arguments)
    model.load_state_dict(module.model.state_dict())
    with tempfile.TemporaryDirectory(dir=weights_dir()) as folder:  # nothing is replaced before all is measured
        file = Path(folder, path.name)
        zoo.save_weights(model, file)
        found = measure(zoo.load_pretrained(str(file)), evaluation, split="both", device="cpu").metrics
        file.replace(path)
    data = source(**made_by["data"]["init_args"])
    record = WeightsRecord(
        name=name,
        model=spec.model,
        arguments=spec.arguments,
        source="shipped",
        sha256=sha256_of(path.read_bytes()),
        num_parameters=sum(p.numel() for p in model.parameters()),
        trained_on=trained_on.format(data=data, bytes=len(data.splits.train)),
        recipe=f"make weights CONFIG=configs/{spec.model}{suffix}",
        metrics={key: value for key, value in found.items() if key.partition("_")[2] in METRICS},
        licence="MIT",
        preprocessing=preprocessing,
        classes=list(getattr(data, "class_names", ())) or None,
        evaluation=evaluation,
    )
    print(f"Wrote {path}, {save_record(record)} and {write_cards()}: {record.metrics}")


if __name__ == "__main__":
    main()
