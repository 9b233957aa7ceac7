"""What conversions of every system's weight files have in common: the run folder to make, and what is said about it."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from aurora_jax import config_files, files
from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.interop import tensor_files
from aurora_jax.runs import checkpoint_manager, checkpoint_reader
from aurora_jax.runs import workdir as workdir_lib

T = TypeVar("T")

# Takes a description, gives a context manager that yields a function of (done, total); see runs/progress.py.
Progress = Callable[[str], contextlib.AbstractContextManager[Callable[[int, int], None]]]


def no_progress(description: str) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
  """A `Progress` that shows nothing."""
  del description
  return contextlib.nullcontext(lambda done, total: None)


@dataclasses.dataclass(frozen=True)
class Converted:
  """What was written.

  Attributes:
    path: the file or folder.
    step: step of the checkpoint.
    weights: {our part: its released name, "" for a bare state dict}.
    values: number of values in one set of the generator's weights.
    notes: lines that the user should read.
  """

  path: pathlib.Path
  step: int
  weights: dict[str, str]
  values: int
  notes: tuple[str, ...] = ()


def check_target_folder(workdir: str | os.PathLike, overwrite: bool) -> None:
  """Raises UserError if a run folder must not be made there: it is in use and no earlier conversion to replace."""
  path = pathlib.Path(workdir)
  workdir_lib.check_writable(path)
  if not path.exists() or not any(path.iterdir()):
    return
  if not overwrite:
    raise UserError(f"{path} is not empty; choose another folder or say --overwrite")
  folder = workdir_lib.RunFolder(path)
  if checkpoint_reader.newest(folder.checkpoints) is None or checkpoint_reader.only_parts(folder.checkpoints) is None:
    raise UserError(f"{path} is not an earlier conversion, so --overwrite leaves it alone; choose another folder")


def check_weight_file(path: pathlib.Path, weights: str) -> bool:
  """Checks a weight file's name before an export.

  Args:
    path: of the file to write.
    weights: "ema", "generator" or "both".

  Returns:
    Whether it holds one bare state dict (.safetensors).

  Raises:
    UserError: an unknown suffix, two sets for a file of one, or PyTorch is missing for a .pth file.
  """
  if path.suffix not in tensor_files.SUFFIXES:
    raise UserError(f"{path}: weights are written to {', '.join(tensor_files.SUFFIXES)}")
  bare = path.suffix == ".safetensors"
  if bare and weights == "both":
    raise UserError(
      f"{path}: a .safetensors file holds one set of weights; say --weights ema or --weights generator, "
      "or write a .pth file"
    )
  if not bare:
    tensor_files.require_torch(path)
  return bare


def write_run(
  workdir: str | os.PathLike,
  experiment: Experiment,
  networks: Mapping[str, Mapping[str, Any]],
  origin: Mapping[str, Any],
  progress: Progress,
) -> None:
  """Writes a run folder with one checkpoint, of step 0. It appears whole or not at all.

  Args:
    workdir: the folder.
    experiment: becomes its config.json.
    networks: {network: {part as of `NetworkState`: tree of numpy arrays}}.
    origin: a small JSON object about where the weights are from.
    progress: shows the progress.
  """
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(dict(networks)))
  with progress(f"writing {size / 1e9:,.1f} GB to {workdir}"), files.atomic_folder(workdir) as tmp_path:
    folder = workdir_lib.RunFolder(tmp_path)
    values = config_files.to_mapping(experiment)
    checkpoint_manager.write_parts(folder.checkpoints, 0, {"networks": networks}, values, origin)
    files.write_text(folder.config, config_files.to_json(experiment))


def differing(first: Any, second: Any) -> list[str]:
  """Names of the leaves of two trees of dicts that differ."""
  flat, _ = jax.tree_util.tree_flatten_with_path(first)
  return [
    "/".join(entry.key for entry in keys)
    for (keys, one), two in zip(flat, jax.tree.leaves(second))
    if one is not two and not np.array_equal(one, two)
  ]


def counted(items: Iterable[T], total: int, update: Callable[[int, int], None]) -> Iterator[T]:
  """The items, telling a progress bar how many are done."""
  for done, item in enumerate(items):
    update(done, total)
    yield item
