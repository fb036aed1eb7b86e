"""Attributes of hand-made images whose thickness, angle, extent and place are known."""

import numpy as np
import pytest

from selftrans.data.sources.digit_attributes import ATTRIBUTES, attributes, levels

SUB = 16  #: positions at which the coverage of a pixel is counted, per side


def rectangle(*, width, length, degrees=0.0, row=0.0, column=0.0, side=16):
    """An antialiased upright rectangle (side, side), turned so that its top moves to the right by `degrees`."""
    at = (np.arange(side * SUB) + 0.5) / SUB - side / 2
    x, y = at[None, :] - column, at[:, None] - row
    angle = np.radians(degrees)
    across, along = x * np.cos(angle) + y * np.sin(angle), -x * np.sin(angle) + y * np.cos(angle)
    inside = (np.abs(across) <= width / 2) & (np.abs(along) <= length / 2)
    return np.rint(inside.reshape(side, SUB, side, SUB).mean(axis=(1, 3)) * 255).astype(np.uint8)


def of(image):
    return {name: float(value[0]) for name, value in attributes(image[None]).items()}


@pytest.mark.parametrize("degrees", [-20, -7.5, 0, 15, 30])
def test_slant_is_the_angle_of_a_bar(degrees):
    # the exact value for a rectangle: moments of its axes l²/12 and w²/12, turned
    a, along, across = np.radians(degrees), 10.0**2 / 12, 1.0 / 12
    exact = np.degrees(
        np.arctan((along - across) * np.sin(a) * np.cos(a) / (along * np.cos(a) ** 2 + across * np.sin(a) ** 2))
    )
    assert abs(exact - degrees) < 1  # the formula is that of a line
    assert of(rectangle(width=1, length=10, degrees=degrees))["slant"] == pytest.approx(exact, abs=0.5)


@pytest.mark.parametrize("degrees", [0, 20, 45, 90])
@pytest.mark.parametrize("width", [1.5, 2, 3])
def test_thickness_is_twice_the_area_over_the_outline(width, degrees):
    image = rectangle(width=width, length=14, degrees=degrees, side=20)
    assert of(image)["thickness"] == pytest.approx(2 * width * 14 / (2 * (width + 14)), rel=0.13)


def test_thickness_does_not_depend_on_grey_edges():
    # the same bar on whole pixels, and half a pixel further, where its edges are grey
    sharp, grey = (of(rectangle(width=2, length=14, column=shift, side=20)) for shift in (0, 0.5))
    assert grey["thickness"] == pytest.approx(sharp["thickness"], rel=0.03)


def test_thickness_of_a_ring_is_its_width():
    at = (np.arange(16 * SUB) + 0.5) / SUB - 8
    radius = np.hypot(at[None, :], at[:, None])
    ring = ((radius > 4) & (radius < 6)).reshape(16, SUB, 16, SUB).mean(axis=(1, 3))
    assert of(np.rint(ring * 255).astype(np.uint8))["thickness"] == pytest.approx(2, rel=0.08)


def test_size_is_the_side_of_a_rectangle():
    for width, length in ((4, 4), (2, 12), (8, 8)):  # on whole pixels
        image = rectangle(width=width, length=length)
        exact = np.sqrt(np.sqrt((width**2 - 1) * (length**2 - 1)))  # pixels are points: (n² - 1) / 12 for n of them
        assert of(image)["size"] == pytest.approx(exact, rel=1e-6)


def test_place_follows_a_shift():
    here, there = of(rectangle(width=3, length=5)), of(rectangle(width=3, length=5, row=-2, column=1.25))
    assert here["row"] == pytest.approx(0, abs=1e-6) and here["column"] == pytest.approx(0, abs=1e-6)
    assert there["row"] == pytest.approx(-2, abs=1e-6) and there["column"] == pytest.approx(1.25, abs=0.01)
    assert there["slant"] == pytest.approx(0, abs=1e-6)


def test_paler_ink_has_the_same_slant_size_and_place():
    image = rectangle(width=2, length=8, degrees=10)
    for name, value in of(image).items():
        if name != "thickness":
            assert of(image // 2)[name] == pytest.approx(value, rel=0.02, abs=0.02)


def test_image_without_ink_and_other_shapes():
    assert of(np.zeros((8, 8), dtype=np.uint8)) == dict.fromkeys(ATTRIBUTES, 0.0)
    stacked = np.stack([rectangle(width=2, length=8), rectangle(width=3, length=8)])
    for name, value in attributes(stacked).items():
        np.testing.assert_array_equal(value, attributes(stacked[..., None])[name])
    for wrong in (stacked.astype(np.float32), stacked[0], np.zeros((1, 8, 8, 3), dtype=np.uint8)):
        with pytest.raises(ValueError, match="uint8 images"):
            attributes(wrong)


def test_levels_are_thirds_of_each_label():
    labels = np.array([0] * 9 + [1] * 6)
    values = {"size": np.concatenate([np.arange(9.0), 100 + np.arange(6.0)[::-1]])}
    assert levels(values, labels)["size"].tolist() == [-1] * 3 + [0] * 3 + [1] * 3 + [1, 1, 0, 0, -1, -1]
