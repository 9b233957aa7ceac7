"""Images of every mode come out as RGB, upright, on white."""

import io
import struct
import subprocess
import sys
import zlib

import icc_profiles as icc
import numpy as np
import pytest
from PIL import Image

from aurora_jax.data import images


def encoded(image, kind="PNG", **options):
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def png(width, height, depth, colour_type, rows, *chunks):
  """A PNG by hand, for what Pillow cannot write; `rows` without filter bytes."""

  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
  data = zlib.compress(b"".join(b"\0" + row for row in rows))
  return b"".join(
    [
      b"\x89PNG\r\n\x1a\n",
      chunk(b"IHDR", header),
      *(chunk(*extra) for extra in chunks),
      chunk(b"IDAT", data),
      chunk(b"IEND", b""),
    ]
  )


def decode(data):
  pixels = images.decode_image(data)
  assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
  return pixels


RED, WHITE, PINK = [255, 0, 0], [255, 255, 255], [255, 127, 127]


def test_rgb_is_exact():
  pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels))), pixels)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "WEBP"])
def test_other_formats(kind):
  image = Image.new("RGB", (4, 4), (255, 0, 0))
  pixels = decode(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
  np.testing.assert_array_equal(pixels, np.broadcast_to(RED, (4, 4, 3)))


def test_grey():
  image = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
  np.testing.assert_array_equal(decode(encoded(image)), [[[0] * 3, [100] * 3, [255] * 3]])


def test_one_bit():
  image = Image.fromarray(np.array([[True, False]]))
  np.testing.assert_array_equal(decode(encoded(image)), [[WHITE, [0, 0, 0]]])


def test_grey_with_alpha_on_white():
  image = Image.new("LA", (3, 1))
  for x, alpha in enumerate((255, 0, 128)):
    image.putpixel((x, 0), (0, alpha))
  np.testing.assert_array_equal(decode(encoded(image)), [[[0] * 3, WHITE, [127] * 3]])


def test_colour_with_alpha_on_white():
  image = Image.new("RGBA", (3, 1))
  for x, alpha in enumerate((255, 0, 128)):
    image.putpixel((x, 0), (255, 0, 0, alpha))
  np.testing.assert_array_equal(decode(encoded(image)), [[RED, WHITE, PINK]])


def test_palette():
  image = Image.new("P", (2, 1))
  image.putpalette([255, 0, 0, 0, 0, 255])
  image.putpixel((1, 0), 1)
  np.testing.assert_array_equal(decode(encoded(image)), [[RED, [0, 0, 255]]])


@pytest.mark.parametrize(
  "transparency, expected",
  [
    (0, [[WHITE, [0, 0, 255]]]),
    (bytes([128, 255]), [[PINK, [0, 0, 255]]]),
    (bytes([255, 0]), [[RED, WHITE]]),
  ],
)
def test_palette_with_transparency(transparency, expected):
  image = Image.new("P", (2, 1))
  image.putpalette([255, 0, 0, 0, 0, 255])
  image.putpixel((1, 0), 1)
  np.testing.assert_array_equal(decode(encoded(image, transparency=transparency)), expected)


def test_gif_with_transparency_shows_its_first_frame():
  first, second = Image.new("P", (2, 2), 0), Image.new("P", (2, 2), 1)
  for frame in (first, second):
    frame.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
  first.putpixel((0, 0), 2)
  data = encoded(first, "GIF", save_all=True, append_images=[second], transparency=2)
  np.testing.assert_array_equal(decode(data), [[WHITE, RED], [RED, RED]])


def test_one_transparent_colour():
  image = Image.fromarray(np.array([[RED, [1, 2, 3]]], np.uint8))
  np.testing.assert_array_equal(decode(encoded(image, transparency=(1, 2, 3))), [[RED, WHITE]])


@pytest.mark.parametrize(
  "inks, colour",
  [
    ((0, 0, 0, 0), WHITE),
    ((0, 255, 255, 0), RED),
    ((0, 0, 0, 255), [0, 0, 0]),
    ((255, 0, 0, 0), [0, 255, 255]),
  ],
)
def test_cmyk_jpeg(inks, colour):
  data = encoded(Image.new("CMYK", (16, 16), inks), "JPEG", quality=95)
  assert Image.open(io.BytesIO(data)).mode == "CMYK"
  np.testing.assert_allclose(decode(data), np.broadcast_to(colour, (16, 16, 3)), atol=6)


def test_sixteen_bit_grey():
  values = np.array([[0, 200, 257, 128 * 257, 65535, 65535 - 128]], np.uint16)
  data = encoded(Image.fromarray(values))
  assert Image.open(io.BytesIO(data)).mode.startswith("I")
  np.testing.assert_array_equal(decode(data)[0, :, 0], [0, 1, 1, 128, 255, 255])


def test_sixteen_bit_colour():
  row = struct.pack(">6H", 65535, 0, 128 * 257, 0, 257, 65535)
  np.testing.assert_array_equal(decode(png(2, 1, 16, 2, [row])), [[[255, 0, 128], [0, 1, 255]]])


def test_sixteen_bit_colour_with_alpha():
  row = struct.pack(">8H", 65535, 0, 0, 65535, 65535, 0, 0, 0)
  np.testing.assert_array_equal(decode(png(2, 1, 16, 6, [row])), [[RED, WHITE]])


def test_sixteen_bit_grey_with_alpha():
  row = struct.pack(">4H", 100 * 257, 65535, 0, 0)
  np.testing.assert_array_equal(decode(png(2, 1, 16, 4, [row])), [[[100] * 3, WHITE]])


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bit_tiff(mode):
  values = np.array([[0, 128 * 257, 65535]], "<u2" if mode == "I;16" else ">u2")
  image = Image.frombytes(mode, (3, 1), values.tobytes())
  np.testing.assert_array_equal(decode(encoded(image, "TIFF"))[0, :, 0], [0, 128, 255])


def test_twelve_bit_tiff():
  """As cameras and microscopes write it: three bytes for two values."""
  values = [0, 2048, 4095, 1024]
  packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in zip(values[::2], values[1::2]))
  entries = ((256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 12 * 9 + 4), (277, 1), (278, 1), (279, 6))
  directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
  data = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + b"\0" * 4 + packed
  np.testing.assert_array_equal(decode(data)[0, :, 0], [0, 128, 255, 64])


