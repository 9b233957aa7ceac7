"""An array that lies in a file until it is read."""

import dataclasses
import pathlib

import numpy as np

from aurora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StoredArray:
  """Where an array lies in a file. `np.asarray` and `read` read it, anew every time.

  It is read into memory of its own rather than mapped: pages of a mapped file would count as the process's memory, and
  a model would appear twice.

  Attributes:
    path: the file.
    offset: of its first element, bytes.
    shape: of the array.
    dtype: numpy dtype, little-endian.
    strides: bytes per axis, none negative; None is C order.
  """

  path: pathlib.Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype
  strides: tuple[int, ...] | None = None

  @property
  def ndim(self):
    return len(self.shape)

  @property
  def nbytes(self):
    """Bytes that it takes in memory."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  @property
  def span(self):
    """Bytes in the file from its first element to behind its last."""
    if self.strides is None or 0 in self.shape:
      return self.nbytes
    return sum((n - 1) * step for n, step in zip(self.shape, self.strides)) + self.dtype.itemsize

  def read(self):
    """The array, contiguous.

    Raises:
      UserError: the file is shorter than it was, or gone.
    """
    if 0 in self.shape:
      return np.zeros(self.shape, self.dtype)
    try:
      data = np.fromfile(self.path, np.uint8, self.span, offset=self.offset)
    except OSError as error:
      raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
    if data.size != self.span:
      raise UserError(f"{self.path} is cut off: {self.span} bytes at {self.offset} are not there")
    array = np.ndarray(self.shape, self.dtype, data, strides=self.strides)
    return np.ascontiguousarray(array).reshape(self.shape)  # the former makes a scalar one-dimensional

  def __array__(self, dtype=None, copy=None):
    del copy  # it is always a new one
    array = self.read()
    return array if dtype is None else array.astype(dtype, copy=False)
