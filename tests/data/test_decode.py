"""Decoding to square pixels: the same from both decoders, and close to decoding every pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import decode, images
from aurora_jax.performance import data_benchmark


@pytest.fixture(name="photo", scope="module")
def _photo():
  return Image.open(io.BytesIO(data_benchmark.synthetic_images(1, 256)[0]))


def jpeg(image, **options):
  buffer = io.BytesIO()
  image.save(buffer, "JPEG", **options)
  return buffer.getvalue()


def by_pillow(monkeypatch, *args):
  with monkeypatch.context() as patch:
    patch.setattr(decode, "_plain_jpeg", lambda *args: None)
    return decode.square_pixels(*args)


@pytest.mark.parametrize("size", [(256, 256), (257, 190), (97, 123), (16, 40)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_both_decoders_give_the_same_pixels(photo, size, mode, monkeypatch):
  for options in ({"quality": 50}, {"quality": 95, "subsampling": 0}, {"progressive": True, "subsampling": 1}):
    data = jpeg(photo.resize(size).convert(mode), **options)
    assert decode._plain_jpeg(data, 16, size, True) is not None
    for side in (1, 7, 24, 64, 300):
      for shrink in (True, False):
        expected = by_pillow(monkeypatch, data, side, size, shrink)
        np.testing.assert_array_equal(decode.square_pixels(data, side, size, shrink), expected)


def test_shrunk_in_the_decoder(photo):
  data = jpeg(photo, quality=90)
  shrunk, full = (decode.square_pixels(data, 64, (256, 256), shrink).astype(float) for shrink in (True, False))
  assert shrunk.shape == (64, 64, 3) and (shrunk != full).any()
  assert 10 * np.log10(255**2 / ((shrunk - full) ** 2).mean()) > 35  # dB


def test_other_formats_are_not_affected(photo):
  data = images.encode_png(photo)
  np.testing.assert_array_equal(decode.square_pixels(data, 64, None, True), decode.square_pixels(data, 64))


def test_what_simplejpeg_would_get_wrong_is_left_to_pillow(photo):
  turned = Image.Exif()
  turned[0x0112] = 6
  wide = photo.crop((0, 0, 256, 128))
  turned_data = jpeg(wide, exif=turned.tobytes())
  assert decode._plain_jpeg(turned_data, 64, None, True) is None
  assert decode._plain_jpeg(jpeg(photo.convert("CMYK")), 64, None, True) is None
  assert decode._plain_jpeg(jpeg(photo, icc_profile=b"not a profile"), 64, None, True) is None
  assert decode._plain_jpeg(jpeg(photo), 64, (255, 256), True) is None
  upright = np.asarray(images.open_image(turned_data))[64:192]
  np.testing.assert_array_equal(decode.square_pixels(turned_data, 128), upright)


@pytest.mark.parametrize("shrink", [True, False])
def test_unreadable(photo, shrink):
  data = jpeg(photo)
  for broken in (b"", data[: len(data) // 2], data[:100], b"\xff\xd8\xff" + bytes(500)):
    with pytest.raises(images.ImageError):
      decode.square_pixels(broken, 64, None, shrink)
  with pytest.raises(images.ImageError, match="256x256 pixels instead of 255x256"):
    decode.square_pixels(data, 64, (255, 256), shrink)
