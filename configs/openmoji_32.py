"""A small Aurora on OpenMoji at 32x32, for two CPU cores: the quickstart's experiment.

Target: images that match their captions, by the judge of `evaluate`. Cost: a quarter of an hour on two cores, data and
CLIPs included (launch/quickstart.sh).

  python -m aurora_jax build-data --source openmoji --out datasets/openmoji --resolution 64
  python -m aurora_jax train-clip --data datasets/openmoji --out clips/openmoji --seconds 240
  python -m aurora_jax train --config configs/openmoji_32.py --workdir runs/openmoji_32 \\
      --config.data.path=datasets/openmoji --config.text.clip=clips/openmoji

All parts of the system at a small size: Fourier input, adaptive kernels, deformable convolutions, L2 attention, sparse
experts at 4 and 8 pixels, multi-scale discriminator, all four losses. Muon trains the matrices, not the recipe's Adam:
it needs fewer steps (benchmarks/README.md). Nearly every caption has one image. Images are therefore shifted, rotated
and scaled a little, and the discriminator compares two images of a caption, so that latents have something to choose. A
data set of twice the resolution (build-data --resolution 64) keeps such images sharp.

Variants:
  progressive  grows from 8 over 16 to 32 pixels; the discriminator sees every level. The same networks without growing:
               --config openmoji_32.py:progressive --config.schedule.resolutions="()"
  tones        latents choose among skin tones alone (build-data --skin-tones unnamed). Images are not augmented, and an
               epoch has every caption once. Results: benchmarks/README.md
  dense        a feed-forward layer of one expert's size in place of the experts: as many active parameters, no router
  augment      DiffAugment in the discriminator in place of shifts, rotations and scales of the data; pairs are then two
               images of a caption
  both         DiffAugment in the discriminator, and the data augmented as ever
  feature_critic
               a second critic, on a frozen transformer: the image tower of one more CLIP, with 64 tokens
               (train-clip --data datasets/openmoji --out clips/backbone --patch 4 --image-width 64 --image-layers 3
               --seconds 120); --config.dino.path=DIR where it is elsewhere
  test         a few steps

Without a loss: --config.loss.matching_weight=0, --config.loss.clip_weight=0.
"""

from aurora_jax import config_files

PROMPTS = (
  "red heart",
  "green circle",
  "blue square",
  "grinning face",
  "globe showing Americas",
  "banana",
  "thumbs up",
  "sun with face",
  "cat face",
  "house",
  "automobile",
  "red apple",
  "star",
  "flag: Japan",
  "pizza",
  "umbrella",
)


# The image tower of train-clip --patch 4 --image-width 64 --image-layers 3, as a frozen transformer.
BACKBONE = {
  "image_size": 32,
  "patch": 4,
  "width": 64,
  "depth": 3,
  "heads": 4,
  "mlp_width": 128,
  "layer_norm_epsilon": 1e-5,
  "activation": "quick_gelu",
  "pre_norm": True,
}
VARIANTS = ("progressive", "tones", "dense", "augment", "both", "feature_critic", "test")


