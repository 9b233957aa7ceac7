"""From an experiment to what the loop runs: data, frozen CLIP, compiled programs, first state, sample grids."""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from aurora_jax import config as config_lib
from aurora_jax.data import loader, schema
from aurora_jax.data.augment import Augment
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.index_sampler import Visits
from aurora_jax.errors import UserError
from aurora_jax.evaluation import frechet
from aurora_jax.interop import clip_hf, inception_torch
from aurora_jax.models import inception as inception_lib
from aurora_jax.models.clip import normalize
from aurora_jax.parallel import experts as experts_lib
from aurora_jax.parallel import hosts
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.systems.aurora import generator as generator_lib
from aurora_jax.training import ahead, compiling, initialize, schedule
from aurora_jax.training import placed as placed_lib
from aurora_jax.training import step as step_lib


class SampleSet(NamedTuple):
  """Pictures for fixed prompts and latents."""

  images: np.ndarray  # [prompts, latents, R, R, 3] float32
  prompts: tuple[str, ...]
  stage: str = ""  # of a run that grows, in words


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An experiment, ready to run.

  Attributes:
    experiment: the configuration.
    dataset: the training split.
    clip: the frozen CLIP with its tokenizer.
    layout: the mesh and what lies where.
    notes: lines for the person who starts the run: the mesh and how experts and tokens meet.
    init: () -> TrainState, fresh or with the networks of `train.init_from`.
    abstract_state: its shapes, dtypes and shardings.
    batch_sharding: of every entry of a batch.
    batches: start step -> iterator over {"image", "tokens", "caption_id"}, numpy.
    begin: () -> None, begins to compile the step's programs while other things are done; `step` would too.
    step: (step number, state, device batch) -> (state, metrics), R1 included where it is due.
    sample: state -> SampleSet.
    distances: Frechet distances, where the experiment has stages; else None.
    at_stage: resolution -> the same with that stage's `step` and `sample`.
  """

  experiment: config_lib.Experiment
  dataset: Dataset
  clip: clip_hf.ClipBundle
  layout: mesh_lib.Layout
  notes: tuple[str, ...]
  init: Callable
  abstract_state: Any
  batch_sharding: jax.sharding.Sharding
  batches: Callable
  begin: Callable
  step: Callable
  sample: Callable
  distances: frechet.Distances | None
  at_stage: Callable


def prepare(experiment: config_lib.Experiment) -> Prepared:
  """Reads data set, CLIP and what else `schedule` wants, builds the programs; compiles nothing yet.

  Raises:
    UserError: data, CLIP or Inception missing or damaged, or sizes that do not fit together.
  """
  layout = mesh_lib.build(experiment)
  if not experiment.data.path:
    raise UserError("no data set: --config.data.path DIR (see build-data)")
  if not experiment.text.clip:
    raise UserError("no CLIP: --config.text.clip DIR, a run of train-clip or a Hugging Face CLIP folder")
  with hosts.together("reading data and weights"):
    dataset, clip = _read(experiment)
    wanted = experiment.schedule.resolutions and experiment.schedule.features == "inception"
    inception = inception_torch.load(experiment.schedule.inception) if wanted else None
  placed = placed_lib.place(experiment, clip.module(), layout)
  frozen = _freeze(experiment, dataset, clip, layout)
  with hosts.together("reading captions"):
    data = experiment.data
    visits = Visits(dataset, data.visit, data.pairs, _augment(data).active)
  _check_same(visits.digest, dataset)

  def init():
    key = jax.random.key(experiment.train.seed)
    state, origin = initialize.first_state(experiment, placed.programs.init, key, placed.abstract_state)
    if origin and hosts.is_first():
      print(origin, flush=True)
    return state

  def at_stage(resolution):
    of_stage = placed_lib.place(experiment, clip.module(), layout, resolution)
    begin, step = _stepper(experiment, clip, of_stage, frozen)
    return dataclasses.replace(
      whole,
      begin=begin,
      step=step,
      sample=_sampler(
        config_lib.at_stage(experiment, resolution),
        clip,
        frozen,
        of_stage,
        schedule.words(experiment.schedule, resolution),
      ),
    )

  distances = None
  if experiment.schedule.resolutions:
    extractor = _extractor(experiment, clip, frozen, inception, layout)
    distances = frechet.Distances(experiment, dataset, clip, frozen, placed, extractor)
  begin, step = _stepper(experiment, clip, placed, frozen)
  whole = Prepared(
    experiment=experiment,
    dataset=dataset,
    clip=clip,
    layout=layout,
    notes=_notes(experiment, dataset, placed),
    init=init,
    abstract_state=placed.abstract_state,
    batch_sharding=layout.batch,
    batches=functools.partial(_batches, experiment, dataset, clip, layout, visits),
    begin=begin,
    step=step,
    sample=_sampler(experiment, clip, frozen, placed),
    distances=distances,
    at_stage=at_stage,
  )
  return whole


def _stepper(experiment, clip, placed, frozen):
  """`begin` and `step` of a `Prepared`, by the programs of `placed`."""
  interval = experiment.loss.r1_interval if experiment.loss.r1_gamma else 0
  train = experiment.train

  @functools.cache
  def begin():
    batch = ahead.abstract_batch(experiment, clip.config, placed.layout)
    return ahead.start(placed, ahead.programs(experiment), frozen, batch)

  def step(number, state, batch):
    programs = begin()()
    measure = train.guard and (number + 1) % train.log_every == 0
    batch = {name: batch[name] for name in ahead.INPUTS}
    state, metrics = step_lib.run_step(programs, state, frozen, batch, measure)
    if interval and number % interval == 0:
      state, more = programs.r1_step(state, frozen, batch)
      metrics |= more
    return state, metrics

  return begin, step


def _read(experiment):
  """Data set and CLIP from the disk, fitting the experiment."""
  dataset = Dataset.open(experiment.data.path, experiment.data.split, experiment.data.tolerate_damage)
  loader.check_resolution(dataset, experiment.generator.resolution)
  clip = clip_hf.load(experiment.text.clip)
  for name in ("generator", "discriminator"):
    wanted, width = getattr(experiment, name).text_feature_dim, clip.config.text.width
    if wanted != width:
      raise UserError(f"{experiment.text.clip}: text features are {width} wide, {name}.text_feature_dim is {wanted}")
  return dataset, clip


def _notes(experiment, dataset, placed):
  """What is wrong with the data set, and the mesh in words where there is more than one device."""
  layout = placed.layout
  damage = tuple(
    f"WARNING: {words} (data.tolerate_damage: its records are skipped when they are met)" for words in dataset.problems
  )
  if layout.devices == 1:
    return damage
  axes = ", ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
  cut = {"all": "all devices", "expert": "the devices along expert"}[experiment.mesh.fsdp_over]
  stored = f"cut over {cut} where stored" if experiment.mesh.fsdp else "whole on every device"
  batch = experiment.train.batch_size
  return (
    *damage,
    f"mesh: {axes}; {batch // layout.devices} of {batch} images per device; dense parameters {stored}",
    *experts_lib.explain(placed.exchange, experiment.generator, batch),
  )


def _batches(experiment, dataset, clip, layout, visits, start_step):
  data, batch_size = experiment.data, experiment.train.batch_size
  return loader.train_batches(
    dataset,
    resolution=experiment.generator.resolution,
    batch_size=batch_size,
    slots=hosts.own_rows(layout.batch, batch_size),
    seed=experiment.train.seed,
    start_step=start_step,
    tokenizer=clip.tokenizer,
    augment=_augment(data),
    primary_caption_probability=data.primary_caption_probability,
    visits=visits,
    workers=data.workers,
  )


def _augment(data):
  return Augment(shift=data.shift, scale=data.scale, rotate=data.rotate, flip=data.flip)


def _freeze(experiment, dataset, clip, layout):
  """CLIP's variables and the bank of caption embeddings, on every device."""
  module = clip.module()
  variables = hosts.replicate(layout.replicated, clip.variables)
  captions = dataset.first_captions(experiment.loss.clip_bank)
  ids = np.array([schema.caption_id(caption) for caption in captions], np.int32)
  _check_same(zlib.crc32(ids.tobytes()) >> 1, dataset)
  bank = np.zeros((0, clip.config.embedding_width), np.float32)
  if captions:
    encode = jax.jit(
      lambda v, tokens: normalize(module.apply(v, tokens, method="encode_text").embedding),
      out_shardings=layout.replicated,
    )
    bank = encode(variables, np.asarray(clip.tokenizer(captions)))
  bank, ids = hosts.replicate(layout.replicated, (bank, ids))
  return step_lib.Frozen(variables, bank, ids)


