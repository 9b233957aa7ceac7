"""Sections of report.html about experts: maps of the expert of each pixel, and the load of each expert over time."""

import math
import re
from collections.abc import Sequence

import numpy as np

from aurora_jax.evaluation.examples import ExpertExample
from aurora_jax.reporting import curves, image_sheets
from aurora_jax.reporting.page_elements import data_uri, escape, figure, hex_color, section, tile


def layer_name(layer: str) -> str:
  """ "8 px, block 0, layer 1" for "r8_block0_layer1"; any other name unchanged."""
  match = re.fullmatch(r"r(\d+)_block(\d+)_layer(\d+)", layer)
  return f"{match[1]} px, block {match[2]}, layer {match[3]}" if match else layer


def _legend(experts):
  items = "".join(
    f'<li><i style="background:{hex_color(c)}"></i>{n}</li>' for n, c in enumerate(image_sheets.expert_colors(experts))
  )
  return f'<ul class="legend" aria-label="Color of each expert"><li>Expert</li>{items}</ul>'


def expert_examples(examples: Sequence[ExpertExample]) -> str:
  """Images with a map per MoE layer of the expert of each pixel."""
  cards = []
  for example in examples:
    tiles = [figure(tile(example.image, example.caption), "generated")]
    for layer in sorted(example.layers, key=curves.natural_key):
      index = np.asarray(example.layers[layer])
      if index.ndim == 1:
        index = index.reshape(math.isqrt(index.size), -1)
      source = data_uri(image_sheets.expert_map(index, example.experts[layer]), quality=None)
      image = f'<img class="tile map" alt="{escape(f"experts of {layer}")}" src="{source}">'
      tiles.append(figure(image, layer_name(layer)))
    cards.append(
      f'<article class="card"><h3>{escape(example.caption)}</h3><div class="strip">{"".join(tiles)}</div></article>'
    )
  body = ""
  if cards:
    most = max(count for example in examples for count in example.experts.values())
    body = _legend(most) + f'<div class="stack">{"".join(cards)}</div>'
  return section(
    "Expert of each pixel",
    "One map per mixture-of-experts layer. A color stands for an expert of that layer. The same color in two layers "
    "stands for two different experts.",
    body,
    "No expert maps yet.",
  )


def _areas(load):
  """The shares of a layer's experts as stacked SVG areas: time to the right, shares upward."""
  steps = load.steps.astype(np.float64)
  across = np.array([0.0, 100.0]) if len(steps) == 1 else 100 * (steps - steps[0]) / (steps[-1] - steps[0])
  shares = np.repeat(load.shares, 2, axis=0) if len(steps) == 1 else load.shares
  edges = 100 * (1 - np.concatenate([np.zeros((len(shares), 1)), np.cumsum(shares, axis=1)], axis=1))
  paths = []
  for expert, color in enumerate(image_sheets.expert_colors(shares.shape[1])):
    lower = [f"{x:.1f} {y:.1f}" for x, y in zip(across, edges[:, expert])]
    upper = [f"{x:.1f} {y:.1f}" for x, y in zip(across, edges[:, expert + 1])]
    paths.append(f'<path fill="{hex_color(color)}" d="M{"L".join(lower)}L{"L".join(upper[::-1])}Z"/>')
  return (
    '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="share of each expert over time">'
    f"{''.join(paths)}</svg>"
  )


def expert_loads(loads: Sequence[curves.LayerLoad]) -> str:
  """The shares of each layer's experts over time and at the end."""
  cards = []
  for load in loads:
    now = load.shares[-1]
    bar = "".join(
      f'<i style="width:{100 * share:.2f}%;background:{hex_color(color)}" title="expert {n}: {100 * share:.1f} %"></i>'
      for n, (share, color) in enumerate(zip(now, image_sheets.expert_colors(len(now))))
    )
    cards.append(
      f'<article class="card"><h3>{escape(layer_name(load.layer))}</h3>{_areas(load)}<div class="now">{bar}</div>'
      f"<p>now: busiest {100 * now.max():.0f}\u00a0% (expert {now.argmax()}), least busy {100 * now.min():.1f}\u00a0% "
      f"(expert {now.argmin()}), even {100 / len(now):.3g}\u00a0%</p></article>"
    )
  body = ""
  if cards:
    body = _legend(max(load.shares.shape[1] for load in loads)) + f'<div class="loads">{"".join(cards)}</div>'
  return section(
    "Load of the experts",
    "Share of pixels that each expert of a layer received, from the first step (left) to the last (right). The bar "
    "below shows the shares at the end.",
    body,
    "No expert loads in metrics.jsonl yet.",
  )
