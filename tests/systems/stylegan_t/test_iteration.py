"""One training iteration of the public code, replayed: both phases, both optimizers, averages, and the text encoder's mode."""

import dataclasses
import types

import jax
import numpy as np
import optax
import pytest
from systems.stylegan_t import goldens
from systems.stylegan_t.goldens import nhwc, relative

from aurora_jax.models import clip
from aurora_jax.systems.stylegan_t import config, losses, released
from aurora_jax.systems.stylegan_t.discriminator import Discriminator
from aurora_jax.systems.stylegan_t.generator import Generator

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


@pytest.fixture(scope="module")
def replay():
  """The iteration. The generator has a text tower, so that one program serves both of its modes."""
  sizes, io = goldens.config("step_tiny"), goldens.arrays("step_tiny.io")
  count, per, seen = sizes["accumulations"], sizes["micro_batch"], sizes["cur_nimg"]
  tower_weights = goldens.arrays("step_tiny.clip")
  own = {f"mapping.clip.model.{k}": v for k, v in tower_weights.items() if not k.startswith("visual.")}
  state_dict = goldens.arrays("g_tiny32.state_dict") | own
  g_cfg = dataclasses.replace(
    released.config_from_released(goldens.config("g_tiny32")),
    text_tower=released.text_tower_from_released(state_dict, heads=sizes["clip"]["text"]["heads"]),
  )
  d_cfg = released.discriminator_config_from_released(goldens.config("d_tiny"))
  generator = released.import_generator(state_dict, g_cfg)
  discriminator = released.import_discriminator(goldens.arrays("d_tiny.state_dict"), d_cfg)
  frozen, frozen_variables = clip_of(sizes["clip"], tower_weights, generator["params"]["text_tower"])
  loss_cfg = config.Loss(blur_sigma=sizes["blur_init_sigma"], blur_fade_kimg=sizes["blur_fade_kimg"])
  sigma = losses.blur_sigma(seen, loss_cfg)
  view = jax.jit(lambda image: losses.discriminator_view(image, g_cfg.resolution, sigma, loss_cfg.blur_sigma))

  @jax.jit
  def generate(buffers, z, text):
    out, state = Generator(g_cfg).apply({**generator, "buffers": buffers}, z, text, train=True, mutable=["buffers"])
    return view(out.image), state["buffers"]

  @jax.jit
  def judge(params, spectral, image, text, sign):
    """The discriminator's term for generated (1) or real (-1) images."""

    def loss(params):
      logits, state = Discriminator(d_cfg).apply(
        {**discriminator, "params": params, "spectral": spectral}, image, text, train=True, mutable=["spectral"]
      )
      return losses.discriminator_fake(sign * logits), (logits, state["spectral"])

    return jax.value_and_grad(loss, has_aux=True)(params)

  @jax.jit
  def improve(params, buffers, d_params, spectral, z, tokens, text, weight):
    """The generator's loss. `text` is the frozen CLIP's feature, the generator has its own of `tokens`."""

    def loss(params):
      out, g_state = Generator(g_cfg).apply(
        {"params": params, "buffers": buffers}, z, tokens, train=True, mutable=["buffers"]
      )
      logits, d_state = Discriminator(d_cfg).apply(
        {**discriminator, "params": d_params, "spectral": spectral},
        view(out.image),
        text,
        train=True,
        mutable=["spectral"],
      )
      seen_by_clip = losses.clip_view(out.image, frozen.config.image.size, loss_cfg)
      embedding = frozen.apply(frozen_variables, seen_by_clip, method="encode_image")
      adversarial, guidance = losses.generator_adversarial(logits), losses.clip_guidance(embedding, text)
      aux = adversarial, guidance, logits, out.w[:, g_cfg.z_dim :], g_state["buffers"], d_state["spectral"]
      return adversarial + weight * guidance, aux

    return jax.value_and_grad(loss, has_aux=True)(params)

  def summed(gradients):
    """Over micro-batches, times their number, then the published clean-up."""
    clean = lambda *parts: np.nan_to_num(count * np.sum(parts, axis=0), nan=0.0, posinf=1e5, neginf=-1e5)
    return jax.tree.map(clean, *jax.device_get(gradients))

  adam = optax.adam(sizes["adam"]["lr"], *sizes["adam"]["betas"], sizes["adam"]["eps"])

  @jax.jit
  def adam_step(params, gradient):
    return optax.apply_updates(params, adam.update(gradient, adam.init(params))[0])

  def updated(params, gradient):
    """Adam's first step; on one long vector, which is much faster to compile than on all leaves."""
    leaves, structure = jax.tree.flatten(params)
    flat = lambda leaves: np.concatenate([np.ravel(leaf) for leaf in leaves])
    before = flat(leaves)
    after = np.split(
      jax.device_get(adam_step(before, flat(jax.tree.leaves(gradient)))), np.cumsum([leaf.size for leaf in leaves])[:-1]
    )
    return structure.unflatten([part.reshape(leaf.shape) for part, leaf in zip(after, leaves)])

  parts = lambda name: io[name].reshape(count, per, *io[name].shape[1:])
  texts, tokens = parts("in.c"), parts("in.tokens")
  reals = nhwc(io["in.real_u8_blocks"]).repeat(4, 1).repeat(4, 2) / np.float32(127.5) - 1
  reals = view(reals).reshape(count, per, 32, 32, 3)

  # Phase D: generated, then real images, micro-batch by micro-batch.
  buffers, spectral = generator["buffers"], discriminator["spectral"]
  d = types.SimpleNamespace(fakes=[], losses=[], fake=[], real=[], gradients=[])
  for i, z in enumerate(parts("in.z_d_phase")):
    fake, buffers = generate(buffers, z, texts[i])
    d.fakes.append(fake)
    total = 0.0
    for image, sign, scores in ((fake, 1.0, d.fake), (reals[i], -1.0, d.real)):
      (value, (logits, spectral)), gradient = judge(discriminator["params"], spectral, image, texts[i], sign)
      scores.append(logits)
      d.gradients.append(gradient)
      total += value
    d.losses.append(total)
  d.gradient, d.spectral = summed(d.gradients), spectral
  d.params = updated(discriminator["params"], d.gradient)
  d.average = buffers["mapping"]["x_avg"]

  # Phase G: other latents, and the public code's discriminator after its step. Ours is the same but for parameters whose
  # gradient is next to nothing, of which Adam makes steps of full size.
  stepped = {name: value for name, value in goldens.starting(io, "out.D_after_D_phase.").items()}
  stepped = released.import_discriminator(goldens.arrays("d_tiny.state_dict") | stepped, d_cfg)
  z_g = parts("in.z_g_phase")
  text_mode = improve(
    generator["params"],
    generator["buffers"],
    discriminator["params"],
    discriminator["spectral"],
    z_g[0],
    tokens[0],
    texts[0],
    sizes["text_encoder_clip_weight"],
  )
  g = types.SimpleNamespace(losses=[], guidance=[], scores=[], texts=[], gradients=[])
  spectral = stepped["spectral"]
  for i, z in enumerate(z_g):
    (_, (adversarial, guidance, logits, text, buffers, spectral)), gradient = improve(
      generator["params"], buffers, stepped["params"], spectral, z, tokens[i], texts[i], sizes["clip_weight"]
    )
    g.losses.append(adversarial)
    g.guidance.append(guidance)
    g.scores.append(logits)
    g.texts.append(text)
    g.gradients.append(gradient)
  g.gradient, g.buffers, g.spectral = summed(g.gradients), buffers, spectral
  g.params = updated(generator["params"], g.gradient)
  return types.SimpleNamespace(**locals())


