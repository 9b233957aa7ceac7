"""L2 attention as fused kernels for TPUs and GPUs: no array of queries times keys is ever in memory.

The method is that of FlashAttention-2 (arXiv 2307.08691): softmax over tiles of keys, and a backward pass that computes
the weights again from the logarithm of their sum. The logits are those of `ops/attention.py`, so everything is exact.

  i query, j key, s = 1 / sqrt(D), O output, dO its gradient

Forward, for tiles of keys, with the largest logit so far subtracted:

  x_ij = |q_i|^2 + |k_j|^2 - 2 q_i . k_j        d_ij = sqrt(max(x_ij, 0))        l_ij = -s d_ij
  L_i = log sum_j exp(l_ij)                     P_ij = exp(l_ij - L_i)           O_i = sum_j P_ij v_j

Backward, from q, k, v, O, L and dO:

  dv_j = sum_i P_ij dO_i
  g_ij = P_ij (dO_i . v_j - delta_i)            delta_i = dO_i . O_i             the gradient of l_ij
  c_ij = -s g_ij / d_ij, or 0 where d_ij = 0
  dq_i = sum_j c_ij (q_i - k_j) = q_i (sum_j c_ij) - sum_j c_ij k_j
  dk_j = sum_i c_ij (k_j - q_i) = k_j (sum_i c_ij) - sum_i c_ij q_i

Distances, softmax and sums are float32. Products of queries, keys and c are as exact as float32: the factors are split
into bfloat16 parts (`split_product`), which the matrix units multiply exactly. Where queries and keys are bfloat16, one
product of parts gives the distance. Products with values and dO are in the dtype of the values, summed in float32.

The second derivative, which R1 needs, goes through the XLA operations of `ops/attention.py`. So does everything on a
CPU: the kernels do not compile there.

Compilers do not split kernels over devices: on a mesh, `parallel/attention.py` does.

B batch, N queries, M keys, A heads, G = B * A, D head width
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Sizes(NamedTuple):
  """What kernels know of an attention besides its arrays.

  Attributes:
    keys: M before padding; later keys have no weight.
    scale: 1 / sqrt(D), D before padding.
  """

  keys: int
  scale: float


class Kernels(Protocol):
  """The kernels of a platform. Arrays are heads first; N, M and D may be any numbers."""

  def forward(
    self, queries: jax.Array, keys: jax.Array, values: jax.Array, interpret: bool
  ) -> tuple[jax.Array, jax.Array]:
    """[G, N, D], [G, M, D], [G, M, D] -> output [G, N, D] in the dtype of `values`, L [G, N] float32."""
    ...

  def backward(
    self,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    log_sum: jax.Array,
    delta: jax.Array,
    gradient: jax.Array,
    interpret: bool,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values, in their dtypes, from L and delta [G, N] and dO [G, N, D]."""
    ...


# ---- the mathematics of a tile, for values in a kernel ---------------------------------------------------------------


def parts(x: jax.Array) -> tuple[jax.Array, ...]:
  """Bfloat16 arrays whose sum is x, the largest first: one if x is bfloat16, three if it is float32.

  Three times eight bits make the 24 bits of a float32. Integer arithmetic rounds: compilers may drop a conversion to
  bfloat16 and back.
  """
  if x.dtype == jnp.bfloat16:
    return (x,)
  high = _round_to_bfloat16(x)
  middle = _round_to_bfloat16(x - high)
  return tuple(part.astype(jnp.bfloat16) for part in (high, middle, x - high - middle))


def _round_to_bfloat16(x):
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return jax.lax.bitcast_convert_type((bits + 0x8000) & -0x10000, jnp.float32)


