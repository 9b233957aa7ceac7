"""One training step of the whole system at a toy size: what moves, what does not, and that nothing depends on chance."""

import dataclasses
import functools
import pathlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax import config_files
from aurora_jax.models import clip as clip_lib
from aurora_jax.models.clip import ClipConfig, ImageConfig, TextConfig
from aurora_jax.ops import losses
from aurora_jax.parallel import mesh
from aurora_jax.systems.aurora import critic, discriminator
from aurora_jax.training import ahead, guard
from aurora_jax.training import placed as placed_lib
from aurora_jax.training import state as state_lib
from aurora_jax.training import step as step_lib

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "aurora_64.py"


@pytest.fixture(scope="module")
def system():
  """Programs compiled as `train` does, frozen CLIP, first state and a batch. What a program is given stays usable."""
  experiment = config_files.load([f"--config={CONFIG}:test"])
  clip = clip_lib.Clip(_clip_config())
  keys = jax.random.split(jax.random.key(1), 3)
  tokens = jnp.array([[48, 3 + i, 5, 49, 0, 0, 0, 0] for i in range(4)])
  image = jax.random.uniform(keys[0], (4, 16, 16, 3), minval=-1)
  variables = clip.init(keys[1], tokens, image)
  layout = mesh.build(experiment, jax.devices()[:1])
  placed = placed_lib.place(experiment, clip, layout)
  frozen = jax.device_put(step_lib.Frozen(variables, jnp.zeros((0, 16)), jnp.zeros(0, jnp.int32)), layout.replicated)
  batch = jax.device_put({"image": image, "tokens": tokens, "caption_id": jnp.arange(4)}, layout.batch)
  programs = ahead.start(placed, ahead.programs(experiment), frozen, batch)()
  shardings = jax.tree.map(lambda leaf: leaf.sharding, placed.abstract_state)
  first = jax.jit(programs.init, out_shardings=shardings)(jax.random.key(0))
  kept = lambda run: lambda state, *rest, **how: run(jax.tree.map(jnp.copy, state), *rest, **how)
  return types.SimpleNamespace(
    experiment=experiment,
    layout=layout,
    frozen=frozen,
    batch=batch,
    first=first,
    programs=programs,
    step=kept(functools.partial(step_lib.run_step, programs)),
    r1_step=kept(programs.r1_step),
  )


@pytest.mark.parametrize(
  "name,group",
  [
    ("r32_block0/conv1/weight", "r32_conv"),
    ("r8_attention1/norm1/scale", "r8_attention"),
    ("r32_from_rgb/bias", "r32_rgb"),
    ("r8_unconditional/weight", "r8_heads"),
    ("synthesis/r8_block0_conv/conv1/weight", "r8_conv"),
    ("synthesis/r8_block1_attention/in/weight", "r8_attention"),
    ("mapping_0/weight", "mapping"),
    ("last/bias", "last"),
  ],
)
def test_arrays_are_logged_by_kind_and_resolution(name, group):
  assert guard.group_of(name) == group


def moved(before, after):
  """Names of leaves that changed."""
  flat = jax.tree_util.tree_flatten_with_path(before)[0]
  return {jax.tree_util.keystr(path) for (path, a), b in zip(flat, jax.tree.leaves(after)) if not np.array_equal(a, b)}


def test_a_step_moves_both_networks_and_all_metrics_are_finite(system):
  state, metrics = system.step(system.first, system.frozen, system.batch)
  assert int(state.step) == 1
  metrics = guard.by_module(jax.device_get(metrics))
  assert all(np.isfinite(value) for value in metrics.values())
  for name in ("loss/d_adversarial", "loss/d_matching", "loss/g_adversarial", "loss/g_clip", "loss/moe"):
    assert name in metrics
  loads = [float(value) for name, value in metrics.items() if name.startswith("moe/load/")]
  assert len(loads) == 4 and sum(loads) == pytest.approx(1.0, rel=1e-5)
  generator = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(system.first.generator)[0]}
  still = generator - moved(system.first.generator, state.generator)
  # Zero-initialised output layers hold back the gradient of what lies behind them in the first step.
  behind = ("attention", "text_head", "mtm", "affine", "mapping")
  assert all(any(word in name for word in behind) for name in still), still
  assert "['synthesis']['r16_block0_conv']['conv1']['weight']" not in still
  assert len(moved(system.first.discriminator, state.discriminator)) > 40


