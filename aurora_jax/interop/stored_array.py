"""An array in a file that is read on demand."""

import dataclasses
import pathlib

import numpy as np

from aurora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class StoredArray:
  """The place of an array in a file. `np.asarray` and `read` read it, every time anew.

  The file is not memory-mapped: pages of a mapped file would count as the process's memory, so that a model would count
  twice.

  Attributes:
    path: the file.
    offset: offset of the first element, in bytes.
    shape: shape of the array.
    dtype: numpy dtype, little-endian.
    strides: bytes per axis, none negative; None is C order.
  """

  path: pathlib.Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype
  strides: tuple[int, ...] | None = None

  @property
  def ndim(self) -> int:
    """Number of axes."""
    return len(self.shape)

  @property
  def nbytes(self) -> int:
    """Size in memory, in bytes."""
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

  @property
  def span(self) -> int:
    """Size in the file from the first to the last element, in bytes."""
    if self.strides is None or 0 in self.shape:
      return self.nbytes
    return sum((n - 1) * step for n, step in zip(self.shape, self.strides)) + self.dtype.itemsize

  def read(self) -> np.ndarray:
    """Reads the array, contiguous.

    Raises:
      UserError: the file has become shorter or is gone.
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
    return np.ascontiguousarray(array).reshape(self.shape)  # ascontiguousarray gives a scalar one axis

  def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
    del copy  # the array is always new
    array = self.read()
    return array if dtype is None else array.astype(dtype, copy=False)
