"""What the training step asks of a critic. `Discriminator` answers it; a critic on frozen features would go in here.

`training/step.py` knows a critic by the three methods below and by its parameters, which `init` of the Flax module makes
and the optimiser trains. It names no layer, no level and no exit: losses weigh each `Logit` by the level and exit that it
carries. So another critic (StyleGAN-T's and GigaGAN's vision-aided one: a frozen image tower, a fixed random projection,
small heads) is a module with these methods, made where `step.build` makes the discriminator:

  - its frozen weights travel in `step.Frozen`, as the CLIP's do, and are handed to `apply` as a collection of their own
    beside {"params": ...}; nothing of them is in the training state;
  - two critics at once are one module that has both and returns the features and logits of both in one list;
  - its parameters' names say at which resolution they come into use, where growing matters (systems/aurora/growth.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax


@runtime_checkable
class Critic(Protocol):
  """A Flax module that judges pyramids of pictures under a text. B pictures, N tokens."""

  def features(
    self, pyramid: Mapping[int, jax.Array], kinds: int = 1, caption_id: jax.Array | None = None
  ) -> Sequence[Any]:
    """What is seen in the pictures, before any text is looked at; where the costly part belongs, since the step judges it
    twice, with the right captions and with wrong ones.

    Args:
      pyramid: {r: [B * kinds, r, r, 3]} in [-1, 1].
      kinds: pictures of each sample (a real and a generated one), next to each other as of `layers.join`.
      caption_id: [B] int32, the same for samples of one caption; None: every one is of its own.

    Returns:
      Whatever `judge` takes; the batch is the first axis of every leaf.
    """

  def encode_text(self, text: jax.Array, eot: jax.Array) -> jax.Array:
    """CLIP's features of captions [B, N, F] and where they end [B] -> [B, T], what `judge` compares with."""

  def judge(self, features: Sequence[Any], text: jax.Array) -> Sequence[Any]:
    """`features` and text [B, T] -> list of `discriminator.Logit`: positive means real and matching."""
