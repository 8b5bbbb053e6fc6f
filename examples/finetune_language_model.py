"""Fine-tune a pretrained language model on your texts.

python examples/finetune_language_model.py [FOLDER] [--pattern "**/*.md"]     # byte by byte, in whatever encoding

Of each file the first nine tenths are trained on, and the last twentieth is tested on.
Without FOLDER: the code of this zoo. The weights were trained on the documentation that Python carries.
Nothing is frozen: all of the model is the equilibrium but for the embedding, which has seen all bytes of English.
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl

import zoo
from datamodules import TextFolderDataModule
from lightning_modules import LanguageModel

MODEL, WEIGHTS = "deq_transformer_nano", "deq_transformer_nano.pydocs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER")
    parser.add_argument("--pattern", default="**/*.txt", help="which files of FOLDER")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", default="finetuned_language_model.safetensors", help="the file that is written")
    given = parser.parse_args()

    pl.seed_everything(0)
    root, pattern = (
        (str(Path(zoo.__file__).parent), "**/*.py") if given.folder is None else (given.folder, given.pattern)
    )
    data = TextFolderDataModule(root, pattern, batch_size=16, segment_length=64)
    try:
        data.setup()
    except FileNotFoundError as error:
        raise SystemExit(f"error: {error}") from None
    module = LanguageModel(
        MODEL,
        pretrained=WEIGHTS,
        eval_memory_length=128,
        pretrain_steps=2 * given.steps // 3,
        pretrain_depth=3,
        lr=2e-3,
    )
    trainer = pl.Trainer(
        max_steps=given.steps, logger=False, enable_checkpointing=False, limit_val_batches=0, gradient_clip_val=1.0
    )
    (before,) = trainer.test(module, data, verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.test(module, data, verbose=False)
    zoo.save_weights(module.model, given.out)
    print(f"Wrote {given.out}; model = zoo.load_pretrained({given.out!r}) brings it back")
    was, now = (found["test/bits_per_byte"] for found in (before, after))
    print(f"bits per byte on {len(data.splits.test):,} other bytes: {was:.3f}, now {now:.3f}")


if __name__ == "__main__":
    main()
