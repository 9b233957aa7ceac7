"""Prompts to pictures, the way the released script samples: toward the prompt's own mean latent.

Axis letters: P prompts, L latents per prompt, M latents of a prompt's mean, K values of psi, C prompts at once, B rows
of a batch (one row is one prompt with one latent and one psi), N text tokens, F width of a CLIP feature, D width of the
generator's own text, W width of w, Z width of z, R pixels.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.errors import UserError
from aurora_jax.evaluation import latents as latents_lib

MEAN_LATENTS = latents_lib.MEAN_LATENTS


class Prompts(NamedTuple):
  """Encoded prompts: what the generator sees of a text.

  Attributes:
    features: float32 [P, N, F], the text tower's features.
    eot: int32 [P], the position of the end-of-text token.
  """

  features: Any
  eot: Any


class Texts(NamedTuple):
  """What the generator's text head makes of prompts; between two of them one can interpolate.

  Attributes:
    global_text: float32 [P, D], goes into w.
    local_text: float32 [P, N - 1, D], what the cross-attention looks at.
  """

  global_text: Any
  local_text: Any


class Samples(NamedTuple):
  """Pictures of P prompts with L latents each, as numpy arrays; the axis K is there if several psi were asked for.

  Attributes:
    images: float32 [P, L, (K,) R, R, 3], about [-1, 1] (the generator has no final limit).
    routing: {layer: int32 [P, L, (K,) r * r]}, the expert of each pixel; empty unless asked for.
  """

  images: np.ndarray
  routing: dict


def lerp(start, end, weight):
  """start + weight * (end - start), exactly `start` at weight 0 and exactly `end` at weight 1."""
  step = end - start
  return jnp.where(weight < 0.5, start + weight * step, end - step * (1 - weight))


def truncate(w, prompt_mean, w_average, psi):
  """The released truncation: a step toward the global mean, then one toward the prompt's own mean.

  w' = lerp(w_average, w, psi); w'' = lerp(prompt_mean, w', psi). So psi = 0 is the prompt's mean latent and psi = 1
  leaves w as it is.

  Args:
    w, prompt_mean: [B, W]; no prompt_mean (None): only the first step.
    w_average: [W].
    psi: [B, 1] or a scalar.

  Returns:
    [B, W].
  """
  w = lerp(w_average, w, psi)
  return w if prompt_mean is None else lerp(prompt_mean, w, psi)


def check_psi(psi):
  """Raises UserError unless the truncation lies between 0 and 1."""
  if not (math.isfinite(psi) and 0.0 <= psi <= 1.0):
    raise UserError(f"truncation psi must lie between 0 and 1, got {psi}")


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A compiled sampler; make one per generator with `make_sampler` and keep it, since it holds the compiled programs.

  Attributes:
    encode: (variables, features [C, N, F], eot [C]) -> `Texts` of C.
    map_latents: (variables, z [C, L, Z], global text [C, D]) -> w [C, L, W].
    synthesize: (variables, w [B, W], psi [B], prompt [B], prompt means [C, W] or None, local text [C, N - 1, D]) ->
      (image [B, R, R, 3], {layer: expert [B, r * r]}); `prompt` is the row's position among the C.
    z_dim: Z.
    batch_size: B, pictures per call.
    prompts_at_once: C. Prompts are read in groups of this size: only one group's text is held.
  """

  encode: Callable
  map_latents: Callable
  synthesize: Callable
  z_dim: int
  batch_size: int
  prompts_at_once: int

  def __call__(
    self,
    variables,
    prompts,
    *,
    latents=1,
    seed=0,
    psi=1.0,
    mean_latents=MEAN_LATENTS,
    given=None,
    routing=False,
    first_prompt=0,
    on_batch=None,
  ):
    """Samples every prompt with L latents, each at every psi.

    Args:
      variables: the generator's {"params", "buffers"}; buffers["w_avg"] is the global mean.
      prompts: Prompts (numpy or jax arrays).
      latents: L.
      seed: int; the same seed, prompt position and latent position give the same z in any batch size.
      psi: truncation, 0 to 1 (1 is none), or several: a sequence of K.
      mean_latents: M; 0: no pull toward the prompt's own mean.
      given: `latents.Latents` of these prompts, in place of latents, seed and mean_latents.
      routing: return the experts too.
      first_prompt: position of the first prompt, for a caller that samples a long list in parts.
      on_batch: called with (rows done, rows in all) after every batch, for a progress bar.

    Returns:
      Samples.

    Raises:
      UserError: no prompts or no latents, or a psi outside [0, 1].
    """
    count = len(prompts.features)
    if given is not None:
      latents = given.z.shape[1]
    if count < 1 or latents < 1:
      raise UserError(f"nothing to sample: {count} prompts, {latents} latents")
    if not self._pulls(psi):
      mean_latents = 0

    def noise(group):
      if given is None:
        return latents_lib.draw(seed, group + first_prompt, latents, mean_latents, self.z_dim)
      return latents_lib.Latents(given.z[group], given.mean_z[group])

    return self._sample(variables, count, latents, self._reader(variables, prompts), noise, psi, routing, on_batch)

  def read(self, variables, prompts):
    """The text head's outputs of prompts (`Prompts`): `Texts` of P, numpy arrays."""
    count, encode = len(prompts.features), self._reader(variables, prompts)
    groups = [encode(self._group(start, count)) for start in range(0, count, self.prompts_at_once)]
    return Texts(*(np.concatenate([np.asarray(part) for part in parts])[:count] for parts in zip(*groups)))

  def sample_texts(self, variables, texts, given, *, psi=1.0, routing=False, on_batch=None):
    """Samples from the text head's outputs, interpolated ones for example.

    Args:
      variables: as of a call.
      texts: Texts of P.
      given: `latents.Latents` of P.
      psi, routing, on_batch: as of a call.

    Returns:
      Samples.

    Raises:
      UserError: a psi outside [0, 1].
    """
    read = lambda group: Texts(*(part[group] for part in texts))
    noise = lambda group: latents_lib.Latents(given.z[group], given.mean_z[group])
    return self._sample(variables, len(texts.global_text), given.z.shape[1], read, noise, psi, routing, on_batch)

  @staticmethod
  def _pulls(psi):
    """Whether any psi gives the prompt's own mean a say."""
    return bool(np.any(np.asarray(psi) != 1.0))

  def _group(self, start, count):
    """The prompts of a group; the last group is filled up with its last prompt: one shape, one compile."""
    return np.minimum(np.arange(start, start + self.prompts_at_once, dtype=np.int32), count - 1)

  def _reader(self, variables, prompts):
    features, eot = np.asarray(prompts.features), np.asarray(prompts.eot)
    return lambda group: self.encode(variables, features[group], eot[group])

  def _sample(self, variables, count, latents, read, noise, psi, routing, on_batch):
    """Group by group: `read(positions)` gives the `Texts` of a group of prompts, `noise(positions)` its `Latents`."""
    sweep = np.atleast_1d(np.asarray(psi, np.float32))
    for value in np.atleast_1d(psi):
      check_psi(float(value))
    total, done, images, experts, waiting = count * latents * len(sweep), 0, [], [], None
    for start in range(0, count, self.prompts_at_once):
      group = self._group(start, count)
      texts, z = read(group), noise(group)
      w = np.asarray(self.map_latents(variables, z.z, texts.global_text)).reshape(len(group) * latents, -1)
      means = None
      if z.mean_z.shape[1] and self._pulls(psi):
        means = self.map_latents(variables, z.mean_z, texts.global_text).mean(axis=1)
      rows = np.arange(min(self.prompts_at_once, count - start) * latents * len(sweep), dtype=np.int32)
      for first in range(0, len(rows), self.batch_size):
        row = np.minimum(np.arange(first, first + self.batch_size, dtype=np.int32), rows[-1])
        drawn, value = row // len(sweep), sweep[row % len(sweep)]
        running = self.synthesize(variables, w[drawn], value, drawn // latents, means, texts.local_text)
        # Fetched only now that the next batch is under way.
        if waiting is not None:
          done += _collect(*waiting, images, experts, routing)
          _report(on_batch, done, total)
        waiting = running, min(self.batch_size, len(rows) - first)
    _collect(*waiting, images, experts, routing)
    _report(on_batch, total, total)
    leading = (count, latents) + ((len(sweep),) if np.ndim(psi) else ())
    shape = lambda parts: np.concatenate(parts).reshape(leading + parts[0].shape[1:])
    return Samples(
      shape(images), {name: shape([part[name] for part in experts]) for name in (experts[0] if experts else ())}
    )


def _collect(result, count, images, experts, routing):
  """Keeps the first `count` rows of a batch, the others fill it up; returns `count`."""
  image, expert = result
  images.append(np.asarray(image, np.float32)[:count])
  if routing:
    experts.append({name: np.asarray(index, np.int32)[:count] for name, index in expert.items()})
  return count


def _report(on_batch, done, total):
  if on_batch is not None:
    on_batch(done, total)


def make_sampler(generator, z_dim, batch_size=32, prompts_at_once=None):
  """A sampler of a generator.

  Args:
    generator: an object with `apply(variables, *arguments, method=name)` for the methods `encode_text(features, eot)
      -> (global text [C, D], local text [C, N - 1, D])`, `map_latents(z, global text) -> w [B, W]` and
      `synthesize(w, local text) -> output` with `.image` and `.routing`; `models.generator.Generator` is one.
    z_dim: Z.
    batch_size: pictures per call of the compiled program.
    prompts_at_once: prompts per call of the text head; None: as many as pictures.

  Returns:
    Sampler.
  """

  @jax.jit
  def encode(variables, features, eot):
    return Texts(*generator.apply(variables, features, eot, method="encode_text"))

  @jax.jit
  def map_latents(variables, z, global_text):
    each = jnp.repeat(global_text, z.shape[1], axis=0)
    w = generator.apply(variables, z.reshape(-1, z_dim), each, method="map_latents")
    return w.reshape(z.shape[:2] + w.shape[1:])

  @jax.jit
  def synthesize(variables, w, psi, prompt, means, local_text):
    mean = None if means is None else means[prompt]
    w = truncate(w, mean, variables["buffers"]["w_avg"], psi[:, None])
    output = generator.apply(variables, w, local_text[prompt], method="synthesize")
    return output.image, {name: layer.expert for name, layer in output.routing.items()}

  return Sampler(
    encode=encode,
    map_latents=map_latents,
    synthesize=synthesize,
    z_dim=z_dim,
    batch_size=batch_size,
    prompts_at_once=prompts_at_once or batch_size,
  )


def make_prompt_encoder(bundle, batch_size=64):
  """A function from prompts to what the generator sees of them.

  Args:
    bundle: a CLIP bundle (`interop.clip_hf.load`): config, variables, tokenizer.
    batch_size: captions per call of the compiled program.

  Returns:
    list of P strings -> Prompts.
  """
  from aurora_jax.models.clip import Clip

  clip = Clip(bundle.config)

  @jax.jit
  def encode(variables, tokens):
    output = clip.apply(variables, tokens, method="encode_text")
    return output.features, output.eot

  def encode_prompts(prompts):
    if not len(prompts):
      raise UserError("nothing to sample: no prompts")
    tokens = np.asarray(bundle.tokenizer(list(prompts)))
    features, eot = [], []
    for start in range(0, len(tokens), batch_size):
      part = tokens[np.minimum(np.arange(start, start + batch_size), len(tokens) - 1)]
      part_features, part_eot = encode(bundle.variables, part)
      features.append(np.asarray(part_features))
      eot.append(np.asarray(part_eot))
    return Prompts(np.concatenate(features)[: len(tokens)], np.concatenate(eot)[: len(tokens)])

  return encode_prompts
