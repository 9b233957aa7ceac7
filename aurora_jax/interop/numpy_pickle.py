"""Rebuilds numpy scalars and arrays in a pickle without numpy's own functions, which could run code from the file.

Training scripts store such values next to the weights, for example the best score so far or the state of a random
generator. Only numbers, booleans and text are rebuilt, from their bytes.
"""

import re
from collections.abc import Callable

import numpy as np

_NUMBERS_AND_TEXT = re.compile(r"[?]|[biufcUS]\d+|[bhilqBHILQefdg]")
_ORDERS = ("<", ">", "|", "=")


class _Type:
  """A placeholder for a dtype. The pickle sets the byte order after construction."""

  __slots__ = ("_code", "_order")

  def __init__(self, code: str, *_):
    if not isinstance(code, str) or not _NUMBERS_AND_TEXT.fullmatch(code):
      raise ValueError(f"a numpy array of type {code!r}")
    self._code, self._order = code, "="

  def __setstate__(self, state: tuple) -> None:
    if state[1] not in _ORDERS:
      raise ValueError(f"byte order {state[1]!r}")
    self._order = state[1]

  @property
  def dtype(self) -> np.dtype:
    dtype = np.dtype(self._code)
    return dtype if self._order == "|" else dtype.newbyteorder(self._order)

  @property
  def value(self) -> str:
    return str(self.dtype)


class _Array:
  """A placeholder for an array until the pickle sets its shape and bytes."""

  __slots__ = ("value",)

  def __setstate__(self, state: tuple) -> None:
    _, shape, kind, fortran, data = state
    self.value = _from_bytes(kind, data, tuple(int(side) for side in shape), "F" if fortran is True else "C")


PLACEHOLDERS = (_Type, _Array)


def _from_bytes(kind: _Type, data: bytes, shape: tuple[int, ...], order: str = "C") -> np.ndarray:
  if not isinstance(kind, _Type) or not isinstance(data, bytes):
    raise ValueError(f"a numpy array of {type(kind).__name__} and {type(data).__name__}")
  return np.ndarray(shape, kind.dtype, data, order=order).copy()  # refuses too few bytes and negative sides


def _scalar(kind: _Type, data: bytes) -> object:
  return _from_bytes(kind, data, ()).item()


def _encode(text: str, encoding: str) -> bytes:
  """Bytes, as protocol 2 of pickle has them."""
  if encoding != "latin1":
    raise ValueError(f"bytes in {encoding!r}")
  return text.encode("latin1")


def safe_globals() -> dict[tuple[str, str], Callable]:
  """Replacements for the globals that a pickle may name, {(module, name): replacement}. They are new for every file."""
  made = {
    ("numpy", "dtype"): lambda code, *_: _Type(code),
    ("numpy", "ndarray"): lambda *_: _Array(),
    ("_codecs", "encode"): lambda text, encoding: _encode(text, encoding),
    ("__builtin__", "bytes"): lambda: b"",  # protocol 2 has no bytes of its own: these are those of an empty array
  }
  for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    made[module, "scalar"] = lambda kind, data: _scalar(kind, data)
    made[module, "_reconstruct"] = lambda *_: _Array()
  return made
