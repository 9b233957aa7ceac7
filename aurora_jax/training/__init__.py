"""Training of any system: step, loop, setup, optimizers, guard, health, progressive growing; and training of CLIP."""
