"""The processes of a job, by what each kind of environment says."""

import pytest

from aurora_jax.errors import UserError
from aurora_jax.parallel import environment
from aurora_jax.parallel.environment import Job

STEP = {
  "SLURM_JOB_ID": "4242",
  "SLURM_STEP_NODELIST": "gpu[07-09,12]",
  "SLURM_PROCID": "2",
  "SLURM_LOCALID": "0",
  "SLURM_STEP_NUM_TASKS": "4",
  "SLURM_NTASKS": "32",
  "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
GKE = {"TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc", "TPU_WORKER_ID": "1", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
PODS = {
  "KUBERNETES_SERVICE_HOST": "10.0.0.1",
  "JAX_COORDINATOR_ADDRESS": "aurora-workers-0-0.aurora:8476",
  "JAX_NUM_PROCESSES": "4",
  "JOB_COMPLETION_INDEX": "3",
}
VM = {
  "agent-worker-number": "2",
  "worker-network-endpoints": "unknown:8470:10.0.0.5,unknown:8470:10.0.0.6,u:8470:10.0.0.7",
  "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nZONE: 'us-west4-a'\n",
}


def find(environ, flags=(None, None, None), metadata=lambda name: None):
  return environment.find(*flags, environ=environ, metadata=metadata)


def test_nothing_is_one_process():
  assert find({}) == Job() and Job().processes == 1
  assert find({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Job()  # a batch script outside srun
  assert find({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == Job()


def test_flags_come_first():
  assert find(STEP | GKE, ("here:1234", 2, 1)) == Job("flags", "here:1234", 2, 1)
  assert find({}, ("[::1]:1234", 2, 0)).coordinator == "[::1]:1234"


def test_slurm():
  job = find(STEP)
  assert (job.source, job.coordinator, job.processes, job.process) == ("SLURM (job 4242)", "gpu07:61586", 4, 2)
  assert job.hosts == ("gpu07", "gpu08", "gpu09", "gpu12") and job.local_devices is None
  assert job.name(2) == "process 2 (host gpu09)"
  # A task per GPU: each takes its own, unless SLURM shows it no other.
  per_gpu = STEP | {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "4(x4)",
    "SLURM_LOCALID": "3",
    "SLURM_PROCID": "7",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
  }
  assert find(per_gpu).local_devices == (3,) and find(per_gpu).name(7) == "process 7 (host gpu08)"
  assert find(per_gpu | {"CUDA_VISIBLE_DEVICES": "3"}).local_devices is None
  assert find(per_gpu | {"SLURM_DISTRIBUTION": "cyclic"}).hosts == ()
  assert find(STEP | {"JAX_COORDINATOR_PORT": "99"}).coordinator == "gpu07:99"


@pytest.mark.parametrize(
  "node_list,nodes",
  [
    ("node1", ("node1",)),
    ("a,b", ("a", "b")),
    ("n[08-10],x", ("n08", "n09", "n10", "x")),
    ("n[1,3-4]-ib", ("n1-ib", "n3-ib", "n4-ib")),
    ("r[1-2]n[1-2]", ("r1n1", "r1n2", "r2n1", "r2n2")),
  ],
)
def test_names_of_nodes(node_list, nodes):
  assert environment.expand_nodes(node_list) == nodes


def test_cloud_tpu_on_gke():
  assert find(GKE) == Job("Cloud TPU (GKE)", "a-0.svc:8476", 2, 1, ("a-0.svc", "a-1.svc"))
  slices = {"MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080"}
  assert find(GKE | slices) == Job("Cloud TPU (GKE), slice 2 of 3", "first.svc:8476", 6, 5)
  assert find({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}).processes == 1


def test_cloud_tpu_vm():
  hosts = ("10.0.0.5", "10.0.0.6", "10.0.0.7")
  assert find({}, metadata=VM.get) == Job("Cloud TPU (VM)", "10.0.0.5:8476", 3, 2, hosts)
  new = VM | {"worker-network-endpoints": "w0,w1,w2"}
  assert find({}, metadata=new.get).hosts == ("w0", "w1", "w2")
  slices = VM | {
    "tpu-env": VM["tpu-env"] + "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '10.0.1.1'\n"
  }
  assert find({}, metadata=slices.get) == Job("Cloud TPU (VM), slice 1 of 2", "10.0.1.1:8476", 6, 5)
  assert find({"TPU_SKIP_MDS_QUERY": "1"}, metadata=VM.get) == Job()


def test_kubernetes():
  assert find(PODS) == Job(
    "Kubernetes", "aurora-workers-0-0.aurora:8476", 4, 3, tuple(f"aurora-workers-0-{i}.aurora" for i in range(4))
  )
  assert find(PODS | {"JAX_COORDINATOR_ADDRESS": "there"}).coordinator == "there:8476"
  by_hand = {"JAX_COORDINATOR_ADDRESS": "x-0:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
  assert find(by_hand) == Job("JAX_COORDINATOR_ADDRESS", "x-0:1", 2, 1)


@pytest.mark.parametrize(
  "environ,flags,message",
  [
    ({}, ("here:1", None, 0), "--coordinator and --process without --processes"),
    ({}, ("here", 2, 0), "coordinator 'here' .from flags. is not HOST:PORT"),
    ({}, ("here:1", 2, 2), "process 2 of 2 .from flags.: processes count from 0"),
    ({}, ("here:1", 2, -1), "process -1 of 2"),
    ({}, ("here:1", 0, 0), "process 0 of 0"),
    (PODS | {"JAX_NUM_PROCESSES": "four"}, (None, None, None), "JAX_NUM_PROCESSES=four is not a number"),
    (PODS | {"JAX_NUM_PROCESSES": ""}, (None, None, None), "JAX_COORDINATOR_ADDRESS=aurora.* needs JAX_NUM_PROCESSES"),
    ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "2"}, (None, None, None), "pod 2 of an indexed Job, but"),
    (STEP | {"SLURM_STEP_NODELIST": ""}, (None, None, None), "SLURM_STEP_NODELIST '' names no nodes"),
  ],
)
def test_contradictions_are_refused(environ, flags, message):
  with pytest.raises(UserError, match=message) as error:
    find(environ, flags)
  assert "\n" not in str(error.value)


def test_what_accelerator_is_expected(monkeypatch):
  monkeypatch.setattr(environment, "tpu_chips", lambda: 0)
  monkeypatch.setattr(environment.os.path, "exists", lambda path: False)
  expected = environment.expected_accelerator
  assert expected({}) is None and expected({"CUDA_VISIBLE_DEVICES": ""}) is None
  assert expected({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "0"}) is None
  assert expected({"CUDA_VISIBLE_DEVICES": "0,1"}) == "GPUs (CUDA_VISIBLE_DEVICES=0,1)"
  assert expected({"TPU_WORKER_ID": "0"}) == "TPU chips"
  monkeypatch.setattr(environment.os.path, "exists", lambda path: path == "/dev/nvidia0")
  assert expected({}) == "NVIDIA GPUs (/dev/nvidia0)"
  assert expected({"JAX_PLATFORMS": "cpu"}) is None
