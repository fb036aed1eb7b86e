"""Models on the Hugging Face hub, named `hf://owner/name[@revision]` where a command takes a run or a file.

They are read from huggingface_hub's cache, whose folders are named after the commit. Only json, safetensors and the files of
tokenisers are downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from selftrans.encoders.text import TOKENIZER_FILES
from selftrans.messages import first_line, printable

SCHEME = "hf://"
EXAMPLE = "hf://owner/name, or hf://owner/name@revision"
NAMED = re.compile(r"hf:/{1,2}([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")  # Path() makes one slash of two
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  #: folder of a repository in the cache
#: what is downloaded: an export of `selftrans export`, or a pipeline (`selftrans export --layout pipeline`, `selftrans push`)
FILES = ("*.json", "model.safetensors")
#: what `selftrans push` adds; RECORD marks its repositories
CARD, SAMPLES, RECORD = "README.md", "samples.png", "selftrans.json"
FOLDERS = ("scheduler", "transformer", "vae", "text_encoder", "tokenizer")
ALLOWED = [*FILES, *(f"{folder}/*.{suffix}" for folder in FOLDERS for suffix in ("json", "safetensors"))]
ALLOWED += [f"tokenizer/{name}" for name in TOKENIZER_FILES]  # data, too, which the sha256 of a text encoder covers


def on_hub(source: str | Path) -> bool:
    """Whether `source` names a model on the hub."""
    return str(source).startswith("hf:/")


def local(source: str | Path) -> Path:
    """`source` as a path: for a model on the hub the folder of its download in the cache, for which `pinned` returns the name.

    Its json and safetensors are downloaded, at a branch, tag or commit (default: main), unless they are in the cache.
    Raises ValueError, in one line, for a name of another form, and where the download fails.
    """
    if not on_hub(source):
        return Path(source)
    named = NAMED.fullmatch(str(source))
    if named is None:
        raise ValueError(f"{printable(source)} names no model on the hub; write {EXAMPLE}")
    repository, revision = named.groups()
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=ALLOWED))
    except Exception as error:  # of a connection, of the hub, of the disk
        raise ValueError(_reason(repository, revision, error)) from error
    if not any(folder.glob("*.json")):
        raise ValueError(
            f"{SCHEME}{repository} holds no model of selftrans (no config.json or model_index.json); checkpoints of other code "
            "are downloaded, and read by `selftrans import`"
        )
    return folder


def pinned(path: Path) -> str | None:
    """`hf://owner/name@commit` of a file or folder in the cache of the hub; None for any other path."""
    for folder in (path, *path.parents):
        repository = CACHED.fullmatch(folder.parents[1].name) if len(folder.parents) > 1 else None
        if repository and folder.parent.name == "snapshots":
            return f"{SCHEME}{repository[1]}/{repository[2]}@{folder.name}"
    return None


def recorded_name(name: str) -> str:
    """The name under which files record a part of a model: for a folder in the cache its place on the hub, else `name`."""
    place = pinned(Path(name))
    return f"{place}/{Path(name).name}" if place else name


def _reason(repository: str, revision: str | None, error: Exception) -> str:
    """One line about a download that failed."""
    from huggingface_hub import errors

    name = f"{SCHEME}{repository}" + (f"@{revision}" if revision else "")
    if isinstance(error, errors.GatedRepoError):
        return f"{name} is gated: accept its terms on the hub, and log in (hf auth login)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: the repository has no such revision; give a branch, a tag or a commit of it"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name} does not exist, or is private; check its name, and log in for private ones (hf auth login)"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return f"{name} is not in the cache, and the hub cannot be reached; check the connection, and HF_HUB_OFFLINE"
    return f"{name} cannot be downloaded ({without_tokens(first_line(error))})"


def without_tokens(text: str) -> str:
    """Text without access tokens of the hub."""
    return re.sub(r"hf_\w{4,}", "hf_...", text)
