"""The four losses of Aurora (arXiv 2309.03904) and the R1 penalty, as pure functions.

Adversarial (non-saturating logistic), matching-aware (mismatched captions, GigaGAN eq. 8), multi-level CLIP (symmetric
InfoNCE on every pyramid level) and the experts' balance, which the generator returns. All are float32 means over the
batch given; under a sharded batch that is the global batch.

  B batch, D embedding width, M bank size
"""

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Logit:
  """One prediction: positive means real and matching."""

  value: jax.Array  # [B, exit, exit] float32
  level: int = flax.struct.field(pytree_node=False)
  exit: int = flax.struct.field(pytree_node=False)


def normalize(embedding):
  """Embeddings [..., D] on the unit sphere, float32."""
  embedding = embedding.astype(jnp.float32)
  return embedding * jax.lax.rsqrt(jnp.sum(jnp.square(embedding), axis=-1, keepdims=True) + 1e-12)


def _weight(logit, cfg, early_exit):
  level = cfg.level_weights.get(logit.level, cfg.level_weight_default)
  return level * (1.0 if logit.exit == 1 else early_exit)


def weighted_mean(logits, cfg, early_exit, function):
  """Sum over predictions of level weight * exit weight * mean of `function`.

  Args:
    logits: list of `discriminator.Logit`.
    cfg: `config.Loss`.
    early_exit: weight of all exits but the last.
    function: of a logit array.

  Returns:
    float32 scalar.
  """
  return sum(_weight(logit, cfg, early_exit) * jnp.mean(function(logit.value)) for logit in logits)


def discriminator_adversarial(real, fake, cfg):
  """softplus(-D(real)) + softplus(D(fake)) over all predictions."""
  return weighted_mean(real, cfg, cfg.early_exit_adversarial, lambda x: jax.nn.softplus(-x)) + weighted_mean(
    fake, cfg, cfg.early_exit_adversarial, jax.nn.softplus
  )


def discriminator_matching(real, fake, cfg):
  """softplus(D(x, other caption)) on real and on generated images: a mismatched pair is no better than a fake."""
  return cfg.matching_real * weighted_mean(
    real, cfg, cfg.early_exit_matching, jax.nn.softplus
  ) + cfg.matching_fake * weighted_mean(fake, cfg, cfg.early_exit_matching, jax.nn.softplus)


def generator_adversarial(fake, cfg):
  """softplus(-D(fake)) over all predictions."""
  return weighted_mean(fake, cfg, cfg.early_exit_adversarial, lambda x: jax.nn.softplus(-x))


def generator_matching(fake, cfg):
  """softplus(-D(x, other caption)) on generated images."""
  return weighted_mean(fake, cfg, cfg.early_exit_matching, lambda x: jax.nn.softplus(-x))


def r1_penalty(score, pyramid, levels=()):
  """Mean over samples of the squared gradient of the real score with respect to the pyramid's images.

  Args:
    score: function pyramid -> [B], each entry depending on its own sample only.
    pyramid: {r: [B, r, r, 3]}.
    levels: those whose gradient counts; (): all.

  Returns:
    float32 scalar, without gamma / 2.
  """
  chosen = {r: pyramid[r] for r in levels or pyramid}
  gradients = jax.grad(lambda images: jnp.sum(score({**pyramid, **images})))(chosen)
  return sum(jnp.mean(jnp.sum(jnp.square(gradient), axis=(1, 2, 3))) for gradient in gradients.values())


def real_score(logits):
  """What R1 is taken of: the sum over all predictions of their mean over pixels. list of `Logit` -> [B]."""
  return sum(jnp.mean(logit.value, axis=(1, 2)) for logit in logits)


def contrastive_loss(image_embedding, text_embedding, scale, same=None, bank=None, same_as_bank=None):
  """Symmetric InfoNCE (CLIP, arXiv 2103.00020, figure 3; released: `clip_model.py`).

  Args:
    image_embedding, text_embedding: [B, D], not normalised; row i of one belongs to row i of the other.
    scale: the factor on cosines.
    same: bool [B, B] or None; where True outside the diagonal, the two rows are no negatives of each other.
    bank: [M, D] on the unit sphere or None, captions that are further negatives for the images.
    same_as_bank: bool [B, M]; where True, the bank's caption is no negative of that row.

  Returns:
    (loss, accuracy): float32 scalars; the accuracy is the share of images whose own caption ranks first.
  """
  images, texts = normalize(image_embedding), normalize(text_embedding)
  logits = scale * images @ texts.T  # [image, text]
  own = jnp.eye(len(logits), dtype=bool)
  if same is not None:
    logits = jnp.where(same & ~own, -jnp.inf, logits)
  right = jnp.diagonal(logits)
  by_text = jnp.mean(jax.nn.logsumexp(logits, axis=0) - right)
  if bank is not None:
    others = jnp.where(same_as_bank, -jnp.inf, scale * images @ bank.T)
    logits = jnp.concatenate([logits, others], axis=1)
  by_image = jnp.mean(jax.nn.logsumexp(logits, axis=1) - right)
  accuracy = jnp.mean((jnp.argmax(logits, axis=1) == jnp.arange(len(logits))).astype(jnp.float32))
  return (by_image + by_text) / 2, accuracy
