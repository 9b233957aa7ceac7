"""One training step of Aurora at a toy size: what moves, what does not, and that nothing depends on chance."""

import dataclasses
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn_on_host import drawn_on_host

from aurora_jax import config_files
from aurora_jax.models import clip as clip_lib
from aurora_jax.models.clip import ClipConfig, ImageConfig, TextConfig
from aurora_jax.ops import losses, random_keys
from aurora_jax.systems.aurora.objective import Objective
from aurora_jax.systems.aurora.system import System
from aurora_jax.training import guard, optimizers
from aurora_jax.training import step as step_lib

pytestmark = pytest.mark.slow

CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "aurora_64.py"
MAIN, R1 = "networks", "r1"
# Two levels in place of three; convolutions of both kinds.
SMALL = (
  "generator.resolution=8",
  "generator.output_resolutions=(4, 8)",
  "generator.deformable_max_resolution=4",
  "discriminator.resolution=8",
  "discriminator.input_resolutions=(8, 4)",
  "discriminator.exit_resolutions=(4, 1)",
  "loss.clip_min_resolution=8",
)


@pytest.fixture(scope="module")
def tiny():
  """Compiled phases as `train` has them, frozen CLIP, first state and a batch."""
  experiment = config_files.load([f"--config={CONFIG}:test", *(f"--config.{flag}" for flag in SMALL)])
  system = with_clip(System(experiment))
  keys = jax.random.split(jax.random.key(1), 3)
  tokens = jnp.array([[48, 3 + i, 5, 49, 0, 0, 0, 0] for i in range(4)])
  image = jax.random.uniform(keys[0], (4, 8, 8, 3), minval=-1)
  layout = system.layout
  frozen = {"clip": jax.jit(system.clip.init)(keys[1], tokens, image)}
  frozen |= {"bank": jnp.zeros((0, 16)), "bank_id": jnp.zeros(0, jnp.int32)}
  frozen = jax.device_put(frozen, layout.replicated)
  batch = jax.device_put({"image": image, "tokens": tokens, "caption_id": jnp.arange(4)}, layout.batch)
  step = step_lib.build(system)
  executables = {
    program.name: step.trace(index, frozen).lower().compile() for index, program in enumerate(step.programs)
  }
  constants, first_repeat = step_lib.constants(system), jax.device_put(jnp.int32(0), layout.replicated)

  def run(phase):
    return lambda state, frozen, batch: executables[phase](state, frozen, batch, constants, first_repeat)

  shardings = jax.tree.map(lambda leaf: leaf.sharding, step.state)
  with drawn_on_host():
    first = jax.jit(optimizers.init_state(system), out_shardings=shardings)(jax.random.key(0))
  return types.SimpleNamespace(
    experiment=experiment,
    system=system,
    frozen=frozen,
    batch=batch,
    first=first,
    main=run(MAIN),
    r1=run(R1),
    whole=step_lib.CompiledStep(step, frozen, list(executables.values())),
  )


def with_clip(system):
  """The system with a CLIP smaller than any that has a folder."""
  system.clip = clip_lib.Clip(_clip_config())
  return system


def params(state, network):
  return state.networks[network].params


def moved(before, after):
  """Names of leaves that changed."""
  flat = jax.tree_util.tree_flatten_with_path(before)[0]
  return {jax.tree_util.keystr(path) for (path, a), b in zip(flat, jax.tree.leaves(after)) if not np.array_equal(a, b)}


def names(tree):
  return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_a_step_runs_the_phases_that_are_due(tiny):
  """R1 every second step here; the number says which step it is."""
  state, phases = tiny.whole(0, tiny.first, [tiny.batch])
  assert list(phases) == [MAIN, R1] and int(state.step) == 1
  state, phases = tiny.whole(1, state, [tiny.batch])
  assert list(phases) == [MAIN] and int(state.step) == 2


