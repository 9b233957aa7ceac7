"""Checks of sampling arguments. Imports no JAX, so that a wrong flag is reported at once."""

import math
from collections.abc import Sequence

from aurora_jax import text
from aurora_jax.errors import UserError

# CLIP reads at most 77 tokens. A longer text is a mistake, such as a file's content in place of its name.
LONGEST_PROMPT = 1000


def check_prompts(prompts: Sequence[str]) -> None:
  """Raises `UserError` if a prompt is empty, has more than `LONGEST_PROMPT` characters, or is not text."""
  for prompt in prompts:
    shown = text.printable(prompt, 43)
    if not prompt.strip():
      raise UserError("a prompt is empty")
    if len(prompt) > LONGEST_PROMPT:
      raise UserError(f"a prompt has {len(prompt):,} characters, at most {LONGEST_PROMPT:,} make sense: '{shown}'")
    reason = text.unusable(prompt)
    if reason:
      raise UserError(f"the prompt '{shown}' {reason}")


def check_psi(psi: float) -> None:
  """Raises UserError unless the truncation lies between 0 and 1."""
  if not (math.isfinite(psi) and 0.0 <= psi <= 1.0):
    raise UserError(f"truncation psi must lie between 0 and 1, got {psi}")
