"""`python -m aurora_jax ARGS` that also writes, to the file in $RECORDS, which records each batch was made of.

    RECORDS=records.jsonl python tests/parallel/logged.py train ...

Every process keeps its compiled programs. JAX lets only process 0 write its cache, which on accelerators serves all; on
CPUs an entry serves one process alone, so that the others would compile for a minute at each start.
"""

import json
import os
import sys

from jax._src import compiler, distributed

from aurora_jax.cli import main
from aurora_jax.data import loader

_make = loader.BatchMaker.__call__
_write = compiler._cache_write  # pylint: disable=protected-access


def make(maker, step):
  batch = _make(maker, step)
  with open(os.environ["RECORDS"], "a", encoding="utf-8") as file:
    file.write(json.dumps({"step": int(step), "index": batch["index"].tolist()}) + "\n")
  return batch


def write(*args):
  number, distributed.global_state.process_id = distributed.global_state.process_id, 0
  try:
    return _write(*args)
  finally:
    distributed.global_state.process_id = number


if __name__ == "__main__":
  compiler._cache_write = write  # pylint: disable=protected-access
  loader.BatchMaker.__call__ = make
  sys.exit(main.main())
