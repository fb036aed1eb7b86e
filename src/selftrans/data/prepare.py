"""Pictures, arrays, sounds or videos => moments => shards on disk.

Threads decode ahead of the encoder. Shards are independent: a repeated call makes only the missing ones, and several processes
or machines can each make some of them (`part`).
Shape legend: (C, *S) values of data that are not pictures.
"""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from selftrans.data import resumable
from selftrans.data.dataset import Dataset
from selftrans.data.encode import ShardEncoder
from selftrans.data.encode_captions import CaptionEncoder, TextOptions, check_disk, sizes
from selftrans.data.manifest import Manifest, Shard
from selftrans.data.prepare_options import NETWORK_DTYPES, PrepareOptions
from selftrans.data.reports import check_faults, note_constant, report_source, say, warn_after_reading
from selftrans.data.resolution import size_text
from selftrans.data.shard_plan import Decoded
from selftrans.data.source_samples import source_samples
from selftrans.data.sources.clips import Clips
from selftrans.data.sources.decode import none_readable
from selftrans.data.sources.duplicates import DuplicateFinder
from selftrans.data.sources.source import Samples, Source, ahead
from selftrans.data.standardise import standardise_option, standardised, without_statistics
from selftrans.device import default_device
from selftrans.encoders.autoencoder import Autoencoder, autoencoder_name, has_network, load_autoencoder
from selftrans.encoders.identity import identity_kind
from selftrans.encoders.media import Video
from selftrans.encoders.text import load_text_encoder
from selftrans.messages import are, plural, printable
from selftrans.plain_json import Option
from selftrans.progress import progress_bar

#: built-in source, which a run prepares by itself -> how its captions are stored; None: it has labels instead
BUILT_IN = {"digits": None, "digits_t2i": TextOptions("minilm", tokens=32)}


class NoneReadable(ValueError):
    """Not one sample of a source can be read; its folder has no manifest."""


def prepare(
    source: str | Path,
    out: str | Path,
    options: PrepareOptions | None = None,
    *,
    pictures: Source | None = None,
    **changes: Any,
) -> Manifest:
    """Encode pictures (see `open_source`), sounds or videos (see `open_clips`) into a folder of shards; returns its manifest.

        prepare("pictures", "data", resolution=64, flip=True)

    Args:
        options: None: the defaults. changes: fields of `PrepareOptions` in place of those of `options`.
        pictures: those of `source` to encode, opened at `resolution`; None: all.
    Repeat an interrupted call to continue it (bit-identical for the same batch_size and device), a complete one to check it.
    Raises ValueError for a bad source, sample, autoencoder or option, a folder begun with other options, a failed write.
    """
    given, out = replace(options or PrepareOptions(), **changes), Path(out)
    _check_places(source, out)
    earlier = resumable.earlier(out)
    samples = pictures if pictures is not None else source_samples(source, earlier, given)
    given = replace(given, dtype=given.dtype or _dtype(given.autoencoder, samples))
    recorded = _recorded(samples, given)
    recorded |= standardise_option(
        given.standardise, given.autoencoder, earlier.plan if earlier else None, media=isinstance(samples, Clips)
    )
    if earlier and _finished(earlier, recorded, samples, out, given.progress):
        return Manifest.load(out)
    if pictures is None:
        pixels = identity_kind(given.autoencoder) == "pixel"
        report_source(samples, given.progress, flip=given.flip, pixels=pixels)
    check_faults(samples, source, given.skip_bad)
    encoder = _encoder(samples, given)
    return _run(encoder, encoder.plan(str(source), recorded), out, given, warn=pictures is None)


def prepare_builtin(source: str, out: str | Path) -> Dataset:
    """A source of `BUILT_IN` as pixel shards in `out`: made by the first call, opened by later ones.

    `digits_t2i` takes about a minute on two cores, and 180 MB.
    """
    prepare(source, out, text=BUILT_IN[source], progress=False)
    return Dataset.open(out)


