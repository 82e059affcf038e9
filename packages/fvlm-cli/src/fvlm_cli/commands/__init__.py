"""The verbs, one file each. They import what is heavy only when they run, so that `fvlm --help` is quick."""
