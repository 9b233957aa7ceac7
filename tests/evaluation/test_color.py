"""Mean colors and their comparison, on hand-made images."""

import colorsys
import math

import numpy as np
import pytest

from aurora_jax.evaluation import color, figures


@pytest.mark.parametrize("hue", [0, 5, 60, 118, 200, 240, 300, 355])
def test_mean_hue_of_one_color_on_white(hue):
  image = np.ones((16, 16, 3))
  image[4:12, 4:12] = np.array(colorsys.hsv_to_rgb(hue / 360, 0.9, 0.8)) * 2 - 1
  image[3] = -1  # a black outline has no hue
  mean = color.mean_color(image)
  # The hexagonal hue of HSV and the angle used here are equal at multiples of 60 and at most 1.12 degrees apart.
  assert color.hue_difference(mean.hue, hue) < 1.2
  assert mean.share == 64 / 256
  assert np.allclose(mean.rgb, colorsys.hsv_to_rgb(hue / 360, 0.9, 0.8))


def test_mean_hue_goes_round_the_circle():
  image = np.ones((2, 2, 3))
  image[0, 0], image[0, 1] = (np.array(colorsys.hsv_to_rgb(h / 360, 1, 1)) * 2 - 1 for h in (350, 10))
  assert color.hue_difference(color.mean_color(image).hue, 0) < 1e-6


def test_strong_colors_weigh_more():
  image = np.ones((2, 2, 3))
  image[0, 0] = np.array(colorsys.hsv_to_rgb(0, 1, 1)) * 2 - 1
  image[0, 1] = np.array(colorsys.hsv_to_rgb(1 / 3, 0.2, 1)) * 2 - 1
  assert color.hue_difference(color.mean_color(image).hue, 0) < 15


def test_gray_has_no_hue_and_agrees_with_nothing():
  check = color.check_color("red heart", np.zeros((2, 4, 4, 3)), np.broadcast_to([1.0, -1, -1], (4, 4, 3)))
  assert math.isnan(check.generated.hue) and not check.agrees and check.real.hue == 0
  assert figures.color_figures([check]) == {
    "judge/colour/red_heart/hue_real": 0.0,
    "judge/colour/right": 0.0,
    "judge/colour/asked": 1.0,
  }


@pytest.mark.parametrize("hue, agrees", [(230, True), (210, True), (265, False), (0, False)])
def test_colors_agree_within_the_tolerance(hue, agrees):
  real, made = (np.broadcast_to(np.array(colorsys.hsv_to_rgb(h / 360, 1, 1)) * 2 - 1, (4, 4, 3)) for h in (225, hue))
  check = color.check_color("blue circle", made[None], real)
  assert check.agrees is agrees
  found = figures.color_figures([check])
  assert found["judge/colour/right"] == float(agrees)
  assert found["judge/colour/blue_circle/difference"] == pytest.approx(abs((hue - 225 + 180) % 360 - 180), abs=2)


def test_hue_difference():
  assert color.hue_difference(350, 20) == 30 and color.hue_difference(20, 350) == 30
  assert color.hue_difference(0, 180) == 180 and color.hue_difference(90, 90) == 0
