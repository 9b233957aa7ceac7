"""A description of an exported folder: what it is, where it is from, and whether it is complete."""

import os
import pathlib
from collections.abc import Iterator

from aurora_jax.interop import clip_hf, weight_files
from aurora_jax.interop.hub import layout
from aurora_jax.reporting import run_summary
from aurora_jax.systems import hub

_LABEL = 11  # columns of a line's label


def lines(path: str | os.PathLike) -> Iterator[str]:
  """Yields the lines. No weights are read, but their names and shapes are checked.

  Args:
    path: the folder.

  Raises:
    UserError: it is no such folder, or something is missing or does not fit.
  """
  path, line = pathlib.Path(path), lambda label, content: f"{label:{_LABEL}s}{content}"
  found = hub.read_folder(path)
  origin, names = layout.read_origin(path), hub.torch_names(found.system)
  entries = names.entries(found.generator)
  size = sum(file.stat().st_size for file in weight_files.find(path))
  yield line("exported", f"{path} (a generator of system {found.system}, for PyTorch)")
  if found.trained is not None:
    yield line("makes", found.trained.summary)
  values = sum(entry.values for entry in entries)
  yield line("weights", f"{values / 1e6:,.2f} M values in {len(entries):,} arrays, {run_summary.format_bytes(size)}")
  if origin:
    yield line("from", f"{origin.get('weights')} of step {found.step:,} of a run of {origin.get('run')}")
  tower = path / layout.TEXT_ENCODER
  if tower.is_dir():
    text = clip_hf.read_config(tower).text
    yield line(
      "text",
      f"its own text encoder: width {text.width}, {text.layers} layers, {text.vocabulary_size:,} tokens, at most "
      f"{text.context_length} per prompt",
    )
  elif names.text_input(found.generator):
    kind = "its weights have the text encoder" if (path / layout.TOKENIZER).is_dir() else "no text encoder (--clip DIR)"
    yield line("text", kind)
  if found.experiment is None:
    yield line("note", f"without {layout.EXPERIMENT}, which sampling here needs")
  yield line("serves", "sample, interpolate and evaluate as --workdir, train as --config.train.init_from")
