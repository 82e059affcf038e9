"""Asking a model about images: loading it, putting questions to it, taking its answers whole or as they come."""
