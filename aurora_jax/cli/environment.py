"""What the shell has set is not trusted: locale, JAX's settings, the home folder and the cache in it.

Nothing here imports JAX.
"""

import codecs
import hashlib
import os
import sys
import warnings

from aurora_jax import user_cache

# A shell's start-up file may set these for other programs. Here they would change results (types, random numbers) or
# reject correct code. A run must not depend on them.
_IGNORED = (
  "JAX_DEFAULT_DTYPE_BITS",
  "JAX_DEFAULT_PRNG_IMPL",
  "JAX_ENABLE_X64",
  "JAX_LEGACY_PRNG_KEY",
  "JAX_NUMPY_DTYPE_PROMOTION",
  "JAX_NUMPY_RANK_PROMOTION",
  "JAX_RANDOM_SEED_OFFSET",
  "JAX_THREEFRY_PARTITIONABLE",
)
_IGNORED_GROUP = "JAX_TRANSFER_GUARD"
_CACHE_SETTINGS = {
  # Small programs too: most of a short command's time goes into compiling a few of them.
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def prepare() -> None:
  """Settles the environment variables that JAX and other libraries read when they are imported or first used."""
  for name in list(os.environ):
    if name in _IGNORED or name.startswith(_IGNORED_GROUP):
      del os.environ[name]
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  os.environ.setdefault("EPATH_USE_TF", "0")  # Orbax's paths at gs:// by gcsfs, which storage_client.py configures
  # JAX warns for every entry of a cache that is read-only, full or damaged, and goes on without it.
  warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = cache_folder()
    if folder is not None:
      os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
  for name, value in _CACHE_SETTINGS.items():
    os.environ.setdefault(name, value)


def cache_folder() -> str | None:
  """The folder of compiled programs. A command that runs again takes its programs from there and starts faster.

  Each kind of CPU has its own folder, since machines of different kinds may share a home folder.

  Returns:
    Its path, or None where there is no safe place.
  """
  folder = user_cache.folder(f"jax/{_cpu_kind()}")
  return None if folder is None else str(folder)


def _cpu_kind() -> str:
  """Eight digits that tell kinds of CPU apart; a program compiled for one may use instructions that another lacks."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
      lines = [
        line for line, _ in zip(file, range(40)) if line.startswith(("model name", "flags", "Features", "CPU part"))
      ]
  except OSError:
    lines = []
  return hashlib.sha256("".join(sorted(set(lines))).encode()).hexdigest()[:8]


def use_utf8() -> None:
  """Starts the process anew in Python's UTF-8 mode where the locale knows ASCII alone (POSIX, with coercion turned
  off).

  There, Python would take the bytes of UTF-8 arguments for no text, and could not open a file of a non-ASCII name that
  a config names. A locale with an encoding of its own (Latin-1) is left alone: its arguments are in that encoding.
  What is shown stays ASCII: the terminal may know no more.
  """
  if sys.flags.utf8_mode or codecs.lookup(sys.getfilesystemencoding()).name != "ascii":
    return
  shown = {"PYTHONIOENCODING": os.environ.get("PYTHONIOENCODING") or "ascii:backslashreplace"}
  os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], os.environ | shown)
