"""StyleGAN-T's full model at 64x64 on 64 A100, the paper's machine: 32 images per GPU, in four micro-batches of 8.

Target: as configs/stylegan_t_64.py. Cost: the paper trained all its stages for 4 weeks on these GPUs.

  CONFIG=configs/stylegan_t_a100_64.py RUN=RUN DATA=DATA CLIP=CLIP_VIT_L_14_FOLDER \\
      sbatch --nodes=8 launch/slurm_a100.sbatch

which runs, once on each node,

  python -m aurora_jax train --config configs/stylegan_t_a100_64.py --workdir RUN --require gpu \\
      --config.data.path=DATA --config.text.clip=CLIP_VIT_L_14_FOLDER --config.dino.path=DINO_VIT_S_16

Arithmetic is bfloat16 where the published code has float16. Variant `test`: the same code at a toy size, on all
devices.
"""

from configs import stylegan_t_64


def get_config(variant=""):
  return stylegan_t_64.on_pod("stylegan_t_a100_64", variant, devices=64, micro_batches=4)