def test_norms_of_modules_make_up_the_whole(system):
  state, metrics = system.step(system.first, system.frozen, system.batch, measure=True)
  metrics = guard.by_module(jax.device_get(metrics))
  for kind in ("grad_norm/g", "grad_norm/d", "update_norm/g", "update_norm/d"):
    parts = [value for name, value in metrics.items() if name.startswith(f"{kind}/")]
    assert 5 < len(parts) < 15 and np.linalg.norm(parts) == pytest.approx(metrics[kind], rel=1e-5)
  # One array by hand.
  moves = [
    np.linalg.norm(state.generator[name][key] - system.first.generator[name][key])
    for name in ("mapping_0", "mapping_1")
    for key in system.first.generator[name]
  ]
  assert metrics["update_norm/g/mapping"] == pytest.approx(np.linalg.norm(moves), rel=1e-5)


def poisoned(tree, words, value=np.nan):
  """The tree with one value in every leaf whose path holds all the words; at least one has them."""
  hits = []

  def one(path, leaf):
    if not all(word in jax.tree_util.keystr(path) for word in words):
      return leaf
    hits.append(path)
    return leaf.at[(0,) * leaf.ndim].set(value)

  tree = jax.tree_util.tree_map_with_path(one, tree)
  assert hits
  return tree


def skipped(system, *, batch=None, frozen=None, state=None, but=()):
  """Runs a step that must be skipped: nothing but the step's number, and the fields named in `but`, moves. Returns the
  diagnosis."""
  before = system.first if state is None else state
  after, metrics = system.step(before, frozen or system.frozen, batch or system.batch)
  metrics = jax.device_get(metrics)
  assert metrics[guard.SKIPPED] == 1.0 and int(after.step) == 1
  for field in dataclasses.fields(before):
    old, new = jax.tree.leaves(getattr(before, field.name)), jax.tree.leaves(getattr(after, field.name))
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(old, new, strict=True))
    assert same == (field.name not in ("step", *but)), field.name
  averaged, skip = guard.Skips(3).look(0, metrics)
  assert averaged == {guard.SKIPPED: 1.0}
  return skip


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_bad_picture_is_skipped_and_the_discriminator_named(system, value):
  image = system.batch["image"].at[2, 3, 4, 1].set(value)
  skip = skipped(system, batch=system.batch | {"image": image})
  assert skip.networks == ("d",) and "loss/g_adversarial" not in skip.losses
  assert "r16_from_rgb" in skip.modules["d"]
  assert ("the batch's pictures are not finite" in skip.words) == (not np.isfinite(value))
  assert "discriminator: " in skip.words and "generator" not in skip.words and "\n" not in skip.words


def test_a_bad_loss_of_the_generator_leaves_the_discriminators_update(system):
  """The image tower of the CLIP is in the generator's loss only; the discriminator by itself was well."""
  frozen = system.frozen._replace(clip=poisoned(system.frozen.clip, ["image", "patch"]))
  skip = skipped(system, frozen=frozen, but=("discriminator", "discriminator_opt"))
  assert skip.networks == ("g",) and list(skip.losses) == ["loss/g_clip"]
  assert {"mapping_0", "r8_block0_attention"} <= set(skip.modules["g"])
  assert skip.words.startswith("generator: loss/g_clip is nan, gradient not finite in ")


def test_a_bad_parameter_is_found_in_what_it_makes(system):
  skip = skipped(system, state=system.first.replace(generator=poisoned(system.first.generator, ["r16_rgb", "bias"])))
  assert skip.words.startswith("the generator's pictures are not finite; generator: ")
  assert set(skip.networks) == {"g", "d"}


def test_r1_is_skipped_by_itself(system):
  image = system.batch["image"].at[0, 0, 0, 0].set(np.nan)
  state, metrics = system.r1_step(system.first, system.frozen, system.batch | {"image": image})
  metrics = jax.device_get(metrics)
  assert not moved(system.first, state)
  averaged, skip = guard.Skips(3).look(0, metrics | {"loss/g_clip": 1.0, guard.SKIPPED: 0.0})
  assert averaged == {"loss/g_clip": 1.0, guard.SKIPPED: 1.0}
  assert skip.networks == ("r1",) and skip.losses == {"loss/r1": "nan"} and "R1 of the discriminator: " in skip.words


