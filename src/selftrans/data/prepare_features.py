"""Pictures => features of an external encoder, stored with the shards of moments: the second half of `prepare --features`.

The shards are not changed, so features can be added to a complete folder. The manifest lists them once the features of
all shards are made; until then each file has a record `features-00000.json`. Like the moments, they are made shard by
shard, resumable, and in parts. Shape legend: N batch, T = grid² tokens, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selftrans.data import resumable
from selftrans.data.manifest import FILE, REMEDY, FeatureFile, Features, Manifest, Shard
from selftrans.data.prepare_options import NETWORK_DTYPES, PrepareOptions
from selftrans.data.reports import say
from selftrans.data.resolution import check_square, size_text
from selftrans.data.shard_file import Layout, is_valid, stored, write_shard
from selftrans.data.shard_plan import Decoded, ShardPlan
from selftrans.data.source_samples import holds_pictures
from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import ahead
from selftrans.device import default_device
from selftrans.encoders.autoencoder import from_uint8
from selftrans.encoders.pretrained import encoder_name
from selftrans.encoders.vision import Encoder, load_encoder
from selftrans.messages import plural, printable
from selftrans.progress import progress_bar
from selftrans.storage import sha256_file


def prepare_features(
    source: str | Path,
    out: str | Path,
    encoder: str,
    options: PrepareOptions | None = None,
    *,
    grid: int | None = None,
    **changes: Any,
) -> Features:
    """Store the features of a `transformers` vision model with the moments of `prepare(source, out)`.

    Args:
        encoder: hub id or folder. Its network computes in `precision`; features are stored as float16.
        options, changes: as of `prepare`. The folder itself says at which size and with which columns it was prepared.
        grid: side of the grid of features, one for each token of the student; None: half the side of the latents, which is
            the grid of a student with patch size 2. 16 x 16 features of width 768 take 0.4 MB per picture, twice that with
            mirrored copies.
    With `part`, the features of this part's shards are made, whose moments must be finished. Until all parts have ended, the
    returned value lists the files made so far.
    To continue an interrupted call, repeat it. A complete folder is not changed; a lost or truncated file is made again.
    Raises ValueError for a folder prepared from other pictures or from data that are not pictures, a folder with other
    features, a bad encoder, and when the folder cannot be written.
    """
    given, out = replace(options or PrepareOptions(), **changes), Path(out)
    earlier = resumable.earlier(out)
    if earlier is None:
        raise ValueError(f"{out} holds no prepared pictures; run `selftrans prepare` on {source} first")
    manifest, recorded = earlier.plan, dict[str, Any](earlier.plan.options)
    if not isinstance(size := manifest.resolution, int):
        held = f"pictures of {size_text(size)}, which are not square" if size else "data that are not pictures"
        raise ValueError(f"{out} holds {held}; a vision encoder cannot read them: omit --features")
    split = recorded.get("split")
    pictures = open_source(  # as they were for their moments
        source,
        resolution=size,
        split=given.split or (None if split == "train" else split),  # train is recorded where none was given, too
        label_column=recorded.get("label_column"),
        captions=(given.text.source if given.text else CaptionSource()) if manifest.text else None,
        reading=given.reading,
        progress=given.progress,
    )
    resumable.check_options(manifest, recorded | {"fingerprint": pictures.fingerprint}, out)
    _check_grid(grid)
    if not isinstance(shard_size := recorded.get("shard_size"), int):
        raise ValueError(f"{FILE}: option 'shard_size' should be an integer, not {shard_size!r}; {REMEDY}")
    side = grid or max(1, manifest.shape[1] // 2)
    # hash and width are known once the encoder is loaded
    wanted = Features(encoder_name(encoder), "", given.precision, side, 0, pictures.fingerprint, files=())
    _stored(wanted, out)  # refuse other features before anything is written
    return _run(ShardPlan(pictures, given.batch_size, shard_size, skip_bad=True), wanted, out, given)


def check_before(
    source: str | Path, out: str | Path, encoder: str, options: PrepareOptions, *, grid: int | None, buckets: bool
) -> None:
    """Raise those ValueErrors of `prepare_features` that can be found before the pictures are prepared with these options.

    buckets: whether they are prepared in buckets, which have no features.
    """
    if buckets or not holds_pictures(source, options):
        raise ValueError("--features is for pictures; leave it out with --buckets, and for data of other kinds")
    check_square(options.resolution)
    _check_grid(grid)
    if not (Path(out) / FILE).exists():  # else moments are stored, and perhaps features, too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given again when the encoder is used
            load_encoder(encoder, grid or 1)  # raises for a wrong name, and for a model that is no encoder of pictures


def _check_grid(grid: int | None) -> None:
    if grid is not None and grid < 1:
        raise ValueError(f"grid {grid} should be 1 or more")


def _run(plan: ShardPlan, wanted: Features, out: Path, given: PrepareOptions) -> Features:
    """Make the missing features of a part; then list them in the manifest, if those of all other parts are finished."""
    part, progress = resumable.parse_part(given.part), given.progress
    device = torch.device(given.device or default_device())
    mine = plan.shards()[part[0] - 1 :: part[1]]
    with resumable.locked(out, part, mine):
        with resumable.changing(out, part):
            manifest, shards, made = _stored(wanted, out)
            if manifest.features and len(made) == len(plan.shards()):
                say(f"the features in {out} are complete already", progress)
                return manifest.features
            # records: the manifest lists features once those of all shards are finished
            for index, features in made.items():
                resumable.record(out, "features", index, features)
            if manifest.features:
                resumable.set_features(out, None)
        missing = [shard for shard in mine if shard not in made]
        for shard in missing:
            if shard not in shards:
                raise ValueError(
                    f"shard {shard} of {out} is not finished; repeat its `selftrans prepare` to finish it first"
                )
        if missing:
            model = load_encoder(wanted.encoder, wanted.grid, device=device, dtype=NETWORK_DTYPES[wanted.precision])
            wanted = replace(wanted, sha256=model.sha256, width=model.width)
            _check_same(made, wanted, out)
        bar = progress_bar(total=sum(map(plan.asked, missing)), unit=" pictures", disable=not progress)
        batches = (batch for shard in missing for batch in plan.batches(shard))
        with bar, closing(ahead(plan.decode, batches, threads=plan.threads)) as decoded:
            for shard in missing:
                layout, batches_of = wanted.layout(manifest), islice(decoded, len(plan.batches(shard)))
                file = _write(model, device, plan, layout, shards[shard], out, batches_of, bar.update)
                resumable.record(out, "features", shard, replace(wanted, files=(file,)))
        with resumable.changing(out, part):
            return _finish(plan, wanted, out, progress)


def _stored(wanted: Features, out: Path) -> tuple[Manifest, dict[int, Shard], dict[int, Features]]:
    """The folder's plan, its finished shards, and by shard the `Features` of each valid feature file.

    Raises ValueError for other features than `wanted`.
    """
    earlier = resumable.earlier(out)
    assert earlier is not None, "checked by the caller"
    manifest, shards = earlier.plan, {shard.index: shard for shard in earlier.shards}
    listed = [manifest.features] if manifest.features else []
    recorded = (*listed, *resumable.records(out, "features", Features))
    by_shard = {file.index: replace(features, files=(file,)) for features in recorded for file in features.files}
    valid = {
        index: features
        for index, features in by_shard.items()
        if index in shards and is_valid(out / features.files[0].name, features.layout(manifest), shards[index].count)
    }
    _check_same(valid, wanted, out)
    return manifest, shards, valid


def _check_same(made: dict[int, Features], wanted: Features, out: Path) -> None:
    """Raise ValueError naming the first field in which the features of the folder differ from `wanted`."""
    for features in made.values():
        for name in ("encoder", "precision", "grid", "fingerprint", "sha256", "width"):
            old, new = getattr(features, name), getattr(wanted, name)
            if old != new and new:  # hash and width are not known before the encoder is loaded
                raise ValueError(
                    f"{out} holds features with {name} {old}, not {new}; repeat the command as it was, delete its "
                    "features-*.* files, or choose another --out"
                )


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
    features = torch.stack([model.encode(view) for view in views], dim=1)
    too_large = f"features of {model.name} are too large for float16; choose another encoder"
    return stored(features, "float16", lambda row: f"{printable(plan.source.name(batch.good[row]))}: {too_large}")


def _finish(plan: ShardPlan, wanted: Features, out: Path, progress: bool) -> Features:
    """The features of all shards, once listed in the manifest; otherwise those made so far."""
    *_, made = _stored(wanted, out)
    files = tuple(made[index].files[0] for index in sorted(made))
    so_far = replace(next(iter(made.values()), wanted), files=files)
    if len(made) < len(plan.shards()):
        done = f"{len(made)} of {plural(len(plan.shards()), 'shard')}"
        say(f"features of {done} are finished; the other parts make the rest", progress)
        return so_far
    resumable.set_features(out, so_far)
    for path in out.glob("features-*.json"):
        path.unlink(missing_ok=True)
    return so_far
