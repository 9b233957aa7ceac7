"""Prompts to pictures, the way the released script samples: toward the prompt's own mean latent.

Axis letters: P prompts, L latents per prompt, B rows of a batch (one row is one prompt with one latent), N text tokens,
F width of a text feature, W width of w, Z width of z, R pixels.
"""

import dataclasses
import math
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aurora_jax.errors import UserError

# Latents whose mean is a prompt's own mean latent (released script).
MEAN_LATENTS = 16

# What a key is drawn for.
_LATENT, _MEAN = 0, 1


class Prompts(NamedTuple):
  """Encoded prompts: what the generator sees of a text.

  Attributes:
    features: float32 [P, N, F], the text tower's features.
    eot: int32 [P], the position of the end-of-text token.
  """
  features: Any
  eot: Any


class Samples(NamedTuple):
  """Pictures of P prompts with L latents each, as numpy arrays.

  Attributes:
    images: float32 [P, L, R, R, 3], about [-1, 1] (the generator has no final limit).
    routing: {layer: int32 [P, L, r * r]}, the expert of each pixel; empty unless asked for.
  """
  images: np.ndarray
  routing: dict


def truncate(w, prompt_mean, w_average, psi):
  """The released truncation: a step toward the global mean, then one toward the prompt's own mean.

  w' = lerp(w_average, w, psi); w'' = lerp(prompt_mean, w', psi). So psi = 0 is the prompt's mean latent and psi = 1
  leaves w as it is.

  Args:
    w, prompt_mean: [B, W].
    w_average: [W].
    psi: scalar.

  Returns:
    [B, W].
  """
  w = w_average + psi * (w - w_average)
  return prompt_mean + psi * (w - prompt_mean)


def _draw(seed, purpose, prompt, index, width):
  """The standard normal z of one (seed, purpose, prompt position, latent position), so of no batch and no order."""
  key = jax.random.key(seed)
  for part in (purpose, prompt, index):
    key = jax.random.fold_in(key, part)
  return jax.random.normal(key, (width,))


def draw_latents(seed, prompt, latent, width):
  """z [B, width] for rows of prompt positions [B] and latent positions [B]."""
  return jax.vmap(lambda p, l: _draw(seed, _LATENT, p, l, width))(prompt, latent)


def draw_mean_latents(seed, prompt, width):
  """The z [B, MEAN_LATENTS, width] whose w are averaged to each prompt's own mean."""
  return jax.vmap(
      lambda p: jax.vmap(lambda n: _draw(seed, _MEAN, p, n, width))(jnp.arange(MEAN_LATENTS)))(prompt)


@dataclasses.dataclass(frozen=True)
class Sampler:
  """A compiled sampler; make one per generator with `make_sampler` and keep it, since it holds the compiled programs.

  Attributes:
    step: (variables, features, eot, prompt, latent, seed, psi) -> (image [B, R, R, 3], {layer: expert [B, r * r]}).
    whole_step: the same without truncation (psi is ignored).
    batch_size: B, rows per call.
  """
  step: Callable
  whole_step: Callable
  batch_size: int

  def __call__(self, variables, prompts, *, latents=1, seed=0, psi=1.0, routing=False, first_prompt=0, on_batch=None):
    """Samples every prompt with `latents` latents.

    Args:
      variables: the generator's {"params", "buffers"}; buffers["w_avg"] is read when psi is not 1.
      prompts: Prompts (numpy or jax arrays).
      latents: L.
      seed: int; the same seed, prompt position and latent position give the same z in any batch size.
      psi: truncation, 0 to 1; 1 is none.
      routing: return the experts too.
      first_prompt: position of the first prompt, for a caller that samples a long list in parts.
      on_batch: called with (rows done, rows in all) after every batch, for a progress bar.

    Returns:
      Samples.

    Raises:
      UserError: no prompts or no latents, or a psi outside [0, 1].
    """
    count = len(prompts.features)
    if count < 1 or latents < 1:
      raise UserError(f"nothing to sample: {count} prompts, {latents} latents")
    if not (math.isfinite(psi) and 0.0 <= psi <= 1.0):
      raise UserError(f"truncation psi must lie between 0 and 1, got {psi}")
    features, eot = np.asarray(prompts.features), np.asarray(prompts.eot)
    rows = np.arange(count * latents, dtype=np.int32)
    step = self.whole_step if psi == 1.0 else self.step
    images, experts, waiting = [], [], None
    for start in range(0, len(rows), self.batch_size):
      # The last batch is filled up with its last row: one shape, one compile.
      row = np.minimum(np.arange(start, start + self.batch_size, dtype=np.int32), rows[-1])
      prompt, latent = row // latents, row % latents
      running = step(
          variables, features[prompt], eot[prompt], prompt + np.int32(first_prompt), latent,
          np.uint32(seed % 2**32), np.float32(psi))
      # Fetched only now that the next batch is under way.
      if waiting is not None:
        _collect(waiting, images, experts, routing)
        _report(on_batch, start, len(rows))
      waiting = running
    _collect(waiting, images, experts, routing)
    _report(on_batch, len(rows), len(rows))
    shape = lambda parts: np.concatenate(parts)[:len(rows)].reshape((count, latents) + parts[0].shape[1:])
    return Samples(
        shape(images), {name: shape([part[name] for part in experts]) for name in (experts[0] if experts else ())})


def _collect(result, images, experts, routing):
  image, expert = result
  images.append(np.asarray(image, np.float32))
  if routing:
    experts.append({name: np.asarray(index, np.int32) for name, index in expert.items()})


def _report(on_batch, done, total):
  if on_batch is not None:
    on_batch(done, total)


def make_sampler(generator, z_dim, batch_size=32):
  """A sampler of a generator.

  Args:
    generator: an object with `apply(variables, *arguments, method=name)` for the methods `encode_text(features, eot)
      -> (global text [B, D], local text [B, N - 1, D])`, `map_latents(z, global text) -> w [B, W]` and
      `synthesize(w, local text) -> output` with `.image` and `.routing`; `models.generator.Generator` is one.
    z_dim: Z.
    batch_size: rows per call of the compiled program.

  Returns:
    Sampler.
  """

  def sample(variables, features, eot, prompt, latent, seed, psi, truncated):
    global_text, local_text = generator.apply(variables, features, eot, method="encode_text")
    map_latents = lambda z, text: generator.apply(variables, z, text, method="map_latents")
    w = map_latents(draw_latents(seed, prompt, latent, z_dim), global_text)
    if truncated:
      z = draw_mean_latents(seed, prompt, z_dim)  # [B, MEAN_LATENTS, Z]
      many = map_latents(z.reshape(-1, z_dim), jnp.repeat(global_text, MEAN_LATENTS, axis=0))
      prompt_mean = many.reshape(z.shape[:2] + many.shape[1:]).mean(axis=1)
      w = truncate(w, prompt_mean, variables["buffers"]["w_avg"], psi)
    output = generator.apply(variables, w, local_text, method="synthesize")
    return output.image, {name: layer.expert for name, layer in output.routing.items()}

  return Sampler(
      step=jax.jit(lambda *arguments: sample(*arguments, truncated=True)),
      whole_step=jax.jit(lambda *arguments: sample(*arguments, truncated=False)),
      batch_size=batch_size)


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
    return Prompts(np.concatenate(features)[:len(tokens)], np.concatenate(eot)[:len(tokens)])

  return encode_prompts
