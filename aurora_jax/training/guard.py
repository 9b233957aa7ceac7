"""The numerical guard: a run that has gone to NaN or infinity stops and says where, its last good checkpoint intact."""

import jax
import jax.numpy as jnp
import numpy as np


class NonFinite(Exception):
  """A number that must be finite is not.

  Attributes:
    step: number of the step (the first one is 0) that gave it, or that the state stands before.
    name: of the metric or of the state's entry.
    value: "nan", "inf", "-inf".
  """

  def __init__(self, step, name, value):
    super().__init__(f"{name} is {value} at step {step}")
    self.step, self.name, self.value = step, name, value


def check_metrics(step, metrics):
  """Raises `NonFinite` at the first metric (in order of name) that is not finite. Args: host values of one step."""
  for name in sorted(metrics):
    value = np.asarray(metrics[name], np.float64)
    if not np.isfinite(value).all():
      raise NonFinite(step, name, str(float(value[~np.isfinite(value)].ravel()[0] if value.ndim else value)))


def check_state(step, state):
  """Raises `NonFinite` at the first entry of a state that holds a NaN or an infinity: such a state is not to be saved.

  A step with finite losses may still have written one, which the next step's losses would show.
  """
  entries = [(path, leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
             if jnp.issubdtype(leaf.dtype, jnp.floating)]
  if all(leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu" for _, leaf in entries):
    # On the CPU the arrays are seen without a copy, and nothing needs to be compiled.
    finite = [all(np.isfinite(shard.data).all() for shard in leaf.addressable_shards) for _, leaf in entries]
  else:
    finite = jax.device_get([_all_finite(leaf) for _, leaf in entries])
  for (path, _), good in zip(entries, finite):
    if not good:
      raise NonFinite(step, f"state{jax.tree_util.keystr(path)}", "not finite")


@jax.jit
def _all_finite(leaf):
  return jnp.isfinite(leaf).all()
