"""From an experiment to what the loop runs: data, frozen networks, compiled programs, first state, sample grids."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from aurora_jax.config import Experiment
from aurora_jax.data import loader
from aurora_jax.data.augment import Augment
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.index_sampler import IndexSampler
from aurora_jax.errors import UserError
from aurora_jax.evaluation import features as features_lib
from aurora_jax.evaluation import frechet, sampling
from aurora_jax.parallel import hosts
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.systems import base, registry, stages
from aurora_jax.training import initialize
from aurora_jax.training import step as step_lib


class SampleSet(NamedTuple):
  """Images for fixed prompts and latents.

  Attributes:
    images: [prompts, latents, R, R, 3] float32.
    prompts: strings.
    stage: of progressive growing, in words, or "".
    makers: int [prompts, latents], which of several generators made each image; None where there is one.
    maker_count: of these generators.
  """

  images: np.ndarray
  prompts: tuple[str, ...]
  stage: str = ""
  makers: np.ndarray | None = None
  maker_count: int = 0


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An experiment, ready to run.

  Attributes:
    experiment: the configuration.
    system: its system, at the present stage.
    dataset: the training split.
    notes: lines for the person who starts the run: the mesh, damage, how experts and tokens meet.
    init: () -> TrainState, fresh or with the networks of `train.init_from`.
    abstract_state: its shapes, dtypes and shardings.
    batch_sharding: of every entry of a batch.
    batches_per_step: batches that a step reads.
    batches: start step -> iterator over batches, dicts of numpy arrays; `batches_per_step` of them per step.
    begin: () -> None, begins to compile the step's programs while other things are done; `step` would too.
    step: (step number, state, list of device batches) -> (state, {phase: metrics}).
    sample: state -> SampleSet, or None: no images are drawn.
    distances: Frechet distances, where the experiment has stages; else None.
    at_stage: resolution -> the same with that stage's `step` and `sample`.
  """

  experiment: Experiment
  system: base.System
  dataset: Dataset
  notes: tuple[str, ...]
  init: Callable[[], base.TrainState]
  abstract_state: base.TrainState
  batch_sharding: jax.sharding.Sharding
  batches_per_step: int
  batches: Callable[[int], Iterator]
  begin: Callable[[], Any]
  step: Callable
  sample: Callable[[base.TrainState], SampleSet] | None
  distances: frechet.Distances | None
  at_stage: Callable[[int], "Prepared"]

  @property
  def headline(self) -> tuple[str, ...]:
    """Names of the metrics to show while training."""
    return self.system.headline

  @property
  def log_names(self):
    """{short name of an update in metrics: words}."""
    return self.system.log_names


def prepare(experiment: Experiment) -> Prepared:
  """Reads data set, frozen networks and what else `schedule` wants, builds the programs; compiles nothing yet.

  Raises:
    UserError: data or weights missing or damaged, or sizes that do not fit together.
  """
  layout = mesh_lib.build(experiment.mesh, experiment.train.batch_size, experiment.expert_counts)
  if not experiment.data.path:
    raise UserError("no data set: --config.data.path DIR (see build-data)")
  system = registry.system_class(experiment.system)(experiment, layout)
  with hosts.together("reading data and weights"):
    dataset = Dataset.open(experiment.data.path, experiment.data.split, experiment.data.tolerate_corruption)
    loader.check_resolution(dataset, experiment.resolution)
    frozen, tokenizer = system.load_frozen(), system.tokenizer
    extractor = features_lib.of_schedule(experiment, system, frozen)
  frozen = system.finish_frozen(hosts.replicate(layout.replicated, frozen), dataset)
  with hosts.together("reading captions"):
    data = experiment.data
    index_sampler = IndexSampler(dataset, data.epoch_unit, data.pairs, _augment(data).active)
  hosts.check_same(index_sampler.digest, f"data set {dataset.path}: other records can be read here")
  whole = step_lib.build(system)

  def init():
    state, origin = initialize.first_state(system, whole.state)
    if origin and hosts.is_first():
      print(origin, flush=True)
    return state

  def at_stage(resolution):
    stage = system.at_stage(resolution)
    begin, step = _stepper(step_lib.build(stage, system), frozen)
    words = stages.description(experiment.schedule, resolution)
    return dataclasses.replace(prepared, system=stage, begin=begin, step=step, sample=_sampler(stage, frozen, words))

  distances = None
  if experiment.schedule.resolutions:
    distances = frechet.Distances(system, dataset, frozen, extractor)
  begin, step = _stepper(whole, frozen)
  prepared = Prepared(
    experiment=experiment,
    system=system,
    dataset=dataset,
    notes=_notes(system, dataset),
    init=init,
    abstract_state=whole.state,
    batch_sharding=layout.batch,
    batches_per_step=whole.batches_per_step,
    batches=functools.partial(_batches, experiment, dataset, tokenizer, layout, index_sampler, whole.batches_per_step),
    begin=begin,
    step=step,
    sample=_sampler(system, frozen),
    distances=distances,
    at_stage=at_stage,
  )
  return prepared


def _stepper(step, frozen):
  """`begin` and `step` of a `Prepared`."""
  begin = functools.cache(lambda: step.compile(frozen))
  compiled = functools.cache(lambda: begin()())
  return begin, lambda number, state, batches: compiled()(number, state, batches)


def _notes(system, dataset):
  """What is wrong with the data set, and the mesh in words where there is more than one device."""
  layout, experiment = system.layout, system.experiment
  damage = tuple(
    f"WARNING: {problem} (data.tolerate_corruption: its records are skipped when they are read)"
    for problem in dataset.problems
  )
  if layout.devices == 1:
    return damage
  axes = ", ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
  over = {"all": "all devices", "expert": "the devices along expert"}[experiment.mesh.fsdp_over]
  stored = f"sharded over {over}" if experiment.mesh.fsdp else "whole on every device"
  batch = experiment.train.batch_size
  images = f"{batch // layout.devices} of {batch} images per device"
  return (*damage, f"mesh: {axes}; {images}; dense parameters {stored}", *system.notes())


def _augment(data):
  return Augment(shift=data.shift, scale=data.scale, rotate=data.rotate, flip=data.flip)


def _batches(experiment, dataset, tokenizer, layout, index_sampler, batches_per_step, start_step):
  data, batch_size = experiment.data, experiment.train.batch_size
  return loader.train_batches(
    dataset,
    resolution=experiment.resolution,
    batch_size=batch_size,
    slots=hosts.own_rows(layout.batch, batch_size),
    seed=experiment.train.seed,
    start_step=start_step * batches_per_step,
    tokenizer=tokenizer,
    augment=_augment(data),
    primary_caption_probability=data.primary_caption_probability,
    index_sampler=index_sampler,
    workers=data.workers,
  )


def _sampler(system, frozen, stage=""):
  """Fixed prompts and latents through the averaged weights; each prompt by itself, so that a grid keeps its meaning."""
  train = system.experiment.train
  # An unconditional system has one grid; a conditional one a row of it for each prompt.
  prompts, latents = tuple(train.sample_prompts) if system.experiment.conditional else ("",), train.sample_latents
  if not prompts:
    return None
  sampler = sampling.Sampler(system, min(system.sampling_batch_size, len(prompts) * latents), compile_quickly=True)

  def sample(state):
    weights = sampling.weights_of(system, state, frozen)
    found = sampler(weights, prompts, latents=latents, seed=train.seed, choices=True)
    makers, count = sampling.makers(system, found)
    return SampleSet(found.images, prompts, stage, makers, count)

  return sample
