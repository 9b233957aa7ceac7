"""The smallest experiment that has everything which `compile` looks at; compiles in seconds."""

from configs import aurora_64


def get_config():
  config = aurora_64.get_config("test")
  config.name = "tiny_pod"
  generator, discriminator = config.generator, config.discriminator
  generator.resolution = discriminator.resolution = 8
  generator.blocks = {4: 1, 8: 1}
  generator.adaptive_kernels = {4: 1, 8: 1}
  generator.attention_depth = {4: 1}
  generator.experts = {4: 4}
  generator.mapping_layers = 1
  generator.deformable_max_resolution = 0
  generator.output_resolutions = (4, 8)
  generator.remat = generator.loop_layers = True
  discriminator.blocks = {8: 1, 4: 1}
  discriminator.attention_depth = {}
  discriminator.input_resolutions = (8,)
  discriminator.exit_resolutions = (1,)
  discriminator.text_layers = 0
  config.loss.clip_min_resolution = 8
  config.train.batch_size = 8
  config.mesh.expert = 2
  config.mesh.exchange = "tokens"
  return config
