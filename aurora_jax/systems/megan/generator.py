"""MEGAN's generator: n DCGANs of one latent, and a gate that chooses an image (arXiv 1805.02481; released: `model.py`).

The parameters of all generators are stacked along a leading axis [n, ...], and every layer is one batched product over
it.
A mesh axis can shard the generators: only the projected features and the sum over gated images cross it.

  n generators, B batch, H height, W width, I channels in, C channels out, Z latent width, S side of the images
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from aurora_jax.errors import UserError
from aurora_jax.models.module import Module
from aurora_jax.systems.megan import config as config_lib
from aurora_jax.systems.megan import gate as gate_lib

_TAPS = 4  # side of every kernel


@struct.dataclass
class GeneratorOutput:
  """What the generator returns. Under `jax.jit`, unused fields cost nothing."""

  image: jax.Array  # [B, S, S, 3]: the sum of gate * images
  images: jax.Array  # [B, n, S, S, 3] in [-1, 1]
  gate: jax.Array  # [B, n]
  logits: jax.Array  # [B, n], the gate's, before noise and temperature
  features: jax.Array  # [B, n, 8, 8, C], the generators' first halves
  projected: jax.Array  # [B, n, Z], what the gate sees of them


def _overlap_add(taps, axis):
  """Adds the four taps along one spatial axis: [.., H, 4, ..] -> [.., 2H, ..]; pixel i goes to 2i - 1 .. 2i + 2.

  Taps 0 and 1 of all pixels lie side by side without a gap, and so do taps 2 and 3, two places further on.
  """
  shape = list(taps.shape)
  shape[axis : axis + 2] = [2 * shape[axis]]

  def placed(first, before, after):
    half = jax.lax.slice_in_dim(taps, first, first + 2, axis=axis + 1).reshape(shape)
    padding = [(0, 0, 0)] * len(shape)
    padding[axis] = (before, after, 0)  # below zero: cut off, which is the convolution's padding of 1
    return jax.lax.pad(half, jnp.zeros((), taps.dtype), padding)

  return placed(0, -1, 1) + placed(2, 1, -1)


def transposed_conv(x: jax.Array, kernel: jax.Array, precision: jax.lax.Precision | None = None) -> jax.Array:
  """Torch's transposed convolution 4x4, stride 2, padding 1, by n kernels at once.

  One product gives all 16 taps of every input pixel, then overlapping taps are added: no multiplication by inserted
  zeros, and no grouped convolution, whose gradient takes ten times as long on a CPU.

  Args:
    x: [n, B, H, W, I].
    kernel: [n, I, 4, 4, C]; `kernel[n, i, a, b, c]` goes from pixel (y, x) to (2y - 1 + a, 2x - 1 + b).
    precision: of the product.

  Returns:
    [n, B, 2H, 2W, C].
  """
  n, batch, height, width, inputs = x.shape
  taps = jnp.matmul(x.reshape(n, -1, inputs), kernel.reshape(n, inputs, -1), precision=precision)
  taps = taps.reshape(n, batch, height, width, _TAPS, _TAPS, -1).swapaxes(3, 4)
  return _overlap_add(_overlap_add(taps, axis=2), axis=3)


class Layer(Module):
  """A transposed convolution of every generator with bias; then batch norm and ReLU, or tanh at the last one.

  The first layer takes z [B, Z] to 4x4 pixels, [n, B, 4, 4, C]; the others double the side, [n, B, H, W, I] ->
  [n, B, 2H, 2W, C].
  """

  cfg: config_lib.Generator
  resolution: int  # of the output

  @nn.compact
  def __call__(self, x: jax.Array, mode: str) -> jax.Array:
    cfg, n, inputs = self.cfg, self.cfg.generators, x.shape[-1]
    features = cfg.width(self.resolution)
    # torch 0.3.1 took the number of input channels for transposed convolutions as well, today's takes the output's.
    fan = (inputs if cfg.init == "torch031" else features) * _TAPS**2
    init = gate_lib.torch_uniform(fan)
    kernel = self.param("kernel", init, (n, inputs, _TAPS, _TAPS, features))
    bias = self.param("bias", init, (n, features))
    dtype = jnp.dtype(cfg.compute_dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    if x.ndim == 2:
      y = jnp.einsum("bi,nio->nbo", x, kernel.reshape(n, inputs, -1), precision=precision)
      y = y.reshape(n, len(x), _TAPS, _TAPS, features)
    else:
      y = transposed_conv(x, kernel, precision)
    y = y + bias[:, None, None, None].astype(dtype)
    if self.resolution == cfg.resolution:
      return jnp.tanh(y.astype(jnp.float32))
    return nn.relu(gate_lib.BatchNorm(cfg.init, stacked=1, name="norm")(y, mode)).astype(dtype)


class Generators(Module):
  """The n generators. Released: `all_layers` (to 8x8 pixels) and `all_layers2` (the rest)."""

  cfg: config_lib.Generator
  place: Callable[[jax.Array], jax.Array] | None = None

  @nn.compact
  def __call__(self, z: jax.Array, mode: str) -> tuple[jax.Array, jax.Array]:
    """z [B, Z] -> (features [n, B, 8, 8, C], images [n, B, S, S, 3]); mode as for `BatchNorm`."""
    outputs, x = {}, z
    for resolution in self.cfg.resolutions:
      x = Layer(self.cfg, resolution, name=f"r{resolution}")(x, mode)
      x = outputs[resolution] = x if self.place is None else self.place(x)
    return outputs[config_lib.FEATURE_RESOLUTION].astype(jnp.float32), x


class Generator(Module):
  """Generators, projection and gate.

  Variables: {"params", "batch_stats"}. Params are "generators" (every leaf [n, ...]), "projection" (one linear map
  for all generators' features, of 8 x 8 pixels with channels last) and "gate"; `split_gate` separates the last from the
  others.

  Attributes:
    cfg: the configuration.
    place: on a mesh, a sharding constraint for the generators' feature maps [n, B, ...]; None leaves them to XLA.
  """

  cfg: config_lib.Generator
  place: Callable[[jax.Array], jax.Array] | None = None

  def setup(self) -> None:
    cfg = self.cfg
    self.generators = Generators(cfg, self.place)
    side = config_lib.FEATURE_RESOLUTION
    self.projection = gate_lib.dense(cfg.z_dim, side * side * cfg.width(side))
    self.gate = gate_lib.Gate(cfg)

  def __call__(
    self,
    z: jax.Array,
    uniform: jax.Array | None,
    temperature: jax.Array | float,
    hard: bool = True,
    train: bool = False,
    statistics: str = "running",
    choice: str = "sample",
  ) -> GeneratorOutput:
    """Latents to images.

    Args:
      z: [B, Z], standard normal.
      uniform: [B, n], draws from U[0, 1) for the gate's noise; may be None if `choice` is "argmax".
      temperature: positive scalar.
      hard: whether the gate is one-hot with the softmax's gradient, or the softmax.
      train: batch norms use the batch's statistics and update the running ones: "batch_stats" must be mutable.
      statistics: without `train`: "running", or "batch" for the batch's statistics without an update.
      choice: "sample", a draw of the gate; "argmax", the likeliest generator, without noise, temperature and gradient.

    Returns:
      `GeneratorOutput`.

    Raises:
      UserError: an array of the wrong shape, an option that does not exist, or statistics of a batch of 1.
    """
    cfg = self.cfg
    _check_options(statistics=(statistics, "running", "batch"), choice=(choice, "sample", "argmax"))
    if z.ndim != 2 or z.shape[1] != cfg.z_dim:
      raise UserError(f"z must be [batch, {cfg.z_dim}], got {z.shape}")
    z = z.astype(jnp.float32)
    mode = "train" if train else statistics
    features, images = self.generators(z, mode)
    projected = nn.relu(self.projection(features.reshape(*features.shape[:2], -1))).swapaxes(0, 1)
    logits = self.gate(z, projected, mode)
    if choice == "argmax":
      gate = gate_lib.argmax_gate(logits)
    elif uniform is None or uniform.shape != logits.shape:
      raise UserError(f"uniform must be {logits.shape}, got {None if uniform is None else uniform.shape}")
    else:
      gate = gate_lib.gumbel_softmax(logits, uniform, temperature, hard)
    image = jnp.einsum("bn,nbhwc->bhwc", gate, images, precision=jax.lax.Precision.HIGHEST)
    return GeneratorOutput(image, images.swapaxes(0, 1), gate, logits, features.swapaxes(0, 1), projected)

  def sample(self, z: jax.Array, uniform: jax.Array | None, temperature: jax.Array | float) -> GeneratorOutput:
    """Samples as the configuration says: `bn_at_eval` and `gate_at_eval`, with a hard gate. See `__call__`."""
    return self(z, uniform, temperature, statistics=self.cfg.bn_at_eval, choice=self.cfg.gate_at_eval)


def _check_options(**options):
  for name, (value, *choices) in options.items():
    if value not in choices:
      raise UserError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def split_gate(variables: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Separates the gate, which has its own optimizer, from the generators and their projection.

  Args:
    variables: {collection: tree}, the variables of `Generator`, or gradients or moments of the same structure.

  Returns:
    (generator, gate): {collection: tree} each; the second are the variables of `gate.Gate`.
  """
  rest = {name: {k: v for k, v in tree.items() if k != "gate"} for name, tree in variables.items()}
  return rest, {name: tree["gate"] for name, tree in variables.items()}


def join_gate(generator: Mapping[str, Any], gate: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `split_gate`."""
  return {name: {**tree, "gate": gate[name]} for name, tree in generator.items()}


@functools.cache
def abstract_variables(cfg: config_lib.Generator) -> dict[str, Any]:
  """Shapes and dtypes of the generator's variables, without allocating them."""
  init = lambda key: Generator(cfg).init(key, jnp.zeros((1, cfg.z_dim)), jnp.zeros((1, cfg.generators)), 1.0)
  return jax.eval_shape(init, jax.random.key(0))
