"""What a run will need, from its config alone: parameters, memory by part, time, and what fits on which card."""
