"""The experiment of tests/goldens/format1_run in today's names."""

from configs import aurora_64


def get_config():
  config = aurora_64.get_config("test")
  config.name = "format1"
  generator, discriminator = config.generator, config.discriminator
  generator.resolution = discriminator.resolution = 8
  generator.z_dim = generator.text_dim = discriminator.text_dim = 4
  generator.w_dim = generator.mapping_width = 8
  generator.channels_base = 128
  generator.blocks = {4: 1, 8: 1}
  generator.adaptive_kernels = {4: 1, 8: 1}
  generator.attention_depth = {4: 1}
  generator.experts = {4: 2}
  generator.head_dim = 4
  generator.feed_forward_ratio = 1
  generator.mapping_layers = 1
  generator.text_layers = discriminator.text_layers = 0
  generator.deformable_max_resolution = 0
  generator.output_resolutions = (4, 8)
  discriminator.channels_base = 64
  discriminator.channels_max = 8
  discriminator.blocks = {8: 1, 4: 1}
  discriminator.attention_depth = {}
  discriminator.input_resolutions = (8, 4)
  discriminator.exit_resolutions = (1,)
  config.loss.level_weights = {8: 0.5, 4: 0.5}
  config.loss.clip_min_resolution = 8
  config.data.path = "data"
  config.data.epoch_unit = "caption"
  config.text.clip = "clip"
  for optimizer, learning_rate in (
    (config.optimizer.generator, 0.003),
    (config.optimizer.discriminator, 0.0025),
  ):
    optimizer.learning_rate = learning_rate
    optimizer.weight_decay = 0.02
    optimizer.beta2 = 0.98
  config.ema.half_life_images = 100.0
  generator.w_average_decay = 0.9
  config.mesh.capacity_factor = 3.0
  config.health.logit_gap = 30.0
  config.train.total_steps = 2
  return config
