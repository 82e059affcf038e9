"""What is found out about a machine and about a model without its weights."""
