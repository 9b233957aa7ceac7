"""The speed of a generator's PyTorch twin, on the CPU, with random weights."""

import importlib
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.systems import hub, registry

_TOKENS = 77  # of a prompt, as CLIP has them


class Speed(NamedTuple):
  """The speed at one batch size.

  Attributes:
    batch: images per call.
    seconds: of a call after one of warm-up, median.
    weights_bytes: of the weights.
    peak_bytes: the largest memory of the process so far.
  """

  batch: int
  seconds: float
  weights_bytes: int
  peak_bytes: int


def measure(
  experiment: Experiment, batches: Sequence[int], repeats: int, threads: int | None = None
) -> Iterator[Speed]:
  """Times the twin's `sample`: text head, mapping, synthesis; not the text encoder before it.

  Args:
    experiment: whose generator it is; all resolutions of it.
    batches: batch sizes.
    repeats: calls that count.
    threads: of PyTorch; None leaves its default.

  Raises:
    UserError: the system has no twin, or PyTorch is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise UserError("the PyTorch twin needs PyTorch: pip install torch") from error
  if threads:
    torch.set_num_threads(threads)
  names = hub.torch_names(experiment.system)
  config = names.config_to_torch(names.for_sampling(names.generator_config(experiment, experiment)))
  modeling = importlib.import_module(f"{registry.SYSTEMS[experiment.system]}.modeling_{experiment.system}")
  name = config["architectures"][0]
  values = getattr(modeling, f"{name.removesuffix('Generator')}Config").from_dict(config)
  random = torch.Generator().manual_seed(0)
  with torch.device("meta"):
    model = getattr(modeling, name)(values)
  model = model.to_empty(device="cpu").eval().requires_grad_(False)
  for tensor in model.state_dict().values():
    if tensor.is_floating_point():
      tensor.normal_(generator=random)
    else:
      tensor.zero_()
  weights = sum(tensor.nbytes for tensor in model.state_dict().values())
  for batch in batches:
    if batch < getattr(model, "least_batch", 1):
      raise UserError(f"--batch {batch}: this generator takes {model.least_batch} images or more")
    latents, text = model.draw_latents(batch, random), None
    if model.text_input == "tokens":
      features = torch.randn(batch, _TOKENS, values.text_feature_dim, generator=random)
      text = features, torch.full((batch,), 5)
    elif model.text_input is not None:
      text = torch.nn.functional.normalize(torch.randn(batch, values.text_dim, generator=random), dim=-1)
    seconds = []
    for _ in range(1 + repeats):
      begin = time.perf_counter()
      model.sample(latents, text)
      seconds.append(time.perf_counter() - begin)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield Speed(batch, statistics.median(seconds[1:]), weights, peak)
