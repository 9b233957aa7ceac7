"""Features of images by a frozen network, which Frechet distances compare."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from aurora_jax.config import Experiment
from aurora_jax.interop import clip_hf, inception_torch
from aurora_jax.models import clip as clip_lib
from aurora_jax.models import inception as inception_lib
from aurora_jax.systems import base


class Extractor(NamedTuple):
  """A network that turns images into features.

  Attributes:
    name: short name for metrics: "clip".
    description: full description, written next to every number.
    width: D.
    variables: host arrays, or None if they are `frozen[frozen_name]` of the run.
    frozen_name: name of the run's frozen network, or "".
    apply: (variables, [B, R, R, 3] in [-1, 1]) -> [B, D].
  """

  name: str
  description: str
  width: int
  variables: Any
  frozen_name: str
  apply: Callable[[Any, jax.Array], jax.Array]


def of_schedule(experiment: Experiment, system: base.System, frozen: base.Frozen) -> Extractor | None:
  """The extractor of the features that the config group `schedule` names; None for a run without stages.

  Args:
    experiment: the configuration.
    system: the run's system.
    frozen: the run's frozen networks.

  Raises:
    UserError: the weights are missing or corrupt.
  """
  cfg = experiment.schedule
  if not cfg.resolutions:
    return None
  if cfg.features == "inception":
    variables = inception_torch.load(cfg.inception)
    description = f"Inception 2015-12-05 {cfg.inception}"
    return Extractor("inception", description, inception_lib.WIDTH, variables, "", inception_lib.Inception().apply)
  folder, has_clip = experiment.text.clip, "clip" in frozen
  bundle = None if has_clip else clip_hf.load(folder)
  clip = system.clip if has_clip else clip_lib.Clip(bundle.config)
  encode = lambda variables, images: clip.apply(variables, images, method="encode_image")
  return Extractor(
    "clip",
    f"CLIP {folder}",
    clip.config.embedding_width,
    bundle and bundle.variables,
    "clip" if has_clip else "",
    encode,
  )
