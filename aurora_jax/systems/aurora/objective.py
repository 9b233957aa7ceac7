"""Aurora's training objective: the phases of a step.

The main phase runs the generator forward once. Its images are constants in the discriminator's update. The updated
discriminator and CLIP then judge the same images for the generator's update. The lazy R1 penalty is a separate phase
(StyleGAN2, appendix B). The four losses are the paper's (arXiv 2309.03904): adversarial, matching-aware, multi-level
CLIP, experts. A feature critic may judge the same images too (`feature_critic.py`).

With `discriminator.augment`, DiffAugment changes all that the discriminator sees. Real images, generated images in its
update and generated images in the generator's loss have random numbers of their own. So has every level of the pyramid:
each is judged by itself.

  B batch, r resolution, W width of w
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from aurora_jax.models import layers
from aurora_jax.ops import augment, diff_augment, losses, random_keys, resample
from aurora_jax.ops.losses import Logit
from aurora_jax.systems import base, metric_names
from aurora_jax.systems.aurora import feature_critic

if TYPE_CHECKING:
  from aurora_jax.systems.aurora.system import System


class Forward(NamedTuple):
  """One forward pass of the generator, with what its backward pass needs.

  Attributes:
    pyramid: {r: [B, r, r, 3]}.
    moe_loss: scalar.
    pull_back: (parameters as the network uses them, (gradient of the pyramid, of moe_loss)) -> gradient of these
      parameters.
    w_mean: [W], over the batch.
    metrics: standard deviation of w, load of each layer's experts.
  """

  pyramid: Mapping[int, jax.Array]
  moe_loss: jax.Array
  pull_back: Any
  w_mean: jax.Array
  metrics: base.Metrics


class Objective:
  """The phases of an Aurora experiment. Every method is pure."""

  def __init__(self, system: "System", update: base.Update):
    """Args: system: an experiment's system; update: applies gradients."""
    self._system, self._update = system, update
    self._loss = system.experiment.loss
    self._inputs = system.experiment.discriminator.input_resolutions
    self._critic = feature_critic.FeatureCritic(system, update) if system.feature_critic else None
    self._clip_levels = [
      r for r in system.experiment.generator.output_resolutions if r >= self._loss.clip_min_resolution
    ]

  def phases(self) -> Sequence[base.Phase]:
    """The main phase, and R1 every `loss.r1_interval` steps."""
    phases = [base.Phase("networks", self.train_networks)]
    if self._loss.r1_gamma:
      phases.append(base.Phase("r1", self.regularize, every=self._loss.r1_interval))
    return phases

  # ---- phases ------------------------------------------------------------------------------------------------------

  def train_networks(
    self, state: base.TrainState, frozen: base.Frozen, batch: Mapping[str, jax.Array], key: jax.Array
  ) -> tuple[base.TrainState, base.Metrics]:
    """Updates the discriminator, the feature critic if there is one, then the generator. See `base.Phase`."""
    text = self._encode_captions(frozen, batch)
    forward = self._generate(state, text, key)
    # Without barriers XLA's CPU backend recomputes parts of the forward pass in the backward pass, 13 % of a step.
    forward = forward._replace(
      **jax.lax.optimization_barrier(
        {"pyramid": forward.pyramid, "pull_back": forward.pull_back, "moe_loss": forward.moe_loss}
      )
    )
    state, all_finite, d_metrics = self._update_discriminator(state, forward.pyramid, text, batch, key)
    if self._critic:
      top = self._system.experiment.resolution
      real = resample.image_pyramid(batch["image"], (top,))[top]
      state, finite, c_metrics = self._critic.train(state, frozen, real, forward.pyramid[top], text.embedding, key)
      all_finite, d_metrics = all_finite & finite, d_metrics | c_metrics
    state, all_finite = jax.lax.optimization_barrier((state, all_finite))
    state, g_metrics = self._update_generator(state, frozen, forward, text, batch, key, all_finite)
    return state, d_metrics | g_metrics | forward.metrics

  def regularize(
    self, state: base.TrainState, frozen: base.Frozen, batch: Mapping[str, jax.Array], key: jax.Array
  ) -> tuple[base.TrainState, base.Metrics]:
    """Updates the discriminator by R1, weighted by the interval between two such updates. See `base.Phase`.

    The penalty is on gradients with respect to the images before DiffAugment.
    """
    text = self._encode_captions(frozen, batch)
    real = resample.image_pyramid(batch["image"], self._inputs)

    def loss(params):
      params = self._system.unshard("discriminator", params)
      feature = self._encode_text(params, text)
      judge = lambda pyramid: self._judge(params, self._augment(pyramid, key, "r1"), feature, batch["caption_id"])
      score = lambda pyramid: losses.real_score(judge(pyramid))
      with jax.named_scope("r1"):
        penalty = losses.r1_penalty(score, real, self._loss.r1_levels)
      return self._loss.r1_gamma / 2 * self._loss.r1_interval * penalty, penalty

    gradients, penalty = jax.grad(loss, has_aux=True)(state.networks["discriminator"].params)
    state, _, metrics = self._update(state, "discriminator", gradients, {"loss/r1": penalty}, log_name="r1")
    return state, metrics

  # ---- generator ---------------------------------------------------------------------------------------------------

  def _generate(self, state, text, key):
    network, system = state.networks["generator"], self._system
    z = jax.random.normal(random_keys.fold(key, "latents"), (len(text.eot), system.experiment.generator.z_dim))

    def synthesize(used):
      with jax.named_scope("generator"):
        variables = {"params": used, **network.variables}
        out = base.apply(system.generator, variables, z, text.features, text.eot)
      return (out.pyramid, out.moe_loss), (out.w, out.routing)

    used = system.unshard("generator", network.params)
    (pyramid, moe_loss), pull_back, (w, routing) = jax.vjp(synthesize, used, has_aux=True)
    metrics = {"g/w_std": jnp.mean(jnp.std(w, axis=0))} | _expert_loads(routing)
    return Forward(pyramid, moe_loss, _without(pull_back, used), jnp.mean(w, axis=0), metrics)

  def _update_generator(self, state, frozen, forward, text, batch, key, all_finite):
    d_params, loss = state.networks["discriminator"].params, self._loss
    cotangent, metrics = jax.grad(self._generator_loss, has_aux=True)(
      forward.pyramid, d_params, text, batch["caption_id"], key
    )
    spectral = None
    if self._critic:
      top = self._system.experiment.resolution
      guidance, spectral, more = self._critic.guide(state, frozen, forward.pyramid[top], text.embedding, key)
      cotangent |= {top: cotangent[top] + guidance}
      metrics |= more
    if loss.clip_weight:
      guidance, more = self._clip_guidance(
        frozen, random_keys.fold(key, "clip_augment"), forward.pyramid, text, batch["caption_id"]
      )
      cotangent |= {r: cotangent[r] + guidance[r] for r in guidance}
      metrics |= more
    gradients = self._pull_back(forward, state.networks["generator"].params, cotangent)
    metrics |= {"loss/moe": forward.moe_loss}
    buffers = state.networks["generator"].variables["buffers"]
    decay = self._system.experiment.generator.w_average_decay
    w_average = buffers["w_avg"] + (1 - decay) * (forward.w_mean - buffers["w_avg"])
    variables = {"buffers": {**buffers, "w_avg": w_average}}
    state, finite, metrics = self._update(
      state, "generator", gradients, metrics, all_finite=all_finite, variables=variables
    )
    return state if spectral is None else feature_critic.with_spectral(state, spectral, finite), metrics

  def _pull_back(self, forward, params, cotangent):
    """The gradient of the stored parameters, from that of the images.

    FSDP parameters are unsharded again: stored since the forward pass, they would take most of the backward pass's
    memory. The barrier keeps XLA from merging the two.
    """
    if self._system.layout.devices > 1:
      params, cotangent = jax.lax.optimization_barrier((params, cotangent))
    else:
      cotangent = jax.lax.optimization_barrier(cotangent)
    used, scatter = jax.vjp(lambda params: self._system.unshard("generator", params), params)
    (gradients,) = scatter(forward.pull_back(used, (cotangent, jnp.float32(self._loss.moe_weight))))
    return gradients

  def _generator_loss(self, pyramid, d_params, text, caption_id, key):
    """The generator's loss by the discriminator, as a function of the images."""
    d_params = self._system.unshard("discriminator", d_params)
    feature = jax.lax.stop_gradient(self._encode_text(d_params, text))
    fake = self._augment({r: pyramid[r] for r in self._inputs}, key, "generator")
    logits = self._judge(d_params, fake, feature, caption_id)
    with jax.named_scope("losses"):
      adversarial = losses.generator_adversarial(logits, self._loss)
      metrics, total = {"loss/g_adversarial": adversarial}, adversarial
    if self._loss.generator_matching_weight:
      other = self._judge(d_params, fake, jnp.roll(feature, 1, axis=0), caption_id)
      matching = losses.generator_matching(other, self._loss)
      metrics["loss/g_matching"] = matching
      total = total + self._loss.generator_matching_weight * matching
    return total, metrics

  def _clip_guidance(self, frozen, key, pyramid, text, caption_id):
    """The mean over pyramid levels of the symmetric InfoNCE, and its gradient.

    The levels run one after the other, each forward and backward: the image tower's activations take most of the memory
    of a large CLIP. All levels are resized to the tower's input, so the loop has one body.

    Returns:
      (gradient of clip_weight times the loss with respect to the levels, metrics).
    """
    loss_cfg, clip = self._loss, self._system.clip
    scale = loss_cfg.clip_logit_scale or base.apply(clip, frozen["clip"], method="logit_scale")
    same = caption_id[:, None] == caption_id
    bank = {}
    if loss_cfg.clip_bank:
      bank = {"bank": frozen["bank"], "same_as_bank": caption_id[:, None] == frozen["bank_id"]}

    def as_seen(pyramid):
      if loss_cfg.clip_augment:
        pyramid = {r: augment.roughen(jax.random.fold_in(key, r), images) for r, images in pyramid.items()}
      return jnp.stack([base.apply(clip, frozen["clip"], images, method="fit") for images in pyramid.values()])

    def loss(images):
      with jax.named_scope("clip"):
        embedding = base.apply(clip, frozen["clip"], images, method="encode_image")
        return losses.contrastive_loss(embedding, text.embedding, scale, same, **bank)

    images, pull_back = jax.vjp(as_seen, {r: pyramid[r] for r in self._clip_levels})
    (values, accuracies), gradients = jax.lax.map(jax.value_and_grad(loss, has_aux=True), images)
    (gradient,) = pull_back(gradients * (loss_cfg.clip_weight / len(self._clip_levels)))
    return gradient, {"loss/g_clip": jnp.mean(values), "clip/accuracy": accuracies[-1]}

  # ---- discriminator -----------------------------------------------------------------------------------------------

  def _update_discriminator(self, state, pyramid, text, batch, key):
    real = self._augment(resample.image_pyramid(batch["image"], self._inputs), key, "real")
    fake = self._augment({r: pyramid[r] for r in self._inputs}, key, "fake")
    gradients, metrics = jax.grad(self._discriminator_loss, has_aux=True)(
      state.networks["discriminator"].params, real, fake, text, batch["caption_id"]
    )
    metrics |= base.bad_images(batch["image"], pyramid[max(pyramid)])
    return self._update(state, "discriminator", gradients, metrics)

  def _discriminator_loss(self, params, real, fake, text, caption_id):
    """real, fake: pyramids {r: [B, r, r, 3]}; both pass the trunk as one batch."""

    def run(module):
      feature = module.encode_text(text.features, text.eot)
      other = jnp.roll(feature, 1, axis=0)
      both = {r: layers.join([real[r], fake[r]], len(feature)) for r in self._inputs}
      trunk = module.features(both, kinds=2, caption_id=caption_id)
      return module.judge(trunk, jnp.repeat(feature, 2, axis=0)), module.judge(trunk, jnp.repeat(other, 2, axis=0))

    params = self._system.unshard("discriminator", params)
    with jax.named_scope("discriminator"):
      matched, mismatched = base.apply(self._system.discriminator, {"params": params}, method=run)
    (real_logits, fake_logits), (real_other, fake_other) = _halves(matched), _halves(mismatched)
    with jax.named_scope("losses"):
      adversarial = losses.discriminator_adversarial(real_logits, fake_logits, self._loss)
      matching = losses.discriminator_matching(real_other, fake_other, self._loss)
    metrics = {
      "loss/d_adversarial": adversarial,
      "loss/d_matching": matching,
      metric_names.LOGIT_REAL: _last_exit(real_logits),
      metric_names.LOGIT_FAKE: _last_exit(fake_logits),
      "d/logit_mismatched": _last_exit(real_other),
    }
    return adversarial + self._loss.matching_weight * matching, metrics

  def _augment(self, pyramid, key, purpose):
    """The pyramid [B, r, r, 3] after DiffAugment, every image and level by its own numbers."""
    policy = self._system.experiment.discriminator.augment
    if not policy:
      return pyramid
    key = random_keys.fold(key, f"discriminator_augment/{purpose}")
    with jax.named_scope("diff_augment"):
      return {r: diff_augment.augment(jax.random.fold_in(key, r), images, policy) for r, images in pyramid.items()}

  def _judge(self, params, pyramid, text_feature, caption_id):
    def run(module):
      return module.judge(module.features(pyramid, caption_id=caption_id), text_feature)

    with jax.named_scope("discriminator"):
      return base.apply(self._system.discriminator, {"params": params}, method=run)

  def _encode_text(self, params, text):
    return base.apply(self._system.discriminator, {"params": params}, text.features, text.eot, method="encode_text")

  def _encode_captions(self, frozen, batch):
    with jax.named_scope("clip_text"):
      return base.apply(self._system.clip, frozen["clip"], batch["tokens"], method="encode_text")