def _check_places(source: str | Path, out: Path) -> None:
    """ValueError for a source without a name, and for a folder of shards inside the source."""
    if not str(source):
        raise ValueError(
            "the source is an empty name; give a folder, a zip, a tar, a parquet file, a hub id, or `digits`"
        )
    if str(source) not in BUILT_IN and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{out} is inside the source folder {source}; choose an --out outside it")


def _dtype(autoencoder: str, samples: Samples) -> str:
    """The default dtype of stored moments: float32 for sounds, whose range is larger than that of pixels, and for values."""
    sound = isinstance(samples, Clips) and not isinstance(samples.media, Video)
    return "float32" if sound or identity_kind(autoencoder) == "values" else "float16"


def _recorded(samples: Samples, given: PrepareOptions) -> dict[str, Option]:
    """Options that the manifest records because a folder must be continued with the same ones."""
    resolution, reading = given.resolution, given.reading
    return {
        "autoencoder": samples.media.kind if isinstance(samples, Clips) else autoencoder_name(given.autoencoder),
        "resolution": size_text(resolution) if isinstance(resolution, tuple) else resolution,
        "fingerprint": samples.fingerprint,
        **(given.text.recorded() if given.text else {}),
        **given.media.given(),
        **({"grey": True} if reading.grey else {}),
        **({"range": "{:g} {:g}".format(*reading.range)} if reading.range else {}),
        **({"labels": Path(reading.labels).name} if reading.labels else {}),
        "flip": given.flip,
        "precision": given.precision,
        "split": given.split or "train",
        "label_column": given.label_column,
        "shard_size": given.shard_size,
        "dtype": given.dtype,
    }


def _encoder(samples: Samples, given: PrepareOptions) -> ShardEncoder:
    """What encodes these samples: their autoencoder, and the text encoder of captions."""
    captions = _caption_encoder(samples, given.text, given) if given.text else None
    name = samples.normalised().name if isinstance(samples, Clips) else given.autoencoder
    # with captions, `precision` is that of the text encoder: pixels and values need no network
    precision = "float32" if given.text and identity_kind(given.autoencoder) else given.precision
    device, autoencoder = load(name, given.device, precision)
    assert given.dtype is not None
    return ShardEncoder(
        samples,
        given.batch_size,
        given.shard_size,
        given.skip_bad,
        autoencoder,
        device,
        given.flip,
        given.dtype,
        captions,
    )


def _caption_encoder(samples: Samples, options: TextOptions, given: PrepareOptions) -> CaptionEncoder:
    """The text encoder, ready for these samples. Says how many captions there are, and what they take on disk."""
    assert samples.captions is not None, "opened with captions"
    encoder = load_text_encoder(
        options.encoder,
        options.tokens,
        device=given.device or default_device(),
        dtype=NETWORK_DTYPES[given.precision],
    )
    text = CaptionEncoder.of(encoder, samples.captions, options)
    say(sizes(text, sum(map(len, samples.captions)) - sum(map(len, text.captions))), given.progress)
    for said in text.lost():
        warnings.warn(said, stacklevel=4)
    return text


def _finished(
    earlier: resumable.Earlier, recorded: dict[str, Option], samples: Samples, out: Path, progress: bool
) -> bool:
    """Whether a folder is complete for these samples; removes files with a wrong sha256, so that they are made again.

    Raises ValueError if it was begun with other options.
    """
    resumable.check_options(earlier.plan, recorded, out)
    if not earlier.complete or sum(shard.asked for shard in earlier.shards) != len(samples):
        return False
    damaged = list(Dataset.open(out).damaged(features=False))
    for name in damaged:
        say(f"{out / name} fails its sha256 and is made again", progress)
        (out / name).unlink()
    if not damaged:
        say(f"{out} is complete already", progress)
    return not damaged


def load(name: str, device: str | torch.device | None, precision: str) -> tuple[torch.device, Autoencoder]:
    """The device (None: a GPU if there is one) and the autoencoder on it."""
    if not has_network(name):
        if precision != "float32":
            warnings.warn(f"precision {precision} is ignored: {name} needs no network", stacklevel=3)
        return torch.device("cpu"), load_autoencoder(name)
    chosen = torch.device(device or default_device())
    return chosen, load_autoencoder(name, device=chosen, dtype=NETWORK_DTYPES[precision])


