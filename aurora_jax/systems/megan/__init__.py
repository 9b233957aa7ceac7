"""MEGAN: a mixture of generators and a gate that gives every latent to one of them (arXiv 1805.02481)."""
