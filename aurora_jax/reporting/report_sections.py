"""The sections of report.html, each a pure function from values to HTML; every text from outside is escaped."""

import base64
import html
import io
import json
import math
import re

import numpy as np
from PIL import Image

from aurora_jax.evaluation import judge
from aurora_jax.reporting import curves as curves_lib
from aurora_jax.reporting import image_sheets

# The config fields that the head of the page shows, and what they are called there.
_SUMMARY = (
  ("system", "System"),
  ("generator.resolution", "Resolution"),
  ("generator.generators", "Generators"),
  ("generator.experts", "Experts"),
  ("generator.z_dim", "Latent width"),
  ("generator.w_dim", "Style width"),
  ("generator.moe_backend", "Expert dispatch"),
  ("data.path", "Data"),
  ("data.split", "Split"),
  ("text.clip", "Text encoder"),
  ("train.batch_size", "Batch"),
  ("train.total_steps", "Planned steps"),
  ("train.seed", "Seed"),
  ("optimizer.generator.learning_rate", "Learning rate of G"),
  ("optimizer.discriminator.learning_rate", "Learning rate of D"),
  ("loss.r1_gamma", "R1 gamma"),
  ("loss.clip_weight", "CLIP weight"),
  ("loss.matching_weight", "Matching weight"),
)


def text(value):
  """Escaped for HTML, in content and in attributes."""
  return html.escape(str(value), quote=True)


def number(value, digits=3):
  """A number in few characters: "1,234", "0.123", "1.2e-05"."""
  if value != value:
    return "-"
  if float(value).is_integer() and abs(value) < 1e15:
    return f"{int(value):,}"
  if abs(value) >= 1000:
    return f"{value:,.0f}"
  return f"{value:.{digits}g}"


def duration(seconds):
  """ "3 h 5 min", "4 min 10 s", "9 s"."""
  seconds = int(round(seconds))
  hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
  if hours >= 48:
    return f"{hours // 24} d {hours % 24} h"
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def data_uri(picture, quality=90):
  """A PIL picture as a data URI: WebP, a fraction of the size of a PNG; quality None keeps every pixel (PNG)."""
  buffer = io.BytesIO()
  if quality is None:
    picture.save(buffer, "PNG", optimize=True)
    kind = "png"
  else:
    picture.save(buffer, "WEBP", quality=quality, method=4, use_sharp_yuv=True)
    kind = "webp"
  return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def _tile(image, alt):
  """An <img> of one picture [R, R, 3] in [-1, 1], enlarged for the eye."""
  scale = max(1, 2 * image_sheets.SHOWN_SIDE // np.shape(image)[1])  # twice the shown size: sharp on fine screens
  return f'<img class="tile" loading="lazy" alt="{text(alt)}" src="{data_uri(image_sheets.enlarge(image, scale))}">'


def _section(title, about, body, missing=None):
  inner = body or f'<p class="missing">{text(missing)}</p>'
  about = f'<p class="about">{about}</p>' if about and body else ""
  return f"<section><h2>{text(title)}</h2>{about}{inner}</section>"


# ---- head --------------------------------------------------------------------------------------------------------


def _lookup(config, path):
  for part in path.split("."):
    if not isinstance(config, dict) or part not in config:
      return None
    config = config[part]
  return config


def _value(value):
  if isinstance(value, dict):
    items = sorted(((str(k), v) for k, v in value.items()), key=lambda item: curves_lib.natural_key(item[0]))
    return ", ".join(f"{v} at {k}" for k, v in items)
  if isinstance(value, (list, tuple)):
    return ", ".join(map(str, value))
  if isinstance(value, (int, float)) and not isinstance(value, bool):
    return number(value)
  return str(value)


def header(name, config, log):
  """Name, progress in numbers, the config in short and in full."""
  facts = []
  if "step" in log.last:
    facts.append(("Step", number(log.last["step"])))
  if "images" in log.last:
    facts.append(("Images seen", number(log.last["images"])))
  if "seconds" in log.last:
    facts.append(("Wall time", duration(log.last["seconds"])))
  speed = log.series.get("images_per_second")
  if speed is not None:
    facts.append(("Images per second", number(float(np.median(speed[1])))))
  if "resolution" in log.last:
    facts.append(("Stage", f"{number(log.last['resolution'])} px"))
  if "features" in log.last:
    facts.append(("Frechet distance of", log.last["features"]))
  if log.resumes:
    facts.append(("Resumes", number(len(log.resumes))))
  if log.warnings:
    facts.append(("Warnings", number(len(log.warnings))))
  if log.skipped_steps:
    facts.append(("Skipped steps", number(len(log.skipped_steps))))
  facts = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in facts)
  summary = [(label, _lookup(config, path)) for path, label in _SUMMARY]
  summary = "".join(
    f"<div><dt>{text(label)}</dt><dd>{text(_value(value))}</dd></div>"
    for label, value in summary
    if value not in (None, "", {}, [], ())
  )
  full = text(json.dumps(config, indent=2, ensure_ascii=False))
  if config:
    about = (
      f'<div class="config"><dl>{summary}</dl><details><summary>Whole configuration</summary><pre>{full}</pre>'
      "</details></div>"
    )
  else:
    about = '<p class="missing config">No readable config.json in the run folder.</p>'
  progress = f'<dl class="facts">{facts}</dl>'
  if not log.last:
    progress = '<p class="missing">No metrics.jsonl in the run folder.</p>'
  return (
    f'<header><p class="eyebrow">Text to picture, a sparse mixture-of-experts GAN</p><h1>{text(name)}</h1>'
    f"{progress}{about}</header>"
  )


