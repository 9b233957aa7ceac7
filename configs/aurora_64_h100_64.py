"""The recipe of configs/aurora_64.py on 8 nodes of 8 H100 (80 GB): global batch 1024, 16 images per GPU.

Target: zero-shot FID-30k on COCO at 64 pixels of 6.2, as there. Cost, computed and not measured: `compile` counts 138
TFLOP per GPU and step at 32 images per GPU (configs/aurora_64_a100_32.py), so about 69 here. At 40 % of the GPU's 989
TFLOP/s that is 0.17 s a step, 2.7 days and 4,200 GPU-hours for 1,350,000 steps.

  CONFIG=configs/aurora_64_h100_64.py RUN=RUN DATA=DATA CLIP=CLIP_VIT_L_14_FOLDER \\
      sbatch --nodes=8 launch/slurm_a100.sbatch

which runs, once on each node,

  python -m aurora_jax train --config configs/aurora_64_h100_64.py --workdir RUN --require gpu \\
      --config.data.path=DATA --config.text.clip=CLIP_VIT_L_14_FOLDER

An expert axis of 16 spans two nodes. If the network between nodes is slow, --config.mesh.data=8 --config.mesh.expert=8
keeps the exchange within a node, with two experts of a 16-expert layer on each GPU.

Will it fit? `compile --config configs/aurora_64_h100_64.py --topology h100-8x8` says so without a GPU.

Variant `test`: the same code at a toy size, on all devices.
"""

from configs import aurora_64


def get_config(variant=""):
  return aurora_64.on_pod("aurora_64_h100_64", variant, data=4)
