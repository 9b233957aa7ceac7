"""Finds the processes of a job, and this one's number among them, from flags or environment variables.

The sources are tried in this order. The first one that applies is used:

  flags        --coordinator HOST:PORT --processes N --process I
  Cloud TPU    GKE's TPU_WORKER_HOSTNAMES and TPU_WORKER_ID, else the metadata server of a TPU VM; several slices by
               MEGASCALE_*
  SLURM        the variables of a step (srun)
  Kubernetes   JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES of the manifest, JOB_COMPLETION_INDEX of an indexed Job;
               the same variables with JAX_PROCESS_ID anywhere else

JAX can detect most of this itself. But it does not report what it found or which process is missing, it gives every
SLURM task only one GPU, and on Kubernetes it needs access to the API. Nothing here imports JAX.
"""

import dataclasses
import glob
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Mapping

from aurora_jax.errors import UserError

TPU_PORT = 8476
# Google's network cards and disks have the same vendor, so the device counts too. JAX has the same list of devices
# (jax/_src/hardware_utils.py).
_GOOGLE_PCI_VENDOR = "0x1ae0"
_TPU_PCI_DEVICES = frozenset({"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"})
_METADATA = "http://{}/computeMetadata/v1/instance/attributes/{}"


@dataclasses.dataclass(frozen=True)
class Job:
  """The processes of a job.

  Attributes:
    source: where this was found, for messages.
    coordinator: HOST:PORT of process 0; "" for a single process.
    processes: number of processes.
    process: number of this process, from 0.
    hosts: host name of each process; () if unknown.
    local_devices: numbers of the GPUs that this process uses; None: all visible ones.
  """

  source: str = "nothing says otherwise"
  coordinator: str = ""
  processes: int = 1
  process: int = 0
  hosts: tuple[str, ...] = ()
  local_devices: tuple[int, ...] | None = None

  def name(self, process: int) -> str:
    """ "process 3 (host node004)", or "process 3" if the host is unknown."""
    return f"process {process}" + (f" (host {self.hosts[process]})" if process < len(self.hosts) else "")


def find(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  *,
  environ: Mapping[str, str] | None = None,
  metadata: Callable[[str], str | None] | None = None,
) -> Job:
  """The job that this process belongs to.

  Args:
    coordinator: value of --coordinator; None if it was not given.
    processes: value of --processes; None if it was not given.
    process: value of --process; None if it was not given.
    environ: environment variables; None: those of this process.
    metadata: attribute of a Cloud TPU VM -> its text, or None. None: the metadata server is asked if this machine has
      TPU chips.

  Returns:
    `Job`. A single process if nothing says otherwise.

  Raises:
    UserError: flags or variables are missing or contradict each other.
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
  flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  missing = [name for name, value in flags.items() if value is None]
  if len(missing) == len(flags):
    return None
  if missing:
    present = [name for name in flags if name not in missing]
    raise UserError(
      f"{' and '.join(present)} without {' and '.join(missing)}: several processes "
      "need all of --coordinator HOST:PORT --processes N --process I"
    )
  return Job("flags", coordinator, processes, process)


def _cloud_tpu(environ, metadata):
  """GKE sets the workers' names in the environment. On a TPU VM the metadata server has them."""
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
    # Each entry is a name, or in the older form NAME:ID:IP.
    hosts = tuple(entry.split(":")[-1] for entry in (ask("worker-network-endpoints") or "").split(","))
    slices = dict(re.findall(r"^(\w+)\s*:\s*'?([^'\n]*)'?$", ask("tpu-env") or "", re.MULTILINE)) | dict(environ)
  count = _integer(slices, "MEGASCALE_NUM_SLICES", 1)
  index = _integer(slices, "MEGASCALE_SLICE_ID", 0)
  coordinator = slices.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
  port = _integer(environ, "JAX_COORDINATOR_PORT", TPU_PORT)
  return Job(
    source + (f", slice {index} of {count}" if count > 1 else ""),
    f"{coordinator.split(':')[0]}:{port}",
    len(hosts) * count,
    worker + index * len(hosts),
    hosts if count == 1 else (),
  )


def _ask_metadata(environ, name):
  """An attribute of this VM; None if the VM has no such attribute. UserError if the metadata server does not answer."""
  import urllib.error
  import urllib.request  # of dozens of modules, which --help does not need

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


def tpu_chips() -> int:
  """Number of TPU chips in this machine, by its PCI devices."""
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
  """A step of a SLURM job. A batch script that runs outside srun is a single process, whatever the job has."""
  if not all(name in environ for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID")):
    return None
  processes = _integer(environ, "SLURM_STEP_NUM_TASKS", None) or _integer(environ, "SLURM_NTASKS", 1)
  nodes = expand_nodes(environ["SLURM_STEP_NODELIST"])
  tasks = _tasks_per_node(
    environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1"), len(nodes)
  )
  blocks = tuple(node for node, count in zip(nodes, tasks) for _ in range(count))
  in_blocks = len(blocks) == processes and not environ.get("SLURM_DISTRIBUTION", "").startswith("cyclic")
  # All tasks of the job compute the same port. Another job most likely gets another one.
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


def expand_nodes(node_list: str) -> tuple[str, ...]:
  """Expands SLURM's compact node list: "n[01-03,7],login" is n01, n02, n03, n7, login.

  Raises:
    UserError: the list is empty or cannot be parsed.
  """
  nodes = []
  for entry in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", node_list):
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
    raise UserError(f"SLURM_STEP_NODELIST {node_list!r} names no nodes")
  return tuple(nodes)


def _tasks_per_node(compact, nodes):
  """ "2(x3),1" is 2, 2, 2, 1."""
  counts = []
  for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", compact):
    counts += [int(count)] * int(times or 1)
  return counts if len(counts) == nodes else [max(counts, default=1)] * nodes


def _by_variables(environ):
  """An indexed Job or JobSet of Kubernetes, or any launcher that sets the same variables."""
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
  # A pod of an indexed Job is called NAME-INDEX.SUBDOMAIN.
  pod = re.fullmatch(r"([^.]*)-0(\..*)?", host)
  hosts = tuple(f"{pod[1]}-{i}{pod[2] or ''}" for i in range(processes)) if pod and kubernetes else ()
  return Job("Kubernetes" if kubernetes else "JAX_COORDINATOR_ADDRESS", f"{host}:{port}", processes, process, hosts)


def _integer(environ, name, default):
  value = environ.get(name)
  if value in (None, ""):
    return default
  if not value.strip().isdigit():
    raise UserError(f"{name}={value} is not a number")
  return int(value)


def expected_accelerator(environ: Mapping[str, str] | None = None) -> str | None:
  """The accelerator that this machine has or that the job asked for, such as "NVIDIA GPUs (/dev/nvidia0)", or None.

  None also if JAX_PLATFORMS=cpu says that the CPU is meant.

  Args:
    environ: environment variables; None: those of this process.
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
