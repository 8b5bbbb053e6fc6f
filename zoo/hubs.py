"""Weights on the Hugging Face hub: saved with a model card, pushed, and fetched with every byte verified."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from torch import nn

from . import cache
from .blobs import Blobs, checked_sha256, inline, log, sha256_of_file
from .errors import WeightsError
from .records import WeightsRecord
from .registry import spec_of
from .weight_files import save_weights
from .weights import load_pretrained

WEIGHTS, CARD = "model.safetensors", "README.md"

_REPO = r"\w[\w.-]*/\w[\w.-]*"
_NAME = re.compile(rf"(?P<repo>{_REPO})(?:@(?P<revision>refs/pr/\d+|[\w.%-]+))?(?:/(?P<file>[^@]+))?")
_LICENCES = {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "mit"}  # as the hub spells them


class _HubFile(NamedTuple):
    """A file of the hub; as text, the source by which it is loaded."""

    repo: str
    revision: str | None
    file: str = WEIGHTS

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf:{self.repo}{revision}{'' if self.file == WEIGHTS else f'/{self.file}'}"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    record: WeightsRecord | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write ``model.safetensors`` and ``README.md``, a model card, into a folder; :func:`from_pretrained` reads it.

    Args:
        model: made by :func:`zoo.create_model` or :func:`zoo.load_pretrained`.
        folder: made if it is not there.
        record: what the weights are; the card then says all of it. Else it tells the model and its sizes.
        overwrite: replace files of these two names, whoever wrote them.

    Returns:
        the folder.

    Raises:
        ValueError: the model was made in another way, or the record is of another one.
        FileExistsError: one of the files is there; nothing was written.
        NotADirectoryError: there is a file in place of the folder.
    """
    folder = Path(folder).expanduser()
    card = _card(model, record, folder.resolve().name)
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; save_pretrained takes a folder, which it makes")
    there = [name for name in (WEIGHTS, CARD) if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} has {' and '.join(there)} already; choose another folder, or replace with overwrite=True"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(model, folder, card)
    return folder


