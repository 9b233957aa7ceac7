"""StyleGAN-T as a user meets it: training with a stop, sampling, growing, exchange with PyTorch, and wrong input."""

import contextlib
import dataclasses
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import shared_programs
import torch
from PIL import Image
from safetensors.numpy import save_file

from aurora_jax import config_files
from aurora_jax.cli import main
from aurora_jax.data.tokenizer import Tokenizer
from aurora_jax.errors import UserError
from aurora_jax.interop import clip_hf
from aurora_jax.interop import dino as dino_interop
from aurora_jax.models import clip as clip_lib
from aurora_jax.models import dino as dino_lib
from aurora_jax.runs import checkpoint_reader
from aurora_jax.systems import registry
from aurora_jax.systems.stylegan_t import config, released
from aurora_jax.training import initialize
from aurora_jax.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[3]
CONFIG = f"{ROOT / 'configs/stylegan_t_64.py'}:test"
SMALL = ("--config.generator.resolution=8", "--config.loss.clip_crop=8")
CAPTIONS = ["red circle", "blue square", "green bar", "a very blue circle"]


def here(*args):
  """A command in this process: (status, stdout, stderr)."""
  out, error = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
    status = main.main([str(arg) for arg in args])
  return status, out.getvalue(), error.getvalue()


def succeed(*args):
  status, out, error = here(*args)
  assert status == 0, error
  return out


def fail(message, *args):
  """The command ends with status 2 and one line on stderr that contains `message`."""
  status, _, error = here(*args)
  assert status == 2 and len(error.strip().splitlines()) == 1, error
  assert message in error, error


@pytest.fixture(scope="module", autouse=True)
def _shared():
  with shared_programs.shared(weights_from_host=True):
    yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """data: eight images with captions; clip: a CLIP of train-clip's default sizes with random weights."""
  home = tmp_path_factory.mktemp("home")
  (home / "images").mkdir()
  rng = np.random.default_rng(0)
  for i in range(8):
    image = np.full((16, 16, 3), rng.integers(0, 255, 3), np.uint8)
    image[4:12, 4:12] = rng.integers(0, 255, 3)
    Image.fromarray(image).save(home / f"images/{i}.png")
    (home / f"images/{i}.txt").write_text(f"{CAPTIONS[i % 4]}\n")
  source = ("--source", "folder", "--path", home / "images", "--out", home / "data")
  succeed("build-data", *source, "--resolution", 16, "--shards", 1, "--heldout", 0)
  tokenizer = Tokenizer.train(CAPTIONS, 560, 10)
  tower = dict(width=128, layers=2, heads=4, mlp_width=256)
  sizes = clip_lib.ClipConfig(
    text=clip_lib.TextConfig(
      **tower, vocabulary_size=tokenizer.vocabulary_size, context_length=10, eot_id=tokenizer.end_id
    ),
    image=clip_lib.ImageConfig(**tower, size=32, patch=8),
    embedding_width=128,
  )
  draw = lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32)
  params = jax.tree.map(draw, clip_lib.abstract_variables(sizes)["params"])
  clip_hf.save(home / "clip", clip_hf.ClipBundle(sizes, {"params": params}, tokenizer))
  return home


def flags(home):
  return (f"--config.data.path={home / 'data'}", f"--config.text.clip={home / 'clip'}")


def train(home, run, *more):
  short = ("--config.train.total_steps=4", "--config.train.sample_prompts=()")
  return succeed("train", "--config", CONFIG, "--workdir", run, *flags(home), *SMALL, *short, *more)


@pytest.fixture(scope="module")
def run(home, tmp_path_factory):
  """An uninterrupted run of four steps."""
  run = tmp_path_factory.mktemp("runs") / "whole"
  said = train(home, run)
  assert f"no DINO; the image tower of text.clip={home / 'clip'} stands in for it" in said
  assert "micro-batches: 2 of 4 images per step (sum)" in said and "all 4 steps are done" in said
  return run


def fingerprint(run):
  return succeed("inspect", run, "--fingerprint").strip()


