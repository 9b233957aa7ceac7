"""Compiles the programs of a step before their first use; those that do not wait for one another at the same time.

Only `learn` waits: where the residuals lie that it takes is up to the compiler of `generate`.
"""

import concurrent.futures

import jax
import jax.numpy as jnp

from aurora_jax import config as config_lib
from aurora_jax.models import clip as clip_lib
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.training import placed as placed_lib

GENERATE, DISCRIMINATE, JUDGE, LEARN, R1 = "generate", "discriminate", "judge", "learn", "r1_step"
STEP = (GENERATE, DISCRIMINATE, JUDGE, LEARN)
SNAPSHOT, MOVED = "snapshot", "moved"
INPUTS = ("image", "tokens", "caption_id")  # what they read of a batch


def programs(experiment: config_lib.Experiment) -> dict[str, float]:
  """Names of the programs that a run of the experiment needs, and the share of steps that run them."""
  shares = dict.fromkeys(STEP, 1.0)
  if experiment.loss.r1_gamma:
    shares[R1] = 1 / experiment.loss.r1_interval
  if experiment.train.guard:
    shares |= dict.fromkeys((SNAPSHOT, MOVED), 1 / experiment.train.log_every)
  return shares


def abstract_batch(experiment: config_lib.Experiment, clip: clip_lib.ClipConfig, layout: mesh_lib.Layout):
  """The `INPUTS` of a global batch as shapes, as the loop puts them on the devices."""
  size, side = experiment.train.batch_size, experiment.generator.resolution
  shape = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=layout.batch)
  return {
    "image": shape((size, side, side, 3), jnp.float32),
    "tokens": shape((size, clip.text.context_length), jnp.int32),
    "caption_id": shape((size,), jnp.int32),
  }


def generated(placed: placed_lib.Placed, frozen, batch, generate=None):
  """What `generate` gives, as shapes, and with shardings where it is given compiled.

  The structure of the residuals is that of one trace: traced again, once JAX has forgotten it, they would not fit.
  """
  shapes = placed.programs.generate.eval_shape(*arguments(placed, GENERATE, frozen, batch))
  shaped = lambda leaf, sharding=None: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(shaped, shapes, *(() if generate is None else (generate.output_shardings,)))


def arguments(placed: placed_lib.Placed, name: str, frozen, batch, made=None):
  """What a program is called with, as shapes with shardings.

  Args:
    placed: the programs.
    name: one of them.
    frozen, batch: arrays, or shapes with shardings.
    made: what `generated` gives for the compiled `generate`. Without it the residuals for `learn` have no sharding, which
      will do for tracing.

  Returns:
    tuple.
  """
  state = placed.abstract_state
  if name == GENERATE:
    return state.generator, state.buffers, state.step, frozen.clip, batch["tokens"]
  if name == R1:
    return state, frozen, batch
  networks = state.generator, state.discriminator
  if name == SNAPSHOT:
    return networks
  if name == MOVED:
    return networks, *networks
  made = generated(placed, frozen, batch) if made is None else made
  healthy = jax.ShapeDtypeStruct((), jnp.bool_, sharding=placed.layout.replicated)
  if name == LEARN:
    return (
      state.generator,
      state.generator_opt,
      state.ema,
      state.buffers,
      state.step,
      made.pyramid,
      made.w_mean,
      made.moe_loss,
      made.residuals,
      healthy,
    )
  if name == DISCRIMINATE:
    return (
      state.discriminator,
      state.discriminator_opt,
      state.step,
      made.pyramid,
      made.text,
      batch["image"],
      batch["caption_id"],
    )
  return state.discriminator, state.step, frozen, made.pyramid, made.text, batch["caption_id"], healthy


def trace(placed: placed_lib.Placed, name: str, frozen, batch, made=None) -> jax.stages.Traced:
  """A program, traced. Arguments as of `arguments`."""
  return getattr(placed.programs, name).trace(*arguments(placed, name, frozen, batch, made))


def start(placed: placed_lib.Placed, names, frozen, batch):
  """Begins to compile, in threads.

  Args:
    placed: the programs.
    names: of those to compile.
    frozen, batch: arrays, or shapes with shardings.

  Returns:
    A function that waits and returns the placed `step.Programs`, these compiled, or raises what went wrong.
  """
  pool = concurrent.futures.ThreadPoolExecutor(thread_name_prefix="compile")
  futures = {}

  def compiled(name):
    made = generated(placed, frozen, batch, futures[GENERATE].result()) if name == LEARN else None
    return trace(placed, name, frozen, batch, made).lower().compile()

  for name in names:
    futures[name] = pool.submit(compiled, name)
  pool.shutdown(wait=False)
  return lambda: placed.programs._replace(**{name: future.result() for name, future in futures.items()})
