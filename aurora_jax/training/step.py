"""The training step: discriminator on real, generated and mismatched pairs, then generator; lazy R1 on its own.

A step is four programs, one after the other, each small and compiled by itself (training/ahead.py). The generator
runs forward once a step (`generate`): its images serve the discriminator's update (`discriminate`, as constants) and,
judged by the *updated* discriminator and by CLIP (`judge`), its own (`learn`), which pulls the images' gradient back
through what the forward pass left.

Each update lies within one program, with its gradient. Where a loss or gradient is not finite (training/guard.py), the
discriminator's leaves out both updates, the generator's its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp

from aurora_jax import config as config_lib
from aurora_jax.models import clip as clip_lib
from aurora_jax.models import layers
from aurora_jax.ops import losses, moe
from aurora_jax.systems.aurora import critic as critic_lib
from aurora_jax.systems.aurora import discriminator as discriminator_lib
from aurora_jax.systems.aurora import generator as generator_lib
from aurora_jax.training import guard as guard_lib
from aurora_jax.training import pull_back as pull_back_lib
from aurora_jax.training import state as state_lib


class Frozen(NamedTuple):
  """What training reads and never changes.

  Attributes:
    clip: variables of the CLIP.
    bank: [M, D] caption embeddings on the unit sphere, further negatives of the CLIP loss; M may be 0.
    bank_id: [M] int32, what each caption of the bank is (`schema.caption_id`).
  """

  clip: Any
  bank: jax.Array
  bank_id: jax.Array


@flax.struct.dataclass
class Generated:
  """What a step's forward pass of the generator leaves for the other programs.

  Attributes:
    text: CLIP's `TextOutput` of the captions.
    pyramid: {r: [B, r, r, 3]}.
    w_mean: [W], over the batch.
    moe_loss: scalar.
    residuals: for the backward pass.
    metrics: share of tokens per expert, spread of w.
  """

  text: Any
  pyramid: Any
  w_mean: jax.Array
  moe_loss: jax.Array
  residuals: pull_back_lib.Residuals
  metrics: Any


class Programs(NamedTuple):
  """The compiled-to-be functions of an experiment. Only those named state take and return a whole TrainState.

  Attributes:
    init: key -> TrainState.
    generate: (generator, buffers, step, clip, tokens) -> Generated.
    discriminate: (discriminator, discriminator_opt, step, pyramid, text, image, caption_id) -> (discriminator,
      discriminator_opt, healthy, metrics); healthy: bool scalar, whether all losses and gradients so far are finite.
    judge: (discriminator, step, frozen, pyramid, text, caption_id, healthy) -> (gradient of the pyramid, healthy, metrics).
    learn: (generator, generator_opt, ema, buffers, step, gradient of the pyramid, w_mean, moe_loss, residuals, healthy) ->
      (generator, generator_opt, ema, buffers, step, metrics).
    snapshot: (generator, discriminator) -> copies of both.
    moved: (snapshot, generator, discriminator) -> metrics, what the updates since did to the parameters.
    r1_step: (state, frozen, batch) -> (state, metrics), the discriminator's lazy regularisation.
  """

  init: Callable
  generate: Callable
  discriminate: Callable
  judge: Callable
  learn: Callable
  snapshot: Callable
  moved: Callable
  r1_step: Callable


def run_step(programs, state, frozen, batch, measure=False):
  """Runs a step's programs: (state, frozen, batch) -> (state, metrics).

  Args:
    programs: `Programs`, jitted, compiled or neither.
    state: `TrainState`; donated, where the programs do that.
    frozen: `Frozen`.
    batch: `image` [B, R, R, 3] in [-1, 1], `tokens` [B, N] int32, `caption_id` [B] int32 (of the pictures'
      primary captions: those that share one are no negatives of each other, and the discriminator may compare them).
    measure: whether to measure the updates too (`moved`); takes a copy of both networks for the time.
  """
  snapshot = programs.snapshot(state.generator, state.discriminator) if measure else None
  made = programs.generate(state.generator, state.buffers, state.step, frozen.clip, batch["tokens"])
  discriminator, discriminator_opt, healthy, d_metrics = programs.discriminate(
    state.discriminator,
    state.discriminator_opt,
    state.step,
    made.pyramid,
    made.text,
    batch["image"],
    batch["caption_id"],
  )
  cotangent, healthy, j_metrics = programs.judge(
    discriminator, state.step, frozen, made.pyramid, made.text, batch["caption_id"], healthy
  )
  generator, generator_opt, ema, buffers, step, g_metrics = programs.learn(
    state.generator,
    state.generator_opt,
    state.ema,
    state.buffers,
    state.step,
    cotangent,
    made.w_mean,
    made.moe_loss,
    made.residuals,
    healthy,
  )
  state = state_lib.TrainState(
    step=step,
    generator=generator,
    buffers=buffers,
    ema=ema,
    discriminator=discriminator,
    generator_opt=generator_opt,
    discriminator_opt=discriminator_opt,
  )
  moved = programs.moved(snapshot, generator, discriminator) if measure else {}
  return state, {**d_metrics, **j_metrics, **g_metrics, **made.metrics, **moved}


def build(
  experiment: config_lib.Experiment, clip: clip_lib.Clip, expert_ffn=moe.expert_ffn, gather=lambda params: params
):
  """The programs of an experiment.

  Args:
    experiment: the configuration; for a stage of progressive growing `config.at_stage`, whose programs take the whole
      one's state. The first state is made by the whole one's `init`.
    clip: the CLIP module whose variables `Frozen` holds.
    expert_ffn: how the generator evaluates its experts (on a mesh: `parallel.experts.Exchange`).
    gather: parameters as they are stored -> as they are used (on a mesh: `parallel.mesh.Layout.gather`).

  Returns:
    `Programs` of pure, unjitted functions.
  """
  cfg, loss_cfg, opt_cfg, train = (experiment.generator, experiment.loss, experiment.optimizer, experiment.train)
  generator = generator_lib.Generator(cfg, expert_ffn)
  discriminator: critic_lib.Critic = discriminator_lib.Discriminator(experiment.discriminator)
  inputs = experiment.discriminator.input_resolutions
  batch_size = train.batch_size
  # StyleGAN2, appendix B: with an extra regularisation step every k, rate and decay shrink by k / (k + 1).
  lazy = loss_cfg.r1_interval / (loss_cfg.r1_interval + 1) if loss_cfg.r1_gamma else 1.0
  stage = experiment.schedule, cfg.resolution
  g_optimizer = state_lib.optimizer(opt_cfg, opt_cfg.beta2, *stage)
  d_optimizer = state_lib.optimizer(opt_cfg, opt_cfg.beta2**lazy, *stage)
  guard = guard_lib.of(train)
  clip_levels = [r for r in cfg.output_resolutions if r >= loss_cfg.clip_min_resolution]

  def init(key):
    g_key, d_key = jax.random.split(key)
    z, text = jnp.zeros((1, cfg.z_dim)), jnp.zeros((1, 2, cfg.text_feature_dim))
    eot = jnp.zeros((1,), jnp.int32)
    # One image cannot be spread over a mesh, and how the experts are evaluated makes no difference here.
    variables = generator_lib.Generator(cfg).init(g_key, z, text, eot)
    pyramid = {r: jnp.zeros((1, r, r, 3)) for r in inputs}
    d_params = discriminator.init(d_key, pyramid, text, eot)["params"]
    return state_lib.TrainState(
      step=jnp.int32(0),
      generator=variables["params"],
      buffers=variables["buffers"],
      ema=jax.tree.map(jnp.copy, variables["params"]),
      discriminator=d_params,
      generator_opt=g_optimizer.init(variables["params"]),
      discriminator_opt=d_optimizer.init(d_params),
    )

  def judge(params, pyramid, text_feature, caption_id):
    def run(module):
      return module.judge(module.features(pyramid, caption_id=caption_id), text_feature)

    return discriminator.apply({"params": params}, method=run)

  def encode(params, text):
    return discriminator.apply({"params": params}, text.features, text.eot, method="encode_text")

  def discriminator_loss(params, real, fake, text, caption_id):
    """real, fake: pyramids {r: [B, r, r, 3]}; both travel through the trunk as one batch."""

    def run(module):
      feature = module.encode_text(text.features, text.eot)
      other = jnp.roll(feature, 1, axis=0)
      both = {r: layers.join([real[r], fake[r]], len(feature)) for r in inputs}
      trunk = module.features(both, kinds=2, caption_id=caption_id)
      return module.judge(trunk, jnp.repeat(feature, 2, axis=0)), module.judge(trunk, jnp.repeat(other, 2, axis=0))

    def halves(logits):
      parts = [layers.unjoin(logit.value, 2) for logit in logits]
      return (
        [logit.replace(value=part[0]) for logit, part in zip(logits, parts)],
        [logit.replace(value=part[1]) for logit, part in zip(logits, parts)],
      )

    matched, mismatched = discriminator.apply({"params": gather(params)}, method=run)
    (real_logits, fake_logits), (real_other, fake_other) = halves(matched), halves(mismatched)
    adversarial = losses.discriminator_adversarial(real_logits, fake_logits, loss_cfg)
    matching = losses.discriminator_matching(real_other, fake_other, loss_cfg)
    metrics = {
      "loss/d_adversarial": adversarial,
      "loss/d_matching": matching,
      "d/logit_real": _last_exit(real_logits),
      "d/logit_fake": _last_exit(fake_logits),
      "d/logit_mismatched": _last_exit(real_other),
    }
    return adversarial + loss_cfg.matching_weight * matching, metrics

  def clip_guidance(frozen, key, pyramid, text, caption_id):
    """The mean over pyramid levels of the symmetric InfoNCE, and its gradient.

    One level after the other, each forward and back: what the image tower leaves for the way back is most of a large
    CLIP's memory. All levels are of one size when the tower sees them, so that it is compiled once.

    Returns:
      (gradient of the pyramid's levels with respect to clip_weight times the loss, metrics).
    """
    scale = loss_cfg.clip_logit_scale or clip.apply(frozen.clip, method="logit_scale")
    same = caption_id[:, None] == caption_id
    bank = dict(bank=frozen.bank, same_as_bank=caption_id[:, None] == frozen.bank_id) if loss_cfg.clip_bank else {}

    def as_seen(pyramid):
      if loss_cfg.clip_augment:
        pyramid = {r: losses.roughen(jax.random.fold_in(key, r), images) for r, images in pyramid.items()}
      return jnp.stack([clip.apply(frozen.clip, images, method="fit") for images in pyramid.values()])

    def loss(images):
      embedding = clip.apply(frozen.clip, images, method="encode_image")
      return losses.contrastive_loss(embedding, text.embedding, scale, same, **bank)

    images, pull_back = jax.vjp(as_seen, {r: pyramid[r] for r in clip_levels})
    (values, accuracies), gradients = jax.lax.map(jax.value_and_grad(loss, has_aux=True), images)
    (gradient,) = pull_back(gradients * (loss_cfg.clip_weight / len(clip_levels)))
    return gradient, {"loss/g_clip": jnp.mean(values), "clip/accuracy": accuracies[-1]}

  def adversarial_loss(pyramid, d_params, text, caption_id):
    """The generator's loss by the discriminator, as a function of its images."""
    d_params = gather(d_params)
    feature = jax.lax.stop_gradient(encode(d_params, text))
    fake = {r: pyramid[r] for r in inputs}
    fake_logits = judge(d_params, fake, feature, caption_id)
    adversarial = losses.generator_adversarial(fake_logits, loss_cfg)
    metrics, total = {"loss/g_adversarial": adversarial}, adversarial
    if loss_cfg.generator_matching_weight:
      other = judge(d_params, fake, jnp.roll(feature, 1, axis=0), caption_id)
      matching = losses.weighted_mean(other, loss_cfg, loss_cfg.early_exit_matching, lambda x: jax.nn.softplus(-x))
      metrics["loss/g_matching"] = matching
      total = total + loss_cfg.generator_matching_weight * matching
    return total, metrics

  def step_keys(step):
    """Keys of a step's latents and of what happens to the images before CLIP looks at them."""
    return jax.random.split(jax.random.fold_in(jax.random.key(train.seed), step))

  def rate_factor(step):
    return state_lib.learning_rate_factor(opt_cfg, step, train.total_steps)

  def generate(params, buffers, step, clip_variables, tokens):
    text = clip.apply(clip_variables, tokens, method="encode_text")
    z = jax.random.normal(step_keys(step)[0], (len(tokens), cfg.z_dim))

    def synthesize(used):
      out = generator.apply({"params": used, "buffers": buffers}, z, text.features, text.eot)
      return (out.pyramid, out.moe_loss), (out.w, out.routing)

    used = gather(params)  # `learn` gathers them again: whole ones among the residuals would be most of its memory
    (pyramid, moe_loss), pull_back, (w, routing) = jax.vjp(synthesize, used, has_aux=True)
    metrics = {"g/w_std": jnp.mean(jnp.std(w, axis=0))} | expert_loads(routing)
    return Generated(text, pyramid, jnp.mean(w, axis=0), moe_loss, pull_back_lib.cut(pull_back, used), metrics)

  def discriminate(params, opt, step, pyramid, text, image, caption_id):
    real = discriminator_lib.image_pyramid(image, inputs)
    fake = {r: pyramid[r] for r in inputs}
    gradient, metrics = jax.grad(discriminator_loss, has_aux=True)(params, real, fake, text, caption_id)
    metrics |= guard.norms("grad_norm/d", gradient) | guard.pictures(image, pyramid[max(pyramid)])
    healthy = guard.healthy(metrics)
    params, opt = state_lib.update(
      opt_cfg,
      d_optimizer,
      gradient,
      opt,
      params,
      opt_cfg.discriminator_lr * lazy * rate_factor(step),
      guard.keeper(healthy),
    )
    return params, opt, healthy, metrics

  def judge_images(d_params, step, frozen, pyramid, text, caption_id, healthy):
    cotangent, metrics = jax.grad(adversarial_loss, has_aux=True)(pyramid, d_params, text, caption_id)
    if loss_cfg.clip_weight:
      guidance, more = clip_guidance(frozen, step_keys(step)[1], pyramid, text, caption_id)
      cotangent |= {r: cotangent[r] + guidance[r] for r in guidance}
      metrics |= more
    return cotangent, healthy & guard.healthy(metrics), metrics

  def learn(params, opt, ema, buffers, step, cotangent, w_mean, moe_loss, residuals, healthy):
    used, scatter = jax.vjp(gather, params)
    pull_back = pull_back_lib.join(residuals, used)
    (gradient,) = scatter(*pull_back((cotangent, jnp.float32(loss_cfg.moe_weight))))
    rate = opt_cfg.generator_lr * rate_factor(step)
    metrics = {"loss/moe": moe_loss, "learning_rate": rate} | guard.norms("grad_norm/g", gradient)
    healthy &= guard.healthy(metrics)
    metrics |= guard.verdict(guard_lib.SKIPPED, healthy)
    keep = guard.keeper(healthy)
    params, opt = state_lib.update(opt_cfg, g_optimizer, gradient, opt, params, rate, keep)
    decay = state_lib.ema_decay(opt_cfg, step, batch_size)
    nearer = lambda average, value, decay: keep(average + (1 - decay) * (value - average), average)
    ema = jax.tree.map(lambda average, value: nearer(average, value, decay), ema, params)
    w_average = nearer(buffers["w_avg"], w_mean, opt_cfg.w_average_decay)
    return params, opt, ema, {**buffers, "w_avg": w_average}, step + 1, metrics

  def snapshot(*networks):
    return jax.tree.map(jnp.copy, networks)

  def moved(snapshot, *networks):
    return {
      key: value
      for name, before, after in zip(("g", "d"), snapshot, networks)
      for key, value in guard.norms(f"update_norm/{name}", jax.tree.map(jnp.subtract, after, before)).items()
    }

  def r1_step(state, frozen, batch):
    text = clip.apply(frozen.clip, batch["tokens"], method="encode_text")
    real = discriminator_lib.image_pyramid(batch["image"], inputs)

    def loss(params):
      params = gather(params)
      feature = encode(params, text)
      score = lambda pyramid: losses.real_score(judge(params, pyramid, feature, batch["caption_id"]))
      penalty = losses.r1_penalty(score, real, loss_cfg.r1_levels)
      return loss_cfg.r1_gamma / 2 * loss_cfg.r1_interval * penalty, penalty

    gradient, penalty = jax.grad(loss, has_aux=True)(state.discriminator)
    metrics = {"loss/r1": penalty} | guard.norms("grad_norm/r1", gradient)
    healthy = guard.healthy(metrics)
    params, opt = state_lib.update(
      opt_cfg,
      d_optimizer,
      gradient,
      state.discriminator_opt,
      state.discriminator,
      opt_cfg.discriminator_lr * lazy * rate_factor(state.step),
      guard.keeper(healthy),
    )
    metrics |= guard.verdict(guard_lib.SKIPPED_R1, healthy)
    return state.replace(discriminator=params, discriminator_opt=opt), metrics

  return Programs(init, generate, discriminate, judge_images, learn, snapshot, moved, r1_step)


def _last_exit(logits):
  """Mean logit of the highest level at the last exit."""
  top = max(logit.level for logit in logits)
  return next(jnp.mean(logit.value) for logit in logits if logit.level == top and logit.exit == 1)


def expert_loads(routing):
  """Share of tokens per expert, {"moe/load/LAYER/EXPERT": scalar}."""
  loads = {}
  for layer, item in routing.items():
    experts = item.logits.shape[-1]
    share = jnp.mean(jax.nn.one_hot(item.expert, experts), axis=(0, 1))
    loads.update({f"moe/load/{layer}/{e}": share[e] for e in range(experts)})
  return loads
