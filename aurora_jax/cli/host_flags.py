"""The flags of a command that can run on several hosts; `parallel/hosts.py` reads them. Imports no JAX, for
`--help`.
"""

import argparse

JOIN_SECONDS = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  group = parser.add_argument_group(
    "several hosts", "found automatically on Cloud TPU, in a SLURM step and in an indexed Job of Kubernetes; see README"
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a free port there")
  group.add_argument("--processes", type=int, metavar="N", help="number of processes, one per host as a rule")
  group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")
  group.add_argument(
    "--join-seconds",
    type=float,
    default=JOIN_SECONDS,
    metavar="S",
    help="how long to wait for the other processes (default: %(default)g)",
  )
  group.add_argument(
    "--require",
    choices=("accelerator", "tpu", "gpu"),
    help="stop with an error if JAX finds no such device and would fall back to the CPU",
  )