def test_text_features_of_the_generators_own_tower(replay):
  assert relative(np.concatenate(replay.g.texts), replay.io["in.c"]) < goldens.OUTPUT


def test_images_that_the_discriminator_sees(replay):
  io = replay.io
  assert relative(replay.d.fakes[0][:1], nhwc(io["mid.blurred_fake0"])) < goldens.OUTPUT
  assert relative(replay.reals[0][:1], nhwc(io["mid.blurred_real0"])) < goldens.OUTPUT


def test_losses_and_scores(replay):
  io, d, g = replay.io, replay.d, replay.g
  for ours, name in (
    (d.losses, "out.D.D.loss"),
    (d.fake, "out.D.scores.fake"),
    (d.real, "out.D.scores.real"),
    (g.losses, "out.G.G.loss"),
    (g.guidance, "out.G.G.clip_loss"),
    (g.scores, "out.G.scores.fake"),
  ):
    assert relative(np.stack(ours), io[name]) < goldens.OUTPUT, name


def test_gradients_that_adam_is_given(replay):
  """The generator's text tower does not train in this mode: 107 tensors do."""
  io = replay.io
  exported = {
    "D": released.export_discriminator({**replay.discriminator, "params": replay.d.gradient}, replay.d_cfg),
    "G": released.export_generator({**replay.generator, "params": replay.g.gradient}, replay.g_cfg),
  }
  for network, whole, all_ in (("D", 50, 60), ("G", 76, 107)):
    ours = exported[network]
    gradients, norms = goldens.starting(io, f"grad.{network}."), goldens.starting(io, f"grad.{network}norm.")
    assert (len(gradients), len(norms)) == (whole, all_)
    noise = 1e-5 * max(norms.values())
    for name, norm in norms.items():
      if network == "D" and name.endswith(BEFORE_BATCH_NORM):
        assert max(norm, np.linalg.norm(ours[name])) < noise, name  # zero but for rounding
        continue
      assert abs(np.linalg.norm(ours[name]) - norm) < goldens.GRADIENT * norm, name
      if name in gradients:
        assert relative(ours[name], gradients[name]) < goldens.GRADIENT, name