# ---- what went wrong -----------------------------------------------------------------------------------------------

_EVENTS_SHOWN = 30


def warnings(log):
  """Warnings and skipped steps in order; nothing for a run without."""
  events = sorted(
    [(step, "warning", words) for step, words in log.warnings]
    + [(step, "skipped", words) for step, words in log.skipped_steps]
  )
  if not events:
    return ""
  what = {"warning": "", "skipped": "skipped: "}
  rows = "".join(
    f'<li class="{kind}"><b>step {number(step)}</b> {what[kind]}{text(words)}</li>'
    for step, kind, words in events[-_EVENTS_SHOWN:]
  )
  more = f" The newest {_EVENTS_SHOWN} of {number(len(events))} are shown." if len(events) > _EVENTS_SHOWN else ""
  return _section(
    "Warnings",
    "Signs that training goes astray, and steps that were left out because a loss or a gradient was not "
    f"finite. Vertical lines mark the warnings in the curves.{more}",
    f'<ul class="events">{rows}</ul>',
  )


# ---- the judge's figures -----------------------------------------------------------------------------------------

_WHOSE = {
  "": "Training captions",
  "heldout_": "Held-out captions",
  "real_": "Real pictures",
  "heldout_real_": "Real held-out pictures",
  "several_": "Captions with several pictures",
  "several_real_": "Real pictures of these",
}


def _whose(prefix):
  """ "judge/PREFIXtop1_of_32": whose pictures were judged."""
  return _WHOSE.get(prefix, prefix.replace("_", " ").strip().capitalize())


def _card(title, figure, under="", meter=""):
  under = f'<p class="under">{under}</p>' if under else ""
  return f'<div class="card"><h3>{text(title)}</h3><p class="number">{figure}</p>{meter}{under}</div>'


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
  return _card(_whose(prefix), _percent(share), text(under), meter)


