"""Pictures => features of an external encoder, stored with the shards of moments: the second half of `prepare --features`.

The shards are not changed, so features can be added to a complete folder. The manifest lists them once the features of
all shards are made; until then each file has a record `features-00000.json`. Like the moments, they are made shard by
shard, resumable, and in parts. Shape legend: N batch, T = grid² tokens, D width.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.data import resumable
from selftrans.data.manifest import FILE, REMEDY, FeatureFile, Features, Manifest, Shard
from selftrans.data.prepare_options import NETWORK_DTYPES
from selftrans.data.reports import say
from selftrans.data.resolution import Resolution, check_square, size_text
from selftrans.data.shard_file import WRITE_REMEDY, Layout, is_valid, write_shard
from selftrans.data.shard_plan import Decoded, ShardPlan
from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.clips import kind_of
from selftrans.data.sources.decode import STANDARD, Reading
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import ahead
from selftrans.device import default_device
from selftrans.encoders.autoencoder import from_uint8
from selftrans.encoders.pretrained import encoder_name
from selftrans.encoders.vision import Encoder, load_encoder
from selftrans.messages import plural, printable
from selftrans.plain_json import from_plain, parse_object, read_text
from selftrans.progress import progress_bar
from selftrans.storage import sha256_file, write_text


def prepare_features(
    source: str | Path,
    out: str | Path,
    encoder: str,
    *,
    grid: int | None = None,
    captions: CaptionSource | None = None,
    split: str | None = None,
    reading: Reading = STANDARD,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    precision: str = "float32",
    part: str = "1/1",
    progress: bool = True,
) -> Features:
    """Store the features of a `transformers` vision model with the moments of `prepare(source, out)`.

    Args:
        encoder: hub id or folder. Its network computes in `precision`; features are stored as float16.
        grid: side of the grid of features, one for each token of the student; None: half the side of the latents, which is
            the grid of a student with patch size 2. 16 x 16 features of width 768 take 0.4 MB per picture, twice that with
            mirrored copies.
        captions: where they are, for pictures that were prepared with captions in a file or a column.
        split, reading: as in `prepare`.
        part: "I/N", as in `prepare`: make the features of this part's shards, whose moments must be finished. Until all
            parts have ended, the returned value lists the files made so far.
    To continue an interrupted call, repeat it. A complete folder is not changed; a lost or truncated file is made again.
    Raises ValueError for a folder prepared from other pictures or from data that are not pictures, a folder with other
    features, a bad encoder, and when the folder cannot be written.
    """
    out, mine, earlier = Path(out), resumable.parse_part(part), resumable.earlier(Path(out))
    if earlier is None:
        raise ValueError(f"{out} holds no prepared pictures; run `selftrans prepare` on {source} first")
    manifest, options = earlier.plan, dict[str, Any](earlier.plan.options)
    if not isinstance(size := manifest.resolution, int):
        held = f"pictures of {size_text(size)}, which are not square" if size else "data that are not pictures"
        raise ValueError(f"{out} holds {held}; a vision encoder cannot read them: omit --features")
    given = options.get("split")
    pictures = open_source(  # as they were for their moments
        source,
        resolution=size,
        split=split or (None if given == "train" else given),  # train is recorded where none was given, too
        label_column=options.get("label_column"),
        captions=(captions or CaptionSource()) if manifest.text else None,
        reading=reading,
        progress=progress,
    )
    resumable.check_options(manifest, options | {"fingerprint": pictures.fingerprint}, out)
    _check_options(batch_size, grid, precision)
    if not isinstance(shard_size := options.get("shard_size"), int):
        raise ValueError(f"{FILE}: option 'shard_size' should be an integer, not {shard_size!r}; {REMEDY}")
    side = grid or max(1, manifest.shape[1] // 2)
    # hash and width are known once the encoder is loaded
    wanted = Features(encoder_name(encoder), "", precision, side, width=0, fingerprint=pictures.fingerprint, files=())
    _stored(wanted, out)  # refuse other features before anything is written
    plan = ShardPlan(pictures, batch_size, shard_size, skip_bad=True)
    return _run(plan, wanted, out, mine, torch.device(device or default_device()), progress)


def check_before(
    encoder: str,
    source: str | Path,
    out: str | Path,
    resolution: Resolution | None,
    text: bool,
    frames: int | None,
    other: bool,
    *,
    grid: int | None,
    batch_size: int,
    precision: str,
) -> None:
    """Raise those ValueErrors of `prepare_features` that can be found before the pictures are prepared.

    Args:
        resolution, frames: as given to `prepare`; None: not given. text: whether captions are stored.
        other: whether the data are values or buckets, which have no features.
    """
    if other or kind_of(Path(source), frames, archives=not text) in ("sounds", "videos"):
        raise ValueError("--features is for pictures; leave it out with --buckets, and for data of other kinds")
    check_square(resolution)
    _check_options(batch_size, grid, precision)
    if not (Path(out) / FILE).exists():  # else moments are stored, and perhaps features, too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given again when the encoder is used
            load_encoder(encoder, grid or 1)  # raises for a wrong name, and for a model that is no encoder of pictures


def _check_options(batch_size: int, grid: int | None, precision: str) -> None:
    """Raise ValueError for an option out of range."""
    if batch_size < 1 or (grid is not None and grid < 1):
        raise ValueError(f"batch_size {batch_size} and grid {grid} should be 1 or more")
    if precision not in NETWORK_DTYPES:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(NETWORK_DTYPES)}")


def _run(
    plan: ShardPlan, wanted: Features, out: Path, part: resumable.Part, device: torch.device, progress: bool
) -> Features:
    """Make the missing features of a part; then list them in the manifest, if those of all other parts are finished."""
    mine = [shard for shard in plan.shards() if shard % part[1] == part[0] - 1]
    with resumable.locked(out, part, mine):
        with resumable.changing(out, part):
            manifest, shards, stored = _stored(wanted, out)
            if manifest.features and len(stored) == len(plan.shards()):
                say(f"the features in {out} are complete already", progress)
                return manifest.features
            # records: the manifest lists features once those of all shards are finished
            for features in stored.values():
                _record(out, features)
            if manifest.features:
                resumable.set_features(out, None)
        missing = [shard for shard in mine if shard not in stored]
        for shard in missing:
            if shard not in shards:
                raise ValueError(
                    f"shard {shard} of {out} is not finished; repeat its `selftrans prepare` to finish it first"
                )
        if missing:
            model = load_encoder(wanted.encoder, wanted.grid, device=device, dtype=NETWORK_DTYPES[wanted.precision])
            wanted = replace(wanted, sha256=model.sha256, width=model.width)
            _check_same(stored, wanted, out)
        bar = progress_bar(total=sum(map(plan.asked, missing)), unit=" pictures", disable=not progress)
        batches = (batch for shard in missing for batch in plan.batches(shard))
        with bar, closing(ahead(plan.decode, batches, threads=plan.threads)) as decoded:
            for shard in missing:
                layout, batches_of = wanted.layout(manifest), islice(decoded, len(plan.batches(shard)))
                file = _write(model, device, plan, layout, shards[shard], out, batches_of, bar.update)
                _record(out, replace(wanted, files=(file,)))
        with resumable.changing(out, part):
            return _finish(plan, wanted, out, progress)


def _stored(wanted: Features, out: Path) -> tuple[Manifest, dict[int, Shard], dict[int, Features]]:
    """The folder's plan, its finished shards, and by shard the `Features` of each valid feature file.

    Raises ValueError for other features than `wanted`.
    """
    earlier = resumable.earlier(out)
    assert earlier is not None, "checked by the caller"
    manifest, shards = earlier.plan, {shard.index: shard for shard in earlier.shards}
    records = [manifest.features] if manifest.features else []
    for path in sorted(out.glob("features-*.json")):
        with suppress(ValueError):  # a damaged record is ignored: its features are made again
            records.append(from_plain(Features, parse_object(read_text(path), path.name), path.name))
    by_shard = {file.index: replace(features, files=(file,)) for features in records for file in features.files}
    valid = {
        index: features
        for index, features in by_shard.items()
        if index in shards and is_valid(out / features.files[0].name, features.layout(manifest), shards[index].count)
    }
    _check_same(valid, wanted, out)
    return manifest, shards, valid


def _check_same(stored: dict[int, Features], wanted: Features, out: Path) -> None:
    """Raise ValueError naming the first field in which the features of the folder differ from `wanted`."""
    for features in stored.values():
        for name in ("encoder", "precision", "grid", "fingerprint", "sha256", "width"):
            old, new = getattr(features, name), getattr(wanted, name)
            if old != new and new:  # hash and width are not known before the encoder is loaded
                raise ValueError(
                    f"{out} holds features with {name} {old}, not {new}; repeat the command as it was, delete its "
                    "features-*.* files, or choose another --out"
                )


def _record(out: Path, features: Features) -> None:
    """Record that the features of one shard are finished."""
    write_text(out / f"features-{features.files[0].index:05d}.json", json.dumps(asdict(features)), remedy=WRITE_REMEDY)


def _write(
    model: Encoder,
    device: torch.device,
    plan: ShardPlan,
    layout: Layout,
    shard: Shard,
    out: Path,
    decoded: Iterable[Decoded],
    advance: Callable[[int], object],
) -> FeatureFile:
    """Encode and write one shard's features. ValueError unless the readable pictures are those of its moments."""
    (copies, *_) = layout["features"][1]
    file, absent = FeatureFile(shard.index, ""), {name for name, _ in shard.skipped}
    with write_shard(out / file.name, layout, shard.asked) as rows:
        for batch in decoded:
            for name, reason in batch.skipped:
                if name not in absent:
                    raise ValueError(f"{printable(name)} was readable when its moments were made: {reason}; restore it")
            if batch.good:
                rows.write({"features": _encode(model, device, plan, batch, copies)})
            advance(batch.asked)
        if rows.count != shard.count:
            raise ValueError(
                f"{rows.count} pictures of shard {shard.index} can be read, but {out} holds moments of {shard.count}; restore "
                "the source"
            )
    return replace(file, sha256=sha256_file(out / file.name))


