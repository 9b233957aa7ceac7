"""Tells in words what something is: a run, a checkpoint, a data set, a CLIP, or an experiment.

  python -m aurora_jax inspect runs/openmoji                     the story of a run: steps, restarts, newest numbers
  python -m aurora_jax inspect runs/openmoji/checkpoints/4000    a checkpoint's parts and their sizes
  python -m aurora_jax inspect datasets/openmoji                 a data set's splits, source, licence, some captions
  python -m aurora_jax inspect datasets/openmoji --verify        reads every record; lists those that are damaged
  python -m aurora_jax inspect --config configs/aurora_64.py     an experiment's networks, without allocating them
  python -m aurora_jax inspect --config configs/aurora_64.py --sharding --devices 256 --config.mesh.expert=16
                                                                 where every parameter lies, on any mesh
  python -m aurora_jax inspect runs/openmoji --fingerprint       one SHA-256 of the full newest state

Two runs have the same fingerprint if and only if their states agree in every bit: networks, averages, optimisers, step.

Exit status: 0, or 2 for wrong input and for a data set in which --verify finds damage.
"""

import json
import math
import pathlib
import re

from aurora_jax import config
from aurora_jax.errors import UserError

_CAPTIONS_SHOWN = 6


def add_arguments(parser):
  parser.add_argument("path", nargs="?", metavar="PATH",
                      help="a run's folder, a checkpoint in it, a data set, a CLIP folder, or a config file")
  parser.add_argument("--config", metavar="FILE[:VARIANT]", help="an experiment, as of `train`")
  parser.add_argument("--fingerprint", action="store_true",
                      help="print one SHA-256 of the newest (or the named) checkpoint's whole state, nothing else")
  parser.add_argument("--verify", action="store_true",
                      help="for a data set: read every record, checksums and pictures, and list what is damaged")
  parser.add_argument("--parameters", action="store_true", help="for an experiment: list every parameter")
  parser.add_argument("--sharding", action="store_true",
                      help="for an experiment: how every parameter is cut along the axes of its mesh")
  parser.add_argument("--devices", type=int, metavar="N",
                      help="with --sharding: the mesh's number of devices (default: mesh.data x mesh.expert)")


def run(args):
  if bool(args.path) == bool(args.config_argv):
    raise UserError("inspect what? Give a PATH or --config FILE")
  if args.path and re.search(r"\.py(:[\w-]*)?$", args.path):
    args.config_argv, args.path = [f"--config={args.path}"], None
  if args.fingerprint:
    if not args.path:
      raise UserError("--fingerprint is for a run or a checkpoint, not for a config")
    print(_fingerprint(pathlib.Path(args.path)))
    return
  if (args.sharding or args.devices is not None) and not args.config_argv:
    raise UserError("--sharding and --devices are for a config, not for a run")
  if args.verify:
    if not args.path or not (pathlib.Path(args.path) / "manifest.json").is_file():
      raise UserError("--verify is for a data set's folder")
    lines = _verify_lines(pathlib.Path(args.path))
  elif args.sharding:
    lines = _sharding_lines(config.load(args.config_argv), args.devices)
  else:
    lines = _describe_config(args) if args.config_argv else _describe_path(pathlib.Path(args.path))
  for line in lines:
    print(line)


def _describe_path(path):
  """Lines about whatever stands at a path."""
  if not path.exists():
    raise UserError(f"nothing to inspect at {path}: it does not exist")
  if _is_checkpoint(path):
    return _checkpoint_lines(path)
  if (path / "manifest.json").is_file():
    return _data_lines(path)
  stored = _json(path / "config.json") if (path / "config.json").is_file() else {}
  if "generator" in stored:
    return _run_lines(path)
  if stored.get("model_type") == "clip" or "text_config" in stored:
    return _clip_lines(path, stored)
  raise UserError(f"{path} is no run, checkpoint, data set or CLIP: it has no config.json or manifest.json of one")


def _is_checkpoint(path):
  return path.name.isdigit() and path.parent.name == "checkpoints"


def _json(path):
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  return values if isinstance(values, dict) else {}


def _fingerprint(path):
  from aurora_jax.training import fingerprint  # pylint: disable=g-import-not-at-top

  if _is_checkpoint(path):
    return fingerprint.of_checkpoint(path.parent, int(path.name))[1]
  if not path.is_dir():
    raise UserError(f"run folder not found: {path}")
  return fingerprint.of_checkpoint(path / "checkpoints")[1]


