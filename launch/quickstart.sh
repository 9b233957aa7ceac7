#!/usr/bin/env bash
# From nothing to images on a laptop CPU, in about a quarter of an hour. Installs the requirements, builds a data set of
# image-text pairs (OpenMoji), trains two small CLIPs and a small Aurora on it, evaluates it and writes a report.
#
#   bash launch/quickstart.sh [FOLDER]      FOLDER: the output folder, default runs/quickstart
#
# The same command resumes where it stopped. A new FOLDER starts from the beginning.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/quickstart}
minutes=${QUICKSTART_MINUTES:-14.5}  # for all parts, downloads included; training takes the time that is left
begin=$(date +%s)

bash launch/setup.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
aurora() { .venv/bin/python -m aurora_jax "$@"; }
say() { printf '\n== %s (%d s so far)\n' "$1" $(($(date +%s) - begin)); }

say "1/5  data: OpenMoji images and their names, as sharded tfrecords"
[ -f "$out/data/manifest.json" ] || aurora build-data --source openmoji --out "$out/data" --resolution 64 --shards 8

say "2/5  two small CLIPs at the same time: one guides the generator, the other judges it"
judge=  # its process; two small trainings at the same time finish sooner than one after the other
if [ ! -f "$out/judge/config.json" ]; then
  .venv/bin/python -m aurora_jax train-clip --data "$out/data" --out "$out/judge" --split all --seed 1 \
    --seconds 240 > "$out/judge.log" 2>&1 &
  judge=$!
  trap 'kill "$judge" 2> /dev/null || true' EXIT
fi
[ -f "$out/clip/config.json" ] || aurora train-clip --data "$out/data" --out "$out/clip" --split train --seed 0 --seconds 240
if [ -n "$judge" ]; then
  wait "$judge" || { status=$?; cat "$out/judge.log" >&2; exit "$status"; }
  trap - EXIT
  tail -n 3 "$out/judge.log"
fi

say "3/5  the generator"
left=$(awk -v minutes="$minutes" -v used=$(($(date +%s) - begin)) 'BEGIN { left = minutes * 60 - used - 40; print (left > 60 ? left : 60) }')
aurora train --config configs/openmoji_32.py --workdir "$out/run" --config.data.path="$out/data" \
  --config.text.clip="$out/clip" --config.train.max_seconds="$left"

say "4/5  evaluation by the judge"
aurora evaluate --workdir "$out/run" --judge "$out/judge"

say "5/5  images"
aurora sample --workdir "$out/run" --out "$out/grid.png" --latents 4 --columns 2 \
  --prompt "red heart" --prompt "green circle" --prompt "blue square" --prompt "grinning face" \
  --prompt "globe showing Americas" --prompt "banana" --prompt "thumbs up" --prompt "red apple"

cat <<TEXT

Done in $(($(date +%s) - begin)) seconds.
  images      $out/grid.png
  report      $out/run/report.html
  training    $out/run/samples/
Your own prompts:
  .venv/bin/python -m aurora_jax sample --workdir $out/run --prompt "red heart" --out mine.png
TEXT
