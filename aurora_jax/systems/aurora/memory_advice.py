"""Advice on Aurora's config fields that make the temporaries of a step smaller."""

from aurora_jax.systems.aurora.config import Experiment


def memory_advice(experiment: Experiment, temporaries: int, devices: int) -> list[str]:
  """Config fields that make the temporaries smaller. Savings are estimates, except those of attention_chunk.

  Args:
    experiment: the experiment.
    temporaries: bytes per device.
    devices: number of devices.

  Returns:
    One line per field.
  """
  advice, of_them = [], f"of the {_gib(temporaries)} GiB of temporaries"
  for name in ("generator", "discriminator"):
    if not getattr(experiment, name).remat:
      advice.append(
        f"{name}.remat=True keeps a block's input instead of all within it: most of its part {of_them}, for a "
        "second forward pass"
      )
  for name in ("generator", "discriminator"):
    if getattr(experiment, name).compute_dtype == "float32":
      half = f"up to {_gib(temporaries / 2)} GiB {of_them}"
      advice.append(f"{name}.compute_dtype=bfloat16 halves its activations: {half}")
  return advice + _attention(experiment, devices)


def _attention(experiment, devices):
  """Advice on the attention logits of the largest layer."""
  cfg, images = experiment.generator, experiment.train.batch_size // devices
  longest = max((r for r in cfg.attention_depth if cfg.attention_depth[r]), default=0)
  tokens = longest * longest
  chunk = min(cfg.attention_chunk, tokens)
  smaller = chunk // 4
  if smaller < 64:
    return []
  logits = lambda queries: images * cfg.heads * queries * tokens * 4
  return [
    f"generator.attention_chunk={smaller} saves {_gib(logits(chunk) - logits(smaller))} GiB for each live array of "
    f"attention logits at {longest} px ({images} images x {cfg.heads} heads x {chunk} of {tokens} queries x {tokens})"
  ]


def _gib(size):
  return f"{size / 2**30:,.{2 if abs(size) >= 2**30 / 10 else 4}f}"