def get_config(variant=""):
  if variant not in ("", *VARIANTS):
    raise ValueError(f"configs/openmoji_32.py has no variant {variant!r}, only {', '.join(map(repr, VARIANTS))}")
  config = config_files.defaults()
  config.name = "openmoji_32"

  generator = config.generator
  generator.resolution = 32
  generator.z_dim = 64
  generator.w_dim = 128
  generator.mapping_layers = 1
  generator.mapping_width = 128
  generator.mapping_lr_multiplier = 1.0
  generator.text_feature_dim = 128
  generator.text_dim = 128
  generator.text_layers = 1
  generator.text_heads = 4
  generator.text_lr_multiplier = 1.0
  generator.text_attention = "scaled"
  generator.channels_base = 512
  generator.channels_max = 128
  generator.blocks = {4: 1, 8: 1, 16: 1, 32: 1}
  generator.adaptive_kernels = {4: 2, 8: 2, 16: 1, 32: 1}
  generator.attention_depth = {4: 1, 8: 1}
  generator.experts = {4: 4, 8: 8}
  generator.moe_backend = "grouped"
  generator.router_balance_weight = 0.01
  generator.heads = 2
  generator.head_dim = 32
  generator.conv_residual_gain = 0.7071067811865476
  generator.attention_residual_gain = 0.7071067811865476
  generator.deformable_max_resolution = 4
  generator.output_resolutions = (4, 8, 16, 32)

  discriminator = config.discriminator
  discriminator.resolution = 32
  discriminator.channels_base = 256
  discriminator.channels_max = 96
  discriminator.blocks = {32: 1, 16: 1, 8: 1, 4: 1}
  discriminator.attention_depth = {}
  discriminator.heads = 2
  discriminator.head_dim = 32
  discriminator.input_resolutions = (32, 8)
  discriminator.exit_resolutions = (16, 8, 1)
  discriminator.head_layers = 1
  discriminator.text_feature_dim = 128
  discriminator.text_dim = 128
  discriminator.text_layers = 0
  discriminator.text_heads = 4
  discriminator.text_lr_multiplier = 1.0
  discriminator.compare_pairs = True

  loss = config.loss
  loss.level_weights = {32: 0.7, 8: 0.3}
  loss.early_exit_adversarial = 1.0
  loss.early_exit_matching = 1.0
  loss.matching_weight = 0.5
  loss.r1_gamma = 1.0
  loss.r1_interval = 16
  loss.clip_weight = 1.0
  loss.clip_min_resolution = 32
  loss.clip_logit_scale = 30.0
  loss.clip_bank = 2000
  loss.clip_augment = True

  for optimizer in (config.optimizer.generator, config.optimizer.discriminator):
    optimizer.method = "muon"
    optimizer.bias_lr_factor = 0.1
    optimizer.weight_decay = 0.0
    optimizer.final_lr_fraction = 0.1
  config.optimizer.generator.learning_rate = 0.012
  config.optimizer.discriminator.learning_rate = 0.01
  config.ema.half_life_images = 5_000.0

  config.data.path = "datasets/openmoji_32"
  config.data.shift = 0.04
  config.data.scale = 0.15
  config.data.rotate = 10.0
  config.data.pairs = 2
  config.text.clip = "runs/openmoji_32_clip"

  train = config.train
  train.total_steps = 5000
  train.batch_size = 8
  train.checkpoint_every = 1000
  train.log_every = 100
  train.sample_every = 1000
  train.sample_prompts = PROMPTS
  train.sample_latents = 2
  if variant == "progressive":
    grow(config)
  if variant == "tones":
    config.name = "openmoji_32_tones"
    config.data.path = "datasets/openmoji_32_tones"
    config.data.epoch_unit = "caption"
    config.data.shift = config.data.scale = config.data.rotate = 0.0
  if variant == "dense":
    generator.experts = {4: 1, 8: 1}
  if variant in ("augment", "both"):
    config.name = f"openmoji_32_{variant}"
    # Without cutout, whose square is large on such images.
    discriminator.augment = ("brightness", "saturation", "contrast", "translation")
  if variant == "augment":
    config.data.shift = config.data.scale = config.data.rotate = 0.0
  if variant == "feature_critic":
    add_feature_critic(config)
  if variant == "test":
    train.total_steps = 6
    train.batch_size = 4
    train.checkpoint_every = 2
    train.log_every = 2
    train.sample_every = 3
    train.sample_prompts = PROMPTS[:2]
    loss.r1_interval = 2
    loss.clip_bank = 8
  return config


def grow(config):
  """Grows from 8 over 16 to 32 pixels. Each stage before the last takes at most a fifth of the images."""
  config.name = "openmoji_32_progressive"
  config.discriminator.input_resolutions = (32, 16, 8)
  config.loss.level_weights = {32: 0.7, 16: 0.3, 8: 0.3}
  schedule = config.schedule
  schedule.resolutions = (8, 16, 32)
  schedule.factor = 1.5
  schedule.images = 1_000
  schedule.every_images = 2_000
  schedule.max_images = {8: 8_000, 16: 8_000}


def add_feature_critic(config):
  """StyleGAN-T's discriminator beside Aurora's, as in configs/stylegan_t_openmoji_32.py."""
  config.name = "openmoji_32_feature_critic"
  config.dino.path = "clips/backbone"
  config.optimizer.feature_critic.final_lr_fraction = 0.1
  critic = config.feature_critic
  critic.weight = 1.0
  critic.text_dim = 128
  critic.image_size = 32
  critic.taps = (0, 1, 2)
  critic.augment = ("brightness", "saturation", "contrast", "translation")
  critic.dino.update(BACKBONE)
