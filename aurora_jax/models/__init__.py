"""Flax modules that several systems share: layers, CLIP, DINO, Inception."""