def test_both_networks_after_their_steps(replay):
  """Adam's first step is almost its learning rate times the sign of the gradient: compared where that is not tiny."""
  io, rate = replay.io, 0.002
  ours = released.export_discriminator(
    {**replay.discriminator, "params": replay.d.params, "spectral": replay.d.spectral}, replay.d_cfg
  )
  gradient = released.export_discriminator({**replay.discriminator, "params": replay.d.gradient}, replay.d_cfg)
  theirs = goldens.starting(io, "out.D_after_D_phase.")
  assert len(theirs) == 90
  compared = 0
  for name, value in theirs.items():
    if name.endswith(("weight_u", "weight_v")):
      assert relative(ours[name], value) < goldens.OUTPUT, name
      continue
    if name.endswith(BEFORE_BATCH_NORM):
      continue
    clear = np.abs(gradient[name]) > 1e-3 * np.abs(gradient[name]).max()
    compared += clear.sum()
    assert np.abs(ours[name] - value)[clear].max() < 1e-3 * rate, name
  assert compared > 0.98 * sum(leaf.size for leaf in jax.tree.leaves(replay.d.params))

  ours = released.export_generator({"params": replay.g.params, "buffers": replay.g.buffers}, replay.g_cfg)
  theirs = goldens.starting(io, "out.G_after.")
  assert len(theirs) == 8
  for name, value in theirs.items():
    assert relative(ours[name], value) < goldens.OUTPUT, name


def test_spectral_vectors_after_the_generators_phase(replay):
  ours = released.export_discriminator({**replay.stepped, "spectral": replay.g.spectral}, replay.d_cfg)
  theirs = goldens.starting(replay.io, "out.D_after_G_phase.")
  assert len(theirs) == 15
  for name, value in theirs.items():
    assert relative(ours[name], value) < goldens.OUTPUT, name


def test_running_averages(replay):
  """Of mapped latents, which move in both phases, and of the generator's weights."""
  io, sizes = replay.io, replay.sizes
  assert relative(replay.d.average, io["out.x_avg_after_D_phase"]) < goldens.OUTPUT
  assert relative(replay.g.buffers["mapping"]["x_avg"], io["out.x_avg_after_G_phase"]) < goldens.OUTPUT
  half_life = min(1000 * sizes["ema_kimg"], sizes["ema_rampup"] * sizes["cur_nimg"])
  beta = 0.5 ** (sizes["batch"] / half_life)
  assert beta == pytest.approx(io["out.ema_beta"], rel=1e-6)
  average = jax.tree.map(
    lambda new, old: np.asarray(new) + beta * (old - np.asarray(new)), replay.g.params, replay.generator["params"]
  )
  ours = released.export_generator({"params": average, "buffers": replay.g.buffers}, replay.g_cfg)
  theirs = goldens.starting(io, "out.G_ema_after.")
  assert len(theirs) == 8
  for name, value in theirs.items():
    assert relative(ours[name], value) < goldens.OUTPUT, name


def test_training_the_text_encoder(replay):
  io = replay.io
  (_, (adversarial, guidance, logits, _, _, _)), gradient = replay.text_mode
  for ours, name in ((adversarial, "out.G.loss"), (guidance, "out.G.clip_loss"), (logits, "out.scores.fake")):
    assert relative(ours[None], io[f"text_encoder.{name}"]) < goldens.OUTPUT, name
  ours = released.export_generator({**replay.generator, "params": gradient}, replay.g_cfg)
  theirs = goldens.starting(io, "text_encoder.grad.")
  assert len(theirs) == 29
  for name, value in theirs.items():
    assert relative(ours[name], value) < goldens.GRADIENT, name
