"""How good a model's answers are: metrics, and the answers to the evaluation rows."""
