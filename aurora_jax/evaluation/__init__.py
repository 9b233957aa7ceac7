"""Features, metrics, protocols, samplers and the judge."""
