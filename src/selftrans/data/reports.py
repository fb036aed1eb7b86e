"""What `prepare` reports about a source: files that are not read, warnings, samples that cannot be used."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np

from selftrans.data.manifest import Manifest
from selftrans.data.shard_plan import Decoded
from selftrans.data.sources.clips import Clips
from selftrans.data.sources.duplicates import DuplicateFinder
from selftrans.data.sources.file_kinds import describe_ignored
from selftrans.data.sources.source import Samples, Source
from selftrans.data.sources.source_warnings import all_grey, keep_labels, source_warnings
from selftrans.messages import escaped, listed, plural, printable


def say(text: str, progress: bool) -> None:
    """Print a progress message to standard error; standard output is for the command's result."""
    if progress:
        print(escaped(text), file=sys.stderr)


def report_source(samples: Samples, progress: bool, *, flip: bool = False, pixels: bool = False) -> None:
    """Print how many files of a source are not read and why, and give its warnings.

    flip: whether mirrored pictures are stored, too. pixels: whether pictures are stored as pixels.
    """
    if samples.ignored:
        say(describe_ignored(samples.ignored), progress)
    for warning in source_warnings(samples, flip=flip):
        warnings.warn(warning, stacklevel=3)
    if pixels and isinstance(samples, Source) and not samples.in_order and all_grey(samples):
        say("the pictures are grey: --grey stores one channel in place of three equal ones", progress)
    for remark in samples.remarks if isinstance(samples, Clips) else ():
        say(remark, progress)


def check_faults(samples: Samples, source: str | Path, skip_bad: bool) -> None:
    """Raise ValueError for samples that lack their picture, captions or label, before anything is encoded."""
    if skip_bad or not samples.faults:
        return
    i, reason = next(iter(samples.faults.items()))
    count, name = plural(len(samples.faults), "sample"), printable(samples.name(i))
    first, them = ("; the first", "them") if len(samples.faults) > 1 else ("", "it")
    raise ValueError(
        f"{count} of {source} cannot be used{first}: {name} ({reason}); repair {them}, or leave {them} out with --skip-bad"
    )


def note_constant(samples: Samples, read: Decoded) -> None:
    """Note the pictures, sounds or videos of a batch that have one value throughout, or one in each channel, for
    `warn_after_reading`. Among other values that may have a meaning."""
    if not isinstance(samples, Source | Clips):
        return
    for i, array in zip(read.good, read.arrays, strict=True):
        last = isinstance(samples, Source)  # channels of pictures are last, others first
        positions = array.reshape(-1, array.shape[-1]) if last else array.reshape(array.shape[0], -1).T
        if (positions[0] == positions[-1]).all() and (positions == positions[0]).all():
            samples.read_warnings.add_constant(samples.name(i))


def warn_after_reading(samples: Samples, manifest: Manifest, finder: DuplicateFinder, *, now: bool = True) -> None:
    """Give the warnings that reading has led to: ignored metadata, animations, samples of one value, duplicates, classes
    without usable samples.

    now: False keeps them in the source, until `read_warnings.emit` is called.
    """
    samples.read_warnings.duplicates.append(finder.find(samples.labels, samples.name))
    if not now:
        return
    samples.read_warnings.emit(manifest.noun)
    skipped = {name for name, _ in manifest.skipped}
    if not skipped or not samples.classes:
        return
    kept = np.array([label for i, label in enumerate(samples.labels) if samples.name(i) not in skipped], dtype=np.int64)
    if lost := sorted({*samples.labels.tolist()} - {*kept.tolist()}):
        names, they_keep = listed([samples.classes[k] for k in lost]), keep_labels(len(lost))
        warnings.warn(f"no sample of {plural(len(lost), 'class')} can be used: {names}; {they_keep}", stacklevel=3)
