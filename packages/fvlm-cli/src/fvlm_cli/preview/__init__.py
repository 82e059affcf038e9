"""What a run would see and learn, found out with the real processor and collator and without the model's weights."""
