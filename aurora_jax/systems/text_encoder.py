"""The frozen CLIP of text-conditional systems, from the folder `text.clip`."""

import functools
import pathlib
import zlib

import numpy as np

from aurora_jax import local_copies, storage
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import UserError
from aurora_jax.interop import clip_hf
from aurora_jax.models import clip as clip_lib

_KNOWN = {768: ("ViT-L/14", clip_lib.vit_l14), 512: ("ViT-B/32", clip_lib.vit_b32)}


@functools.lru_cache(maxsize=4)
def clip_config(folder: str, width: int) -> tuple[clip_lib.ClipConfig, str]:
  """The sizes of a CLIP, from its folder's config.json. Without a folder they are guessed from the text width.

  Args:
    folder: `text.clip`; may be "", or a folder that does not exist.
    width: width of the text features.

  Returns:
    (the sizes, a phrase that says where they are from).
  """
  folder = local_copies.of_folder(folder)
  if folder and pathlib.Path(folder).is_dir():
    return clip_hf.read_config(pathlib.Path(folder)), f"of {folder}"
  missing = f"nothing at text.clip={folder}" if folder else "text.clip is not set"
  if width in _KNOWN:
    name, sizes = _KNOWN[width]
    return sizes(), f"taken to be {name}, whose text features are {width} wide ({missing})"
  return clip_lib.small(width), f"taken to be one of train-clip with text features {width} wide ({missing})"


@functools.lru_cache(maxsize=4)
def tokenizer(folder: str) -> Tokenizer:
  """The tokenizer of a CLIP folder. UserError if there is no such folder."""
  _require(folder)
  folder = local_copies.of_folder(folder)
  return Tokenizer.load(pathlib.Path(folder), clip_hf.read_config(pathlib.Path(folder)).text.context_length)


def load(folder: str, text_only: bool) -> clip_hf.ClipBundle:
  """Reads a CLIP folder, with `text_only` without its image tower. UserError if there is no such folder."""
  _require(folder)
  return clip_hf.load(folder, text_only=text_only)


def _require(folder):
  if not folder:
    raise UserError("no CLIP: --config.text.clip DIR, a run of train-clip or a Hugging Face CLIP folder")
  if not storage.is_url(folder) and not pathlib.Path(folder).is_dir():
    raise UserError(f"no CLIP folder at {folder}")


def digest(ids: np.ndarray) -> int:
  """A checksum of an array of ids, a non-negative int32."""
  return zlib.crc32(np.ascontiguousarray(ids).tobytes()) >> 1