def test_everything_moves_after_a_few_steps(system):
  state = system.first
  for _ in range(3):
    state, _ = system.step(state, system.frozen, system.batch)
  generator = jax.tree_util.tree_flatten_with_path(system.first.generator)[0]
  still = {jax.tree_util.keystr(path) for path, _ in generator} - moved(system.first.generator, state.generator)
  assert not still, still


def test_averages_follow_their_formulas(system):
  state, _ = system.step(system.first, system.frozen, system.batch)
  optimizer = system.experiment.optimizer
  decay = state_lib.ema_decay(optimizer, jnp.int32(0), system.experiment.train.batch_size)
  expected = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), system.first.ema, state.generator)
  for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
  assert np.abs(state.buffers["w_avg"]).max() > 0
  np.testing.assert_array_equal(
    state.buffers["synthesis"]["input"]["freqs"], system.first.buffers["synthesis"]["input"]["freqs"]
  )


def test_the_gradient_of_several_levels_by_clip(system):
  """What CLIP adds to the images' gradient, level by level in one loop, is that of the mean loss over the levels."""
  clip, levels, weight = clip_lib.Clip(_clip_config()), (8, 16), 0.7
  pyramid = {r: jax.random.normal(jax.random.key(r), (4, r, r, 3)) for r in (4, *levels)}
  text = clip.apply(system.frozen.clip, system.batch["tokens"], method="encode_text")

  def cotangent(clip_weight):
    loss = dataclasses.replace(
      system.experiment.loss, clip_weight=clip_weight, clip_min_resolution=8, clip_augment=False, clip_bank=0
    )
    programs = step_lib.build(dataclasses.replace(system.experiment, loss=loss), clip)
    return jax.jit(programs.judge)(
      system.first.discriminator, system.first.step, system.frozen, pyramid, text, system.batch["caption_id"], True
    )[0]

  def mean_loss(images):
    scale = system.experiment.loss.clip_logit_scale or clip.apply(system.frozen.clip, method="logit_scale")
    return sum(
      losses.contrastive_loss(clip.apply(system.frozen.clip, images[r], method="encode_image"), text.embedding, scale)[
        0
      ]
      for r in levels
    ) / len(levels)

  expected = jax.jit(jax.grad(mean_loss))({r: pyramid[r] for r in levels})
  without = cotangent(0.0)
  found = jax.tree.map(jnp.subtract, cotangent(weight), without)
  assert np.abs(found[4]).max() < 1e-6 * np.abs(without[4]).max()  # nothing but the rounding of two programs
  for r in levels:
    np.testing.assert_allclose(found[r], weight * expected[r], atol=1e-5 * weight * np.abs(expected[r]).max())


def test_r1_moves_the_discriminator_only(system):
  state, metrics = system.r1_step(system.first, system.frozen, system.batch)
  assert np.isfinite(metrics["loss/r1"]) and metrics["loss/r1"] > 0
  assert moved(system.first.discriminator, state.discriminator)
  assert not moved(
    (system.first.generator, system.first.ema, system.first.buffers, system.first.step),
    (state.generator, state.ema, state.buffers, state.step),
  )


def test_lazy_r1_shrinks_rate_and_decay_of_the_discriminator(system):
  """StyleGAN2, appendix B: by interval / (interval + 1), here 2 / 3. Adam's first step is the rate, whatever the gradient."""
  state, metrics = system.step(system.first, system.frozen, system.batch)
  optimizer, lazy = system.experiment.optimizer, 2 / 3
  for network, decay, rate in (
    ("discriminator", optimizer.beta2**lazy, optimizer.discriminator_lr * lazy),
    ("generator", optimizer.beta2, optimizer.generator_lr),
  ):
    nu = jax.tree.leaves(getattr(state, f"{network}_opt")[0].nu)
    squares = sum(float(jnp.sum(leaf)) for leaf in nu) / (1 - decay)  # of the gradients, if this is their decay
    assert squares == pytest.approx(float(metrics[f"grad_norm/{network[0]}"]) ** 2, rel=1e-4)
    name = {"discriminator": "r16_from_rgb", "generator": "r16_rgb"}[network]
    tree = lambda values: {"discriminator": values.discriminator, "generator": values.generator["synthesis"]}[network][
      name
    ]
    moved = np.abs(np.asarray(tree(state)["weight"]) - np.asarray(tree(system.first)["weight"])).max()
    assert moved == pytest.approx(rate, rel=1e-3)
  after, _ = system.r1_step(state, system.frozen, system.batch)
  assert int(after.discriminator_opt[0].count) == 2 and int(after.generator_opt[0].count) == 1


