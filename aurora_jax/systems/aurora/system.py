"""Aurora (arXiv 2309.03904) as a system: its networks, its frozen CLIP, and its sampling.

P prompts, B images, M latents of a prompt's mean, N text tokens, F width of a CLIP feature, D width of the generator's
own text, W width of w, Z width of z
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.config import Optimizer, PerResolution
from aurora_jax.errors import UserError
from aurora_jax.models import clip as clip_lib
from aurora_jax.models import feature_critic as critic_lib
from aurora_jax.ops import moe, random_keys
from aurora_jax.ops.attention import l2_attention
from aurora_jax.ops.losses import normalize
from aurora_jax.parallel import attention, hosts
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.parallel.experts import Exchange
from aurora_jax.systems import base, text_encoder
from aurora_jax.systems import feature_critic as backbone_lib
from aurora_jax.systems.aurora import config as config_lib
from aurora_jax.systems.aurora import exchange_report, feature_critic, memory_advice
from aurora_jax.systems.aurora.discriminator import Discriminator
from aurora_jax.systems.aurora.generator import Generator
from aurora_jax.systems.aurora.labels import label
from aurora_jax.systems.aurora.objective import Objective

if TYPE_CHECKING:
  from aurora_jax.data.dataset import Dataset  # its packages for tfrecords are not needed to run the networks

# A sampling batch has at most this many images, and its largest arrays at most about this many bytes.
_MOST_IMAGES = 32
_WORKING_BYTES = 1 << 29
_UNCHUNKED = 1 << 30


class System(base.System[config_lib.Experiment]):
  """See `base.System`."""

  headline = ("loss/d_adversarial", "loss/g_adversarial", "loss/g_clip")
  remedies = {"logit_gap": "loss.r1_gamma and the learning rates", "expert_entropy": "generator.router_balance_weight"}
  fixed_text = ("global_text",)

  def __init__(self, experiment: config_lib.Experiment, layout: mesh_lib.Layout | None = None):
    super().__init__(experiment, layout)
    cfg = experiment.generator
    self.exchange = Exchange(self.layout, experiment.mesh.exchange, cfg.remat, experiment.mesh.capacity_factor)
    self._expert_ffn = self.exchange if self.layout.devices > 1 else moe.expert_ffn
    self._attend = attention.Sharded(self.layout) if self.layout.devices > 1 else l2_attention
    self.generator = Generator(cfg, self._expert_ffn, self._attend)
    self.discriminator = Discriminator(experiment.discriminator, self._attend)
    loss, optimizer = experiment.loss, experiment.optimizer
    lazy = loss.r1_interval / (loss.r1_interval + 1) if loss.r1_gamma else 1.0
    self.networks = {
      "generator": base.Network("g", optimizer.generator, label, experiment.ema),
      "discriminator": base.Network("d", _lazily_regularized(optimizer.discriminator, lazy), label),
    }
    self.feature_critic = (
      critic_lib.FeatureCritic(experiment.feature_critic) if experiment.feature_critic.weight else None
    )
    if self.feature_critic:
      network = base.Network(feature_critic.LOG_NAME, optimizer.feature_critic, backbone_lib.label)
      self.networks[feature_critic.NAME] = network

  @property
  def log_names(self) -> Mapping[str, str]:
    return {**super().log_names, "r1": "R1 of the discriminator"}

  # ---- training ----------------------------------------------------------------------------------------------------

  def init(self, key: jax.Array) -> dict[str, base.Variables]:
    cfg, inputs = self.experiment.generator, self.experiment.discriminator.input_resolutions
    z, text = jnp.zeros((1, cfg.z_dim)), jnp.zeros((1, 2, cfg.text_feature_dim))
    eot = jnp.zeros((1,), jnp.int32)
    # One image cannot be sharded over a mesh, and how experts are evaluated makes no difference here.
    generator = Generator(cfg).init(random_keys.fold(key, "generator"), z, text, eot)
    pyramid = {r: jnp.zeros((1, r, r, 3)) for r in inputs}
    discriminator = self.discriminator.init(random_keys.fold(key, "discriminator"), pyramid, text, eot)
    networks: dict[str, base.Variables] = {"generator": generator, "discriminator": discriminator}
    if self.feature_critic:
      networks[feature_critic.NAME] = self._init_critic(self.feature_critic, key)
    return networks

  def _init_critic(self, module, key):
    cfg = self.experiment.feature_critic
    image, text = jnp.zeros((1, cfg.image_size, cfg.image_size, 3)), jnp.zeros((1, cfg.text_dim))
    fresh = module.init(random_keys.fold(key, feature_critic.NAME), image, text if cfg.text_dim else None)
    # The transformer is frozen: of `load_frozen`.
    return {name: tree for name, tree in fresh.items() if name != "dino"}

  def phases(self, update: base.Update) -> Sequence[base.Phase]:
    return Objective(self, update).phases()

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    side = self.experiment.resolution
    return {
      "image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32),
      "tokens": jax.ShapeDtypeStruct((batch_size, self.clip.config.text.context_length), jnp.int32),
      "caption_id": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }

  def notes(self) -> Sequence[str]:
    notes = self._backbone.notes if self.feature_critic else []
    if self.layout.devices == 1:
      return notes
    experiment = self.experiment
    return [*exchange_report.explain(self.exchange, experiment.generator, experiment.train.batch_size), *notes]

  # ---- for compile reports -----------------------------------------------------------------------------------------

  @property
  def frozen_note(self) -> str:
    cfg = self.experiment
    dino = "; DINO: by the sizes of feature_critic.dino" if self.feature_critic else ""
    return f"CLIP: {text_encoder.clip_config(cfg.text.clip, cfg.generator.text_feature_dim)[1]}{dino}"

  def without_recomputation(self) -> "System":
    whole = lambda cfg: dataclasses.replace(cfg, remat=False, attention="xla", attention_chunk=_UNCHUNKED)
    experiment = self.experiment
    plain = dataclasses.replace(
      experiment,
      generator=whole(experiment.generator),
      discriminator=whole(experiment.discriminator),
      feature_critic=dataclasses.replace(experiment.feature_critic, remat=False),
    )
    return type(self)(plain, self.layout)

  def with_least_work(self) -> "System":
    """See `base.System`. One expert per layer does the work of all, and deformed pixels are read without a product."""
    experiment = self.without_recomputation().experiment
    generator = experiment.generator
    one = PerResolution({r: 1 for r in generator.experts})
    generator = dataclasses.replace(generator, experts=one, deformable_max_resolution=0)
    return type(self)(dataclasses.replace(experiment, generator=generator), self.layout)

  def memory_advice(self, temporaries: int) -> list[str]:
    advice = memory_advice.memory_advice(self.experiment, temporaries, self.layout.devices)
    if self.feature_critic and not self.experiment.feature_critic.remat:
      advice.append("feature_critic.remat=True: the transformer's blocks are computed again in the backward pass")
    return advice

  # ---- the frozen CLIP ---------------------------------------------------------------------------------------------

  @functools.cached_property
  def clip(self) -> clip_lib.Clip:
    """The CLIP module, with the sizes of `text_encoder.clip_config`."""
    return clip_lib.Clip(
      text_encoder.clip_config(self.experiment.text.clip, self.experiment.generator.text_feature_dim)[0]
    )

  @property
  def tokenizer(self) -> Callable[[Sequence[str]], np.ndarray]:
    return text_encoder.tokenizer(self.experiment.text.clip)

  def load_frozen(self) -> dict[str, base.PyTree]:
    """{"clip": variables}, and with a feature critic "dino": {"vit": parameters}."""
    found = {"clip": self._read_clip(text_only=False)}
    if self.feature_critic:
      self._check_critic_text()
      found["dino"] = {"vit": self._backbone.load()}
    return found

  @property
  def _backbone(self):
    """The feature critic's transformer."""
    experiment = self.experiment
    return backbone_lib.Backbone(experiment.dino.path, experiment.text.clip, experiment.feature_critic)

  def _check_critic_text(self):
    width, wanted = self.clip.config.embedding_width, self.experiment.feature_critic.text_dim
    if wanted and wanted != width:
      raise UserError(
        f"feature_critic.text_dim is {wanted}, the embeddings of the CLIP ({self.frozen_note}) are {width} wide"
      )

  def load_sampling_frozen(self) -> dict[str, base.PyTree]:
    return {"clip": self._read_clip(text_only=True)}

  def _read_clip(self, text_only):
    folder = self.experiment.text.clip
    bundle = text_encoder.load(folder, text_only)
    for name in ("generator", "discriminator"):
      wanted, width = getattr(self.experiment, name).text_feature_dim, bundle.config.text.width
      if wanted != width:
        raise UserError(f"{folder}: text features are {width} wide, {name}.text_feature_dim is {wanted}")
    return bundle.variables

  def finish_frozen(self, frozen: base.Frozen, dataset: "Dataset") -> base.Frozen:
    """Adds the bank of M caption embeddings, further negatives of the CLIP loss: [M, D] of unit norm, and their ids
    [M].
    """
    from aurora_jax.data import schema

    captions = dataset.first_captions(self.experiment.loss.clip_bank)
    ids = np.array([schema.caption_id(caption) for caption in captions], np.int32)
    hosts.check_same(text_encoder.digest(ids), f"data set {dataset.path}: other records can be read here")
    bank = np.zeros((0, self.clip.config.embedding_width), np.float32)
    if captions:
      encode = jax.jit(
        lambda variables, tokens: normalize(base.apply(self.clip, variables, tokens, method="encode_text").embedding),
        out_shardings=self.layout.replicated,
      )
      bank = encode(frozen["clip"], np.asarray(self.tokenizer(captions)))
    return {**frozen, **dict(zip(("bank", "bank_id"), hosts.replicate(self.layout.replicated, (bank, ids))))}

  def abstract_frozen(self) -> dict[str, base.PyTree]:
    bank, config = self.experiment.loss.clip_bank, self.clip.config
    dino = {}
    if self.feature_critic:
      self._check_critic_text()
      dino = {"dino": {"vit": self._backbone.abstract()}}
    return dino | {
      "clip": clip_lib.abstract_variables(config),
      "bank": jax.ShapeDtypeStruct((bank, config.embedding_width), jnp.float32),
      "bank_id": jax.ShapeDtypeStruct((bank,), jnp.int32),
    }

  # ---- sampling ----------------------------------------------------------------------------------------------------

  @functools.cached_property
  def _sampling_generator(self):
    platform = self.layout.mesh.devices.flat[0].platform
    return Generator(self.experiment.generator.for_sampling(platform), self._expert_ffn, self._attend)

  def inputs(self, prompts: Sequence[str]) -> np.ndarray:
    return np.asarray(self.tokenizer(list(prompts)), np.int32)

  def abstract_inputs(self, prompts: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((prompts, self.clip.config.text.context_length), jnp.int32)

  def condition(
    self, networks: Mapping[str, base.Variables], frozen: base.Frozen, inputs: base.PyTree
  ) -> dict[str, jax.Array]:
    """See `base.System`: {"global_text": [P, D], an input of w, "local_text": [P, N - 1, D], for cross-attention}."""
    text = base.apply(self.clip, frozen["clip"], inputs, method="encode_text")
    global_text, local_text = base.apply(
      self._sampling_generator, networks["generator"], text.features, text.eot, method="encode_text"
    )
    return {"global_text": global_text, "local_text": local_text}

  def draw_latents(self, key: jax.Array) -> dict[str, jax.Array]:
    return {"z": jax.random.normal(key, (self.experiment.generator.z_dim,))}

  def center(
    self, networks: Mapping[str, base.Variables], condition: dict[str, jax.Array], latents: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """See `base.System`: adds "center" [P, W], the mean w of each prompt's M latents."""
    z = latents["z"]
    each = jnp.repeat(condition["global_text"], z.shape[1], axis=0)
    w = self._map(networks, z.reshape(-1, z.shape[-1]), each)
    return condition | {"center": w.reshape(*z.shape[:2], -1).mean(axis=1)}

  def sample(
    self,
    networks: Mapping[str, base.Variables],
    frozen: base.Frozen,
    condition: dict[str, jax.Array],
    latents: dict[str, jax.Array],
    psi: jax.Array | float = 1.0,
  ) -> base.Sample:
    """See `base.System`. The choices are {layer: int32 [B, r * r]}, the expert of each feature point."""
    del frozen
    w = self._map(networks, latents["z"], condition["global_text"])
    average = networks["generator"]["buffers"]["w_avg"]
    w = truncate(w, condition.get("center"), average, jnp.reshape(psi, (-1, 1)))
    out = base.apply(self._sampling_generator, networks["generator"], w, condition["local_text"], method="synthesize")
    return base.Sample(out.image, {name: layer.expert for name, layer in out.routing.items()})

  def _map(self, networks, z, global_text):
    return base.apply(self._sampling_generator, networks["generator"], z, global_text, method="map_latents")

  def choice_count(self, name: str) -> int:
    return self.experiment.generator.experts[int(name[1:].split("_")[0])]

  @property
  def sampling_batch_size(self) -> int:
    cfg = self._sampling_generator.cfg
    needed = [4 * r**2 * cfg.channels(r) for r in cfg.resolutions]
    for r in cfg.attention_depth:
      logits = cfg.heads * min(r**2, cfg.attention_chunk) * r**2
      hidden = 2 * cfg.feed_forward_ratio * cfg.heads * cfg.head_dim * r**2
      needed.append(4 * (logits + hidden))
    return max(1, min(_MOST_IMAGES, _WORKING_BYTES // max(needed)))


def _lazily_regularized(cfg: Optimizer, lazy: float) -> Optimizer:
  """StyleGAN2, appendix B: with a regularization update every k steps, learning rate and decay shrink by k / (k +
  1).
  """
  return dataclasses.replace(cfg, learning_rate=cfg.learning_rate * lazy, beta2=cfg.beta2**lazy)


def lerp(start: jax.Array, end: jax.Array, weight: jax.Array) -> jax.Array:
  """start + weight * (end - start), exactly `start` at weight 0 and exactly `end` at weight 1."""
  step = end - start
  return jnp.where(weight < 0.5, start + weight * step, end - step * (1 - weight))


def truncate(w: jax.Array, prompt_mean: jax.Array | None, w_average: jax.Array, psi: jax.Array) -> jax.Array:
  """The released truncation: a step toward the global mean, then one toward the prompt's own mean.

  w' = lerp(w_average, w, psi); w'' = lerp(prompt_mean, w', psi). So psi = 0 is the prompt's mean latent and psi = 1
  leaves w as it is.

  Args:
    w: [B, W].
    prompt_mean: [B, W], or None: only the first step.
    w_average: [W].
    psi: [B, 1], or [1, 1] for all.

  Returns:
    [B, W].
  """
  w = lerp(w_average, w, psi)
  return w if prompt_mean is None else lerp(prompt_mean, w, psi)
