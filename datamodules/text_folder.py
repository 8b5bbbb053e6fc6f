"""Any folder of text files, byte by byte."""

from __future__ import annotations

from pathlib import Path

from .idx import DataError
from .text import ByteVocabulary, TextDataModule, TextSplits, byte_tokens

PARTS = ("train", "val", "test")


class TextFolderDataModule(TextDataModule):
    """The text files of a folder and of the folders in it, byte by byte, in whatever encoding.

    Where ``root`` has a folder ``train``, it also has ``val`` and ``test``, and the files of each are that part. Else
    each file is cut in three: its end is test text, what comes before that validation text, and the rest, from its
    beginning, training text, so that one file will do. The cuts are made to the byte. The files stand in the order of
    their paths, with an empty line between them.

    Args:
        root: the folder.
        pattern: which files, as ``Path.glob`` understands it.
        val_fraction: the part of each file that is validation text.
        test_fraction: the part of each file that is test text.
        batch_size: streams of the training text, on each device.
        segment_length: bytes of each stream in a batch.
        eval_batch_size: streams of the validation text, and of the test text, on all devices together.
        eval_segment_length: bytes of each of those in a batch; by default ``segment_length``.
    """

    vocabulary = ByteVocabulary()

    def __init__(
        self,
        root: str,
        pattern: str = "**/*.txt",
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        batch_size: int = 16,
        segment_length: int = 128,
        eval_batch_size: int = 16,
        eval_segment_length: int | None = None,
    ) -> None:
        super().__init__(batch_size, segment_length, eval_batch_size, eval_segment_length)
        if not pattern or Path(pattern).is_absolute():
            raise ValueError(f'pattern is relative to root, such as "**/*.txt"; given: {pattern!r}')
        if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
            raise ValueError(
                "val_fraction and test_fraction are above 0, and their sum is below 1; "
                f"given: {val_fraction!r} and {test_fraction!r}"
            )
        self.root = root
        self.pattern = pattern
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def load(self) -> TextSplits:
        """Read the files.

        Raises:
            FileNotFoundError: the folder is missing, or one of its three parts, or no file fits the pattern.
            DataError: all files are empty.
        """
        root = Path(self.root).absolute()
        if root.is_file():
            raise FileNotFoundError(
                f"{root} is a file, and a folder is asked for. Give its folder, {root.parent}, and --data.pattern "
                f"{root.name}"
            )
        if not root.is_dir():
            raise FileNotFoundError(
                f"no text was found: there is no folder {root}. "
                "To look elsewhere, give --data.root (in a script: TextFolderDataModule(root=...))"
            )
        if (root / "train").is_dir():
            if missing := [part for part in PARTS if not (root / part).is_dir()]:
                raise FileNotFoundError(
                    f"{root} has a folder train but no folder {' and no '.join(missing)}. Add what is missing, or "
                    "rename train to have each file cut in three"
                )
            train, val, test = ([content] for content in (_joined(self._contents(root / part)) for part in PARTS))
        else:
            train, val, test = [], [], []
            for content in self._contents(root):
                end = len(content) - round(self.test_fraction * len(content))
                begin = end - round(self.val_fraction * len(content))
                train.append(content[:begin])
                val.append(content[begin:end])
                test.append(content[end:])
        return TextSplits(*(byte_tokens(_joined(part)) for part in (train, val, test)))

    def _contents(self, folder: Path) -> list[bytes]:
        """What is in the files of a folder, those that are not empty."""
        paths = sorted(path for path in folder.glob(self.pattern) if path.is_file())
        if not paths:
            there = sorted(path.name for path in folder.iterdir())
            raise FileNotFoundError(
                f"no file in {folder} fits the pattern {self.pattern!r}; there "
                f"{'is: ' + ', '.join(there[:5]) if there else 'is nothing'}{', ...' if len(there) > 5 else ''}. "
                "To read other files, give --data.pattern (in a script: TextFolderDataModule(pattern=...))"
            )
        contents = [content for content in (path.read_bytes() for path in paths) if content]
        if not contents:
            raise DataError(f"all files in {folder} that fit the pattern {self.pattern!r} are empty: {len(paths)}")
        return contents


def _joined(contents: list[bytes]) -> bytes:
    return b"\n\n".join(content for content in contents if content)
