"""The feature critic's part of Aurora's training: its update, and what it asks of the generator.

StyleGAN-T's discriminator (arXiv 2301.09515, section 3.2) on a frozen DINO judges images of the highest resolution with
a hinge loss. Every judgement moves the vectors of its spectral norms, as in StyleGAN-T.

  B batch, R resolution, D width of CLIP's embeddings
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from aurora_jax.ops import random_keys
from aurora_jax.ops.losses import normalize
from aurora_jax.systems import base

if TYPE_CHECKING:
  from aurora_jax.systems.aurora.system import System

NAME, LOG_NAME = "feature_critic", "c"  # of the network, in a state and in metrics


class FeatureCritic:
  """The losses of the feature critic. Every method is pure."""

  def __init__(self, system: "System", update: base.Update):
    """Args: system: an experiment's system with such a critic; update: applies gradients."""
    self._system, self._update, self._cfg = system, update, system.experiment.feature_critic

  def train(
    self,
    state: base.TrainState,
    frozen: base.Frozen,
    real: jax.Array,
    fake: jax.Array,
    embedding: jax.Array,
    key: jax.Array,
  ) -> tuple[base.TrainState, jax.Array | bool, base.Metrics]:
    """Updates the critic by the hinge loss on generated images, then real ones.

    Args:
      state: the state before the update.
      frozen: of `System.load_frozen`.
      real, fake: [B, R, R, 3]; no gradient passes to them.
      embedding: [B, D], of the captions, of any norm.
      key: PRNG key of the phase.

    Returns:
      (state, bool scalar: whether all was finite, metrics).
    """
    network = state.networks[NAME]

    def hinge(params, spectral, image, kind, sign):
      logits, spectral = self._judge(params, spectral, frozen, image, embedding, key, kind)
      loss = jnp.mean(jax.nn.relu(1 + sign * logits))
      return loss, (spectral, loss, jnp.mean(logits))

    gradient = jax.grad(hinge, has_aux=True)
    of_fake, (spectral, fake_loss, fake_logit) = gradient(
      network.params, network.variables["spectral"], fake, "fake", 1
    )
    # One after the other: the memory of one backward pass is free before the next begins.
    of_fake, spectral = jax.lax.optimization_barrier((of_fake, spectral))
    of_real, (spectral, real_loss, real_logit) = gradient(network.params, spectral, real, "real", -1)
    metrics = {
      f"loss/{LOG_NAME}_adversarial": fake_loss + real_loss,
      f"{LOG_NAME}/logit_real": real_logit,
      f"{LOG_NAME}/logit_fake": fake_logit,
    }
    gradients = jax.tree.map(jnp.add, of_fake, of_real)
    return self._update(state, NAME, gradients, metrics, variables={"spectral": spectral})

  def guide(
    self, state: base.TrainState, frozen: base.Frozen, image: jax.Array, embedding: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, base.PyTree, base.Metrics]:
    """The gradient of the generator's loss by the critic, weight * -mean(logit), with respect to its images.

    Args:
      state: with the updated critic.
      frozen: of `System.load_frozen`.
      image: [B, R, R, 3], generated.
      embedding: [B, D], of the captions, of any norm.
      key: PRNG key of the phase.

    Returns:
      (gradient [B, R, R, 3], the moved vectors of the spectral norms, metrics with the loss before its weight).
    """
    network = state.networks[NAME]

    def loss(image):
      logits, spectral = self._judge(
        network.params, network.variables["spectral"], frozen, image, embedding, key, "generator"
      )
      value = -jnp.mean(logits)
      return self._cfg.weight * value, (spectral, value)

    gradient, (spectral, value) = jax.grad(loss, has_aux=True)(image)
    return gradient, spectral, {"loss/g_critic": value}

  def _judge(self, params, spectral, frozen, image, embedding, key, kind):
    """Logits [B, heads * tokens] in training mode, and the moved vectors of the spectral norms."""
    key = random_keys.fold(key, f"feature_critic/{kind}")
    module: Any = self._system.feature_critic
    with jax.named_scope("feature_critic"):
      logits, moved = module.apply(
        {"params": self._system.unshard(NAME, params), "spectral": spectral, "dino": frozen["dino"]},
        image,
        normalize(embedding) if self._cfg.text_dim else None,
        train=True,
        mutable=["spectral"],
        rngs={name: random_keys.fold(key, name) for name in ("augment", "crop")},
      )
    return logits, moved["spectral"]


def with_spectral(state: base.TrainState, spectral: base.PyTree, finite: jax.Array | bool) -> base.TrainState:
  """The state with the critic's spectral norms as the generator's update moved them, if that update was finite."""
  network = state.networks[NAME]
  moved = jax.tree.map(lambda new, old: jnp.where(finite, new, old), spectral, network.variables["spectral"])
  return state.with_network(NAME, dataclasses.replace(network, variables={**network.variables, "spectral": moved}))
