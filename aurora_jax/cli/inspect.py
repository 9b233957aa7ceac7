"""Describes a run, a checkpoint, an exported folder, a data set, a CLIP or an experiment.

  python -m aurora_jax inspect runs/openmoji                     the story of a run: restarts, time, warnings, numbers
  python -m aurora_jax inspect runs/openmoji/checkpoints/4000    a checkpoint's parts and their sizes
  python -m aurora_jax inspect exported/hearts                   a folder of `export`: what it is, where it is from
  python -m aurora_jax inspect datasets/openmoji                 a data set's splits, source, licence, some captions
  python -m aurora_jax inspect datasets/openmoji --html page.html
                                                                 the same as a page with a sample of the images
  python -m aurora_jax inspect datasets/openmoji --verify        reads every record; lists those that are damaged
  python -m aurora_jax inspect gs://bucket/runs/openmoji         any of these may be at a gs:// or s3:// URL
  python -m aurora_jax inspect --config configs/aurora_64.py     an experiment's networks, without allocating them
  python -m aurora_jax inspect --config configs/aurora_64.py --sharding --devices 256 --config.mesh.expert=16
                                                                 where every parameter lies, on any mesh
  python -m aurora_jax inspect runs/openmoji --fingerprint       one SHA-256 of the full newest state

Two runs have the same fingerprint if and only if their states agree in every bit: networks, averages, optimizers, step.

Exit status: 0, or 2 for wrong input and for a data set in which --verify finds damage.
"""

import argparse
import json
import math
import re
import sys

from aurora_jax import config_files, local_copies, storage, text
from aurora_jax.cli import flag_types, places, standard_streams
from aurora_jax.errors import UserError
from aurora_jax.interop.hub import layout, remote
from aurora_jax.systems import registry

_IMAGES = 60  # of a page about a data set


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument(
    "path",
    type=flag_types.path,
    nargs="?",
    metavar="PATH",
    help="a run's folder, a checkpoint in it, a folder of `export` (also hf:OWNER/NAME), a data set, a CLIP folder, or "
    "a config file",
  )
  parser.add_argument("--config", metavar="FILE[:VARIANT]", help="an experiment, as of `train`")
  parser.add_argument(
    "--fingerprint",
    action="store_true",
    help="print one SHA-256 of the newest (or the named) checkpoint's whole state, nothing else",
  )
  parser.add_argument(
    "--verify",
    action="store_true",
    help="for a data set: read every record, check checksums and images, and list the corrupt ones",
  )
  parser.add_argument(
    "--html", type=flag_types.path, metavar="FILE", help="for a data set: write a page with images and captions, too"
  )
  parser.add_argument(
    "--images", type=int, metavar="N", help=f"with --html: number of images on the page (default {_IMAGES})"
  )
  parser.add_argument("--parameters", action="store_true", help="for an experiment: list every parameter")
  parser.add_argument(
    "--sharding",
    action="store_true",
    help="for an experiment: how every parameter is sharded along the axes of its mesh",
  )
  parser.add_argument(
    "--devices",
    type=int,
    metavar="N",
    help="with --sharding: the mesh's number of devices (default: mesh.data x mesh.expert)",
  )


def run(args: argparse.Namespace) -> None:
  """Prints the description."""
  if bool(args.path) == bool(args.config_argv):
    raise UserError("inspect what? Give a PATH or --config FILE")
  if args.path and re.search(r"\.py(:[\w-]*)?$", args.path):
    args.config_argv, args.path = [f"--config={args.path}"], None
  if args.fingerprint:
    if not args.path:
      raise UserError("--fingerprint is for a run or a checkpoint, not for a config")
    print(_fingerprint(places.local(args.path)))
    return
  if (args.sharding or args.devices is not None) and not args.config_argv:
    raise UserError("--sharding and --devices are for a config, not for a run")
  if args.images is not None and not args.html:
    raise UserError("--images is for --html")
  for flag in ("--verify", "--html"):
    if getattr(args, flag[2:]) and not _is_data_set(args.path):
      raise UserError(f"{flag} is for a data set's folder")
  if args.html:
    _write_page(args)
  if args.verify:
    path = places.local(args.path)
    from aurora_jax.reporting import data_summary

    lines = data_summary.verify_lines(path)
  elif args.sharding:
    lines = _sharding_lines(config_files.load(args.config_argv), args.devices)
  else:
    lines = _describe_config(args) if args.config_argv else _describe_path(places.local(args.path))
  for line in map(local_copies.shown, lines):
    print(text.printable(line) if "\n" not in line else line)
    if standard_streams.lost(sys.stdout):
      break
  error = standard_streams.lost(sys.stdout)
  if error and not standard_streams.is_reader_gone(error):
    raise UserError(f"standard output cannot be written: {error.strerror or error}")


