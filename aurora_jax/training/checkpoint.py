"""Checkpoints: the full training state by Orbax, saved in the background, restored onto our own shardings.

A checkpoint at step s means that s steps were done; the next batch is that of step s, so the data's position needs
nothing else. It is one folder `checkpoints/S` with three items:

    state      the training state, a pytree of arrays
    config     {"experiment": the configuration, "fingerprint": its SHA-256}
    progress   small JSON beside the state: seconds trained, metrics of the window that is not yet logged

A converted checkpoint (`write_parts`) has some parts of the state only: what a generator has, and no optimisers. It can
be sampled from, and a run can begin with it, but not go on.

This file is the only one that knows Orbax (the v0 interface: v1 is still moving, see its 0.12 changelog).
"""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import sys

import jax
import numpy as np

from aurora_jax.errors import UserError

# Leaves are read and hashed in groups of about this many bytes, so that a fingerprint needs little memory.
_FINGERPRINT_GROUP_BYTES = 1 << 28


class SaveError(UserError):
  """A checkpoint could not be written. The message is one line with the step, the folder and the reason."""


def steps(folder):
  """Steps of the complete checkpoints in a folder, ascending; [] where there is no such folder. Needs no Orbax.

  Orbax writes into a folder of another name and renames it when all is written, so a bare number means complete.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    return []
  return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir())


def newest(folder):
  """The newest complete checkpoint's step, or None."""
  return max(steps(folder), default=None)


def _chosen(folder, step):
  """The step asked for, or the newest; UserError if it is not there."""
  found = steps(folder)
  if not found:
    raise UserError(f"no checkpoint in {folder}")
  if step is not None and step not in found:
    raise UserError(f"no checkpoint of step {step} in {folder}; there are {', '.join(map(str, found))}")
  return found[-1] if step is None else step


def size_bytes(folder, step):
  """Bytes on disk of a checkpoint."""
  return sum(path.stat().st_size for path in (pathlib.Path(folder) / str(step)).rglob("*") if path.is_file())


class Checkpoints:
  """Writes and reads the checkpoints of one run. A context manager: leaving it waits for the last save.

  Every process of a run makes one and makes the same calls; Orbax sees to it that each writes its own shards.
  """

  def __init__(self, folder, keep=3):
    """Opens (and makes) the folder; remains of saves that were cut off are removed.

    Args:
      folder: path of `checkpoints/`.
      keep: how many of the newest to keep; 0 keeps all.
    """
    import orbax.checkpoint as ocp  # pylint: disable=g-import-not-at-top

    self.folder = pathlib.Path(os.path.abspath(folder))
    self._ocp = ocp
    self._saving = None  # the step of a save that is not known to be complete
    _quieten_orbax()
    try:
      os.makedirs(self.folder, exist_ok=True)
      self._manager = ocp.CheckpointManager(
          self.folder,
          options=ocp.CheckpointManagerOptions(
              max_to_keep=keep or None, create=False, cleanup_tmp_directories=True, enable_async_checkpointing=True))
    except OSError as error:
      raise UserError(f"checkpoint folder {folder} cannot be used: {error.strerror or error}") from error

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if error is None:
      self.wait()
      self._manager.close()
    else:
      with contextlib.suppress(Exception):  # what is under way says more than what the clean-up could say
        self._manager.close()

  def newest(self):
    """The newest complete checkpoint's step, or None."""
    return newest(self.folder)

  def save(self, step, state, config, progress=None):
    """Starts to save; returns when the arrays are copied, the files are written in the background.

    Args:
      step: int, how many steps were done.
      state: the training state.
      config: the configuration, nested dicts of plain values.
      progress: a small JSON object.

    Raises:
      SaveError: this save, or the one before it, failed.
    """
    if step == self._saving:
      return
    if not self.folder.is_dir():  # Orbax would silently make a new one
      raise SaveError(f"checkpoint of step {step} cannot be saved: the folder {self.folder} has vanished")
    self.wait()  # Orbax would wait too, and lay the failure of the save before to this one
    if step in steps(self.folder):
      return
    args = self._ocp.args
    items = args.Composite(state=args.StandardSave(state), config=args.JsonSave(_config_item(config)),
                           progress=args.JsonSave(progress or {}))
    with self._reporting(step):
      self._manager.save(step, args=items, force=True)
    self._saving = step

  def check(self):
    """Raises SaveError if a save failed in the background since the last call. Costs microseconds."""
    with self._reporting(self._saving):
      self._manager.check_for_errors()

  def wait(self):
    """Waits until the last save is complete on disk.

    Raises:
      SaveError: it failed.
    """
    saving = self._saving
    with self._reporting(saving):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    if saving is not None and jax.process_index() == 0 and saving not in steps(self.folder):
      raise SaveError(f"checkpoint of step {saving} is missing from {self.folder} after it was saved")
    self._saving = None

  @contextlib.contextmanager
  def _reporting(self, step):
    """Turns whatever Orbax raises into one line."""
    try:
      yield
    except UserError:
      raise
    except Exception as error:  # pylint: disable=broad-except
      self._saving = None
      last = self.newest()
      stands = "no other is there" if last is None else f"the last complete one is of step {last}"
      raise SaveError(f"checkpoint of step {step} could not be saved in {self.folder}: {_reason(error)} ({stands})"
                      ) from error

  def restore(self, abstract_state, step=None):
    """Reads a checkpoint.

    Args:
      abstract_state: the state's tree of `jax.ShapeDtypeStruct`; leaves without a sharding go to the default device.
        Their shardings need not be those under which the checkpoint was written.
      step: which one; None takes the newest.

    Returns:
      (state, progress dict).

    Raises:
      UserError: no such checkpoint, one of another architecture (what differs is named), or one that cannot be read.
    """
    self.wait()
    step = _chosen(self.folder, step)
    _check_same_leaves(self.folder / str(step), abstract_state)
    args = self._ocp.args
    try:
      restored = self._manager.restore(step, args=args.Composite(
          state=args.StandardRestore(_with_shardings(abstract_state)), progress=args.JsonRestore()))
    except Exception as error:  # pylint: disable=broad-except
      raise _unreadable(self.folder / str(step), error) from error
    return restored.state, restored.progress


