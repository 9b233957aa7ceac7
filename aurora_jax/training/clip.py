"""Trains a small CLIP on the data set at hand, for use where no pretrained one can be had.

Symmetric InfoNCE (arXiv 2103.00020, figure 3) with a learned temperature, on augmented pictures (`clip_augment`), with
warm-up and cosine decay. The matrices are trained by Muon (K. Jordan, 2024; orthogonalised momentum), all else by Adam:
at equal steps on OpenMoji that ranks twice as many captions first as AdamW does.

Everything is a function of (data set, settings, number of steps): the batch of a step comes from (seed, step), its
augmentation from a key folded from the same two.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aurora_jax import xla_flags
from aurora_jax.data import loader
from aurora_jax.data.index_sampler import CAPTION, IndexSampler
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import UserError
from aurora_jax.interop.clip_hf import ClipBundle
from aurora_jax.models.clip import Clip, ClipConfig, ImageConfig, TextConfig
from aurora_jax.ops import losses
from aurora_jax.ops.augment import Augmentation, augment

_LARGEST_SCALE = 100.0  # of the released models
_SHORTEST_CONTEXT, _LONGEST_CONTEXT = 12, 77
_MEASURED_PICTURES = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTraining:
  """What to train, and how.

  Attributes:
    resolution: side of the pictures in pixels.
    patch: side of the image tower's patches.
    image_width, image_layers, text_width, text_layers: sizes of the towers.
    heads, mlp_ratio: of both; the feed-forward is `mlp_ratio` times as wide as the tower.
    embedding_width: of the shared space.
    vocabulary_size: of the BPE, at most.
    context_length: tokens per caption; None takes what 99 % of the captions need, but 12 to 77.
    batch_size: pairs per step, negatives of each other.
    learning_rate: at the peak.
    warmup_steps: linear.
    momentum, weight_decay: of the matrices.
    primary_caption_probability: of a picture's main caption; else one of its other names.
    augmentation: of the pictures.
    seed: of weights, order and augmentation.
  """

  resolution: int = 32
  patch: int = 8
  image_width: int = 128
  image_layers: int = 2
  text_width: int = 128
  text_layers: int = 2
  heads: int = 4
  mlp_ratio: int = 2
  embedding_width: int = 128
  vocabulary_size: int = 3000
  context_length: int | None = None
  batch_size: int = 256
  learning_rate: float = 6e-3
  warmup_steps: int = 40
  momentum: float = 0.9
  weight_decay: float = 0.1
  primary_caption_probability: float = 0.8
  augmentation: Augmentation = Augmentation()
  seed: int = 0


class TrainState(NamedTuple):
  """step: int32, the steps done; key: of the augmentation; params: of `Clip`; optimizer: optax's."""

  step: jax.Array
  key: jax.Array
  params: Any
  optimizer: Any


class Joined:
  """Several data sets, one after the other, where one is expected (the splits of one folder)."""

  def __init__(self, *datasets):
    self._datasets = datasets
    self._starts = np.cumsum([0, *map(len, datasets)])
    self.path, self.name, self.resolution = datasets[0].path, datasets[0].name, datasets[0].resolution

  def __len__(self):
    return int(self._starts[-1])

  def __getitem__(self, number):
    dataset, number = self._locate(number)
    return dataset[number]

  def picture(self, number):
    dataset, number = self._locate(number)
    return dataset.picture(number)

  def place(self, number):
    dataset, number = self._locate(number)
    return dataset.place(number)

  def readable(self):
    for start, dataset in zip(self._starts, self._datasets):
      for number, example in dataset.readable():
        yield int(start) + number, example

  def captions(self):
    return list(itertools.chain.from_iterable(dataset.captions() for dataset in self._datasets))

  def _locate(self, number):
    which = int(np.searchsorted(self._starts, number, side="right")) - 1
    return self._datasets[which], number - int(self._starts[which])


# ----------------------------------------------------------------------------------------------------------------------
# Loss and step


