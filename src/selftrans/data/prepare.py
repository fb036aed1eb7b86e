"""Pictures or arrays => moments => shards on disk: decoded by threads ahead of the encoder, resumable shard by shard.

A shard depends on no other, so several processes or machines can each make some (`part`).
Shape legend: R resolution, (C, *S) values of data that are no pictures.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from selftrans.data import resumable
from selftrans.data.dataset import Dataset
from selftrans.data.encode import ShardEncoder
from selftrans.data.manifest import DTYPES, Manifest, Shard
from selftrans.data.record import Option
from selftrans.data.sources.npz import npz_values
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import Samples, ahead
from selftrans.encoders.autoencoder import IDENTITIES, Autoencoder, autoencoder_name, load_autoencoder
from selftrans.precision import PRECISIONS, dtype_name
from selftrans.storage import printable

NETWORK_DTYPES = {dtype_name(name): dtype for name, dtype in PRECISIONS.items()}  #: "float32", ... -> torch's


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    autoencoder: str = "pixel",
    resolution: int | None = None,
    flip: bool = False,
    batch_size: int = 64,
    shard_size: int = 8192,
    dtype: str | None = None,
    skip_bad: bool = False,
    device: str | torch.device | None = None,
    precision: str = "float32",
    split: str = "train",
    label_column: str | None = None,
    part: str = "1/1",
    progress: bool = True,
) -> Manifest:
    """Encode a source of pictures (see `open_source`) into a folder of shards, and return its manifest.

    With autoencoder "values" the source is an npz of arrays (N, C, *S) that are no pictures (see `npz_values`).

    Args:
        resolution: side R to crop and resize to; None keeps that of the pictures.
        flip: store the moments of the mirrored pictures as a second copy.
        dtype: of the stored moments; None: float16, and float32 for values. `precision` is that of the network.
        skip_bad: leave unreadable samples out, listed in the manifest, in place of stopping at the first.
        split, label_column: for parquet files and data sets of the hub.
        part: "I/N": make every Nth shard only, while other processes or machines make the others in the same folder;
            the one that ends last finishes it, and until then the manifest returned is that of the shards so far.
    An interrupted call continues when repeated, with the same batch_size and device to the same bits; a complete one is
    checked against its sha256, and a shard that is lost or damaged is made again.
    Raises ValueError for a bad source, sample, autoencoder or option, a folder begun with others, a disk that refuses.
    """
    out, dtype = Path(out), dtype or ("float32" if autoencoder == "values" else "float16")
    mine = _check(source, out, batch_size, shard_size, dtype, precision, part)
    before = resumable.earlier(out)
    if autoencoder == "values":
        samples = _open_values(source, resolution, flip, label_column)
    else:
        samples = _open_pictures(source, resolution, before, split=split, label_column=label_column, progress=progress)
    options: dict[str, Option] = {
        "autoencoder": autoencoder_name(autoencoder),
        "resolution": resolution,
        "flip": flip,
        "shard_size": shard_size,
        "dtype": dtype,
        "precision": precision,
        "split": split,
        "label_column": label_column,
        "fingerprint": samples.fingerprint,
    }
    if before:
        resumable.check_options(before.plan, options, out)
        if _covers(before, samples) and not _remove_damaged(out, progress):
            return Manifest.load(out)
    _say_ignored(samples, progress)
    where, model = _load(autoencoder, device, precision)
    encoder = ShardEncoder(samples, batch_size, shard_size, skip_bad, model, where, flip, dtype)
    return _run(encoder, encoder.plan(str(source), options), out, mine, progress)


def prepare_digits(out: str | Path) -> Dataset:
    """The built-in digits as 8x8 pixel shards in `out`, made on the first call, opened on every other."""
    prepare("digits", out, progress=False)
    return Dataset.open(out)


def say(text: str, progress: bool) -> None:
    """A line for the person who watches; standard output belongs to the command."""
    if progress:
        print(text, file=sys.stderr)


def _say_ignored(samples: Samples, progress: bool) -> None:
    if samples.ignored:
        say("passed over: " + ", ".join(f"{count} {why}" for why, count in samples.ignored.items()), progress)


def _check(
    source: str | Path, out: Path, batch_size: int, shard_size: int, dtype: str, precision: str, part: str
) -> resumable.Part:
    """The part (I, N) of "I/N". Raises ValueError for an option out of range."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if precision not in NETWORK_DTYPES:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(NETWORK_DTYPES)}")
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"batch_size {batch_size} and shard_size {shard_size} should be 1 or more")
    if str(source) != "digits" and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{out} lies inside the pictures {source}; choose an --out elsewhere")
    return resumable.parse_part(part)