def _config_item(config, **more):
  """The item `config` of a checkpoint."""
  text = json.dumps(config, sort_keys=True)
  return {"experiment": json.loads(text), "fingerprint": hashlib.sha256(text.encode()).hexdigest()} | more


def write_parts(folder, step, parts, config, progress=None):
  """Writes a checkpoint of some parts of the state; returns when it is complete. Copies none of the arrays.

  Args:
    folder: path of `checkpoints/`.
    step: int.
    parts: {part: its tree of numpy arrays}.
    config: as of `Checkpoints.save`.
    progress: a small JSON object.

  Raises:
    SaveError: it could not be written.
  """
  import orbax.checkpoint as ocp  # pylint: disable=g-import-not-at-top
  from orbax.checkpoint import type_handlers  # pylint: disable=g-import-not-at-top

  path = pathlib.Path(os.path.abspath(folder)) / str(step)
  _quieten_orbax()
  # Orbax would copy arrays of the host first, for the case that somebody changes them before they are written, and hold
  # compressed copies of all of them, for a few percent of the space: 2.3 times the model in memory, measured.
  registry = type_handlers.create_type_handler_registry(
      (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)))
  handler = ocp.CompositeCheckpointHandler(
      state=ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False),
      config=ocp.JsonCheckpointHandler(), progress=ocp.JsonCheckpointHandler())
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(path, args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(parts), config=ocp.args.JsonSave(_config_item(config, parts=sorted(parts))),
          progress=ocp.args.JsonSave(progress or {})))
  except Exception as error:  # pylint: disable=broad-except
    raise SaveError(f"checkpoint {path} could not be written: {_reason(error)}") from error


def only_parts(folder, step=None):
  """Names of the parts that a checkpoint of `write_parts` has; None for one with the full state. Needs no Orbax."""
  return _stored_config_item(folder, step).get("parts")


