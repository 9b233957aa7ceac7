"""OpenMoji at 64x64 on two CPU cores: the quickstart's experiment at twice the resolution.

Target: images that match their captions, by the judge of `evaluate`. Cost: an hour on two cores, data and CLIPs
included.

  python -m aurora_jax build-data --source openmoji --out datasets/openmoji_64 --resolution 64
  python -m aurora_jax train-clip --data datasets/openmoji_64 --out clips/openmoji_64 --resolution 32 --steps 2000 &
  python -m aurora_jax train-clip --data datasets/openmoji_64 --out clips/judge --split all --seed 1 --resolution 32 \\
      --steps 2000
  wait
  python -m aurora_jax train --config configs/openmoji_64.py --workdir runs/openmoji_64
  python -m aurora_jax evaluate --workdir runs/openmoji_64 --judge clips/judge

Unlike configs/openmoji_32.py, images are not augmented, and the discriminator compares no pairs.

Variant `test`: a few steps.
"""

from configs import openmoji_32


def get_config(variant=""):
  config = openmoji_32.get_config(variant)
  config.name = "openmoji_64"
  generator, discriminator = config.generator, config.discriminator
  generator.resolution = discriminator.resolution = 64
  generator.blocks = {4: 1, 8: 1, 16: 1, 32: 1, 64: 1}
  generator.adaptive_kernels = {4: 2, 8: 2, 16: 1, 32: 1, 64: 1}
  generator.channels_base = 1024
  discriminator.channels_base = 512
  generator.output_resolutions = (4, 8, 16, 32, 64)
  discriminator.blocks = {64: 1, 32: 1, 16: 1, 8: 1, 4: 1}
  discriminator.input_resolutions = (64, 16)
  discriminator.exit_resolutions = (32, 16, 8, 1)
  config.loss.level_weights = {64: 0.7, 16: 0.3}
  config.health.logit_gap = 40.0  # 24 after 200 steps, below 9 from step 400 on
  discriminator.compare_pairs = False
  config.data.shift = config.data.scale = config.data.rotate = 0.0
  config.data.pairs = 0
  config.data.path = "datasets/openmoji_64"
  config.text.clip = "clips/openmoji_64"
  if not variant:
    config.train.total_steps = 14_000
    config.train.sample_every = 1_000
  return config
