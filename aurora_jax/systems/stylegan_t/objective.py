"""StyleGAN-T's training objective as two phases: the discriminator's step, then the generator's (arXiv 2301.09515).

Both phases see the same real images and captions and draw latents of their own. A phase works through the batch in
micro-batches (`config.MicroBatch`), whose gradients are added up for one step. Every generated image moves the running
average of mapped latents, every judgement the vectors of the spectral norms.

  N images of a batch, n micro-batches, B = N / n images of one, b images of `micro_batch.size`, D width of the text
  feature
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aurora_jax.models import clip as clip_lib
from aurora_jax.ops import random_keys
from aurora_jax.systems import base
from aurora_jax.systems.stylegan_t import labels, losses

_LARGEST_GRADIENT = 1e5  # what an infinite one becomes


class Inputs(NamedTuple):
  """What a phase reads for N images, or for the B of a micro-batch.

  Attributes:
    real: [N, R, R, 3].
    z: [N, Z], latents.
    text: [N, D], the frozen CLIP's unit features, for discriminator and guidance; None in an unconditional system.
    generator_text: what the generator takes: `text`, or tokens [N, T] for its own text tower.
  """

  real: jax.Array
  z: jax.Array
  text: jax.Array | None
  generator_text: jax.Array | None


class Carry(NamedTuple):
  """What goes from one micro-batch to the next.

  Attributes:
    buffers: of the generator.
    spectral: the discriminator's spectral norms.
    gradients: summed so far, as the parameters they belong to.
  """

  buffers: base.PyTree
  spectral: base.PyTree
  gradients: base.PyTree


class Objective:
  """The phases of an experiment with StyleGAN-T. Every method is pure."""

  def __init__(self, system: Any, update: base.Update):
    """Args: system: `system.System`; update: applies gradients."""
    self._system, self._update = system, update
    experiment = system.experiment
    self._experiment, self._loss, self._micro = experiment, experiment.loss, experiment.micro_batch
    # The divisor of the hinge.
    self._divisor = self._micro.size if self._micro.reduction == "sum" else 1

  def phases(self) -> Sequence[base.Phase]:
    """The discriminator's step, then the generator's."""
    return [
      base.Phase("discriminator", self.train_discriminator),
      base.Phase("generator", self.train_generator),
    ]

  # ---- phases ------------------------------------------------------------------------------------------------------

  def train_discriminator(
    self, state: base.TrainState, frozen: base.Frozen, batch: Mapping[str, jax.Array], key: jax.Array
  ) -> tuple[base.TrainState, base.Metrics]:
    """The hinge on generated and on real images. The generator runs in training mode, without gradient."""
    params, generator = state.networks["discriminator"].params, state.networks["generator"].params
    sigma = self._blur_sigma(state)

    def one(carry: Carry, rows: tuple[Inputs, jax.Array]) -> tuple[Carry, base.Metrics]:
      inputs, key = rows
      keys = lambda purpose: random_keys.fold(key, purpose)
      fake, buffers = self._generate(generator, carry.buffers, inputs, keys("noise"))
      bad = base.bad_images(inputs.real, fake)

      def hinge(params, spectral, image, kind, value):
        logits, spectral = self._judge(params, spectral, frozen, self._view(image, sigma), inputs.text, keys(kind))
        loss = value(logits, self._divisor)
        return loss, (spectral, {f"d/logit_{kind}": jnp.mean(logits), "loss/d_adversarial": loss * self._divisor})

      gradient = jax.grad(hinge, has_aux=True)
      of_fake, (spectral, first) = gradient(params, carry.spectral, fake, "fake", losses.discriminator_fake)
      # One after the other: the memory of one backward pass is free before the next begins.
      of_fake, spectral = jax.lax.optimization_barrier((of_fake, spectral))
      of_real, (spectral, second) = gradient(params, spectral, inputs.real, "real", losses.discriminator_real)
      gradients = jax.tree.map(lambda *parts: sum(parts), carry.gradients, of_fake, of_real)
      loss = first.pop("loss/d_adversarial") + second.pop("loss/d_adversarial")
      return Carry(buffers, spectral, gradients), first | second | bad | {"loss/d_adversarial": loss}

    carry, metrics = self._accumulate(state, self._inputs(frozen, batch, key), key, params, one)
    metrics["d/blur_sigma"] = sigma
    variables = {"spectral": carry.spectral}
    gradients = self._reduce(carry.gradients)
    state, finite, metrics = self._update(state, "discriminator", gradients, metrics, variables=variables)
    return _with_variables(state, "generator", {"buffers": carry.buffers}, finite), metrics

  def train_generator(
    self, state: base.TrainState, frozen: base.Frozen, batch: Mapping[str, jax.Array], key: jax.Array
  ) -> tuple[base.TrainState, base.Metrics]:
    """The discriminator's judgement, and CLIP's, of new images. The discriminator runs in training mode."""
    params, discriminator = state.networks["generator"].params, state.networks["discriminator"].params
    mode = self._experiment.mode
    trained, fixed = labels.split(params, lambda path: labels.trains(mode, path))
    sigma = self._blur_sigma(state)

    def one(carry: Carry, rows: tuple[Inputs, jax.Array]) -> tuple[Carry, base.Metrics]:
      inputs, key = rows
      keys = lambda purpose: random_keys.fold(key, purpose)

      def loss(trained):
        image, buffers = self._generate(labels.join(trained, fixed), carry.buffers, inputs, keys("noise"))
        logits, spectral = self._judge(
          discriminator, carry.spectral, frozen, self._view(image, sigma), inputs.text, keys("fake")
        )
        total = losses.generator_adversarial(logits, self._divisor)
        metrics = {"loss/g_adversarial": total * self._divisor}
        if self._loss.clip_weight:
          metrics["loss/g_clip"] = self._clip_loss(frozen, image, inputs.text, keys("window"))
          total = total + self._loss.clip_weight * metrics["loss/g_clip"]
        return total, (metrics, buffers, spectral)

      gradients, (metrics, buffers, spectral) = jax.grad(loss, has_aux=True)(trained)
      return Carry(buffers, spectral, jax.tree.map(jnp.add, carry.gradients, gradients)), metrics

    carry, metrics = self._accumulate(state, self._inputs(frozen, batch, key), key, trained, one)
    gradients = labels.join(self._reduce(carry.gradients), jax.tree.map(jnp.zeros_like, fixed))
    variables = {"buffers": carry.buffers}
    state, finite, metrics = self._update(state, "generator", gradients, metrics, variables=variables)
    return _with_variables(state, "discriminator", {"spectral": carry.spectral}, finite), metrics

  # ---- micro-batches -----------------------------------------------------------------------------------------------

  def _inputs(self, frozen, batch, key):
    system = self._system
    z = system.training_latents(random_keys.fold(key, "latents"), self._experiment.train.batch_size)
    tokens = batch.get("tokens")
    text = None if tokens is None else system.text_features(frozen, tokens)
    own = self._experiment.generator.text_tower.layers
    return Inputs(batch["image"], z, text, tokens if own else text)

  def _accumulate(
    self,
    state: base.TrainState,
    inputs: Inputs,
    key: jax.Array,
    trained: base.PyTree,
    one: Callable[[Carry, tuple[Inputs, jax.Array]], tuple[Carry, base.Metrics]],
  ) -> tuple[Carry, base.Metrics]:
    """Runs `one` on every micro-batch. Returns the last carry and the mean of the metrics."""
    variables = lambda name, collection: state.networks[name].variables[collection]
    zeros = self._system.place_as_stored(jax.tree.map(jnp.zeros_like, trained))
    carry = Carry(variables("generator", "buffers"), variables("discriminator", "spectral"), zeros)
    count = self._micro.count
    rows = jax.tree.map(self._cut, inputs), jax.random.split(random_keys.fold(key, "micro_batches"), count)
    if count == 1:
      return one(carry, jax.tree.map(lambda leaf: leaf[0], rows))
    carry, metrics = jax.lax.scan(one, carry, rows)
    return carry, jax.tree.map(lambda values: jnp.mean(values, axis=0), metrics)

  def _cut(self, rows):
    """[N, ...] -> [n, B, ...].

    The batch consists of N / (n b) runs of n b samples, the shares of the published code's devices. Each run gives b of
    its samples to every micro-batch, so that on a mesh hardly any sample leaves its device.
    """
    size, count = self._micro.size, self._micro.count
    parts = rows.reshape(-1, count, size, *rows.shape[1:]).swapaxes(0, 1)
    return self._system.place(parts.reshape(count, -1, *rows.shape[1:]), axis=1)

  def _reduce(self, gradients):
    """The gradient for the optimizer from the sum over micro-batches."""
    count = self._micro.count
    factor = count if self._micro.reduction == "sum" else 1 / count
    if factor != 1:
      gradients = jax.tree.map(lambda leaf: leaf * factor, gradients)
    if not self._loss.clean_gradients:
      return gradients
    clean = lambda leaf: jnp.nan_to_num(leaf, nan=0.0, posinf=_LARGEST_GRADIENT, neginf=-_LARGEST_GRADIENT)
    return jax.tree.map(clean, gradients)

  # ---- parts -------------------------------------------------------------------------------------------------------

  def _generate(self, params, buffers, inputs, key):
    """Images [B, R, R, 3] in training mode, and the buffers with the moved average."""
    with jax.named_scope("generator"):
      out, moved = self._system.generator.apply(
        {"params": self._system.unshard("generator", params), "buffers": buffers},
        inputs.z,
        inputs.generator_text,
        noise=self._experiment.generator.noise_in_training,
        train=True,
        mutable=["buffers"],
        rngs={"noise": key},
      )
    return self._system.place(out.image), moved["buffers"]

  def _judge(self, params, spectral, frozen, image, text, key):
    """Logits in training mode, and the moved vectors of the spectral norms."""
    with jax.named_scope("discriminator"):
      logits, moved = self._system.discriminator.apply(
        {"params": self._system.unshard("discriminator", params), "spectral": spectral, "dino": frozen["dino"]},
        image,
        text,
        train=True,
        mutable=["spectral"],
        rngs={name: random_keys.fold(key, name) for name in ("augment", "crop")},
      )
    return logits, moved["spectral"]

  def _blur_sigma(self, state):
    return losses.blur_sigma(state.step.astype(jnp.float32) * self._experiment.train.batch_size, self._loss)

  def _view(self, image, sigma):
    """What the discriminator sees of an image, before augmentation."""
    return losses.discriminator_view(image, self._experiment.resolution, sigma, self._loss)

  def _clip_loss(self, frozen, image, text, key):
    """The squared angle between the frozen CLIP's features of images and captions, before its weight."""
    judging = self._experiment.discriminator
    clip = clip_lib.Clip(self._system.clip.config, jnp.dtype(judging.compute_dtype), judging.remat)
    with jax.named_scope("clip"), jax.default_matmul_precision("highest"):
      window = losses.clip_window(key, image.shape[1], image.shape[2], self._loss.clip_crop)
      seen = losses.clip_view(image, clip.config.image.size, self._loss, window)
      embedding = base.apply(clip, frozen["clip"], seen, method="encode_image")
      return losses.clip_guidance(embedding, text)


def _with_variables(state, name, variables, finite):
  """The state with collections that another network's phase moved, if that was finite."""
  network = state.networks[name]
  keep = lambda new, old: jnp.where(finite, new, old)
  return state.with_network(name, network.replace(variables=jax.tree.map(keep, variables, network.variables)))
