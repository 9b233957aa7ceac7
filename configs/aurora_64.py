"""Aurora at 64x64: the released architecture and the paper's recipe, with documented values where the paper gives none.

Target: zero-shot FID-30k on COCO at 64 pixels of 6.2 (the paper's abstract). Cost: the paper trained on 256 A100 for a
week. Generator 1,166.33 M parameters, discriminator 384.2 M, text and CLIP loss from ViT-L/14.

  python -m aurora_jax train --config configs/aurora_64.py --workdir runs/aurora_64 \\
      --config.data.path DATA --config.text.clip CLIP_VIT_L_14_FOLDER

With a mesh for a machine: configs/aurora_64_v5e_256.py, configs/aurora_64_a100_32.py, configs/aurora_64_a100_256.py.

Values that the paper does not give are from GigaGAN's Table A2 (arXiv 2303.05511), whose generator Aurora extends. The
comments in aurora_jax/systems/aurora/config.py name the source of every default.

Variant `released`: the same recipe with an architecture that the authors' PyTorch code can hold. What `export --format
released` writes of a run from scratch then loads there with strict=True. It gives up the self-attention of the text
head: that code multiplies its logits by False, so that every token attends to all tokens alike.

Variant `test`: the same code at a toy size, without progressive growing; --config.schedule.resolutions="(4, 8, 16)"
lets it grow. `released-test` is both.
"""

from aurora_jax import config_files

VARIANTS = ("", "released", "test", "released-test")


def is_test(variant):
  """Whether a variant is of toy size."""
  return variant.endswith("test")


def get_config(variant=""):
  if variant not in VARIANTS:
    raise ValueError(f"the configs of aurora_64 have no variant {variant!r}, only 'released', 'test', 'released-test'")
  config = config_files.defaults()
  config.name = "aurora_64"

  # The defaults of `generator` and `discriminator` are the full model. A run from scratch uses the attention that was
  # meant. A converted checkpoint needs "independent", which the released scripts compute.
  config.generator.text_attention = "scaled"
  config.generator.remat = True
  config.discriminator.remat = True

  loss = config.loss
  loss.level_weights = {64: 0.33, 32: 0.17, 16: 0.17, 8: 0.17, 4: 0.17}  # GigaGAN A2 (recalled), high to low
  loss.r1_gamma = 0.2048  # GigaGAN A2: 0.2048 to 2.048
  loss.r1_interval = 16
  loss.clip_weight = 0.2
  loss.clip_min_resolution = 16

  # Progressive growing: the rule is the paper's, all numbers are our choice.
  schedule = config.schedule
  schedule.resolutions = (4, 8, 16, 32, 64)
  # The paper: the generator's FID must be better than the reference. Our reference compares two real sets, which no
  # generator beats; with 1.0 only the caps would end a stage.
  schedule.factor = 1.5
  # The paper's FIDs are Inception's: with its weights at hand, --config.schedule.features=inception
  # --config.schedule.inception=pt_inception-2015-12-05-6726825d.pth.
  schedule.images = 10_000  # the size in the paper's table, "FID 10K (train set)"
  schedule.every_images = 1_000_000  # measuring adds a hundredth of the training images
  # At most 240 M of the 1,382 M images. Small images are learned sooner and cost a fraction of the large ones.
  schedule.max_images = {4: 10_000_000, 8: 20_000_000, 16: 60_000_000, 32: 150_000_000}

  for optimizer in (config.optimizer.generator, config.optimizer.discriminator):
    optimizer.learning_rate = 0.0025
    optimizer.weight_decay = 0.01  # of attention matrices
  config.ema.half_life_images = 7_000_000.0  # 0.9999 per step at batch 1024, GigaGAN A2
  config.generator.w_average_decay = 0.998

  train = config.train
  train.total_steps = 1_350_000  # GigaGAN A2
  train.batch_size = 1024
  train.checkpoint_every = 2_000
  train.sample_every = 1_000
  train.sample_prompts = (
    "a red heart",
    "a photo of a cat",
    "a bowl of fruit on a wooden table",
    "a mountain lake at sunrise",
    "a portrait of an old sailor",
    "a city street at night in the rain",
    "an astronaut riding a horse",
    "a green vase with yellow flowers",
  )
  if is_test(variant):
    shrink(config)
  if variant.startswith("released"):
    fit_release(config)
  return config


def fit_release(config):
  """What the released code cannot express takes the value that it has there."""
  generator = config.generator
  generator.text_attention = "independent"
  generator.text_heads = generator.heads
  generator.feed_forward_ratio = 4
  if generator.deformable_max_resolution:
    generator.deformable_max_resolution = 16


def on_pod(name, variant, *, data, expert=16, batch_size=1024):
  """The recipe on `data` x `expert` accelerators.

  Arithmetic is bfloat16. Every expert of a 16-expert layer has its own device. The other parameters are sharded over
  the devices of the expert axis.

  Args:
    name: name of the experiment.
    variant: as of `get_config`; one of toy size takes all devices and has no expert axis.
    data, expert: devices along the two axes of the mesh.
    batch_size: images per step, of all devices. The recipe's learning rates and half-lives are meant for 1024.

  Returns:
    ConfigDict.
  """
  config = get_config(variant)
  config.name = name
  config.generator.compute_dtype = config.discriminator.compute_dtype = "bfloat16"
  config.discriminator.remat = False  # recomputing the generator's blocks saves enough memory
  config.mesh.fsdp = True
  config.data.workers = 8  # of each host
  if not is_test(variant):
    config.mesh.data, config.mesh.expert = data, expert
    config.mesh.fsdp_over = "expert"
    config.train.batch_size = batch_size
  return config


def shrink(config):
  """The same structure at a size that compiles and steps in seconds on a CPU. One stage: each compiles its own step."""
  config.schedule.resolutions = ()
  config.schedule.every_images = 8
  config.schedule.images = 8
  config.schedule.max_images = {4: 8, 8: 8}
  generator, discriminator = config.generator, config.discriminator
  generator.resolution = discriminator.resolution = 16
  generator.z_dim = 8
  generator.w_dim = generator.mapping_width = 16
  generator.mapping_layers = 2
  generator.text_feature_dim = discriminator.text_feature_dim = 32
  generator.text_dim = discriminator.text_dim = 16
  generator.text_layers = discriminator.text_layers = 1
  generator.text_heads = discriminator.text_heads = 2
  generator.channels_base = 512
  generator.channels_max = 32
  generator.blocks = {4: 1, 8: 1, 16: 1}
  generator.adaptive_kernels = {4: 1, 8: 2, 16: 2}
  generator.attention_depth = {8: 1}
  generator.experts = {8: 4}
  generator.heads = discriminator.heads = 2
  generator.head_dim = discriminator.head_dim = 8
  generator.deformable_max_resolution = 8
  generator.output_resolutions = (4, 8, 16)
  generator.remat = discriminator.remat = False
  discriminator.channels_base = 256
  discriminator.channels_max = 32
  discriminator.blocks = {16: 1, 8: 1, 4: 1}
  discriminator.attention_depth = {8: 1}
  discriminator.input_resolutions = (16, 8, 4)
  discriminator.exit_resolutions = (8, 4, 1)
  discriminator.head_layers = 1
  config.loss.r1_interval = 2
  config.train.total_steps = 6
  config.train.batch_size = 4
  config.train.checkpoint_every = 2
  config.train.log_every = 1
  config.train.sample_every = 3
  config.train.sample_prompts = config.train.sample_prompts[:2]