def _run(encoder: ShardEncoder, plan: Manifest, out: Path, given: PrepareOptions, *, warn: bool) -> Manifest:
    """Make the missing shards of `given.part`; then write the manifest, if the shards of all other parts are finished.

    warn: whether to give the warnings that were collected while decoding; otherwise the source keeps them.
    """
    part, progress = resumable.parse_part(given.part), given.progress
    mine = encoder.shards()[part[0] - 1 :: part[1]]
    with resumable.locked(out, part, mine):
        with resumable.changing(out, part):
            begun, done = _valid(encoder, plan, out)  # read again under the lock
            complete = resumable.is_finished(out) and len(done) == len(encoder.shards())
            if complete and resumable.has_null(out, begun):  # by another part in the meantime
                return Manifest.load(out)
            missing = [shard for shard in mine if shard not in done]
            if encoder.text:
                check_disk(plan, sum(map(encoder.asked, missing)), out)
                if not resumable.has_null(out, begun):
                    begun = replace(begun, text=encoder.text.write_null(out))
            resumable.begin(out, begun, done.values())
        initial = sum(encoder.asked(shard) for shard in mine if shard in done)
        total = sum(encoder.asked(shard) for shard in mine)
        bar = progress_bar(total=total, initial=initial, unit=f" {plan.unit}", disable=not progress)
        duplicates = DuplicateFinder(len(encoder.source), partial=len(missing) < len(encoder.shards()))

        def decode(batch: range) -> Decoded:
            read = encoder.decode(batch)
            duplicates.add(read.good, read.arrays)
            note_constant(encoder.source, read)
            return read

        batches = (batch for shard in missing for batch in encoder.batches(shard))
        with bar, closing(ahead(decode, batches, threads=encoder.threads)) as decoded:
            for shard in missing:
                resumable.record(out, "shard", shard, encoder.write(plan, out, shard, decoded, bar.update))
        with resumable.changing(out, part):
            made = _finish(encoder, plan, out, progress)
        warn_after_reading(encoder.source, made, duplicates, now=warn)
        return made


def _valid(encoder: ShardEncoder, plan: Manifest, out: Path) -> tuple[Manifest, dict[int, Shard]]:
    """The plan with the features and the empty caption that are already stored, and the valid shards in the folder, by index.

    Raises ValueError when the folder was begun with another plan.
    """
    earlier = resumable.earlier(out)
    if earlier is None:
        return plan, {}
    resumable.check_plan(without_statistics(earlier.plan), plan, out)
    shards = encoder.shards()
    valid = {s.index: s for s in earlier.shards if s.index in shards and s.asked == encoder.asked(s.index)}
    return replace(plan, features=earlier.plan.features, text=earlier.plan.text), valid


def _finish(encoder: ShardEncoder, plan: Manifest, out: Path, progress: bool) -> Manifest:
    """The manifest, written to the folder if all shards are valid; else, not written, a manifest of the shards made so far."""
    plan, shards = _valid(encoder, plan, out)
    if len(shards) < len(encoder.shards()):
        count = sum(shard.count for shard in shards.values())
        done = f"{len(shards)} of {plural(len(encoder.shards()), 'shard')} {are(len(shards))} finished"
        say(f"{done}; the other parts make the rest", progress)
        return replace(plan, shards=tuple(shards[k] for k in sorted(shards)), count=count)
    if resumable.is_finished(out):
        return Manifest.load(out)
    if not any(shard.count for shard in shards.values()):
        name, reason = shards[0].skipped[0]
        resumable.discard(out)
        why = f"{printable(name)} ({printable(reason)})"
        raise NoneReadable(none_readable(len(encoder.source), plan.noun, why=why))
    return resumable.finish(out, standardised(plan, out, shards.values(), progress), shards.values())
