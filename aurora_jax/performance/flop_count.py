"""Counts the floating-point operations of a program from its jaxpr: matrix products and convolutions.

The body of a loop counts once per trip, unlike in the compilers' cost models, which count it once. Elementwise
operations are not counted, as is usual.
"""

import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

# The precision of a product is "bfloat16", "float32" (the default of the device) or this one.
HIGHEST = "float32, highest"


def count(function: Callable[..., Any], *arguments: Any) -> int:
  """Floating-point operations of one call: twice its multiply-adds. Of branches the costliest counts.

  Args:
    function: anything that `jax.make_jaxpr` takes.
    *arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s.

  Raises:
    ValueError: a `while` loop with products in it, whose number of trips is unknown.
  """
  return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def usual_branch(branches: Sequence[core.Jaxpr], costs: Sequence[int]) -> int:
  """The cost of the branch that a step usually takes, with balanced experts.

  That is the only branch with an all-to-all, if there is just one (the exchange of tokens; the other is its fall-back).
  Otherwise it is the cheapest branch that costs anything (the ladder of capacities of `ops.moe`).

  Args:
    branches: of a conditional.
    costs: of each branch.
  """
  exchanging = [cost for branch, cost in zip(branches, costs) if _has(branch, "all_to_all")]
  if len(exchanging) == 1:
    return exchanging[0]
  return min((cost for cost in costs if cost), default=0)


def of_jaxpr(
  jaxpr: core.Jaxpr,
  branch: Callable[[Sequence[core.Jaxpr], Sequence[int]], int] = lambda branches, costs: max(costs),
  platform: str | None = None,
) -> int:
  """Floating-point operations of a jaxpr; for a program on a mesh, the sum over all devices. See `by_precision`."""
  return by_precision(jaxpr, branch, platform).total()


def by_precision(
  jaxpr: core.Jaxpr,
  branch: Callable[[Sequence[core.Jaxpr], Sequence[int]], int] = lambda branches, costs: max(costs),
  platform: str | None = None,
) -> collections.Counter[str]:
  """Floating-point operations of a jaxpr by precision; for a program on a mesh, the sum over all devices.

  Args:
    jaxpr: the program.
    branch: (branches of a conditional, their costs) -> the cost that counts.
    platform: "cpu", "cuda" or "tpu": selects the branch of `lax.platform_dependent`. None: `branch` decides there too.

  Returns:
    {"bfloat16", "float32" or "float32, highest": operations}.

  Raises:
    ValueError: a `while` loop with products in it, whose number of trips is unknown.
  """
  return sum((_of_equation(equation, branch, platform) for equation in jaxpr.eqns), collections.Counter())


def _precision(equation):
  dtype = np.result_type(*(operand.aval.dtype for operand in equation.invars[:2]))
  if dtype != np.float32:
    return dtype.name
  precision = equation.params["precision"]
  sides = precision if isinstance(precision, tuple) else (precision,)
  return HIGHEST if all(side == jax.lax.Precision.HIGHEST for side in sides) else "float32"


def _scaled(costs, factor):
  return collections.Counter({precision: cost * factor for precision, cost in costs.items()})


def _of_equation(equation, branch, platform):
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracting, _), _ = params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
    return collections.Counter({_precision(equation): 2 * inner * math.prod(equation.outvars[0].aval.shape)})
  if name == "ragged_dot_general":  # rows by groups: [T, K] and [E, K, N] or [T, N]; each row meets one group
    rows, last = equation.invars[0].aval.shape, equation.outvars[0].aval.shape[-1]
    return collections.Counter({_precision(equation): 2 * math.prod(rows) * last})
  if name == "conv_general_dilated":
    kernel, layout = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
    per_output = math.prod(kernel) // kernel[layout[0]]  # inputs of one group times taps
    total = 2 * per_output * math.prod(equation.outvars[0].aval.shape) // params["batch_group_count"]
    return collections.Counter({_precision(equation): total})
  if name == "cond":
    branches = [branch_jaxpr.jaxpr for branch_jaxpr in params["branches"]]
    platforms = params.get("branches_platforms")
    if platform and platforms:  # None is the default branch
      named = [i for i, names in enumerate(platforms) if names and platform in names]
      chosen = named or [i for i, names in enumerate(platforms) if not names]
      return by_precision(branches[chosen[0]], branch, platform)
    costs = [by_precision(inner, branch, platform) for inner in branches]
    totals = [cost.total() for cost in costs]
    return costs[totals.index(branch(branches, totals))] if any(totals) else collections.Counter()
  told = re.fullmatch(r"counts_(\d+)_flops", str(params.get("name", "")))  # see ops.large_experts
  if told:
    precision = "bfloat16" if equation.outvars[0].aval.dtype == "bfloat16" else "float32"
    return collections.Counter({precision: int(told[1])})
  inner = sum((by_precision(jaxpr, branch, platform) for jaxpr in _inner_jaxprs(params)), collections.Counter())
  if name == "while" and inner:
    raise ValueError("a while loop with products in it: its number of trips is unknown")
  if name == "scan":
    return _scaled(inner, params["length"])
  if name == "shard_map":  # shapes inside are those of one device
    return _scaled(inner, math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]))
  if name == "pallas_call":  # one block's products, for every point of the grid
    return _scaled(inner, math.prod(params["grid_mapping"].grid))
  return inner


def _has(jaxpr, name):
  return any(
    equation.primitive.name == name or any(_has(inner, name) for inner in _inner_jaxprs(equation.params))
    for equation in jaxpr.eqns
  )


def _inner_jaxprs(params):
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item
