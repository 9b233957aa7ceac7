"""Small ICC profiles for tests, made by hand: ICC.1:2001-12, the tags that a matrix, grey or table profile must
have.
"""

import struct

# name: (gamma, XYZ of red, green and blue under D50, in units of 2**-16)
PRIMARIES = {
  "Adobe RGB": (0x233, ((0x9C18, 0x4FA5, 0x4FC), (0x348D, 0xA02C, 0xF95), (0x2631, 0x102F, 0xBE9C))),
  "Display P3": (0x233, ((0x83DF, 0x3DBF, -0x45), (0x4ABF, 0xB137, 0xAB9), (0x2838, 0x110B, 0xC8B9))),
  "ProPhoto": (0x1CD, ((0xCC34, 0x49BD, 0), (0x229C, 0xB63E, 0), (0x806, 6, 0xD32D))),
}
_D50 = (0xF6D6, 0x10000, 0xD32D)


def rgb(name):
  gamma, columns = PRIMARIES[name]
  colorants = {f"{letter}XYZ": _xyz(column) for letter, column in zip("rgb", columns)}
  return _profile(b"mntrRGB XYZ ", colorants | {f"{letter}TRC": _gamma(gamma) for letter in "rgb"})


def grey(gamma):
  """gamma: in units of 1 / 256."""
  return _profile(b"mntrGRAYXYZ ", {"kTRC": _gamma(gamma)})


def cmyk(lab):
  """A printer whose colour for inks c, m, y, k (each 0 or 1, linear between) is `lab(c, m, y, k)`, L, a, b of 8
  bits.
  """
  corners = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
  ramp = bytes(range(256))
  table = (
    b"mft1\0\0\0\0"
    + bytes([4, 3, 2, 0])
    + struct.pack(">9i", *(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x10000))
    + ramp * 4
    + b"".join(bytes(lab(*corner)) for corner in corners)
    + ramp * 3
  )
  return _profile(b"prtrCMYKLab ", {"A2B0": table})


def _xyz(values):
  return b"XYZ \0\0\0\0" + struct.pack(">3i", *values)


def _gamma(value):
  return b"curv\0\0\0\0" + struct.pack(">IH", 1, value) + b"\0\0"


def _profile(kind, tags):
  tags = {"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 79, "wtpt": _xyz(_D50)} | tags
  entries, body, offset = b"", b"", 132 + 12 * len(tags)
  for name, data in tags.items():
    data += b"\0" * (-len(data) % 4)
    entries += struct.pack(">4sII", name.encode(), offset + len(body), len(data))
    body += data
  header = struct.pack(">I4sI", offset + len(body), b"test", 0x02200000) + kind + b"\0" * 12 + b"acsp" + b"\0" * 28
  return header + struct.pack(">3i", *_D50) + b"\0" * 48 + struct.pack(">I", len(tags)) + entries + body
