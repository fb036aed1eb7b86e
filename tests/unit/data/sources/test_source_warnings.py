"""Deep pictures that use few of their bits are said with the range seen, and read by `range`; classes without samples."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selftrans.data.prepare import prepare
from selftrans.data.reports import report_source
from selftrans.data.sources.captions import CaptionSource
from selftrans.data.sources.clips import MediaOptions, open_clips
from selftrans.data.sources.decode import Reading
from selftrans.data.sources.npz import npz_values
from selftrans.data.sources.open_source import open_source
from selftrans.data.sources.source_warnings import SIDES, dark_pictures, mirrored_captions, source_warnings
from tests.support.clips import save_sound, sine
from tests.support.pictures import encoded, noise, write, zipped


def deep(low: int, high: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).integers(low, high + 1, (8, 8), dtype=np.uint16)
    values[0, :2] = low, high
    return values


@pytest.mark.parametrize(("kind", "ending"), [("PNG", "png"), ("TIFF", "tif"), ("JPEG2000", "jp2")])
def test_twelve_bits_in_sixteen_are_said_and_read_by_range(tmp_path: Path, kind: str, ending: str) -> None:
    pictures = [deep(7, 4095, k) for k in range(3)]
    files = {f"{k}.{ending}": encoded(Image.fromarray(x), kind) for k, x in enumerate(pictures)}
    source = open_source(write(tmp_path / "x", files))
    assert list(dark_pictures(source)) == [
        "pictures of 16 bits use little of their range: values 7 to 4095 of 65535 in 3 of them; they would be nearly black: "
        "give --range 0 4095 if they hold 12 bits"
    ]
    ranged = open_source(tmp_path / "x", reading=Reading(range=(0, 4095)))
    assert list(dark_pictures(ranged)) == []
    for k, values in enumerate(pictures):
        np.testing.assert_array_equal(ranged.read(k)[..., 1], np.rint(values * (255 / 4095)))
        np.testing.assert_array_equal(source.read(k)[..., 1], np.rint(values / 257))


@pytest.mark.parametrize(("high", "bits"), [(200, 8), (1000, 10), (16383, 14)])
def test_number_of_bits_that_is_suggested(tmp_path: Path, high: int, bits: int) -> None:
    source = open_source(write(tmp_path / "x", {"a.png": encoded(Image.fromarray(deep(0, high)))}))
    assert f"--range 0 {2**bits - 1} if they hold {bits} bits" in next(dark_pictures(source))


def test_deep_pictures_among_others_are_found(tmp_path: Path) -> None:
    files = {f"{name}/{name}.png": encoded(noise(8)) for name in ("a", "z")}
    files["m/m.png"] = encoded(Image.fromarray(deep(0, 4095)))
    assert "values 0 to 4095 of 65535 in 1 of them" in next(dark_pictures(open_source(write(tmp_path / "x", files))))


def test_pictures_that_use_their_bits_are_not_mentioned(tmp_path: Path) -> None:
    dark, bright = encoded(Image.fromarray(deep(0, 99))), encoded(Image.fromarray(deep(0, 60_000)))
    assert not list(dark_pictures(open_source(write(tmp_path / "x", {"a.png": dark, "b.png": bright}))))
    assert not list(dark_pictures(open_source(write(tmp_path / "y", {"a.png": encoded(noise(8) // 99)}))))


def test_dark_colour_of_sixteen_bits_is_said(tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + (deep(0, 4095, k)[:3].astype(">u2")).tobytes() for k in range(8))  # 8 x 8 of three values
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    source = open_source(write(tmp_path / "x", {"a.png": data}))
    assert "16 bits in colour use little of their range: at most 15 of 255" in next(dark_pictures(source))
    with pytest.raises(ValueError, match="of 16-bit colours only the upper 8 bits are read, so --range does not apply"):
        open_source(tmp_path / "x", reading=Reading(range=(0, 4095))).read(0)


def test_range_also_reads_floats_and_integers_of_32_bits(tmp_path: Path) -> None:
    values = np.linspace(-1000, 3000, 64, dtype=np.float32).reshape(8, 8)
    values[0, 0] = np.nan
    where = write(tmp_path / "x", {"a.tif": encoded(Image.fromarray(values), "TIFF")})
    with pytest.raises(ValueError, match="no agreed range; give --range LOW HIGH"):
        open_source(where).read(0)
    expected = np.rint(np.clip((values + 500) / 2500, 0, 1) * 255)
    expected[0, 0] = 0
    np.testing.assert_array_equal(open_source(where, reading=Reading(range=(-500, 2000))).read(0)[..., 0], expected)
    where = write(
        tmp_path / "y", {"b.tif": encoded(Image.fromarray(np.nan_to_num(values).round().astype(np.int32)), "TIFF")}
    )
    with pytest.raises(ValueError, match="integers beyond 16 bits; give --range LOW HIGH"):
        open_source(where).read(0)
    found = open_source(where, reading=Reading(range=(-500, 2000))).read(0)[..., 0]
    assert np.abs(found.astype(int) - expected)[1:].max() <= 1
    for wrong in ((1, 1), (5, 2), (0, float("inf")), (float("nan"), 1)):
        with pytest.raises(ValueError, match="should be the value of black, then that of white"):
            open_source(where, reading=Reading(range=wrong))


def test_classes_without_samples_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", data=np.zeros((3, 1, 4), np.float32), labels=np.array([1, 5, 9]))
    source = npz_values(tmp_path / "x.npz")
    assert list(source_warnings(source)) == [
        "7 of 10 classes have no samples: 0, 2, 3, 4, 6, 7, 8; they keep their labels, and samples are drawn from the others "
        "only"
    ]
    with pytest.warns(UserWarning, match="7 of 10 classes have no samples"):
        prepare(tmp_path / "x.npz", tmp_path / "out", autoencoder="values", progress=False)


def test_classes_whose_names_look_the_same_are_named(tmp_path: Path) -> None:
    names = ("Cat", "cat", "caf\u00e9", "cafe\u0301", "dog", "dogs", "wild  cat", "Wild cat")
    source = open_source(write(tmp_path / "x", {f"{name}/a.png": encoded(noise(8)) for name in names}))
    (said,) = source_warnings(source)
    assert ": cafe\u0301 and caf\u00e9, Cat and cat, Wild cat and wild  cat; they are separate classes" in said
    assert len(source.classes) == 8


def test_pictures_that_are_not_read_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_source(write(tmp_path / "x", {"a.png": encoded(noise(8)), "b.heic": b"", "c.txt": b""}))
    with pytest.warns(UserWarning, match=r"are left out: 1 \.heic; convert them, for example to png"):
        report_source(source, progress=True)
    assert capsys.readouterr().err == "2 files are not read: 1 .heic, 1 .txt\n"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report_source(open_source(write(tmp_path / "y", {"a.png": encoded(noise(8))})), progress=True)


def test_sounds_that_are_not_read_are_a_warning(tmp_path: Path) -> None:
    save_sound(tmp_path / "x" / "a.wav", sine(500))
    opened = open_clips(write(tmp_path / "x", {"b.mp3": b"", "c.heic": b""}), MediaOptions())
    assert opened is not None
    assert list(source_warnings(opened)) == [
        "sounds of formats that are not read are left out: 1 .mp3; convert them, for example to wav"
    ]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"labels.csv": b"path,label\nx/a.png,cat"},
            "if a .csv file next to them holds labels, give it by --labels FILE",
        ),
        (
            {"metadata.jsonl": b'{"file_name": "b.png"}', "notes.txt": b"x"},
            "if a .jsonl file next to them holds labels",
        ),
        ({"labels.tsv": "id\tclass\nthe cat\t1".encode("utf-16"), "the cat.png": encoded(noise(8))}, "if a .tsv file"),
        ({"progress.csv": b"a,b\n1,2\n", "info.json": b'{"made by": "b"}'}, None),
        ({"l.csv": b" " * (1 << 16) + b"\na.png,1"}, None),  # beyond what is read
        ({"a.txt": b"x", "b.txt": b"x"}, "if the .txt files next to them hold captions, give --text MODEL"),
        ({"a.caption": b"x", "b.caption": b"x"}, "if the .caption files next to them hold captions"),
        ({"readme.txt": b"x"}, None),
        ({"cat/c.png": encoded(noise(8)), "cat/labels.csv": b""}, None),
    ],
)
def test_files_that_may_hold_labels_or_captions_are_said(
    tmp_path: Path, files: dict[str, bytes], said: str | None
) -> None:
    pictures = {} if "cat/c.png" in files else {"a.png": encoded(noise(8)), "b.png": encoded(noise(8, 1))}
    expected = [f"the pictures have no classes; {said}"] if said else []
    found = list(source_warnings(open_source(write(tmp_path / "x", pictures | files))))
    assert len(found) == len(expected) and all(map(str.startswith, found, expected))
    if "cat/c.png" not in files:
        packed = open_source(zipped(tmp_path / "x.zip", pictures | files))
        assert list(source_warnings(packed)) == found


def test_classes_that_may_be_missing_labels_are_said(tmp_path: Path) -> None:
    pictures = write(tmp_path / "x", {"a.png": encoded(noise(8)), "b.png": encoded(noise(8, 1))})
    (tmp_path / "l.csv").write_text("a.png,None\nb.png,cat\n")
    assert list(source_warnings(open_source(pictures, reading=Reading(labels=tmp_path / "l.csv")))) == [
        "the class None may stand for a missing label; if so, leave such labels empty"
    ]
    folders = write(tmp_path / "y", {"none/a.png": encoded(noise(8)), "cat/b.png": encoded(noise(8))})
    assert list(source_warnings(open_source(folders))) == []


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        *((text, True) for text in ("on the left", "At the right edge", "from the left", "a lefthand door")),
        *((text, True) for text in ("on the right, a cup", "the right side of the road", "a left-handed batter")),
        *(
            (text, False)
            for text in ("on the right track", "to the right people", "at right angles", "at the right time")
        ),
        *((text, True) for text in ("the rightmost cup", "the left-most cup", "a leftward arrow", "looks rightwards")),
        *(
            (text, False)
            for text in ("the right answer is correct", "he left home", "copyright", "all right", "leftover")
        ),
    ],
)
def test_words_that_name_a_side(caption: str, named: bool) -> None:
    assert bool(SIDES.search(caption)) is named


def test_classes_that_differ_in_the_side_are_said_when_pictures_are_mirrored(tmp_path: Path) -> None:
    """Only where both sides are classes: a name that holds such a word for another reason has no counterpart."""
    names = ("turn_Left", "turn_right", "on the right track", "bright", "left")
    source = open_source(write(tmp_path / "x", {f"{name}/{name}.png": encoded(noise(8)) for name in names}))
    said = "that differ in the side: turn_Left and turn_right; leave it out"
    with pytest.warns(UserWarning, match=said) as caught:
        report_source(source, progress=False, flip=True)
    assert len(caught) == 1 and not list(mirrored_captions(source))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report_source(source, progress=False)


def test_sides_in_captions_are_said_when_pictures_are_mirrored(tmp_path: Path) -> None:
    texts = {
        "a.txt": b"a cat to the LEFT\na cat",
        "b.txt": b"the right answer\nleftover",
        "c.txt": b"a right-hand door",
    }
    files = {f"{name}.png": encoded(noise(8)) for name in "abc"} | texts
    source = open_source(write(tmp_path / "x", files), captions=CaptionSource())
    said = "2 of 5 captions say left or right, which is wrong for the mirrored pictures of --flip; leave it out if that matters"
    with pytest.warns(UserWarning, match=said) as caught:
        report_source(source, progress=False, flip=True)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report_source(source, progress=False)