def rows(run):
  return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_losses_and_checkpoints(run):
  trained = [row for row in rows(run) if row["kind"] == "train"]
  assert [row["step"] for row in trained] == [1, 2, 3, 4]
  names = ("loss/d_adversarial", "loss/g_adversarial", "loss/g_clip", "grad_norm/d", "grad_norm/g", "d/logit_real")
  assert np.isfinite([[row[name] for name in names] for row in trained]).all()
  assert all(row["guard/skipped"] == 0 for row in trained)
  sigma = [row["d/blur_sigma"] for row in trained]
  assert sigma[0] == 32 and sigma[1] == pytest.approx(32 * (1 - 8 / 1e6))
  story = succeed("inspect", run)
  assert "8x8 images, text features 128 wide" in story and "step 4 of 4" in story and "G adversarial" in story


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_state(home, run, tmp_path):
  """Killed in its fourth step: the checkpoint of step 2 is its newest. Spectral vectors and averages are in the
  state.
  """
  killed = shutil.copytree(run, tmp_path / "killed")
  shutil.rmtree(killed / "checkpoints" / "4")
  lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
  (killed / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 4))
  assert fingerprint(killed) == fingerprint(run / "checkpoints" / "2") != fingerprint(run)
  assert "checkpoint of step 2" in train(home, killed)
  assert fingerprint(killed) == fingerprint(run)
  stored = checkpoint_reader.shapes(run / "checkpoints")
  for name in ("discriminator/variables/spectral/heads/conv_in/u", "generator/variables/buffers/mapping/x_avg"):
    assert f"networks/{name}" in stored


@pytest.mark.slow
def test_sampling_with_truncation(run, tmp_path):
  sample = ("sample", "--workdir", run, "--prompt", "red circle", "--prompt", "blue square", "--latents", 2)
  said = succeed(*sample, "--psi", "0,1", "--out", tmp_path / "both.png", "--save-latents", tmp_path / "latents.npz")
  assert "8x8 pixels" in said and "step 4" in said
  with np.load(tmp_path / "latents.npz") as file:
    assert file["z"].shape == (2, 2, 8)
  same = ("--psi", "0,1", "--latents-file", tmp_path / "latents.npz", "--out")
  succeed(*sample[:-2], *same, tmp_path / "again.png")
  both, again = (np.asarray(Image.open(tmp_path / name)) for name in ("both.png", "again.png"))
  np.testing.assert_array_equal(both, again)
  assert len(np.unique(both.reshape(-1, 3), axis=0)) > 100


def leaves(folder, part):
  _, found = checkpoint_reader.read_parts(folder / "checkpoints", [part])
  return jax.tree.map(np.asarray, found[part])


@pytest.mark.slow
def test_exchange_with_pytorch_both_ways(home, run, tmp_path):
  """All three networks to a .pth and back, bit by bit; the averages alone to safetensors."""
  said = succeed("convert", run, tmp_path / "all.pth", "--weights", "both")
  assert "ema as G_ema and generator as G and discriminator as D of step 4" in said
  state_dicts = torch.load(tmp_path / "all.pth", weights_only=True)
  assert set(state_dicts) == {"G_ema", "G", "D"}
  backbone = dino_interop.export_dino(
    dino_interop.load(home / "clip").variables, dino_interop.load(home / "clip").config
  )
  np.testing.assert_array_equal(state_dicts["D"]["dino.model.model.pos_embed"], backbone["pos_embed"])
  back = tmp_path / "back"
  said = succeed("convert", tmp_path / "all.pth", back, "--config", CONFIG, *SMALL, *flags(home))
  assert "dino.path names this file" in said
  for part in ("generator/params", "generator/ema", "generator/variables", "discriminator/params"):
    jax.tree.map(np.testing.assert_array_equal, leaves(back, f"networks/{part}"), leaves(run, f"networks/{part}"))
  spectral = "networks/discriminator/variables/spectral"
  jax.tree.map(np.testing.assert_array_equal, leaves(back, spectral), leaves(run, spectral))
  succeed("convert", run, tmp_path / "ema.safetensors")
  kwargs = json.loads((tmp_path / "ema.json").read_text())
  assert kwargs["img_resolution"] == 8 and kwargs["synthesis_kwargs"]["gn_groups"] == 4
  state_dict = released.load_state_dict(tmp_path / "ema.safetensors")
  for name, tensor in state_dicts["G_ema"].items():
    np.testing.assert_array_equal(np.asarray(state_dict[name]), tensor)
  # By the keywords beside it, without a config; its discriminator is the published one.
  succeed("convert", tmp_path / "ema.safetensors", tmp_path / "plain", "--clip", home / "clip")
  ema = "networks/generator/ema"
  jax.tree.map(np.testing.assert_array_equal, leaves(tmp_path / "plain", ema), leaves(run, ema))