def test_the_step_asks_a_critic_for_nothing_but_its_three_methods(system, monkeypatch):
  """Another critic, on features of fixed random projections, takes the discriminator's place; traced, not compiled."""
  monkeypatch.setattr(step_lib.discriminator_lib, "Discriminator", lambda cfg: ProjectedCritic())
  assert isinstance(ProjectedCritic(), critic.Critic) and isinstance(discriminator.Discriminator(None), critic.Critic)
  programs = step_lib.build(system.experiment, clip_lib.Clip(_clip_config()))
  state = jax.eval_shape(programs.init, jax.random.key(0))
  assert set(state.discriminator) == {"head", "text"}
  after, metrics = jax.eval_shape(functools.partial(step_lib.run_step, programs), state, system.frozen, system.batch)
  assert jax.tree.structure(after) == jax.tree.structure(state) and metrics["loss/d_matching"].shape == ()
  after, _ = jax.eval_shape(programs.r1_step, state, system.frozen, system.batch)
  assert jax.tree.structure(after) == jax.tree.structure(state)


class ProjectedCritic(nn.Module):
  """One judgement of the highest level from 8 fixed projections."""

  def setup(self):
    self.head, self.text = nn.Dense(1), nn.Dense(8)

  def features(self, pyramid, kinds=1, caption_id=None):
    del kinds
    assert self.is_initializing() or caption_id.shape == (4,)
    image = pyramid[16].reshape(len(pyramid[16]), -1)
    return [image @ jax.random.normal(jax.random.key(0), (image.shape[1], 8))]

  def encode_text(self, text, eot):
    return self.text(jnp.take_along_axis(text, eot[:, None, None], axis=1)[:, 0])

  def judge(self, features, text):
    return [
      discriminator.Logit((self.head(x) + jnp.sum(x * text, -1, keepdims=True))[..., None], level=16, exit=1)
      for x in features
    ]

  def __call__(self, pyramid, text, eot):
    return self.judge(self.features(pyramid), self.encode_text(text, eot))


def test_the_same_step_is_the_same_bit_by_bit_and_the_next_one_draws_anew(system):
  one, first = system.step(system.first, system.frozen, system.batch)
  two, _ = system.step(system.first, system.frozen, system.batch)
  assert not moved(one, two)
  _, later = system.step(system.first.replace(step=system.first.step + 1), system.frozen, system.batch)
  assert first["d/logit_fake"] != later["d/logit_fake"] or first["loss/g_clip"] != later["loss/g_clip"]


def test_generator_descends_on_its_own_loss(system):
  """Many steps of the generator against a discriminator that stays as it is lower its adversarial and its CLIP loss."""
  programs, batch, state, losses = system.programs, system.batch, jax.tree.map(jnp.copy, system.first), []
  healthy = jax.device_put(True, system.layout.replicated)
  for _ in range(40):
    made = programs.generate(state.generator, state.buffers, state.step, system.frozen.clip, batch["tokens"])
    cotangent, _, metrics = programs.judge(
      state.discriminator, state.step, system.frozen, made.pyramid, made.text, batch["caption_id"], healthy
    )
    generator, opt, ema, buffers, step, _ = programs.learn(
      state.generator,
      state.generator_opt,
      state.ema,
      state.buffers,
      state.step,
      cotangent,
      made.w_mean,
      made.moe_loss,
      made.residuals,
      healthy,
    )
    state = state.replace(generator=generator, generator_opt=opt, ema=ema, buffers=buffers, step=step)
    losses.append([float(metrics["loss/g_adversarial"]), float(metrics["loss/g_clip"])])
  assert (np.mean(losses[-8:], axis=0) < np.mean(losses[:8], axis=0)).all(), losses


def _clip_config():
  tower = dict(width=32, layers=1, heads=2, mlp_width=64)
  return ClipConfig(
    text=TextConfig(vocabulary_size=50, context_length=8, eot_id=49, **tower),
    image=ImageConfig(size=16, patch=8, **tower),
    embedding_width=16,
  )
