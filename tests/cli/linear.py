"""In the place of `training.setup`: the real loader's pictures, and tests/training/toy.py in the place of the
networks.
"""

import time

import toy

from aurora_jax.data import loader
from aurora_jax.data.dataset import Dataset

WIDTH = 20_000  # 5 MB of state: a save takes long enough to be hit


class Linear(toy.Toy):
  """A `Toy` that is trained on the pictures of `data.path`. With the name "slow" it takes a minute to begin."""

  def init(self):
    time.sleep(60 if self.experiment.name == "slow" else 0)
    return super().init()

  def batches(self, start_step):
    train = self.experiment.train
    with loader.train_batches(
      Dataset.open(self.experiment.data.path),
      resolution=8,
      batch_size=train.batch_size,
      seed=train.seed,
      start_step=start_step,
    ) as batches:
      for batch in batches:
        pixels = batch["image"].reshape(train.batch_size, -1)[:, :16]
        yield {"image": pixels, "index": batch["index"], "poison": pixels[0, :1] * 0}


def prepare(experiment):
  return Linear(experiment, width=WIDTH)
