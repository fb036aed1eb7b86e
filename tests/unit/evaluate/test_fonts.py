"""Text in pictures: characters that DejaVu Sans lacks come from another font of the machine, or are escaped."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from selftrans.evaluate import fonts, plots
from selftrans.evaluate.fonts import with_captions, wrap
from selftrans.evaluate.plots import image_grid, sample_sheet

CAT = "\u732b"
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 1), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _no_memory():
    def forget():
        fonts._faces.cache_clear()
        fonts.fallbacks.cache_clear()
        fonts._named.clear()

    forget()
    yield
    forget()


@pytest.fixture
def bare(monkeypatch):
    """A machine with the fonts of matplotlib alone."""
    import matplotlib.font_manager as manager

    home = str(Path(fonts.default().file).parent)
    own = [entry for entry in manager.fontManager.ttflist if str(entry.fname).startswith(home)]
    monkeypatch.setattr(manager.fontManager, "ttflist", own)
    monkeypatch.setattr(manager, "findSystemFonts", list)


@pytest.fixture
def chinese(tmp_path, bare, monkeypatch):
    """A machine that has, besides these, a font with a cat and the letters of ASCII: STIX with another character map."""
    import matplotlib.font_manager as manager
    from fontTools.ttLib import TTFont

    font, file = TTFont(fonts.default().file), tmp_path / "cats.ttf"
    for table in font["cmap"].tables:
        if table.isUnicode():
            table.cmap = {k: name for k, name in table.cmap.items() if k < 128} | {ord(CAT): "A"}
    for record in font["name"].names:
        if record.nameID in (1, 4, 16):
            font["name"].setName("Cats", record.nameID, record.platformID, record.platEncID, record.langID)
    font.save(file)
    monkeypatch.setattr(manager, "findSystemFonts", lambda: [str(file)])
    return fonts.Face("Cats", str(file))


def test_nothing_is_lacking_in_alphabets_that_dejavu_has():
    assert fonts.lacking("dog $1$ \u00e9\u0416\u05e2 \U0001f431\nx") == frozenset()
    assert fonts.lacking(f"a{CAT}\x1b\udcff") == {CAT, "\x1b", "\udcff"}


def test_font_with_the_character_is_found_though_matplotlib_does_not_list_it(chinese):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fonts.fallbacks(frozenset(CAT)) == (chinese,)
        assert fonts.class_names(["dog", CAT]) == ["dog", CAT]
        assert fonts.face_for(f"a {CAT}") == (f"a {CAT}", chinese)
        assert fonts.face_for("dog") == ("dog", fonts.default())


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_figure_takes_the_character_from_that_font(chinese, kind, tmp_path):
    figure = plots.scatter(np.eye(2), np.arange(2), names=[CAT, "dog"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a glyph that is missing
        plots.save(figure, tmp_path / f"a.{kind}")
    cat, dog = figure.axes[0].get_legend().get_texts()
    assert cat.get_text() == CAT and cat.get_fontfamily()[-1] == "Cats"
    assert "Cats" not in dog.get_fontfamily()


def test_without_a_font_figures_have_escapes_with_one_warning(bare, tmp_path):
    figure = plots.scatter(np.eye(2), np.arange(2), names=[f"{CAT}s", "dog"], title="$x$ a\nb")
    with pytest.warns(UserWarning, match=f"^no font of this machine has {CAT}: .*install a font") as said:
        plots.save(figure, tmp_path / "a.png")
    assert len(said) == 1
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["\\u732bs", "dog"]
    assert figure.axes[0].get_title(loc="left") == "$x$ a\nb"


def test_without_a_font_classes_have_their_numbers(bare):
    with pytest.warns(UserWarning, match="numbers of classes"):
        assert fonts.class_names(["dog", f"{CAT}s", "a\nb"]) == ["dog", "class 1", "a b"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each character is named once
        assert fonts.class_names(["\u00e9", CAT]) == ["\u00e9", "class 1"]


def test_captions_have_no_boxes(bare):
    pictures = np.zeros((3, 40, 40, 1), np.uint8)
    with pytest.warns(UserWarning, match="no font"):
        found = fonts.with_captions(pictures, [CAT, "a\x1b", "dog"])
    assert np.array_equal(found, fonts.with_captions(pictures, ["\\u732b", "a\\x1b", "dog"]))


def test_captions_use_that_font(chinese):
    pictures = np.zeros((2, 40, 40, 1), np.uint8)
    found = fonts.with_captions(pictures, [CAT, "dog"])
    assert np.array_equal(found, fonts.with_captions(pictures, ["A", "dog"])), "the cat is drawn as A there"


def test_symbols_and_broken_files_are_no_fonts_for_text(bare, tmp_path, monkeypatch):
    import matplotlib.font_manager as manager

    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(manager, "findSystemFonts", lambda: [str(tmp_path / "broken.ttf")])
    assert {face.family for face in fonts._faces()} <= {
        "DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif", "DejaVu Sans Display", "DejaVu Serif Display"
    }  # fmt: skip


def test_pictures_are_unchanged_above_their_captions():
    found = with_captions(PICTURES, ["a thick three", "", "x"])
    n, height, width, channels = found.shape
    assert (n, channels) == (3, 3) and height > 42 and 40 < width <= fonts.WIDEST
    left = (width - 40) // 2
    assert np.array_equal(found[:, :40, left : left + 40], np.repeat(PICTURES, 3, axis=-1))
    assert (found[:, :40, :left] == 255).all() and (found[:, 40:42] == 255).all()
    dark = (found[:, 42:] < 128).any(axis=(1, 2, 3))
    assert dark.tolist() == [True, False, True], "the second has no caption"


def test_short_names_do_not_widen_pictures_and_long_ones_do_to_a_limit():
    assert with_captions(PICTURES, ["1", "2", "3"]).shape[2] == 40
    long = "a very long sentence about a picture of which much can be said, and then some more of it " * 3
    found = with_captions(PICTURES, [long, "2", "3"])
    assert found.shape[2] == fonts.WIDEST
    assert found.shape[1] == 42 + fonts.LINES * sum(fonts._font(fonts.default().file).getmetrics())


@pytest.mark.parametrize(
    ("text", "width"), [("", 50), ("a b c d", 30), ("word " * 40, 90), ("x" * 200, 60), ("a " + "y" * 90, 60), ("w", 1)]
)
def test_lines_fit_and_hold_the_words_in_order(text, width):
    font = fonts._font(fonts.default().file)
    lines = wrap(text.strip(), width, font)
    assert 1 <= len(lines) <= fonts.LINES
    assert all(font.getlength(line) <= width for line in lines) or width == 1
    joined = "".join(lines).replace(" ", "")
    if joined.endswith("…"):
        assert text.replace(" ", "").startswith(joined[:-1]) and len(lines) == fonts.LINES
    else:
        assert joined == text.replace(" ", "")


def test_sheet_with_captions_is_a_grid_of_captioned_pictures():
    names = ["one", "two", "three"]
    expected = image_grid(with_captions(PICTURES, names), 2, gap=6)
    assert np.array_equal(sample_sheet(PICTURES, 2, captions=names), expected)
    arrays = np.zeros((3, 2, 8, 8), np.float32)
    assert sample_sheet(arrays, captions=names).shape[-1] == 3
