"""`selftrans prepare`: its arguments and what it calls; heavy imports happen inside."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import Positional

from selftrans.cli.options import CONTINUES, Command
from selftrans.messages import as_word, escaped

if TYPE_CHECKING:
    from selftrans.data.encode_captions import TextOptions
    from selftrans.data.prepare_options import PrepareOptions


@dataclass
class Prepare(Command):
    """Pictures to shards: centre-crop, resize, encode, store. The same command again continues.

    SOURCE is a folder of class folders, a zip of class folders, a flat folder (no classes), webdataset tars (key.jpg with
    key.cls or key.json), a parquet file, a data set on the hub, or the built-in `digits`. With --text the pictures have
    captions: a folder or zip of name.jpg with name.txt, or with --captions FILE (a csv, or COCO's json), webdataset tars, or
    a table with a column of captions. A folder, zip or tar may also hold sounds (wav, flac) or videos (mp4, webm, mov, mkv,
    avi; gif with --frames) instead of pictures.
    """

    REPEATED = CONTINUES

    source: Positional[str]
    """folder, zip, tar, parquet file, hub id, `digits`, or with --text `digits_t2i`"""
    out: Path
    """directory for the shards"""
    autoencoder: str = "pixel"
    """`pixel`, or a diffusers VAE by hub id or local path (e.g. stabilityai/sd-vae-ft-mse)"""
    resolution: str | None = None
    """side of the pictures, or HEIGHTxWIDTH; None: as they are, which must be of one size"""
    buckets: int | None = None
    """number of aspect ratios from 1:2 to 2:1, odd: each picture goes to the nearest; --resolution is the side of the square"""
    bucket_multiple: int = 2
    """sides of the buckets' latents are multiples of this, the patch size of the models"""
    standardise: bool = True
    """give the latents of pixels, and of --autoencoder values, zero mean and unit variance per channel; a folder that was begun
    without continues so"""
    flip: bool = False
    """store the mirrored pictures too"""
    skip_bad: bool = False
    """leave out unreadable pictures and those without their label or caption, and list them in the manifest"""
    batch_size: int = 64
    """pictures that are encoded at a time"""
    shard_size: int = 8192
    """pictures per shard file"""
    dtype: Literal["float16", "float32"] | None = None
    """dtype of the stored numbers; None: float32 for sounds and --autoencoder values, else float16"""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """precision in which the encoder computes"""
    split: str | None = None
    """split of a data set on the hub (None: train), or of a folder or archive with a part for each split (train/cat, val/cat;
    train-0.tar), of which None reads all"""
    label_column: str | None = None
    """column with the labels (integers or words) of a parquet file, a data set on the hub, or the file of --labels, or field of
    key.json in tars; None: found by its name or type, in tables and tars if it holds integers"""
    labels: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """csv or json with the path and the label (a word, or a number from 0) of each picture of a folder or zip, in place of
    class folders"""
    text: str | None = None
    """store captions, encoded by this model of transformers (CLIP, T5, BERT: openai/clip-vit-large-patch14), or `minilm`"""
    text_tokens: int | None = None
    """tokens of a caption, padding included; None: as many as the encoder takes (CLIP 77), 256 at most"""
    text_dtype: Literal["float16", "bfloat16"] = "float16"
    """dtype of stored tokens"""
    text_store: Literal["tokens", "ids"] = "tokens"
    """store the encoder's output, or its input: ids take little space, and training encodes them on its device"""
    captions: Path | None = None
    """csv, tsv or jsonl with the file name and the caption of each picture of a folder or zip, or an annotation file as
    COCO's; None: in name.txt, name.caption or name.json next to each picture"""
    caption_column: str | None = None
    """column with the captions, texts or lists of texts, of a parquet file, a data set on the hub, or the csv, tsv or jsonl of
    --captions; None: found by its name"""
    captions_per_picture: int = 5
    """the most captions that are kept of a picture"""
    part: str = "1/1"
    """I/N: this process makes every Nth shard, others run the same command with another I (also on other machines)"""
    features: str | None = None
    """also store the features of this vision model (of transformers, by hub id or local path), which --method repa reads"""
    grid: int | None = None
    """side of the grid of features, one for each token of the students; None: half the latents' side, as for patch 2"""
    audio: Literal["waveform", "mel"] | None = None
    """sounds are stored as samples, or as log-mel spectrograms; None: waveform"""
    rate: int | None = None
    """samples per second, to which sounds are resampled; None: as they are, which must be the same for all"""
    length: float | None = None
    """seconds of a sound: longer ones are cut, shorter ones padded with zeros at the end; None: as they are"""
    bins: int | None = None
    """mel bands of a spectrogram; None: 64"""
    hop: int | None = None
    """samples between two frames of a spectrogram (windows are four times as long); None: 16 ms"""
    frames: int | None = None
    """frames of a video, read from its start"""
    grey: bool = False
    """store pictures or videos in grey instead of RGB: one channel in place of three"""
    range: tuple[float, float] | None = None
    """LOW HIGH: the values of black and white in pictures of more than 8 bits (0 4095 for 12 bits, or of float TIFFs);
    None: all bits"""
    max_pixels: int = 200_000_000
    """largest number of pixels of a picture or frame; larger ones are refused"""
    allow_empty: bool = False
    """class folders without pictures become classes without data"""

    streaming: bool = False
    """read the rows of a parquet file or a data set on the hub in order, without a copy of them on the disk; columns of labels
    or captions are read first. Needs --resolution"""

    def run(self) -> None:
        from selftrans.data.buckets import is_prepared
        from selftrans.data.prepare import prepare
        from selftrans.data.prepare_buckets import prepare_buckets
        from selftrans.data.prepare_features import check_before, prepare_features
        from selftrans.precision import dtype_name

        if self.grid and not self.features:
            warnings.warn("--grid is ignored without --features", stacklevel=2)
        options = self._options()
        if self.features:
            buckets = self.buckets is not None
            check_before(self.source, self.out, self.features, options, grid=self.grid, buckets=buckets)
        if self.buckets is not None:
            print(prepare_buckets(self.source, self.out, options, buckets=self.buckets, multiple=self.bucket_multiple))
        else:
            manifest = prepare(self.source, self.out, options)
            print(manifest.summary())
            if self.features:
                options = dataclasses.replace(options, precision=dtype_name(self.precision))
                features = prepare_features(self.source, self.out, self.features, options, grid=self.grid)
                print(features.summary(manifest))
        if is_prepared(self.out):  # with --part, after the last one
            recipe, data = "imagefolder_t2i" if self.text else "imagefolder", as_word(self.out)
            print(f"-> {escaped(self.out)}; next: selftrans train {recipe} --data {data} --out RUN")

    def _options(self) -> PrepareOptions:
        from selftrans.data.prepare_options import PrepareOptions
        from selftrans.data.resolution import parse_resolution
        from selftrans.data.sources.clips import MediaOptions
        from selftrans.data.sources.decode import Reading
        from selftrans.encoders.identity import identity_kind
        from selftrans.precision import dtype_name

        only_features = self.features and identity_kind(self.autoencoder) == "pixel" and not self.text
        return PrepareOptions(
            resolution=None if self.resolution is None else parse_resolution(self.resolution),
            square=bool(self.features),
            split=self.split,
            label_column=self.label_column,
            reading=Reading(
                self.max_pixels,
                self.range,
                self.allow_empty,
                self.streaming,
                self.labels,
                self.label_column if self.labels else None,
                self.grey,
            ),
            media=MediaOptions(**{each.name: getattr(self, each.name) for each in dataclasses.fields(MediaOptions)}),
            skip_bad=self.skip_bad,
            autoencoder=self.autoencoder,
            text=self._text(),
            flip=self.flip,
            batch_size=self.batch_size,
            precision="float32" if only_features else dtype_name(self.precision),
            standardise=None if self.standardise else False,
            dtype=self.dtype,
            shard_size=self.shard_size,
            part=self.part,
        )

    def _text(self) -> TextOptions | None:
        """The options of captions; None without --text. Warns of options that are ignored then."""
        from selftrans.data.encode_captions import TextOptions
        from selftrans.data.sources.captions import CaptionSource

        if self.text is None:
            for name in ("text_tokens", "captions", "caption_column"):
                if getattr(self, name) is not None:
                    warnings.warn(f"--{name.replace('_', '-')} is ignored without --text", stacklevel=3)
            return None
        source = CaptionSource(self.captions, self.caption_column)
        return TextOptions(
            self.text, self.text_tokens, self.text_dtype, self.text_store, source, self.captions_per_picture
        )
