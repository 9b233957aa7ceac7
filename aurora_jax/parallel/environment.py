"""Which processes a job has and which of them this one is, as its environment says: one rule per kind of environment.

Decided in this order, the first that speaks up:

  flags        --coordinator HOST:PORT --processes N --process I
  Cloud TPU    GKE's TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, else the metadata server of a TPU VM; several slices by
               MEGASCALE_*
  SLURM        the variables of a step (srun)
  Kubernetes   JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES of the manifest, JOB_COMPLETION_INDEX of an indexed Job;
               the same variables with JAX_PROCESS_ID anywhere else

JAX can find most of this by itself, but not say what it found, nor who is missing; it gives every SLURM task one GPU
only, and wants the Kubernetes API for the rest. Nothing here imports JAX.
"""

import dataclasses
import glob
import itertools
import os
import pathlib
import re
import urllib.error
import urllib.request

from aurora_jax.errors import UserError

TPU_PORT = 8476
# Google's network cards and disks have the same vendor; the numbers are those that JAX knows (jax/_src/hardware_utils.py).
_GOOGLE_PCI_VENDOR = "0x1ae0"
_TPU_PCI_DEVICES = frozenset({"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"})
_METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"


@dataclasses.dataclass(frozen=True)
class Job:
  """The processes of a job.

  Attributes:
    source: what said so, in words.
    coordinator: HOST:PORT of process 0; "" where there is one process.
    processes: their number.
    process: the number of this one.
    hosts: names of the hosts by process, as far as they are known; () if not.
    local_devices: numbers of the GPUs that are this process's; None: all that it sees.
  """

  source: str = "nothing says otherwise"
  coordinator: str = ""
  processes: int = 1
  process: int = 0
  hosts: tuple[str, ...] = ()
  local_devices: tuple[int, ...] | None = None

  def name(self, process):
    """ "process 3 (host node004)", or "process 3" where the host is not known."""
    return f"process {process}" + (f" (host {self.hosts[process]})" if process < len(self.hosts) else "")


def find(coordinator=None, processes=None, process=None, *, environ=None, metadata=None):
  """The job that this process belongs to.

  Args:
    coordinator, processes, process: values of the flags, None where not given.
    environ: mapping; None takes the process's.
    metadata: attribute -> text or None, of a Cloud TPU VM; None asks the metadata server where there are TPU chips.

  Returns:
    `Job`.

  Raises:
    UserError: flags or variables that do not fit together.
  """
  environ = os.environ if environ is None else environ
  job = _by_flags(coordinator, processes, process)
  if job is None:
    job = _cloud_tpu(environ, metadata) or _slurm(environ) or _by_variables(environ) or Job()
  if job.processes > 1 and not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):\d{1,5}", job.coordinator):
    raise UserError(f"coordinator {job.coordinator!r} (from {job.source}) is not HOST:PORT")
  if not 0 <= job.process < job.processes:
    raise UserError(f"process {job.process} of {job.processes} (from {job.source}): processes count from 0")
  return job


def _by_flags(coordinator, processes, process):
  given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return None
  if missing:
    present = [name for name in given if name not in missing]
    raise UserError(
      f"{' and '.join(present)} without {' and '.join(missing)}: several processes "
      "need all of --coordinator HOST:PORT --processes N --process I"
    )
  return Job("flags", coordinator, processes, process)


def _cloud_tpu(environ, metadata):
  """GKE sets the workers' names in the environment, a TPU VM's metadata server knows them."""
  workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  if workers is not None:
    source, worker, slices = "Cloud TPU (GKE)", _integer(environ, "TPU_WORKER_ID", 0), environ
    hosts = tuple(name.split(":")[0] for name in workers.split(","))
  else:
    if environ.get("TPU_SKIP_MDS_QUERY") or (metadata is None and not tpu_chips()):
      return None
    ask = metadata or (lambda name: _ask_metadata(environ, name))
    number = ask("agent-worker-number")
    if number is None:
      return None
    source, worker = "Cloud TPU (VM)", int(number)
    # Names, or in the older form NAME:ID:IP.
    hosts = tuple(entry.split(":")[-1] for entry in (ask("worker-network-endpoints") or "").split(","))
    slices = dict(re.findall(r"^(\w+)\s*:\s*'?([^'\n]*)'?$", ask("tpu-env") or "", re.MULTILINE)) | dict(environ)
  count = _integer(slices, "MEGASCALE_NUM_SLICES", 1)
  index = _integer(slices, "MEGASCALE_SLICE_ID", 0)
  first = slices.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
  port = _integer(environ, "JAX_COORDINATOR_PORT", TPU_PORT)
  return Job(
    source + (f", slice {index} of {count}" if count > 1 else ""),
    f"{first.split(':')[0]}:{port}",
    len(hosts) * count,
    worker + index * len(hosts),
    hosts if count == 1 else (),
  )


def _ask_metadata(environ, name):
  """An attribute of this VM, None where it has no such one or there is no metadata server."""
  server = environ.get("GCE_METADATA_IP", "metadata.google.internal")
  request = urllib.request.Request(_METADATA.format(server, name), headers={"Metadata-Flavor": "Google"})
  for last in (False, False, True):
    try:
      with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode().strip()
    except urllib.error.HTTPError as error:
      if error.code == 404:
        return None
      reason = error
    except OSError as error:
      reason = error
    if last:
      raise UserError(
        f"this machine has TPU chips, but its metadata server {server} does not answer ({reason}); say "
        "which processes there are with --coordinator, --processes and --process, or set "
        "TPU_SKIP_MDS_QUERY=1 if there is one process only"
      )


