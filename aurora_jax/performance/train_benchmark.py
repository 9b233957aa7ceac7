"""`bench train`: what experts are worth. One experiment with experts and its dense twin, at equal images, judged.

The twin has one feed-forward layer of an expert's size in place of the experts: as many parameters at work in each
token, and no router. Everything else is the same: data, order, seed, learning rates, number of images. Both runs lie in
the folder of the results, as `train` would have left them.

The experts train first, for their share of the time. The twin trains the same number of steps, however long they take.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from aurora_jax import files
from aurora_jax.config import Experiment
from aurora_jax.errors import UserError
from aurora_jax.evaluation import caption_retrieval, trained_generator
from aurora_jax.evaluation import judge as judge_lib
from aurora_jax.performance import markdown
from aurora_jax.runs import checkpoint_reader, references
from aurora_jax.runs.workdir import RunFolder
from aurora_jax.training import loop, setup, stopping
from aurora_jax.training.prepared import Prepared

EXPERTS, DENSE = "experts", "dense"
NAMES = (EXPERTS, DENSE)
# Of the time: the first run with its compilation. The twin takes about as long, and judging what remains.
_TRAINING_SHARE = 0.38
# Calls of the step that do not count for the speed: the first ones wait for data and compilation.
_WARM_UP = 10
_JUDGED_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is compared, and where.

  Attributes:
    experiment: with experts, a data set and a CLIP.
    judge: folder of a CLIP that neither run trains with.
    out: folder of the results, without runs.
    minutes: for all; the second run and the judge may take longer.
    seed: of the latents that are judged.
  """

  experiment: Experiment
  judge: str
  out: pathlib.Path
  minutes: float
  seed: int = 0


def dense_twin(experiment: Experiment) -> Experiment:
  """The same experiment with one expert per layer, which is a dense feed-forward layer.

  Raises:
    UserError: it has no `generator.experts`, or no layer with more than one.
  """
  experts = getattr(getattr(experiment, "generator", None), "experts", None)
  if not experiment.expert_counts or not isinstance(experts, Mapping):
    raise UserError(f"{experiment.name} has no generator.experts of more than 1, so there is nothing to compare")
  generator = dataclasses.replace(experiment.generator, experts=type(experts)(dict.fromkeys(experts, 1)))
  return dataclasses.replace(experiment, generator=generator)


def check(settings: Settings) -> None:
  """Looks at all that can be wrong before anything is read or trained.

  Raises:
    UserError: no experts, no data set or no CLIP, a judge that trains too, more than one device, or runs in the folder.
  """
  dense_twin(settings.experiment)
  identities = {"--judge": references.identify(settings.judge)}
  identities |= {"--clip": references.identify(settings.experiment.text.clip)}
  for flag, identity in identities.items():
    if identity is None:
      path = settings.judge if flag == "--judge" else settings.experiment.text.clip
      raise UserError(f"{flag}: no CLIP folder at {path!r}")
  if len({identity.sha256 for identity in identities.values() if identity}) == 1:
    raise UserError(f"--judge {settings.judge} is the CLIP that the runs train with; it cannot judge them")
  if jax.device_count() != 1:
    raise UserError(
      f"bench train compares on one device, JAX has {jax.device_count()}; CUDA_VISIBLE_DEVICES=0 hides others"
    )
  for name in NAMES:
    if checkpoint_reader.newest(RunFolder(settings.out / name).checkpoints) is not None:
      raise UserError(f"{settings.out / name} is a run already: --out another folder")


def run(settings: Settings, progress: Callable[[str], None] = print) -> dict[str, Any]:
  """Trains both and judges both. OUT/train.json and OUT/train.md are written after every part.

  Args:
    settings: what is compared.
    progress: called with a line before each part.

  Returns:
    What train.json has: {"device", "config", "runs": {"experts" and "dense": {"steps", "images", "seconds",
    "images_per_second", "parameters", "figures": of `evaluate`}}, "complete"}.

  Raises:
    UserError: as of `check`; or a run ended before its time.
  """
  check(settings)
  started = time.monotonic()
  results: dict[str, Any] = {
    "config": settings.experiment.name,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "batch_size": settings.experiment.train.batch_size,
    "minutes": settings.minutes,
    "runs": {},
    "complete": False,
  }
  settings.out.mkdir(parents=True, exist_ok=True)
  experiments = {EXPERTS: settings.experiment, DENSE: dense_twin(settings.experiment)}
  seconds, steps = _TRAINING_SHARE * 60 * settings.minutes, None
  for name, experiment in experiments.items():
    limit = f"for {seconds:.0f} s" if steps is None else f"for {steps:,} steps"
    progress(f"training with {name}, {limit}")
    found = results["runs"][name] = _train(experiment, settings.out / name, seconds, steps)
    steps = found["steps"]
    _write(settings.out, results)
  judge = judge_lib.load_judge(settings.judge)
  for name in experiments:
    progress(f"judging {name}")
    model = trained_generator.load(settings.out / name, batch_size=_JUDGED_AT_ONCE)
    judged = caption_retrieval.evaluate(model, judge, settings.experiment.data.path, seed=settings.seed)
    results["runs"][name]["figures"] = judged.figures
    _write(settings.out, results)
  results |= {"complete": True, "seconds": time.monotonic() - started}
  _write(settings.out, results)
  return results