def _is_data_set(path):
  local = path and places.local(path)
  return bool(local) and not storage.is_url(local) and (local / "manifest.json").is_file()


def _write_page(args):
  """Writes the page about a data set."""
  from aurora_jax.reporting import dataset_page

  count = _IMAGES if args.images is None else args.images
  if count < 1:
    raise UserError(f"--images must be at least 1, got {count}")
  dataset_page.write(places.local(args.path), args.html, count)


def _describe_path(path):
  """Lines about whatever stands at a path."""
  if remote.is_remote(path):
    path = remote.download(str(path))
  if not storage.is_url(path) and not path.exists():
    raise UserError(f"nothing to inspect at {path}: it does not exist")
  if places.is_checkpoint(path):
    return _checkpoint_lines(path)
  if (path / "manifest.json").is_file():
    from aurora_jax.reporting import data_summary

    return data_summary.lines(path)
  if layout.model_type(path) in registry.SYSTEMS:
    from aurora_jax.reporting import export_summary

    return export_summary.lines(path)
  stored = _json(path / "config.json") if (path / "config.json").is_file() else {}
  if "generator" in stored or "system" in stored:
    return _run_lines(path)
  if stored.get("model_type") == "clip" or "text_config" in stored:
    return _clip_lines(path, stored)
  raise UserError(
    f"{path} is no run, checkpoint, exported folder, data set or CLIP: it has no config.json or manifest.json of one"
  )


def _run_lines(path):
  """The story of a run, and what it refers to that is no longer what it was trained with."""
  from aurora_jax.reporting import run_summary
  from aurora_jax.runs import references, workdir

  yield from run_summary.lines(path)
  folder = workdir.RunFolder(path)
  found = references.of_experiment(folder.experiment())
  for line in references.refuse_changes(folder, found, list(found)):
    yield f"changed    {line}"


def _json(path):
  try:
    values = json.loads(text.read_text(path))
  except UserError:
    raise
  except ValueError as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  return values if isinstance(values, dict) else {}


def _fingerprint(path):
  from aurora_jax.runs import fingerprint, workdir

  if places.is_checkpoint(path):
    return fingerprint.of_checkpoint(path.parent, int(path.name))[1]
  if not path.is_dir():
    raise UserError(f"run folder not found: {path}")
  return fingerprint.of_checkpoint(workdir.RunFolder(path).checkpoints)[1]


def _checkpoint_lines(path):
  """A checkpoint's parts, from its description alone."""
  from aurora_jax.reporting import run_summary
  from aurora_jax.runs import checkpoint_reader

  parts = checkpoint_reader.describe(path.parent, int(path.name))
  yield f"checkpoint {path}: {int(path.name):,} steps were done"
  for name, (leaves, values, size) in parts.items():
    yield f"  {name:26s} {leaves:6,d} arrays  {values:15,d} values  {run_summary.format_bytes(size):>9s}"
  yield f"on disk    {run_summary.format_bytes(checkpoint_reader.size_bytes(path.parent, int(path.name)))}"
  stored = checkpoint_reader.stored_config(path.parent, int(path.name))
  if stored:
    yield f"config     {stored.get('name')}"
  growth = checkpoint_reader.stored_progress(path.parent, int(path.name)).get("schedule")
  if stored and growth:
    newest = growth["stages"][-1]
    yield (
      f"stage      {newest['resolution']}x{newest['resolution']} pixels since step "
      f"{newest['step']:,} ({newest['reason']})"
    )


def _clip_lines(path, stored):
  text, vision = stored.get("text_config", {}), stored.get("vision_config", {})
  yield f"CLIP       {path}"
  yield (
    f"text       width {text.get('hidden_size')}, {text.get('num_hidden_layers')} layers, "
    f"{text.get('vocab_size')} tokens, at most {text.get('max_position_embeddings')} per prompt"
  )
  yield (
    f"images     width {vision.get('hidden_size')}, {vision.get('num_hidden_layers')} layers, "
    f"{vision.get('image_size')} pixels in patches of {vision.get('patch_size')}"
  )


