"""A trained generator out of a run's folder: EMA weights, the CLIP that reads its prompts, and how to sample from it."""

import dataclasses
import pathlib
from typing import Any

import jax

from aurora_jax import config as config_lib
from aurora_jax.errors import UserError
from aurora_jax.evaluation import sampling
from aurora_jax.interop import clip_hf
from aurora_jax.models import generator as generator_lib
from aurora_jax.training import checkpoint
from aurora_jax.training import run_folder
from aurora_jax.training import step as step_lib

# CLIP reads at most 77 tokens; a text this long is a mistake (a file's content in place of its name, say).
LONGEST_PROMPT = 1000


@dataclasses.dataclass(frozen=True)
class Trained:
  """A generator, ready to sample.

  Attributes:
    folder: the run's folder.
    experiment: its configuration.
    step: of the checkpoint.
    variables: {"params": EMA weights, "buffers": ...}.
    clip: the CLIP that encodes prompts.
    sampler: `sampling.Sampler`.
  """

  folder: pathlib.Path
  experiment: config_lib.Experiment
  step: int
  variables: Any
  clip: clip_hf.ClipBundle
  sampler: sampling.Sampler

  def sample(self, prompts, **options):
    """Samples prompts; the options are those of `sampling.Sampler`. Returns `sampling.Samples`."""
    encode = sampling.make_prompt_encoder(self.clip, batch_size=min(64, len(prompts)))
    return self.sampler(self.variables, encode(list(prompts)), **options)

  def experts_of(self, layer):
    """Number of experts of a layer named as in the generator's routing ("r8_block0_layer0")."""
    return self.experiment.generator.experts[int(layer[1:].split("_")[0])]


def load(workdir, step=None, batch_size=32):
  """Reads a run.

  Args:
    workdir: the run's folder.
    step: of the checkpoint; None takes the newest.
    batch_size: rows per call of the sampler.

  Returns:
    `Trained`.

  Raises:
    UserError: no such run, no checkpoint, or its CLIP folder is gone.
  """
  folder = run_folder.RunFolder(workdir)
  if not folder.path.is_dir():
    raise UserError(f"run folder not found: {workdir}")
  experiment = folder.experiment()
  abstract = jax.eval_shape(step_lib.build(experiment, None).init, jax.random.key(0))
  step, state = checkpoint.read(folder.checkpoints, abstract, ("ema", "buffers"), step)
  cfg = experiment.generator.for_sampling(jax.default_backend())
  return Trained(folder.path, experiment, step, {"params": state["ema"], "buffers": state["buffers"]},
                 clip_hf.load(experiment.text.clip, text_only=True),
                 sampling.make_sampler(generator_lib.Generator(cfg), cfg.z_dim, batch_size))


def check_prompts(prompts):
  """Raises UserError for a prompt that is empty or absurdly long."""
  for prompt in prompts:
    if not prompt.strip():
      raise UserError("a prompt is empty")
    if len(prompt) > LONGEST_PROMPT:
      raise UserError(f"a prompt has {len(prompt):,} characters, at most {LONGEST_PROMPT:,} make sense: "
                      f"'{prompt[:40]}...'")
