"""Which parameters a stage uses, by name, against the networks that have that resolution and no more."""

import jax
import pytest

from aurora_jax import config, config_files
from aurora_jax.systems.aurora import discriminator, generator, growth


def names(tree, keep=lambda path: True):
  return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0] if keep(path)}


@pytest.mark.parametrize(
  "flags",
  [
    ("--config=configs/aurora_64.py:test", "--config.schedule.resolutions=(4, 8, 16)"),
    ("--config=configs/openmoji_32.py:progressive",),
  ],
)
def test_a_stage_uses_the_parameters_of_the_networks_that_end_there(flags):
  whole = config_files.load(list(flags))
  parameters = {
    "generator": lambda cfg: generator.abstract_variables(cfg)["params"],
    "discriminator": discriminator.abstract_params,
  }
  for network, of in parameters.items():
    everything = of(getattr(whole, network))
    for resolution in whole.schedule.resolutions:
      own = of(getattr(config.at_stage(whole, resolution), network))
      used = names(everything, lambda path: growth.lowest_resolution(path) <= resolution)
      assert used == names(own)
    assert used == names(everything)