def test_sixteen_bit_grey_with_a_transparent_value():
  row = struct.pack(">2H", 257, 100 * 257)
  data = png(2, 1, 16, 0, [row], (b"tRNS", struct.pack(">H", 257)))
  np.testing.assert_array_equal(decode(data), [[WHITE, [100] * 3]])


@pytest.mark.parametrize(
  "values, expected",
  [
    ([0, 0.5, 1], [0, 128, 255]),
    ([-0.2, 0.25, 0.999], [0, 64, 255]),
    ([0, 100.4, 255], [0, 100, 255]),
    ([0, 32767.5, 65535], [0, 128, 255]),
    ([0, 0, 0], [0, 0, 0]),
  ],
)
def test_floats(values, expected):
  data = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
  np.testing.assert_array_equal(decode(data)[0, :, 0], expected)


@pytest.mark.parametrize("values, words", [([0, np.nan], "not finite"), ([0, 1e6], "its values go from 0 to 1e")])
def test_floats_that_are_no_image(values, words):
  with pytest.raises(images.ImageError, match=f"not a readable image: .*{words}"):
    images.decode_image(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))


@pytest.mark.parametrize(
  "orientation, expected",
  [
    (1, [[1, 2, 3], [4, 5, 6]]),
    (2, [[3, 2, 1], [6, 5, 4]]),
    (3, [[6, 5, 4], [3, 2, 1]]),
    (6, [[4, 1], [5, 2], [6, 3]]),
    (8, [[3, 6], [2, 5], [1, 4]]),
  ],
)
def test_upright(orientation, expected):
  image = Image.fromarray(np.array([[10, 20, 30], [40, 50, 60]], np.uint8))
  exif = Image.Exif()
  exif[0x0112] = orientation
  np.testing.assert_array_equal(decode(encoded(image, exif=exif))[..., 0], 10 * np.array(expected))


