"""Losses of text-conditional GANs (arXiv 2309.03904) and the R1 penalty, as pure functions.

The losses are adversarial (non-saturating logistic), matching-aware (mismatched captions, GigaGAN, eq. 8) and
contrastive (symmetric InfoNCE). All are float32 means over the batch, for a sharded batch over the global one.

  B batch, D embedding width, M bank size
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Logit:
  """One prediction. Positive values mean real and matching.

  Attributes:
    value: float32 [B, exit, exit].
    level: resolution of the pyramid level.
    exit: side of the prediction; 1 is the last exit.
  """

  value: jax.Array
  level: int = flax.struct.field(pytree_node=False)
  exit: int = flax.struct.field(pytree_node=False)


class LossWeights(Protocol):
  """The weights that these losses read of a configuration.

  Attributes:
    level_weights: {pyramid level: weight}; other levels have `level_weight_default`.
    early_exit_adversarial: weight of all exits but the last, in the adversarial loss.
    early_exit_matching: the same in the matching loss.
    matching_real: weight of the matching loss on real images.
    matching_fake: the same on generated images.
  """

  @property
  def level_weights(self) -> Mapping[int, float]: ...
  @property
  def level_weight_default(self) -> float: ...
  @property
  def early_exit_adversarial(self) -> float: ...
  @property
  def early_exit_matching(self) -> float: ...
  @property
  def matching_real(self) -> float: ...
  @property
  def matching_fake(self) -> float: ...


def normalize(embedding: jax.Array) -> jax.Array:
  """Scales embeddings [..., D] to length 1, float32. Zeros stay zeros."""
  embedding = embedding.astype(jnp.float32)
  return embedding * jax.lax.rsqrt(jnp.sum(jnp.square(embedding), axis=-1, keepdims=True) + 1e-12)


def _weight(logit, cfg, early_exit):
  level = cfg.level_weights.get(logit.level, cfg.level_weight_default)
  return level * (1.0 if logit.exit == 1 else early_exit)


def weighted_mean(
  logits: Sequence[Logit], cfg: LossWeights, early_exit: float, function: Callable[[jax.Array], jax.Array]
) -> jax.Array:
  """Sum over predictions of level weight * exit weight * mean of `function`.

  Args:
    logits: the predictions.
    cfg: the weights.
    early_exit: weight of all exits but the last.
    function: applied to the values of each prediction.

  Returns:
    float32 scalar.
  """
  return sum(_weight(logit, cfg, early_exit) * jnp.mean(function(logit.value)) for logit in logits)


def discriminator_adversarial(real: Sequence[Logit], fake: Sequence[Logit], cfg: LossWeights) -> jax.Array:
  """softplus(-D(real)) + softplus(D(fake)) over all predictions."""
  return weighted_mean(real, cfg, cfg.early_exit_adversarial, lambda x: jax.nn.softplus(-x)) + weighted_mean(
    fake, cfg, cfg.early_exit_adversarial, jax.nn.softplus
  )


def discriminator_matching(real: Sequence[Logit], fake: Sequence[Logit], cfg: LossWeights) -> jax.Array:
  """softplus(D(x, other caption)) on real and generated images: mismatched pairs count as fakes."""
  return cfg.matching_real * weighted_mean(
    real, cfg, cfg.early_exit_matching, jax.nn.softplus
  ) + cfg.matching_fake * weighted_mean(fake, cfg, cfg.early_exit_matching, jax.nn.softplus)


def generator_adversarial(fake: Sequence[Logit], cfg: LossWeights) -> jax.Array:
  """softplus(-D(fake)) over all predictions."""
  return weighted_mean(fake, cfg, cfg.early_exit_adversarial, lambda x: jax.nn.softplus(-x))


def generator_matching(fake: Sequence[Logit], cfg: LossWeights) -> jax.Array:
  """softplus(-D(x, other caption)) on generated images."""
  return weighted_mean(fake, cfg, cfg.early_exit_matching, lambda x: jax.nn.softplus(-x))


def r1_penalty(
  score: Callable[[dict[int, jax.Array]], jax.Array], pyramid: Mapping[int, jax.Array], levels: Sequence[int] = ()
) -> jax.Array:
  """Mean over samples of the squared gradient of the score with respect to the images (R1, arXiv 1801.04406).

  Args:
    score: pyramid -> [B], where each entry depends only on its sample.
    pyramid: {r: [B, r, r, 3]}.
    levels: levels whose gradients count; () for all.

  Returns:
    float32 scalar, without the factor gamma / 2.
  """
  chosen = {r: pyramid[r] for r in levels or pyramid}
  # Squaring doubles the relative error of the gradient, and the penalty is differentiated again.
  with jax.default_matmul_precision("highest"):
    gradients = jax.grad(lambda images: jnp.sum(score({**pyramid, **images})))(chosen)
  return sum(jnp.mean(jnp.sum(jnp.square(gradient), axis=(1, 2, 3))) for gradient in gradients.values())


def real_score(logits: Sequence[Logit]) -> jax.Array:
  """The score for R1: the sum over all predictions of their means over pixels, [B]."""
  return sum(jnp.mean(logit.value, axis=(1, 2)) for logit in logits)


@jax.named_scope("contrastive_loss")
def contrastive_loss(
  image_embedding: jax.Array,
  text_embedding: jax.Array,
  scale: float | jax.Array,
  same: jax.Array | None = None,
  bank: jax.Array | None = None,
  same_as_bank: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3; released: `clip_model.py`).

  Args:
    image_embedding, text_embedding: [B, D], of any norm. Row i of one belongs to row i of the other.
    scale: factor on the cosines.
    same: bool [B, B] or None. If True outside the diagonal, the two rows are not negatives of each other.
    bank: [M, D] of norm 1, or None: captions that are additional negatives for the images.
    same_as_bank: bool [B, M], required with a bank. If True, the bank's caption is no negative of that row.

  Returns:
    (loss, accuracy), float32 scalars. The accuracy is the share of images whose caption ranks first.
  """
  images, texts = normalize(image_embedding), normalize(text_embedding)
  exact = jax.lax.Precision.HIGHEST
  logits = jnp.matmul(scale * images, texts.T, precision=exact)  # [image, text]
  diagonal = jnp.eye(len(logits), dtype=bool)
  if same is not None:
    logits = jnp.where(same & ~diagonal, -jnp.inf, logits)
  right = jnp.diagonal(logits)
  by_text = jnp.mean(jax.nn.logsumexp(logits, axis=0) - right)
  if bank is not None:
    others = jnp.where(same_as_bank, -jnp.inf, jnp.matmul(scale * images, bank.T, precision=exact))
    logits = jnp.concatenate([logits, others], axis=1)
  by_image = jnp.mean(jax.nn.logsumexp(logits, axis=1) - right)
  accuracy = jnp.mean((jnp.argmax(logits, axis=1) == jnp.arange(len(logits))).astype(jnp.float32))
  return (by_image + by_text) / 2, accuracy
