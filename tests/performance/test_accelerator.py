"""`bench accelerator`: its parts at small sizes on a CPU, what a failure costs, and which packages it needs."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aurora_jax import config_files
from aurora_jax.cli import main
from aurora_jax.config import Ema, Optimizer
from aurora_jax.errors import UserError
from aurora_jax.ops import attention, moe
from aurora_jax.parallel.mesh import ParamLabel
from aurora_jax.performance import (
  accelerator,
  accelerator_goldens,
  accelerator_inputs,
  accelerator_kernels,
  accelerator_sampling,
  accelerator_training,
  chips,
  estimate,
)
from aurora_jax.systems import base

_ROOT = pathlib.Path(__file__).parents[2]

# Of requirements.txt, what a machine with an accelerator need not have.
_ABSENT = (
  "clu",
  "grain",
  "ml_collections",
  "tensorflow",
  "tensorboard",
  "google",
  "google_crc32c",
  "resvg_py",
  "emoji",
)
_BARE = f"""
import sys
for name in {_ABSENT}:
  sys.modules[name] = None
import importlib
from aurora_jax.cli import main
from aurora_jax.performance import accelerator
for part in accelerator.PARTS.values():
  assert callable(getattr(importlib.import_module("aurora_jax.performance." + part.module), part.function))
from aurora_jax import config_files
from aurora_jax.systems import registry
experiment = config_files.load(["--config=configs/aurora_64.py"])
assert experiment.generator.remat and experiment.loss.level_weights[64] == 0.33
package = registry.SYSTEMS[experiment.system]
for module in ("system", "released", "torch_names", "modeling_aurora"):
  importlib.import_module(package + "." + module)
from aurora_jax.errors import UserError
try:
  config_files.load(["--config=configs/aurora_64.py", "--config.train.seed=1"])
except UserError as error:
  assert "pip install ml_collections" in str(error)
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.fixture(name="run_of")
def _run_of(tmp_path):
  """`run_of(config)`: a `Run` with a minute, and the list of what it saved."""

  def make(config="configs/aurora_64.py:test"):
    saved = []
    save = lambda results: saved.append(json.loads(json.dumps(results)))
    return accelerator_inputs.Run(config, True, tmp_path, time.monotonic() + 600, save), saved

  return make


@pytest.mark.slow
def test_it_runs_from_a_bare_python(tmp_path):
  pytest.importorskip("torch")
  (tmp_path / "parts").mkdir()
  # As the command starts a part.
  flags = ["bench", "accelerator", "--toy", "--part", "device", "--out", str(tmp_path), "--end", str(time.time() + 600)]
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", _BARE, *flags], cwd=_ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  accelerator.write_tables(tmp_path)
  found = json.loads((tmp_path / "accelerator.json").read_text())["parts"]["device"]
  assert found["status"] == "done" and found["results"]["platform"] == "cpu"
  assert [row["tflops_per_second"] > 0 for row in found["results"]["rows"][:3]] == [True] * 3
  assert "product of 256 x 256, bfloat16" in (tmp_path / "accelerator.md").read_text()


