"""The training programs on a mesh: `training/step.py` jitted, with every argument and result in its place.

`train` runs them; whatever compiles "the training step" for another machine takes them from here too.
"""

from typing import Any, NamedTuple

import jax

from aurora_jax import config as config_lib
from aurora_jax.models import clip as clip_lib
from aurora_jax.ops import moe
from aurora_jax.parallel import experts as experts_lib
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.training import compiling
from aurora_jax.training import step as step_lib


class Placed(NamedTuple):
  """The programs and what they take.

  Attributes:
    layout: the mesh and what lies where.
    exchange: how tokens meet experts on it.
    abstract_state: shapes, dtypes and shardings of the TrainState.
    programs: `step.Programs`, jitted but for `init`: `initial.first_state` compiles what it needs of it. What is updated
      is donated. Frozen and metrics are whole on every device, the batch's entries and the generated images lie along
      `layout.batch`; the residuals lie wherever the compiler of `generate` puts them.
  """

  layout: mesh_lib.Layout
  exchange: experts_lib.Exchange
  abstract_state: Any
  programs: step_lib.Programs

  @property
  def expert_ffn(self):
    """What a `Generator` that runs on this mesh is given to evaluate its experts."""
    return _expert_ffn(self.layout, self.exchange)


def place(
  experiment: config_lib.Experiment, clip: clip_lib.Clip, layout: mesh_lib.Layout, resolution: int | None = None
) -> Placed:
  """The programs of an experiment on a mesh. Nothing is compiled or allocated yet.

  Args:
    experiment: the whole one.
    clip: the CLIP module.
    layout: the mesh.
    resolution: of the stage whose steps are wanted; None: the last, or there are no stages.
  """
  exchange = experts_lib.of_experiment(experiment, layout)
  expert_ffn = _expert_ffn(layout, exchange)
  programs = step_lib.build(experiment, clip, expert_ffn, layout.gather)
  if resolution is not None:  # the state is the whole experiment's at every stage
    at_stage = step_lib.build(config_lib.at_stage(experiment, resolution), clip, expert_ffn, layout.gather)
    programs = at_stage._replace(init=programs.init)
  abstract_state = layout.abstract(jax.eval_shape(programs.init, jax.random.key(0)))
  state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
  whole, batch = layout.replicated, layout.batch
  on_cpu = layout.mesh.devices.flat[0].platform == "cpu"  # the mesh may be that of another machine
  options = compiling.options() if on_cpu else None

  def jit(function, taken, given, donated):
    return jax.jit(function, in_shardings=taken, out_shardings=given, donate_argnums=donated, compiler_options=options)

  discriminator = state.discriminator, state.discriminator_opt
  left = step_lib.Generated(text=batch, pyramid=batch, w_mean=whole, moe_loss=whole, residuals=None, metrics=whole)
  generator = state.generator, state.generator_opt, state.ema, state.buffers, state.step
  networks = state.generator, state.discriminator
  return Placed(
    layout,
    exchange,
    abstract_state,
    programs._replace(
      generate=jit(programs.generate, (state.generator, state.buffers, whole, whole, batch), left, ()),
      discriminate=jit(
        programs.discriminate,
        (*discriminator, whole, batch, batch, batch, batch),
        (*discriminator, whole, whole),
        (0, 1),
      ),
      judge=jit(
        programs.judge, (state.discriminator, whole, whole, batch, batch, batch, whole), (batch, whole, whole), ()
      ),
      learn=jit(programs.learn, (*generator, batch, whole, whole, None, whole), (*generator, whole), (0, 1, 2, 3, 4)),
      snapshot=jit(programs.snapshot, networks, networks, ()),
      moved=jit(programs.moved, (networks, *networks), whole, ()),
      r1_step=jit(programs.r1_step, (state, whole, batch), (state, whole), (0,)),
    ),
  )


def _expert_ffn(layout, exchange):
  return exchange if layout.devices > 1 else moe.expert_ffn
