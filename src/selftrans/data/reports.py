"""What `prepare` says before it encodes: files that are not read, what may surprise, samples that cannot be used."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np

from selftrans.data.manifest import Manifest
from selftrans.data.sources.clips import Clips
from selftrans.data.sources.copies import Copies, copies_in_words
from selftrans.data.sources.file_kinds import describe_ignored
from selftrans.data.sources.source import Samples, Source
from selftrans.data.sources.surprises import deep_values, sides_in_captions, sides_in_classes, surprises
from selftrans.storage import listed, plural, printable


def say(text: str, progress: bool) -> None:
    """Print a progress message to standard error; standard output is for the command's result."""
    if progress:
        print(text, file=sys.stderr)


def report_ignored(samples: Samples | None, progress: bool, *, flip: bool = False) -> None:
    """Say how many files of a source are not read, and why, and warn of what may surprise; None: it was said before.

    `flip`: mirrored pictures are stored, too.
    """
    if samples is None:
        return
    if samples.ignored:
        say(describe_ignored(samples.ignored), progress)
    warned = [*surprises(samples), *(deep_values(samples) if isinstance(samples, Source) else ())]
    sides = (*sides_in_captions(samples), *sides_in_classes(samples)) if flip else ()
    for warning in (*warned, *sides):
        warnings.warn(warning, stacklevel=3)
    for remark in samples.remarks if isinstance(samples, Clips) else ():
        say(remark, progress)


def check_faults(samples: Samples, source: str | Path, skip_bad: bool) -> None:
    """Raise ValueError for samples that lack their picture, captions or label, before anything is encoded."""
    for i, reason in () if skip_bad else samples.faults.items():
        count, name = plural(len(samples.faults), "sample"), printable(samples.name(i))
        first, them = ("; the first", "them") if len(samples.faults) > 1 else ("", "it")
        raise ValueError(
            f"{count} of {source} cannot be used{first}: {name} ({reason}); repair {them}, or leave {them} out with --skip-bad"
        )


def warn_of_noticed(samples: Samples, manifest: Manifest, copies: Copies, *, now: bool = True) -> None:
    """Warn of what was noticed while samples were read: metadata that are ignored, animations, copies, classes that were lost.

    Unless `now`, what a source keeps is kept, for its `noticed.warn`.
    """
    found = copies.found(samples.labels, samples.name)
    if isinstance(samples, Source):
        samples.noticed.copied.append(found)
    elif said := copies_in_words([found], manifest.noun):
        warnings.warn(said, stacklevel=3)
    if not now:
        return
    if isinstance(samples, Source):
        samples.noticed.warn()
    skipped = {name for name, _ in manifest.skipped}
    if not skipped or not samples.classes:
        return
    kept = np.array([label for i, label in enumerate(samples.labels) if samples.name(i) not in skipped], dtype=np.int64)
    if lost := sorted({*samples.labels.tolist()} - {*kept.tolist()}):
        names, it = (
            listed([samples.classes[k] for k in lost]),
            "it keeps its label" if len(lost) == 1 else "they keep their labels",
        )
        warnings.warn(f"no sample of {plural(len(lost), 'class')} can be used: {names}; {it}", stacklevel=3)
