"""The held-out split by words: new combinations of words that training knows."""

import collections
import re
from collections.abc import Collection, Sequence

import numpy as np

from aurora_jax.data.build_settings import KEEP_FOR_TRAINING
from aurora_jax.data.sources.base import Item, words

# Scripts without spaces between words: Han with kana and bopomofo, Yi, Thai, Lao, Tibetan, Burmese, Khmer, Tai,
# Javanese.
_UNSPACED = (
  "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u2e80-\u2fdf\u3005-\u3007\u3040-\u312f\u31a0-\u31ff"
  "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\ua980-\ua9df\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNIT = re.compile(f"[{_UNSPACED}]|[^{_UNSPACED}]+")


def choose_heldout(
  items: Sequence[Item], fraction: float, seed: int, keep: Collection[str] = KEEP_FOR_TRAINING
) -> set[int]:
  """Chooses items to hold out, by primary caption. Their captions are new combinations of known words.

  Every word of a held-out caption occurs in the primary caption of a training item. The same combination of words, in
  any order, occurs in none. Items of one group, or with the same words, stay together. A caption of one word is no
  combination and stays in training. In scripts without spaces between words, each character is a word.

  Args:
    items: the items.
    fraction: fraction of the items to hold out, in [0, 1).
    seed: seed of the choice.
    keep: captions that are never held out.

  Returns:
    Positions in `items`, at most `fraction` of them. There are fewer if the captions share too few words.
  """
  target = round(fraction * len(items))
  bags = [_bag(item.captions[0]) for item in items]
  kept_bags = {_bag(caption) for caption in keep}
  uses = collections.Counter(word for bag in bags for word in bag)
  held = set()
  clusters = _clusters(items, bags)
  for number in np.random.default_rng(seed).permutation(len(clusters)):
    cluster = clusters[number]
    if len(held) + len(cluster) > target:
      continue
    if any(len(bags[member]) < 2 or bags[member] in kept_bags for member in cluster):
      continue
    lost = collections.Counter(word for member in cluster for word in bags[member])
    if all(uses[word] > count for word, count in lost.items()):
      uses -= lost
      held.update(cluster)
  return held


def _bag(caption):
  """The words of a caption as a frozenset; in scripts without spaces, its characters."""
  return frozenset(unit for word in words(caption) for unit in _UNIT.findall(word))


def _clusters(items, bags):
  """Groups the positions of items that share a group or a set of words: a list of lists, in a fixed order."""
  parent = list(range(len(items)))

  def root(member):
    while parent[member] != member:
      parent[member] = parent[parent[member]]
      member = parent[member]
    return member

  first = {}
  for member, (item, bag) in enumerate(zip(items, bags)):
    for shared in (item.group, bag):
      parent[root(member)] = root(first.setdefault(shared, member))
  clusters = collections.defaultdict(list)
  for member in range(len(items)):
    clusters[root(member)].append(member)
  return list(clusters.values())
