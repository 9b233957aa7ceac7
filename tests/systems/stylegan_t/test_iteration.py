"""One training iteration of the public code through the system's phases, and the generator's phase of the text
encoder's mode.
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems.stylegan_t import goldens
from systems.stylegan_t.goldens import nhwc, relative

from aurora_jax.config import Ema, Train
from aurora_jax.models import clip
from aurora_jax.systems import base
from aurora_jax.systems.stylegan_t import config, labels, losses, released, system
from aurora_jax.training import optimizers

pytestmark = pytest.mark.slow

BEFORE_BATCH_NORM = ("main.0.0.bias", "main.1.fn.0.bias")


def clip_of(sizes, state_dict, text_params):
  """The golden's CLIP, whose text tower is the generator's."""
  vision = sizes["vision"]
  width = vision["width"]
  cfg = clip.ClipConfig(
    text=clip.TextConfig(width=20, layers=2, heads=2, mlp_width=80, vocabulary_size=40, context_length=10),
    image=clip.ImageConfig(
      width=width,
      layers=vision["layers"],
      heads=width // vision["head_width"],
      mlp_width=4 * width,
      size=vision["image_size"],
      patch=vision["patch_size"],
    ),
    embedding_width=sizes["embed_dim"],
  )
  weights = goldens.starting(state_dict, "visual.")
  norm = lambda name: {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}
  stacked = lambda name: np.stack([weights[f"transformer.resblocks.{i}.{name}"] for i in range(vision["layers"])])
  dense = lambda name, joint=".": {
    "kernel": stacked(f"{name}{joint}weight").transpose(0, 2, 1),
    "bias": stacked(f"{name}{joint}bias"),
  }
  blocks = {
    "qkv": dense("attn.in_proj", "_"),
    "out": dense("attn.out_proj"),
    "up": dense("mlp.c_fc"),
    "down": dense("mlp.c_proj"),
    "attention_norm": {"scale": stacked("ln_1.weight"), "bias": stacked("ln_1.bias")},
    "mlp_norm": {"scale": stacked("ln_2.weight"), "bias": stacked("ln_2.bias")},
  }
  image = {
    "patch_embedding": weights["conv1.weight"].transpose(2, 3, 1, 0),
    "class_embedding": weights["class_embedding"],
    "position_embedding": weights["positional_embedding"],
    "pre_norm": norm("ln_pre"),
    "transformer": {"blocks": blocks},
    "final_norm": norm("ln_post"),
  }
  params = {
    "image": image,
    "image_projection": {"kernel": weights["proj"]},
    "log_scale": state_dict["logit_scale"],
    **text_params,
  }
  return clip.Clip(cfg), {"params": params}


class GoldenSystem(system.System):
  """The system with the golden's latents, and the CLIP that no folder holds."""

  def __init__(self, experiment, clip_module, z):
    super().__init__(experiment)
    self.clip, self.z = clip_module, z

  def training_latents(self, key, count):
    del key
    assert count == len(self.z)
    return jnp.asarray(self.z)


class Recording(optimizers.Updates):
  """Returns the gradients among the metrics."""

  def __call__(self, state, network, gradients, metrics, **options):
    state, finite, metrics = super().__call__(state, network, gradients, metrics, **options)
    return state, finite, metrics | {"gradients": gradients}


def run_phase(experiment, clip_module, z, index, state, frozen, batch):
  """(state, metrics) of one phase, on the host."""
  golden = GoldenSystem(experiment, clip_module, z)
  phase = golden.phases(Recording(golden, experiment.train.total_steps))[index]
  return jax.device_get(jax.jit(phase.run)(state, frozen, batch, jax.random.key(0)))


