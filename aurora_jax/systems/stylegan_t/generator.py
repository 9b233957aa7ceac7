"""StyleGAN-T's generator (arXiv 2301.09515): latents and a text feature to an image.

Float32 products are float32 on every machine (`Precision.HIGHEST`); the config's `compute_dtype` is the way to faster
ones.

  B batch, R resolution, Z width of the latents, D width of the text feature, W = Z + D, N tokens
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.models.module import Module
from aurora_jax.systems.stylegan_t import config as config_lib
from aurora_jax.systems.stylegan_t import mapping, synthesis


class GeneratorOutput(NamedTuple):
  """What the generator returns."""

  image: jax.Array  # [B, R, R, 3] float32, about [-1, 1], not clipped
  w: jax.Array  # [B, W] float32, truncated if asked for: what every layer gets


class Generator(Module):
  """The whole generator. Variables: {"params", "buffers"}.

  `buffers` holds what is not trained: the average of the mapped latents, Fourier frequencies, phases and transform, and
  the noise constants.
  """

  cfg: config_lib.Generator

  def setup(self) -> None:
    self.mapping = mapping.Mapping(self.cfg)
    self.synthesis = synthesis.Synthesis(self.cfg)
    if self.cfg.text_tower.layers:
      self.text_tower = mapping.TextEncoder(self.cfg)

  def encode_text(self, tokens: jax.Array) -> jax.Array:
    """Captions to unit features by the generator's own text tower. tokens int [B, N] -> [B, D]."""
    if not self.cfg.text_tower.layers:
      raise ValueError("this generator has no text tower (generator.text_tower.layers is 0); it takes text features")
    with jax.default_matmul_precision("highest"):
      return self.text_tower(tokens)

  def map_latents(
    self, z: jax.Array, text: jax.Array | None, psi: float | jax.Array = 1.0, train: bool = False
  ) -> jax.Array:
    """Latents [B, Z] and text, features [B, D] or tokens int [B, N], to w [B, W]. See `__call__`."""
    cfg = self.cfg
    if z.ndim != 2 or z.shape[1] != cfg.z_dim:
      raise ValueError(f"z must be [batch, {cfg.z_dim}], got {z.shape}")
    if not cfg.text_dim:
      if text is not None:
        raise ValueError(f"this generator is unconditional (generator.text_dim is 0), text is {text.shape}")
    elif text is None:
      raise ValueError(f"text is missing; this generator takes features [batch, {cfg.text_dim}]")
    elif jnp.issubdtype(text.dtype, jnp.integer):
      text = self.encode_text(text)
    if text is not None and text.shape != (len(z), cfg.text_dim):
      raise ValueError(f"text must be {(len(z), cfg.text_dim)}, got {text.shape}")
    with jax.default_matmul_precision("highest"):
      return self.mapping(z, text, psi, train)

  def synthesize(self, w: jax.Array, noise: str | synthesis.Noise = "const") -> jax.Array:
    """w [B, W] to images [B, R, R, 3]."""
    with jax.default_matmul_precision("highest"):
      return self.synthesis(w, noise)

  def __call__(
    self,
    z: jax.Array,
    text: jax.Array | None = None,
    psi: float | jax.Array = 1.0,
    noise: str | synthesis.Noise = "const",
    train: bool = False,
  ) -> GeneratorOutput:
    """Latents and text to images.

    Args:
      z: [B, Z], standard normal.
      text: CLIP's text features of unit length [B, D]; or, with a text tower, tokens int [B, N]; None if unconditional.
      psi: truncation, a number or [B, 1]; 1: none, 0: the average of the mapped latents.
      noise: "const": each layer's constant; "none"; "random": drawn anew from the rng "noise"; or an array
        [B, r, r, 1] for every one of `synthesis.noise_sizes`, before its strength is multiplied.
      train: moves the average of the mapped latents, for which the collection "buffers" must be mutable. Released
        training does so in every call, of both phases.

    Returns:
      `GeneratorOutput`.

    Raises:
      ValueError: an input of another shape or an unknown noise.
    """
    if self.is_initializing() and self.cfg.text_tower.layers:
      self.encode_text(jnp.zeros((1, 2), jnp.int32))  # the tower's parameters exist whatever the first call brings
    w = self.map_latents(z, text, psi, train)
    return GeneratorOutput(self.synthesize(w, noise), w)


def abstract_variables(cfg: config_lib.Generator) -> dict[str, Any]:
  """Shapes and dtypes of the generator's variables, without allocating them."""
  z = jax.ShapeDtypeStruct((1, cfg.z_dim), jnp.float32)
  text = jax.ShapeDtypeStruct((1, cfg.text_dim), jnp.float32) if cfg.text_dim else None
  return jax.eval_shape(Generator(cfg).init, jax.random.key(0), z, text)


def transform_matrix(degrees: float = 0.0, shift_x: float = 0.0, shift_y: float = 0.0) -> np.ndarray:
  """The input transform that turns and shifts the image. Shifts are in units of the image; float32 [3, 3]."""
  angle = np.deg2rad(degrees)
  cos, sin = np.cos(angle), np.sin(angle)
  return np.linalg.inv(np.array([[cos, sin, shift_x], [-sin, cos, shift_y], [0, 0, 1]])).astype(np.float32)


def with_transform(variables: Mapping[str, Any], matrix: np.ndarray | jax.Array) -> dict[str, Any]:
  """The generator's variables with another input transform [3, 3]; the identity is the default (see
  `transform_matrix`).
  """
  if np.shape(matrix) != (3, 3):
    raise ValueError(f"the transform must be [3, 3], got {np.shape(matrix)}")
  buffers = variables["buffers"]
  first = buffers["synthesis"]["b8"]
  first = {**first, "input": {**first["input"], "transform": jnp.asarray(matrix, jnp.float32)}}
  return {**variables, "buffers": {**buffers, "synthesis": {**buffers["synthesis"], "b8": first}}}
