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
  return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr):
  return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation):
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
    return max(_of_jaxpr(branch.jaxpr) for branch in params["branches"])
  inner = sum(_of_jaxpr(jaxpr) for jaxpr in _inner_jaxprs(params))
  if name == "while" and inner:
    raise ValueError("a while loop with products in it: its trips are not known")
  return inner * (params["length"] if name == "scan" else 1)


def _inner_jaxprs(params):
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item