def _without(pull_back, used):
  """A backward function without the parameters among its residuals: (parameters, cotangents) -> their gradient.

  The result is a pytree like `pull_back`. Most residuals of rematerialized blocks are their parameters.
  (`jax.checkpoint`
  of the whole network is no way to drop them: it overrides the choices within the blocks and stores everything.)

  Args:
    pull_back: the backward function that `jax.vjp` returned.
    used: the parameters of the differentiated function.
  """
  leaves, structure = jax.tree.flatten(pull_back)
  places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(used))}
  shared = [places.get(id(leaf)) for leaf in leaves]

  def join(computed, used, cotangents):
    computed, used = iter(computed), jax.tree.leaves(used)
    leaves = [next(computed) if place is None else used[place] for place in shared]
    return structure.unflatten(leaves)(cotangents)[0]

  return jax.tree_util.Partial(join, [leaf for leaf, place in zip(leaves, shared) if place is None])


def _halves(logits):
  """Separates the logits of real and generated images that were joined by `layers.join`."""
  parts = [layers.unjoin(logit.value, 2) for logit in logits]
  return tuple([logit.replace(value=part[i]) for logit, part in zip(logits, parts)] for i in (0, 1))


def _last_exit(logits: Sequence[Logit]) -> jax.Array:
  """Mean logit of the highest level at the last exit."""
  top = max(logit.level for logit in logits)
  return next(jnp.mean(logit.value) for logit in logits if logit.level == top and logit.exit == 1)


def _expert_loads(routing):
  """Share of tokens per expert, {"moe/load/LAYER": [E]}."""
  experts = {layer: item.logits.shape[-1] for layer, item in routing.items()}
  return {
    f"{metric_names.EXPERT_LOAD}{layer}": jnp.mean(jax.nn.one_hot(item.expert, experts[layer]), axis=(0, 1))
    for layer, item in routing.items()
  }
