"""GigaGAN's 64-pixel base (arXiv 2303.05511, Table A2, T2I-64), which Aurora extends, with the same code.

Target: zero-shot FID-30k on COCO at 64 pixels of 7.28; with a small budget, FID-10k of 9.18 after 100,000 steps of
batch 256 (its Table 1). Cost: the paper trained on 96 to 128 A100. Generator 650.94 M parameters (Table A2: 652.5),
discriminator 384.2 M (Table A2: 381.4), without the vision-aided critic.

  python -m aurora_jax train --config configs/gigagan_64.py --workdir runs/gigagan_64 \\
      --config.data.path DATA --config.text.clip CLIP_VIT_L_14_FOLDER

Differences from Aurora: a constant input instead of Fourier features, no deformable convolutions, a dense feed-forward
instead of experts, attention at 8, 16 and 32 pixels with 2, 2 and 1 layers, queries and keys tied, w as a token of
cross-attention, no progressive growing. CLIP's features are read after the final norm, as in Aurora; GigaGAN reads them
before the last layer.

Variants `released`, `test` and `released-test`: as of configs/aurora_64.py.
"""

from configs import aurora_64


def get_config(variant=""):
  config = aurora_64.get_config(variant)
  config.name = "gigagan_64"
  generator = config.generator
  generator.fourier_input = False
  generator.deformable_max_resolution = 0
  generator.tied_attention = True
  generator.w_token = True
  test = aurora_64.is_test(variant)
  generator.experts = {8: 1} if test else {8: 1, 16: 1, 32: 1}
  if not test:
    generator.attention_depth = {8: 2, 16: 2, 32: 1}
  config.schedule.resolutions = ()
  config.schedule.max_images = {}
  return config
