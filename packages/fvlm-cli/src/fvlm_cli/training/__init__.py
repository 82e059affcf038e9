"""What `fvlm train` does, as library code: `fvlm_cli.training.run.run`."""