def test_a_step_moves_both_networks_and_all_metrics_are_finite(tiny):
  state, metrics = tiny.main(tiny.first, tiny.frozen, tiny.batch)
  assert int(state.step) == int(tiny.first.step)  # a phase is no step
  metrics = guard.by_group(jax.device_get(metrics))
  for name in ("loss/d_adversarial", "loss/d_matching", "loss/g_adversarial", "loss/g_clip", "loss/moe"):
    assert name in metrics
  (load,) = (metrics[name] for name in metrics if name.startswith("moe/load/"))
  assert load.shape == (4,) and load.sum() == pytest.approx(1.0, rel=1e-5)
  assert all(np.isfinite(value).all() for value in metrics.values())
  before, after = params(tiny.first, "generator"), params(state, "generator")
  still = names(before) - moved(before, after)
  # Zero-initialized output layers hold back the gradient of what lies behind them in the first step.
  behind = ("attention", "text_head", "mtm", "affine", "mapping")
  assert all(any(word in name for word in behind) for name in still), still
  assert "['synthesis']['r8_block0_conv']['conv1']['weight']" not in still
  assert len(moved(params(tiny.first, "discriminator"), params(state, "discriminator"))) > 40


def test_norms_of_modules_make_up_the_whole(tiny):
  state, metrics = tiny.main(tiny.first, tiny.frozen, tiny.batch)
  metrics = guard.by_group(jax.device_get(metrics))
  for kind in ("grad_norm/g", "grad_norm/d", "update_norm/g", "update_norm/d"):
    parts = [value for name, value in metrics.items() if name.startswith(f"{kind}/")]
    assert 5 < len(parts) < 15 and np.linalg.norm(parts) == pytest.approx(metrics[kind], rel=1e-5)
  # One group by hand; of a larger weight, the parameters would round the move.
  before, after = (params(values, "generator")["synthesis"]["r8_rgb"] for values in (tiny.first, state))
  moves = [np.linalg.norm(a - b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after))]
  assert metrics["update_norm/g/r8_rgb"] == pytest.approx(np.linalg.norm(moves), rel=1e-5)


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


def skipped(tiny, *, batch=None, frozen=None, state=None, but=()):
  """Runs a step that must be skipped: nothing moves but the step's number and the networks named in `but`, of which
  everything does. Returns the diagnosis."""
  before = tiny.first if state is None else state
  after, metrics = tiny.main(before, frozen or tiny.frozen, batch or tiny.batch)
  for name, network in before.networks.items():
    for part in ("params", "variables", "opt_state", "ema"):
      old, new = (jax.tree.leaves(getattr(network, part)) for network in (network, after.networks[name]))
      same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(old, new, strict=True))
      assert same == (name not in but or not old), f"{name} {part}"
  averaged, skip = guard.Skips(3, tiny.system.log_names).look(0, {MAIN: metrics}, detail=True)
  assert averaged == {guard.SKIPPED: 1.0}
  return skip


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_bad_picture_is_skipped_and_the_discriminator_named(tiny, value):
  image = tiny.batch["image"].at[2, 3, 4, 1].set(value)
  skip = skipped(tiny, batch=tiny.batch | {"image": image})
  assert skip.updates == ("d",) and "loss/g_adversarial" not in skip.losses
  assert "r8_from_rgb" in skip.modules["d"]
  assert ("the batch's images are not finite" in skip.message) == (not np.isfinite(value))
  assert "discriminator: " in skip.message and "generator" not in skip.message and "\n" not in skip.message


def test_a_bad_loss_of_the_generator_leaves_the_discriminators_update(tiny):
  """The image tower of the CLIP is in the generator's loss only; the discriminator by itself was well."""
  frozen = tiny.frozen | {"clip": poisoned(tiny.frozen["clip"], ["image", "patch"])}
  skip = skipped(tiny, frozen=frozen, but=("discriminator",))
  assert skip.updates == ("g",) and list(skip.losses) == ["loss/g_clip"]
  assert {"mapping_0", "r8_block0_attention"} <= set(skip.modules["g"])
  assert skip.message.startswith("generator: loss/g_clip is nan, gradient not finite in ")


def test_a_bad_parameter_is_found_in_what_it_makes(tiny):
  network = tiny.first.networks["generator"]
  bad = network.replace(params=poisoned(network.params, ["r8_rgb", "bias"]))
  skip = skipped(tiny, state=tiny.first.with_network("generator", bad))
  assert skip.message.startswith("the generator's images are not finite; generator: ")
  assert set(skip.updates) == {"g", "d"}


