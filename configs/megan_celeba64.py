"""MEGAN on CelebA at 64x64 as released: ten generators, WGAN-GP with five discriminator rounds.

Target: varied faces (arXiv 1805.02481, Figure 5); MS-SSIM is its measure of diversity. Cost: 300,000 iterations of
batch 64.

  python -m aurora_jax train --config configs/megan_celeba64.py --workdir runs/megan_celeba64 --config.data.path=DATA

DATA is CelebA, cropped to its central 160 pixels, then built at 64 pixels by `build-data`.

Variants:
  test  the same at a toy size
"""

from configs import megan_cifar10


def get_config(variant=""):
  config = megan_cifar10.get_config(variant)
  config.name = "megan_celeba64"
  config.generator.resolution = config.discriminator.resolution = 64
  config.loss.anneal_every = 3_165  # 202,599 images // batch size 64
  return config
