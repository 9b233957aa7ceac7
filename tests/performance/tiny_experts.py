"""A config file: the smallest generator with experts, one block at 4x4 pixels, and its discriminator."""

from configs import aurora_64


def get_config():
  config = aurora_64.get_config("test")
  config.name = "tiny_experts"
  generator, discriminator = config.generator, config.discriminator
  for network in (generator, discriminator):
    network.resolution, network.blocks, network.text_layers = 4, {4: 1}, 0
    network.attention_depth = {}
  generator.attention_depth, generator.experts = {4: 1}, {4: 2}
  generator.mapping_layers, generator.deformable_max_resolution = 1, 0
  generator.output_resolutions = discriminator.input_resolutions = (4,)
  discriminator.exit_resolutions = (1,)
  generator.adaptive_kernels = {4: 1}
  config.loss.clip_weight = 0.0
  return config
