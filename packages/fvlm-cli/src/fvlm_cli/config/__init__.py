"""A training run's config: its schema, and how it is read from YAML and the command line."""
