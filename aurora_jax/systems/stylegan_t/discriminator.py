"""StyleGAN-T's discriminator (arXiv 2301.09515, section 3.2): that of `models/feature_critic.py`."""

from aurora_jax.models.feature_critic import FeatureCritic as Discriminator
from aurora_jax.models.feature_critic import abstract_variables, fit, stacked_heads

__all__ = ["Discriminator", "abstract_variables", "fit", "stacked_heads"]
