"""From which resolution on a parameter is in use, by its name: what progressive growing trains at a stage.

All parameters of all resolutions exist from the start. At a stage of r pixels the generator stops at r, and of the
discriminator only what the levels up to r pass through runs.
"""

import re


def lowest_resolution(path):
  """The smallest stage, in pixels, at which a parameter takes part in the generator or the discriminator.

  Args:
    path: its key path in the parameters of either network; an optimiser's tree of the same structure will do.

  Returns:
    int; 0 for what every stage has.
  """
  for entry in path:
    match = re.fullmatch(r"r(\d+)_(\w+)", str(getattr(entry, "key", entry)))
    if match:
      resolution, part = int(match[1]), match[2]
      # An exit of the discriminator judges the levels above it; the last one, of 1 pixel, all.
      is_exit = part in ("conditional", "unconditional")
      return resolution if not is_exit else 2 * resolution if resolution > 1 else 0
  return 0
