"""The page: self-contained, escaped, complete with what there is, honest about what is missing."""

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from aurora_jax.errors import UserError
from aurora_jax.evaluation.color import check_color
from aurora_jax.evaluation.examples import ColorExample, ExpertExample, HeldOutExample
from aurora_jax.reporting import report

RED, GREEN, WHITE = [1.0, -1, -1], [-1.0, 1, -1], [1.0, 1, 1]
NASTY = "</script><script>alert('x')</script> & \"quotes\""


class Page(html.parser.HTMLParser):
  """Collects what a page refers to, its elements, and the text of every section; insists on balanced tags."""

  VOID = {"meta", "link", "img", "input", "br", "path"}

  def __init__(self, source):
    super().__init__()
    self.references, self.elements, self.sections, self.stack = [], [], {}, []
    self.heading, self.data = None, ""
    self.feed(source)
    assert self.stack == []

  def handle_starttag(self, tag, attrs):
    attrs = dict(attrs)
    self.elements.append((tag, attrs))
    self.references += [value for name, value in attrs.items() if name in ("src", "href", "action", "srcset", "data")]
    if tag not in self.VOID:
      self.stack.append((tag, attrs))

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.stack and self.stack[-1][0] == tag, f"</{tag}> closes {self.stack[-1:]}"
    self.stack.pop()

  def handle_data(self, data):
    tags = [tag for tag, _ in self.stack]
    if "script" in tags:
      if self.stack[-1][1].get("id") == "data":
        self.data += data
    elif "h2" in tags:
      self.heading = data
      self.sections[data] = ""
    elif self.heading and "section" in tags:
      self.sections[self.heading] += data

  def ids(self):
    return {attrs["id"] for _, attrs in self.elements if "id" in attrs}


def flat(color, *lead):
  return np.broadcast_to(np.array(color, np.float32), lead + (8, 8, 3))


@pytest.fixture
def run_dir(tmp_path):
  """A run's folder with two sample sheets and a short log."""
  run = tmp_path / "runs" / "tiny"
  (run / "samples").mkdir(parents=True)
  (run / "config.json").write_text(
    json.dumps(
      {"name": "tiny <run>", "generator": {"resolution": 32, "experts": {"8": 4, "16": 8}}, "data": {"path": NASTY}}
    )
  )
  rows = [{"kind": "start", "step": 0, "seconds": 0}]
  for step in (10, 20, 30):
    rows.append(
      {
        "kind": "train",
        "step": step,
        "seconds": 65.0 * step / 30,
        "images": 16 * step,
        "loss/r1": 0.1 * step,
        "moe/load/r8_block0_layer0/0": 0.25,
        "moe/load/r8_block0_layer0/1": 0.75,
      }
    )
  rows.append(
    {
      "kind": "judge",
      "step": 30,
      "judge/top1_of_32": 0.875,
      "judge/chance_of_32": 1 / 32,
      "judge/heldout_top1_of_all": 0.25,
      "judge/heldout_captions": 1918,
      "judge/oddity": 7.0,
    }
  )
  (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for step, color in ((10, "red"), (30, "blue")):
    Image.new("RGB", (64, 32), color).save(run / "samples" / f"step-{step:08d}.png")
  return run


def full_panels():
  real, made = flat(RED), flat(RED, 2)
  return report.Panels(
    expert_examples=(
      ExpertExample(
        NASTY,
        real,
        {"r8_block0_layer0": np.arange(16) % 4, "r16_block1_layer0": np.zeros((4, 4), int)},
        {"r8_block0_layer0": 4, "r16_block1_layer0": 8},
      ),
    ),
    heldout=(HeldOutExample(NASTY, real, made), HeldOutExample("two words", real, made)),
    colors=(
      ColorExample(check_color("red heart", made, real), real, made),
      ColorExample(check_color("green circle", made, flat(GREEN)), flat(GREEN), made),
      ColorExample(check_color("white flag", flat(WHITE, 2), real), real, flat(WHITE, 2)),
    ),
    notes=(NASTY,),
  )


def read(path):
  source = path.read_text(encoding="utf-8")
  return source, Page(source)


def test_a_full_page(run_dir):
  source, page = read(report.write_report(run_dir, full_panels()))
  content = {title: " ".join(text.split()) for title, text in page.sections.items()}
  assert "87.5 %" in content["The judge's figures"] and "chance 3.1 %" in content["The judge's figures"]
  assert "among all 1,918" in content["The judge's figures"] and "oddity" in content["The judge's figures"]
  assert "two words" in content["Held-out prompts"] and "alert" in content["Held-out prompts"]
  assert "right, 0\u00b0 apart" in content["Color prompts"]
  assert "wrong, 120\u00b0 apart" in content["Color prompts"]
  assert "wrong, no hue" in content["Color prompts"] and "no colored pixels" in content["Color prompts"]
  assert "8 px, block 0, layer 0" in content["Expert of each pixel"]
  assert "16 px, block 1, layer 0" in content["Expert of each pixel"]
  assert "busiest 75 % (expert 1), least busy 25.0 % (expert 0)" in content["Load of the experts"]
  assert all("yet" not in text for text in content.values()), content
  for fact in ("tiny &lt;run&gt;", "480", "1 min 5 s", "4 at 8, 8 at 16"):
    assert fact in source
  assert {"sample-slider", "sample-image", "sample-label", "sample-play", "data"} <= page.ids()


def test_warnings_and_skipped_steps_are_marked(run_dir):
  assert "Warnings" not in read(report.write_report(run_dir))[1].sections
  with (run_dir / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"kind": "warning", "step": 20, "words": NASTY, "value": 1.0, "limit": 2.0}) + "\n")
    file.write(json.dumps({"kind": "skipped", "step": 25, "words": "generator: loss/g_clip is nan"}) + "\n")
  source, page = read(report.write_report(run_dir))
  assert "step 20 </script>" in page.sections["Warnings"] and "<script>alert" not in source
  assert "step 25 skipped: generator: loss/g_clip is nan" in page.sections["Warnings"]
  assert json.loads(page.data)["warnings"] == [20]
  assert "<dt>Warnings</dt><dd>1</dd>" in source and "<dt>Skipped steps</dt><dd>1</dd>" in source