def test_r1_is_skipped_by_itself(tiny):
  image = tiny.batch["image"].at[0, 0, 0, 0].set(np.nan)
  state, metrics = tiny.r1(tiny.first, tiny.frozen, tiny.batch | {"image": image})
  assert not moved(tiny.first, state)
  main = {"loss/g_clip": jnp.float32(1.0), "guard/skipped/g": jnp.float32(0.0)}
  averaged, skip = guard.Skips(3, tiny.system.log_names).look(0, {MAIN: main, R1: metrics}, detail=False)
  assert averaged == {"loss/g_clip": 1.0, guard.SKIPPED: 1.0}
  assert skip.updates == ("r1",) and skip.losses == {"loss/r1": "nan"} and "R1 of the discriminator: " in skip.message


def test_a_step_that_is_not_skipped_says_so(tiny):
  _, metrics = tiny.main(tiny.first, tiny.frozen, tiny.batch)
  averaged, skip = guard.Skips(3, tiny.system.log_names).look(0, {MAIN: metrics}, detail=False)
  assert skip is None and averaged[guard.SKIPPED] == 0.0 and "loss/g_clip" in averaged


def test_everything_moves_after_a_few_steps(tiny):
  state = tiny.first
  for number in range(3):
    state, _ = tiny.whole(number, state, [tiny.batch])
  assert int(state.step) == 3
  for network in ("generator", "discriminator"):
    before = params(tiny.first, network)
    still = names(before) - moved(before, params(state, network))
    assert not still, still


def test_averages_follow_their_formulas(tiny):
  state, _ = tiny.main(tiny.first, tiny.frozen, tiny.batch)
  first, network, experiment = tiny.first.networks["generator"], state.networks["generator"], tiny.experiment
  decay = optimizers.ema_decay(experiment.ema, jnp.int32(0), experiment.train.batch_size)
  expected = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), first.ema, network.params)
  for ours, theirs in zip(jax.tree.leaves(network.ema), jax.tree.leaves(expected)):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
  # Of w: its mean over this step's latents and captions, from zero.
  buffers, before = network.variables["buffers"], first.variables["buffers"]
  key = random_keys.fold(jax.random.key(experiment.train.seed), f"phase/{MAIN}", 0, 0)
  z = jax.random.normal(random_keys.fold(key, "latents"), (4, experiment.generator.z_dim))

  @jax.jit
  def w_of(variables, clip, z):
    text = tiny.system.clip.apply(clip, tiny.batch["tokens"], method="encode_text")
    apply = lambda *args, method: tiny.system.generator.apply(variables, *args, method=method)
    return apply(z, apply(text.features, text.eot, method="encode_text")[0], method="map_latents")

  w = w_of(tiny.first.variables("generator"), tiny.frozen["clip"], z)
  share = 1 - experiment.generator.w_average_decay
  np.testing.assert_allclose(
    buffers["w_avg"], before["w_avg"] + share * (w.mean(axis=0) - before["w_avg"]), rtol=1e-4, atol=1e-7
  )
  assert np.abs(buffers["w_avg"]).max() > 0
  np.testing.assert_array_equal(buffers["synthesis"]["input"]["freqs"], before["synthesis"]["input"]["freqs"])
  assert state.networks["discriminator"].ema is None


def test_the_gradient_of_several_levels_by_clip(tiny):
  """What CLIP adds to the images' gradient, level by level in one loop, is that of the mean loss over the levels."""
  levels, weight = (8, 16), 0.7
  experiment = config_files.load([f"--config={CONFIG}:test"])
  loss = dataclasses.replace(
    experiment.loss, clip_weight=weight, clip_min_resolution=8, clip_augment=False, clip_bank=0
  )
  system = with_clip(System(dataclasses.replace(experiment, loss=loss)))
  clip, frozen = system.clip, tiny.frozen
  pyramid = {r: jax.random.normal(jax.random.key(r), (4, r, r, 3)) for r in (4, *levels)}
  encode_text = jax.jit(lambda tokens: clip.apply(frozen["clip"], tokens, method="encode_text"))
  text = encode_text(tiny.batch["tokens"])
  objective = Objective(system, optimizers.Updates(system, 1))
  guidance = jax.jit(objective._clip_guidance)
  found, metrics = guidance(frozen, jax.random.key(0), pyramid, text, tiny.batch["caption_id"])

  def mean_loss(images):
    scale = loss.clip_logit_scale or clip.apply(frozen["clip"], method="logit_scale")
    of_level = lambda r: losses.contrastive_loss(
      clip.apply(frozen["clip"], images[r], method="encode_image"), text.embedding, scale
    )[0]
    return sum(of_level(r) for r in levels) / len(levels)

  value, expected = jax.jit(jax.value_and_grad(mean_loss))({r: pyramid[r] for r in levels})
  assert set(found) == set(levels)  # the small one has none
  assert metrics["loss/g_clip"] == pytest.approx(float(value), rel=1e-5)
  for r in levels:
    np.testing.assert_allclose(found[r], weight * expected[r], atol=1e-5 * weight * np.abs(expected[r]).max())


