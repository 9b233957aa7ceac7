"""Other people's checkpoints: released Aurora (PyTorch), CLIP (Hugging Face)."""
