"""StyleGAN-T, the full model grown from 64 to 512 pixels: the published mode `freeze64`, at the paper's batch of 2048.

Target: zero-shot FID-30k on COCO at 256 pixels of 13.90 (arXiv 2301.09515, Table 3); an image of 512 pixels in 0.1 s.
Cost: the paper trained all its stages for 4 weeks on 64 A100. Generator 1,020.50 M parameters, of which the blocks
above 64 pixels and every ToRGB train.

  python -m aurora_jax train --config configs/stylegan_t_512.py --workdir runs/stylegan_t_512 \\
      --config.train.init_from=runs/stylegan_t_64 \\
      --config.data.path=DATA_512 --config.text.clip=CLIP_VIT_L_14_FOLDER --config.dino.path=DINO_VIT_S_16

The generator starts with the averages of the 64-pixel run and fresh blocks above them. The discriminator starts with
its weights from that run. Blur and the ramp-up of the average are off, as published for a model that is trained
further. Micro-batches have 4 images. --config.mode=all trains all layers, which the paper describes. The published
README shows this step with the lite model and a smaller batch.

For a mesh: choose --config.micro_batch.count so that the number of devices divides batch / count.

Variant `test`: the same code at a toy size, from scratch.
"""

from configs import stylegan_t_64


def get_config(variant=""):
  config = stylegan_t_64.get_config(variant, micro_batch=4, micro_batches=8)
  config.name = "stylegan_t_512"
  config.generator.compute_dtype = config.discriminator.compute_dtype = "bfloat16"
  config.loss.blur_fade_kimg = 0.0
  config.ema.ramp_up = 0.0
  config.mesh.fsdp = True
  if not variant:
    config.mode = "freeze64"
    config.generator.resolution = 512
    config.train.init_from = "runs/stylegan_t_64"
    config.train.init_from_ema = True
  return config