def test_the_page_is_self_contained(run_dir):
  source, page = read(report.write_report(run_dir, full_panels()))
  outside = [r for r in page.references if not r.startswith("data:")]
  assert outside == []
  assert not re.search(r"@import|url\((?!data:|#)", source)
  without_namespace = source.replace("http://www.w3.org/2000/svg", "")
  assert "http://" not in without_namespace and "https://" not in without_namespace
  assert "default-src 'none'" in source
  assert [p.name for p in run_dir.iterdir() if "report" in p.name] == ["report.html"]


def test_everything_from_outside_is_escaped(run_dir):
  source, page = read(report.write_report(run_dir, full_panels()))
  assert "<script>alert" not in source
  assert [tag for tag, _ in page.elements].count("script") == 2  # the data and the page's own


def test_the_script_gets_samples_and_curves(run_dir):
  _, page = read(report.write_report(run_dir))
  data = json.loads(page.data)
  assert [shot["label"] for shot in data["samples"]] == ["step 10 \u00b7 160 images", "step 30 \u00b7 480 images"]
  assert all(shot["src"].startswith("data:image/") for shot in data["samples"])
  assert data["charts"] == [
    {"title": "R1", "log": False, "series": [{"name": "r1", "steps": [10, 20, 30], "values": [1.0, 2.0, 3.0]}]}
  ]
  assert sum("data-chart" in attrs for _, attrs in page.elements) == 1


def test_a_name_in_the_log_cannot_end_the_script(run_dir):
  with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
    for step in (40, 50):
      file.write(json.dumps({"step": step, "loss/</script><b>": 1.0}) + "\n")
  source, page = read(report.write_report(run_dir))
  assert "</script><b>" not in source
  assert any(s["name"] == "</script><b>" for chart in json.loads(page.data)["charts"] for s in chart["series"])


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
  source, page = read(report.write_report(tmp_path))
  assert len(page.sections) == 7 and all("yet" in text for text in page.sections.values()), page.sections
  assert "No metrics.jsonl" in source and "No readable config.json" in source
  assert tmp_path.name in source


def test_figures_of_the_caller_replace_the_log(run_dir):
  _, page = read(report.write_report(run_dir, report.Panels(name="other", figures={"judge/top1_of_32": 0.5})))
  assert "50.0" in page.sections["The judge's figures"] and "87.5" not in page.sections["The judge's figures"]


def test_damaged_files_do_not_stop_the_page(run_dir):
  (run_dir / "samples" / "step-00000020.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
  (run_dir / "config.json").write_text('{"half": ')
  with open(run_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
    file.write('{"step": 4')
  source, page = read(report.write_report(run_dir))
  assert len(json.loads(page.data)["samples"]) == 2
  assert "1 line of metrics.jsonl could not be read" in source


def test_a_missing_folder_is_named(tmp_path):
  with pytest.raises(UserError, match="no_such_run"):
    report.write_report(tmp_path / "no_such_run")


def test_writing_again_replaces_the_page(run_dir):
  first = report.write_report(run_dir).read_text(encoding="utf-8")
  assert report.write_report(run_dir).read_text(encoding="utf-8") == first
