"""aurora_jax: the sparse mixture-of-experts text-to-image GAN Aurora (arXiv 2309.03904) in JAX/Flax."""

__version__ = "0.1.0"