def test_r1_moves_the_discriminator_only(tiny):
  state, metrics = tiny.r1(tiny.first, tiny.frozen, tiny.batch)
  assert np.isfinite(metrics["loss/r1"]) and metrics["loss/r1"] > 0
  before, after = (values.networks["discriminator"] for values in (tiny.first, state))
  assert moved(before.params, after.params) and moved(before.opt_state, after.opt_state)
  assert not moved(tiny.first.networks["generator"], state.networks["generator"])
  assert int(state.step) == int(tiny.first.step)


def test_lazy_r1_shrinks_rate_and_decay_of_the_discriminator(tiny):
  """StyleGAN2, appendix B: by interval / (interval + 1), here 2 / 3. Adam's first step is the rate, whatever the
  gradient.
  """
  state, metrics = tiny.main(tiny.first, tiny.frozen, tiny.batch)
  configured, lazy = tiny.experiment.optimizer, 2 / 3
  for network, decay, rate in (
    ("discriminator", configured.discriminator.beta2**lazy, configured.discriminator.learning_rate * lazy),
    ("generator", configured.generator.beta2, configured.generator.learning_rate),
  ):
    nu = jax.tree.leaves(state.networks[network].opt_state[0].nu)
    squares = sum(float(jnp.sum(leaf)) for leaf in nu) / (1 - decay)  # of the gradients, if this is their decay
    assert squares == pytest.approx(float(metrics[f"grad_norm/{network[0]}"]) ** 2, rel=1e-4)
    tree = lambda state, network=network: {
      "discriminator": lambda params: params["r8_from_rgb"],
      "generator": lambda params: params["synthesis"]["r8_rgb"],
    }[network](params(state, network))
    step = np.abs(np.asarray(tree(state)["weight"]) - np.asarray(tree(tiny.first)["weight"])).max()
    assert step == pytest.approx(rate, rel=1e-3)
    assert metrics[f"learning_rate/{network[0]}"] == pytest.approx(rate, rel=1e-6)
  after, more = tiny.r1(state, tiny.frozen, tiny.batch)
  count = lambda network: int(after.networks[network].opt_state[0].count)
  assert (count("discriminator"), count("generator")) == (2, 1)
  assert more["learning_rate/r1"] == metrics["learning_rate/d"]


def test_the_same_step_is_the_same_bit_by_bit_and_the_next_one_draws_anew(tiny):
  one, first = tiny.main(tiny.first, tiny.frozen, tiny.batch)
  two, _ = tiny.main(tiny.first, tiny.frozen, tiny.batch)
  assert not moved(one, two)
  _, later = tiny.main(tiny.first.replace(step=tiny.first.step + 1), tiny.frozen, tiny.batch)
  assert first["d/logit_fake"] != later["d/logit_fake"] or first["loss/g_clip"] != later["loss/g_clip"]


def test_generator_descends_on_its_own_loss(tiny):
  """Many steps of the generator against a discriminator that begins each step as the first one lower its adversarial
  and its CLIP loss."""
  state, found = tiny.first, []
  for _ in range(40):
    state = state.with_network("discriminator", tiny.first.networks["discriminator"])
    state, metrics = tiny.main(state, tiny.frozen, tiny.batch)
    state = state.replace(step=state.step + 1)
    found.append([float(metrics["loss/g_adversarial"]), float(metrics["loss/g_clip"])])
  assert (np.mean(found[-8:], axis=0) < np.mean(found[:8], axis=0)).all(), found


def _clip_config():
  tower = dict(width=32, layers=1, heads=2, mlp_width=64)
  return ClipConfig(
    text=TextConfig(vocabulary_size=50, context_length=8, eot_id=49, **tower),
    image=ImageConfig(size=16, patch=8, **tower),
    embedding_width=16,
  )
