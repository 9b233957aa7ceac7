"""MEGAN's gate, which chooses a generator for each latent, and the batch norm of gate and generators.

B batch, n generators, Z latent width, C channels
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from aurora_jax.errors import UserError
from aurora_jax.models.module import Module
from aurora_jax.systems.megan import config as config_lib

_NOISE_EPSILON = 1e-20


def torch_uniform(fan: int) -> nn.initializers.Initializer:
  """U(-1/sqrt(fan), 1/sqrt(fan)): torch's default for weights and biases of linear maps and convolutions."""

  def init(key, shape, dtype=jnp.float32):
    bound = 1 / math.sqrt(fan)
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def dense(features: int, inputs: int, name: str | None = None) -> nn.Dense:
  """A linear map [..., inputs] -> [..., features] with torch's default initialization, in float32 on all devices."""
  init = torch_uniform(inputs)
  return nn.Dense(features, precision=jax.lax.Precision.HIGHEST, kernel_init=init, bias_init=init, name=name)


class BatchNorm(Module):
  """Torch's batch norm in float32. [*stack, B, ..., C] -> same, with statistics over all axes between stack and
  channels.

  Under a sharded batch the statistics are the global batch's. Flax's own module differs: its running variance takes the
  biased estimate.

  Variables: params `scale`, `bias` [*stack, C]; batch_stats `mean`, `var` [*stack, C] and `count` [*stack] int32, the
  number of batches seen.

  Attributes:
    init_style: as `config.Generator.init`.
    stacked: number of leading axes that hold independent norms.
  """

  init_style: str
  stacked: int = 0

  @nn.compact
  def __call__(self, x: jax.Array, mode: str) -> jax.Array:
    """Normalizes.

    Args:
      x: [*stack, B, ..., C].
      mode: "train" uses the statistics of the batch (biased variance) and updates the running ones (unbiased variance):
        collection "batch_stats" must be mutable. "batch" uses the statistics of the batch, "running" the running ones.

    Raises:
      UserError: the batch has one value per channel, hence no variance.
    """
    axes = tuple(range(self.stacked, x.ndim - 1))
    stack, channels = x.shape[: self.stacked], x.shape[-1:]
    uniform_scale = lambda key, shape: jax.random.uniform(key, shape)
    scale_init = uniform_scale if self.init_style == "torch031" else nn.initializers.ones
    scale = self.param("scale", scale_init, stack + channels)
    bias = self.param("bias", nn.initializers.zeros, stack + channels)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, stack + channels)
    running_var = self.variable("batch_stats", "var", jnp.ones, stack + channels)
    count = self.variable("batch_stats", "count", jnp.zeros, stack, jnp.int32)

    x = x.astype(jnp.float32)
    if mode == "running":
      mean, var = running_mean.value, running_var.value
    else:
      values = math.prod(x.shape[axis] for axis in axes)
      if values < 2:
        raise UserError(f"batch norm on the batch's statistics needs 2 samples or more, got {x.shape[self.stacked]}")
      mean = jnp.mean(x, axes)
      var = jnp.mean(jnp.square(x - jnp.expand_dims(mean, axes)), axes)
      if mode == "train" and not self.is_initializing():
        momentum = config_lib.BATCH_NORM_MOMENTUM
        unbiased = var * (values / (values - 1))
        running_mean.value = (1 - momentum) * running_mean.value + momentum * mean
        running_var.value = (1 - momentum) * running_var.value + momentum * unbiased
        count.value = count.value + 1
    factor = scale * jax.lax.rsqrt(var + config_lib.BATCH_NORM_EPSILON)
    return (x - jnp.expand_dims(mean, axes)) * jnp.expand_dims(factor, axes) + jnp.expand_dims(bias, axes)


class Gate(Module):
  """Latent and projected features to one logit per generator (released: `Gumbel_Net`). Always float32."""

  cfg: config_lib.Generator

  @nn.compact
  def __call__(self, z: jax.Array, projected: jax.Array, mode: str) -> jax.Array:
    """z [B, Z], projected [B, n, Z], mode as for `BatchNorm` -> logits [B, n]."""
    x = jnp.concatenate([z, projected.reshape(len(z), -1)], axis=-1)
    for i, width in enumerate((self.cfg.gate_width, self.cfg.z_dim)):
      x = dense(width, x.shape[-1], name=f"dense_{i}")(x)
      x = nn.relu(BatchNorm(self.cfg.init, name=f"norm_{i}")(x, mode))
    return dense(self.cfg.generators, x.shape[-1], name="logits")(x)


def gumbel_noise(uniform: jax.Array) -> jax.Array:
  """Draws from U[0, 1) as draws from Gumbel(0, 1), with the released code's epsilons: finite for 0 and 1 too."""
  return -jnp.log(-jnp.log(uniform + _NOISE_EPSILON) + _NOISE_EPSILON)


def gumbel_softmax(
  logits: jax.Array, uniform: jax.Array, temperature: jax.Array | float, hard: bool = True
) -> jax.Array:
  """A draw of the gate: straight-through Gumbel softmax (arXiv 1611.01144).

  The hard gate is 1, within a rounding error, for *every* generator whose probability equals the largest, as released:
  at a tie there are several.

  Args:
    logits: [B, n].
    uniform: [B, n], draws from U[0, 1).
    temperature: positive scalar.
    hard: 1 for the largest and 0 for the others, with the gradient of the softmax; else the softmax itself.

  Returns:
    [B, n] float32; ones, without a gradient, if n is 1.
  """
  if logits.shape[-1] == 1:
    return jnp.ones_like(logits)
  soft = jax.nn.softmax((logits + gumbel_noise(uniform)) / temperature, axis=-1)
  if not hard:
    return soft
  chosen = (soft == jnp.max(soft, axis=-1, keepdims=True)).astype(soft.dtype)
  return jax.lax.stop_gradient(chosen - soft) + soft


def argmax_gate(logits: jax.Array) -> jax.Array:
  """The likeliest generator's one-hot, the first one's at a tie, without a gradient. [B, n] -> [B, n] float32."""
  return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
