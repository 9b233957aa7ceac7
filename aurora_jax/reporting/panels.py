"""What the report shows in addition to the files of a run: examples that need the model or the data."""

import dataclasses
from collections.abc import Mapping

from aurora_jax.evaluation.examples import ColorExample, ExpertExample, HeldOutExample


@dataclasses.dataclass(frozen=True)
class Panels:
  """Additional content of a report. Each part may be missing.

  Attributes:
    name: the run's name; None takes the name in its config, else that of its folder.
    figures: the judge's figures by their names in metrics.jsonl ("judge/top1_of_32"); None takes the newest ones there.
    expert_examples: images with expert maps.
    heldout: prompts that are not in the training data.
    colors: prompts that name a color.
    notes: sentences below the figures: which weights, how many images, which truncation.
  """

  name: str | None = None
  figures: Mapping[str, float] | None = None
  expert_examples: tuple[ExpertExample, ...] = ()
  heldout: tuple[HeldOutExample, ...] = ()
  colors: tuple[ColorExample, ...] = ()
  notes: tuple[str, ...] = ()
