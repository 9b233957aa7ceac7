"""Strips and GIFs of interpolations."""

import numpy as np
import pytest
from PIL import Image

from aurora_jax.errors import UserError
from aurora_jax.reporting import animation


def walk(latents, steps, side=8):
  """Images [L, S, side, side, 3] of one color each: red rises with the step, green with the latent."""
  images = np.full((latents, steps, side, side, 3), -1.0, np.float32)
  images[..., 0] = np.linspace(-1, 1, steps)[None, :, None, None]
  images[..., 1] = np.linspace(-1, 0.5, latents)[:, None, None, None]
  return images


def test_a_gif_goes_forth_and_back_and_rests_at_the_prompts(tmp_path):
  pages = animation.frames(walk(2, 5), ["a", "b", "c"])
  assert len(pages) == 5 and len({page.size for page in pages}) == 1
  animation.save_gif(pages, 3, tmp_path / "new" / "x.gif", 100)
  durations = []
  with Image.open(tmp_path / "new" / "x.gif") as gif:
    assert gif.info["loop"] == 0 and gif.n_frames == 8
    for n in range(8):
      gif.seek(n)
      frame = np.asarray(gif.convert("RGB")).astype(int)
      assert np.abs(frame - np.asarray(pages[min(n, 8 - n)])).mean() < 3
      assert tuple(frame[0, 0]) == (255, 255, 255)
      durations.append(gif.info["duration"])
  assert durations == [700, 100, 700, 100, 700, 100, 700, 100]
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.gif"]


def test_frames_show_all_latents_and_how_far_it_is():
  pages = [np.asarray(page) for page in animation.frames(walk(3, 3), ["one", "two"], scale=4)]
  for step, red in enumerate((0, 128, 255)):
    for green in (0, 96, 191):
      assert ((pages[step] == (red, green, 0)).all(-1).sum()) == 32 * 32
  dots = [np.argwhere((page == (46, 110, 187)).all(-1)).mean(0) for page in pages]
  width = pages[0].shape[1]
  assert dots[0][1] < 0.1 * width < 0.4 * width < dots[1][1] < 0.6 * width < 0.9 * width < dots[2][1]
  other = np.asarray(animation.frames(walk(3, 3), ["one", "six"], scale=4)[0])
  assert (other != pages[0]).any() and (other[:, : width // 2] == pages[0][:, : width // 2]).all()


def test_a_strip_puts_every_prompt_above_its_step():
  strip = np.asarray(animation.strip(walk(2, 9), ["iiii", "llll", "mmmm"])).astype(int)
  for step, red in enumerate(np.floor(np.linspace(0, 1, 9) * 255 + 0.5)):
    column = np.argwhere((strip == (red, 191, 0)).all(-1))
    assert len(column) == 96 * 96
    if step % 4 == 0:
      left, right = column[:, 1].min(), column[:, 1].max() + 1
      head = strip[: column[:, 0].min() - 110]
      assert (head[:, left:right].min(-1) < 100).any()
    else:
      assert not (strip[:15, column[:, 1].min() + 30 : column[:, 1].max() - 30].min(-1) < 100).any()


def test_unevenly_spread_prompts_are_refused():
  with pytest.raises(ValueError, match="6 steps do not run evenly through 3"):
    animation.frames(walk(1, 6), ["a", "b", "c"])


def test_an_unwritable_place_is_named(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(UserError, match="file/x.gif"):
    animation.save_gif(animation.frames(walk(1, 3), ["a", "b"]), 2, tmp_path / "file" / "x.gif")
