"""What `fvlm env` finds out."""