def test_upright_jpeg():
  pixels = np.zeros((16, 32, 3), np.uint8)
  pixels[:, 16:] = 255  # black on the left, white on the right; turned by 90 degrees clockwise: black on top
  exif = Image.Exif()
  exif[0x0112] = 6
  upright = decode(encoded(Image.fromarray(pixels), "JPEG", quality=95, exif=exif))
  assert upright.shape == (32, 16, 3)
  assert upright[:15].max() < 20 and upright[17:].min() > 235


def test_broken_exif_does_not_cost_the_picture():
  data = encoded(Image.new("RGB", (8, 8), (255, 0, 0)), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff broken")
  np.testing.assert_allclose(decode(data), np.broadcast_to(RED, (8, 8, 3)), atol=6)


def many(length):
  """Compresses to next to nothing."""
  return zlib.compress(b"x" * length)


@pytest.mark.parametrize(
  "chunks",
  [
    [(b"tEXt", b"Comment\0" + b"x" * 5_000_000)],
    [(b"zTXt", b"Comment\0\0" + many(5_000_000))],
    [(b"zTXt", b"Comment\0\0" + many(60_000_000))],
    [(b"iTXt", b"Comment\0\1\0\0\0" + many(30_000_000))] * 4,
    [(b"zTXt", b"Comment\0\0not compressed at all")],
    [(b"iCCP", b"profile\0\0" + many(5_000_000))],
    [(b"iCCP", b"profile\0\0" + many(60_000_000))],
    [(b"iCCP", b"profile\0\0nonsense"), (b"tEXt", b"")],
    [(b"eXIf", b"nonsense")],
  ],
)
def test_png_with_large_or_broken_chunks(chunks):
  np.testing.assert_array_equal(decode(png(1, 1, 8, 2, [bytes(RED)], *chunks)), [[RED]])


def test_png_with_a_wrong_checksum_of_text():
  data = png(1, 1, 8, 2, [bytes(RED)], (b"tEXt", b"Comment\0hello"))
  np.testing.assert_array_equal(decode(data.replace(b"hello", b"jello")), [[RED]])


def test_a_large_profile_counts():
  profile = icc.rgb("Adobe RGB") + b"\0" * 3_000_000
  profile = struct.pack(">I", len(profile)) + profile[4:]
  data = png(1, 1, 8, 2, [bytes([90, 160, 60])], (b"iCCP", b"profile\0\0" + zlib.compress(profile)))
  np.testing.assert_array_equal(decode(data), [[[0, 161, 47]]])


@pytest.mark.parametrize("width, height", [(20_000, 10_000), (60_000, 60_000)])
@pytest.mark.parametrize("pillow_has_a_limit", [True, False])
def test_decompression_bombs(width, height, pillow_has_a_limit, monkeypatch):
  if not pillow_has_a_limit:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
  with pytest.raises(images.ImageError, match=f"{width * height:,} pixels, at most 178,956,970 are read") as caught:
    images.open_image(png(width, height, 8, 2, [b""]))
  assert caught.value.kind == images.TOO_LARGE


def test_nothing_is_said_on_the_terminal(tmp_path):
  """Many pixels, broken EXIF, damaged TIFFs, whose library prints by itself: of no interest, or an `ImageError`."""
  files = {"wide.png": png(9000, 10_000, 1, 0, [bytes(1125)] * 10_000)}
  files["exif.jpg"] = encoded(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff broken")
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
  for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg"):
    data = encoded(noise, "TIFF", compression=compression)
    for place in range(8, len(data), 97):
      files[f"{compression}{place}.tif"] = data[:place] + b"\xff\0\xff" + data[place + 3 :]
  for name, data in files.items():
    (tmp_path / name).write_bytes(data)
  code = """
import pathlib, sys
from aurora_jax.data import images
bad = 0
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
  try:
    images.open_image(path.read_bytes())
  except images.ImageError:
    bad += 1
print(bad)
"""
  done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0 and done.stderr == ""
  assert 5 < int(done.stdout) < len(files) - 2


@pytest.mark.parametrize(
  "kind, name", [("PNG", "PNG"), ("JPEG", "JPEG"), ("WEBP", "WEBP"), ("TIFF", "TIFF"), ("BMP", None)]
)
def test_signature(kind, name):
  assert images.signature(encoded(Image.new("RGB", (4, 4)), kind)[:16]) == name


def test_reasons_are_our_own_words():
  whole = encoded(Image.effect_noise((64, 64), 50))
  for data, words in (
    (b"", "an empty file"),
    (b"text", "4 bytes of no known format"),
    (whole[:3000], "PNG data are cut off"),
    (whole[:40] + b"\0" * 50 + whole[90:], "PNG data are damaged"),
  ):
    with pytest.raises(images.ImageError) as caught:
      images.open_image(data)
    assert str(caught.value) == f"not a readable image: {words}"


def test_other_programs_are_not_started():
  data = encoded(Image.new("RGB", (8, 8)), "EPS")
  with pytest.raises(images.ImageError, match="of no known format"):
    images.open_image(data)


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"this is a text",
    encoded(Image.effect_noise((64, 64), 50))[:-500],
    encoded(Image.effect_noise((64, 64), 50), "JPEG")[:600],
    encoded(Image.new("RGB", (8, 8)))[:20],
    png(2, 1, 8, 2, [b"\0\0\0"]),
  ],
  ids=["empty", "text", "truncated PNG", "truncated JPEG", "header only", "too few pixels"],
)
def test_not_readable(data):
  with pytest.raises(images.ImageError, match="not a readable image: ."):
    images.decode_image(data)