def learning_rate(settings: ClipTraining, step, total_steps):
  """Linear warm-up, then a cosine to zero at `total_steps`. Within the warm-up it does not depend on the total."""
  warm = jnp.minimum(1.0, (step + 1) / settings.warmup_steps)
  progress = jnp.clip((step - settings.warmup_steps) / jnp.maximum(1, total_steps - settings.warmup_steps), 0, 1)
  return settings.learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _optimizer(settings):
  """Muon for the matrices of the blocks and projections, Adam for all else; the step applies the learning rate."""
  matrix = optax.contrib.MuonDimensionNumbers(-2, -1)
  patches = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)

  def dimensions(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: {"kernel": matrix, "patch_embedding": patches}.get(path[-1].key), params
    )

  return optax.contrib.muon(
    1.0,
    beta=settings.momentum,
    weight_decay=settings.weight_decay,
    consistent_rms=0.2,
    adam_b2=0.98,
    muon_weight_dimension_numbers=dimensions,
  )


def init_state(config: ClipConfig, settings: ClipTraining) -> TrainState:
  """Fresh weights from the seed."""

  def init(key):
    init_key, augment_key = jax.random.split(key)
    tokens = jnp.zeros((1, config.text.context_length), jnp.int32)
    images = jnp.zeros((1, config.image.size, config.image.size, 3), jnp.float32)
    params = Clip(config).init(init_key, tokens, images)["params"]
    return TrainState(jnp.zeros((), jnp.int32), augment_key, params, _optimizer(settings).init(params))

  return jax.jit(init, compiler_options=xla_flags.compiler_options(jax.default_backend(), runs_once=True))(
    jax.random.key(settings.seed)
  )


def make_step(config: ClipConfig, settings: ClipTraining):
  """The compiled training step.

  Returns:
    (state, batch, total_steps) -> (state, metrics): batch has `image` float32 [B, R, R, 3], `tokens` int32 [B, N] and
    `caption_id` int32 [B] (of their primary captions), total_steps is an int32 scalar; metrics are float32 scalars `loss`,
    `accuracy`, `scale` and `learning_rate`. The state is donated.
  """
  clip = Clip(config)
  optimizer = _optimizer(settings)

  def loss_of(params, images, tokens, same):
    variables = {"params": params}
    text = clip.apply(variables, tokens, method="embed_text")
    image = clip.apply(variables, images, method="encode_image")
    scale = clip.apply(variables, method="logit_scale")
    loss, accuracy = losses.contrastive_loss(image, text, scale, same)
    return loss, (accuracy, scale)

  def step(state, batch, total_steps):
    images = augment(jax.random.fold_in(state.key, state.step), batch["image"], settings.augmentation)
    tokens, ids = batch["tokens"], batch["caption_id"]
    same = (ids[:, None] == ids[None]) | jnp.all(tokens[:, None] == tokens[None], axis=-1)
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (accuracy, scale)), gradients = gradient(state.params, images, tokens, same)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    rate = learning_rate(settings, state.step, total_steps)
    params = jax.tree.map(lambda value, update: value + rate * update, state.params, updates)
    params["log_scale"] = jnp.minimum(params["log_scale"], math.log(_LARGEST_SCALE))
    metrics = {"loss": loss, "accuracy": accuracy, "scale": scale, "learning_rate": rate}
    return TrainState(state.step + 1, state.key, params, optimizer_state), metrics

  return jax.jit(step, donate_argnums=0)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def build_tokenizer(captions, settings: ClipTraining) -> Tokenizer:
  """A BPE of all captions (list of tuples of str), and the context length that they need."""
  texts = list(itertools.chain.from_iterable(captions))
  tokenizer = Tokenizer.train(texts, settings.vocabulary_size, settings.context_length or _LONGEST_CONTEXT)
  if settings.context_length is None:
    lengths = np.argmax(tokenizer(texts) == tokenizer.end_id, axis=1) + 1
    tokenizer.context_length = int(np.clip(np.quantile(lengths, 0.99), _SHORTEST_CONTEXT, _LONGEST_CONTEXT))
  return tokenizer


def measure_colours(dataset, resolution):
  """Mean and standard deviation of each colour in [0, 1], two tuples of three, from some of the pictures.

  Drawings on white are far from the statistics of photographs; centred, they are learnt faster. Rounded, they are the
  same for both splits of a data set, so that a compilation cache serves the second training as well.
  """
  numbers = np.unique(np.linspace(0, len(dataset) - 1, _MEASURED_PICTURES).astype(int))
  pixels = loader.load_images(dataset, resolution, numbers).reshape(-1, 3) / 255
  mean, deviation = pixels.mean(axis=0).round(1), np.maximum(pixels.std(axis=0).round(1), 0.1)
  return tuple(mean.tolist()), tuple(deviation.tolist())


