"""What systems with a discriminator on a frozen transformer share: reading the transformer, and the parameters' labels.

The transformer is a DINO (`dino.path`), or the image tower of a CLIP: that of `dino.path`, or of `text.clip`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from aurora_jax.errors import UserError
from aurora_jax.interop import dino as dino_interop
from aurora_jax.models import dino as dino_lib
from aurora_jax.models.feature_critic_config import Config
from aurora_jax.parallel.mesh import KeyPath, ParamLabel, names_of

# What a checkpoint of DINO need not say, and what changes nothing at the discriminator's size.
_NOT_COMPARED = ("position_resize", "layer_norm_epsilon")


@dataclasses.dataclass(frozen=True)
class Backbone:
  """The frozen transformer of an experiment.

  Attributes:
    path: `dino.path`; may be "".
    clip: `text.clip`, whose image tower is read where there is no path; may be "".
    cfg: the sizes that the weights must have.
  """

  path: str
  clip: str
  cfg: Config

  def load(self) -> dict[str, Any]:
    """Reads the parameters of `models.dino.Dino`, as host arrays.

    Raises:
      UserError: no weights, another model, or other sizes than the config's; all that differ are named.
    """
    if not self.path and not self.clip:
      raise UserError(
        f"no transformer for the {self._owner}: --config.dino.path DIR, a DINO folder or file, or a CLIP of "
        "train-clip, whose image tower stands in for it"
      )
    bundle, cfg = dino_interop.load(self.path or self.clip), self.cfg.dino
    fields = [field.name for field in dataclasses.fields(cfg) if field.name not in _NOT_COMPARED]
    require_same(self.description, bundle.config, f"{self.cfg.group}.dino", cfg, fields)
    return bundle.variables["params"]

  def abstract(self) -> dict[str, Any]:
    """Shapes of what `load` reads."""
    return dino_lib.abstract_variables(self.cfg.dino)["params"]

  @property
  def is_clip(self) -> bool:
    """Whether the image tower of a CLIP takes DINO's place."""
    return not self.path or dino_interop.is_clip(self.path)

  @property
  def description(self) -> str:
    """Which weights these are, for a message."""
    if not self.path:
      return f"the image tower of text.clip={self.clip}"
    return f"the image tower of dino.path={self.path}" if self.is_clip else f"dino.path={self.path}"

  @property
  def notes(self) -> list[str]:
    """A line for the user who starts a run without a DINO."""
    if not self.is_clip or not (self.path or self.clip):
      return []
    return [f"{self._owner}: no DINO; {self.description} stands in for it (dino.path names one)"]

  @property
  def _owner(self):
    return self.cfg.group.replace("_", " ")


def label(path: KeyPath) -> ParamLabel:
  """The label of a parameter of the heads, or of an entry of their other collections.

  The heads' convolutions are stacked twice, by head and by tap, and spectral norm sets their size: none of Muon's.

  Args:
    path: its key path.
  """
  names = names_of(path)
  module = "/".join([name for name in names[:-1] if name not in ("params", "spectral")][:2])
  matrix = "text_map" in names and names[-1] == "weight"
  return ParamLabel(matrix=matrix, bias=names[-1] == "bias", module=module, group=module)


def require_same(what: str, theirs: Any, group: str, ours: Any, fields: Iterable[str]) -> None:
  """Refuses a frozen network whose sizes are not the config's.

  Args:
    what: the network, for the message.
    theirs: its sizes.
    group: the config's group.
    ours: the sizes in the config.
    fields: names of the sizes to compare.

  Raises:
    UserError: names all sizes that differ.
  """
  differing = [
    f"{name} is {getattr(theirs, name)!r}, {group}.{name} is {getattr(ours, name)!r}"
    for name in fields
    if getattr(theirs, name) != getattr(ours, name)
  ]
  if differing:
    raise UserError(f"{what} is of other sizes than the config says: {'; '.join(differing)}")