def tpu_chips():
  """Number of TPU chips in this machine."""
  found = 0
  for path in glob.glob("/sys/bus/pci/devices/*/vendor"):
    try:
      vendor, device = (
        pathlib.Path(path).with_name(name).read_text(encoding="ascii").strip() for name in ("vendor", "device")
      )
    except OSError:
      continue
    found += vendor == _GOOGLE_PCI_VENDOR and device in _TPU_PCI_DEVICES
  return found


def _slurm(environ):
  """A step of a SLURM job. A batch script outside of srun is one process, whatever the job has."""
  if not all(name in environ for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")):
    return None
  processes = _integer(environ, "SLURM_STEP_NUM_TASKS", None) or _integer(environ, "SLURM_NTASKS", 1)
  nodes = expand_nodes(environ["SLURM_STEP_NODELIST"])
  tasks = _tasks_per_node(
    environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1"), len(nodes)
  )
  blocks = tuple(node for node, count in zip(nodes, tasks) for _ in range(count))
  in_blocks = len(blocks) == processes and not environ.get("SLURM_DISTRIBUTION", "").startswith("cyclic")
  # The same for all tasks of the job and, most likely, of no other job.
  port = _integer(environ, "JAX_COORDINATOR_PORT", 61440 + int(re.sub(r"\D", "", environ["SLURM_JOB_ID"]) or 0) % 4096)
  local = None
  if max(tasks) > 1 and len(environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) > 1:
    local = (_integer(environ, "SLURM_LOCALID", 0),)
  return Job(
    f"SLURM (job {environ['SLURM_JOB_ID']})",
    f"{nodes[0]}:{port}",
    processes,
    _integer(environ, "SLURM_PROCID", 0),
    blocks if in_blocks else (),
    local,
  )


def expand_nodes(words):
  """SLURM's short form of node names: "n[01-03,7],login" is n01, n02, n03, n7, login.

  Raises:
    UserError: it cannot be read.
  """
  nodes = []
  for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", words):
    parts = []
    for text, ranges in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", entry):
      choices = []
      for piece in ranges.split(",") if ranges else [""]:
        match = re.fullmatch(r"(\d+)-(\d+)", piece)
        choices += (
          [str(number).zfill(len(match[1])) for number in range(int(match[1]), int(match[2]) + 1)] if match else [piece]
        )
      parts.append([text + choice for choice in choices])
    nodes += ["".join(chosen) for chosen in itertools.product(*parts)]
  if not nodes or not all(nodes):
    raise UserError(f"SLURM_STEP_NODELIST {words!r} names no nodes")
  return tuple(nodes)


def _tasks_per_node(words, nodes):
  """ "2(x3),1" is 2, 2, 2, 1."""
  counts = []
  for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", words):
    counts += [int(count)] * int(times or 1)
  return counts if len(counts) == nodes else [max(counts, default=1)] * nodes


def _by_variables(environ):
  """An indexed Job or JobSet of Kubernetes, or whoever sets the same variables."""
  kubernetes = "KUBERNETES_SERVICE_HOST" in environ
  address, index = environ.get("JAX_COORDINATOR_ADDRESS"), environ.get("JOB_COMPLETION_INDEX")
  if address is None:
    if kubernetes and index not in (None, "0"):
      raise UserError(
        f"this is pod {index} of an indexed Job, but JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are not "
        "set: each pod would train by itself (launch/gke_a100.yaml has an example)"
      )
    return None
  processes = _integer(environ, "JAX_NUM_PROCESSES", None)
  process = _integer(environ, "JAX_PROCESS_ID", _integer(environ, "JOB_COMPLETION_INDEX", None))
  if processes is None or process is None:
    raise UserError(
      f"JAX_COORDINATOR_ADDRESS={address} needs JAX_NUM_PROCESSES, and JAX_PROCESS_ID or an indexed Job's "
      "JOB_COMPLETION_INDEX"
    )
  host, _, port = address.rpartition(":")
  if not port.isdigit():
    host, port = address, str(TPU_PORT)
  # A pod of an indexed Job is NAME-INDEX.SUBDOMAIN.
  first = re.fullmatch(r"([^.]*)-0(\..*)?", host)
  hosts = tuple(f"{first[1]}-{i}{first[2] or ''}" for i in range(processes)) if first and kubernetes else ()
  return Job("Kubernetes" if kubernetes else "JAX_COORDINATOR_ADDRESS", f"{host}:{port}", processes, process, hosts)


def _integer(environ, name, default):
  value = environ.get(name)
  if value in (None, ""):
    return default
  if not value.strip().isdigit():
    raise UserError(f"{name}={value} is no number")
  return int(value)


def expected_accelerator(environ=None):
  """What this machine has, or was asked for, that a CPU is not: words such as "NVIDIA GPUs (/dev/nvidia0)", or None.

  Somebody who sets JAX_PLATFORMS=cpu expects none.
  """
  environ = os.environ if environ is None else environ
  if environ.get("JAX_PLATFORMS", "").strip() == "cpu":
    return None
  if environ.get("TPU_WORKER_HOSTNAMES") or environ.get("TPU_WORKER_ID") or tpu_chips():
    return "TPU chips"
  for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"):
    if os.path.exists(device):
      return f"NVIDIA GPUs ({device})"
  for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
    if environ.get(name, "") not in ("", "-1", "NoDevFiles", "0" if name == "SLURM_GPUS_ON_NODE" else ""):
      return f"GPUs ({name}={environ[name]})"
  return None
