"""Colors are those of the image's ICC profile, in sRGB."""

import concurrent.futures
import io

import icc_profiles as icc
import numpy as np
import pytest
from PIL import Image, ImageCms

from aurora_jax.data import images


def decoded(image, kind="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return images.open_image(buffer.getvalue())


def one_colour(values, mode="RGB"):
  return Image.new(mode, (4, 4), values)


@pytest.mark.parametrize(
  "name, expected",
  [("Adobe RGB", (0, 161, 47)), ("Display P3", (59, 164, 33)), ("ProPhoto", (0, 187, 37)), (None, (90, 160, 60))],
)
@pytest.mark.parametrize("kind, options", [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_wide_colours(name, expected, kind, options):
  profile = {"icc_profile": icc.rgb(name)} if name else {}
  image = decoded(one_colour((90, 160, 60)), kind, **options, **profile)
  assert image.getpixel((2, 2)) == expected
  assert "icc_profile" not in image.info  # or it would be converted again


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_lossy_formats(kind):
  pixels = np.random.default_rng(2).integers(0, 256, (16, 16, 3), np.uint8)
  profile = icc.rgb("ProPhoto")
  without = decoded(Image.fromarray(pixels), kind)
  source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
  expected = ImageCms.profileToProfile(without, source, ImageCms.createProfile("sRGB"))
  np.testing.assert_array_equal(decoded(Image.fromarray(pixels), kind, icc_profile=profile), expected)


def test_stored_once():
  """What is written after the conversion is read again as it is."""
  image = decoded(one_colour((90, 160, 60)), icc_profile=icc.rgb("Adobe RGB"))
  again = images.open_image(images.encode_png(images.square(image, 2)))
  assert again.getpixel((0, 0)) == (0, 161, 47)


def test_srgb_changes_nothing():
  pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  np.testing.assert_array_equal(decoded(Image.fromarray(pixels), icc_profile=profile), pixels)


@pytest.mark.parametrize(
  "profile",
  [b"", b"noise", icc.rgb("Adobe RGB")[:100], icc.rgb("Adobe RGB")[:-40], b"\0" * 500, icc.cmyk(lambda *_: (0, 0, 0))],
)
def test_profiles_that_say_nothing(profile):
  """A broken one, and one of another kind than the image: the numbers count as they are."""
  assert decoded(one_colour((90, 160, 60)), icc_profile=profile).getpixel((0, 0)) == (90, 160, 60)


def test_with_transparency():
  image = one_colour((90, 160, 60, 255), "RGBA")
  image.putpixel((0, 0), (90, 160, 60, 0))
  image.putpixel((1, 0), (90, 160, 60, 128))
  result = decoded(image, icc_profile=icc.rgb("Adobe RGB"))
  assert result.getpixel((2, 2)) == (0, 161, 47) and result.getpixel((0, 0)) == (255, 255, 255)
  np.testing.assert_allclose(result.getpixel((1, 0)), (127, 208, 151), atol=1)


def test_palette():
  image = Image.new("P", (2, 1))
  image.putpalette([90, 160, 60, 255, 255, 255])
  assert decoded(image, icc_profile=icc.rgb("Adobe RGB")).getpixel((0, 0)) == (0, 161, 47)
  transparent = decoded(image, icc_profile=icc.rgb("Adobe RGB"), transparency=bytes([255, 0]))
  assert transparent.getpixel((0, 0)) == (0, 161, 47)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_greys(mode):
  """A gamma of 1.0: light is proportional to the number."""
  image = one_colour(55, "L") if mode == "L" else one_colour((55, 255), "LA")
  assert decoded(image, icc_profile=icc.grey(0x100)).getpixel((0, 0)) == (128, 128, 128)
  assert decoded(image).getpixel((0, 0)) == (55, 55, 55)


def test_grey_with_a_profile_of_colours():
  # The curve is that of ProPhoto, 1.8: 128 is lighter than in sRGB.
  assert decoded(one_colour(128, "L"), icc_profile=icc.rgb("ProPhoto")).getpixel((0, 0)) == (146, 146, 146)


def printer(c, m, y, k):
  """L, a, b of 8 bits: inks darken, magenta is reddish, yellow yellowish."""
  lightness = 255 * (1 - 0.3 * c) * (1 - 0.4 * m) * (1 - 0.1 * y) * (1 - 0.9 * k)
  return int(lightness), 128 - 30 * c + 60 * m, 128 - 40 * c + 70 * y


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
  profile, inks = icc.cmyk(printer), (0, 255, 0, 0)
  expected = ImageCms.profileToProfile(
    one_colour(inks, "CMYK"),
    ImageCms.ImageCmsProfile(io.BytesIO(profile)),
    ImageCms.createProfile("sRGB"),
    outputMode="RGB",
  ).getpixel((0, 0))
  with_profile = decoded(one_colour(inks, "CMYK"), kind, icc_profile=profile).getpixel((2, 2))
  without = decoded(one_colour(inks, "CMYK"), kind).getpixel((2, 2))
  np.testing.assert_allclose(with_profile, expected, atol=4)
  np.testing.assert_allclose(without, (255, 0, 255), atol=4)
  assert with_profile != without
  # An image of inks with a profile of light: the profile cannot be its own.
  np.testing.assert_allclose(
    decoded(one_colour(inks, "CMYK"), kind, icc_profile=icc.rgb("ProPhoto")).getpixel((2, 2)), without, atol=1
  )


def test_lab():
  lab = ImageCms.applyTransform(
    one_colour((90, 160, 60)),
    ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
  )
  np.testing.assert_allclose(decoded(lab, "TIFF").getpixel((2, 2)), (90, 160, 60), atol=3)


def test_threads_share_a_profile():
  pixels = np.random.default_rng(1).integers(0, 256, (100, 64, 64, 3), np.uint8)
  read = lambda one: np.asarray(decoded(Image.fromarray(one), icc_profile=icc.rgb("ProPhoto")))
  expected = [read(one) for one in pixels]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for ours, theirs in zip(pool.map(read, pixels), expected):
      np.testing.assert_array_equal(ours, theirs)
