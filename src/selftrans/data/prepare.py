"""Pictures ⇒ moments ⇒ shards on disk: decoded by threads ahead of the encoder, resumable shard by shard.

A shard depends on no other, so several processes or machines can each make some (`part`).
Shape legend: N batch, R resolution, M moments channels, (C, H, W) latent.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from selftrans.data import resumable
from selftrans.data.dataset import NUMBERS, Shards
from selftrans.data.manifest import DTYPES, VERSION, Manifest, Option, Shard
from selftrans.data.shard_plan import Decoded, Units
from selftrans.data.sources.decode import shown
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source import ahead
from selftrans.encoders.autoencoder import Autoencoder, autoencoder_name, from_uint8, load_autoencoder

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    autoencoder: str = "pixel",
    resolution: int | None = None,
    flip: bool = False,
    batch_size: int = 64,
    shard_size: int = 8192,
    dtype: str = "float16",
    skip_bad: bool = False,
    device: str | torch.device | None = None,
    precision: str = "float32",
    split: str = "train",
    label_column: str | None = None,
    part: str = "1/1",
    progress: bool = True,
) -> Manifest:
    """Encode a source of pictures (see `open_source`) into a folder of shards, and return its manifest.

    Args:
        resolution: side R to crop and resize to; None keeps that of the pictures.
        flip: store the moments of the mirrored pictures as a second copy.
        dtype: of the stored moments; `precision` is that of the autoencoder's network.
        skip_bad: leave unreadable pictures out, listed in the manifest, in place of stopping at the first.
        split, label_column: for parquet files and data sets of the hub.
        part: "I/N": make every Nth shard only, while other processes or machines make the others in the same folder;
            whichever finds all whole finishes it, and until then the manifest returned is that of the shards so far.
    An interrupted call continues when repeated (with the same batch_size and device to the same bits); a complete one
    is checked against its sha256; a shard that is lost or damaged is made again.
    Raises ValueError for a bad source, picture, autoencoder or option, a folder begun with others, a disk that refuses.
    """
    out = Path(out)
    mine = _check(source, out, batch_size, shard_size, dtype, precision, part)
    before = resumable.earlier(out)
    native = before.plan.resolution if before and before.plan.options.get("resolution") is None else None
    pictures = open_source(
        source, resolution=resolution or native, split=split, label_column=label_column, progress=progress
    )
    options: dict[str, Option] = {
        "autoencoder": autoencoder_name(autoencoder),
        "resolution": resolution,
        "flip": flip,
        "shard_size": shard_size,
        "dtype": dtype,
        "precision": precision,
        "split": split,
        "label_column": label_column,
        "pictures": pictures.fingerprint,
    }
    if before:
        resumable.check_options(before.plan, options, out)
        complete = before.complete and sum(_asked(shard) for shard in before.shards) == len(pictures)
        if complete and not _cleared(out, progress):
            return Manifest.load(out)
    if pictures.ignored:
        say("passed over: " + ", ".join(f"{count} {why}" for why, count in pictures.ignored.items()), progress)
    where, model = _load(autoencoder, device, precision)
    encoder = _Encoder(pictures, batch_size, shard_size, skip_bad, model, where, flip, dtype)
    return _run(encoder, _plan(encoder, str(source), options), out, mine, progress)


def _cleared(out: Path, progress: bool) -> list[str]:
    """Remove the files of a complete folder that fail their sha256, so that they are made again; their names."""
    damaged = list(Shards.open(out).damaged(stored_features=False))
    for name in damaged:
        say(f"{out / name} fails its sha256 and is made again", progress)
        (out / name).unlink()
    if not damaged:
        say(f"{out} is complete already", progress)
    return damaged


def prepare_digits(out: str | Path) -> Shards:
    """The built-in digits as 8x8 pixel shards in `out`, made on the first call, opened on every other."""
    prepare("digits", out, progress=False)
    return Shards.open(out)


@dataclass(frozen=True)
class _Encoder(Units):
    """Pictures by index ⇒ moments as they are stored."""

    autoencoder: Autoencoder
    device: torch.device
    flip: bool
    dtype: str

    @torch.no_grad()
    def encode(self, decoded: Decoded) -> np.ndarray:
        """Moments (N, copies, M, H, W) in the stored dtype. Raises ValueError where they exceed its range."""
        images = np.stack(decoded.images)  # (N, R, R, C)
        if self.autoencoder.name == "pixel":
            return self._look_up(images)
        pixels = from_uint8(torch.from_numpy(images).to(self.device))
        views = (pixels, pixels.flip(dims=(-1,))) if self.flip else (pixels,)
        moments = torch.stack([self.autoencoder.encode(view).stack() for view in views], dim=1)
        stored = moments.to(NUMBERS[self.dtype][0])
        finite = torch.isfinite(stored).flatten(start_dim=1).all(dim=1)
        if not finite.all():
            name = self.source.name(decoded.good[int((~finite).nonzero()[0])])
            raise ValueError(f"{shown(name)}: its moments are too large for {self.dtype}; try --dtype float32")
        return stored.cpu().numpy()

    def _look_up(self, images: np.ndarray) -> np.ndarray:
        """What `encode` gives for pixels, from a table of the 256 values.

        The arithmetic on whole batches would wait at each step for cores that are decoding: ten times slower.
        """
        every = from_uint8(torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1))
        table = every.flatten().to(NUMBERS[self.dtype][0]).numpy()
        planes = images.transpose(0, 3, 1, 2)
        views = (planes, planes[..., ::-1]) if self.flip else (planes,)
        return table[np.ascontiguousarray(np.stack(views, axis=1))]


def _check(
    source: str | Path, out: Path, batch_size: int, shard_size: int, dtype: str, precision: str, part: str
) -> resumable.Part:
    """The part (I, N) of "I/N". Raises ValueError for an option out of range."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"batch_size {batch_size} and shard_size {shard_size} should be 1 or more")
    if str(source) != "digits" and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{out} lies inside the pictures {source}; choose an --out elsewhere")
    return resumable.parse_part(part)


