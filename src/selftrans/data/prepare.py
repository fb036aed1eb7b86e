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

import torch

from selftrans.data import resumable
from selftrans.data.dataset import Dataset
from selftrans.data.encode import ShardEncoder
from selftrans.data.encode_captions import CaptionEncoder, TextOptions, check_disk, sizes
from selftrans.data.manifest import DTYPES, Manifest, Shard
from selftrans.data.reports import check_faults, report_source, say, warn_after_reading
from selftrans.data.resolution import Resolution, size_text
from selftrans.data.shard_plan import Decoded
from selftrans.data.source_samples import source_samples, with_grey
from selftrans.data.sources.clips import Clips, MediaOptions
from selftrans.data.sources.decode import STANDARD, Reading, none_readable
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
from selftrans.precision import PRECISIONS, dtype_name
from selftrans.progress import progress_bar

#: built-in source, which a run prepares by itself -> how its captions are stored; None: it has labels instead
BUILT_IN = {"digits": None, "digits_t2i": TextOptions("minilm", tokens=32)}
NETWORK_DTYPES = {dtype_name(name): dtype for name, dtype in PRECISIONS.items()}  #: "float32", ... -> torch dtype


class NoneReadable(ValueError):
    """Not one sample of a source can be read; its folder has no manifest."""


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    autoencoder: str = "pixel",
    resolution: Resolution | None = None,
    flip: bool = False,
    batch_size: int = 64,
    shard_size: int = 8192,
    dtype: str | None = None,
    standardise: bool | None = None,
    skip_bad: bool = False,
    device: str | torch.device | None = None,
    precision: str = "float32",
    split: str | None = None,
    label_column: str | None = None,
    text: TextOptions | str | None = None,
    part: str = "1/1",
    media: MediaOptions | None = None,
    reading: Reading = STANDARD,
    pictures: Source | None = None,
    square: bool = False,
    progress: bool = True,
) -> Manifest:
    """Encode pictures (see `open_source`), sounds or videos (see `open_clips`) into a folder of shards; returns its manifest.

    Args:
        autoencoder: with "values" the source holds arrays that are not pictures (see `npz_values`, `npy_values`).
        resolution: side, or (height, width), to crop and resize to; None keeps the size. square: refuse other shapes.
        flip: store the moments of the mirrored pictures as a second copy.
        dtype: of the stored moments; None: float32 for values and sounds, else float16. precision: of the network.
        standardise: whether latents get zero mean and unit variance per channel; None: see `standardise_option`.
        skip_bad: skip unreadable samples and list them in the manifest, instead of stopping at the first.
        split: of a hub data set (None: train) or a folder (None: all). label_column: of tables. reading: see `Reading`.
        text: store captions (see `open_source`), with this text encoder (see `load_text_encoder`) or with these options.
        media: how sounds and videos are read. pictures: those of `source` to encode, opened at `resolution`; None: all.
        part: "I/N": make every Nth shard only; other processes make the others in the same folder. The part that ends
            last writes the manifest. Until then, the returned manifest lists the shards made so far.
    Repeat an interrupted call to continue it (bit-identical for the same batch_size and device), a complete one to check it.
    Raises ValueError for a bad source, sample, autoencoder or option, a folder begun with other options, a failed write.
    """
    text, out = TextOptions(text) if isinstance(text, str) else text, Path(out)
    media, reading = with_grey(media, reading)
    mine, earlier = _checked_part(source, out, batch_size, shard_size, dtype, precision, part), resumable.earlier(out)
    samples = pictures if pictures is not None else source_samples(
        source, earlier, autoencoder=autoencoder, resolution=resolution, flip=flip, split=split, label_column=label_column,
        text=text, media=media, reading=reading, square=square, progress=progress,
    )  # fmt: skip
    dtype, of_media = dtype or _dtype(autoencoder, samples), isinstance(samples, Clips)
    options = _options(samples, autoencoder, resolution, text, media, reading) | {"flip": flip, "precision": precision}
    options |= {"split": split or "train", "label_column": label_column, "shard_size": shard_size, "dtype": dtype}
    options |= standardise_option(standardise, autoencoder, earlier.plan if earlier else None, media=of_media)
    if earlier and _finished(earlier, options, samples, out, progress):
        return Manifest.load(out)
    if pictures is None:
        report_source(samples, progress, flip=flip, pixels=identity_kind(autoencoder) == "pixel")
    check_faults(samples, source, skip_bad)
    captions, device, model = _networks(samples, autoencoder, text, device, precision, progress)
    encoder = ShardEncoder(samples, batch_size, shard_size, skip_bad, model, device, flip, dtype, captions)
    return _run(encoder, encoder.plan(str(source), options), out, mine, progress, pictures is None)