def _encode(model: Encoder, device: torch.device, plan: ShardPlan, batch: Decoded, copies: int) -> np.ndarray:
    """Features (N, copies, T, D) float16. Raises ValueError when they exceed the range of float16."""
    pixels = from_uint8(torch.from_numpy(np.stack(batch.arrays)).to(device))
    views = (pixels, pixels.flip(dims=(-1,)))[:copies]
    features = torch.stack([model.encode(view) for view in views], dim=1).to(torch.float16)
    finite = torch.isfinite(features).flatten(start_dim=1).all(dim=1)
    if not finite.all():
        name = plan.source.name(batch.good[int((~finite).nonzero()[0])])
        raise ValueError(
            f"{printable(name)}: features of {model.name} are too large for float16; choose another encoder"
        )
    return features.cpu().numpy()


def _finish(plan: ShardPlan, wanted: Features, out: Path, progress: bool) -> Features:
    """The features of all shards, once listed in the manifest; otherwise those made so far."""
    *_, stored = _stored(wanted, out)
    files = tuple(stored[index].files[0] for index in sorted(stored))
    so_far = replace(next(iter(stored.values()), wanted), files=files)
    if len(stored) < len(plan.shards()):
        done = f"{len(stored)} of {plural(len(plan.shards()), 'shard')}"
        say(f"features of {done} are finished; the other parts make the rest", progress)
        return so_far
    resumable.set_features(out, so_far)
    for path in out.glob("features-*.json"):
        path.unlink(missing_ok=True)
    return so_far