def read(folder, abstract_parts, step=None):
  """Reads some parts of a checkpoint's state without being the run that writes there. For sampling and evaluation.

  Args:
    folder: path of `checkpoints/`.
    abstract_parts: {name of a field of the state: its shapes and dtypes, and shardings where it matters}; the fields that
      are not named (optimisers, say) are left on the disk.
    step: which one; None takes the newest.

  Returns:
    (step, {part: its tree}).

  Raises:
    UserError: as of `Checkpoints.restore`; the checkpoint may have more parts, or others of another architecture.
  """
  import orbax.checkpoint as ocp  # pylint: disable=g-import-not-at-top

  step = _chosen(folder, step)
  path = pathlib.Path(os.path.abspath(folder)) / str(step)
  _quieten_orbax()
  wanted = _with_shardings(dict(abstract_parts))
  _check_same_leaves(path, wanted, tuple(wanted))
  try:
    stored = _stored_tree(path)
    item = {name: wanted.get(name, jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)) for name, tree in stored.items()}
    how = jax.tree.map(
        lambda leaf: ocp.RestoreArgs() if leaf is ocp.PLACEHOLDER else ocp.ArrayRestoreArgs(sharding=leaf.sharding), item)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      restored = checkpointer.restore(path / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=how))
  except Exception as error:  # pylint: disable=broad-except
    raise _unreadable(path, error) from error
  return step, {part: restored[part] for part in wanted}


def stored_config(folder, step=None):
  """The configuration under which a checkpoint was written, nested dicts; None where the checkpoint has none."""
  return _stored_config_item(folder, step).get("experiment")


def stored_progress(folder, step=None):
  """The small JSON object beside a checkpoint's state; {} where there is none. Needs no Orbax."""
  return _stored_item(folder, step, "progress")


def _stored_config_item(folder, step):
  """What `_config_item` made; {} where there is none."""
  return _stored_item(folder, step, "config")


def _stored_item(folder, step, name):
  """A JSON item of a checkpoint; {} where there is none."""
  step = newest(folder) if step is None else step
  for path in (pathlib.Path(folder) / str(step) / name).glob("*"):
    if path.is_file() and path.name == "metadata":
      return json.loads(path.read_text(encoding="utf-8"))
  return {}


def describe(folder, step=None):
  """What a checkpoint's state consists of, without reading it.

  Returns:
    {top-level part of the state: (arrays, values, bytes)}.

  Raises:
    UserError: no such checkpoint, or one that cannot be read.
  """
  path = pathlib.Path(os.path.abspath(folder)) / str(_chosen(folder, step))
  _quieten_orbax()
  try:
    tree = _stored_tree(path)
  except Exception as error:  # pylint: disable=broad-except
    raise _unreadable(path, error) from error
  parts = {}
  for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    leaves, values, size = parts.get(_name(keys[:1]), (0, 0, 0))
    count = int(np.prod(leaf.shape))
    parts[_name(keys[:1])] = leaves + 1, values + count, size + count * np.dtype(leaf.dtype).itemsize
  return parts


def fingerprint(folder, step=None):
  """One SHA-256 over a checkpoint's whole state: names, types, shapes and bytes of all leaves, in order of name.

  It needs neither the model nor the mesh, so it is the same wherever and however the state was written.

  Returns:
    (step, hexadecimal digits).

  Raises:
    UserError: no such checkpoint, or one that cannot be read.
  """
  import orbax.checkpoint as ocp  # pylint: disable=g-import-not-at-top

  step = _chosen(folder, step)
  path = pathlib.Path(os.path.abspath(folder)) / str(step)
  digest = hashlib.sha256()
  _quieten_orbax()
  try:
    tree = _stored_tree(path)
    paths_and_leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [_name(keys) for keys, _ in paths_and_leaves]
    leaves = [leaf for _, leaf in paths_and_leaves]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      for group in _groups(sorted(range(len(names)), key=names.__getitem__), leaves):
        chosen = set(group)
        item = structure.unflatten([leaf if i in chosen else ocp.PLACEHOLDER for i, leaf in enumerate(leaves)])
        how = structure.unflatten([ocp.RestoreArgs(restore_type=np.ndarray) for _ in leaves])
        values = structure.flatten_up_to(
            checkpointer.restore(path / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=how)))
        for i in group:
          value = np.asarray(values[i])
          digest.update(f"{names[i]} {value.dtype} {value.shape}\n".encode())
          digest.update(np.ascontiguousarray(value).view(np.uint8).tobytes() if value.ndim else value.tobytes())
  except UserError:
    raise
  except Exception as error:  # pylint: disable=broad-except
    raise _unreadable(path, error) from error
  return step, digest.hexdigest()


def _groups(order, leaves):
  """Cuts a list of leaf numbers into runs of about _FINGERPRINT_GROUP_BYTES."""
  group, size = [], 0
  for i in order:
    bytes_here = int(np.prod(leaves[i].shape)) * np.dtype(leaves[i].dtype).itemsize
    if group and size + bytes_here > _FINGERPRINT_GROUP_BYTES:
      yield group
      group, size = [], 0
    group.append(i)
    size += bytes_here
  if group:
    yield group