def test_a_failed_part_is_listed_and_the_others_run(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(accelerator_goldens, "FOLDER", tmp_path / "nowhere")
  parts = {name: accelerator.PARTS[name] for name in ("goldens", "device")}
  monkeypatch.setattr(accelerator, "PARTS", parts)
  here = lambda out, config, name, budget, toy: accelerator.run_here(out, config, name, time.time() + budget, toy)
  monkeypatch.setattr(accelerator, "_run_apart", here)
  assert main.main(["bench", "accelerator", "--toy", "--out", str(tmp_path)]) == 1
  found = json.loads((tmp_path / "accelerator.json").read_text())["parts"]
  assert found["device"]["status"] == "done" and found["goldens"]["status"] == "failed"
  assert "no tiny16.config.json" in found["goldens"]["reason"] and "run from a checkout" in found["goldens"]["reason"]
  assert "| goldens | failed |" in (tmp_path / "accelerator.md").read_text()
  assert "goldens: at most" in capsys.readouterr().out


def test_a_part_that_hangs_or_dies_is_stopped_and_keeps_what_it_measured(tmp_path, monkeypatch):
  (tmp_path / "parts").mkdir()
  monkeypatch.setattr(accelerator, "_GRACE", 0.0)
  accelerator._store(tmp_path, "device", "running", "", 0.0, {"platform": "tpu", "doing": "compiling"})
  accelerator._run_apart(tmp_path, "nowhere.py", "device", 0.05, True)
  found = json.loads((tmp_path / "parts/device.json").read_text())
  assert found["status"] == "failed" and found["results"] == {"platform": "tpu"}
  assert found["reason"] == "stopped: its 0 s were over (compiling)"


@pytest.mark.slow
def test_a_part_that_ends_by_itself_in_its_own_process(tmp_path):
  """The whole way: the command starts a process for the part, and reads what it wrote."""
  assert (
    main.main(["bench", "accelerator", "--toy", "--part", "goldens", "--config", "nowhere.py", "--out", str(tmp_path)])
    == 1
  )
  found = json.loads((tmp_path / "parts/goldens.json").read_text())
  assert found["status"] == "failed" and "nowhere.py" in found["reason"]
  assert "| goldens | failed |" in (tmp_path / "accelerator.md").read_text()


@pytest.mark.parametrize(
  "flags, said",
  [
    (["--toy"], "--out DIR"),
    (["--toy", "--out", "OUT", "--part", "tables"], "no part 'tables'; there are device, goldens"),
    (["--toy", "--out", "OUT", "--minutes", "0"], "--minutes must be more than 0"),
    (["--toy", "--out", "OUT", "--config.train.seed=3"], "takes a config file as it is"),
    (["--toy", "--out", "OUT", "--batch", "3"], "not for `bench accelerator`"),
  ],
)
def test_bad_flags(flags, said, tmp_path, capsys):
  flags = [str(tmp_path) if flag == "OUT" else flag for flag in flags]
  assert main.main(["bench", "accelerator", *flags]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and said in error


@pytest.mark.slow
def test_goldens_decide_at_the_highest_precision(run_of, monkeypatch):
  run, saved = run_of()
  generator, cfg, released, variables, io = case = accelerator_goldens._read(run)
  assert generator.cfg == cfg and set(variables) == {"params", "buffers"} and "grad.loss" in io
  monkeypatch.setattr(accelerator_goldens, "_read", lambda run: case)
  for worst, moved, passes in ((9e-4, 0, True), (1.1e-3, 0, False), (1e-6, 1, False), (float("nan"), 0, False)):
    numbers = dict.fromkeys(("image", "w", "moe_loss", "router_logits"), 1e-6) | {"gradient": worst}
    found = numbers | {"tokens": 8, "tokens_at_another_expert": moved}
    monkeypatch.setattr(accelerator_goldens, "_compare", lambda *case, found=found: found)
    if passes:
      assert accelerator_goldens.measure(run)["rows"][-1]["precision"] == "highest"
    else:
      with pytest.raises(UserError, match="at the highest precision"):
        accelerator_goldens.measure(run)
    assert saved[-1]["rows"][-1]["tokens_at_another_expert"] == moved


@pytest.mark.slow
def test_experts_and_attention(run_of, monkeypatch):
  monkeypatch.setattr(moe, "BACKENDS", ("dense",))
  monkeypatch.setattr(attention, "IMPLEMENTATIONS", ("xla",))
  monkeypatch.setitem(accelerator_kernels._ATTENTION, True, {"cross-attention": (1, 16, 7, 2, 8)})
  run, saved = run_of()
  rows = accelerator_kernels.measure_experts(run)["rows"]
  assert [(row["experts"], row.get("routing"), row["pass"]) for row in rows] == [
    (1, None, "forward"),
    (1, None, "forward and backward"),
    (4, "balanced", "forward"),
    (4, "one expert", "forward"),
    (4, "balanced", "forward and backward"),
    (4, "one expert", "forward and backward"),
  ]
  assert all(row["milliseconds"] > 0 for row in rows)
  assert rows[0]["useful_tflops"] == pytest.approx(6e-12 * 256 * 32 * 64)
  assert rows[1]["useful_tflops"] == pytest.approx(3 * rows[0]["useful_tflops"])
  rows = accelerator_kernels.measure_attention(run)["rows"]
  assert [row["pass"] for row in rows] == ["forward", "forward and backward"] and saved[-1]["rows"] == rows
  monkeypatch.setattr(moe, "BACKENDS", ("no such backend",))
  with pytest.raises(UserError, match="4 rows failed, the first: .*no such backend"):
    accelerator_kernels.measure_experts(run)


class _Line(base.System):
  """One matrix that learns to reproduce images; its lazy phase runs every second step."""

  def __init__(self, experiment):
    super().__init__(experiment)
    label = lambda path: ParamLabel(module="line", group="line")
    self.networks = {"generator": base.Network("g", Optimizer(), label, Ema())}
    self.module = nn.Dense(3)

  def init(self, key):
    return {"generator": self.module.init(key, jnp.zeros((1, 3)))}

  def batch_spec(self, batch_size):
    image = jax.ShapeDtypeStruct((batch_size, 4, 4, 3), jnp.float32)
    return {"image": image, "tokens": jax.ShapeDtypeStruct((batch_size, 30), jnp.int32)}

  def phases(self, update):
    def run(state, frozen, batch, key):
      loss = lambda params: jnp.mean((self.module.apply({"params": params}, batch["image"]) - batch["image"]) ** 2)
      value, gradients = jax.value_and_grad(loss)(state.networks["generator"].params)
      metrics = {"loss/g": value, "moe/load/a": jnp.array([0.25, 0.75])}
      state, _, metrics = update(state, "generator", gradients, metrics)
      return state, metrics

    return [base.Phase("main", run), base.Phase("lazy", run, every=2)]


@dataclasses.dataclass(frozen=True)
class _LineRun(accelerator_inputs.Run):
  def system(self, experiment):
    return _Line(experiment)


@pytest.mark.slow
def test_a_training_step_and_its_profile(run_of, monkeypatch):
  run, saved = run_of()
  run = _LineRun(**{field.name: getattr(run, field.name) for field in dataclasses.fields(run)})
  sheet = chips.Chip("test", 1, bfloat16=2e9, float32=1e9, highest=1e8)
  monkeypatch.setattr(accelerator_inputs, "chip", lambda: sheet)
  monkeypatch.setitem(accelerator_training.BATCHES, True, (2, 4, 8))
  compile_phases, refused = accelerator_training._compile, []

  def too_large_at_last(run, step, frozen):
    if step.system.experiment.train.batch_size == 8:
      refused.append(8)
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    return compile_phases(run, step, frozen)

  monkeypatch.setattr(accelerator_training, "_compile", too_large_at_last)
  results = accelerator_training.measure(run)
  assert [row["batch"] for row in results["batches_tried"]] == [2, 4, 8] and refused == [8]
  assert results["batch"] == 4 and "RESOURCE_EXHAUSTED" in results["batches_tried"][2]["error"]
  assert results["batches_tried"][1]["milliseconds"] == results["step"]["milliseconds"]
  # What was measured at the smaller batch was saved before the larger one was compiled.
  assert any(results_so_far["batch"] == 2 for results_so_far in saved if results_so_far.get("step"))
  main_phase, lazy = results["phases"]
  step = main_phase["milliseconds"] + lazy["milliseconds"] / 2
  assert results["step"]["milliseconds"] == pytest.approx(step)
  assert results["step"]["images_per_second"] == pytest.approx(4e3 / step)
  # Forward and the gradient of the weights: 2 x 2 x 64 x 3 x 3 of each phase.
  assert main_phase["useful_tflops"] == pytest.approx(4 * 64 * 9 / 1e12)
  assert main_phase["share_of_own_peak"] == pytest.approx(4 * 64 * 9 / 1e9 / (main_phase["milliseconds"] / 1e3))
  assert results["fullest_expert"] == 1.5 and results["predicted_memory_bytes"] > 0
  assert results["kernels"] and sum(row["share"] for row in results["kernels"]) <= 1.001
  assert "loss/g" in results["metrics"]


@pytest.mark.slow
def test_sampling_beside_the_twin(run_of, monkeypatch):
  pytest.importorskip("torch")
  monkeypatch.setitem(accelerator_sampling._BATCHES, True, (2,))
  monkeypatch.setattr(accelerator_sampling, "_DTYPES", ("bfloat16", "float32"))
  run, _ = run_of(str(pathlib.Path(__file__).parent / "tiny_experts.py"))
  ours = accelerator_sampling.measure(run)
  twin = accelerator_sampling.measure_pytorch(run)
  assert ours["parameters"] == twin["parameters"] and ours["kernels"]
  assert [row["images_per_second"] == pytest.approx(2 / row["seconds"]) for row in ours["rows"]] == [True, True]
  assert 1 <= ours["rows"][0]["fullest_expert"] <= 2
  assert twin["rows"][0]["relative_difference_from_jax"] < 1e-4


def test_random_weights_do_not_repeat_between_experts():
  shapes = {"weight": jax.ShapeDtypeStruct((4, 512, 4096), np.float32), "scale": jax.ShapeDtypeStruct((3,), np.float32)}
  values = accelerator_inputs.filled(shapes, 0)
  first, *others = values["weight"]
  assert all(np.abs(np.corrcoef(first[:64].ravel(), other[:64].ravel())[0, 1]) < 0.01 for other in others)
  assert values["weight"].std() == pytest.approx(1, rel=0.01) and (values["scale"] == 1).all()


def test_without_ml_collections_a_config_file_means_the_same(monkeypatch):
  whole = config_files.load(["--config=configs/aurora_64_h100_64.py"])
  monkeypatch.setitem(sys.modules, "ml_collections", None)
  assert config_files.load(["--config=configs/aurora_64_h100_64.py"]) == whole


def test_the_first_batch_surely_fits():
  """The full model (a state of 23 GiB) on cards of 40, 80 and 141 GB, and on one that is too small."""
  batches, state = accelerator_training.BATCHES[False], 23 << 30
  first = lambda gib: accelerator_training.first_batch(state, round(gib * 2**30), batches)
  assert [first(gib) for gib in (38, 75, 132, 8)] == [1, 16, 32, 1]
  assert accelerator_training.first_batch(state, None, batches) == 1


def test_the_next_batch_is_the_largest_that_fits():
  """By the memory of the programs for 16 images: of 20 GiB of temporaries 4 are gradients, so an image takes 1."""
  gib = 1 << 30
  placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = lambda size: jax.ShapeDtypeStruct(size, np.float32, sharding=placed)
  network = base.NetworkState({"weight": shape((gib,))}, {}, {}, None)
  step = types.SimpleNamespace(state=base.TrainState(shape(()), {"generator": network}))
  ready = types.SimpleNamespace(memory=estimate.Memory(20 * gib, gib, 20 * gib, gib), step=step)
  following = lambda limit: accelerator_training.next_batch(ready, 16, limit * gib, (8, 16, 32, 64, 128))
  assert [following(limit) for limit in (57, 58, 89, 90, 200)] == [None, 32, 32, 64, 128]


@pytest.mark.slow
def test_a_phase_that_is_not_compiled_in_time_is_named(run_of, monkeypatch):
  run, _ = run_of()
  run = _LineRun(**{field.name: getattr(run, field.name) for field in dataclasses.fields(run)})
  compile_phases = accelerator_training._compile
  without_lazy = lambda *arguments: ([compile_phases(*arguments)[0][0], None], compile_phases(*arguments)[1])
  monkeypatch.setattr(accelerator_training, "_compile", without_lazy)
  monkeypatch.setitem(accelerator_training.BATCHES, True, (2,))
  kept = {}
  run = dataclasses.replace(run, save=kept.update)
  with pytest.raises(UserError, match="batch 2: no time was left to compile lazy"):
    accelerator_training.measure(run)
  assert [row["phase"] for row in kept["phases"]] == ["main"] and kept["step"] is None
