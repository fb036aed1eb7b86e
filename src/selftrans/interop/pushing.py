"""A run ⇒ a repository of the hub: a pipeline's folder with a model card, a sheet of samples and selftrans.json.

huggingface_hub handles access tokens: they are neither read nor stored here, and are removed from messages.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from selftrans.checkpoints import hub
from selftrans.checkpoints.hub import CARD, RECORD, SAMPLES
from selftrans.checkpoints.load import Weights, find_asked, load_model
from selftrans.evaluate import plots
from selftrans.interop.model_card import card
from selftrans.interop.pipeline_parts import last_parts
from selftrans.interop.run_facts import compute_of, evaluations_of, run_of, sheet_of
from selftrans.interop.sit_pipeline import SiTPipeline, check_replaceable
from selftrans.messages import first_line, listed, plural, printable
from selftrans.plain_json import read_object
from selftrans.plugins import installed_version
from selftrans.storage import atomic_directory, write_json, write_text

ATTRIBUTES = ".gitattributes"  #: every repository has it
NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")


class Chosen(NamedTuple):
    """What a repository has besides the weights of a run."""

    license: str  #: as the hub names it, such as apache-2.0
    samples: Path | None = None  #: folder of `selftrans sample`; None: the run's preview
    evaluations: Sequence[Path] = ()  #: reports of `selftrans evaluate`; none: that in the run

    def check(self) -> None:
        """ValueError for a license that is no name."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{0,60}", self.license):
            raise ValueError(
                f"license {self.license!r:.80} is no name of the hub; give one such as apache-2.0, mit or other"
            )


def write_folder(
    run: str | Path, repository: str, out: Path, chosen: Chosen, *, weights: Weights = "ema", stage: str | None = None
) -> list[str]:
    """Write what `push` uploads to the folder `out`; returns the names of its files.

    An earlier such folder is replaced when the new one is complete. ValueError for an `out` that holds anything else, for a
    name that is not owner/name, and as `load_model` and `run_facts` do.
    """
    check_name(repository)
    chosen.check()
    check_replaceable(out)
    file = find_asked(run, stage=stage, weights=weights)
    loaded, of_run = load_model(file, stage=stage), run_of(file)
    compute, evaluations = compute_of(of_run, loaded), evaluations_of(of_run, chosen.evaluations, loaded)
    sheet, data = sheet_of(of_run, chosen.samples, loaded), read_object(of_run / "data.json") if of_run else None
    pipeline = SiTPipeline.from_run(file)
    text = card(
        repository,
        chosen.license,
        loaded._replace(config=pipeline.transformer.settings),
        data=data,
        compute=compute,
        evaluations=evaluations,
        samples=sheet and sheet.made,
    )
    record = {
        "selftrans": installed_version("selftrans"),
        "license": chosen.license,
        "model": loaded.config.model.name,
        "method": loaded.config.method,
        "stage": loaded.stage,
        "step": loaded.step,
        "weights": loaded.weights,
        "weights_sha256": loaded.source["weights"],
        "compute": compute,
        "evaluations": evaluations,
    }
    with atomic_directory(out, replace=True) as folder:
        pipeline.save_pretrained(folder)
        if sheet is not None:
            plots.save(sheet.picture, folder / SAMPLES)
        write_text(folder / CARD, text)
        files = sorted([*(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()), RECORD])
        write_json(folder / RECORD, last_parts(record) | {"files": files})
    return files


def push(
    run: str | Path,
    repository: str,
    chosen: Chosen,
    *,
    private: bool = False,
    force: bool = False,
    out: Path | None = None,
    weights: Weights = "ema",
    stage: str | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Upload a run to the repository owner/name, which is created if needed; returns `hf://owner/name@commit`.

    Interrupted uploads are continued by the same call: files that are there already are not sent again. `out` keeps the
    folder. ValueError, in one line, where the hub refuses, for a public repository with `private`, and, without `force`, for
    one with files that `push` has not written.
    """
    with tempfile.TemporaryDirectory(prefix="selftrans-push-") as temporary:
        folder = out or Path(temporary) / "folder"
        files = write_folder(run, repository, folder, chosen, weights=weights, stage=stage)
        say(
            f"{plural(len(files), 'file')}, {sum((folder / name).stat().st_size for name in files) / 1e6:.1f} MB -> "
            f"{repository}"
        )
        try:
            return _upload(folder, files, repository, private, force)
        except ValueError as error:
            raise ValueError(hub.without_tokens(str(error))) from error
        except Exception as error:  # of a connection, of the hub
            raise ValueError(_reason(repository, error)) from error


def _upload(folder: Path, files: list[str], repository: str, private: bool, force: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi(library_name="selftrans", library_version=installed_version("selftrans"))
    api.create_repo(repository, private=private or None, exist_ok=True)
    info = api.model_info(repository)
    if private and not info.private:
        raise ValueError(f"{repository} exists and is public; make it private on the hub, or leave out --private")
    held = {str(sibling.rfilename) for sibling in info.siblings or ()} - {ATTRIBUTES}
    earlier = _pushed(api, repository) & held if RECORD in held else set()
    foreign = sorted(held - earlier)
    if foreign and not force:
        raise ValueError(
            f"{repository} holds files that selftrans push has not written ({listed(foreign, 3)}); choose another repository, "
            "or give --force, which keeps them, except those of the same names"
        )
    if RECORD not in held:  # first: if the upload is interrupted, the next one knows the repository
        api.upload_file(
            path_or_fileobj=folder / RECORD, path_in_repo=RECORD, repo_id=repository, commit_message="selftrans push"
        )
    done = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="selftrans push",
        delete_patterns=sorted(earlier - set(files)) or None,  # what an earlier push wrote; files of others stay
    )
    return f"{hub.SCHEME}{repository}@{done.oid}"


def _pushed(api: Any, repository: str) -> set[str]:
    """Names of the files of an earlier push, as its selftrans.json in the repository lists them."""
    record = read_object(Path(api.hf_hub_download(repository, RECORD))) or {}
    names = record.get("files")
    names = names if isinstance(names, list) else []
    return {RECORD} | {name for name in names if isinstance(name, str) and not set(name) & set("*?[")}  # made patterns


def check_name(repository: str) -> None:
    """ValueError unless a repository is named owner/name."""
    if not NAME.fullmatch(repository):
        raise ValueError(f"{printable(repository)} is no name of a repository; write owner/name")


def _reason(repository: str, error: Exception) -> str:
    """One line about an upload that failed."""
    from huggingface_hub import errors

    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub cannot be reached: HF_HUB_OFFLINE is set; --dry-run writes the folder only"
    if status in (401, 403):
        return f"{repository}: the hub refuses to write; log in with a token that may (hf auth login)"
    why = hub.without_tokens(first_line(error))
    return f"{repository} could not be uploaded ({why}); the same command continues"
