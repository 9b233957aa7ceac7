"""Describes how each layer's tokens reach their experts on a mesh."""

import jax.numpy as jnp

from aurora_jax.parallel.experts import Exchange
from aurora_jax.systems.aurora.config import Generator, experts_per_layer


def explain(exchange: Exchange, cfg: Generator, batch_size: int) -> list[str]:
  """Describes the exchange plan of every layer with experts, with the arithmetic behind it.

  Args:
    exchange: the exchange of the system.
    cfg: the generator's configuration.
    batch_size: images per step, over all devices.

  Returns:
    One line per resolution.
  """
  lines, images, itemsize = [], batch_size // exchange.layout.devices, jnp.dtype(cfg.compute_dtype).itemsize
  width = cfg.heads * cfg.head_dim
  for r, experts in experts_per_layer(cfg).items():
    if r > max(cfg.output_resolutions):
      continue
    tokens, layers = images * r * r, cfg.blocks[r] * cfg.attention_depth[r]
    plan = exchange.plan(tokens, width, cfg.feed_forward_ratio * width, experts, itemsize)
    head = f"experts at {r} px: {layers} layer{'s' if layers > 1 else ''} of {experts}, "
    if plan.mode == "local":
      lines.append(f"{head}all on every device")
      continue
    reason = "chosen by bytes" if exchange.mode == "auto" else f"mesh.exchange={exchange.mode}"
    lines.append(
      f"{head}{experts // plan.group} per device along {' x '.join(plan.axes)} = {plan.group}; {tokens:,} tokens a "
      f"device; a layer and step receives {_megabytes(plan.token_bytes)} as tokens ({plan.capacity:,} slots from "
      f"each of {plan.group - 1}) or {_megabytes(plan.weight_bytes)} as weights: {plan.mode} ({reason})"
    )
  return lines


def _megabytes(size):
  return f"{size / 1e6:,.{1 if size >= 1e5 else 3}f} MB"
