"""Trains a small CLIP on a data set, for use without pretrained weights.

The loss is the symmetric InfoNCE (arXiv 2103.00020, figure 3) with a learned temperature, on augmented images
(ops/augment.py), with warm-up and cosine decay. Muon (K. Jordan, 2024; orthogonalized momentum) trains the matrices,
Adam all other parameters. At equal steps on OpenMoji this ranks twice as many captions first as AdamW does.

The result is a function of (data set, settings, number of steps): seed and step determine the batch of a step and its
augmentation.
"""

import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aurora_jax import xla_flags
from aurora_jax.data import loader
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.index_sampler import CAPTION, IndexSampler
from aurora_jax.data.joined import Joined
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import UserError
from aurora_jax.interop.clip_hf import ClipBundle
from aurora_jax.models.clip import Clip, ClipConfig, ImageConfig, TextConfig
from aurora_jax.ops import losses
from aurora_jax.ops.augment import Augmentation, augment
from aurora_jax.systems import base

_LARGEST_SCALE = 100.0  # of the released models
_SHORTEST_CONTEXT, _LONGEST_CONTEXT = 12, 77
_MEASURED_IMAGES = 512

RGB = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipTraining:
  """What to train, and how.

  Attributes:
    resolution: side of the images in pixels.
    patch: side of the image tower's patches.
    image_width, image_layers: sizes of the image tower.
    text_width, text_layers: sizes of the text tower.
    heads: attention heads of both towers.
    mlp_ratio: width of the feed-forward in widths of the tower, for both towers.
    embedding_width: width of the shared space.
    vocabulary_size: largest size of the BPE vocabulary.
    context_length: tokens per caption; None takes what 99 % of the captions need, within 12 to 77.
    batch_size: pairs per step, negatives of each other.
    learning_rate: peak learning rate.
    warmup_steps: steps of linear warm-up.
    momentum: Muon's momentum.
    weight_decay: of the matrices.
    primary_caption_probability: probability of an image's first caption; else it is one of its others.
    augmentation: augmentation of the images.
    seed: seed of weights, order and augmentation.
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
  """The state of CLIP training.

  Attributes:
    step: int32 scalar, steps done.
    key: random key of the augmentation.
    params: parameters of `Clip`.
    optimizer: optax state.
  """

  step: jax.Array
  key: jax.Array
  params: Any
  optimizer: Any


# ----------------------------------------------------------------------------------------------------------------------
# Loss and step


def learning_rate(settings: ClipTraining, step: jax.Array | int, total_steps: jax.Array | int) -> jax.Array:
  """Linear warm-up, then cosine decay to zero at `total_steps`. During warm-up it does not depend on the total."""
  warm = jnp.minimum(1.0, (step + 1) / settings.warmup_steps)
  progress = jnp.clip((step - settings.warmup_steps) / jnp.maximum(1, total_steps - settings.warmup_steps), 0, 1)
  return settings.learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * progress))


def _optimizer(settings):
  """Muon for the matrices of blocks and projections, Adam for the others. The step applies the learning rate."""
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


Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Mapping[str, Any], Any], tuple[TrainState, Metrics]]


def make_step(config: ClipConfig, settings: ClipTraining) -> Step:
  """The compiled training step.

  Returns:
    A function (state, batch, total_steps) -> (state, metrics), which donates the state. The batch has `image` float32
    [B, R, R, 3], `tokens` int32 [B, N] and `caption_id` int32 [B] (of the first captions). total_steps is an int32
    scalar. The metrics are float32 scalars: `loss`, `accuracy`, `scale`, `learning_rate`.
  """
  clip = Clip(config)
  optimizer = _optimizer(settings)

  def loss_of(params, images, tokens, same):
    variables = {"params": params}
    text = base.apply(clip, variables, tokens, method="embed_text")
    image = base.apply(clip, variables, images, method="encode_image")
    scale = base.apply(clip, variables, method="logit_scale")
    loss, accuracy = losses.contrastive_loss(image, text, scale, same)
    return loss, (accuracy, scale)

  def step(state, batch, total_steps):
    images = augment(jax.random.fold_in(state.key, state.step), batch["image"], settings.augmentation)
    tokens, ids = batch["tokens"], batch["caption_id"]
    same = (ids[:, None] == ids[None]) | jnp.all(tokens[:, None] == tokens[None], axis=-1)
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (accuracy, scale)), gradients = gradient(state.params, images, tokens, same)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
    lr = learning_rate(settings, state.step, total_steps)
    params = jax.tree.map(lambda value, update: value + lr * update, state.params, updates)
    params["log_scale"] = jnp.minimum(params["log_scale"], math.log(_LARGEST_SCALE))
    metrics = {"loss": loss, "accuracy": accuracy, "scale": scale, "learning_rate": lr}
    return TrainState(state.step + 1, state.key, params, optimizer_state), metrics

  return jax.jit(step, donate_argnums=0)


# ----------------------------------------------------------------------------------------------------------------------
# The loop


def build_tokenizer(captions: Iterable[Sequence[str]], settings: ClipTraining) -> Tokenizer:
  """A BPE of all captions of all images, with the context length that they need."""
  texts = list(itertools.chain.from_iterable(captions))
  tokenizer = Tokenizer.train(texts, settings.vocabulary_size, settings.context_length or _LONGEST_CONTEXT)
  if settings.context_length is None:
    lengths = np.argmax(tokenizer(texts) == tokenizer.end_id, axis=1) + 1
    tokenizer.context_length = int(np.clip(np.quantile(lengths, 0.99), _SHORTEST_CONTEXT, _LONGEST_CONTEXT))
  return tokenizer


def measure_colors(dataset: Dataset | Joined, resolution: int) -> tuple[RGB, RGB]:
  """Mean and standard deviation of red, green and blue in [0, 1], from some of the images.

  Drawings on white differ much from the usual statistics of photographs, and normalized images train faster. The values
  are rounded: both splits of a data set then have the same ones, and share the entry in a compilation cache.
  """
  numbers = np.unique(np.linspace(0, len(dataset) - 1, _MEASURED_IMAGES).astype(int))
  examples: Any = dataset  # a `Joined` has the interface of a `Dataset`
  pixels = loader.load_images(examples, resolution, numbers).reshape(-1, 3) / 255
  mean, std = pixels.mean(axis=0).round(1), np.maximum(pixels.std(axis=0).round(1), 0.1)
  return tuple(mean.tolist()), tuple(std.tolist())


def clip_config(settings: ClipTraining, tokenizer: Tokenizer, colors: tuple[RGB, RGB]) -> ClipConfig:
  """The architecture.

  Args:
    settings: sizes.
    tokenizer: gives vocabulary size and context length.
    colors: of `measure_colors`.

  Raises:
    UserError: sizes that do not fit together.
  """
  assert tokenizer.end_id is not None  # `Tokenizer` checks it
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
        mean=colors[0],
        std=colors[1],
      ),
      embedding_width=settings.embedding_width,
    )
  except ValueError as error:
    raise UserError(str(error)) from error


def train_clip(
  dataset: Dataset | Joined,
  settings: ClipTraining = ClipTraining(),
  *,
  steps: int | None = None,
  seconds: float | None = None,
  on_step: Callable[[int, int | None, Mapping[str, float]], None] = lambda step, total, metrics: None,
) -> tuple[ClipBundle, int]:
  """Trains a CLIP from random weights. An epoch has every caption once, with one of its images.

  Args:
    dataset: the data set.
    settings: sizes and recipe.
    steps: number of steps. Give either this or `seconds`.
    seconds: duration, compilation included. The speed of the first steps decides the number of steps, over which the
      learning rate decays. Training again with this number as `steps` has the same result.
    on_step: called with (steps done, total steps or None while they are not known, metrics), one step late.

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
  examples: Any = dataset  # a `Joined` has the interface of a `Dataset`
  started, limit = time.monotonic(), math.inf if seconds is None else seconds
  tokenizer = build_tokenizer(dataset.captions(), settings)
  config = clip_config(settings, tokenizer, measure_colors(dataset, settings.resolution))
  state, step_function = init_state(config, settings), make_step(config, settings)
  # With a time limit the speed is measured over the last four fifths of the warm-up, whose learning rate does not
  # depend on the total number of steps.
  measured = max(1, settings.warmup_steps // 5), max(2, settings.warmup_steps)
  total, metrics, measured_from, step = steps, None, 0.0, 0
  with loader.train_batches(
    examples,
    resolution=settings.resolution,
    batch_size=settings.batch_size,
    seed=settings.seed,
    tokenizer=tokenizer,
    primary_caption_probability=settings.primary_caption_probability,
    index_sampler=IndexSampler(examples, CAPTION),
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
          total = step + 1 + max(0, int((limit - (now - started)) / speed))
    _report(on_step, step, step, metrics)
  if batches.skipped:
    print(
      f"{len(batches.skipped)} of {len(dataset)} records could not be read and others took their places, the first: "
      f"{next(iter(batches.skipped.values()))}",
      file=sys.stderr,
      flush=True,
    )
  return ClipBundle(config, {"params": jax.tree.map(np.asarray, state.params)}, tokenizer), step


def _report(on_step, step, total, metrics):
  metrics = {name: float(value) for name, value in metrics.items()}
  if not math.isfinite(metrics["loss"]):
    raise UserError(f"training diverged: the loss is {metrics['loss']} after {step} steps; lower the learning rate")
  on_step(step, total, metrics)
