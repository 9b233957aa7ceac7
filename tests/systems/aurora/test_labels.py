"""What the generic code is told of Aurora's parameters: every label of a tiny system, and stages against the
networks.
"""

import jax
import pytest

from aurora_jax import config_files
from aurora_jax.parallel.mesh import names_of
from aurora_jax.systems.aurora import discriminator, generator
from aurora_jax.systems.aurora.labels import label

PARAMETERS = {
  "generator": lambda cfg: generator.abstract_variables(cfg)["params"],
  "discriminator": discriminator.abstract_params,
}


def leaves(tree):
  """[(key path, "a/b/c", shape)]."""
  flat = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [(path, "/".join(names_of(path)), leaf.shape) for path, leaf in flat]


@pytest.fixture(scope="module")
def experiment():
  return config_files.load(["--config=configs/aurora_64.py:test"])


@pytest.fixture(scope="module")
def parameters(experiment):
  """{network: [(label, name, shape)]} of all parameters."""
  return {
    network: [(label(path), name, shape) for path, name, shape in leaves(of(getattr(experiment, network)))]
    for network, of in PARAMETERS.items()
  }


def chosen(parameters, field):
  return {name for found in parameters.values() for one, name, _ in found if getattr(one, field)}


FEED_FORWARD = "synthesis/r8_block0_attention/layer_0/feed_forward"


def test_experts_are_the_stacks_of_the_feed_forward_layers(parameters, experiment):
  stacks = {f"{FEED_FORWARD}/{part}" for part in ("in_weight", "in_bias", "out_weight", "out_bias")}
  assert chosen(parameters, "experts") == stacks
  count = experiment.generator.experts[8]
  assert all(shape[0] == count for _, name, shape in parameters["generator"] if name in stacks)


def test_weight_decay_acts_on_the_matrices_of_attention(parameters):
  attention, layer = "synthesis/r8_block0_attention", "synthesis/r8_block0_attention/layer_0"
  assert chosen(parameters, "decay") == {
    f"{attention}/in/weight",
    f"{attention}/out/weight",
    *(f"{layer}/self_attention/{part}/weight" for part in ("qk", "v", "out", "out/style")),
    *(f"{layer}/cross_attention/{part}/weight" for part in ("q", "kv", "out")),
    *(f"r8_attention0/{part}/weight" for part in ("qk", "v", "out")),
  }


def test_matrices_are_what_has_inputs_and_outputs(parameters):
  """Nothing else has two axes, but the biases of a stack of experts."""
  several = {name for found in parameters.values() for _, name, shape in found if len(shape) > 1}
  stacked = {f"{FEED_FORWARD}/{part}" for part in ("in_bias", "out_bias")}
  assert stacked < several and chosen(parameters, "matrix") == several - stacked


def test_biases_are_the_added_vectors_of_layers_and_norms(parameters):
  single = {name for found in parameters.values() for _, name, shape in found if len(shape) == 1}
  scales = {name for name in single if name.endswith("/scale")}
  deformation = {
    f"synthesis/{conv}/{part}"
    for conv in ("r4_block0_conv", "r8_block0_conv/conv2")
    for part in ("mtm_bias", "mtm_scale")
  }
  assert len(scales) == 8 and deformation < single
  assert chosen(parameters, "bias") == single - scales - deformation


STAGES = {
  "generator": {
    4: {"r4_block0_conv", "r4_rgb"},
    8: {"r8_block0_conv", "r8_block0_attention", "r8_rgb"},
    16: {"r16_block0_conv", "r16_rgb"},
    0: {"mapping_0", "mapping_1", "input", "text_head"},
  },
  "discriminator": {
    # An exit of r pixels judges the levels above it.
    4: {"r4_block0", "r4_from_rgb"},
    8: {"r8_block0", "r8_attention0", "r8_from_rgb", "r4_conditional", "r4_unconditional"},
    16: {"r16_block0", "r16_from_rgb", "r8_conditional", "r8_unconditional"},
    0: {"last", "text_head", "r1_conditional", "r1_unconditional"},
  },
}
GROUPS = {
  "mapping": {"mapping_0", "mapping_1"},
  "input": {"input"},
  "text_head": {"text_head"},
  "last": {"last"},
  "r4_conv": {"r4_block0_conv", "r4_block0"},
  "r8_conv": {"r8_block0_conv", "r8_block0"},
  "r16_conv": {"r16_block0_conv", "r16_block0"},
  "r8_attention": {"r8_block0_attention", "r8_attention0"},
  "r4_rgb": {"r4_rgb", "r4_from_rgb"},
  "r8_rgb": {"r8_rgb", "r8_from_rgb"},
  "r16_rgb": {"r16_rgb", "r16_from_rgb"},
  "r1_heads": {"r1_conditional", "r1_unconditional"},
  "r4_heads": {"r4_conditional", "r4_unconditional"},
  "r8_heads": {"r8_conditional", "r8_unconditional"},
}


def test_modules_stages_and_groups(parameters):
  groups = {module: group for group, modules in GROUPS.items() for module in modules}
  for network, found in parameters.items():
    stages = {module: stage for stage, modules in STAGES[network].items() for module in modules}
    for one, name, _ in found:
      assert one.module == name.removeprefix("synthesis/").split("/")[0]
      assert one.stage == stages[one.module] and one.group == groups[one.module], name
    assert {one.module for one, _, _ in found} == set(stages)


@pytest.mark.parametrize(
  "name,group",
  [
    ("r32_block0/conv1/weight", "r32_conv"),
    ("r8_attention1/norm1/scale", "r8_attention"),
    ("r32_from_rgb/bias", "r32_rgb"),
    ("r8_unconditional/weight", "r8_heads"),
    ("synthesis/r8_block0_conv/conv1/weight", "r8_conv"),
    ("synthesis/r8_block1_attention/in/weight", "r8_attention"),
    ("mapping_0/weight", "mapping"),
    ("last/bias", "last"),
  ],
)
def test_arrays_are_logged_by_kind_and_resolution(name, group):
  assert label(tuple(jax.tree_util.DictKey(part) for part in name.split("/"))).group == group


@pytest.mark.slow
@pytest.mark.parametrize(
  "flags",
  [
    ("--config=configs/aurora_64.py:test", "--config.schedule.resolutions=(4, 8, 16)"),
    ("--config=configs/openmoji_32.py:progressive",),
  ],
)
def test_a_stage_uses_the_parameters_of_the_networks_that_end_there(flags):
  whole = config_files.load(list(flags))
  for network, of in PARAMETERS.items():
    everything = leaves(of(getattr(whole, network)))
    for resolution in whole.schedule.resolutions:
      own = {name for _, name, _ in leaves(of(getattr(whole.at_stage(resolution), network)))}
      used = {name for path, name, _ in everything if label(path).stage <= resolution}
      assert used == own
    assert used == {name for _, name, _ in everything}