def prepare_builtin(source: str, out: str | Path) -> Dataset:
    """A source of `BUILT_IN` as pixel shards in `out`: made by the first call, opened by later ones.

    `digits_t2i` takes about a minute on two cores, and 180 MB.
    """
    prepare(source, out, text=BUILT_IN[source], progress=False)
    return Dataset.open(out)


def _checked_part(
    source: str | Path, out: Path, batch_size: int, shard_size: int, dtype: str | None, precision: str, part: str
) -> resumable.Part:
    """Check the options of `prepare`; returns the part (I, N) of "I/N". ValueError for an option out of range."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if precision not in NETWORK_DTYPES:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(NETWORK_DTYPES)}")
    if batch_size < 1 or shard_size < 1:
        raise ValueError(f"batch_size {batch_size} and shard_size {shard_size} should be 1 or more")
    if not str(source):
        raise ValueError(
            "the source is an empty name; give a folder, a zip, a tar, a parquet file, a hub id, or `digits`"
        )
    if str(source) not in BUILT_IN and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{out} is inside the source folder {source}; choose an --out outside it")
    return resumable.parse_part(part)


def _dtype(autoencoder: str, samples: Samples) -> str:
    """The default dtype of stored moments: float32 for sounds, whose range is larger than that of pixels, and for values."""
    sound = isinstance(samples, Clips) and not isinstance(samples.media, Video)
    return "float32" if sound or identity_kind(autoencoder) == "values" else "float16"


def _options(
    samples: Samples,
    autoencoder: str,
    resolution: Resolution | None,
    text: TextOptions | None,
    media: MediaOptions,
    reading: Reading,
) -> dict[str, Option]:
    """Options that the manifest records because a folder must be continued with the same ones; `prepare` adds more."""
    return {
        "autoencoder": samples.media.kind if isinstance(samples, Clips) else autoencoder_name(autoencoder),
        "resolution": size_text(resolution) if isinstance(resolution, tuple) else resolution,
        "fingerprint": samples.fingerprint,
        **(text.recorded() if text else {}),
        **media.given(),
        **({"range": "{:g} {:g}".format(*reading.range)} if reading.range else {}),
        **({"labels": Path(reading.labels).name} if reading.labels else {}),
    }


def _networks(
    samples: Samples,
    autoencoder: str,
    text: TextOptions | None,
    device: str | torch.device | None,
    precision: str,
    progress: bool,
) -> tuple[CaptionEncoder | None, torch.device, Autoencoder]:
    """The text encoder of samples with captions, and their autoencoder with the device that it is on."""
    captions = _load_text(samples, text, device, precision, progress) if text else None
    name = samples.normalised().name if isinstance(samples, Clips) else autoencoder
    return captions, *load(name, device, "float32" if text and identity_kind(autoencoder) else precision)


def _load_text(
    samples: Samples, options: TextOptions, device: str | torch.device | None, precision: str, progress: bool
) -> CaptionEncoder:
    """The text encoder, ready for these samples. Says how many captions there are, and what they take on disk."""
    assert samples.captions is not None, "opened with captions"
    encoder = load_text_encoder(
        options.encoder, options.tokens, device=device or default_device(), dtype=NETWORK_DTYPES[precision]
    )
    text = CaptionEncoder.of(encoder, samples.captions, options)
    say(sizes(text, sum(map(len, samples.captions)) - sum(map(len, text.captions))), progress)
    for said in text.lost():
        warnings.warn(said, stacklevel=3)
    return text


def _finished(
    earlier: resumable.Earlier, options: dict[str, Option], samples: Samples, out: Path, progress: bool
) -> bool:
    """Whether a folder is complete for these samples; removes files with a wrong sha256, so that they are made again.

    Raises ValueError if it was begun with other options.
    """
    resumable.check_options(earlier.plan, options, out)
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


def _run(
    encoder: ShardEncoder, plan: Manifest, out: Path, part: resumable.Part, progress: bool, warn: bool
) -> Manifest:
    """Make the missing shards of a part; then write the manifest, if the shards of all other parts are finished.

    warn: whether to give the warnings that were collected while decoding; otherwise the source keeps them.
    """
    mine = [shard for shard in encoder.shards() if shard % part[1] == part[0] - 1]
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
            return read

        batches = (batch for shard in missing for batch in encoder.batches(shard))
        with bar, closing(ahead(decode, batches, threads=encoder.threads)) as decoded:
            for shard in missing:
                resumable.record(out, encoder.write(plan, out, shard, decoded, bar.update))
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
