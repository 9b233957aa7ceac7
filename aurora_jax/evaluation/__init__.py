"""Features, metrics, protocols, and the pictures and pages a person looks at."""
