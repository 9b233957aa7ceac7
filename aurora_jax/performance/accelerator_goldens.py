"""The part of `bench accelerator` that checks numbers: outputs, routing and gradients of the released PyTorch code.

The numbers are those of tests/goldens, which a checkout has and an installed package has not.
"""

import importlib
import json
import pathlib
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from aurora_jax.errors import UserError
from aurora_jax.performance import accelerator_inputs as inputs
from aurora_jax.systems import base, registry

FOLDER = pathlib.Path(__file__).parents[2] / "tests" / "goldens"
_NAME = "tiny16"
# The largest difference over the largest entry of an array, at the highest precision.
TOLERANCE = 1e-3


def measure(run: inputs.Run) -> dict[str, Any]:
  """Compares at the device's default precision and at the highest; on a CPU, where they are one, at the highest.

  Raises:
    UserError: the files are not there, or at the highest precision a number differs by more than `TOLERANCE` or a token
      goes to another expert.
  """
  results: dict[str, Any] = {"tolerance_at_highest": TOLERANCE, "rows": []}
  run.doing("reading", results)
  case = _read(run)
  for precision in ("highest",) if run.toy else ("highest", "default"):  # the one that decides comes first
    with inputs.attempts(results["rows"], {"precision": precision}) as row, jax.default_matmul_precision(precision):
      run.require_time(5, f"precision {precision}")
      run.doing(f"precision {precision}", results)
      row |= _compare(*case)
    run.save(results)
  reasons = list(inputs.failures(results["rows"]))
  for row in results["rows"]:
    if row["precision"] == "highest" and "error" not in row:
      names = ("image", "w", "moe_loss", "router_logits", "gradient")
      worst = float(np.max([row[name] for name in names]))  # NaN if one is
      if not worst < TOLERANCE or row["tokens_at_another_expert"]:
        reasons.append(
          f"at the highest precision: largest relative difference {worst:.2g} (allowed {TOLERANCE:g}), "
          f"{row['tokens_at_another_expert']} tokens at another expert"
        )
  if reasons:
    raise UserError("; ".join(reasons))
  return results


def _read(run):
  """(generator, configuration, the system's `released`, variables, arrays) of the golden."""
  paths = [FOLDER / f"{_NAME}.{kind}" for kind in ("config.json", "state_dict.safetensors", "io.safetensors")]
  missing = [path.name for path in paths if not path.is_file()]
  if missing:
    raise UserError(f"no {', '.join(missing)} in {FOLDER}: run from a checkout, the package has no tests/goldens")
  system = run.experiment().system
  released = registry.released(system)
  cfg = released.config_from_released(json.loads(paths[0].read_text(encoding="utf-8")))
  generator = importlib.import_module(f"{registry.SYSTEMS[system]}.generator").Generator(cfg)
  return generator, cfg, released, released.import_generator(load_file(paths[1]), cfg), load_file(paths[2])


def _compare(generator, cfg, released, variables, io):
  nhwc = lambda array: array.transpose(0, 2, 3, 1)
  arrays = io["in.z"], io["in.text"], io["in.eot"].astype(np.int32)
  cotangent = nhwc(io["grad.cotangent_image"])

  def loss(params):
    out = base.apply(generator, {**variables, "params": params}, *arrays)
    return (out.image * cotangent).sum() + out.moe_loss, out

  (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
  ours = released.export_generator({**variables, "params": gradient}, cfg)
  prefix = "grad.param."
  names = released.layer_names(cfg)
  routed = {mine: io[f"route.{theirs}.expert"] for mine, theirs in names.items()}
  return {
    "image": _relative(out.image, nhwc(io["out.image"])),
    "w": _relative(out.w, io["out.w"]),
    "moe_loss": _relative(out.moe_loss, io["out.moe_loss"]),
    "router_logits": max(_relative(out.routing[n].logits, io[f"route.{t}.logits"]) for n, t in names.items()),
    "gradient": max(_relative(ours[n.removeprefix(prefix)], io[n]) for n in io if n.startswith(prefix)),
    "tokens": sum(array.size for array in routed.values()),
    "tokens_at_another_expert": sum(int((np.asarray(out.routing[n].expert) != e).sum()) for n, e in routed.items()),
  }


def _relative(ours, theirs):
  """The largest difference over the largest entry."""
  scale = np.abs(theirs).max()
  return float(np.abs(np.asarray(ours) - theirs).max() / (scale if scale > 0 else 1.0))
