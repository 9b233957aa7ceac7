"""A small StyleGAN-T on OpenMoji at 32x32, for two CPU cores.

Target: 80 % of images matched with their captions among 32, by the judge of `evaluate` (benchmarks/README.md). Cost: a
quarter of an hour on two cores, and two minutes for each of the two CLIPs.

  python -m aurora_jax build-data --source openmoji --out datasets/openmoji --resolution 64
  python -m aurora_jax train-clip --data datasets/openmoji --out clips/conditioner
  python -m aurora_jax train-clip --data datasets/openmoji --out clips/backbone --patch 4 \
      --image-width 64 --image-layers 3 --seconds 120
  python -m aurora_jax train --config configs/stylegan_t_openmoji_32.py --workdir runs/stylegan_t_openmoji_32 \\
      --config.data.path=datasets/openmoji --config.text.clip=clips/conditioner --config.dino.path=clips/backbone

DINO's weights cannot be downloaded everywhere. The image tower of clips/backbone replaces them: a vision transformer of
the same layout, with 64 tokens, whose blocks the discriminator's heads read. Differences from configs/stylegan_t_64.py:
means in place of the published sums, no blur, twice the learning rates, which fall, and augmentation without cutout,
whose square is large on such images.

Variants:
  test  a few steps; the image tower of text.clip, a CLIP of `train-clip` with its default sizes, replaces DINO
"""

from aurora_jax import config_files
from configs import openmoji_32


def get_config(variant=""):
  if variant not in ("", "test"):
    raise ValueError(f"configs/stylegan_t_openmoji_32.py has no variant {variant!r}, only 'test'")
  config = config_files.defaults("stylegan_t")
  config.name = "stylegan_t_openmoji_32"

  generator = config.generator
  generator.resolution = 32
  generator.text_dim = 128
  generator.channels_base = 768
  generator.channels_max = 96
  generator.residual_blocks = 1
  generator.norm_groups = 8

  discriminator = config.discriminator
  discriminator.text_dim = 128
  discriminator.image_size = 32
  discriminator.taps = (0, 1, 2)
  discriminator.augment = ("brightness", "saturation", "contrast", "translation")
  discriminator.dino.update(openmoji_32.BACKBONE)

  loss = config.loss
  loss.clip_weight = 2.0
  loss.clip_crop = 32
  loss.clip_size = 32
  loss.blur_fade_kimg = 0.0
  config.micro_batch.size = 16
  config.micro_batch.reduction = "mean"
  config.ema.half_life_images = 5_000.0
  for optimizer in (config.optimizer.generator, config.optimizer.discriminator):
    optimizer.learning_rate = 0.004
    optimizer.final_lr_fraction = 0.1

  config.data.path = "datasets/openmoji"
  config.text.clip = "clips/conditioner"
  config.dino.path = "clips/backbone"

  train = config.train
  train.total_steps = 2_200
  train.batch_size = 16
  train.checkpoint_every = 500
  train.log_every = 100
  train.sample_every = 500
  train.sample_prompts = openmoji_32.PROMPTS
  train.sample_latents = 2
  if variant == "test":
    config.dino.path = ""
    discriminator.dino.update(patch=8, width=128, depth=2, mlp_width=256)
    discriminator.taps = (0, 1)
    config.micro_batch.size = 4
    train.total_steps = 6
    train.batch_size = 4
    train.checkpoint_every = 2
    train.log_every = 2
    train.sample_every = 3
    train.sample_prompts = openmoji_32.PROMPTS[:2]
  return config
