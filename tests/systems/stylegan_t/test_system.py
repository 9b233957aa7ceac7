"""The parts of the system that need no training: micro-batches, what trains, noise of samples, stages."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax.config import Schedule, Train
from aurora_jax.errors import UserError
from aurora_jax.parallel import mesh as mesh_lib
from aurora_jax.systems.stylegan_t import config, generator, labels, objective, synthesis, system

SMALL = config.Generator(
  resolution=16, z_dim=6, text_dim=128, channels_base=128, channels_max=12, residual_blocks=1, norm_groups=2
)


def experiment(batch=16, **changes):
  fields = dict(
    generator=SMALL,
    discriminator=config.Discriminator(text_dim=128),
    micro_batch=config.MicroBatch(size=2, count=2),
    train=Train(batch_size=batch, total_steps=4),
  )
  return config.Experiment(**fields | changes)


def objective_of(**changes):
  return objective.Objective(system.System(experiment(**changes)), None)


def test_a_micro_batch_has_its_size_from_every_run_of_the_batch():
  rows = np.arange(16)[:, None]
  cut = objective_of()._cut(jnp.asarray(rows))
  assert cut[..., 0].tolist() == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
  whole = objective_of(micro_batch=config.MicroBatch(size=4))._cut(jnp.asarray(rows))
  assert whole[..., 0].tolist() == [list(range(16))]


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 3.0), ("mean", 1 / 3)])
def test_the_gradient_that_the_optimizer_gets(reduction, factor):
  micro = config.MicroBatch(size=2, count=3, reduction=reduction)
  summed = {"a": jnp.asarray([1.0, np.nan, np.inf, -np.inf])}
  reduced = objective_of(batch=12, micro_batch=micro)._reduce(summed)["a"]
  np.testing.assert_allclose(reduced, [factor, 0, 1e5, -1e5])
  raw = objective_of(batch=12, micro_batch=micro, loss=config.Loss(clean_gradients=False))._reduce(summed)["a"]
  assert np.isnan(raw[1]) and np.isinf(raw[2])
  assert objective_of(batch=12, micro_batch=micro)._divisor == (2 if reduction == "sum" else 1)


@pytest.mark.parametrize(("size", "virtual", "groups"), [(8, 8, 8), (4, 8, 4), (12, 8, 6), (16, 8, 8)])
def test_statistics_stay_within_a_micro_batch(size, virtual, groups):
  """12 samples are two groups of 6; of two micro-batches of 12 at once, four."""
  discriminator = config.Discriminator(text_dim=128, virtual_batch=virtual)
  wanted = experiment(batch=2 * size, discriminator=discriminator, micro_batch=config.MicroBatch(size=size))
  assert system.System(wanted).discriminator.cfg.virtual_batch == groups


def test_a_mesh_must_divide_a_micro_step():
  layout = mesh_lib.build(dataclasses.replace(experiment().mesh, data=16), 16, {}, 16)
  with pytest.raises(UserError, match="in 2 micro-batches .* are 8 images at once, no multiple of the 16 devices"):
    system.System(experiment(), layout)


def trained_parts(mode, cfg):
  """{"b64/conv0", ...} of the generator's parameters that train, and of those that do not."""
  params = generator.abstract_variables(cfg)["params"]
  parts = lambda tree: {labels.label(path).module for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]}
  return tuple(parts(tree) for tree in labels.split(params, lambda path: labels.trains(mode, path)))


@pytest.mark.slow
def test_what_trains_in_each_mode():
  tower = config.TextTower(layers=1, width=8, heads=2, mlp_width=8, vocabulary_size=9, context_length=4)
  cfg = dataclasses.replace(SMALL, resolution=128, channels_base=1536, text_tower=tower)
  trained, fixed = trained_parts("all", cfg)
  assert fixed == {"text_tower"} and {"mapping", "b8/input", "b64/convs1_1", "b128/torgb"} <= trained
  trained, fixed = trained_parts("freeze64", cfg)
  assert trained == {f"b{r}/torgb" for r in (8, 16, 32, 64, 128)} | {"b128/conv0", "b128/convs1_0", "b128/convs1_1"}
  assert {"mapping", "b64/conv0", "text_tower"} <= fixed
  trained, fixed = trained_parts("text_encoder", cfg)
  assert trained == {"text_tower"} and "b128/torgb" in fixed
  tree = {"a": 1, "b": {"c": 2}}
  assert labels.join(*labels.split(tree, lambda path: path[0].key == "a")) == tree


def test_labels_of_parameters_and_buffers():
  keys = lambda *names: tuple(jax.tree_util.DictKey(name) for name in names)
  conv = labels.label(keys("synthesis", "b64", "conv0", "affine", "weight"))
  assert (conv.stage, conv.matrix, conv.bias, conv.module, conv.group) == (64, True, False, "b64/conv0", "b64_conv")
  assert labels.label(keys("buffers", "synthesis", "b32", "conv0", "noise_const")).stage == 32
  assert labels.label(keys("synthesis", "b8", "torgb", "bias")) == labels.ParamLabel(
    bias=True, module="b8/torgb", group="b8_torgb"
  )
  head = labels.label(keys("heads", "conv_mix", "weight"))
  assert not head.matrix and head.module == "heads/conv_mix" and head.stage == 0


@pytest.mark.slow
def test_random_noise_of_a_sample_depends_on_its_latents_alone():
  cfg = dataclasses.replace(SMALL, noise_at_eval="random")
  wanted = system.System(experiment(generator=cfg))
  latents = jax.vmap(wanted.draw_latents)(jax.random.split(jax.random.key(0), 4))
  assert latents["z"].shape == (4, 6) and latents["noise"].shape == (4, 2)
  noise = jax.jit(system._noise_of, static_argnums=1)(latents["noise"], cfg)
  assert {name: value.shape for name, value in noise.items()} == {
    name: (4, size, size, 1) for name, size in synthesis.noise_sizes(cfg).items()
  }
  one = jax.jit(system._noise_of, static_argnums=1)(latents["noise"][2:3], cfg)
  for name, value in noise.items():
    np.testing.assert_array_equal(value[2:3], one[name])
    assert np.std(value) == pytest.approx(1, rel=0.2) and not np.allclose(value[0], value[1]), name
  assert set(system.System(experiment()).draw_latents(jax.random.key(0))) == {"z"}


def test_stages_end_the_generator_and_the_window_of_clip():
  growing = experiment(
    loss=config.Loss(clip_weight=0.2, clip_crop=16),
    schedule=Schedule(resolutions=(8, 16), max_images=types.MappingProxyType({8: 100})),
  )
  growing.check_whole()
  stage = growing.at_stage(8)
  assert (stage.generator.resolution, stage.loss.clip_crop, stage.resolution) == (8, 8, 8)
  assert growing.at_stage(16) == growing
  with pytest.raises(UserError, match="mode 'freeze64' does not grow in stages"):
    dataclasses.replace(
      growing, mode="freeze64", train=dataclasses.replace(growing.train, init_from="runs/x")
    ).check_whole()


def test_identity_lets_a_model_grow_and_run_otherwise():
  now = experiment()
  larger = dataclasses.replace(
    now,
    generator=dataclasses.replace(
      SMALL, resolution=64, compute_dtype="bfloat16", noise_at_eval="random", norm_groups=1
    ),
  )
  before, after = now.identity("generator"), larger.identity("generator")
  assert {name for name in after if before[name] != after[name]} == {"norm_groups"}
