"""Pictures ⇒ features of an external encoder, beside the shards of moments: the second half of `prepare --features`.

The shards themselves are not touched, so features can be added to a folder that is long complete. Resumable shard by
shard, and shared by parts, as the moments are. Shape legend: N batch, T = grid² tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from selftrans.data import resumable
from selftrans.data.feature_files import FILE, VERSION, FeatureFile, Features
from selftrans.data.manifest import Manifest, Shard
from selftrans.data.prepare import PRECISIONS, say
from selftrans.data.shard_plan import Decoded, Units
from selftrans.data.sources.decode import shown
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import ahead
from selftrans.encoders.autoencoder import from_uint8
from selftrans.encoders.vision import Encoder, encoder_name, load_encoder


def prepare_features(
    source: str | Path,
    out: str | Path,
    encoder: str,
    *,
    grid: int | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    precision: str = "float32",
    part: str = "1/1",
    progress: bool = True,
) -> Features:
    """Store the features of a `transformers` vision model beside the moments of `prepare(source, out)`.

    Args:
        encoder: hub id or folder. Its network computes in `precision`; features are stored as float16.
        grid: side of the grid of features, one for each token of the students; None: half the side of the latents, as of a
            student of patch 2. 16 x 16 features of 768 take 0.4 MB a picture, twice that with mirrored copies.
        part: "I/N", as in `prepare`: the shards of this part, whose moments must be whole. Until all parts have ended,
            what is returned is that of the shards so far.
    An interrupted call continues when repeated; a complete folder is left alone; a lost or cut file is made again.
    Raises ValueError for a folder of other pictures or with other features, a bad encoder, a disk that refuses.
    """
    out, mine, before = Path(out), resumable.parse_part(part), resumable.earlier(Path(out))
    if before is None:
        raise ValueError(f"{out} holds no prepared pictures; run `selftrans prepare` on {source} first")
    plan, options = before.plan, before.plan.options
    label_column = options.get("label_column")
    pictures = open_source(
        source,
        resolution=plan.resolution,
        split=str(options.get("split", "train")),
        label_column=None if label_column is None else str(label_column),
        progress=progress,
    )
    resumable.check_options(plan, options | {"pictures": pictures.fingerprint}, out)
    size = options.get("shard_size")
    if batch_size < 1 or not isinstance(size, int) or (grid is not None and grid < 1) or precision not in PRECISIONS:
        raise ValueError(f"batch_size {batch_size}, grid {grid} or precision {precision!r} cannot be")
    wanted = Features(
        version=VERSION,
        encoder=encoder_name(encoder),
        sha256="",  # known once it is loaded
        precision=precision,
        grid=grid or max(1, plan.shape[1] // 2),
        width=0,
        pictures=pictures.fingerprint,
        files=(),
    )
    _held(plan, wanted, out)  # other features are refused before anything is touched
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return _run(Units(pictures, batch_size, size, skip_bad=True), plan, wanted, out, mine, where, progress)


def _run(
    units: Units,
    plan: Manifest,
    wanted: Features,
    out: Path,
    part: resumable.Part,
    device: torch.device,
    progress: bool,
) -> Features:
    """Make the features of a part that are missing; then, if no other part has any left to make, features.json."""
    from tqdm import tqdm

    mine = [unit for unit in units.units() if unit % part[1] == part[0] - 1]
    with resumable.locked(out, part, mine):
        with resumable.changing(out, part):
            held = _held(plan, wanted, out)
            if (out / FILE).exists() and len(held) == len(units.units()):
                say(f"the features in {out} are complete already", progress)
                return Features.load(out / FILE)
            _begin(held, out)
        missing = [unit for unit in mine if unit not in held]
        shards = _moments(missing, out)
        if missing:
            model = load_encoder(wanted.encoder, wanted.grid, device=device, dtype=PRECISIONS[wanted.precision])
            wanted = replace(wanted, sha256=model.sha256, width=model.width)
            _check_same(held, wanted, out)
        bar = tqdm(total=sum(map(units.asked, missing)), unit=" pictures", disable=not progress)
        batches = (batch for unit in missing for batch in units.batches(unit))
        with bar, closing(ahead(units.decode, batches)) as decoded:
            for unit in missing:
                mine_of = islice(decoded, len(units.batches(unit)))
                file = _write(model, units, plan, shards[unit], out, _counted(mine_of, bar), device)
                resumable.write_text(out / file.record, replace(wanted, files=(file,)).to_json())
        with resumable.changing(out, part):
            return _finish(units, plan, wanted, out, progress)


def _counted(batches: Iterable[Decoded], bar: object) -> Iterator[Decoded]:
    for batch in batches:
        yield batch
        bar.update(batch.asked)  # type: ignore[attr-defined]


def _held(plan: Manifest, wanted: Features, out: Path) -> dict[int, Features]:
    """The whole feature files in the folder, by shard, each with what it says of itself. ValueError for other features."""
    found: list[Features] = []
    if (out / FILE).exists():
        try:
            found.append(Features.load(out / FILE))
        except ValueError as error:
            raise ValueError(f"{out}: {error}; delete the file, and repeat: the features are made again") from error
    for path in sorted(out.glob("features-*.json")):
        with suppress(ValueError):  # a damaged record is no record: its features are made again
            found.append(Features.load(path))
    held = {file.index: replace(each, files=(file,)) for each in found for file in each.files}
    _check_same(held, wanted, out)
    return {index: each for index, each in held.items() if _is_whole(each, plan, out)}


def _is_whole(one: Features, plan: Manifest, out: Path) -> bool:
    path = out / one.files[0].name
    return path.is_file() and path.stat().st_size == one.files[0].count * one.row_bytes(plan)


def _check_same(held: dict[int, Features], wanted: Features, out: Path) -> None:
    """Raise ValueError naming what differs between the features of the folder and those that are to be made."""
    for one in held.values():
        for name in ("encoder", "precision", "grid", "pictures", "sha256", "width"):
            old, new = getattr(one, name), getattr(wanted, name)
            if old != new and new:  # hash and width are not known before the encoder is loaded
                raise ValueError(
                    f"{out} holds features with {name} {old}, not {new}; repeat the command as it was, delete its "
                    f"features-*.* and {FILE}, or choose another --out"
                )


def _begin(held: dict[int, Features], out: Path) -> None:
    """Put the folder in its unfinished state, these files being whole."""
    for one in held.values():
        resumable.write_text(out / one.files[0].record, one.to_json())
    (out / FILE).unlink(missing_ok=True)


def _moments(units: Iterable[int], out: Path) -> dict[int, Shard]:
    """The shards of moments by index. ValueError unless those of `units` are whole."""
    before = resumable.earlier(out)
    shards = {shard.index: shard for shard in (before.shards if before else ())}
    for unit in units:
        if unit not in shards:
            raise ValueError(f"shard {unit} of {out} is not whole; repeat its `selftrans prepare` to finish it first")
    return shards


def _write(
    model: Encoder,
    units: Units,
    plan: Manifest,
    shard: Shard,
    out: Path,
    decoded: Iterable[Decoded],
    device: torch.device,
) -> FeatureFile:
    """Encode and write the features of one shard. ValueError when other pictures are readable than for its moments."""
    count, file = 0, FeatureFile(shard.index, shard.count, "")
    absent = {name for name, _ in shard.skipped}
    with resumable.beside(out / file.name) as stored:
        for batch in decoded:
            for name, reason in batch.skipped:
                if name not in absent:
                    raise ValueError(f"{shown(name)} was readable when its moments were made: {reason}; restore it")
            if batch.good:
                stored.write(_encode(model, units, batch, plan.copies, device).astype("<f2", copy=False).data)
                count += len(batch.good)
        if count != shard.count:
            raise ValueError(
                f"{count} pictures of shard {shard.index} can be read, where {out} holds {shard.count} of it"
            )
    return replace(file, sha256=stored.sha256)


def _encode(model: Encoder, units: Units, batch: Decoded, copies: int, device: torch.device) -> np.ndarray:
    """Features (N, copies, T, D) float16. Raises ValueError where they exceed its range."""
    pixels = from_uint8(torch.from_numpy(np.stack(batch.images)).to(device))
    views = (pixels, pixels.flip(dims=(-1,)))[:copies]
    features = torch.stack([model.encode(view) for view in views], dim=1).to(torch.float16)
    finite = torch.isfinite(features).flatten(start_dim=1).all(dim=1)
    if not finite.all():
        name = units.source.name(batch.good[int((~finite).nonzero()[0])])
        raise ValueError(f"{shown(name)}: features of {model.name} are too large for float16; choose another encoder")
    return features.cpu().numpy()


def _finish(units: Units, plan: Manifest, wanted: Features, out: Path, progress: bool) -> Features:
    """features.json, written if all files are whole; else what there is so far."""
    held = _held(plan, wanted, out)
    files = tuple(held[index].files[0] for index in sorted(held))
    so_far = replace(next(iter(held.values()), wanted), files=files)
    if len(held) < len(units.units()):
        whole = f"{len(held)} of {len(units.units())} shards"
        say(f"features of {whole} are whole; the other parts make the rest", progress)
        return so_far
    resumable.write_text(out / FILE, so_far.to_json())
    for path in out.glob("features-*.json"):
        path.unlink(missing_ok=True)
    return so_far
