"""The recipe of configs/aurora_64.py on 32 nodes of 8 A100, the size of the paper's machine: 4 images per GPU.

Target: zero-shot FID-30k on COCO at 64 pixels of 6.2, as there. Cost: the paper trained for a week on 256 A100, 43,000
GPU-hours. Computed, not measured: `compile` counts 18 TFLOP per device and step at 4 images per device (on a TPU pod of
the same size). At 40 % of the GPU's 312 TFLOP/s that is 0.15 s a step, 2.3 days for 1,350,000 steps.

  CONFIG=configs/aurora_64_a100_256.py RUN=RUN DATA=DATA CLIP=CLIP_VIT_L_14_FOLDER \\
      sbatch --nodes=32 launch/slurm_a100.sbatch

which runs, once on each node,

  python -m aurora_jax train --config configs/aurora_64_a100_256.py --workdir RUN --require gpu \\
      --config.data.path=DATA --config.text.clip=CLIP_VIT_L_14_FOLDER

An expert axis of 16 spans two nodes. If the network between nodes is slow, --config.mesh.data=32 --config.mesh.expert=8
keeps the exchange within a node, with two experts of a 16-expert layer on each GPU.

Variant `test`: the same code at a toy size, on all devices.
"""

from configs import aurora_64


def get_config(variant=""):
  return aurora_64.on_pod("aurora_64_a100_256", variant, data=16)