def _open_pictures(
    source: str | Path, resolution: int | None, before: resumable.Earlier | None, **options: Any
) -> Samples:
    """Pictures at a resolution; where none is given, at that with which the folder was begun."""
    native = before.plan.resolution if before and before.plan.options.get("resolution") is None else None
    return open_source(source, resolution=resolution or native, **options)


def _open_values(source: str | Path, resolution: int | None, flip: bool, label_column: str | None) -> Samples:
    """An npz of values. Raises ValueError for an option that only pictures have."""
    for name, given in (("resolution", resolution is not None), ("flip", flip)):
        if given:
            raise ValueError(f"--{name} is for pictures; leave it out with --autoencoder values")
    if label_column is not None:
        warnings.warn(f"label_column is ignored: {source} is no table", stacklevel=3)
    return npz_values(Path(source))


def _covers(before: resumable.Earlier, samples: Samples) -> bool:
    """Whether a folder is complete for these samples."""
    return before.complete and sum(shard.asked for shard in before.shards) == len(samples)


def _remove_damaged(out: Path, progress: bool) -> list[str]:
    """Remove the files of a complete folder that fail their sha256, so that they are made again; their names."""
    damaged = list(Dataset.open(out).damaged(features=False))
    for name in damaged:
        say(f"{out / name} fails its sha256 and is made again", progress)
        (out / name).unlink()
    if not damaged:
        say(f"{out} is complete already", progress)
    return damaged


def _load(name: str, device: str | torch.device | None, precision: str) -> tuple[torch.device, Autoencoder]:
    """The autoencoder, and where it runs: by default on a GPU if there is one."""
    if name in IDENTITIES:
        if precision != "float32":
            warnings.warn(f"precision {precision} is ignored: {name} needs no network", stacklevel=3)
        return torch.device("cpu"), load_autoencoder(name)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return where, load_autoencoder(name, device=where, dtype=NETWORK_DTYPES[precision])


def _run(encoder: ShardEncoder, plan: Manifest, out: Path, part: resumable.Part, progress: bool) -> Manifest:
    """Make the shards of a part that are missing; then, if no other part has any left to make, the manifest."""
    from tqdm import tqdm

    mine = [shard for shard in encoder.shards() if shard % part[1] == part[0] - 1]
    with resumable.locked(out, part, mine):
        with resumable.changing(out, part):
            begun, done = _valid(encoder, plan, out)  # again, now that nobody else writes to them
            if resumable.is_finished(out) and len(done) == len(encoder.shards()):  # meanwhile, by another part
                return Manifest.load(out)
            resumable.begin(out, begun, done.values())
        missing = [shard for shard in mine if shard not in done]
        initial = sum(encoder.asked(shard) for shard in mine if shard in done)
        total = sum(encoder.asked(shard) for shard in mine)
        bar = tqdm(total=total, initial=initial, unit=f" {plan.unit}", disable=not progress)
        batches = (batch for shard in missing for batch in encoder.batches(shard))
        threads = None if encoder.autoencoder.pictures else 1  # an npz is read in order
        with bar, closing(ahead(encoder.decode, batches, threads=threads)) as decoded:
            for shard in missing:
                resumable.record(out, encoder.write(plan, out, shard, decoded, bar.update))
        with resumable.changing(out, part):
            return _finish(encoder, plan, out, progress)


def _valid(encoder: ShardEncoder, plan: Manifest, out: Path) -> tuple[Manifest, dict[int, Shard]]:
    """The plan with the features that are stored already, and the valid shards in the folder, by index.

    Raises ValueError when the folder was begun with another plan.
    """
    before = resumable.earlier(out)
    if before is None:
        return plan, {}
    resumable.check_plan(before.plan, plan, out)
    shards = encoder.shards()
    valid = {s.index: s for s in before.shards if s.index in shards and s.asked == encoder.asked(s.index)}
    return replace(plan, features=before.plan.features), valid


def _finish(encoder: ShardEncoder, plan: Manifest, out: Path, progress: bool) -> Manifest:
    """The manifest of the folder, written if all shards are valid; else that of the shards so far."""
    plan, shards = _valid(encoder, plan, out)
    if len(shards) < len(encoder.shards()):
        count = sum(shard.count for shard in shards.values())
        say(f"{len(shards)} of {len(encoder.shards())} shards are finished; the other parts make the rest", progress)
        return replace(plan, shards=tuple(shards[k] for k in sorted(shards)), count=count)
    if resumable.is_finished(out):
        return Manifest.load(out)
    if not any(shard.count for shard in shards.values()):
        name, reason = shards[0].skipped[0]
        raise ValueError(
            f"none of the {len(encoder.source)} {plan.unit} is readable; the first: {printable(name)} ({reason})"
        )
    return resumable.finish(out, plan, shards.values())
