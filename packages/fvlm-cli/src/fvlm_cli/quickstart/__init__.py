"""What ``fvlm quickstart`` does, as library code: handwriting, training, merging, checking."""
