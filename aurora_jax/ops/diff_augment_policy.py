"""Names of DiffAugment's changes (`ops/diff_augment.py`). Does not import JAX, for quick commands."""

# In the order of application. Each has its own random stream, so leaving one out does not change the others.
POLICY = ("brightness", "saturation", "contrast", "translation", "cutout")
