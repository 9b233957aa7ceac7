"""StyleGAN-T, the lite model at 64x64, by the published README's recipe: batch 128 in micro-batches of 8.

Target: the ablations of the paper (arXiv 2301.09515, Table 4, all of them with the lite model): zero-shot FID-10k on
COCO. Cost: the paper does not say. Generator 74.56 M parameters, discriminator heads 7.75 M on a frozen DINO ViT-S/16.

  python -m aurora_jax train --config configs/stylegan_t_lite_64.py --workdir runs/stylegan_t_lite_64 \\
      --config.data.path=DATA --config.text.clip=CLIP_VIT_L_14_FOLDER --config.dino.path=DINO_VIT_S_16

configs/stylegan_t_64.py explains data and DINO; here model and batch are smaller. The weight of the CLIP loss is the
paper's for its full training. The published default is 0.

Variant `test`: the same code at a toy size.
"""

from configs import stylegan_t_64


def get_config(variant=""):
  config = stylegan_t_64.get_config(variant, batch_size=128, micro_batches=16)
  config.name = "stylegan_t_lite_64"
  if not variant:
    config.generator.channels_base = 32768
    config.generator.channels_max = 512
    config.generator.residual_blocks = 2
  return config
