"""`compile`: its numbers against arithmetic by hand, the fields of its report, and the command as a user runs it."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from aurora_jax import config, config_files
from aurora_jax.cli import compile as compile_command
from aurora_jax.cli import main
from aurora_jax.parallel import mesh
from aurora_jax.performance import advice, collectives, topology
from aurora_jax.performance import compile_report as training_compile
from aurora_jax.performance import estimate as parallel_compile
from aurora_jax.systems import registry, text_encoder
from aurora_jax.systems.aurora.labels import label
from aurora_jax.training import optimizers
from aurora_jax.training import step as step_lib

_ROOT = pathlib.Path(__file__).parents[2]
_TINY = "tests/parallel/tiny_pod.py"
# Half as much to compile, and the same experts: for the compilers that are slow.
_TINIEST = (
  "--config=tests/performance/tiny_experts.py",
  "--config.generator.experts={4:4}",
  "--config.discriminator.head_layers=0",
  "--config.mesh.expert=2",
  "--config.mesh.exchange=tokens",
  "--config.train.batch_size=8",
)
_CHIP = topology.Chip(
  "test", 1000, bfloat16=4.0, float32=2.0, highest=0.5, memory_rate=10.0, link_rate=100.0, network_rate=5.0
)

# DESIGN's contract on a compile report.
_FIELDS = {
  "fits": bool,
  "chip": str,
  "devices": int,
  "mesh": dict,
  "bytes_per_device": dict,
  "flops_per_device": float,
  "useful_flops_per_device": float,
  "collectives": list,
  "experts": list,
  "step_seconds_bound": dict,
}


# Where launch/setup.sh --dev puts the compilers for absent hardware.
_COMPILERS = pathlib.Path(sys.prefix) / "compilers"


def with_compilers():
  """Environment variables of a process that finds them."""
  return {"PYTHONPATH": os.pathsep.join(filter(None, [str(_COMPILERS), os.environ.get("PYTHONPATH")]))}


def system_of(experiment):
  return registry.system_class(experiment.system)(experiment)


def command(*arguments, **environment):
  """`python -m aurora_jax compile ...` in a process."""
  return subprocess.run(
    [sys.executable, "-m", "aurora_jax", "compile", *arguments],
    capture_output=True,
    text=True,
    check=False,
    timeout=1500,
    cwd=_ROOT,
    env=os.environ | environment,
  )


def check_contract(report, devices):
  for name, kind in _FIELDS.items():
    assert isinstance(report[name], kind), (name, report[name])
  sizes = report["bytes_per_device"]
  assert {"parameters", "optimizer", "ema", "temporaries", "total", "limit"} <= set(sizes)
  assert sizes["total"] == sum(size for name, size in sizes.items() if name not in ("total", "limit"))
  assert report["fits"] == (sizes["total"] <= sizes["limit"])
  assert sum(report["flops_per_device_by_precision"].values()) == pytest.approx(report["flops_per_device"])
  assert report["devices"] == devices and np.prod(list(report["mesh"].values())) == devices
  assert 0 < report["useful_flops_per_device"] <= report["flops_per_device"] <= report["worst_routing_flops_per_device"]
  assert {"arithmetic", "memory", "interconnect", "bound", "assumptions"} == set(report["step_seconds_bound"])
  for row in report["collectives"]:
    assert row["kind"] in collectives.KINDS and row["count"] > 0 and row["bytes"] >= 0
    assert set(row["axes"]) <= set(report["mesh"])


def check_tiny(report, devices):
  """What `tiny_pod.py` and `_TINIEST` must give on any machine: four experts along an axis of two, tokens exchanged
  over it.
  """
  check_contract(report, devices)
  assert report["fits"] and report["mesh"] == {"data": devices // 2, "expert": 2} and report["whole_array_copies"] == 0
  homes = {entry["expert"]: entry["device"] for entry in report["experts"]}
  even, odd = list(range(0, devices, 2)), list(range(1, devices, 2))
  assert homes == {0: even, 1: even, 2: odd, 3: odd}
  exchanges = [row for row in report["collectives"] if row["kind"] == "all-to-all"]
  assert exchanges and all(row["axes"] == ["expert"] and not row["fallback"] for row in exchanges)
  assert [row["program"] for row in report["collectives"] if row["kind"] == "all-reduce" and "data" in row["axes"]]
  assert {name: program["share_of_steps"] for name, program in report["programs"].items()} == {
    "networks": 1.0,
    "r1": 0.5,
  }


@pytest.mark.slow
def test_as_a_user_on_a_cpu_stand_in(tmp_path):
  path, cache = tmp_path / "r.json", tmp_path / "cache"
  done = command("--config", _TINY, "--topology", "cpu-4", "--report", str(path), "--explain", "--cache", str(cache))
  assert done.returncode == 0, done.stderr[-3000:]
  assert {entry.name for entry in tmp_path.iterdir()} == {"r.json", "cache"}
  # Programs for train: that it asks for the very same is seen in test_compile_arguments.py.
  kept = {entry.name.rpartition("-")[0].rpartition("-")[0] for entry in cache.iterdir()}
  assert {"jit_networks", "jit_r1"} <= kept
  report = json.loads(path.read_text())
  check_tiny(report, 4)
  assert "tiny_pod on cpu-4: 4 x CPU, mesh data 2 x expert 2" in done.stdout
  assert "4 experts, 2 per device: synthesis/r4_block0_attention/layer_0/feed_forward" in done.stdout
  assert "It fits with" in done.stdout and "all-to-all" in done.stdout

  # The state's bytes by hand: experts are halved by an expert axis of two, all else is whole.
  state = jax.eval_shape(
    optimizers.init_state(system_of(config_files.load([f"--config={_ROOT / _TINY}"]))), jax.random.key(0)
  )
  expected = sum(
    4 * leaf.size // (2 if label(path).experts else 1)
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.networks["generator"].ema)[0]
  )
  assert report["bytes_per_device"]["ema"] == expected
  assert report["bytes_per_device"]["batch"] == 2 * (4 * 8 * 8 * 3 + 4 + 4 * 77)


def test_an_interrupted_compile_keeps_the_programs_that_are_done(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "environ", dict(os.environ))
  with pytest.raises(KeyboardInterrupt), compile_command._kept_in(str(tmp_path)) as keep:
    new = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    (new / "jit_networks-0-cache").write_bytes(b"a program")
    keep()
    (new / "jit_r1-0-cache").write_bytes(b"half a")
    raise KeyboardInterrupt
  assert [entry.name for entry in tmp_path.iterdir()] == ["jit_networks-0-cache"]


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("name, devices, chip", [("v5e:2x2", 4, "TPU v5e"), ("a100-8", 8, "A100 SXM4 80 GB")])
def test_compiles_for_absent_hardware(tmp_path, name, devices, chip):
  """With the real compilers, of requirements-compilers.txt; without them this fails and says what to install."""
  path = tmp_path / "r.json"
  done = command(
    *_TINIEST,
    "--topology",
    name,
    "--report",
    str(path),
    "--config.mesh.fsdp=True",
    "--config.mesh.fsdp_over=expert",
    **with_compilers(),
  )
  assert done.returncode == 0 and done.stderr == "", done.stderr[-3000:]
  report = json.loads(path.read_text())
  check_tiny(report, devices)
  assert report["chip"] == chip
  # Of the gradients of what is cut a device gets its own piece alone.
  assert any(row["kind"] == "reduce-scatter" and row["axes"] == ["expert"] for row in report["collectives"])
  bound = report["step_seconds_bound"]
  assert 0 < bound["arithmetic"] < bound["memory"] and 0 < bound["interconnect"]
  assert bound["bound"] == max(bound["arithmetic"], bound["memory"], bound["interconnect"]) < 0.01


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config", _TINY, "--topology", "v9-8"], "no topology 'v9-8'"),
    (["--config", "no/such.py", "--topology", "cpu-2"], "config file not found: no/such.py"),
    (["--config", _TINY, "--topology", "cpu-2", "--report", "no/such/r.json"], "no folder no/such"),
  ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys):
  monkeypatch.chdir(_ROOT)
  assert main.main(["compile", *arguments]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1, error


@pytest.mark.slow
def test_a_mesh_that_does_not_divide_the_topology_is_one_line():
  done = command("--config", _TINY, "--topology", "cpu-3")
  assert done.returncode == 2 and "makes 2 devices, there are 3" in done.stderr and done.stderr.count("\n") == 1


def _collective(kind, size, groups):
  return collectives.Collective(kind, ("data",), size, groups)


def test_seconds_on_links():
  one_node, two_nodes = [0] * 4, [0, 0, 1, 1]
  group, pairs = ((0, 1, 2, 3),), ((0, 2), (2, 0))
  seconds = parallel_compile.link_seconds
  assert seconds(_collective("all-gather", 1000, group), _CHIP, one_node) == 750 / 100
  # Half of the whole lies on the other node; two members share the ports: 1000 / 2 / 2 each at 5 a second.
  assert seconds(_collective("all-gather", 1000, group), _CHIP, two_nodes) == 250 / 5
  assert seconds(_collective("all-reduce", 1000, group), _CHIP, two_nodes) == 500 / 5
  assert seconds(_collective("all-to-all", 1000, group), _CHIP, two_nodes) == 500 / 5
  assert seconds(_collective("all-gather", 1000, ((0, 1), (2, 3))), _CHIP, two_nodes) == 500 / 100
  assert seconds(_collective("collective-permute", 1000, pairs), _CHIP, one_node) == 1000 / 100
  assert seconds(_collective("collective-permute", 1000, pairs), _CHIP, two_nodes) == 1000 / 5
  assert seconds(_collective("all-gather", 1000, group), topology.Chip("?", 1), one_node) is None


def test_the_largest_of_three_is_the_bound():
  bound = parallel_compile.step_seconds(_CHIP, flops={"bfloat16": 8.0}, traffic=50.0, link=1.0)
  assert (bound["arithmetic"], bound["memory"], bound["interconnect"], bound["bound"]) == (2.0, 5.0, 1.0, 5.0)
  assert parallel_compile.step_seconds(_CHIP, {"float32": 80.0}, 50.0, None)["bound"] == 40.0
  mixed = {"bfloat16": 8.0, "float32": 4.0, "float32, highest": 3.0}
  assert parallel_compile.step_seconds(_CHIP, mixed, 50.0, None)["arithmetic"] == 2.0 + 2.0 + 6.0
  assert parallel_compile.step_seconds(topology.Chip("?", 1), {"float32": 1.0}, 1.0, None)["bound"] is None


class _Program:
  """A compiled program whose sizes one can choose."""

  def __init__(self, arguments, outputs, aliased, temporaries, code):
    self._stats = types.SimpleNamespace(
      argument_size_in_bytes=arguments,
      output_size_in_bytes=outputs,
      alias_size_in_bytes=aliased,
      temp_size_in_bytes=temporaries,
      generated_code_size_in_bytes=code,
    )

  def memory_analysis(self):
    return self._stats


def _compiled(name, executable, used=None):
  memory = executable and parallel_compile.memory_of(executable)
  refusal = "" if executable else "Used ..."
  return training_compile.Compiled(name, memory, None, None, 1.0, 10, {"float32": 10}, 10, refusal, used, 0)


_RESIDENT = {"parameters": 40, "optimizer": 20, "ema": 12, "buffers": 4, "frozen": 8, "batch": 16}


def test_memory_is_what_is_there_and_what_the_largest_program_adds():
  programs = {
    "networks": _compiled("networks", _Program(103, 80, 76, 500, 30)),
    "r1": _compiled("r1", _Program(90, 76, 76, 506, 5)),
  }
  sizes = training_compile.memory(_RESIDENT, programs, 100, limit=1000)
  # "networks": three bytes of padding, four that replace nothing. "r1" needs one byte less in all.
  assert sizes == _RESIDENT | {
    "code": 35,
    "padding": 3,
    "outputs": 4,
    "temporaries": 500,
    "total": 642,
    "limit": 1000,
  }


def test_where_the_compiler_refused_its_own_sum_counts():
  programs = {"networks": _compiled("networks", None, used=5000), "r1": _compiled("r1", _Program(100, 76, 76, 200, 5))}
  sizes = training_compile.memory(_RESIDENT, programs, 100, limit=1000)
  assert sizes["total"] == 5000 and sizes["temporaries"] == 5000 - 105


def test_a_refusal_is_understood_and_other_errors_are_not_hidden():
  error = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.50G of 15.75G "
    "hbm. Exceeded hbm capacity by 4.75G."
  )
  assert training_compile._refusal(error) == ("Used 20.50G of 15.75G hbm", round(20.5 * 2**30))
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    training_compile._refusal(jax.errors.JaxRuntimeError("INTERNAL: no"))


# Compiles some functions for topologies of one platform, in one process: loading a compiler takes seconds.
_FUNCTIONS = """
import sys
from aurora_jax.performance import topology
names = [topology.parse(text) for text in sys.argv[1:]]
topology.prepare_environment(names[0])
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from aurora_jax.ops import modulated_conv
from aurora_jax.parallel import mesh as mesh_lib

