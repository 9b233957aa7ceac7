"""The generator against the public code's numbers and against itself."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from systems.stylegan_t import goldens
from systems.stylegan_t.goldens import nhwc, relative

from aurora_jax.systems.stylegan_t import config, generator, released, synthesis
from aurora_jax.systems.stylegan_t.generator import Generator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def golden():
  """The golden and one compiled program, of value and gradient, that serves every call."""
  cfg = released.config_from_released(goldens.config("g_tiny32")["generator"])
  io, gradients = goldens.arrays("g_tiny32.io"), goldens.arrays("g_tiny32.grad")
  variables = released.import_generator(goldens.arrays("g_tiny32.state_dict"), cfg)
  cotangent = nhwc(gradients["grad.cotangent_image"])

  def loss(inputs, buffers, psi, noise):
    params, z, text = inputs
    variables = {"params": params, "buffers": buffers}
    named = lambda module, method: module.name is not None
    out, state = Generator(cfg).apply(
      variables, z, text, psi, noise, mutable=["intermediates"], capture_intermediates=named
    )
    return jnp.sum(out.image * cotangent), (out, state["intermediates"])

  program = jax.jit(jax.value_and_grad(loss, has_aux=True))
  constants = {}
  for name, size in synthesis.noise_sizes(cfg).items():
    block, layer = name.split(".", 1)
    buffers = variables["buffers"]["synthesis"][block][layer.replace("convs1.", "convs1_")]
    constants[name] = np.broadcast_to(buffers["noise_const"][None, ..., None], (2, size, size, 1))

  def run(psi=1.0, noise=constants, buffers=variables["buffers"]):
    return program((variables["params"], io["in.z"], io["in.c"]), buffers, jnp.float32(psi), noise)

  (value, (out, layers)), gradient = run()
  return types.SimpleNamespace(**locals())


def test_image_w_and_every_layer(golden):
  io, out = golden.io, golden.out
  assert relative(out.image, nhwc(io["out.image"])) < goldens.OUTPUT
  assert relative(out.w, io["out.w"]) < goldens.OUTPUT
  assert relative(out.w[:, :12], io["out.f_z"]) < goldens.OUTPUT
  blocks = golden.layers["synthesis"]
  names = goldens.starting(io, "mid.")
  assert len(names) == 21
  for name, expected in names.items():
    block, layer = name.split(".", 1)
    if layer == "img":
      ours = blocks[f"{block}_image"]
    else:
      ours = blocks[block][layer.replace("convs1.", "convs1_")]["__call__"]
    assert relative(ours[0][:1], nhwc(expected)) < goldens.OUTPUT, name


def test_every_gradient(golden):
  theirs, (params, z, text) = golden.gradients, golden.gradient
  # The loss is a sum of terms that mostly cancel: its error is that of the terms.
  assert abs(golden.value - theirs["grad.loss"]) < goldens.OUTPUT * np.abs(golden.cotangent).sum()
  assert relative(z, theirs["grad.in.z"]) < goldens.GRADIENT
  assert relative(text, theirs["grad.in.c"]) < goldens.GRADIENT
  ours = released.export_generator({**golden.variables, "params": params}, golden.cfg)
  theirs = goldens.starting(theirs, "grad.param.")
  assert len(theirs) == 107
  for name, gradient in theirs.items():
    assert relative(ours[name], gradient) < goldens.GRADIENT, name


@pytest.mark.parametrize("psi", ["0.0", "0.7"])
def test_truncation(golden, psi):
  (_, (out, _)), _ = golden.run(psi=float(psi))
  assert relative(out.image, nhwc(golden.io[f"out.image_trunc{psi}"])) < goldens.OUTPUT
  np.testing.assert_array_equal(out.w[:, 12:], golden.io["in.c"])  # the text is not truncated


def test_noise_given_and_none(golden):
  noise = {name: nhwc(value) for name, value in goldens.starting(golden.io, "in.noise.").items()}
  (_, (out, _)), _ = golden.run(noise=noise)
  assert relative(out.image, nhwc(golden.io["out.image_random_noise"])) < goldens.OUTPUT
  (_, (out, _)), _ = golden.run(noise=jax.tree.map(np.zeros_like, noise))
  assert relative(out.image, nhwc(golden.io["out.image_no_noise"])) < goldens.OUTPUT


def test_user_transform(golden):
  io = golden.io
  np.testing.assert_allclose(generator.transform_matrix(30, 0.1, -0.05), io["in.transform"], atol=1e-6)
  for name, expected in (("transform", "transformed"), ("transform_scaled", "scaled")):
    turned = generator.with_transform(golden.variables, io[f"in.{name}"])
    (_, (_, layers)), _ = golden.run(buffers=turned["buffers"])
    ours = layers["synthesis"]["b8"]["input"]["__call__"][0]
    assert relative(ours, nhwc(io[f"out.input_{expected}"])) < goldens.OUTPUT
  with pytest.raises(ValueError, match=r"\(2, 3\)"):
    generator.with_transform(golden.variables, np.zeros((2, 3)))


def test_training_moves_the_average_of_mapped_latents(golden):
  io, variables = golden.io, golden.variables
  w, state = Generator(golden.cfg).apply(
    variables, io["in.z"], io["in.c"], 0.5, True, method="map_latents", mutable=["buffers"]
  )
  average = state["buffers"]["mapping"]["x_avg"]
  assert relative(average, io["out.x_avg_after_train_call"]) < goldens.OUTPUT
  before = variables["buffers"]["mapping"]["x_avg"]
  assert not np.allclose(before, average, rtol=1e-3)
  # Truncation is toward the average just moved.
  np.testing.assert_allclose(w[:, :12], average + 0.5 * (io["out.f_z"] - average), rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Other configurations

SMALL = config.Generator(
  resolution=16, z_dim=6, text_dim=5, channels_base=128, channels_max=12, residual_blocks=1, norm_groups=2
)


def draw_inputs(cfg):
  """Variables, latents and text of three samples."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  variables = jax.tree.map(lambda leaf: draw(*leaf.shape), generator.abstract_variables(cfg))
  return variables, draw(3, cfg.z_dim), draw(3, cfg.text_dim) if cfg.text_dim else None


