"""Floating-point operations of a program, counted from its jaxpr: matrix products and convolutions, loop trips multiplied.

Compilers' own cost models count a loop's body once; this one multiplies. Elementwise work is left out, as is usual.
"""

import math

import jax
from jax.extend import core


def count(function, *arguments):
  """Multiply-adds of one call, times two.

  Args:
    function: anything `jax.make_jaxpr` takes.
    *arguments: arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    int. Of a branch (`lax.cond`, `lax.switch`) the costliest side counts.

  Raises:
    ValueError: a `while` loop with work in it, whose trips nobody knows.
  """
  return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def usual_branch(branches, costs):
  """The cost of the side of a branch that a step usually takes: experts in balance, tokens exchanged as planned.

  The side with an all-to-all, if just one has (the other is its fall-back); otherwise the cheapest one that does any work
  (the ladder of capacities of `ops.moe`).
  """
  exchanging = [cost for branch, cost in zip(branches, costs) if _has(branch, "all_to_all")]
  if len(exchanging) == 1:
    return exchanging[0]
  return min((cost for cost in costs if cost), default=0)


def of_jaxpr(jaxpr, branch=lambda branches, costs: max(costs), platform=None):
  """Multiply-adds of a jaxpr, times two; of a program on a mesh, those of all its devices.

  Args:
    jaxpr: `jax.extend.core.Jaxpr`.
    branch: (jaxprs, their costs) -> the cost that counts.
    platform: "cpu", "cuda" or "tpu": decides branches by platform (`lax.platform_dependent`). None: they are branches
      like others.

  Returns:
    int.

  Raises:
    ValueError: a `while` loop with work in it, whose trips nobody knows.
  """
  return sum(_of_equation(equation, branch, platform) for equation in jaxpr.eqns)


def _of_equation(equation, branch, platform):
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracting, _), _ = params["dimension_numbers"]
    inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
    return 2 * inner * math.prod(equation.outvars[0].aval.shape)
  if name == "conv_general_dilated":
    kernel, layout = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
    per_output = math.prod(kernel) // kernel[layout[0]]  # inputs of one group times taps
    return 2 * per_output * math.prod(equation.outvars[0].aval.shape) // params["batch_group_count"]
  if name == "cond":
    branches = [branch_jaxpr.jaxpr for branch_jaxpr in params["branches"]]
    platforms = params.get("branches_platforms")
    if platform and platforms:  # None stands for all that are not named
      named = [i for i, names in enumerate(platforms) if names and platform in names]
      chosen = named or [i for i, names in enumerate(platforms) if not names]
      return of_jaxpr(branches[chosen[0]], branch, platform)
    return branch(branches, [of_jaxpr(inner, branch, platform) for inner in branches])
  inner = sum(of_jaxpr(jaxpr, branch, platform) for jaxpr in _inner_jaxprs(params))
  if name == "while" and inner:
    raise ValueError("a while loop with products in it: its trips are not known")
  if name == "scan":
    return inner * params["length"]
  if name == "shard_map":  # inside, shapes are those of one device
    return inner * math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
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