def figures(values, notes=()):
  """The judge's figures as cards; what has no card of its own is listed below."""
  cards, used = [], set()
  order = lambda name: (name.count("real"), name.count("heldout"), curves_lib.natural_key(name))
  for name in sorted(values, key=order):
    match = re.fullmatch(r"judge/(.*?)top1_of_(\d+|all)", name)
    if match:
      cards.append(_retrieval_card(match[1], match[2], values[name], values))
      used |= {name, f"judge/{match[1]}chance_of_{match[2]}", f"judge/{match[1]}captions", f"judge/{match[1]}images"}
  if "judge/colour/asked" in values:
    right, asked = values.get("judge/colour/right", 0), values["judge/colour/asked"]
    cards.append(
      _card(
        "Colour prompts",
        f"{number(right)}<small> of {number(asked)}</small>",
        f"mean hue within {judge.HUE_TOLERANCE:g} degrees of the real picture",
      )
    )
    used |= {name for name in values if name.startswith("judge/colour/")}
  for name in sorted(values, key=order):
    match = re.fullmatch(r"judge/(.*)diversity_within", name)
    if match:
      ratio = values.get(f"judge/{match[1]}diversity_ratio")
      between = values.get(f"judge/{match[1]}diversity_between")
      title = f"Diversity, {_whose(match[1]).lower()}"
      if ratio is None or between is None:
        cards.append(_card(title, number(values[name]), "RMS distance between latents of one prompt"))
      else:
        under = (
          f"distance between latents of one prompt, against that between prompts (RMS {number(values[name])} "
          f"of {number(between)})"
        )
        cards.append(_card(title, _percent(ratio), text(under)))
      used |= {f"judge/{match[1]}diversity_{part}" for part in ("within", "between", "ratio")}
  rest = [(name, values[name]) for name in sorted(values, key=curves_lib.natural_key) if name not in used]
  for name, value in rest:
    cards.append(_card(name.removeprefix("judge/").replace("_", " "), number(value)))
  body = f'<div class="cards figures">{"".join(cards)}</div>' if cards else ""
  if body and notes:
    body += "".join(f'<p class="notes">{text(note)}</p>' for note in notes)
  return _section(
    "The judge's figures",
    "A second CLIP, trained with another seed and never used by the generator or its loss, ranks captions for each "
    "picture.",
    body,
    "No judge's figures yet.",
  )


# ---- samples over training ---------------------------------------------------------------------------------------


