"""StyleGAN-T's full model at 64x64 on a TPU v5e pod of 16 x 16 chips: batch 2048, one micro-batch of 8 per chip.

Target: as configs/stylegan_t_64.py. Cost: 12,207 steps of 2048 images; `compile` gives a bound on the time of one.

  ZONE=us-west4-a SHARED=10.0.0.2:/share CONFIG=configs/stylegan_t_v5e_256.py DATA=DATA CLIP=CLIP_VIT_L_14_FOLDER \\
      bash launch/tpu_slice.sh up

which runs, on each of the hosts,

  python -m aurora_jax train --config configs/stylegan_t_v5e_256.py --workdir RUN --require tpu \\
      --config.data.path=DATA --config.text.clip=CLIP_VIT_L_14_FOLDER --config.dino.path=DINO_VIT_S_16

Variant `test`: the same code at a toy size, on all devices.
"""

from configs import stylegan_t_64


def get_config(variant=""):
  return stylegan_t_64.on_pod("stylegan_t_v5e_256", variant, devices=256)
