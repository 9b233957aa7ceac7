"""Sections of report.html about the judge: its figures, held-out prompts, prompts that name a color."""

import math
import re
from collections.abc import Mapping, Sequence

from aurora_jax.evaluation.color import HUE_TOLERANCE
from aurora_jax.evaluation.examples import ColorExample, HeldOutExample
from aurora_jax.reporting import curves
from aurora_jax.reporting.page_elements import escape, number, row, section

# Prefix of a figure's name, "judge/PREFIXtop1_of_32" -> the judged images.
_JUDGED = {
  "": "Training captions",
  "heldout_": "Held-out captions",
  "real_": "Real images",
  "heldout_real_": "Real held-out images",
  "several_": "Captions with several images",
  "several_real_": "Real images of these",
}


def _judged(prefix):
  return _JUDGED.get(prefix, prefix.replace("_", " ").strip().capitalize())


def _card(title, figure, under="", meter=""):
  under = f'<p class="under">{under}</p>' if under else ""
  return f'<div class="card"><h3>{escape(title)}</h3><p class="number">{figure}</p>{meter}{under}</div>'


def _percent(share):
  return f"{100 * share:.1f}<small> %</small>"


def _retrieval_card(prefix, among, share, values):
  chance = values.get(f"judge/{prefix}chance_of_{among}")
  count = values.get(f"judge/{prefix}captions")
  if chance is None and among != "all":
    chance = 1 / int(among)
  of = "all" + (f" {number(count)}" if count else "") if among == "all" else among
  mark = "" if chance is None else f'<b style="left:{100 * min(chance, 1):.2f}%"></b>'
  meter = f'<div class="meter"><i style="width:{100 * min(max(share, 0), 1):.2f}%"></i>{mark}</div>'
  under = f"right caption first among {of}" + ("" if chance is None else f"; chance {100 * chance:.2g}\u00a0%")
  return _card(_judged(prefix), _percent(share), escape(under), meter)


def _retrieval(values, names):
  """(cards, names used) of caption retrieval."""
  cards, used = [], set()
  for name in names:
    match = re.fullmatch(r"judge/(.*?)top1_of_(\d+|all)", name)
    if match:
      cards.append(_retrieval_card(match[1], match[2], values[name], values))
      used |= {name, f"judge/{match[1]}chance_of_{match[2]}", f"judge/{match[1]}captions", f"judge/{match[1]}images"}
  return cards, used


def _color_figures(values, names):
  """(cards, names used) of the color prompts."""
  if "judge/colour/asked" not in values:
    return [], set()
  right, asked = values.get("judge/colour/right", 0), values["judge/colour/asked"]
  card = _card(
    "Color prompts",
    f"{number(right)}<small> of {number(asked)}</small>",
    f"mean hue within {HUE_TOLERANCE:g} degrees of the real image",
  )
  return [card], {name for name in names if name.startswith("judge/colour/")}


def _diversity(values, names):
  """(cards, names used) of the distances between latents."""
  cards, used = [], set()
  for name in names:
    match = re.fullmatch(r"judge/(.*)diversity_within", name)
    if match:
      ratio = values.get(f"judge/{match[1]}diversity_ratio")
      between = values.get(f"judge/{match[1]}diversity_between")
      title = f"Diversity, {_judged(match[1]).lower()}"
      if ratio is None or between is None:
        cards.append(_card(title, number(values[name]), "RMS distance between latents of one prompt"))
      else:
        under = (
          f"RMS distance between latents of one prompt ({number(values[name])}), relative to that between prompts "
          f"({number(between)})"
        )
        cards.append(_card(title, _percent(ratio), escape(under)))
      used |= {f"judge/{match[1]}diversity_{part}" for part in ("within", "between", "ratio")}
  return cards, used


def figures(values: Mapping[str, float], notes: Sequence[str] = ()) -> str:
  """The judge's figures as cards. A figure without a card of its own gets a plain one.

  Args:
    values: {name: figure}, names as in metrics.jsonl.
    notes: sentences below the cards.
  """
  names = sorted(values, key=lambda name: (name.count("real"), name.count("heldout"), curves.natural_key(name)))
  cards, used = [], set()
  for group in (_retrieval, _color_figures, _diversity):
    more_cards, more_names = group(values, names)
    cards += more_cards
    used |= more_names
  rest = [name for name in sorted(values, key=curves.natural_key) if name not in used]
  cards += [_card(name.removeprefix("judge/").replace("_", " "), number(values[name])) for name in rest]
  body = f'<div class="cards figures">{"".join(cards)}</div>' if cards else ""
  if body:
    body += "".join(f'<p class="notes">{escape(note)}</p>' for note in notes)
  return section(
    "The judge's figures",
    "The judge is a second CLIP. It was trained with another seed, and neither the generator nor its loss uses it. It "
    "ranks captions for each image.",
    body,
    "No judge's figures yet.",
  )


def heldout(examples: Sequence[HeldOutExample]) -> str:
  """Held-out prompts: the real image next to generated ones."""
  cards = "".join(
    f'<article class="card pair"><h3>{escape(e.caption)}</h3>{row(e.real, e.generated, e.caption)}</article>'
    for e in examples
  )
  return section(
    "Held-out prompts",
    "Captions that are not in the training data: the real image, then generated images.",
    cards and f'<div class="pairs">{cards}</div>',
    "No held-out prompts yet.",
  )


def _css_color(color):
  return "rgb(" + " ".join(str(round(255 * v)) for v in color.rgb) + ")"


def _hue_line(label, color):
  if math.isnan(color.hue):
    return f"<div>{escape(label)}: no colored pixels</div>"
  return (
    f'<div><span class="chip" style="background:{_css_color(color)}"></span>{escape(label)}: hue '
    f"{color.hue:.0f}\u00b0 on {100 * color.share:.0f} % of the pixels</div>"
  )


def colors(examples: Sequence[ColorExample]) -> str:
  """Color prompts: images, mean colors and their hues on a scale."""
  cards = []
  for example in examples:
    check = example.check
    known = not math.isnan(check.difference)
    verdict = f"{check.difference:.0f}\u00b0 apart" if known else "no hue"
    marks = "".join(
      f'<i class="{css}" style="left:{color.hue / 3.6:.1f}%;background:{_css_color(color)}"></i>'
      for css, color in (("of-real", check.real), ("", check.generated))
      if not math.isnan(color.hue)
    )
    cards.append(
      f'<article class="card pair"><header><h3>{escape(check.caption)}</h3><span class="verdict '
      f'{"yes" if check.agrees else "no"}">{"right" if check.agrees else "wrong"}, {verdict}</span></header>'
      f'{row(example.real, example.generated, check.caption)}<div class="hues"><div class="bar">{marks}</div>'
      f"{_hue_line('real', check.real)}{_hue_line('generated', check.generated)}</div></article>"
    )
  return section(
    "Color prompts",
    "Mean hue of the colored pixels, weighted by chroma. Square mark: the real image. Round mark: the generated "
    f"images. Right means within {HUE_TOLERANCE:g} degrees.",
    f'<div class="pairs">{"".join(cards)}</div>' if cards else "",
    "No color prompts yet.",
  )
