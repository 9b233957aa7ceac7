"""Prompts to images with the generator in this folder. Needs torch, safetensors, pillow, and for prompts transformers.

  pipe = Pipeline.from_pretrained("folder")
  images = pipe("a red heart", num_images=4, seed=0, psi=0.7)    # PIL images
  pipe.save_pretrained("tuned")                                  # after fine-tuning pipe.model

or from a shell: python pipeline.py "a red heart" --num-images 4 --psi 0.7 --out heart.png
"""

import argparse
import importlib.util
import json
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import PIL.Image
import torch

MEAN_LATENTS = 16  # latents whose mean style is a prompt's own mean, toward which truncation moves
MEAN_SEED = 1 << 40  # of those latents: the same for all prompts and seeds
# What `save_pretrained` copies, besides the modeling file: nothing that speaks of the weights.
COMPANIONS = ("pipeline.py", "experiment.json", "training.json", "text_encoder", "tokenizer")


class Pipeline:
  """A generator with its text encoder.

  Attributes:
    model: the generator, as in the folder's modeling file.
    text_encoder, tokenizer: of transformers, or None where the generator does not need them.
    folder: path of the folder that they are from, or None.
  """

  folder: pathlib.Path | None = None

  def __init__(
    self,
    model: torch.nn.Module,
    text_encoder: torch.nn.Module | None = None,
    tokenizer: Callable[..., Mapping[str, list[int]]] | None = None,
  ):
    self.model, self.text_encoder, self.tokenizer = model, text_encoder, tokenizer

  @classmethod
  def from_pretrained(
    cls, folder: str | pathlib.Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None
  ) -> "Pipeline":
    """Reads a folder, or downloads one from the Hub.

    Args:
      folder: a path, or OWNER/NAME on the Hub (needs huggingface_hub).
      dtype: of the generator's large weights, e.g. torch.bfloat16; the text encoder stays in float32.
      device: e.g. "cuda".
    """
    path = pathlib.Path(folder)
    if not path.is_dir():
      if str(folder).count("/") != 1:
        raise FileNotFoundError(f"no folder at {folder}")
      from huggingface_hub import snapshot_download

      path = pathlib.Path(snapshot_download(str(folder)))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    module = _module(path / f"modeling_{config['model_type']}.py")
    model = getattr(module, config["architectures"][0]).from_pretrained(path, dtype=dtype, device=device)
    text_encoder = tokenizer = None
    if (path / "text_encoder").is_dir():
      import transformers

      kind = json.loads((path / "text_encoder" / "config.json").read_text(encoding="utf-8"))["architectures"][0]
      text_encoder = getattr(transformers, kind).from_pretrained(path / "text_encoder").float().to(device).eval()
    if (path / "tokenizer").is_dir():
      from transformers import CLIPTokenizerFast

      tokenizer = CLIPTokenizerFast.from_pretrained(path / "tokenizer")
    pipe = cls(model, text_encoder, tokenizer)
    pipe.folder = path
    return pipe

  def save_pretrained(self, folder: str | pathlib.Path) -> None:
    """Writes the generator as it is now, and copies the rest of the folder that it is from, but for the model card.

    Args:
      folder: another folder than that one. aurora_jax takes it back in place of a run.
    """
    folder = pathlib.Path(folder)
    if self.folder is None or folder.resolve() == self.folder.resolve():
      raise ValueError(f"a pipeline is saved to another folder than the one that it was read from, got {folder}")
    self.model.save_pretrained(folder)
    for source in (*self.folder.glob("modeling_*.py"), *(self.folder / name for name in COMPANIONS)):
      if source.is_dir():
        shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
      elif source.is_file():
        shutil.copyfile(source, folder / source.name)

  @property
  def device(self) -> torch.device:
    """Where the generator is."""
    return next(self.model.parameters()).device

  @torch.inference_mode()
  def __call__(
    self,
    prompt: str | Sequence[str] | None = None,
    num_images: int = 1,
    seed: int = 0,
    psi: float = 1.0,
    *,
    latents: Mapping[str, np.ndarray | torch.Tensor] | np.ndarray | torch.Tensor | None = None,
    mean_latents: int = MEAN_LATENTS,
    batch_size: int = 8,
    output: str = "pil",
  ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
    """Draws images.

    Args:
      prompt: one text or several; None for a generator that takes none.
      num_images: images of each prompt.
      seed: image i, counted over all prompts, depends on seed + i, not on the others or the batch size.
      psi: truncation, from 0 to 1: less gives more typical images, 1 is none.
      latents: in place of `num_images` and `seed`: z [n, Z] or [prompts, n, Z], or a mapping of such arrays with all
        the latents that the model has, and perhaps "mean_z" [m, Z] or [prompts, m, Z].
      mean_latents: latents of the mean style of each prompt, if psi is not 1; 0: truncation moves to the mean of all
        styles.
      batch_size: images at once.
      output: "pil": list of PIL images; "np": float array [images, R, R, 3] and "pt": tensor [images, 3, R, R], both
        about [-1, 1]. The images of the first prompt come first.
    """
    if output not in ("pil", "np", "pt"):
      raise ValueError(f"output must be 'pil', 'np' or 'pt', got {output!r}")
    if not 0 <= psi <= 1:
      raise ValueError(f"psi must be from 0 to 1, got {psi}")
    if psi != 1 and not getattr(self.model, "truncates", True):
      raise ValueError(f"this generator has no truncation: psi must be 1, got {psi}")
    prompts = self._prompts(prompt)
    text = self.encode(prompts)
    drawn, means = self._latents(len(prompts), num_images, seed, latents, mean_latents if psi != 1 else 0)
    count = len(next(iter(drawn.values())))
    owner = torch.arange(len(prompts), device=self.device).repeat_interleave(count // len(prompts))
    parts = []
    for rows in torch.arange(count, device=self.device).split(batch_size):
      which = owner[rows]
      given = None if text is None else _take(text, which)
      mean = None if means is None else {name: values[which] for name, values in means.items()}
      batch = {name: values[rows] for name, values in drawn.items()}
      parts.append(self.model.sample(batch, given, psi=psi, means=mean))
    return _converted(torch.cat(parts), output)

  def _prompts(self, prompt):
    if self.model.text_input is None:
      if prompt is not None:
        raise ValueError("this generator takes no text")
      return [""]
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if not prompts or not all(isinstance(text, str) for text in prompts):
      raise ValueError(f"prompt must be a text or a list of texts, got {prompt!r}")
    return prompts

  @torch.inference_mode()
  def encode(self, prompts: Sequence[str]) -> torch.Tensor | tuple[torch.Tensor, ...] | None:
    """What the model takes of prompts, with the prompts along the first axis."""
    kind = self.model.text_input
    if kind is None:
      return None
    if kind == "ids":  # the generator has a text encoder of its own
      return self.model.encode_text(self.tokenize(prompts, self.tokenizer.model_max_length))
    config = self.text_encoder.config
    ids = self.tokenize(prompts, config.max_position_embeddings)
    # The padding is part of the text, as in training: there is no attention mask.
    out = self.text_encoder(input_ids=ids)
    # OpenAI's rule, which old configurations stand for by the number 2: the end is where the largest id is.
    end = (ids if config.eos_token_id == 2 else (ids == config.eos_token_id).int()).argmax(-1)
    if kind == "tokens":
      return out.last_hidden_state, end
    return torch.nn.functional.normalize(out.text_embeds, dim=-1)

  def tokenize(self, prompts: Sequence[str], length: int) -> torch.Tensor:
    """Token ids [prompts, length]: begin, words, end, zeros."""
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in zip(ids, prompts):
      tokens = self.tokenizer(prompt, truncation=True, max_length=length)["input_ids"]
      row[: len(tokens)] = torch.tensor(tokens)
    return ids.to(self.device)

  def _latents(self, prompts, num_images, seed, given, mean_latents):
    """({name: [images, ...]}, {name: [prompts, M, ...]} or None)."""
    means = None
    if given is None:
      if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
      drawn = _stack([self._draw(1, seed + i) for i in range(prompts * num_images)])
      drawn = {name: values[:, 0] for name, values in drawn.items()}
    else:
      given = given if isinstance(given, Mapping) else {"z": given}
      given = {name: torch.as_tensor(values, dtype=torch.float32) for name, values in given.items()}
      each = {name: v.expand(prompts, *v.shape[-2:]) for name, v in given.items()}
      drawn = {name: v.flatten(0, 1) for name, v in each.items() if not name.startswith("mean_")}
      wanted = {name: values.shape[1] for name, values in self._draw(1, 0).items()}
      if {name: values.shape[1] for name, values in drawn.items()} != wanted:
        raise ValueError(
          f"latents must be of these widths: {wanted}; got { {n: list(v.shape) for n, v in given.items()} }"
        )
      if mean_latents and "mean_z" in each:
        means = {"z": each["mean_z"]}
    if mean_latents and means is None:
      means = _stack([self._draw(mean_latents, MEAN_SEED)] * prompts)
    place = lambda tree: None if tree is None else {name: values.to(self.device) for name, values in tree.items()}
    return place(drawn), place(means)

  def _draw(self, count, seed):
    return self.model.draw_latents(count, torch.Generator().manual_seed(seed))


def _module(path):
  """The modeling file as a module."""
  path = path.absolute()  # the Hub's cache has links to files without a suffix
  if getattr(sys.modules.get(path.stem), "__file__", None) != str(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
  return sys.modules[path.stem]


def _take(text, rows):
  return tuple(part[rows] for part in text) if isinstance(text, tuple) else text[rows]


def _stack(trees):
  return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def _converted(images, output):
  if output == "pt":
    return images
  images = images.permute(0, 2, 3, 1).cpu().numpy()
  if output == "np":
    return images
  return [PIL.Image.fromarray(array) for array in np.clip(images * 127.5 + 128, 0, 255).astype(np.uint8)]


def main() -> None:
  """The command line."""
  parser = argparse.ArgumentParser(description="Draws images with the generator in this folder.")
  parser.add_argument("prompt", nargs="*", help="one text or several")
  parser.add_argument("--folder", default=pathlib.Path(__file__).parent, help="another folder than this file's")
  parser.add_argument("--num-images", type=int, default=4, help="images of each prompt (default 4)")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--psi", type=float, default=1.0, help="truncation, 0 to 1 (default 1: none)")
  parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--out", default="images.png", help="one sheet, a row for each prompt (default images.png)")
  args = parser.parse_args()
  pipe = Pipeline.from_pretrained(args.folder, dtype=getattr(torch, args.dtype), device=args.device)
  start = time.perf_counter()
  images = pipe(args.prompt or None, num_images=args.num_images, seed=args.seed, psi=args.psi, output="np")
  seconds = time.perf_counter() - start
  side = images.shape[1]
  rows = images.reshape(-1, args.num_images, side, side, 3).transpose(0, 2, 1, 3, 4)
  sheet = rows.reshape(1, -1, args.num_images * side, 3)
  _converted(torch.from_numpy(sheet).permute(0, 3, 1, 2), "pil")[0].save(args.out)
  print(f"{len(images)} images in {seconds:.2f} s ({seconds / len(images):.2f} s each): {args.out}")


if __name__ == "__main__":
  main()