def _load(name: str, device: str | torch.device | None, precision: str) -> tuple[torch.device, Autoencoder]:
    """The autoencoder, and where it runs: by default on a GPU if there is one."""
    if name == "pixel":
        if precision != "float32":
            warnings.warn(f"precision {precision} is ignored: pixels pass through no network", stacklevel=3)
        return torch.device("cpu"), load_autoencoder(name)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return where, load_autoencoder(name, device=where, dtype=PRECISIONS[precision])


def _plan(encoder: _Encoder, source: str, options: dict[str, Option]) -> Manifest:
    """The manifest that will be, without its shards."""
    pictures, model = encoder.source, encoder.autoencoder
    if pictures.resolution % model.downsample:
        raise ValueError(
            f"resolution {pictures.resolution} is not a multiple of {model.downsample}, as {model.name} needs; "
            "give another --resolution"
        )
    side = pictures.resolution // model.downsample
    return Manifest(
        version=VERSION,
        count=0,
        copies=2 if encoder.flip else 1,
        shape=(model.channels or pictures.channels, side, side),
        stochastic=model.stochastic,
        dtype=encoder.dtype,
        scale=model.scale,
        shift=model.shift,
        autoencoder=model.name,
        resolution=pictures.resolution,
        image_channels=pictures.channels,
        classes=pictures.classes,
        source=source,
        options=options,
        shards=(),
    )


def _run(encoder: _Encoder, plan: Manifest, out: Path, part: resumable.Part, progress: bool) -> Manifest:
    """Make the shards of a part that are missing; then, if no other part has any left to make, the manifest."""
    from tqdm import tqdm

    mine = [unit for unit in encoder.units() if unit % part[1] == part[0] - 1]
    with resumable.locked(out, part, mine):
        with resumable.changing(out, part):
            shards = _whole(encoder, plan, out)  # again, now that nobody else writes to them
            if resumable.is_finished(out) and len(shards) == len(encoder.units()):  # meanwhile, by another part
                return Manifest.load(out)
            resumable.begin(out, plan, shards.values())
        missing = [unit for unit in mine if unit not in shards]
        done = sum(encoder.asked(unit) for unit in mine if unit in shards)
        total = sum(encoder.asked(unit) for unit in mine)
        bar = tqdm(total=total, initial=done, unit=" pictures", disable=not progress)
        batches = (batch for unit in missing for batch in encoder.batches(unit))
        with bar, closing(ahead(encoder.decode, batches)) as decoded:
            for unit in missing:
                shards[unit] = _write(encoder, plan, out, unit, decoded, bar.update)
                resumable.record(out, shards[unit])
        with resumable.changing(out, part):
            return _finish(encoder, plan, out, progress)


def _whole(encoder: _Encoder, plan: Manifest, out: Path) -> dict[int, Shard]:
    """The shards in the folder that are whole, by index. ValueError when it was begun as something else."""
    before = resumable.earlier(out)
    if before:
        resumable.check_plan(before.plan, plan, out)
    units = encoder.units()
    return {
        s.index: s
        for s in (before.shards if before else ())
        if s.index in units and _asked(s) == encoder.asked(s.index)
    }


def _finish(encoder: _Encoder, plan: Manifest, out: Path, progress: bool) -> Manifest:
    """The manifest of the folder, written if all shards are whole; else that of the shards so far."""
    shards = _whole(encoder, plan, out)
    if len(shards) < len(encoder.units()):
        count = sum(shard.count for shard in shards.values())
        say(f"{len(shards)} of {len(encoder.units())} shards are whole; the other parts make the rest", progress)
        return replace(plan, shards=tuple(shards[unit] for unit in sorted(shards)), count=count)
    if resumable.is_finished(out):
        return Manifest.load(out)
    if not any(shard.count for shard in shards.values()):
        name, reason = shards[0].skipped[0]
        raise ValueError(f"none of the {len(encoder.source)} pictures is readable; the first: {shown(name)} ({reason})")
    return resumable.finish(out, plan, shards.values())


def _asked(shard: Shard) -> int:
    """How many pictures of the source the shard accounts for."""
    return shard.count + len(shard.skipped)


def _write(
    encoder: _Encoder,
    plan: Manifest,
    out: Path,
    unit: int,
    decoded: Iterator[Decoded],
    advance: Callable[[int], object],
) -> Shard:
    """Encode and write one shard from the next batches of `decoded`."""
    file, labels_file = f"moments-{unit:05d}.bin", f"labels-{unit:05d}.bin"
    skipped: list[tuple[str, str]] = []
    count = 0
    with resumable.beside(out / labels_file) as labels, resumable.beside(out / file) as moments:
        for batch in islice(decoded, len(encoder.batches(unit))):
            skipped += batch.skipped
            if batch.good:
                encoded = encoder.encode(batch)
                assert encoded.shape[1:] == plan.moments_shape, "the autoencoder does not keep to its own sizes"
                moments.write(encoded.astype(NUMBERS[plan.dtype][1], copy=False).data)
                labels.write(encoder.source.labels[batch.good].astype("<i8").data)
                count += len(batch.good)
            advance(batch.asked)
    return Shard(unit, file, count, moments.sha256, labels_file, labels.sha256, tuple(skipped))


def say(text: str, progress: bool) -> None:
    """A line for the person who watches; standard output belongs to the command."""
    if progress:
        print(text, file=sys.stderr)