def _describe_config(args):
  """An experiment's networks, from shapes alone."""
  experiment = config_files.load(args.config_argv)

  import jax

  from aurora_jax.reporting import run_summary
  from aurora_jax.training import step as step_lib

  system = registry.system_class(experiment.system)(experiment)
  state = step_lib.abstract_state(system)
  count = lambda parameters: sum(leaf.size for leaf in jax.tree.leaves(parameters))
  train = experiment.train
  yield f"experiment {experiment.name}: {experiment.summary}"
  yield (
    f"length     {train.total_steps:,} steps of {train.batch_size} images = "
    f"{train.total_steps * train.batch_size / 1e6:,.2f} M images"
  )
  if experiment.schedule.resolutions:
    cfg = experiment.schedule
    yield (
      f"stages     {', '.join(f'{r} px ({_cap(cfg, r)})' for r in cfg.resolutions)}; each until its Frechet distance "
      f"is less than {cfg.factor:g} x that of real images"
    )
  yield f"data       {experiment.data.path or '(to be set: --config.data.path)'} [{experiment.data.split}]"
  if experiment.conditional:
    yield f"text       {experiment.text.clip or '(to be set: --config.text.clip)'}"
  for name in system.networks:
    parameters, label = state.networks[name].params, system.networks[name].label
    yield f"{name}: {count(parameters) / 1e6:,.2f} M parameters"
    for group, number in _grouped(parameters, label).items():
      yield f"  {group:30s} {number / 1e6:10,.2f} M"
    idle = _idle_expert_parameters(parameters, label)
    if idle:
      active = (count(parameters) - idle) / 1e6
      yield f"  a sample passes through {active:,.2f} M of them ({system.active_experts})"
    if args.parameters:
      from clu import parameter_overview

      yield parameter_overview.get_parameter_overview(parameters, include_stats=False)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  yield (
    f"training state: {run_summary.format_bytes(size)} in {len(jax.tree.leaves(state)):,} arrays (networks, averages, "
    "optimizers)"
  )


def _cap(cfg, resolution):
  if resolution == cfg.resolutions[-1]:
    return "to the end"
  return f"at most {cfg.max_images[resolution] / 1e6:,g} M images"


def _sharding_lines(experiment, devices):
  """Where every parameter is stored, on a mesh that exists only here."""
  import jax

  from aurora_jax.parallel import mesh
  from aurora_jax.reporting import run_summary
  from aurora_jax.training import step as step_lib

  cfg, batch = experiment.mesh, experiment.train.batch_size
  if devices is None:
    devices = max(cfg.data, 1) * cfg.expert
  if devices < 1:
    raise UserError(f"--devices must be positive, got {devices}")
  layout = mesh.build(cfg, batch, experiment.expert_counts, devices)
  system = registry.system_class(experiment.system)(experiment, layout)
  state = step_lib.abstract_state(system)
  axes = ", ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
  yield f"mesh       {axes} = {devices} devices"
  yield f"batch      {batch} images along all axes, {batch // devices} per device"
  yield from system.notes()
  for network, parts in state.networks.items():
    for path, leaf in jax.tree_util.tree_flatten_with_path(parts.params)[0]:
      axes = [(entry,) if isinstance(entry, str) else entry or () for entry in leaf.sharding.spec]
      cut = ", ".join(f"axis {i} along {' x '.join(names)}" for i, names in enumerate(axes) if names) or "whole"
      shard = list(leaf.sharding.shard_shape(leaf.shape))
      yield f"{network}/{'/'.join(mesh.names_of(path))}  {list(leaf.shape)} -> {shard} per device, {cut}"
  for network, parts in state.networks.items():
    for part in ("params", "ema", "opt_state"):
      leaves = jax.tree.leaves(getattr(parts, part))
      if leaves:
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        shards = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
        yield f"{network} {part}: {run_summary.format_bytes(size)}, {run_summary.format_bytes(shards)} per device"


def _grouped(parameters, label):
  """Parameter counts by group of modules, experts apart, resolutions ascending."""
  import jax

  from aurora_jax.reporting.curves import natural_key

  groups = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]:
    entry = label(path)
    name = f"{entry.group}, experts" if entry.experts else entry.group
    groups[name] = groups.get(name, 0) + leaf.size
  return {name: groups[name] for name in sorted(groups, key=natural_key)}


def _idle_expert_parameters(parameters, label):
  """Parameters of the experts that a feature point does not go to."""
  import jax

  leaves = jax.tree_util.tree_flatten_with_path(parameters)[0]
  return sum(leaf.size - leaf.size // leaf.shape[0] for path, leaf in leaves if label(path).experts)
