"""Names of the metrics that the generic code reads, where a system reports them. Imports nothing, for quick
commands.
"""

EXPERT_LOAD = "moe/load/"  # with the layer's name: [E], share of tokens (or images) per expert
LOGIT_REAL, LOGIT_FAKE = "d/logit_real", "d/logit_fake"  # mean logits of real and of generated images
DISCRIMINATOR = "d"  # `Network.log_name` of the network that judges the others' images
JUDGED_LOSSES = (
  "adversarial",
  "matching",
)  # ends of the names of losses that the discriminator gives to other networks

# Metrics that separate a NaN in the data from one of the networks: 1 where not all pixels are finite.
BAD_IMAGES = {"guard/bad_real": "the batch's images", "guard/bad_generated": "the generator's images"}