def per_sample(devices):
  mesh = Mesh(devices, "batch")
  shape = lambda sizes, *axes: jax.ShapeDtypeStruct(sizes, "bfloat16", sharding=NamedSharding(mesh, PartitionSpec(*axes)))
  run = jax.grad(lambda *arguments: modulated_conv.modulated_conv(*arguments).astype("float32").sum(), (0, 1, 2, 3))
  batch = 2 * len(devices)
  x, weight = shape((batch, 16, 16, 8), "batch"), shape((2, 3, 3, 8, 16))
  style, mix = shape((batch, 8), "batch"), shape((batch, 2), "batch")
  return jax.jit(run).lower(x, weight, style, mix)

def sharded_over_all(devices):
  axes = "data", "expert0", "expert1"
  mesh = jax.make_mesh((1, 4, 4), axes, axis_types=(AxisType.Auto,) * 3, devices=devices)
  layout = mesh_lib.Layout(mesh, mesh_lib.Rules(batch=axes, experts=axes[1:], dense=axes[1:]))
  def loss(weight, x):
    weight = layout.unshard({"w": weight}, lambda path: mesh_lib.ParamLabel())["w"]
    return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).var()
  sharding = layout.parameter(mesh_lib.ParamLabel(), (3, 3, 256, 256))
  weight = jax.ShapeDtypeStruct((3, 3, 256, 256), "bfloat16", sharding=sharding)
  x = jax.ShapeDtypeStruct((64, 8, 8, 256), "bfloat16", sharding=layout.batch)
  return jax.jit(jax.grad(loss), out_shardings=sharding).lower(weight, x)