def apply(cfg, **options):
  return jax.jit(functools.partial(Generator(cfg).apply, **options))(*draw_inputs(cfg))


@pytest.fixture(scope="module")
def plain():
  return apply(SMALL)


def test_three_residual_blocks_and_no_text():
  cfg = dataclasses.replace(SMALL, residual_blocks=3, text_dim=0)
  assert cfg.num_ws == 15 and len(synthesis.noise_sizes(cfg)) == 13
  out = jax.eval_shape(Generator(cfg).apply, generator.abstract_variables(cfg), jnp.zeros((3, 6)))
  assert out.image.shape == (3, 16, 16, 3) and out.w.shape == (3, 6)
  with pytest.raises(ValueError, match="unconditional"):
    Generator(cfg).apply({}, jnp.zeros((1, 6)), jnp.zeros((1, 5)))


def test_constant_noise_and_none_of_one_layer():
  """The golden's program is of given noise: a layer's constant and none are special cases of it."""
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(2, 8, 8, 4)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
  layer = synthesis.ModulatedConv(6, "b8.convs1.0")
  init = lambda: layer.init(jax.random.key(0), x, w, {})
  variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), jax.eval_shape(init))
  run = jax.jit(lambda noise: layer.apply(variables, x, w, noise))
  constant = variables["buffers"]["noise_const"][None, ..., None]
  assert relative(run({}), run({"b8.convs1.0": constant})) < 1e-6
  assert relative(run(None), run({"b8.convs1.0": 0 * constant})) < 1e-6
  assert relative(run(None), run({})) > 1e-2


def test_random_noise(plain):
  variables, z, text = draw_inputs(SMALL)
  run = jax.jit(lambda key: Generator(SMALL).apply(variables, z, text, noise="random", rngs={"noise": key}).image)
  first = run(jax.random.key(0))
  np.testing.assert_array_equal(first, run(jax.random.key(0)))
  assert relative(run(jax.random.key(1)), first) > 1e-2 and relative(first, plain.image) > 1e-2

  def arrays():
    rngs = {"noise": jax.random.key(0)}
    return synthesis.Synthesis(SMALL).apply({}, "random", 400, method="_noise_arrays", rngs=rngs)

  many = jax.jit(arrays)()
  assert {name: value.shape for name, value in many.items()} == {
    name: (400, size, size, 1) for name, size in synthesis.noise_sizes(SMALL).items()
  }
  for name, value in many.items():
    assert np.mean(value) == pytest.approx(0, abs=0.03) and np.std(value) == pytest.approx(1, abs=0.03), name
  flat = np.stack([np.asarray(value)[:, :8, :8].reshape(-1) for value in many.values()])
  assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.05  # layers draw independently