@pytest.fixture(scope="module")
def replay():
  sizes, io = goldens.config("step_tiny"), goldens.arrays("step_tiny.io")
  tower_weights = goldens.arrays("step_tiny.clip")
  own = {f"mapping.clip.model.{k}": v for k, v in tower_weights.items() if not k.startswith("visual.")}
  state_dict = goldens.arrays("g_tiny32.state_dict")
  plain_cfg = dataclasses.replace(released.config_from_released(goldens.config("g_tiny32")), noise_in_training="const")
  tower_cfg = dataclasses.replace(
    plain_cfg, text_tower=released.text_tower_from_released(state_dict | own, heads=sizes["clip"]["text"]["heads"])
  )
  d_cfg = dataclasses.replace(released.discriminator_config_from_released(goldens.config("d_tiny")), augment=())
  plain = released.import_generator(state_dict, plain_cfg)
  with_tower = released.import_generator(state_dict | own, tower_cfg)
  discriminator = released.import_discriminator(goldens.arrays("d_tiny.state_dict"), d_cfg)
  clip_module, clip_variables = clip_of(sizes["clip"], tower_weights, with_tower["params"]["text_tower"])
  frozen = {"clip": clip_variables, "dino": discriminator["dino"]}
  adam = dict(learning_rate=sizes["adam"]["lr"], beta2=sizes["adam"]["betas"][1], eps=sizes["adam"]["eps"])
  experiment = config.Experiment(
    generator=plain_cfg,
    discriminator=d_cfg,
    loss=config.Loss(
      clip_weight=sizes["clip_weight"],
      clip_crop=32,  # the images' side: the public code, too, does not cut them
      blur_sigma=sizes["blur_init_sigma"],
      blur_fade_kimg=sizes["blur_fade_kimg"],
    ),
    micro_batch=config.MicroBatch(size=sizes["micro_batch"], count=sizes["accumulations"]),
    optimizer=config.Optimizers(*[config.config_lib.Optimizer(**adam)] * 2),
    ema=Ema(1000.0 * sizes["ema_kimg"], sizes["ema_rampup"], ramp_up_includes_batch=False),
    train=Train(batch_size=sizes["batch"], guard=False),
  )

  def first_state(experiment, generator):
    updates = optimizers.Updates(GoldenSystem(experiment, clip_module, None), 1)
    network = lambda name, variables: base.NetworkState(
      variables["params"],
      {name: tree for name, tree in variables.items() if name in ("buffers", "spectral")},
      jax.tree.map(np.asarray, updates._optimizers[name].init(variables["params"])),
      variables["params"] if name == "generator" else None,
    )
    networks = {"generator": network("generator", generator), "discriminator": network("discriminator", discriminator)}
    return base.TrainState(jnp.int32(sizes["cur_nimg"] // experiment.train.batch_size), networks)

  real = nhwc(io["in.real_u8_blocks"]).repeat(4, 1).repeat(4, 2) / np.float32(127.5) - 1
  batch = {"image": real, "tokens": io["in.tokens"]}
  start = first_state(experiment, plain)
  d_state, d_metrics = run_phase(experiment, clip_module, io["in.z_d_phase"], 0, start, frozen, batch)
  # The public code's discriminator after its step. Ours is the same but for parameters whose gradient is next to
  # nothing, of which Adam makes steps of full size.
  stepped = goldens.arrays("d_tiny.state_dict") | goldens.starting(io, "out.D_after_D_phase.")
  stepped = released.import_discriminator(stepped, d_cfg)
  theirs = d_state.networks["discriminator"].replace(
    params=stepped["params"], variables={"spectral": stepped["spectral"]}
  )
  middle = d_state.with_network("discriminator", theirs)
  g_state, g_metrics = run_phase(experiment, clip_module, io["in.z_g_phase"], 1, middle, frozen, batch)
  return types.SimpleNamespace(**locals())


@pytest.fixture(scope="module")
def text_mode(replay):
  """The generator's phase in mode "text_encoder", on the first micro-batch alone."""
  r, per = replay, replay.sizes["micro_batch"]
  experiment = dataclasses.replace(
    r.experiment,
    mode="text_encoder",
    generator=r.tower_cfg,
    loss=dataclasses.replace(r.experiment.loss, clip_weight=r.sizes["text_encoder_clip_weight"]),
    micro_batch=config.MicroBatch(size=per),
    train=Train(batch_size=per, guard=False),
  )
  state, batch = r.first_state(experiment, r.with_tower), {name: values[:per] for name, values in r.batch.items()}
  after, metrics = run_phase(experiment, r.clip_module, r.io["in.z_g_phase"][:per], 1, state, r.frozen, batch)
  return types.SimpleNamespace(before=state, after=after, metrics=metrics)


def exported(replay, state, name):
  """A network of a state under the public names."""
  variables = state.variables(name)
  if name == "generator":
    return released.export_generator(variables, replay.plain_cfg)
  return released.export_discriminator({**replay.discriminator, **variables}, replay.d_cfg)


def gradient(replay, metrics, name):
  if name == "generator":
    return released.export_generator({**replay.plain, "params": metrics["gradients"]}, replay.plain_cfg)
  return released.export_discriminator({**replay.discriminator, "params": metrics["gradients"]}, replay.d_cfg)


def test_text_features_and_real_images_as_the_discriminator_sees_them(replay):
  io, golden = replay.io, GoldenSystem(replay.experiment, replay.clip_module, None)
  text = jax.jit(golden.text_features)(replay.frozen, replay.batch["tokens"])
  assert relative(text, io["in.c"]) < goldens.OUTPUT
  loss = replay.experiment.loss
  sigma = losses.blur_sigma(replay.sizes["cur_nimg"], loss)
  view = jax.jit(lambda image: losses.discriminator_view(image, 32, sigma, loss))
  assert relative(view(replay.real[:1]), nhwc(io["mid.blurred_real0"])) < goldens.OUTPUT


def test_losses(replay):
  """Ours are means over micro-batches, without the public code's 1 / micro-batch."""
  io, size = replay.io, replay.sizes["micro_batch"]
  for metrics, ours, theirs, factor in (
    (replay.d_metrics, "loss/d_adversarial", "out.D.D.loss", size),
    (replay.g_metrics, "loss/g_adversarial", "out.G.G.loss", size),
    (replay.g_metrics, "loss/g_clip", "out.G.G.clip_loss", 1),
    (replay.d_metrics, "d/logit_fake", "out.D.scores.fake", 1),
    (replay.d_metrics, "d/logit_real", "out.D.scores.real", 1),
  ):
    # Scores mostly cancel in their mean.
    scale = np.abs(io[theirs]).max() * factor
    assert abs(metrics[ours] - factor * io[theirs].mean()) < goldens.OUTPUT * scale, ours
  assert replay.d_metrics["d/blur_sigma"] == pytest.approx(replay.sizes["blur_sigma"], rel=1e-5)


def test_gradients_that_adam_is_given(replay):
  """The generator's text tower does not train in this mode: 107 tensors do."""
  io = replay.io
  for letter, name, metrics, whole, all_ in (
    ("D", "discriminator", replay.d_metrics, 50, 60),
    ("G", "generator", replay.g_metrics, 76, 107),
  ):
    ours = gradient(replay, metrics, name)
    gradients, norms = goldens.starting(io, f"grad.{letter}."), goldens.starting(io, f"grad.{letter}norm.")
    assert (len(gradients), len(norms)) == (whole, all_)
    noise = 1e-5 * max(norms.values())
    for tensor, norm in norms.items():
      if letter == "D" and tensor.endswith(BEFORE_BATCH_NORM):
        assert max(norm, np.linalg.norm(ours[tensor])) < noise, tensor  # zero but for rounding
        continue
      assert abs(np.linalg.norm(ours[tensor]) - norm) < goldens.GRADIENT * norm, tensor
      if tensor in gradients:
        assert relative(ours[tensor], gradients[tensor]) < goldens.GRADIENT, tensor


def test_both_networks_after_their_steps(replay):
  """Adam's first step is almost its learning rate times the sign of the gradient: compared where that is not tiny."""
  io, learning_rate = replay.io, replay.sizes["adam"]["lr"]
  ours, slope = exported(replay, replay.d_state, "discriminator"), gradient(replay, replay.d_metrics, "discriminator")
  theirs = goldens.starting(io, "out.D_after_D_phase.")
  assert len(theirs) == 90
  compared = 0
  for name, value in theirs.items():
    if name.endswith(("weight_u", "weight_v")):
      assert relative(ours[name], value) < goldens.OUTPUT, name
      continue
    if name.endswith(BEFORE_BATCH_NORM):
      continue
    clear = np.abs(slope[name]) > 1e-3 * np.abs(slope[name]).max()
    compared += clear.sum()
    assert np.abs(ours[name] - value)[clear].max() < 1e-3 * learning_rate, name
  assert compared > 0.98 * sum(leaf.size for leaf in jax.tree.leaves(replay.discriminator["params"]))

  ours = exported(replay, replay.g_state, "generator")
  theirs = goldens.starting(io, "out.G_after.")
  assert len(theirs) == 8
  for name, value in theirs.items():
    assert relative(ours[name], value) < goldens.OUTPUT, name


def test_spectral_vectors_after_the_generators_phase(replay):
  ours, theirs = exported(replay, replay.g_state, "discriminator"), goldens.starting(replay.io, "out.D_after_G_phase.")
  assert len(theirs) == 15
  for name, value in theirs.items():
    assert relative(ours[name], value) < goldens.OUTPUT, name
  # Nothing else of the discriminator moves.
  same = lambda a, b: np.testing.assert_array_equal(a, b)
  jax.tree.map(same, replay.g_state.networks["discriminator"].params, replay.stepped["params"])


def test_running_averages(replay):
  """Of mapped latents, which move in both phases, and of the generator's weights."""
  io = replay.io
  average = lambda state: state.networks["generator"].variables["buffers"]["mapping"]["x_avg"]
  assert relative(average(replay.d_state), io["out.x_avg_after_D_phase"]) < goldens.OUTPUT
  assert relative(average(replay.g_state), io["out.x_avg_after_G_phase"]) < goldens.OUTPUT
  decay = optimizers.ema_decay(replay.experiment.ema, replay.start.step, replay.sizes["batch"])
  assert float(decay) == pytest.approx(float(io["out.ema_beta"]), rel=1e-6)
  assert float(optimizers.ema_decay(replay.experiment.ema, jnp.int32(0), replay.sizes["batch"])) == 0
  ours = released.export_generator(replay.g_state.variables("generator", ema=True), replay.plain_cfg)
  theirs = goldens.starting(io, "out.G_ema_after.")
  assert len(theirs) == 8
  for name, value in theirs.items():
    assert relative(ours[name], value) < goldens.OUTPUT, name


def test_training_the_text_encoder(replay, text_mode):
  io, size = replay.io, replay.sizes["micro_batch"]
  assert relative(text_mode.metrics["loss/g_adversarial"] / size, io["text_encoder.out.G.loss"][0]) < goldens.OUTPUT
  assert relative(text_mode.metrics["loss/g_clip"], io["text_encoder.out.G.clip_loss"][0]) < goldens.OUTPUT
  ours = released.export_generator({**replay.with_tower, "params": text_mode.metrics["gradients"]}, replay.tower_cfg)
  theirs = goldens.starting(io, "text_encoder.grad.")
  assert len(theirs) == 29
  for name, value in theirs.items():
    assert relative(ours[name], value) < goldens.GRADIENT, name
  # All else of the generator has no gradient, and stays as it was bit by bit.
  before, after = text_mode.before.networks["generator"].params, text_mode.after.networks["generator"].params
  tower, rest = labels.split(after, lambda path: labels.trains("text_encoder", path))
  old_tower, old_rest = labels.split(before, lambda path: labels.trains("text_encoder", path))
  jax.tree.map(np.testing.assert_array_equal, rest, old_rest)
  assert all(np.any(new != old) for new, old in zip(jax.tree.leaves(tower), jax.tree.leaves(old_tower)))