for name, function in zip(names, (per_sample, sharded_over_all)):
  print(function(topology.load(name).devices).compile().as_text(), "END OF PROGRAM")
"""  # noqa: E501


@functools.cache
def compiled_functions(*topologies):
  """The texts of the compiled functions: `per_sample` for the first topology, `sharded_over_all` for a second one."""
  done = subprocess.run(
    [sys.executable, "-c", _FUNCTIONS, *topologies],
    capture_output=True,
    text=True,
    check=False,
    cwd=_ROOT,
    env=os.environ | with_compilers(),
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout.split("END OF PROGRAM")


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("topologies", [("v5e:2x2", "v5e:4x4"), ("a100-8",)], ids=str)
def test_per_sample_filters_stay_with_their_samples(topologies):
  """Forward and backward, no device sees another one's samples or filters. Only gradients of the weights are summed."""
  text = compiled_functions(*topologies)[0]
  assert " all-reduce" in text and "all-gather" not in text and "all-to-all" not in text


@pytest.mark.slow
@pytest.mark.usefixtures("libtpu")
def test_gradients_of_parameters_that_are_sharded_over_all_devices_are_reduce_scattered():
  text = compiled_functions("v5e:2x2", "v5e:4x4")[1]
  found, _ = collectives.of_program(text, {"data": 1, "expert0": 4, "expert1": 4})
  assert {c.kind for c in found if c.size > 1000} == {"all-gather", "reduce-scatter"}, found