def _stored_tree(path):
  """What a checkpoint says of its leaves: nested dicts and lists of objects with shape and dtype."""
  import orbax.checkpoint as ocp  # pylint: disable=g-import-not-at-top
  from etils import epath  # pylint: disable=g-import-not-at-top

  metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path / "state"))
  return metadata.tree


def _name(keys):
  """A leaf's path as "generator/mapping/0/kernel", the same for dicts, lists, tuples and dataclasses."""
  return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in keys)


def _named_shapes(tree):
  return {_name(keys): tuple(leaf.shape) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
          if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)}


def misfit(folder, step, wanted):
  """How some parts of a checkpoint differ from those wanted, in names and shapes: words, None if they do not.

  Args:
    folder: path of `checkpoints/`.
    step: of the checkpoint.
    wanted: {part: its tree of `jax.ShapeDtypeStruct`}.

  Raises:
    UserError: the checkpoint cannot be read.
  """
  _quieten_orbax()
  return _differences(pathlib.Path(os.path.abspath(folder)) / str(step), wanted, tuple(wanted))


def _check_same_leaves(path, abstract_state, parts=None):
  """Says in one line how a checkpoint's leaves differ from those wanted; Orbax would print all of them."""
  differences = _differences(path, abstract_state, parts)
  if differences:
    raise UserError(f"checkpoint {path} is of another architecture: {differences}")


def _differences(path, abstract_state, parts=None):
  """In words, None where there are none; of all parts of the stored state, or of these only."""
  try:
    stored = {name: shape for name, shape in _named_shapes(_stored_tree(path)).items()
              if parts is None or name.split("/")[0] in parts}
  except Exception as error:  # pylint: disable=broad-except
    raise _unreadable(path, error) from error
  wanted = _named_shapes(abstract_state)
  keys = {_name(k) for k, leaf in jax.tree_util.tree_flatten_with_path(abstract_state)[0]} - wanted.keys()
  problems = [f"it has no {name}" for name in wanted if name not in stored]
  problems += [f"it has {name} besides" for name in stored if name not in wanted and name not in keys]
  problems += [f"its {name} has shape {stored[name]}, wanted {wanted[name]}"
               for name in wanted if name in stored and stored[name] != wanted[name]]
  more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
  return "; ".join(problems[:3]) + more if problems else None


def place(state, abstract_state):
  """Puts a fresh state where a restored one would be, so that both run the same compiled programs.

  A program is compiled anew for arguments that are bound to their device (restored ones are) after it was compiled for
  unbound ones, and is another entry in JAX's compilation cache on disk.
  """
  return jax.tree.map(lambda leaf, abstract: jax.device_put(leaf, abstract.sharding), state,
                      _with_shardings(abstract_state))


def _with_shardings(abstract_state):
  """Gives every leaf a sharding: its own, else the default device."""
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here),
      abstract_state)


def _unreadable(path, error):
  return UserError(f"checkpoint {path} cannot be read: {_reason(error)} (remove that folder to fall back to the one "
                   "before it)")


def _reason(error, longest=300):
  """One line of an exception's words. Of an error of the file system, which comes in a long wrapping, the core."""
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if code:
    return os.strerror(int(code[1]))
  words = " ".join(str(error).split()) or type(error).__name__
  return words if len(words) <= longest else words[:longest] + " ..."


def _quieten_orbax():
  """Keeps Orbax's log off the terminal: a failed save is raised to us, its tracebacks from four threads add nothing."""
  logger = logging.getLogger("absl")
  if not any(isinstance(entry, _NotFromOrbax) for entry in logger.filters):
    logger.addFilter(_NotFromOrbax())
    # Of several writes that fail together Orbax collects one; asyncio would print the others when they are swept up.
    logging.getLogger("asyncio").addFilter(_NotFromOrbax())
    previous = sys.unraisablehook
    sys.unraisablehook = lambda event: None if _is_from_a_closed_loop(event) else previous(event)


def _is_from_a_closed_loop(event):
  """After a failed write or read, what TensorStore still has under way reports to an event loop that is gone."""
  return isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"


class _NotFromOrbax(logging.Filter):
  """Drops what Orbax logs, and what is logged about its tasks."""

  def filter(self, record):
    where = f"{os.sep}orbax{os.sep}"
    return where not in record.pathname and where not in record.getMessage()
