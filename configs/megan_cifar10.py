"""MEGAN on CIFAR-10 at 32x32 as released: ten generators, WGAN-GP with five discriminator rounds.

Target: an inception score above its single DCGAN's (arXiv 1805.02481, Table 1). Cost: 300,000 iterations of batch 64,
each of which reads five batches; the released code ran on one GPU.

  python -m aurora_jax train --config configs/megan_cifar10.py --workdir runs/megan_cifar10 --config.data.path=DATA

DATA is CIFAR-10, built at 32 pixels by `build-data`. As in the released code, load balancing is off, and sampling uses
the batch norm statistics of the sampled batch.

Variants:
  test  the same at a toy size
"""

from aurora_jax import config_files


def get_config(variant=""):
  if variant not in ("", "test"):
    raise ValueError(f"the configs of megan have no variant {variant!r}, only 'test'")
  config = config_files.defaults("megan")
  config.name = "megan_cifar10"
  config.loss.anneal_every = 781  # released: images // batch size
  train = config.train
  train.total_steps = 300_000
  train.batch_size = 64
  train.checkpoint_every = 5_000
  train.log_every = 100
  train.sample_every = 1_000
  train.sample_latents = 64
  if variant == "test":
    shrink(config)
  return config


def shrink(config):
  """The same structure at a size that compiles and steps in seconds on a CPU."""
  config.generator.generators = 3
  config.generator.channels = config.discriminator.channels = 4
  config.generator.z_dim = 8
  config.loss.d_steps = 2
  train = config.train
  train.total_steps = 4
  train.batch_size = 4
  train.checkpoint_every = 2
  train.log_every = 1
  train.sample_every = 2
  train.sample_latents = 4
