"""The recipe of configs/aurora_64.py on a TPU v5e pod of 16 x 16 chips: global batch 1024, 4 images per chip.

Target: zero-shot FID-30k on COCO at 64 pixels of 6.2, as there. Cost, computed and not measured: `compile` counts 18
TFLOP per chip and step. At 40 % of the chip's 197 TFLOP/s that is 0.23 s a step, 3.6 days and 22,000 chip-hours for
1,350,000 steps. A step needs 9.3 of a chip's 16 GiB.

  ZONE=us-west4-a SHARED=10.0.0.2:/share CONFIG=configs/aurora_64_v5e_256.py DATA=DATA CLIP=CLIP_VIT_L_14_FOLDER \\
      bash launch/tpu_slice.sh up

which runs, on each of the hosts,

  python -m aurora_jax train --config configs/aurora_64_v5e_256.py --workdir RUN --require tpu \\
      --config.data.path=DATA --config.text.clip=CLIP_VIT_L_14_FOLDER

Variant `test`: the same code at a toy size, on all devices.
"""

from configs import aurora_64


def get_config(variant=""):
  config = aurora_64.on_pod("aurora_64_v5e_256", variant, data=16)
  config.generator.loop_layers = True
  return config
