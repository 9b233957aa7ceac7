"""File formats and name maps of other programs' checkpoints: safetensors, PyTorch, CLIP, DINO, Inception."""