def embed_samples(shots, log):
  """Sample pictures for the page.

  Args:
    shots: list of (step, path).
    log: RunLog, for the images seen and the time at each step where it is known.

  Returns:
    list of {"label": str, "src": data URI}; a picture that cannot be read is left out.
  """
  embedded = []
  last_step, last_images = log.last.get("step", 0), log.last.get("images", 0)
  for step, path in shots:
    try:
      with Image.open(path) as picture:
        source = data_uri(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for a damaged file
      continue
    label = f"step {step:,}"
    if last_step and last_images:  # the batch is constant, so images go with steps
      label += f" \u00b7 {round(step * last_images / last_step):,} images"
    embedded.append({"label": label, "src": source})
  return embedded


def samples(embedded, count):
  """The pictures with a slider; without scripts the newest one stands alone."""
  if not embedded:
    return _section("Samples over training", "", "", "No sample pictures yet.")
  last = embedded[-1]
  about = "The same prompts and latents at every step. Slide, or use the arrow keys."
  if len(embedded) < count:
    about += f" {len(embedded)} of {count} pictures are shown."
  body = (
    '<div class="shot"><div class="controls">'
    '<button type="button" id="sample-play" aria-pressed="false">Play</button>'
    f'<input type="range" id="sample-slider" min="0" max="{len(embedded) - 1}" value="{len(embedded) - 1}" step="1" '
    f'aria-label="Training step"><output id="sample-label" for="sample-slider">{text(last["label"])}</output></div>'
    f'<div class="scroll" tabindex="0" role="group" aria-label="Sample pictures"><img id="sample-image" '
    f'src="{last["src"]}" alt="Samples at {text(last["label"])}"></div></div>'
  )
  return _section("Samples over training", about, body)


# ---- prompts with pictures ---------------------------------------------------------------------------------------


def _figure(picture, caption, css=""):
  return f'<figure class="{css}">{picture}<figcaption>{text(caption)}</figcaption></figure>'


def _row(real, generated, caption):
  made = "".join(_figure(_tile(image, f"generated: {caption}"), "generated") for image in generated)
  return f'<div class="row">{_figure(_tile(real, f"real: {caption}"), "real", "real")}{made}</div>'


def heldout(examples):
  """Held-out prompts: the real picture beside generated ones."""
  cards = "".join(
    f'<article class="card pair"><h3>{text(e.caption)}</h3>{_row(e.real, e.generated, e.caption)}</article>'
    for e in examples
  )
  return _section(
    "Held-out prompts",
    "Captions that training never saw: the real picture, then what the generator makes of the words.",
    cards and f'<div class="pairs">{cards}</div>',
    "No held-out prompts yet.",
  )


def _css_colour(colour):
  return "rgb(" + " ".join(str(round(255 * v)) for v in colour.rgb) + ")"


def _hue_line(label, colour):
  if math.isnan(colour.hue):
    return f"<div>{text(label)}: no coloured pixels</div>"
  return (
    f'<div><span class="chip" style="background:{_css_colour(colour)}"></span>{text(label)}: hue '
    f"{colour.hue:.0f}\u00b0 on {100 * colour.share:.0f} % of the pixels</div>"
  )


def colours(examples):
  """Colour prompts: pictures, mean colours and where their hues lie on the circle."""
  cards = []
  for example in examples:
    check = example.check
    known = not math.isnan(check.difference)
    verdict = f"{check.difference:.0f}\u00b0 apart" if known else "no hue"
    marks = "".join(
      f'<i class="{css}" style="left:{colour.hue / 3.6:.1f}%;background:{_css_colour(colour)}"></i>'
      for css, colour in (("of-real", check.real), ("", check.generated))
      if not math.isnan(colour.hue)
    )
    cards.append(
      f'<article class="card pair"><header><h3>{text(check.caption)}</h3><span class="verdict '
      f'{"yes" if check.agrees else "no"}">{"right" if check.agrees else "wrong"}, {verdict}</span></header>'
      f'{_row(example.real, example.generated, check.caption)}<div class="hues"><div class="bar">{marks}</div>'
      f"{_hue_line('real', check.real)}{_hue_line('generated', check.generated)}</div></article>"
    )
  return _section(
    "Colour prompts",
    "Mean hue of the coloured pixels, weighted by chroma: square the real picture, round the generated ones. Right "
    f"means within {judge.HUE_TOLERANCE:g} degrees.",
    cards and f'<div class="pairs">{"".join(cards)}</div>',
    "No colour prompts yet.",
  )


# ---- experts -----------------------------------------------------------------------------------------------------


def layer_words(layer):
  """ "r16_block1_layer0" in words; any other name as it is."""
  match = re.fullmatch(r"r(\d+)_block(\d+)_layer(\d+)", layer)
  return f"{match[1]} px, block {match[2]}, layer {match[3]}" if match else layer


def _rgb(colour):
  return f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}"


def _legend(experts):
  items = "".join(
    f'<li><i style="background:{_rgb(c)}"></i>{n}</li>' for n, c in enumerate(image_sheets.expert_colours(experts))
  )
  return f'<ul class="legend" aria-label="Colour of each expert"><li>Expert</li>{items}</ul>'