def split_product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """The product of two matrices along an axis of each, as exact as in float32. Float32 or bfloat16 -> float32.

  Parts whose product is below 2^-24 of the whole are left out: six products are left for two float32 factors, three
  for one, one for none.
  """
  a_parts, b_parts = parts(a), parts(b)
  pairs = [(i, j) for i in range(len(a_parts)) for j in range(len(b_parts)) if i + j <= 2]
  total = None
  for i, j in sorted(pairs, key=lambda pair: -sum(pair)):  # the smallest first
    term = product(a_parts[i], b_parts[j], contract)
    total = term if total is None else total + term
  assert total is not None
  return total


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """The product of two matrices along an axis of each, summed in float32. Float32: by JAX's default precision."""
  precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def squares(x: jax.Array, axis: int) -> jax.Array:
  """Sums of squares along an axis of a matrix, float32, with the axis kept."""
  x = x.astype(jnp.float32)
  return jnp.sum(x * x, axis=axis, keepdims=True)


def logits(
  products: jax.Array, query_squares: jax.Array, key_squares: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
  """Logits l and 1 / d (0 where d = 0) of a tile, from the products of queries and keys. All broadcast together."""
  squared = query_squares + key_squares - 2 * products
  inverse = jnp.where(squared > 0, jax.lax.rsqrt(squared), 0.0)
  return -scale * (squared * inverse), inverse


class Softmax(NamedTuple):
  """The state of a softmax over tiles of keys, for each query: largest logit so far, sum of exp(logit - largest)."""

  largest: jax.Array
  total: jax.Array

  def add(self, tile: jax.Array, axis: int) -> tuple["Softmax", jax.Array, jax.Array]:
    """Takes a tile of logits in. Returns (new state, weights of the tile, factor for earlier sums), not normalized.

    `axis` is that of the keys. The first tile must have a finite logit for every query.
    """
    largest = jnp.maximum(self.largest, jnp.max(tile, axis=axis, keepdims=True))
    factor = jnp.exp(self.largest - largest)
    weights = jnp.exp(tile - largest)
    return Softmax(largest, self.total * factor + jnp.sum(weights, axis=axis, keepdims=True)), weights, factor

  @property
  def log_sum(self) -> jax.Array:
    """L, the logarithm of the sum of exp(logit)."""
    return self.largest + jnp.log(self.total)


def coefficients(
  weights: jax.Array, weight_gradients: jax.Array, delta: jax.Array, inverse: jax.Array, scale: float
) -> jax.Array:
  """c of a tile: P, dO . v, delta, 1 / d -> -s P (dO . v - delta) / d. All broadcast together."""
  return -scale * (weights * (weight_gradients - delta)) * inverse


# ---- the differentiable function -------------------------------------------------------------------------------------


def blocks(count: int, largest: int, multiple: int) -> tuple[int, int]:
  """Splits `count` rows into equal blocks of at most `largest` rows, a multiple of `multiple`.

  Returns:
    (rows of a block, number of blocks).
  """
  number = math.ceil(count / largest)
  return math.ceil(math.ceil(count / number) / multiple) * multiple, number


def pad(x: jax.Array, axis: int, size: int) -> jax.Array:
  """Appends zeros along an axis up to `size`."""
  if x.shape[axis] == size:
    return x
  return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


def heads_first(x: jax.Array) -> jax.Array:
  """[B, N, A, D] -> [B * A, N, D]."""
  return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def heads_last(x: jax.Array, heads: int) -> jax.Array:
  """[B * A, N, D] -> [B, N, A, D]."""
  return x.reshape(-1, heads, *x.shape[1:]).swapaxes(1, 2)


Reference = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class _Options(NamedTuple):
  """What does not change within an attention; see `attend`.

  `precision` is JAX's default for products where `attend` was called. Backward passes are traced elsewhere.
  """

  reference: Reference
  interpret: str | None
  precision: str | None


def attend(
  queries: jax.Array, keys: jax.Array, values: jax.Array, reference: Reference, interpret: str | None = None
) -> jax.Array:
  """L2 attention by the kernels of the platform that it is compiled for.

  Args:
    queries: [B, N, A, D]; bfloat16 or, for all other dtypes, computed in float32.
    keys, values: [B, M, A, D], likewise.
    reference: the same function in XLA operations, with the same arguments and result: for second derivatives and for
      platforms without kernels.
    interpret: "tpu" or "gpu": these kernels in Pallas's interpreter, on any platform. For tests.

  Returns:
    [B, N, A, D] in the dtype of `values`.
  """
  dtype, usual = values.dtype, (jnp.bfloat16, jnp.float32)
  queries, keys, values = (x if x.dtype in usual else x.astype(jnp.float32) for x in (queries, keys, values))
  options = _Options(reference, interpret, jax.config.jax_default_matmul_precision)
  return _attend(options, queries, keys, values)[0].astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, queries, keys, values):
  """-> output [B, N, A, D], L [B, A, N]. L is only for `_pull_back`, which gives it no gradient."""
  return _by_platform(_forward, options, queries, keys, values)