def test_jpeg_may_be_reduced_while_decoding():
  data = encoded(Image.radial_gradient("L").resize((800, 400)).convert("RGB"), "JPEG", quality=95)
  assert images.open_image(data).size == (800, 400)
  reduced = images.open_image(data, least_side=64)
  assert reduced.size == (200, 100)
  exact = images.square(images.open_image(data), 32)
  np.testing.assert_allclose(np.asarray(images.square(reduced, 32), int), np.asarray(exact, int), atol=6)
  assert images.open_image(data, least_side=300).size == (800, 400)


@pytest.mark.parametrize("width, height", [(30, 10), (10, 30), (11, 10), (10, 10)])
def test_square_takes_the_centre(width, height):
  pixels = np.full((height, width, 3), 255, np.uint8)
  top, left = (height - 10) // 2, (width - 10) // 2
  pixels[top : height - top, left : width - left] = 0
  result = images.square(Image.fromarray(pixels), 5)
  assert result.size == (5, 5)
  assert np.asarray(result)[:, 1:-1].max() == 0


def test_square_is_smooth():
  pixels = np.zeros((64, 64, 3), np.uint8)
  pixels[::2] = 255
  np.testing.assert_allclose(np.asarray(images.square(Image.fromarray(pixels), 8))[1:-1], 127.5, atol=3)


def test_encode_png_is_lossless():
  pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
  data = images.encode_png(Image.fromarray(pixels))
  assert data.startswith(b"\x89PNG")
  np.testing.assert_array_equal(images.decode_image(data), pixels)


def test_a_picture_of_another_size():
  data = images.encode_png(Image.new("RGB", (4, 6)))
  assert images.open_image(data, size=(4, 6)).size == (4, 6)
  with pytest.raises(images.ImageError, match="^4x6 pixels instead of 6x4$"):
    images.open_image(data, size=(6, 4))