@pytest.mark.slow  # another generator is initialized
def test_growing_from_a_checkpoint(home, run):
  """The averages of a smaller model, fresh blocks above them, the discriminator as it was, and a text tower as
  CLIP's.
  """
  tower = {"layers": 2, "width": 128, "heads": 4, "mlp_width": 256, "context_length": 10}
  tower["vocabulary_size"] = clip_hf.read_config(home / "clip").text.vocabulary_size
  more = [f"--config.generator.text_tower.{name}={value}" for name, value in tower.items()]
  start = (f"--config.train.init_from={run}", "--config.train.init_from_ema=true", "--config.generator.resolution=16")
  experiment = config_files.load([f"--config={CONFIG}", *flags(home), *start, *more])
  system = registry.system_class("stylegan_t")(experiment)
  abstract = step_lib.abstract_state(system)
  initialize.check(experiment)
  state, origin = initialize.first_state(system, abstract)
  assert "the averages for the parameters too" in origin and "discriminator from there too" in origin
  shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
  assert shapes(state) == shapes(abstract)
  same = lambda ours, theirs: jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  generator, average = state.networks["generator"], leaves(run, "networks/generator/ema")
  for ours in (generator.params, generator.ema):
    same(ours["synthesis"]["b8"], average["synthesis"]["b8"])
    same(ours["mapping"], average["mapping"])
    assert np.std(ours["synthesis"]["b16"]["conv0"]["weight"]) == pytest.approx(1, rel=0.1)
    frozen = clip_hf.load(home / "clip").variables["params"]
    same(ours["text_tower"], {name: frozen[name] for name in ("text", "text_projection")})
  buffers = leaves(run, "networks/generator/variables")["buffers"]
  same(generator.variables["buffers"]["mapping"], buffers["mapping"])
  assert generator.variables["buffers"]["synthesis"]["b16"]["conv0"]["noise_const"].shape == (16, 16)
  same(state.networks["discriminator"].params, leaves(run, "networks/discriminator/params"))
  same(state.networks["discriminator"].variables, leaves(run, "networks/discriminator/variables"))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(generator.opt_state)) and int(state.step) == 0
  # Back to a generator without a tower: what it learned would be lost.
  generator = dataclasses.replace(experiment.generator, text_tower=config.TextTower())
  plain = dataclasses.replace(experiment, generator=generator)
  with pytest.raises(UserError, match="a text tower of its own .2 layers. that the config leaves out"):
    registry.system_class("stylegan_t")(plain).begins_fresh(experiment)


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (["train.batch_size=12"], "train.batch_size 12 is no multiple of micro_batch.size 4 x micro_batch.count 2"),
    (["micro_batch.size=9", "train.batch_size=18"], "micro_batch.size 9 cannot be split into equal groups of at most"),
    (["micro_batch.reduction=max"], "micro_batch.reduction must be one of 'sum', 'mean', got 'max'"),
    (
      ["loss.clip_crop=64"],
      "loss.clip_crop 64: a window of that side cannot be cut out of images of generator.resolution 16",
    ),
    (["mode=freeze64"], "mode 'freeze64' goes on from a trained generator, but train.init_from names no checkpoint"),
    (["mode=freeze"], "mode must be one of 'all', 'freeze64', 'text_encoder', got 'freeze'"),
    (["mode=text_encoder"], "mode 'text_encoder' trains the generator's text tower"),
    (["discriminator.text_dim=64"], "generator.text_dim 128 and discriminator.text_dim 64 differ"),
    (["generator.noise_at_eval=some"], "generator.noise_at_eval must be one of 'const', 'none', 'random', got 'some'"),
    (["schedule.resolutions=(8, 32)", "schedule.max_images={8: 8}"], "must end with generator.resolution 16"),
  ],
)
def test_wrong_configurations(changes, message):
  fail(message, "inspect", "--config", CONFIG, *(f"--config.{change}" for change in changes))


@pytest.mark.slow
def test_a_dino_of_another_width(home, tmp_path):
  """A file with DINO's names, and no file at all."""
  sizes = dino_lib.DinoConfig(image_size=16, patch=8, width=64, depth=2, heads=1, mlp_width=16)
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), dino_lib.abstract_variables(sizes))
  save_file(dino_interop.export_dino(params, sizes), tmp_path / "dino.safetensors")
  start = ("train", "--config", CONFIG, "--workdir", tmp_path / "run", *flags(home))
  path = tmp_path / "dino.safetensors"
  fail(f"dino.path={path} is of other sizes than the config says", *start, f"--config.dino.path={path}")
  fail("width is 64, discriminator.dino.width is 128", *start, f"--config.dino.path={path}")
  fail("no.safetensors", *start, f"--config.dino.path={tmp_path / 'no.safetensors'}")
  fail(
    "embeddings are 128 wide, generator.text_dim is 64",
    *start,
    "--config.generator.text_dim=64",
    "--config.discriminator.text_dim=64",
  )