def _attend_forward(options, queries, keys, values):
  # `_attend`, not the kernel: for a second derivative this function is differentiated too.
  out, log_sum = _attend(options, queries, keys, values)
  return (out, log_sum), (queries, keys, values, out, log_sum)


def _attend_backward(options, residuals, gradients):
  return _pull_back(options, *residuals, gradients[0])


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pull_back(options, queries, keys, values, out, log_sum, gradient):
  """The gradients of queries, keys and values. Output and L are functions of those: they only save work."""
  return _by_platform(_backward, options, queries, keys, values, out, log_sum, gradient)


def _pull_back_forward(options, queries, keys, values, out, log_sum, gradient):
  gradients = _pull_back(options, queries, keys, values, out, log_sum, gradient)
  return gradients, (queries, keys, values, log_sum, gradient)


def _pull_back_backward(options, residuals, second):
  queries, keys, values, log_sum, gradient = residuals
  by_reference = lambda queries, keys, values, gradient: jax.vjp(options.reference, queries, keys, values)[1](gradient)
  with jax.default_matmul_precision(options.precision):
    _, pull_back = jax.vjp(by_reference, queries, keys, values, gradient)
    dq, dk, dv, d_gradient = pull_back(second)
  return dq, dk, dv, jnp.zeros_like(gradient), jnp.zeros_like(log_sum), d_gradient


_pull_back.defvjp(_pull_back_forward, _pull_back_backward)


def _forward(kernels: Kernels, interpret, queries, keys, values):
  heads = queries.shape[2]
  out, log_sum = kernels.forward(*map(heads_first, (queries, keys, values)), interpret)
  return heads_last(out, heads), log_sum.reshape(-1, heads, log_sum.shape[1])


def _backward(kernels: Kernels, interpret, queries, keys, values, out, log_sum, gradient):
  heads = queries.shape[2]
  delta = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # [B, A, N]
  rows = lambda x: x.reshape(-1, x.shape[2])
  arrays = *map(heads_first, (queries, keys, values)), rows(log_sum), rows(delta), heads_first(gradient)
  return tuple(heads_last(x, heads) for x in kernels.backward(*arrays, interpret))


def _by_reference(run, reference, queries, keys, values, *rest):
  """`_forward` or `_backward` in XLA operations. L is not needed there and is zero."""
  if run is _forward:
    out = reference(queries, keys, values)
    batch, count, heads, _ = queries.shape
    return out, jnp.zeros((batch, heads, count))
  return jax.vjp(reference, queries, keys, values)[1](rest[-1])


def _by_platform(run, options, *arrays):
  from aurora_jax.ops import l2_flash_gpu, l2_flash_tpu  # they import this module

  kernels: dict[str, Kernels] = {"tpu": l2_flash_tpu, "gpu": l2_flash_gpu}
  with jax.default_matmul_precision(options.precision):
    if options.interpret:
      return run(kernels[options.interpret], True, *arrays)
    return jax.lax.platform_dependent(
      *arrays,
      tpu=functools.partial(run, kernels["tpu"], False),
      cuda=functools.partial(run, kernels["gpu"], False),
      default=functools.partial(_by_reference, run, options.reference),
    )
