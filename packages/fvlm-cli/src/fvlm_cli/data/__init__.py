"""Training data from files and folders, each row with the place that errors give."""
