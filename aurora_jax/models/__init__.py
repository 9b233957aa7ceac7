"""Flax modules: CLIP, generator, discriminator."""
