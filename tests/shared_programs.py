"""Runs of one process that differ in nothing that is compiled share their programs.

Tracing and compiling a small training step takes a minute, the steps themselves a second. A fresh start, a resumed one
and one on corrupt data train with the same programs; the seed and the number of steps are arguments of them
(training/step.py).
"""

import contextlib
import dataclasses
import functools
import json

import jax
import pytest
from drawn_on_host import drawn_on_host

from aurora_jax import config_files
from aurora_jax.evaluation import sampling
from aurora_jax.training import initialize
from aurora_jax.training import step as step_lib

# Fields of `train` that reach a program.
_COMPILED = ("batch_size", "guard")


def _key(system, *more):
  """A string that is equal for systems whose programs are."""
  values = json.loads(config_files.to_json(system.experiment))
  kept = {name: value for name, value in values.items() if name not in ("name", "data", "train", "health")}
  kept["train"] = {name: values["train"][name] for name in _COMPILED}
  mesh = system.layout.mesh
  return json.dumps([kept, str(mesh.shape), str(mesh.devices.tolist()), *more], sort_keys=True, default=str)


def _shapes(tree):
  return str(jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree))


@contextlib.contextmanager
def shared(*, weights_from_host=False):
  """Within it, training steps, samplers and first states are made once per configuration.

  Args:
    weights_from_host: whether first states may be others than those of the command in a process of its own, which take
      longer to compile.
  """
  steps, executables, samplers, states = {}, {}, {}, {}
  build, compile_step, first_state = step_lib.build, step_lib.Step.compile, initialize.first_state
  sampler_of = sampling.Sampler

  def build_once(system, whole=None):
    key = _key(system, _key(whole or system))
    if key not in steps:
      steps[key] = build(system, whole)
    return dataclasses.replace(steps[key], system=system, whole=whole or system)

  def compile_once(step, frozen):
    key = _key(step.system, _key(step.whole), _shapes(frozen))
    if key not in executables:
      waiting = compile_step(step, frozen)
      executables[key] = functools.cache(lambda: waiting()._executables)
    return lambda: step_lib.CompiledStep(step, frozen, executables[key]())

  def sampler_once(system, *args, **options):
    key = _key(system, args, options)
    if key not in samplers:
      samplers[key] = sampler_of(system, *args, **options)
    return samplers[key]

  def first_state_once(system, abstract):
    train = system.experiment.train
    if train.init_from:
      return first_state(system, abstract)
    key = _key(system, train.seed)
    if key not in states:
      with drawn_on_host() if weights_from_host else contextlib.nullcontext():
        states[key] = first_state(system, abstract)
    return states[key]  # on a CPU no program is given its arrays to overwrite

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_lib, "build", build_once)
    patch.setattr(step_lib.Step, "compile", compile_once)
    patch.setattr(sampling, "Sampler", sampler_once)
    patch.setattr(initialize, "first_state", first_state_once)
    yield
