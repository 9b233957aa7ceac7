"""`python -m aurora_jax ARGS` that also writes, to the file in $RECORDS, which records each batch was made of.

    RECORDS=records.jsonl python tests/parallel/logged.py train ...
"""

import json
import os
import sys

from aurora_jax.cli import main
from aurora_jax.data import loader

_make = loader.BatchMaker.__call__


def make(maker, step):
  batch = _make(maker, step)
  with open(os.environ["RECORDS"], "a", encoding="utf-8") as file:
    file.write(json.dumps({"step": int(step), "index": batch["index"].tolist()}) + "\n")
  return batch


if __name__ == "__main__":
  loader.BatchMaker.__call__ = make
  sys.exit(main.main())
