"""The results of `bench accelerator` as a readable page."""

from collections.abc import Iterator, Mapping
from typing import Any

from aurora_jax.performance import markdown


def lines(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
  """Lines of Markdown.

  Args:
    parts: {name: {"status", "reason", "seconds", "results"}}, as accelerator.json has them.
  """
  device = parts.get("device", {}).get("results", {})
  yield f"# {device.get('device', 'unknown device')}"
  yield ""
  yield (
    f"JAX {device.get('jax', '?')}, Python {device.get('python', '?')}. Data sheet: "
    f"{device.get('data_sheet') or 'none known here, so there are no shares of peaks'}."
  )
  if device.get("toy"):
    yield "Toy sizes (--toy): they show that the code runs, and say nothing about the device."
  yield "docs/pods.md says what the numbers mean."
  yield ""
  yield from markdown.table(
    ("part", "status", "seconds", "why"),
    [(name, part["status"], f"{part['seconds']:.0f}", part["reason"]) for name, part in parts.items()],
  )
  for name, part in parts.items():
    results = part["results"]
    tables = list(_joined(_TABLES[name](results))) if name in _TABLES and results else []
    if tables:
      yield from ("", f"## {_TITLES[name]}", *tables)


def _joined(tables):
  for heads, rows in tables:
    if rows:
      yield ""
      filled = [place for place in range(len(heads)) if any(row[place] != "" for row in rows)]
      keep = lambda cells: [cells[place] for place in filled]
      yield from markdown.table(keep(heads), [keep(row) for row in rows])


def _number(value, digits=4):
  return "" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def _percent(value):
  return "" if value is None else f"{100 * value:.1f} %"


def _gib(value):
  return "" if value is None else f"{value / 2**30:.2f}"


def _device(results):
  rows = [
    (
      row["what"],
      _number(row.get("tflops_per_second")),
      _number(row.get("gigabytes_per_second")),
      _percent(row.get("share_of_data_sheet")),
      row.get("error", ""),
    )
    for row in results.get("rows", ())
  ]
  yield ("what", "TFLOP/s", "GB/s", "of the data sheet", "failed"), rows


def _goldens(results):
  names = ("image", "w", "moe_loss", "router_logits", "gradient")
  rows = [
    (
      row["precision"],
      *(_number(row.get(name), 2) for name in names),
      f"{row['tokens_at_another_expert']} of {row['tokens']}" if "tokens" in row else "",
      row.get("error", ""),
    )
    for row in results.get("rows", ())
  ]
  yield ("precision", *names, "tokens at another expert", "failed"), rows


def _sampling(results):
  rows = [
    (
      row["arithmetic"],
      row["batch"],
      _number(row.get("images_per_second")),
      _number(None if row.get("seconds") is None else row["seconds"] * 1e3),
      _percent(row.get("share_of_bfloat16_peak")),
      _percent(row.get("share_of_own_peak")),
      _number(row.get("fullest_expert"), 3),
      row.get("error", ""),
    )
    for row in results.get("rows", ())
  ]
  yield (
    (
      "arithmetic",
      "batch",
      "images/s",
      "ms a call",
      "of the bfloat16 peak",
      "of the peaks of its precisions",
      "fullest expert / mean",
      "failed",
    ),
    rows,
  )
  yield from _kernels(results)


def _training(results):
  if results.get("step"):
    step = results["step"]
    yield (
      (
        "batch",
        "arithmetic",
        "ms a step",
        "images/s",
        "of the bfloat16 peak",
        "of the peaks of its precisions",
        "fullest expert / mean",
      ),
      [
        (
          results["batch"],
          results["arithmetic"],
          _number(step["milliseconds"]),
          _number(step["images_per_second"]),
          _percent(step["share_of_bfloat16_peak"]),
          _percent(step["share_of_own_peak"]),
          _number(results.get("fullest_expert"), 3),
        )
      ],
    )
  yield (
    ("phase", "of the steps", "ms", "slowest ms", "useful TFLOP", "of the bfloat16 peak"),
    [
      (
        row["phase"],
        _percent(row["of_the_steps"]),
        _number(row["milliseconds"]),
        _number(row["slowest_milliseconds"]),
        _number(row["useful_tflops"]),
        _percent(row["share_of_bfloat16_peak"]),
      )
      for row in results.get("phases", ())
    ],
  )
  yield (
    (
      "batch",
      "compiled in s",
      "predicted GiB",
      "peak so far, GiB",
      "limit, GiB",
      "ms a step",
      "images/s",
      "of the bfloat16 peak",
      "failed",
    ),
    [
      (
        row["batch"],
        _number(row.get("compile_seconds"), 3),
        _gib(row.get("predicted_bytes")),
        _gib(row.get("peak_memory_bytes")),
        _gib(results.get("memory_limit_bytes")),
        _number(row.get("milliseconds")),
        _number(row.get("images_per_second")),
        _percent(row.get("share_of_bfloat16_peak")),
        row.get("error") or ", ".join(f"{name} not compiled in time" for name in row.get("not_compiled", ())),
      )
      for row in results.get("batches_tried", ())
    ],
  )
  yield from _kernels(results)


def _kernels(results):
  yield (
    ("longest kernels of one run", "calls", "ms", "share", "product or convolution"),
    [
      (
        row["kernel"],
        row["calls"],
        _number(row["milliseconds"]),
        _percent(row["share"]),
        "yes" if row["is_product"] else "no",
      )
      for row in results.get("kernels", ())
    ],
  )


def _pytorch(results):
  yield (
    ("arithmetic", "batch", "images/s", "ms a call", "relative difference from JAX", "failed"),
    [
      (
        row["arithmetic"],
        row["batch"],
        _number(row.get("images_per_second")),
        _number(None if row.get("seconds") is None else row["seconds"] * 1e3),
        _number(row.get("relative_difference_from_jax"), 2),
        row.get("error", ""),
      )
      for row in results.get("rows", ())
    ],
  )


def _rows_of(*names):
  """A table whose first columns are these entries of a row."""

  def table(results):
    rows = [
      (
        *(row.get(name, "") for name in names),
        _number(row.get("milliseconds")),
        _number(row.get("tflops_per_second")),
        _percent(row.get("share_of_own_peak")),
        _number(None if row.get("temporaries_bytes") is None else row["temporaries_bytes"] / 2**20),
        row.get("error", ""),
      )
      for row in results.get("rows", ())
    ]
    yield (*names, "ms", "useful TFLOP/s", "of the peaks of its precisions", "temporaries, MiB", "failed"), rows

  return table


_TABLES = {
  "device": _device,
  "goldens": _goldens,
  "sampling": _sampling,
  "training": _training,
  "pytorch": _pytorch,
  "experts": _rows_of("tokens", "experts", "routing", "pass", "backend"),
  "attention": _rows_of("what", "images", "pass", "implementation"),
}
_TITLES = {
  "device": "Plain products and copies",
  "goldens": "Numbers of the released PyTorch generator",
  "sampling": "Sampling",
  "training": "Training",
  "pytorch": "Sampling by the PyTorch twin (this project's, eager)",
  "experts": "Experts",
  "attention": "Attention",
}
