"""A folder with a trained generator: a run's, an exported one (`hub.export_run`), or one on the Hub. Imports no JAX."""

import dataclasses
import functools
import os
import pathlib

from aurora_jax import config_files, storage
from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.interop.hub import layout, remote
from aurora_jax.runs import checkpoint_folder, remote_run
from aurora_jax.runs.workdir import RunFolder


@dataclasses.dataclass(frozen=True)
class ModelFolder:
  """Where a trained generator is stored.

  Attributes:
    name: as the user wrote it.
    path: the local folder.
    exported: whether it is an exported folder, not a run's.
  """

  name: str
  path: pathlib.Path
  exported: bool

  @classmethod
  def open(cls, name: str | os.PathLike) -> "ModelFolder":
    """Finds a folder; one on the Hub is downloaded.

    Args:
      name: a path, a gs:// or s3:// URL, or "hf:OWNER/NAME" (`interop.hub.remote`).

    Raises:
      UserError: it is on the Hub or at a URL and cannot be downloaded.
    """
    if storage.is_url(name):
      path = remote_run.fetched(str(name))
      if layout.model_type(path) is not None:
        path = remote_run.fetched(str(name), whole=True)  # with its text encoder
    else:
      path = remote.download(str(name)) if remote.is_remote(name) else pathlib.Path(name)
    exported = layout.model_type(path) is not None
    if remote.is_remote(name) and not exported:
      raise UserError(f"{name} is no generator that `export` wrote: its config.json names no system")
    return cls(str(name), path, exported)

  @property
  def run(self) -> RunFolder:
    """The folder as a run's."""
    return RunFolder(self.path)

  @functools.cached_property
  def experiment(self) -> Experiment:
    """The configuration of the run; of an exported folder with the folder's own text encoder.

    Raises:
      UserError: there is none, or it cannot be read.
    """
    if not self.exported:
      return self.run.experiment()
    values = layout.read_experiment(self.path)
    if values is None:
      raise UserError(
        f"{self.name} has no experiment.json: copy that of the exported folder, or save by the pipeline's "
        "save_pretrained, which does"
      )
    try:
      return config_files.from_stored(values)
    except UserError as error:
      raise UserError(f"{self.path / layout.EXPERIMENT}: {error}") from error

  def check_step(self, step: int | None) -> None:
    """Raises a UserError if there is no checkpoint, or none of this step."""
    if not self.exported:
      checkpoint_folder.chosen(self.run.checkpoints, step)
    elif step is not None:
      raise UserError(f"--step is for a run: {self.name} is an exported folder, which holds one step")
