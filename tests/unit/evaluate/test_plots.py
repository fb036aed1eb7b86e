"""Sheets of samples compared with arrays written by hand; contents of figures and of their files."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.lines import Line2D
from PIL import Image

from selftrans.evaluate import plots


def test_image_grid_by_hand() -> None:
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 1, 1), np.uint8)
    grid = plots.image_grid(images, columns=2, upscale=2, gap=1)
    w = 255
    expected = [
        [w] * 7,
        [w, 0, 0, w, 1, 1, w],
        [w, 0, 0, w, 1, 1, w],
        [w] * 7,
        [w, 2, 2, w, w, w, w],
        [w, 2, 2, w, w, w, w],
        [w] * 7,
    ]
    assert grid[..., 0].tolist() == expected
    assert plots.image_grid(np.zeros((10, 4, 4, 3), np.uint8)).shape == (3 * 6 + 2, 4 * 6 + 2, 3)


def test_sheet_of_pictures_is_the_grid_of_small_pictures_enlarged() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(plots.sample_sheet(images), plots.image_grid(images, upscale=10))
    np.testing.assert_array_equal(plots.sample_sheet(images, 5, 3, gap=4), plots.image_grid(images, 5, 3, gap=4))
    large = np.zeros((2, 100, 80, 1), np.uint8)
    np.testing.assert_array_equal(plots.sample_sheet(large), plots.image_grid(large))


def test_sheet_of_volumes_shows_slices_next_to_each_other() -> None:
    volumes = np.random.default_rng(0).normal(size=(3, 2, 5, 4, 6)).astype(np.float32)
    strip = np.concatenate([volumes[:, 0, k] for k in range(5)], axis=-1)  # (n, H, F W)
    expected = np.round((strip - strip.min()) * 255 / np.ptp(strip)).astype(np.uint8)[..., None]
    assert np.abs(plots.as_pictures(volumes).astype(int) - expected).max() <= 1
    long = plots.as_pictures(np.arange(50, dtype=np.float32).reshape(1, 1, 50, 1, 1))
    np.testing.assert_array_equal(long[0, 0, :, 0], np.round(np.linspace(0, 49, 8).round() * 255 / 49))
    assert plots.as_pictures(np.zeros((2, 3, 4, 6), np.float32)).shape == (2, 4, 6, 3), "three channels are colours"
    assert plots.sample_sheet(volumes, upscale=1).shape[-1] == 1


def test_sheet_of_series_shows_a_line_per_channel() -> None:
    series = np.zeros((3, 2, 50), np.float32)
    series[:, 1] = np.linspace(-1, 1, 50)
    pictures = plots.as_pictures(series)
    assert pictures.shape == (3, 96, 160, 3) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(pictures[0], pictures[2])
    blue, red = (
        (np.abs(pictures[0].astype(int) - colour) < 40).all(axis=-1) for colour in ((0, 114, 178), (213, 94, 0))
    )
    assert np.ptp(np.flatnonzero(blue.any(axis=1))) < 4, "a channel of zeros is a level line"
    assert np.ptp(np.flatnonzero(red.any(axis=1))) > 70, "the other one goes from bottom to top"
    assert (
        plots.sample_sheet(series, upscale=5).shape == plots.sample_sheet(series).shape == (2 * 98 + 2, 2 * 162 + 2, 3)
    )


def test_sheet_of_strips_is_about_square() -> None:
    """36 films of 8 frames: 2 columns of 18 rows, not 6 columns, in which nothing can be seen."""
    films = plots.as_pictures(np.zeros((36, 1, 8, 12, 12), np.float32))
    assert films.shape == (36, 12, 96, 1)
    assert plots.image_grid(films, gap=0).shape == (12 * 12, 3 * 96, 1)
    assert plots.image_grid(films.swapaxes(1, 2), gap=0).shape == (3 * 96, 17 * 12, 1)


def test_slice_of_a_volume_is_the_one_that_its_map_shows() -> None:
    """Of 8 frames in tokens of 2 frames, the map shows the third token of four: frames 4 and 5."""
    films = np.arange(8, dtype=np.float32).reshape(1, 1, 8, 1, 1) * np.ones((1, 1, 1, 2, 2), np.float32)
    assert plots.middle_slices(films).shape == (1, 1, 2, 2) and plots.middle_slices(films)[0, 0, 0, 0] == 4
    tokens = films[0].reshape(4, 2, 2, 2).mean(axis=1)[..., None].repeat(3, axis=-1)
    assert plots.flat_map(tokens)[0, 0, 0] == 4.5
    pictures = np.zeros((2, 3, 4, 4), np.float32)
    assert plots.middle_slices(pictures) is pictures


def test_rows_of_maps_are_as_high_as_their_pictures() -> None:
    wide = np.random.default_rng(0).random((2, 2, 4, 3))
    figure = plots.pca_grid({"data": np.zeros((2, 8, 16, 1), np.uint8), "block 1": wide}, cell=1.0)
    square = plots.pca_grid({"data": np.zeros((2, 8, 8, 1), np.uint8), "block 1": wide.repeat(2, 1)}, cell=1.0)
    assert figure.get_size_inches().tolist() == pytest.approx([3.4, 1.1])
    assert square.get_size_inches().tolist() == pytest.approx([3.4, 2.1])
    series = plots.pca_grid({"sound": np.zeros((1, 96, 160, 3), np.uint8), "block 1": wide[:1, 0]}, cell=1.0)
    assert series.get_size_inches().tolist() == pytest.approx([2.4, 0.1 + 0.6 + plots.STRIP])


def figures() -> dict:
    x = [100, 200, 300]
    return {
        "curves": plots.curves(
            {"vanilla": (x, [90, 30, 10.0], [5, 3, 20.0]), "stage 1": (x, [80, 25, 9.0])},
            xlabel="student steps", ylabel="Fréchet distance", logy=True,
        ),
        "maps": plots.pca_grid(
            {"images": np.zeros((2, 8, 8, 1), np.uint8), "block 2": np.random.default_rng(0).random((2, 4, 4, 3))},
            columns=["step 1", "step 2"], title="Maps",
        ),
        "scatter": plots.scatter(np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 10),
    }  # fmt: skip


def test_figures_show_their_data() -> None:
    drawn = figures()
    axes = drawn["curves"].axes[0]
    assert [line.get_label() for line in axes.lines] == ["vanilla", "stage 1"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [90, 30, 10])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("student steps", "Fréchet distance", "log")
    assert len(drawn["maps"].axes) == 4 and drawn["maps"].axes[2].get_ylabel() == "block 2"
    assert len(drawn["scatter"].axes[0].get_legend().get_texts()) == 10


@pytest.mark.parametrize("name", ["curves", "maps", "scatter"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figures_are_saved(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"{name}.{suffix}"
    plots.save(figures()[name], path, dpi=50)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    if suffix == "png":
        picture = np.asarray(Image.open(path).convert("L"))
        assert picture.min() < 100 and picture.max() == 255  # something was drawn, on white
    else:
        assert b"<svg" in path.read_bytes()


def test_figures_as_data_uris(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for image in (picture, picture[..., :1]):
        head, _, content = plots.figure_to_data_uri(image).partition(",")
        assert head == "data:image/png;base64"
        decoded = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        np.testing.assert_array_equal(decoded, image.squeeze())
    plots.save(picture, tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    assert plots.figure_to_data_uri(figures()["curves"]).startswith("data:image/png;base64,iVBOR")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        plots.save(picture, tmp_path / "file" / "c.png")


def test_names_with_dollar_signs_are_not_parsed_as_math(tmp_path: Path) -> None:
    figure = plots.scatter(np.eye(2), np.arange(2), names=["$\\frac$", "a"])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["$\\frac$", "a"]
    plots.save(figure, tmp_path / "a.png")  # an invalid formula would fail here


def test_no_figure_is_left_in_pyplot() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figures()
    assert plt.get_fignums() == before


def test_ticks_are_whole_numbers_where_the_points_are() -> None:
    whole = plots.curves({"t = 0.2": ([1, 2, 3], [0.1, 0.2, 0.3])}, xlabel="block", ylabel="accuracy")
    assert all(tick == round(tick) for tick in whole.axes[0].get_xticks())
    other = plots.curves({"a": ([0.1, 0.2, 0.3], [1, 2, 3])}, xlabel="t", ylabel="loss")
    assert any(tick != round(tick) for tick in other.axes[0].get_xticks())


def test_a_line_behind_another_is_wider() -> None:
    x, y = [1, 2, 3, 4], [0.1, 0.5, 0.7, 0.9]
    series = {"a": (x, y), "b": (x, [0.1, 0.5, 0.2, 0.2]), "c": (x, [0.9, 0.8, 0.3, 0.0]), "d": (x, y)}
    widths = [line.get_linewidth() for line in plots.curves(series, xlabel="x", ylabel="y").axes[0].lines]
    assert widths[0] > widths[1] > widths[2] == widths[3], "d covers a; a part of it covers a part of b"


def test_lines_coincide_by_their_distance_on_the_picture() -> None:
    x, near = [1, 2, 3], [100.0, 1.0, 0.1]
    series = {
        "a": (x, near),
        "b": (x, [90.0, 1.2, 0.12]),
        "c": (x, [100.1, 1.001, 0.1001]),
        "none": (x, [0.0, 0.0, 0.0]),
    }
    widths = {logy: [line.get_linewidth() for line in _lines(series, logy)] for logy in (False, True)}
    assert widths[True][0] > widths[True][1] == widths[True][2], "a fifth more is seen on a logarithmic axis"
    assert widths[False][1] > widths[False][3], "on a linear one, of up to 100, it is not"


def test_many_coinciding_lines_do_not_grow_without_end() -> None:
    lines = _lines({str(k): ([1, 2], [0.1, 0.2]) for k in range(8)}, logy=False)
    assert max(line.get_linewidth() for line in lines) < 6 and lines[-1].get_linewidth() == 1.5


def _lines(series: dict[str, plots.Series], logy: bool) -> list[Line2D]:
    return list(plots.curves(series, xlabel="x", ylabel="y", logy=logy).axes[0].lines)