def _run_lines(path):
  """The story of a run in a screen."""
  from aurora_jax.training import (  # pylint: disable=g-import-not-at-top
      checkpoint, kept, metrics, progress, run_folder, skipped)

  folder = run_folder.RunFolder(path)
  experiment = folder.experiment()
  rows = metrics.history(folder.metrics)
  everything = metrics.read(folder.metrics)
  steps = checkpoint.steps(folder.checkpoints)
  train = experiment.train
  measured = [row for row in rows if row["kind"] == "train"]
  last = rows[-1] if rows else {"step": 0, "seconds": 0.0}

  yield f"run        {path} ({experiment.name})"
  yield f"trains     {_networks_in_words(experiment)}"
  yield f"on         {experiment.data.path} [{experiment.data.split}], text by {experiment.text.clip}"
  parts = checkpoint.only_parts(folder.checkpoints) if steps else None
  if parts is not None:
    yield f"converted  {', '.join(parts)}: to sample from, or to begin a run with (--config.train.init_from={path})"
    yield f"saved      {_bytes(checkpoint.size_bytes(folder.checkpoints, steps[-1]))}"
    return
  yield (f"progress   step {last['step']:,} of {train.total_steps:,}, {last['step'] * train.batch_size:,} images in "
         f"batches of {train.batch_size}, {progress.duration(last['seconds'])} of training")
  if measured:
    rate = measured[-1].get("images_per_second")
    yield f"speed      {rate:,.1f} images/s in the last window" if rate else "speed      unknown"
  yield f"ended      {_ending(everything, run_folder.is_held(path))}"
  resumes = [row for row in everything if row["kind"] == "resume"]
  if resumes:
    at = ", ".join(f"{row['step']:,}" for row in resumes[-8:])
    earlier = "..., " if len(resumes) > 8 else ""
    yield f"restarts   {len(resumes)}, from step{'s' if len(resumes) > 1 else ''} {earlier}{at}"
    for row in resumes:
      for name, (old, new) in (row.get("changed") or {}).items():
        yield f"           at {row['step']:,}: {name} {json.dumps(old)} -> {json.dumps(new)}"
  else:
    yield "restarts   none"
  listed = skipped.read(folder.skipped_records)
  if listed:
    yield (f"skipped    {len(listed):,} record{'s' if len(listed) > 1 else ''} of the data set that could not be read, "
           f"listed in {folder.skipped_records}; the newest, at step {listed[-1].step:,}:")
    yield f"           {listed[-1]}"
  if steps:
    policy = kept.of_run(train, folder.metrics)
    reasons = policy.reasons(steps)
    for i, step in enumerate(steps):
      size, why = _bytes(checkpoint.size_bytes(folder.checkpoints, step)), "; ".join(reasons[step])
      yield f"{'saved' if not i else '':10s} step {step:,} ({size}), {why or 'goes with the next save'}"
    if policy.best and not policy.values():
      yield f"           WARNING: no line of {folder.metrics} has train.keep_best's metric {policy.metric}"
  else:
    yield "saved      nothing yet"
  samples = sorted(folder.samples.glob("step-*.png")) if folder.samples.is_dir() else []
  yield f"samples    {len(samples)}, newest {samples[-1]}" if samples else "samples    none yet"
  yield f"report     {folder.report if folder.report.is_file() else 'not written yet'}"
  if measured:
    yield f"numbers    averages up to step {measured[-1]['step']:,}"
    yield from _numbers(measured[-1])


def _ending(rows, held):
  """How the last process ended, if it did."""
  words = {"done": "all steps are done", "time": "train.max_seconds were over", "interrupt": "by Ctrl-C, saved",
           "terminated": "by SIGTERM, saved",
           "damaged data": "too many records could not be read (data.max_skipped); saved"}
  last = rows[-1] if rows else {}
  if held:
    return "not yet: a process is training in it now"
  if last.get("kind") != "stop":
    return "its process was killed; `train` goes on from the newest checkpoint" if rows else "not started"
  if last.get("reason") == "non-finite":
    return f"at step {last['step']:,}: {last.get('metric')} is {last.get('value')}"
  return words.get(last.get("reason"), str(last.get("reason")))


def _numbers(row):
  """Metrics in three columns; the loads of experts and the times are left to the report."""
  hidden = ("step", "seconds", "images", "images_per_second")
  shown = [(name, value) for name, value in row.items()
           if name not in hidden and isinstance(value, (int, float)) and not name.startswith(("time/", "moe/load/"))]
  cells = [f"{name} {value:.4g}" for name, value in shown]
  width = max((len(cell) for cell in cells), default=0) + 3
  for first in range(0, len(cells), 3):
    yield "           " + "".join(cell.ljust(width) for cell in cells[first:first + 3]).rstrip()


