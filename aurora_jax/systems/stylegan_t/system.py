"""StyleGAN-T (arXiv 2301.09515) as a system: its networks, its frozen CLIP and DINO, and how it is sampled from.

P prompts, N images, B images, D width of the text feature, Z latent width
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aurora_jax.config import Experiment, require
from aurora_jax.errors import UserError
from aurora_jax.models import clip as clip_lib
from aurora_jax.ops import local_batch_norm, random_keys
from aurora_jax.ops.losses import normalize
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.parallel.mesh import KeyPath
from aurora_jax.systems import base, feature_critic, text_encoder
from aurora_jax.systems.stylegan_t import config as config_lib
from aurora_jax.systems.stylegan_t import labels, synthesis
from aurora_jax.systems.stylegan_t.discriminator import Discriminator
from aurora_jax.systems.stylegan_t.generator import Generator
from aurora_jax.systems.stylegan_t.objective import Objective

# Sampling batches: at most this many images, whose largest feature map stays within about this many bytes.
_MOST_IMAGES = 32
_WORKING_BYTES = 1 << 28


class System(base.System[config_lib.Experiment]):
  """See `base.System`."""

  remedies = {"logit_gap": "discriminator.augment and the learning rates", "diversity": "loss.clip_weight"}
  headline = ("loss/d_adversarial", "loss/g_adversarial", "loss/g_clip")

  def __init__(self, experiment: config_lib.Experiment, layout: mesh_lib.Layout | None = None):
    super().__init__(experiment, layout)
    micro, batch = experiment.micro_batch, experiment.train.batch_size
    require(
      batch // micro.count % self.layout.devices == 0,
      f"train.batch_size {batch} in {micro.count} micro-batches (micro_batch.count) are {batch // micro.count} images "
      f"at once, no multiple of the {self.layout.devices} devices",
    )
    self.generator = Generator(experiment.generator)
    # Statistics stay within a micro-batch of the recipe, however many of them are judged at once.
    groups = local_batch_norm.group_count(micro.size, experiment.discriminator.virtual_batch)
    self.discriminator = Discriminator(
      dataclasses.replace(experiment.discriminator, virtual_batch=micro.size // groups)
    )
    optimizer = experiment.optimizer
    self.networks = {
      "generator": base.Network("g", optimizer.generator, labels.label, experiment.ema),
      "discriminator": base.Network("d", optimizer.discriminator, labels.label),
    }

  # ---- training ----------------------------------------------------------------------------------------------------

  def init(self, key: jax.Array) -> dict[str, base.Variables]:
    cfg, side = self.experiment.generator, self.experiment.discriminator.image_size
    text = jnp.zeros((1, cfg.text_dim)) if cfg.text_dim else None
    generator = self.generator.init(random_keys.fold(key, "generator"), jnp.zeros((1, cfg.z_dim)), text)
    image = jnp.zeros((1, side, side, 3))
    discriminator = dict(self.discriminator.init(random_keys.fold(key, "discriminator"), image, text))
    del discriminator["dino"]  # frozen: of `load_frozen`
    return {"generator": generator, "discriminator": discriminator}

  def begins_fresh(self, stored: Experiment) -> Callable[[str, KeyPath], bool]:
    """Blocks above the source's resolution, and a text tower that it does not have."""
    assert isinstance(stored, config_lib.Experiment)
    ours, theirs = self.experiment.generator, stored.generator
    if theirs.text_tower.layers and not ours.text_tower.layers:
      raise UserError(
        f"the generator has a text tower of its own ({theirs.text_tower.layers} layers) that the config leaves out "
        "(generator.text_tower.layers is 0)"
      )
    new_tower = ours.text_tower.layers > 0 and not theirs.text_tower.layers

    def fresh(network: str, path: KeyPath) -> bool:
      tower = new_tower and labels.TEXT_TOWER in mesh_lib.names_of(path)
      return network == "generator" and (tower or labels.resolution_of(path) > theirs.resolution)

    return fresh

  def initial_weights(self) -> dict[str, base.PyTree]:
    """The generator's text tower begins as the frozen CLIP's."""
    if not self.experiment.generator.text_tower.layers:
      return {}
    params = self._read_clip(text_only=True)["params"]
    return {"generator": {labels.TEXT_TOWER: {name: params[name] for name in ("text", "text_projection")}}}

  def phases(self, update: base.Update) -> Sequence[base.Phase]:
    return Objective(self, update).phases()

  def training_latents(self, key: jax.Array, count: int) -> jax.Array:
    """The latents of a phase, [N, Z]."""
    return jax.random.normal(key, (count, self.experiment.generator.z_dim))

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    side = self.experiment.resolution
    spec = {"image": jax.ShapeDtypeStruct((batch_size, side, side, 3), jnp.float32)}
    if self.experiment.conditional:
      spec["tokens"] = jax.ShapeDtypeStruct((batch_size, self.clip.config.text.context_length), jnp.int32)
    return spec

  def notes(self) -> Sequence[str]:
    lines = self._backbone.notes
    micro, batch = self.experiment.micro_batch, self.experiment.train.batch_size
    if micro.count > 1:
      lines.append(f"micro-batches: {micro.count} of {batch // micro.count} images per step ({micro.reduction})")
    return lines

  # ---- on a mesh ---------------------------------------------------------------------------------------------------

  def place(self, rows: jax.Array, axis: int = 0) -> jax.Array:
    """An array with samples along `axis`, sharded over all devices."""
    if self.layout.devices == 1:
      return rows
    spec = PartitionSpec(*[None] * axis, self.layout.rules.batch)
    return jax.lax.with_sharding_constraint(rows, NamedSharding(self.layout.mesh, spec))

  def place_as_stored(self, params: base.PyTree) -> base.PyTree:
    """A tree like a network's parameters, sharded as they are stored."""
    if self.layout.devices == 1:
      return params
    return jax.lax.with_sharding_constraint(params, self.layout.shardings(params, labels.label))

  # ---- for compile reports -----------------------------------------------------------------------------------------

  @property
  def frozen_note(self) -> str:
    clip = f"CLIP: {self._clip_config[1]}; " if self.experiment.conditional else ""
    return f"{clip}DINO: by the sizes of discriminator.dino"

  def without_recomputation(self) -> "System":
    whole = lambda cfg: dataclasses.replace(cfg, remat=False)
    experiment = self.experiment
    plain = dataclasses.replace(
      experiment, generator=whole(experiment.generator), discriminator=whole(experiment.discriminator)
    )
    return type(self)(plain, self.layout)

  def memory_advice(self, temporaries: int) -> list[str]:
    del temporaries
    cfg, micro = self.experiment, self.experiment.micro_batch
    lines = [
      f"{name}.remat=true: {what} are computed again in the backward pass instead of stored"
      for name, what in (("generator", "the generator's blocks"), ("discriminator", "the transformer's blocks"))
      if not getattr(cfg, name).remat
    ]
    at_once = cfg.train.batch_size // micro.count
    if at_once % (2 * micro.size) == 0 and at_once // 2 % self.layout.devices == 0:
      lines.append(f"micro_batch.count={2 * micro.count}: half as many images at once, {at_once // 2}")
    return lines

  # ---- frozen networks ---------------------------------------------------------------------------------------------

  @functools.cached_property
  def _clip_config(self) -> tuple[clip_lib.ClipConfig, str]:
    """Sizes by the folder, or guessed by the width of the text feature; and where they are from."""
    width = self.experiment.generator.text_dim or self.experiment.discriminator.dino.width
    found, origin = text_encoder.clip_config(self.experiment.text.clip, width)
    return dataclasses.replace(found, embedding_width=width) if "taken to be" in origin else found, origin

  @functools.cached_property
  def clip(self) -> clip_lib.Clip:
    """The frozen CLIP."""
    return clip_lib.Clip(self._clip_config[0])

  @property
  def tokenizer(self) -> Callable[[Sequence[str]], np.ndarray] | None:
    return text_encoder.tokenizer(self.experiment.text.clip) if self.experiment.conditional else None

  @property
  def _needs_images_tower(self):
    """Whether training embeds images by CLIP: for guidance, or to measure stages."""
    schedule = self.experiment.schedule
    return self.experiment.loss.clip_weight > 0 or bool(schedule.resolutions and schedule.features == "clip")

  def load_frozen(self) -> dict[str, base.PyTree]:
    """{"clip": variables, without the image tower where nothing needs it, "dino": {"vit": parameters}}."""
    found = {"dino": {"vit": self._backbone.load()}}
    if self.experiment.conditional:
      found["clip"] = self._read_clip(text_only=not self._needs_images_tower)
    return found

  def abstract_frozen(self) -> dict[str, base.PyTree]:
    found = {"dino": {"vit": self._backbone.abstract()}}
    if self.experiment.conditional:
      params = clip_lib.abstract_variables(self.clip.config)["params"]
      kept = lambda name: self._needs_images_tower or not name.startswith("image")
      found["clip"] = {"params": {name: leaf for name, leaf in params.items() if kept(name)}}
    return found

  def load_sampling_frozen(self) -> dict[str, base.PyTree]:
    if not self.experiment.conditional or self.experiment.generator.text_tower.layers:
      return {}
    return {"clip": self._read_clip(text_only=True)}

  def _read_clip(self, text_only):
    folder, cfg = self.experiment.text.clip, self.experiment.generator
    bundle = text_encoder.load(folder, text_only)
    if bundle.config.embedding_width != cfg.text_dim:
      raise UserError(
        f"{folder}: its embeddings are {bundle.config.embedding_width} wide, generator.text_dim is {cfg.text_dim}"
      )
    if not bundle.projects:
      raise UserError(f"{folder} has no text projection, so that it gives no text feature")
    if cfg.text_tower.layers:
      theirs, ours = bundle.config.text, cfg.text_tower
      fields = [field.name for field in dataclasses.fields(ours)]
      feature_critic.require_same(f"{folder}: its text tower", theirs, "generator.text_tower", ours, fields)
    return bundle.variables

  @property
  def _backbone(self):
    experiment = self.experiment
    return feature_critic.Backbone(experiment.dino.path, experiment.text.clip, experiment.discriminator)

  def text_features(self, frozen: base.Frozen, tokens: jax.Array) -> jax.Array:
    """Captions as CLIP's features of unit length. tokens int32 [N, T] -> float32 [N, D]."""
    with jax.named_scope("clip_text"), jax.default_matmul_precision("highest"):
      return normalize(base.apply(self.clip, frozen["clip"], tokens, method="embed_text"))

  # ---- sampling ----------------------------------------------------------------------------------------------------

  def inputs(self, prompts: Sequence[str]) -> np.ndarray | None:
    tokenizer = self.tokenizer
    return None if tokenizer is None else np.asarray(tokenizer(list(prompts)), np.int32)

  def abstract_inputs(self, prompts: int) -> jax.ShapeDtypeStruct | None:
    if not self.experiment.conditional:
      return None
    return jax.ShapeDtypeStruct((prompts, self.clip.config.text.context_length), jnp.int32)

  def condition(
    self, networks: Mapping[str, base.Variables], frozen: base.Frozen, inputs: base.PyTree
  ) -> dict[str, jax.Array]:
    """{"text": [P, D]} of unit length, by the generator's own text tower where it has one; {} if unconditional."""
    if inputs is None:
      return {}
    if self.experiment.generator.text_tower.layers:
      return {"text": base.apply(self.generator, networks["generator"], inputs, method="encode_text")}
    return {"text": self.text_features(frozen, inputs)}

  def draw_latents(self, key: jax.Array) -> dict[str, jax.Array]:
    """{"z": [Z]}, and with random noise "noise": [2] in [0, 1), of which the image's noise is made."""
    z = jax.random.normal(random_keys.fold(key, "z"), (self.experiment.generator.z_dim,))
    if self.experiment.generator.noise_at_eval != "random":
      return {"z": z}
    return {"z": z, "noise": jax.random.uniform(random_keys.fold(key, "noise"), (2,))}

  def sample(
    self,
    networks: Mapping[str, base.Variables],
    frozen: base.Frozen,
    condition: dict[str, jax.Array],
    latents: dict[str, jax.Array],
    psi: jax.Array | float = 1.0,
  ) -> base.Sample:
    """See `base.System.sample`. Truncation moves the mapped latents toward their running average; the text stays."""
    del frozen
    cfg = self.experiment.generator
    noise = _noise_of(latents["noise"], cfg) if cfg.noise_at_eval == "random" else cfg.noise_at_eval
    psi = jnp.reshape(jnp.asarray(psi, jnp.float32), (-1, 1))
    out = base.apply(self.generator, networks["generator"], latents["z"], condition.get("text"), psi, noise)
    return base.Sample(out.image)

  @property
  def sampling_batch_size(self) -> int:
    cfg = self.experiment.generator
    largest = max(4 * r**2 * cfg.channels(r) for r in cfg.resolutions)
    return max(1, min(_MOST_IMAGES, _WORKING_BYTES // (4 * largest)))


def _noise_of(seeds, cfg):
  """Random noise of every layer [B, r, r, 1], each image's by its own two numbers [B, 2]."""

  def one(seed):
    key = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(seed, jnp.uint32))
    return {
      name: jax.random.normal(jax.random.fold_in(key, i), (size, size, 1))
      for i, (name, size) in enumerate(synthesis.noise_sizes(cfg).items())
    }

  return jax.vmap(one)(seeds)