def clip_config(settings: ClipTraining, tokenizer: Tokenizer, colours) -> ClipConfig:
  """The architecture that the settings describe, `colours` from `measure_colours`; UserError if it is impossible."""
  try:
    return ClipConfig(
      text=TextConfig(
        width=settings.text_width,
        layers=settings.text_layers,
        heads=settings.heads,
        mlp_width=settings.mlp_ratio * settings.text_width,
        vocabulary_size=tokenizer.vocabulary_size,
        context_length=tokenizer.context_length,
        eot_id=tokenizer.end_id,
      ),
      image=ImageConfig(
        width=settings.image_width,
        layers=settings.image_layers,
        heads=settings.heads,
        mlp_width=settings.mlp_ratio * settings.image_width,
        size=settings.resolution,
        patch=settings.patch,
        mean=colours[0],
        deviation=colours[1],
      ),
      embedding_width=settings.embedding_width,
    )
  except ValueError as error:
    raise UserError(str(error)) from error


def train_clip(
  dataset,
  settings: ClipTraining = ClipTraining(),
  *,
  steps: int | None = None,
  seconds: float | None = None,
  on_step: Callable[[int, int | None, Mapping[str, float]], None] = lambda step, total, metrics: None,
) -> tuple[ClipBundle, int]:
  """Trains a CLIP from nothing. An epoch has every caption once, with one of its pictures.

  Args:
    dataset: a `Dataset` or `Joined`.
    settings: sizes and recipe.
    steps: number of steps; or
    seconds: time to take, compilation included: after the first steps have shown their speed, the number of steps that
      fits is fixed, and the learning rate decays over exactly these. Training again with that `steps` gives the same.
    on_step: called with (steps done, total steps or None while that is not known, metrics), one step late.

  Returns:
    (bundle, steps done).

  Raises:
    UserError: an impossible setting, or training diverged.
  """
  if (steps is None) == (seconds is None):
    raise UserError("give either a number of steps or of seconds")
  if steps is not None and steps < 1 or seconds is not None and not seconds > 0:
    raise UserError(f"nothing to train: {f'{steps} steps' if seconds is None else f'{seconds} seconds'}")
  if settings.batch_size < 2:
    raise UserError(f"a batch of {settings.batch_size} has no negatives; it must hold at least 2 pairs")
  started = time.monotonic()
  tokenizer = build_tokenizer(dataset.captions(), settings)
  config = clip_config(settings, tokenizer, measure_colours(dataset, settings.resolution))
  state, step_function = init_state(config, settings), make_step(config, settings)
  # With a time limit the speed is measured over the last four fifths of the warm-up, whose learning rate does not depend
  # on the number of steps that follows from it.
  measured = max(1, settings.warmup_steps // 5), max(2, settings.warmup_steps)
  total, metrics, measured_from = steps, None, 0.0
  with loader.train_batches(
    dataset,
    resolution=settings.resolution,
    batch_size=settings.batch_size,
    seed=settings.seed,
    tokenizer=tokenizer,
    primary_caption_probability=settings.primary_caption_probability,
    index_sampler=IndexSampler(dataset, CAPTION),
    workers=1,
  ) as batches:
    for step in itertools.count():
      if total is not None and step >= total:
        break
      batch = next(batches)
      arrays = {name: batch[name] for name in ("image", "tokens", "caption_id")}
      previous = metrics
      state, metrics = step_function(state, arrays, np.int32(total or np.iinfo(np.int32).max))
      if previous is not None:
        _report(on_step, step, total, previous)
      if total is None and step + 1 in measured:
        jax.block_until_ready(metrics)
        now = time.monotonic()
        if step + 1 == measured[0]:
          measured_from = now
        else:
          speed = (now - measured_from) / (measured[1] - measured[0])
          total = step + 1 + max(0, int((seconds - (now - started)) / speed))
    _report(on_step, total, total, metrics)
  if batches.skipped:
    print(
      f"{len(batches.skipped)} of {len(dataset)} records could not be read and others took their places, the first: "
      f"{next(iter(batches.skipped.values()))}",
      file=sys.stderr,
      flush=True,
    )
  return ClipBundle(config, {"params": jax.tree.map(np.asarray, state.params)}, tokenizer), total


def _report(on_step, step, total, metrics):
  metrics = {name: float(value) for name, value in metrics.items()}
  if not math.isfinite(metrics["loss"]):
    raise UserError(f"training diverged: the loss is {metrics['loss']} after {step} steps; lower the learning rate")
  on_step(step, total, metrics)