def test_rematerialisation_and_bfloat16(plain):
  """Recomputing blocks changes nothing; bfloat16 does a little, in the highest blocks only."""
  assert relative(apply(dataclasses.replace(SMALL, remat=True)).image, plain.image) < 1e-6
  low = dataclasses.replace(SMALL, compute_dtype="bfloat16", low_precision_blocks=1)
  assert [low.block_dtype(r) for r in low.resolutions] == ["float32", "bfloat16"]
  assert dataclasses.replace(low, low_precision_blocks=4).block_dtype(8) == "bfloat16"
  image = apply(low).image
  assert image.dtype == jnp.float32
  assert 1e-4 < relative(image, plain.image) < 0.05


def test_bad_inputs_are_named():
  variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape), generator.abstract_variables(SMALL))
  call = lambda *inputs, **options: jax.eval_shape(lambda: Generator(SMALL).apply(variables, *inputs, **options))
  z, text = np.zeros((2, 6)), np.zeros((2, 5))
  with pytest.raises(ValueError, match=r"z must be \[batch, 6\], got \(2, 7\)"):
    call(np.zeros((2, 7)), text)
  with pytest.raises(ValueError, match=r"text must be \(2, 5\), got \(1, 5\)"):
    call(z, text[:1])
  with pytest.raises(ValueError, match="text is missing"):
    call(z)
  with pytest.raises(ValueError, match="no text tower"):
    call(z, np.zeros((2, 4), np.int32))
  with pytest.raises(ValueError, match="'constant'"):
    call(z, text, noise="constant")
  noise = {name: np.zeros((2, 8, 8, 1)) for name in synthesis.noise_sizes(SMALL)}
  with pytest.raises(ValueError, match=r"b16.conv0 is \(2, 8, 8, 1\), expected \(2, 16, 16, 1\)"):
    call(z, text, noise=noise)
  del noise["b8.convs1.0"]
  with pytest.raises(ValueError, match="differs in b8.convs1.0"):
    call(z, text, noise=noise)


def test_fresh_weights():
  """Distributions of the published initialization."""
  cfg = config.Generator(resolution=8, z_dim=64, text_dim=64, channels_base=1024, channels_max=64, residual_blocks=1)
  init = jax.jit(Generator(cfg).init)
  variables = jax.tree.map(np.asarray, init(jax.random.key(0), jnp.zeros((1, 64)), jnp.zeros((1, 64))))
  params, buffers = variables["params"], variables["buffers"]
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
  assert params["mapping"]["fc0"]["weight"].std() == pytest.approx(100, rel=0.05)  # 1 / the learning rate multiplier
  assert not params["mapping"]["fc1"]["bias"].any() and not buffers["mapping"]["x_avg"].any()
  block = params["synthesis"]["b8"]
  assert not block["input"]["affine"]["weight"].any()
  assert block["input"]["affine"]["bias"].tolist() == [1, 0, 0, 0]
  assert block["input"]["weight"].std() == pytest.approx(1, rel=0.05)
  for layer, expected in (("convs1_0", 1.0), ("convs1_1", 1.0), ("torgb", 0.1)):
    assert block[layer]["weight"].std() == pytest.approx(expected, rel=0.1), layer
    assert block[layer]["affine"]["weight"].std() == pytest.approx(1, rel=0.05)
    assert (block[layer]["affine"]["bias"] == 1).all() and block[layer]["affine"]["bias"].shape == (192,)
    assert not block[layer]["bias"].any()
  assert (block["convs1_1"]["gamma"] == np.float32(1e-5)).all() and "gamma" not in block["convs1_0"]
  assert (block["convs1_1"]["norm"]["scale"] == 1).all() and not block["convs1_1"]["norm"]["bias"].any()
  assert block["convs1_0"]["noise_strength"] == 0
  assert buffers["synthesis"]["b8"]["convs1_0"]["noise_const"].std() == pytest.approx(1, rel=0.2)
  fourier = buffers["synthesis"]["b8"]["input"]
  length = np.linalg.norm(fourier["freqs"], axis=1)
  assert length.max() < 2 and np.square(length / 2).mean() == pytest.approx(0.5, abs=0.1)  # uniform in the disc
  assert np.abs(fourier["phases"]).max() <= 0.5 and fourier["phases"].std() == pytest.approx(12**-0.5, rel=0.2)
  np.testing.assert_array_equal(fourier["transform"], np.eye(3))
