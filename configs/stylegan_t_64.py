"""StyleGAN-T, the full model at 64x64: the first stage of the paper's training, by the published code's recipe.

Target: zero-shot FID-30k on COCO at 64 pixels of 7.30 (arXiv 2301.09515, Table 2). Cost: the paper trained all its
stages for 4 weeks on 64 A100. Generator 975.56 M parameters, discriminator heads 7.75 M on a frozen DINO ViT-S/16, text
by CLIP ViT-L/14.

  python -m aurora_jax train --config configs/stylegan_t_64.py --workdir runs/stylegan_t_64 \\
      --config.data.path=DATA --config.text.clip=CLIP_VIT_L_14_FOLDER --config.dino.path=DINO_VIT_S_16

DATA is 64-pixel images with captions (the paper: 250 M pairs of CC3M, CC12M, YFCC100M, RedCaps and LAION-aesthetic-6+).
DINO_VIT_S_16 is a folder or file of DINO's ViT-S/16 in timm's, Hugging Face's or the original names.

The batch of 2048, the weight 0.2 of the CLIP loss and the learning rates are the paper's. Micro-batches of 8, blur and
augmentation are the published code's. The length is that code's default of 25 M images; the paper gives none.

With a mesh for a machine: configs/stylegan_t_a100_64.py, configs/stylegan_t_v5e_256.py. A smaller model:
configs/stylegan_t_lite_64.py. The next stage, 512 pixels: configs/stylegan_t_512.py. After it, the paper trains the
text encoder: --config.mode=text_encoder --config.generator.text_tower.layers=12
--config.optimizer.generator.learning_rate=3e-6 --config.loss.clip_weight=50.0 --config.train.init_from=RUN.

Variant `test`: the same code at a toy size, for a CLIP of `train-clip` with its default sizes, whose image tower
replaces DINO.
"""

from aurora_jax import config_files

PROMPTS = (
  "a red heart",
  "a photo of a cat",
  "a bowl of fruit on a wooden table",
  "a mountain lake at sunrise",
  "a portrait of an old sailor",
  "a city street at night in the rain",
  "an astronaut riding a horse",
  "a green vase with yellow flowers",
)


def get_config(variant="", *, batch_size=2048, micro_batch=8, micro_batches=4):
  """The experiment.

  Args:
    variant: "" or "test".
    batch_size: images per step.
    micro_batch: images that share batch norm statistics, the published code's micro-batch on one device.
    micro_batches: number of micro-batches that are processed one after the other.
  """
  if variant not in ("", "test"):
    raise ValueError(f"the configs of stylegan_t have no variant {variant!r}, only 'test'")
  config = config_files.defaults("stylegan_t")
  config.name = "stylegan_t_64"
  # The defaults of `generator` and `discriminator` are the full model.
  config.generator.remat = config.discriminator.remat = True
  config.micro_batch.size = micro_batch
  config.micro_batch.count = micro_batches
  config.loss.clip_weight = 0.2
  config.ema.half_life_images = batch_size * 10_000 / 32  # published: 0.9978 per step, whatever the batch

  train = config.train
  train.total_steps = 25_000_000 // batch_size
  train.batch_size = batch_size
  train.checkpoint_every = 500
  train.sample_every = 500
  train.sample_prompts = PROMPTS
  if variant == "test":
    shrink(config)
  return config


def shrink(config):
  """The same structure at a size that compiles and steps in seconds on a CPU."""
  generator, discriminator = config.generator, config.discriminator
  generator.resolution = 16
  generator.z_dim = 8
  generator.text_dim = discriminator.text_dim = 128
  generator.channels_base = 256
  generator.channels_max = 32
  generator.residual_blocks = 1
  generator.norm_groups = 4
  generator.remat = discriminator.remat = False
  # The image tower of `train-clip`.
  discriminator.dino.update(
    image_size=32,
    patch=8,
    width=128,
    depth=2,
    heads=4,
    mlp_width=256,
    layer_norm_epsilon=1e-5,
    activation="quick_gelu",
    pre_norm=True,
  )
  discriminator.image_size = 32
  discriminator.taps = (0, 1)
  discriminator.text_map_dim = 8
  config.micro_batch.size = 4
  config.micro_batch.count = min(2, config.micro_batch.count)
  if config.loss.clip_weight:
    config.loss.clip_crop = 16
    config.loss.clip_size = 32
  config.mode = "all"
  config.train.init_from = ""
  train = config.train
  train.total_steps = 6
  train.batch_size = 8
  train.checkpoint_every = 2
  train.log_every = 1
  train.sample_every = 3
  train.sample_prompts = PROMPTS[:2]


def on_pod(name, variant, *, devices, batch_size=2048, micro_batch=8, micro_batches=1):
  """The recipe on a mesh of accelerators: bfloat16 arithmetic, dense parameters sharded over all devices.

  Args:
    name: name of the experiment.
    variant: "" or "test"; "test" takes all devices.
    devices: number of devices of the mesh.
    batch_size, micro_batch, micro_batches: see `get_config`.
  """
  config = get_config(variant, batch_size=batch_size, micro_batch=micro_batch, micro_batches=micro_batches)
  config.name = name
  config.generator.compute_dtype = config.discriminator.compute_dtype = "bfloat16"
  config.mesh.fsdp = True
  config.data.workers = 8  # of each host
  if not variant:
    config.mesh.data = devices
  return config