def _write(model: nn.Module, folder: Path, card: str) -> None:
    save_weights(model, folder / WEIGHTS)
    (folder / CARD).write_text(card, encoding="utf-8")


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    branch: str | None = None,
    private: bool | None = None,
    commit_message: str | None = None,
    record: WeightsRecord | None = None,
    token: str | None = None,
) -> str:
    """Upload a model and its card to the Hugging Face hub; the repository is made if it is not there.

    Args:
        model: made by :func:`zoo.create_model` or :func:`zoo.load_pretrained`.
        repo_id: ``"org/name"``.
        branch: to commit to; made if it is not there. None is the main one.
        private: who may read a repository that is made now; None leaves it to the organisation.
        commit_message: of the upload.
        record: what the weights are; see :func:`save_pretrained`.
        token: of the hub; None takes ``$HF_TOKEN``, or that of ``hf auth login``.

    Returns:
        what :func:`zoo.load_pretrained` takes to load exactly this: ``"hf:org/name@<commit>"``.

    Raises:
        ValueError: the model was made in another way, the record is of another one, or the repository is not written
            like this.
        WeightsError: the hub did not take it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP client, whichever it is

    card = _card(model, record, str(_HubFile(repo_id, branch)))
    api = HfApi(endpoint=_endpoint(), token=token)
    with tempfile.TemporaryDirectory() as folder:
        _write(model, Path(folder), card)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if branch is not None:
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=branch,
                commit_message=commit_message or f"Upload {spec_of(model).model} with deq-zoo",
            )
        except (HTTPError, OSError) as error:
            raise WeightsError(
                f"{repo_id} was not uploaded: {inline(error)}. Log in with `hf auth login`, or set HF_TOKEN to a token "
                "that may write there"
            ) from None
    return f"hf:{repo_id}@{commit.oid}"


def from_pretrained(
    repo_or_folder: str | os.PathLike[str],
    revision: str | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    sha256: str | None = None,
    **arguments: Any,
) -> nn.Module:
    """The model that :func:`save_pretrained` wrote into a folder, or :func:`push_to_hub` to ``"org/name"``.

    Args:
        repo_or_folder: a folder, if there is one of this name; else a repository of the Hugging Face hub.
        revision: of the repository: a branch, a tag or a commit.
        cache_dir: as of :func:`zoo.load_pretrained`.
        offline: likewise.
        sha256: likewise.
        arguments: of the model, to change; see there.

    Raises:
        ValueError: there is no such folder, and it is not a repository's name either.
        WeightsError: as :func:`zoo.load_pretrained`.
    """
    name = str(repo_or_folder)
    if Path(name).expanduser().is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder, which has no revision {revision!r}")
        return load_pretrained(Path(name).expanduser(), sha256=sha256, **arguments)
    if not re.fullmatch(_REPO, name):
        raise ValueError(f"there is no folder {name}, and a repository of the Hugging Face hub is written org/name")
    file, blobs = _HubFile(name, revision), Blobs(cache.cache_dir(cache_dir))
    with blobs.keeping(str(file)):
        path = _fetch(file, blobs, offline=cache.is_offline(offline), sha256=sha256 and checked_sha256(sha256))
    return load_pretrained(path, **arguments)


def fetch_from_hub(name: str, blobs: Blobs, *, offline: bool, sha256: str | None = None) -> Path:
    """The file ``org/name[@revision][/file]`` of the Hugging Face hub, verified; ``model.safetensors`` without a file.

    A ``/`` in a revision is written ``%2F``. The hub's client keeps files in ``hf`` in our cache. A commit's file is
    hashed at each call, and compared with what the hub calls it (the sha256 of large files, git's sha1 of small ones)
    and with what it was at its first use. A damaged one is fetched again, once. ``HF_ENDPOINT``, ``HF_TOKEN`` and
    ``hf auth login`` hold here too.

    Raises:
        ValueError: the name is not written like this.
        WeightsError: it cannot be fetched, or is not what the hub says.
    """
    found = _NAME.fullmatch(name)
    if not found or {"..", ".", ""} & set((found["file"] or WEIGHTS).split("/")):
        raise ValueError(
            f"hf:{name} is no file of the Hugging Face hub; one is written hf:org/name, hf:org/name@revision or "
            "hf:org/name@revision/file.safetensors"
        )
    revision = found["revision"] and unquote(found["revision"])
    return _fetch(_HubFile(found["repo"], revision, found["file"] or WEIGHTS), blobs, offline=offline, sha256=sha256)


def _fetch(file: _HubFile, blobs: Blobs, *, offline: bool, sha256: str | None) -> Path:
    path = _download(file, blobs, offline=offline)
    commit = path.parents[file.file.count("/")].name  # .../snapshots/<commit>/<file>
    source = f"hf:{file.repo}@{commit}/{file.file}"
    pinned = blobs.recorded(source)
    content = sha256_of_file(path)
    if not _is_intact(path, content, pinned.sha256 if pinned else None):
        damage = f"{path} is damaged or was replaced: its sha256 is {content}, which is not that of {source}"
        if offline:
            raise WeightsError(f"{damage}; nothing was loaded. Load it once where there is a network")
        log.warning("%s; it is fetched again", damage)
        path = _download(file._replace(revision=commit), blobs, offline=False, anew=True)
        content = sha256_of_file(path)
        if not _is_intact(path, content, pinned.sha256 if pinned else None):
            raise WeightsError(f"{source} came damaged: its sha256 is {content}; nothing was loaded")
    blobs.refuse_other_content(source, content, pinned=sha256, known=None)
    if pinned is None:
        blobs.pin(source, content)
    return path


def _download(wanted: _HubFile, blobs: Blobs, *, offline: bool, anew: bool = False) -> Path:
    """What the hub's client makes of it: the path of a snapshot's file."""
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise WeightsError(f"{wanted} needs the package huggingface_hub: {error}") from None

    (repo, revision, file), folder = wanted, blobs.folder / "hf"
    try:
        return Path(
            hf_hub_download(
                repo,
                file,
                revision=revision,
                cache_dir=folder,
                local_files_only=offline,
                force_download=anew,
                endpoint=_endpoint(),
            )
        )
    except errors.GatedRepoError:
        why = f"{repo} is gated: accept its terms on the hub, and log in with `hf auth login` or HF_TOKEN"
    except errors.RepositoryNotFoundError:
        why = f"there is no repository {repo}, or it is private: log in with `hf auth login` or HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = f"{repo} has no revision {revision}" + ("" if file == WEIGHTS else "; a / in a revision is written %2F")
    except errors.LocalEntryNotFoundError as error:
        why = (
            f"it is not in the cache ({folder}), and nothing is fetched offline; load it once where there is a "
            "network, with the same cache, or load a copy of the file by its path"
            if offline
            else f"the hub cannot be reached ({inline(error.__cause__ or error)}), and it is not in the "
            f"cache ({folder})"
        )
    except errors.EntryNotFoundError:
        why = f"{repo} has no file {file} at revision {revision or 'main'}; write hf:{repo}@REVISION/FILE for another"
    except (errors.HTTPError, OSError, ValueError) as error:  # type: ignore[attr-defined]  # see push_to_hub
        why = inline(error.__cause__ or error)
    raise WeightsError(f"{wanted} cannot be fetched: {why}") from None


def _is_intact(path: Path, sha256: str, pinned: str | None) -> bool:
    """Whether a snapshot's file, which has this sha256, is the pinned one, and the one that the hub's ETag names."""
    if pinned is not None and sha256 != pinned:
        return False
    etag = Path(os.readlink(path)).name if path.is_symlink() else ""  # where links cannot be made, the pin has to do
    match len(etag):
        case 64:
            return etag == sha256
        case 40:
            data = path.read_bytes()
            return etag == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return True


def _endpoint() -> str | None:
    """The hub's address, also where the variable was set after its client was imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _card(model: nn.Module, record: WeightsRecord | None, source: str) -> str:
    """A model card with the hub's front matter; each value is JSON, which YAML includes.

    Args:
        model: what is saved.
        record: of it.
        source: what ``load_pretrained`` will take for it.

    Raises:
        ValueError: the record is of another model.
    """
    spec, parameters = spec_of(model), sum(p.numel() for p in model.parameters())
    if record is not None and (record.model, record.num_parameters) != (spec.model, parameters):
        raise ValueError(
            f"the record {record.name} is of {record.model} with {record.num_parameters:,} parameters, and this model "
            f"is {spec.model} with {parameters:,}; give the record of these weights, or none"
        )
    front: dict[str, Any] = {"library_name": "deq-zoo", "tags": ["deep-equilibrium-model", "pytorch", spec.model]}
    if record is not None:
        licence = record.licence.lower()
        front |= {"license": licence} if licence in _LICENCES else {"license": "other", "license_name": record.licence}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    if record is not None:
        from .cards import model_card

        return "\n".join(lines) + model_card(record, source)
    lines += [
        f"# {spec.model}",
        "",
        f"A deep equilibrium model of deq-zoo with {parameters:,} parameters, made by",
        f"`zoo.create_model({', '.join([repr(spec.model), *(f'{k}={v!r}' for k, v in spec.arguments.items())])})`.",
        "",
        "```python",
        "import zoo",
        "",
        f"model = zoo.load_pretrained({json.dumps(source)})",
        "```",
        "",
        f"`{WEIGHTS}` holds the model's name, its arguments and a digest of its tensors, checked at each load.",
    ]
    return "\n".join(lines) + "\n"
