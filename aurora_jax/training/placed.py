"""The training programs on a mesh: `training/step.py` jitted, with every argument and result in its place.

`train` runs them; whatever compiles "the training step" for another machine takes them from here too.
"""

import functools
from collections.abc import Callable
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
    init: key -> TrainState, pure and not jitted: `initial.first_state` compiles what it needs of it.
    step, r1_step: (state, frozen, batch) -> (state, metrics), as of `step.Programs`; the state given is donated. Frozen
      and metrics are whole on every device, the batch's entries lie along `layout.batch`.
  """

  layout: mesh_lib.Layout
  exchange: experts_lib.Exchange
  abstract_state: Any
  init: Callable
  step: Callable
  r1_step: Callable

  @property
  def expert_ffn(self):
    """What a `Generator` that runs on this mesh is given to evaluate its experts."""
    return self.exchange if self.layout.devices > 1 else moe.expert_ffn


def place(experiment: config_lib.Experiment, clip: clip_lib.Clip, layout: mesh_lib.Layout,
          resolution: int | None = None) -> Placed:
  """The programs of an experiment on a mesh. Nothing is compiled or allocated yet.

  Args:
    experiment: the whole one.
    clip: the CLIP module.
    layout: the mesh.
    resolution: of the stage whose steps are wanted; None: the last, or there are no stages.
  """
  exchange = experts_lib.of_experiment(experiment, layout)
  placed = Placed(layout, exchange, None, None, None, None)
  programs = step_lib.build(experiment, clip, placed.expert_ffn, layout.gather)
  if resolution is not None:  # the state is the whole experiment's at every stage
    at_stage = step_lib.build(config_lib.at_stage(experiment, resolution), clip, placed.expert_ffn, layout.gather)
    programs = at_stage._replace(init=programs.init)
  abstract_state = layout.abstract(jax.eval_shape(programs.init, jax.random.key(0)))
  state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
  on_cpu = layout.mesh.devices.flat[0].platform == "cpu"  # the mesh may be that of another machine
  jit = functools.partial(jax.jit, in_shardings=(state, layout.replicated, layout.batch),
                          out_shardings=(state, layout.replicated), donate_argnums=0,
                          compiler_options=compiling.options() if on_cpu else None)
  return placed._replace(abstract_state=abstract_state, init=programs.init, step=jit(programs.step),
                         r1_step=jit(programs.r1_step))