def _networks_in_words(experiment):
  cfg = experiment.generator
  experts = ", ".join(f"{cfg.experts[r]} at {r}" for r in sorted(cfg.attention_depth) if cfg.experts[r] > 1)
  return f"{cfg.resolution}x{cfg.resolution} pictures; experts per layer by resolution: {experts or 'none'}"


def _checkpoint_lines(path):
  """A checkpoint's parts, from its description alone."""
  from aurora_jax.training import checkpoint  # pylint: disable=g-import-not-at-top

  parts = checkpoint.describe(path.parent, int(path.name))
  yield f"checkpoint {path}: {int(path.name):,} steps were done"
  for name, (leaves, values, size) in parts.items():
    yield f"  {name:20s} {leaves:6,d} arrays  {values:15,d} values  {_bytes(size):>9s}"
  yield f"on disk    {_bytes(checkpoint.size_bytes(path.parent, int(path.name)))}"
  stored = checkpoint.stored_config(path.parent, int(path.name))
  if stored:
    yield f"config     {stored.get('name')}"


def _data_lines(path):
  """A data set's manifest in words, and some captions."""
  from aurora_jax.data import dataset, tfrecords  # pylint: disable=g-import-not-at-top

  manifest = dataset.read_manifest(path)
  yield f"data set   {path} ({manifest['name']})"
  for name in ("source", "licence"):
    if manifest.get(name):
      yield f"{name:10s} {manifest[name]}"
  yield f"pictures   {manifest['resolution']}x{manifest['resolution']} pixels"
  for split, entry in manifest["splits"].items():
    opened = dataset.Dataset.open(path, split)  # says what is missing or cut
    size = sum((path / shard["file"]).stat().st_size for shard in entry["shards"])
    yield (f"{split:10s} {len(opened):,} pictures, {entry['captions']:,} captions, {len(entry['shards'])} "
           f"file{'s' if len(entry['shards']) != 1 else ''}, {_bytes(size)}")
    for i in range(0, len(opened), max(1, len(opened) // _CAPTIONS_SHOWN))[:_CAPTIONS_SHOWN]:
      try:
        yield "             " + " | ".join(opened[i].captions)
      except tfrecords.RecordError as error:
        yield f"             {error} (--verify lists all damage)"
  rejected = manifest.get("rejected", {"count": 0})
  yield f"rejected   {rejected['count'] or 'none'}"
  for entry in rejected.get("listed", [])[:_CAPTIONS_SHOWN]:
    yield f"             {entry['key']}: {entry['reason']}"


def _verify_lines(path):
  """Every damaged record of a data set; `UserError` at the end if there was any."""
  from aurora_jax.cli.progress import progress  # pylint: disable=g-import-not-at-top
  from aurora_jax.data import damage, dataset  # pylint: disable=g-import-not-at-top

  damaged, total, changed = 0, 0, 0
  for split in dataset.read_manifest(path)["splits"]:
    opened = dataset.Dataset.open(path, split, tolerate_damage=True)
    for words in opened.problems:
      yield f"{split:10s} {words}"
    found = 0
    with progress(f"reading {split}") as update:
      for skip in damage.verify(opened, update):
        found += 1
        yield f"{split:10s} {skip}"
    yield f"{split:10s} {found or 'none'} of {len(opened):,} records damaged"
    for name in damage.changed_shards(opened):
      changed += 1
      yield f"{split:10s} {name}: its bytes are not those that the manifest has the SHA-256 of"
    damaged, total = damaged + found, total + len(opened)
  if damaged or changed:
    shards = f"; {changed} shard{'s' if changed > 1 else ''} changed since build-data" if changed else ""
    raise UserError(f"data set {path}: {damaged:,} of {total:,} records are damaged{shards}")


def _clip_lines(path, stored):
  text, vision = stored.get("text_config", {}), stored.get("vision_config", {})
  yield f"CLIP       {path}"
  yield (f"text       width {text.get('hidden_size')}, {text.get('num_hidden_layers')} layers, "
         f"{text.get('vocab_size')} tokens, at most {text.get('max_position_embeddings')} per prompt")
  yield (f"pictures   width {vision.get('hidden_size')}, {vision.get('num_hidden_layers')} layers, "
         f"{vision.get('image_size')} pixels in patches of {vision.get('patch_size')}")


def _describe_config(args):
  """An experiment's networks, from shapes alone."""
  experiment = config.load(args.config_argv)

  import jax  # pylint: disable=g-import-not-at-top
  from clu import parameter_overview  # pylint: disable=g-import-not-at-top

  from aurora_jax.training import step as step_lib  # pylint: disable=g-import-not-at-top

  # The CLIP has no part in the first state.
  state = jax.eval_shape(step_lib.build(experiment, None).init, jax.random.key(0))
  count = parameter_overview.count_parameters
  train = experiment.train
  yield f"experiment {experiment.name}: {_networks_in_words(experiment)}"
  yield (f"length     {train.total_steps:,} steps of {train.batch_size} images = "
         f"{train.total_steps * train.batch_size / 1e6:,.2f} M images")
  yield f"data       {experiment.data.path or '(to be set: --config.data.path)'} [{experiment.data.split}]"
  yield f"text       {experiment.text.clip or '(to be set: --config.text.clip)'}"
  for name in ("generator", "discriminator"):
    parameters = getattr(state, name)
    yield f"{name}: {count(parameters) / 1e6:,.2f} M parameters"
    for group, number in _grouped(parameters).items():
      yield f"  {group:30s} {number / 1e6:10,.2f} M"
    if name == "generator":
      idle = _idle_expert_parameters(parameters)
      if idle:
        yield f"  each pixel passes through {(count(parameters) - idle) / 1e6:,.2f} M of them (one expert per layer)"
    if args.parameters:
      yield parameter_overview.get_parameter_overview(parameters, include_stats=False)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  yield f"training state: {_bytes(size)} in {len(jax.tree.leaves(state)):,} arrays (networks, average, optimisers)"


def _sharding_lines(experiment, devices):
  """Where every parameter lies, on a mesh that exists only here."""
  import jax  # pylint: disable=g-import-not-at-top

  from aurora_jax.parallel import experts, mesh  # pylint: disable=g-import-not-at-top
  from aurora_jax.training import step as step_lib  # pylint: disable=g-import-not-at-top

  cfg = experiment.mesh
  if devices is None:
    devices = max(cfg.data, 1) * cfg.expert
  if devices < 1:
    raise UserError(f"--devices must be positive, got {devices}")
  layout = mesh.build(experiment, devices)
  state = jax.eval_shape(step_lib.build(experiment, None).init, jax.random.key(0))
  batch = experiment.train.batch_size
  axes = ", ".join(f"{name} {size}" for name, size in layout.mesh.shape.items())
  yield f"mesh       {axes} = {devices} devices"
  yield f"batch      {batch} images along all axes, {batch // devices} per device"
  yield from experts.explain(experts.of_experiment(experiment, layout), experiment.generator, batch)
  for network in ("generator", "discriminator"):
    shardings = jax.tree.leaves(layout.state(getattr(state, network)))
    for (names, leaf), sharding in zip(_named(getattr(state, network)), shardings):
      axes = [(entry,) if isinstance(entry, str) else entry or () for entry in sharding.spec]
      cut = ", ".join(f"axis {i} along {' x '.join(names)}" for i, names in enumerate(axes) if names) or "whole"
      yield (f"{network}/{'/'.join(names)}  {list(leaf.shape)} -> {list(sharding.shard_shape(leaf.shape))} per device, "
             f"{cut}")
  for name in ("generator", "discriminator", "ema", "generator_opt", "discriminator_opt"):
    tree = getattr(state, name)
    pieces = sum(math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                 for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(layout.state(tree))))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    yield f"{name}: {_bytes(size)}, {_bytes(pieces)} per device"


def _named(parameters):
  import jax  # pylint: disable=g-import-not-at-top

  for path, leaf in jax.tree_util.tree_flatten_with_path(parameters)[0]:
    yield [str(entry.key) for entry in path], leaf


def _is_expert(names, leaf):
  """Expert weights are stacked on a leading axis, beside the router."""
  return "feed_forward" in names and "router" not in names and leaf.ndim == 3


def _grouped(parameters):
  """Parameter counts by part of a network and resolution."""
  groups = {}
  for names, leaf in _named(parameters):
    names = names[1:] if names[0] == "synthesis" else names
    resolution = re.match(r"r(\d+)_", names[0])
    if resolution:
      part = ("experts" if _is_expert(names, leaf) else "attention" if "attention" in names[0]
              else "heads" if names[0].endswith("conditional") else "convolutions")
      key = (0, int(resolution[1]), f"{int(resolution[1]):3d} px, {part}")
    else:
      part = {"input": "Fourier input", "last": "last layer"}.get(names[0], names[0])
      key = (-1, 0, re.sub(r"_\d+$", "", part).replace("_", " "))
    groups[key] = groups.get(key, 0) + leaf.size
  return {key[2]: groups[key] for key in sorted(groups)}


def _idle_expert_parameters(parameters):
  """Parameters of the experts that a pixel does not go to."""
  return sum(leaf.size - leaf.size // leaf.shape[0] for names, leaf in _named(parameters) if _is_expert(names, leaf))


def _bytes(size):
  for unit in ("B", "kB", "MB", "GB", "TB"):
    if size < 1000 or unit == "TB":
      return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
    size /= 1000
