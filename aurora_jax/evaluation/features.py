"""What Frechet distances compare: features of images by a frozen network."""

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
    name: short, for names of metrics: "clip".
    description: in full, written next to every number.
    width: D.
    variables: host arrays, or None where they are `frozen[frozen_name]` of the run.
    frozen_name: see there.
    apply: (variables, [B, R, R, 3] in [-1, 1]) -> [B, D].
  """

  name: str
  description: str
  width: int
  variables: Any
  frozen_name: str
  apply: Callable[[Any, jax.Array], jax.Array]


def of_schedule(experiment: Experiment, system: base.System, frozen: base.Frozen) -> Extractor | None:
  """The features that `schedule` asks for; None for a run without stages.

  Raises:
    UserError: the weights are missing or damaged.
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
