"""Makes a `Prepared` of an experiment: data, frozen networks, programs, first state, sampler."""

import dataclasses
import functools
from typing import Any

from aurora_jax import memory
from aurora_jax.config import Experiment
from aurora_jax.data import loader, orders
from aurora_jax.data.augment import Augment
from aurora_jax.data.dataset import Dataset
from aurora_jax.data.index_sampler import IndexSampler
from aurora_jax.data.joined import Joined
from aurora_jax.errors import UserError
from aurora_jax.evaluation import features as features_lib
from aurora_jax.evaluation import frechet, sampling
from aurora_jax.parallel import hosts
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.systems import registry, stages
from aurora_jax.training import initialize
from aurora_jax.training import step as step_lib
from aurora_jax.training.prepared import Prepared, SampleSet

# Reads at a time from a bucket. At 50 ms each they give about 5,000 records a second.
_URL_READS = 256


def prepare(experiment: Experiment) -> Prepared:
  """Opens the data set, reads the frozen networks and builds the programs. Compiles nothing yet.

  Raises:
    UserError: data or weights are missing or corrupt, or sizes do not fit together.
  """
  layout = mesh_lib.build(experiment.mesh, experiment.train.batch_size, experiment.expert_counts)
  if not experiment.data.path:
    raise UserError("no data set: --config.data.path DIR (see build-data)")
  system = registry.system_class(experiment.system)(experiment, layout)
  with hosts.together("reading data and weights"):
    dataset, order = _open(experiment.data)
    loader.check_resolution(dataset, experiment.resolution)
    frozen, tokenizer = system.load_frozen(), system.tokenizer
    extractor = features_lib.of_schedule(experiment, system, frozen)
  frozen = system.finish_frozen(hosts.replicate(layout.replicated, frozen), dataset)
  with hosts.together("reading captions"):
    data = experiment.data
    index_sampler = IndexSampler(dataset, data.epoch_unit, data.pairs, _augment(data).active, order)
  hosts.check_same(index_sampler.digest, f"data set {dataset.path}: other records can be read here")
  whole = step_lib.build(system)

  def init():
    state, origin = initialize.first_state(system, whole.state)
    memory.return_freed()  # of compiling the initialization
    if origin and hosts.is_primary():
      print(origin, flush=True)
    return state

  def at_stage(resolution):
    stage = system.at_stage(resolution)
    begin, step = _stepper(step_lib.build(stage, system), frozen)
    title = stages.description(experiment.schedule, resolution)
    return dataclasses.replace(prepared, system=stage, begin=begin, step=step, sample=_sampler(stage, frozen, title))

  distances = frechet.Distances(system, dataset, frozen, extractor) if extractor is not None else None
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
  """Lines on problems of the data set and, with several devices, on the mesh."""
  layout, experiment = system.layout, system.experiment
  warnings = tuple(
    f"WARNING: {problem} (data.tolerate_corruption: its records are skipped when they are read)"
    for problem in dataset.problems
  )
  if layout.devices == 1:
    return (*warnings, *system.notes())
  axes = ", ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
  over = {"all": "all devices", "expert": "the devices along expert"}[experiment.mesh.fsdp_over]
  stored = f"sharded over {over}" if experiment.mesh.fsdp else "whole on every device"
  batch = experiment.train.batch_size
  images = f"{batch // layout.devices} of {batch} images per device"
  return (*warnings, f"mesh: {axes}; {images}; dense parameters {stored}", *system.notes())


def _open(data) -> tuple[Any, orders.Order]:
  """(the data set or data sets of an experiment, the order of their records). A `Joined` acts as a `Dataset`."""
  datasets = [Dataset.open(path, data.split, data.tolerate_corruption) for _, path in data.sources]
  sizes, weights = [len(dataset) for dataset in datasets], [weight for weight, _ in data.sources]
  order = orders.build(data.shuffle, sizes, weights, data.block_records, data.window_blocks, data.shuffle_groups)
  return datasets[0] if len(datasets) == 1 else Joined(*datasets), order


def _augment(data):
  return Augment(shift=data.shift, scale=data.scale, rotate=data.rotate, flip=data.flip)


def _batches(experiment, dataset, tokenizer, layout, index_sampler, batches_per_step, start_step):
  data, batch_size = experiment.data, experiment.train.batch_size
  return loader.train_batches(
    dataset,
    resolution=experiment.resolution,
    batch_size=batch_size,
    slots=hosts.local_rows(layout.batch, batch_size),
    seed=experiment.train.seed,
    start_step=start_step * batches_per_step,
    tokenizer=tokenizer,
    augment=_augment(data),
    primary_caption_probability=data.primary_caption_probability,
    index_sampler=index_sampler,
    workers=data.workers,
    decoding=data.decode,
    normalize=False,  # on the devices, see batch_feed.py
    reads=data.reads or (_URL_READS if "://" in data.path else 0),
  )


def _sampler(system, frozen, stage=""):
  """The sampler of fixed prompts and latents with averaged weights, or None without prompts."""
  train = system.experiment.train
  # A conditional system has a row of images for each prompt, an unconditional one a single grid.
  prompts, latents = tuple(train.sample_prompts) if system.experiment.conditional else ("",), train.sample_latents
  if not prompts:
    return None
  sampler = sampling.Sampler(system, min(system.sampling_batch_size, len(prompts) * latents), compile_quickly=True)

  def sample(state):
    weights = sampling.weights_of(system, state, frozen)
    found = sampler(weights, prompts, latents_per_prompt=latents, seed=train.seed, choices=True)
    makers, count = sampling.makers(system, found)
    return SampleSet(found.images, prompts, stage, makers, count)

  return sample
