"""Exports a run's generator for PyTorch: a folder that is complete in itself, in the Hugging Face Hub's layout.

The folder has config.json, model.safetensors, the generator in one PyTorch file, pipeline.py, the text encoder with its
tokenizer, and README.md, a model card with samples, measured numbers and the cost of training as the run recorded them.
In PyTorch, without JAX and without this package:

  from pipeline import AuroraPipeline      # with the folder in sys.path
  images = AuroraPipeline.from_pretrained("exported/hearts")("a red heart", num_images=4, seed=0, psi=0.7)

`sample`, `interpolate`, `evaluate`, `inspect` and --config.train.init_from take such a folder in place of a run, after
fine-tuning in PyTorch too.

Examples:
  python -m aurora_jax export --workdir runs/openmoji_32 --out exported/hearts --license cc-by-sa-4.0
  python -m aurora_jax export --workdir runs/openmoji_32 --out exported/hearts --push OWNER/hearts --private
  python -m aurora_jax export --workdir runs/aurora --out model.pth --format released
  python -m aurora_jax export --workdir runs/openmoji_32 --out exported/onnx --format onnx

--format released writes a weight file of the system's released PyTorch code instead, as `convert RUN FILE` does.
--format onnx writes the generator and its text encoder for onnxruntime, and checks its images against ours. It needs
`pip install 'aurora_jax[onnx]'`.
Nothing leaves this machine without --push, which needs a token of the Hub (HF_TOKEN, or `hf auth login`).
"""

import argparse
import signal

from aurora_jax import text
from aurora_jax.cli import flag_types, sampling_flags
from aurora_jax.errors import UserError
from aurora_jax.evaluation import arguments

