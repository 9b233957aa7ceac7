"""MEGAN on OpenMoji at 32x32, unconditional, for two CPU cores: four generators and a gate that chooses among them.

Target: images of every kind of emoji, and generators that specialize (the sample grid shows which one made each image).
Cost: about ten minutes on two cores.

  python -m aurora_jax build-data --source openmoji --out datasets/openmoji_32 --resolution 32
  python -m aurora_jax train --config configs/megan_openmoji_32.py --workdir runs/megan_openmoji_32
  python -m aurora_jax sample --workdir runs/megan_openmoji_32 --latents 64 --out grid.png

Differences from configs/megan_cifar10.py: four narrower generators, two discriminator rounds, faster annealing, load
balancing, and samples by running statistics, so that an image does not depend on the others of its batch.

Variants:
  test  a few steps
"""

from aurora_jax import config_files


def get_config(variant=""):
  if variant not in ("", "test"):
    raise ValueError(f"configs/megan_openmoji_32.py has no variant {variant!r}, only 'test'")
  config = config_files.defaults("megan")
  config.name = "megan_openmoji_32"

  config.generator.generators = 4
  config.generator.channels = 32
  config.generator.z_dim = 64
  config.generator.bn_at_eval = "running"
  config.discriminator.channels = 32

  config.loss.d_steps = 2
  config.loss.load_balance = True
  config.loss.anneal_every = 100
  config.loss.anneal_rate = 1e-3

  config.data.path = "datasets/openmoji_32"

  train = config.train
  train.total_steps = 6000
  train.batch_size = 32
  train.checkpoint_every = 1000
  train.log_every = 100
  train.sample_every = 1000
  train.sample_latents = 64
  if variant == "test":
    train.total_steps = 6
    train.batch_size = 4
    train.checkpoint_every = 2
    train.log_every = 2
    train.sample_every = 3
    train.sample_latents = 8
    config.generator.channels = config.discriminator.channels = 8
    config.generator.z_dim = 16
  return config