def _train(experiment, folder, seconds, steps):
  """One run: for `seconds`, or for `steps` of them where that is a number."""
  started = time.monotonic()
  # The only checkpoint is the last. Sample images would cost a compilation.
  train = dataclasses.replace(
    experiment.train,
    max_seconds=seconds if steps is None else 0.0,
    checkpoint_every=experiment.train.total_steps,
  )
  prepared = setup.prepare(dataclasses.replace(experiment, train=train))
  watched, speed = _timed(dataclasses.replace(prepared, sample=None))
  if steps is not None:
    # The learning rate still follows the number of steps that the experiment plans, as in the first run.
    ends = dataclasses.replace(prepared.experiment, train=dataclasses.replace(train, total_steps=steps))
    watched = dataclasses.replace(watched, experiment=ends)
  outcome = loop.run(watched, folder, started=started)
  if outcome.reason not in (stopping.DONE, stopping.TIME):
    raise UserError(f"{folder}: training ended at step {outcome.step} ({outcome.reason}), so there is no comparison")
  if not outcome.step:
    raise UserError(f"{folder}: {seconds:.0f} s were over before the first step; --minutes gives it more")
  batch = experiment.train.batch_size
  per_second = speed()
  return {
    "steps": outcome.step,
    "images": outcome.step * batch,
    "seconds": time.monotonic() - started,
    "images_per_second": None if per_second is None else batch * per_second,
    "parameters": {
      name: sum(leaf.size for leaf in jax.tree.leaves(network.params))
      for name, network in prepared.abstract_state.networks.items()
    },
  }


def _timed(prepared: Prepared) -> tuple[Prepared, Callable[[], float | None]]:
  """The same with the times of its steps, and a function that returns steps per second after warm-up.

  The loop waits for a step before it starts the one after the next, so the times between starts are those of steps.
  """
  begins: list[float] = []

  def step(number, state, batches):
    begins.append(time.monotonic())
    return prepared.step(number, state, batches)

  def per_second():
    counted = begins[min(_WARM_UP, len(begins) // 2) :]
    return (len(counted) - 1) / (counted[-1] - counted[0]) if len(counted) > 1 else None

  return dataclasses.replace(prepared, step=step), per_second


def _write(out, results):
  files.write_text(str(out / "train.json"), json.dumps(results, indent=1) + "\n")
  files.write_text(str(out / "train.md"), "\n".join(lines(results)) + "\n")


def lines(results: Mapping[str, Any]) -> list[str]:
  """The results of `run` as lines of Markdown."""
  runs = [results["runs"].get(name, {}) for name in NAMES]
  figures = [found.get("figures", {}) for found in runs]
  rows = []

  def row(title, values, reference=""):
    if any(value is not None for value in values):
      rows.append((title, *("" if value is None else value for value in values), reference))

  def show(values, form):
    return [None if value is None else form(value) for value in values]

  count = lambda name: [found.get(name) for found in runs]
  row("images", show(count("images"), "{:,}".format))
  row("steps", show(count("steps"), "{:,}".format))
  row("seconds, compilation included", show(count("seconds"), "{:.0f}".format))
  row("images per second, after warm-up", show(count("images_per_second"), "{:.4g}".format))
  for network in sorted({name for found in runs for name in found.get("parameters", {})}):
    sizes = [found.get("parameters", {}).get(network) for found in runs]
    row(f"{network}, parameters in millions", show(sizes, lambda size: f"{size / 1e6:,.2f}"))
  percent = lambda share: f"{100 * share:.1f} %"
  for split, prefix in (("training captions", "judge/"), ("held-out captions", "judge/heldout_")):
    start = f"{prefix}top1_of_"
    names = {name for found in figures for name in found if name.startswith(start)}
    for name in sorted(names, key=lambda name: name.endswith("all")):
      among = name.removeprefix(start)
      title = f"{split}, right one first of {among}"
      others = figures[0] or figures[1]
      real, chance = others.get(f"{prefix}real_top1_of_{among}"), others.get(f"{prefix}chance_of_{among}")
      known = [f"real images {percent(real)}"] * (real is not None) + [f"chance {percent(chance)}"] * (
        chance is not None
      )
      row(title, show([found.get(name) for found in figures], percent), ", ".join(known))
  halves = (figures[0] or figures[1]).get("judge/frechet_real_halves")
  row(
    "Frechet distance of the judge's embeddings",
    show([found.get("judge/frechet") for found in figures], "{:.4g}".format),
    "" if halves is None else f"halves of the real images {halves:.4g}",
  )
  return [
    f"# {results['config']}: experts and their dense twin",
    "",
    f"{results['device']}, JAX {results['jax']}, batch {results['batch_size']}, one run each.",
    "",
    *markdown.table(("", *NAMES, "for comparison"), rows),
  ]