def _check_same(digest, dataset):
  """All processes must have read the same captions. digest: an int32."""
  first = hosts.from_first(digest)
  with hosts.together("reading captions"):
    if first != digest:
      raise UserError(f"data set {dataset.path}: other records can be read here than in process 0")


def _extractor(experiment, clip, frozen, inception, layout):
  """What Frechet distances are of: Inception, where its variables are given, else the CLIP that is there anyway."""
  if inception is None:
    encode = functools.partial(clip.module().apply, method="encode_image")
    return frechet.Extractor("clip", f"CLIP {experiment.text.clip}", clip.config.embedding_width, frozen.clip, encode)
  words = f"Inception 2015-12-05 {experiment.schedule.inception}"
  return frechet.Extractor(
    "inception",
    words,
    inception_lib.WIDTH,
    hosts.replicate(layout.replicated, inception),
    inception_lib.Inception().apply,
  )


def _sampler(experiment, clip, frozen, placed, stage=""):
  """Fixed prompts and latents through the EMA generator; each prompt on its own, so that a grid never changes meaning."""
  train, cfg = experiment.train, experiment.generator.for_sampling(jax.default_backend())
  prompts, latents = tuple(train.sample_prompts), train.sample_latents
  if not prompts:
    return None
  module, generator = clip.module(), generator_lib.Generator(cfg, placed.expert_ffn)
  tokens = np.repeat(clip.tokenizer(list(prompts)), latents, axis=0)
  z = jax.random.normal(jax.random.key(train.seed + 1), (len(prompts), latents, cfg.z_dim)).reshape(-1, cfg.z_dim)
  rows, layout = len(tokens), placed.layout
  # Every device draws the same number of pictures; the last is drawn again to fill up.
  filled = np.minimum(np.arange(-(-rows // layout.devices) * layout.devices), rows - 1)
  tokens, z = hosts.replicate(layout.replicated, (np.asarray(tokens)[filled], np.asarray(z)[filled]))

  @functools.partial(jax.jit, out_shardings=layout.replicated, compiler_options=compiling.options())
  def generate(ema, buffers, frozen, tokens, z):
    tokens, z = jax.lax.with_sharding_constraint((tokens, z), layout.batch)
    text = module.apply(frozen.clip, tokens, method="encode_text")
    return generator.apply({"params": layout.gather(ema), "buffers": buffers}, z, text.features, text.eot).image

  def sample(state):
    images = np.asarray(generate(state.ema, state.buffers, frozen, tokens, z))[:rows]
    return SampleSet(images.reshape(len(prompts), latents, *images.shape[1:]), prompts, stage)

  return sample