def expert_examples(examples):
  """Pictures with a map per layer of the expert that each pixel went to."""
  cards = []
  for example in examples:
    tiles = [_figure(_tile(example.image, example.caption), "generated")]
    for layer in sorted(example.layers, key=curves_lib.natural_key):
      index = np.asarray(example.layers[layer])
      if index.ndim == 1:
        index = index.reshape(math.isqrt(index.size), -1)
      source = data_uri(image_sheets.expert_map(index, example.experts[layer]), quality=None)
      tiles.append(
        _figure(f'<img class="tile map" alt="{text(f"experts of {layer}")}" src="{source}">', layer_words(layer))
      )
    cards.append(
      f'<article class="card"><h3>{text(example.caption)}</h3><div class="strip">{"".join(tiles)}</div></article>'
    )
  body = ""
  if cards:
    most = max(count for example in examples for count in example.experts.values())
    body = _legend(most) + f'<div class="stack">{"".join(cards)}</div>'
  return _section(
    "Which expert each pixel went to",
    "One map per mixture-of-experts layer. A colour names an expert of that layer; the same colour in two layers is "
    "not the same expert.",
    body,
    "No expert maps yet.",
  )


def _areas(load):
  """Stacked areas of a layer's shares as SVG that stretches to its box: time to the right, shares upward."""
  steps = load.steps.astype(np.float64)
  across = np.array([0.0, 100.0]) if len(steps) == 1 else 100 * (steps - steps[0]) / (steps[-1] - steps[0])
  shares = np.repeat(load.shares, 2, axis=0) if len(steps) == 1 else load.shares
  edges = 100 * (1 - np.concatenate([np.zeros((len(shares), 1)), np.cumsum(shares, axis=1)], axis=1))
  paths = []
  for expert, colour in enumerate(image_sheets.expert_colours(shares.shape[1])):
    lower = [f"{x:.1f} {y:.1f}" for x, y in zip(across, edges[:, expert])]
    upper = [f"{x:.1f} {y:.1f}" for x, y in zip(across, edges[:, expert + 1])]
    paths.append(f'<path fill="{_rgb(colour)}" d="M{"L".join(lower)}L{"L".join(upper[::-1])}Z"/>')
  return (
    '<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="share of each expert in time">'
    f"{''.join(paths)}</svg>"
  )


def expert_loads(loads):
  """Per layer: shares of the experts over time and at the end."""
  cards = []
  for load in loads:
    now = load.shares[-1]
    bar = "".join(
      f'<i style="width:{100 * share:.2f}%;background:{_rgb(colour)}" title="expert {n}: {100 * share:.1f} %"></i>'
      for n, (share, colour) in enumerate(zip(now, image_sheets.expert_colours(len(now))))
    )
    cards.append(
      f'<article class="card"><h3>{text(layer_words(load.layer))}</h3>{_areas(load)}<div class="now">{bar}</div>'
      f"<p>now: busiest {100 * now.max():.0f}\u00a0% (expert {now.argmax()}), idlest {100 * now.min():.1f}\u00a0% "
      f"(expert {now.argmin()}); even: {100 / len(now):.3g}\u00a0%</p></article>"
    )
  body = ""
  if cards:
    body = _legend(max(load.shares.shape[1] for load in loads)) + f'<div class="loads">{"".join(cards)}</div>'
  return _section(
    "Load of the experts",
    "Share of pixels that each expert of a layer got, from the first step (left) to the last (right), and, in the "
    "bar below, at the end.",
    body,
    "No expert loads in metrics.jsonl yet.",
  )


# ---- curves ------------------------------------------------------------------------------------------------------


def curves(charts):
  """Empty charts that the page's script draws."""
  body = "".join(f'<article class="card chart" data-chart="{n}"></article>' for n in range(len(charts)))
  return _section(
    "Curves",
    "Faint: as logged; bold: smoothed. Point at a chart, or focus it and use the arrow keys, to read values. Dotted "
    "lines: where the run was resumed; red ones: warnings.",
    body
    and (f'<noscript><p class="missing">The curves need JavaScript.</p></noscript><div class="charts">{body}</div>'),
    "No curves yet: metrics.jsonl holds fewer than two points.",
  )


def footer(log):
  """What could not be read, and how the page stands on its own."""
  words = "Made by aurora_jax from the run's folder. One file, no network."
  if log.skipped:
    words += f" {log.skipped} line{'s' if log.skipped > 1 else ''} of metrics.jsonl could not be read."
  return f"<footer>{text(words)}</footer>"
