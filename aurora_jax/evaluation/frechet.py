"""Frechet distances during training: between two sets of real images, and between real and generated images.

Both sets are the same at every resolution and step. The seed draws 2n different images of the training split: set A has
the first n, set B the others. The reference is the distance between A and B. The generator's distance is that between A
and images generated for B's captions, so that neither comparison uses the same captions twice. Real images are reduced
like those for the discriminator.

Every process computes the moments of the same global batches (ops/frechet.py).
"""

import concurrent.futures
import functools
import zlib
from collections.abc import Callable

import jax
import numpy as np

from aurora_jax.data import loader, shuffle, tfrecords
from aurora_jax.data.dataset import Dataset
from aurora_jax.errors import UserError
from aurora_jax.evaluation import sampling
from aurora_jax.evaluation.features import Extractor
from aurora_jax.ops import frechet, random_keys, resample
from aurora_jax.parallel import hosts
from aurora_jax.systems import base

_PURPOSE = "frechet"


class Distances:
  """Takes the distances of a run.

  Attributes:
    name: short name for metrics: "frechet_clip".
    features: full description of the features, written next to every number.
    count: n, images in each set.
    description: features and count, for messages.
  """

  def __init__(self, system: base.System, dataset: Dataset, frozen: base.Frozen, extractor: Extractor):
    """Chooses the images. Reads none and compiles nothing.

    Args:
      system: the system at its last stage.
      dataset: the training split.
      frozen: the run's frozen networks, on the devices.
      extractor: extractor of the features.

    Raises:
      UserError: the split has fewer than 4 images.
    """
    experiment = system.experiment
    cfg, train = experiment.schedule, experiment.train
    self.count = min(cfg.images, len(dataset) // 2)
    if self.count < 2:
      raise UserError(f"data set {dataset.path} has {len(dataset)} images; schedule needs two sets of at least 2")
    self.name, self.features = f"frechet_{extractor.name}", extractor.description
    self.description = f"features by {self.features}, {self.count:,} images"
    self._system, self._experiment, self._dataset = system, experiment, dataset
    self._layout, self._frozen, self._extractor = system.layout, frozen, extractor
    own = frozen.get(extractor.frozen_name) if extractor.frozen_name else None
    self._variables = own if own is not None else hosts.replicate(self._layout.replicated, extractor.variables)
    # The batch size of training fits into the devices' memory.
    self._batch, self._rows = train.batch_size, hosts.local_rows(self._layout.batch, train.batch_size)
    seed = int(shuffle.fold(train.seed, zlib.crc32(_PURPOSE.encode()))[0] >> np.uint64(1))
    self._places = functools.partial(shuffle.epoch_permutation, seed, 0, len(dataset))
    self._key = np.asarray(jax.random.key_data(random_keys.fold(jax.random.key(train.seed), _PURPOSE)))
    self._real = {}  # {current resolution: moments of A}
    self._generator = {}  # {current resolution: program}

  def reference(self, resolution: int, keep_on: Callable[[], bool]) -> float | None:
    """The distance between A and B at a resolution; None if `keep_on()` became False."""
    extract = self._real_program(resolution)
    first = self._of_real(extract, 0, keep_on)
    second = first and self._of_real(extract, self.count, keep_on)
    if not second:
      return None
    self._real = {resolution: first}
    return hosts.float_from_primary(frechet.distance(first, second))

  def generated(self, resolution: int, state: base.TrainState, keep_on: Callable[[], bool]) -> float | None:
    """The distance between A and images of a state's averaged weights; None if `keep_on()` became False."""
    if resolution not in self._real:  # a resumed run
      first = self._of_real(self._real_program(resolution), 0, keep_on)
      if first is None:
        return None
      self._real = {resolution: first}
    if resolution not in self._generator:
      self._generator = {resolution: self._generator_program(resolution)}
    layout, extract = self._layout, self._generator[resolution]
    weights = sampling.weights_of(self._system, state, self._frozen)

    def features(number, places):
      captions = [captions[0] for _, captions in self._examples(places, pixels=False)]
      local = jax.tree.map(np.asarray, self._system.inputs(captions))
      inputs = jax.tree.map(lambda rows: jax.make_array_from_process_local_data(layout.batch, rows), local)
      return extract(weights, self._variables, inputs, np.uint32(number), self._key)

    moments = self._moments(self.count, features, keep_on)
    return None if moments is None else hosts.float_from_primary(frechet.distance(self._real[resolution], moments))

  def _of_real(self, extract, first, keep_on):
    layout = self._layout

    def features(number, places):
      del number
      images = np.stack([loader.to_float(pixels) for pixels, _ in self._examples(places)])
      return extract(self._variables, jax.make_array_from_process_local_data(layout.batch, images))

    return self._moments(first, features, keep_on)

  def _moments(self, first, features, keep_on):
    """Moments of the images at places `first` to `first + count` of the permutation.

    Args:
      first: first place.
      features: (number of the batch, places of this process) -> [batch, D] on every device.
      keep_on: asked before every batch; False ends the computation.

    Returns:
      `frechet.Moments`, or None if `keep_on()` became False.
    """
    moments, waiting = frechet.Moments(self._extractor.width), None
    for number in range(-(-self.count // self._batch)):
      if not keep_on():
        return None
      # The last batch is filled with copies of its last image, which are left out of the moments.
      places = np.minimum(number * self._batch + self._rows, self.count - 1)
      found = features(number, first + places)
      if waiting is not None:  # while the devices compute this batch
        moments.add(np.asarray(waiting))
      waiting = found
    moments.add(np.asarray(waiting)[: (self.count - 1) % self._batch + 1])
    return moments

  def _examples(self, places, pixels=True):
    """[(pixels or None, captions)] of places in the permutation."""
    with concurrent.futures.ThreadPoolExecutor(max(1, self._experiment.data.workers)) as pool:
      return list(pool.map(functools.partial(self._example, pixels=pixels), places.tolist()))

  def _example(self, place, pixels):
    """Reads the example at a place. An unreadable record is replaced by the one 2n places further on."""
    size, side = len(self._dataset), self._experiment.resolution
    for attempt in range(size):
      number = int(self._places((place + attempt * 2 * self.count) % size)[0])
      try:
        return loader.load_pixels(self._dataset, number, side) if pixels else (None, self._dataset[number].captions)
      except tfrecords.RecordError as error:
        last = error
    raise UserError(f"no image of data set {self._dataset.path} can be read, the last one: {last}")

  def _real_program(self, resolution):
    @functools.partial(jax.jit, out_shardings=self._layout.replicated)
    def extract(variables, images):
      return self._extractor.apply(variables, resample.image_pyramid(images, (resolution,))[resolution])

    return extract

  def _generator_program(self, resolution):
    layout, system = self._layout, self._system.at_stage(resolution)

    @functools.partial(jax.jit, out_shardings=layout.replicated)
    def extract(weights, variables, inputs, number, key):
      keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(key), number), self._batch)
      latents = jax.lax.with_sharding_constraint(jax.vmap(system.draw_latents)(keys), layout.batch)
      networks = {
        name: {**values, "params": system.unshard(name, values["params"])} for name, values in weights.networks.items()
      }
      condition = system.condition(networks, weights.frozen, inputs)
      return self._extractor.apply(variables, system.sample(networks, weights.frozen, condition, latents).image)

    return extract
