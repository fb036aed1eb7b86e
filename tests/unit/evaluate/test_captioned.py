"""Pictures with captions below: nothing of a picture is covered, and captions keep to their width."""

import numpy as np
import pytest

from selftrans.evaluate import captioned, fonts
from selftrans.evaluate.captioned import with_captions, wrap
from selftrans.evaluate.plots import image_grid, sample_sheet

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 1), dtype=np.uint8)


def test_pictures_are_unchanged_above_their_captions():
    found = with_captions(PICTURES, ["a thick three", "", "x"])
    n, height, width, channels = found.shape
    assert (n, channels) == (3, 3) and height > 42 and 40 < width <= captioned.WIDEST
    left = (width - 40) // 2
    assert np.array_equal(found[:, :40, left : left + 40], np.repeat(PICTURES, 3, axis=-1))
    assert (found[:, :40, :left] == 255).all() and (found[:, 40:42] == 255).all()
    dark = (found[:, 42:] < 128).any(axis=(1, 2, 3))
    assert dark.tolist() == [True, False, True], "the second has no caption"


def test_short_names_do_not_widen_pictures_and_long_ones_do_to_a_limit():
    assert with_captions(PICTURES, ["1", "2", "3"]).shape[2] == 40
    long = "a very long sentence about a picture of which much can be said, and then some more of it " * 3
    found = with_captions(PICTURES, [long, "2", "3"])
    assert found.shape[2] == captioned.WIDEST
    assert found.shape[1] == 42 + captioned.LINES * sum(captioned._font(fonts.default().file).getmetrics())


@pytest.mark.parametrize(
    ("text", "width"), [("", 50), ("a b c d", 30), ("word " * 40, 90), ("x" * 200, 60), ("a " + "y" * 90, 60), ("w", 1)]
)
def test_lines_fit_and_hold_the_words_in_order(text, width):
    font = captioned._font(fonts.default().file)
    lines = wrap(text.strip(), width, font)
    assert 1 <= len(lines) <= captioned.LINES
    assert all(font.getlength(line) <= width for line in lines) or width == 1
    joined = "".join(lines).replace(" ", "")
    if joined.endswith("…"):
        assert text.replace(" ", "").startswith(joined[:-1]) and len(lines) == captioned.LINES
    else:
        assert joined == text.replace(" ", "")


def test_sheet_with_captions_is_a_grid_of_captioned_pictures():
    names = ["one", "two", "three"]
    expected = image_grid(with_captions(PICTURES, names), 2, gap=6)
    assert np.array_equal(sample_sheet(PICTURES, 2, captions=names), expected)
    arrays = np.zeros((3, 2, 8, 8), np.float32)
    assert sample_sheet(arrays, captions=names).shape[-1] == 3
    with pytest.raises(ValueError, match="3 pictures but 2 captions; give one for each"):
        sample_sheet(PICTURES, captions=names[:2])
