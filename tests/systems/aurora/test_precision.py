"""Products whose rounding would matter ask for the highest precision, in the programs that `train` runs."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core

from aurora_jax import config_files
from aurora_jax.models import clip as clip_lib
from aurora_jax.systems.aurora.system import System
from aurora_jax.training import step as step_lib

pytestmark = pytest.mark.slow

CONFIG = pathlib.Path(__file__).parents[3] / "configs" / "aurora_64.py"


@pytest.fixture(scope="module")
def products():
  """{phase: [(named scope, dtype, is at the highest precision)] of all products and convolutions}, backward passes
  too.
  """
  system = System(config_files.load([f"--config={CONFIG}:test", "--config.loss.clip_weight=0.5"]))
  tower = dict(width=32, layers=1, heads=2, mlp_width=64)
  text = clip_lib.TextConfig(vocabulary_size=50, context_length=8, eot_id=49, **tower)
  image = clip_lib.ImageConfig(size=16, patch=8, **tower)
  system.clip = clip_lib.Clip(clip_lib.ClipConfig(text=text, image=image, embedding_width=16))
  step, tokens = step_lib.build(system), jnp.zeros((4, 8), jnp.int32)
  frozen = {"clip": jax.eval_shape(system.clip.init, jax.random.key(0), tokens, jnp.zeros((4, 16, 16, 3)))}
  frozen |= {"bank": jnp.zeros((3, 16)), "bank_id": jnp.zeros(3, jnp.int32)}
  frozen = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=system.layout.replicated), frozen
  )
  return {
    program.name: list(_products(step.trace(index, frozen).jaxpr.jaxpr)) for index, program in enumerate(step.programs)
  }


def _products(jaxpr, outer=""):
  for equation in jaxpr.eqns:
    scope = f"{outer}/{equation.source_info.name_stack}"
    if equation.primitive.name in ("dot_general", "conv_general_dilated"):
      sides = equation.params["precision"]
      sides = sides if isinstance(sides, tuple) else (sides,)
      exact = all(side == jax.lax.Precision.HIGHEST for side in sides)
      yield scope, jnp.result_type(*(operand.aval.dtype for operand in equation.invars)), exact
    for value in equation.params.values():
      for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, core.ClosedJaxpr):
          yield from _products(item.jaxpr, scope)
        elif isinstance(item, core.Jaxpr):
          yield from _products(item, scope)


@pytest.mark.parametrize("scope", ["router", "l2_distance", "input", "input/affine", "contrastive_loss"])
def test_is_at_the_highest_precision(products, scope):
  found = [product for product in products["networks"] if product[0].rstrip(")").endswith(scope)]
  assert len(found) >= 2  # forward and backward
  assert all(dtype == jnp.float32 and exact for _, dtype, exact in found)


def test_r1_is_at_the_highest_precision(products):
  penalty = [product for product in products["r1"] if "r1" in product[0]]
  assert len(penalty) > 20
  assert all(exact for _, _, exact in penalty)


def test_convolutions_and_experts_are_at_the_default_precision(products):
  fast = [scope for scope, _, exact in products["networks"] if not exact]
  assert len(fast) > len(products["networks"]) / 2
  assert any("discriminator" in scope for scope in fast) and any("feed_forward" in scope for scope in fast)
