"""`python -m aurora_jax ARGS` that also logs the records of each batch and the pieces of a restored state.

    RECORDS=records.jsonl python tests/parallel/logged.py train ...

The records go to the file $RECORDS. The SHA-256 of every piece of a restored state that this process holds goes to the
files $RECORDS.restored-N; none of them is large, since a test limits the size of files.
"""

import hashlib
import json
import os
import sys

import jax
import numpy as np

from aurora_jax.cli import main
from aurora_jax.data import loader
from aurora_jax.runs import checkpoint_manager

ROWS = 100  # of a file, about 25 KB

_make = loader.BatchMaker.__call__
_restore = checkpoint_manager.Checkpoints.restore


def make(maker, step):
  batch = _make(maker, step)
  with open(os.environ["RECORDS"], "a", encoding="utf-8") as file:
    file.write(json.dumps({"step": int(step), "index": batch["index"].tolist()}) + "\n")
  return batch


def restore(*args):
  state, progress = _restore(*args)
  rows = []
  for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
    for shard in leaf.addressable_shards:
      where = [piece.indices(size)[:2] for piece, size in zip(shard.index, leaf.shape)]
      digest = hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
      rows.append(json.dumps({"leaf": jax.tree_util.keystr(path), "where": where, "sha256": digest}) + "\n")
  for first in range(0, len(rows), ROWS):
    with open(f"{os.environ['RECORDS']}.restored-{first}", "w", encoding="utf-8") as file:
      file.writelines(rows[first : first + ROWS])
  return state, progress


if __name__ == "__main__":
  checkpoint_manager.Checkpoints.restore = restore
  loader.BatchMaker.__call__ = make
  sys.exit(main.main())