_SHEET = "samples.png"
_LATENTS = 4  # images of a prompt on the card's sheet
_GRID = 24  # images of a generator without text
_MOST_PROMPTS = 16
_CHECKED = 2  # prompts whose images an export to ONNX is checked by


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags."""
  parser.add_argument(
    "--workdir", type=flag_types.path, required=True, metavar="RUN", help="the run's folder, as of `train` or `convert`"
  )
  parser.add_argument(
    "--out",
    type=flag_types.path,
    required=True,
    metavar="FOLDER",
    help="the folder to make; a .pth or .safetensors file for --format released",
  )
  parser.add_argument("--step", type=int, metavar="S", help="of the checkpoint (default: the newest)")
  parser.add_argument(
    "--weights",
    choices=("ema", "generator"),
    default="ema",
    help="the moving averages, or the parameters themselves (default ema)",
  )
  parser.add_argument(
    "--clip",
    type=flag_types.path,
    metavar="DIR",
    help="the CLIP folder whose text encoder goes along (default: the one in the run's config)",
  )
  sampling_flags.add_change_flag(parser)
  parser.add_argument("--format", choices=tuple(_FORMATS), default="hub", help="of what is written (default hub)")
  parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
  card = parser.add_argument_group("model card")
  card.add_argument(
    "--license", metavar="ID", help="of the weights, as the Hub calls it: cc-by-sa-4.0, apache-2.0, ... (default other)"
  )
  card.add_argument(
    "--prompt",
    action="append",
    default=[],
    metavar="TEXT",
    help="of the samples; may be given several times (default: some sample prompts of the run)",
  )
  card.add_argument("--no-samples", action="store_true", help="leave the samples out, which take time")
  hub = parser.add_argument_group("Hugging Face Hub")
  hub.add_argument("--push", metavar="OWNER/NAME", help="then upload the folder to this repository")
  hub.add_argument("--private", action="store_true", help="with --push: a repository that is made is private")


def run(args: argparse.Namespace) -> None:
  """Exports in the format that was asked for."""
  # SIGTERM ends the process as Ctrl-C does: what is half written is removed.
  before = signal.signal(signal.SIGTERM, _terminated)
  try:
    _FORMATS[args.format](args)
  finally:
    signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _terminated(number, frame):
  del frame
  raise SystemExit(128 + number)


def _to_released(args):
  others = {"--clip": args.clip, "--license": args.license, "--prompt": args.prompt, "--push": args.push}
  for name, value in {**others, "--private": args.private, "--no-samples": args.no_samples}.items():
    if value:
      raise UserError(f"{name} is for --format hub: a released weight file has no place for it")

  from aurora_jax.cli import convert

  convert.to_released(args.workdir, args.out, args.weights, args.step, overwrite=args.overwrite)


def _to_hub(args):
  from aurora_jax.interop.hub import folder

  _, options = _prepared(args, folder.check_target)
  from aurora_jax.runs.progress import progress
  from aurora_jax.systems import hub

  with progress(f"writing {args.out}"):
    done = hub.export_run(args.workdir, args.out, **options)
  shown = text.printable(text.path_text(done.path))
  print(
    f"{shown}: {done.pipeline}, {done.weights} of step {done.step:,}, {done.parameters / 1e6:,.2f} M parameters; "
    "README.md is its model card"
  )
  if args.push:
    from aurora_jax.interop.hub import remote
    from aurora_jax.runs.progress import progress

    with progress(f"uploading to {args.push}"):
      address = remote.push(done.path, args.push, private=args.private)
    print(f"pushed to {address}")


def _to_onnx(args):
  for name, value in {"--push": args.push, "--private": args.private}.items():
    if value:
      raise UserError(f"{name} is for --format hub")

  from aurora_jax.interop.hub import onnx_files

  onnx_files.check_packages()
  from aurora_jax import xla_flags

  xla_flags.run_in_order()  # for the memory of large generators
  from aurora_jax.evaluation import onnx_export
  from aurora_jax.runs.progress import progress

  prompts, options = _prepared(args, onnx_export.check_target)
  with progress(f"writing {args.out} and checking it"):
    done = onnx_export.export(args.workdir, args.out, prompts[:_CHECKED] or [""], **options)
  shown = text.printable(text.path_text(done.path))
  print(
    f"{shown}: ONNX opset {onnx_files.OPSET}, {done.weights} of step {done.step:,}, {done.parameters / 1e6:,.2f} M "
    f"parameters; images within {done.difference:.1e} of ours; README.md is its model card"
  )


def _prepared(args, check_target):
  """Checks everything that is not slow, and draws the card's samples. (prompts, options of the export)."""
  from aurora_jax.interop.hub import remote
  from aurora_jax.runs import checkpoint_folder
  from aurora_jax.systems.model_folder import ModelFolder

  if args.private and not args.push:
    raise UserError("--private is for --push OWNER/NAME")
  if args.push:
    remote.check_push(args.push)
  arguments.check_prompts(args.prompt)
  if len(args.prompt) > _MOST_PROMPTS:
    raise UserError(f"at most {_MOST_PROMPTS} prompts have room on the card, got {len(args.prompt)}")
  place = ModelFolder.open(args.workdir)
  if place.exported:
    raise UserError(f"{args.workdir} is an exported folder already, not a run")
  experiment = place.experiment
  if args.prompt and not experiment.conditional:
    raise UserError(f"{args.workdir} is a run of '{experiment.system}', which takes no prompts")
  step = checkpoint_folder.chosen(place.run.checkpoints, args.step)
  if args.clip is None:
    sampling_flags.check_references(place.run, experiment, args.allow_config_change, ("text",))

  from aurora_jax.systems import hub_card

  check_target(args.out, overwrite=args.overwrite)
  prompts = args.prompt or hub_card.prompts(experiment)
  card, extra = {"license": args.license or "other"}, {}
  if prompts and prompts[0]:
    card["prompt"] = prompts[0]
  if prompts and not args.no_samples:
    content, note = _samples(args, step, prompts)
    card |= {"image": _SHEET, "image_note": note}
    extra[_SHEET] = content
  options = {"step": step, "weights": args.weights, "clip": args.clip, "overwrite": args.overwrite}
  return prompts, options | {"card": card, "extra": extra}


def _samples(args, step, prompts):
  """(a PNG of samples, how they were drawn); by the run's own sampler, before the export needs the memory."""
  import io

  from aurora_jax import xla_flags

  xla_flags.run_in_order()  # for the memory of large generators
  from aurora_jax.evaluation import sampling, trained_generator
  from aurora_jax.reporting import image_sheets
  from aurora_jax.runs.progress import progress

  count = _LATENTS if prompts[0] else _GRID
  model = trained_generator.load(
    args.workdir,
    step,
    images=len(prompts) * count,
    prompts_at_once=len(prompts),
    clip=args.clip,
    dtype="float32",
    weights=args.weights,
  )
  with progress("sampling for the card") as update:
    samples = model.sample(prompts, latents_per_prompt=count, choices=True, on_batch=update)
  makers, number = sampling.makers(model.system, samples)
  sheet = image_sheets.sample_sheet(samples.images, prompts, makers, number)
  stream = io.BytesIO()
  sheet.save(stream, format="PNG", optimize=True)
  what = f"{count} images of each prompt" if prompts[0] else f"{count} images"
  if makers is not None:
    what += "; the number below an image is the generator that made it"
  psi = ", psi 1 (no truncation)" if model.system.truncates else ""
  return stream.getvalue(), f"{what}. Not selected: seed 0{psi}."


# A further format is one entry and its function.
_FORMATS = {"hub": _to_hub, "onnx": _to_onnx, "released": _to_released}
