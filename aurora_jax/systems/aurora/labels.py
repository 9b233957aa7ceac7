"""The labels of Aurora's parameters. No other code reads their names."""

import re

from aurora_jax.ops import moe
from aurora_jax.parallel.mesh import KeyPath, ParamLabel, names_of

_NOT_ATTENTION = {"norm", "feed_forward", "mlp_in", "mlp_out"}


def label(path: KeyPath) -> ParamLabel:
  """The label of a parameter of the generator or the discriminator.

  Weight decay acts on attention matrices only (GigaGAN A2), not on the feed-forward layers and routers next to them.

  Args:
    path: its key path.
  """
  names = names_of(path)
  module = next((name for name in names if name != "synthesis"), "")
  return ParamLabel(
    stage=_lowest_resolution(names),
    decay=names[-1] == "weight" and any("attention" in name for name in names) and not _NOT_ATTENTION & set(names),
    experts=len(names) > 1 and names[-2] == "feed_forward" and names[-1] in moe.ExpertParams._fields,
    matrix=names[-1].endswith("weight"),
    bias=names[-1] == "bias",
    module=module,
    group=_group(module),
  )


def _lowest_resolution(names):
  """The smallest stage at which a parameter is used.

  All parameters of all resolutions exist from the start. At a stage of r pixels the generator stops at r, and the
  discriminator runs only the parts that images up to r pass through.
  """
  for name in names:
    match = re.fullmatch(r"r(\d+)_(\w+)", name)
    if match:
      resolution, part = int(match[1]), match[2]
      # An exit of the discriminator judges the levels above it; the last one, of 1 pixel, judges all.
      is_exit = part in ("conditional", "unconditional")
      return resolution if not is_exit else 2 * resolution if resolution > 1 else 0
  return 0


def _group(module):
  """The same for all blocks of a resolution: "r8_conv", "r8_attention", "r8_heads", "mapping"."""
  group = re.sub(r"_?block\d*", "", module)
  group = re.sub(r"^(r\d+)$", r"\1_conv", group)  # a block of the discriminator
  group = re.sub(r"(?<=[a-z])_?\d+$", "", group)  # mapping_0, r8_attention1
  return re.sub(r"_(un)?conditional$", "_heads", group).replace("_from_rgb", "_rgb")
