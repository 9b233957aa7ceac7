"""A trained generator out of a run's folder: EMA weights, the CLIP that reads its prompts, and how to sample from it."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from aurora_jax import config as config_lib
from aurora_jax.errors import UserError
from aurora_jax.evaluation import interpolation, sampling
from aurora_jax.interop import clip_hf
from aurora_jax.runs import checkpoint_reader
from aurora_jax.runs import workdir as workdir_lib
from aurora_jax.systems.aurora import generator as generator_lib
from aurora_jax.training import schedule

# CLIP reads at most 77 tokens; a text this long is a mistake (a file's content in place of its name, say).
LONGEST_PROMPT = 1000

# Pictures at once by default: at most so many, and what they work on stays within about this many bytes.
_MOST_PICTURES = 32
_WORKING_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True)
class Trained:
  """A generator, ready to sample.

  Attributes:
    folder: the run's folder.
    experiment: its configuration; of a run that grows, at the stage of the checkpoint (`config.at_stage`).
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
    return self.sampler(self.variables, self._encode(prompts), **options)

  def interpolate(self, prompts, given, **options):
    """From prompt to prompt; the options are those of `interpolation.interpolate`. Returns images [L, S, R, R, 3]."""
    return interpolation.interpolate(self.sampler, self.variables, self._encode(prompts), given, **options)

  def _encode(self, prompts):
    return sampling.make_prompt_encoder(self.clip, batch_size=min(64, len(prompts)))(list(prompts))

  def experts_of(self, layer):
    """Number of experts of a layer named as in the generator's routing ("r8_block0_layer0")."""
    return self.experiment.generator.experts[int(layer[1:].split("_")[0])]


def load(workdir, step=None, batch_size=None, *, pictures=None, prompts_at_once=None, clip=None, dtype=None):
  """Reads a run.

  Args:
    workdir: the run's folder.
    step: of the checkpoint; None takes the newest.
    batch_size: pictures per call of the sampler; None: as `pictures_at_once` says.
    pictures: how many there will be in all, if known: a larger batch would be filled up with idle work.
    prompts_at_once: as of `sampling.make_sampler`.
    clip: a CLIP folder in place of the one that the run's configuration names.
    dtype: of the weights and of the synthesis network's arithmetic: "float32", or "bfloat16" for half the memory; None:
      weights in float32, arithmetic as in training.

  Returns:
    `Trained`.

  Raises:
    UserError: no such run, no checkpoint, its CLIP folder is gone, or the CLIP is of another width.
  """
  folder = workdir_lib.RunFolder(workdir)
  if not folder.path.is_dir():
    raise UserError(f"run folder not found: {workdir}")
  whole = folder.experiment()
  experiment = schedule.at_checkpoint(whole, folder.checkpoints, step)
  # The small and doubtful things first: the weights may be gigabytes.
  cfg = experiment.generator.for_sampling(jax.default_backend())
  cfg = dataclasses.replace(cfg, compute_dtype=dtype or cfg.compute_dtype)
  bundle = _load_clip(clip, experiment)
  abstract = generator_lib.abstract_variables(whole.generator)
  abstract = {"ema": abstract["params"], "buffers": abstract["buffers"]}
  step, state = checkpoint_reader.read(folder.checkpoints, abstract, step)
  # Buffers stay as they are: frequencies and the average of w are few and worth their precision.
  params = state.pop("ema")
  params = _cast(params, dtype) if dtype == "bfloat16" else params
  batch_size = batch_size or pictures_at_once(cfg)
  batch_size = batch_size if pictures is None else min(batch_size, pictures)
  sampler = sampling.make_sampler(generator_lib.Generator(cfg), cfg.z_dim, batch_size, prompts_at_once)
  return Trained(folder.path, experiment, step, {"params": params, "buffers": state["buffers"]}, bundle, sampler)


def _load_clip(folder, experiment):
  """The CLIP of a run, or the one given in its place; refused if its features are not as wide as the generator's."""
  if not folder and not experiment.text.clip:
    raise UserError("the run's config names no CLIP: --clip DIR says which")
  try:
    bundle = clip_hf.load(folder or experiment.text.clip, text_only=True)
  except UserError as error:
    raise error if folder else UserError(f"{error} (as the run's config has it; --clip DIR names another)") from error
  wanted, width = experiment.generator.text_feature_dim, bundle.config.text.width
  if wanted != width:
    raise UserError(f"{folder or experiment.text.clip}: text features are {width} wide, the generator wants {wanted}")
  return bundle


def _cast(tree, dtype):
  """Another float type for all leaves, one after the other: `tree` is emptied, so no second copy stands beside it."""
  leaves, structure = jax.tree.flatten(tree)
  tree.clear()
  for i, leaf in enumerate(leaves):
    leaves[i] = leaf.astype(jnp.dtype(dtype))
    del leaf
  return jax.tree.unflatten(structure, leaves)


def pictures_at_once(cfg):
  """A batch size for a generator, by the largest arrays that one picture needs.

  Args:
    cfg: `config.Generator`, as it is sampled from.

  Returns:
    int, 1 to 32.
  """
  needed = [4 * r**2 * cfg.channels(r) for r in cfg.resolutions]
  for r in cfg.attention_depth:
    logits = cfg.heads * min(r**2, cfg.attention_chunk) * r**2
    hidden = 2 * cfg.feed_forward_ratio * cfg.heads * cfg.head_dim * r**2
    needed.append(4 * (logits + hidden))
  return max(1, min(_MOST_PICTURES, _WORKING_BYTES // max(needed)))


def check_prompts(prompts):
  """Raises UserError for a prompt that is empty or absurdly long."""
  for prompt in prompts:
    if not prompt.strip():
      raise UserError("a prompt is empty")
    if len(prompt) > LONGEST_PROMPT:
      raise UserError(
        f"a prompt has {len(prompt):,} characters, at most {LONGEST_PROMPT:,} make sense: '{prompt[:40]}...'"
      )