@pytest.mark.parametrize("width, model", [(768, "ViT-L/14"), (512, "ViT-B/32"), (32, "train-clip")])
def test_a_clip_that_is_not_there_is_guessed_by_its_width(width, model):
  sizes, said = text_encoder.clip_config("", width)
  assert sizes.text.width == width and model in said and "not set" in said
  assert text_encoder.clip_config("no/such", width) == (
    sizes,
    said.replace("text.clip is not set", "nothing at text.clip=no/such"),
  )


@pytest.mark.slow
def test_advice_names_fields_and_exact_savings():
  """On eight abstract devices with room for next to nothing."""
  experiment = config_files.load(
    [f"--config={_ROOT / _TINY}", "--config.mesh.expert=1", "--config.generator.remat=False"]
  )
  machine = topology.Topology(topology.parse("a100-8"), _CHIP, [None] * 8, 8)

  def size(**changes):
    layout = mesh.build(config.Mesh(**changes), experiment.train.batch_size, experiment.expert_counts, 8)
    state = step_lib.abstract_state(registry.system_class("aurora")(experiment, layout))
    return sum(training_compile.state_bytes(state).values())

  report = {"fits": False, "devices": 8, "bytes_per_device": {"total": 3 * 2**30, "limit": 2**30, "temporaries": 2**31}}
  lines = advice.lines(experiment, machine, report)
  assert lines[0] == "It is 2.00 GiB per device too large."
  saved = size() - size(fsdp=True)
  assert saved > 0 and f"mesh.fsdp=True saves {saved / 2**30:.4f} GiB" in lines[1]
  text = "\n".join(lines)
  assert "mesh.expert=4 mesh.data=2 saves" in text and "mesh.expert=8" not in text  # eight do not divide four experts
  for field in ("generator.remat=True", "discriminator.remat=True", "generator.compute_dtype=bfloat16"):
    assert field in text
  assert "train.batch_size" not in text  # one image per device is the least
