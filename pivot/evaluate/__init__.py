"""What a model can do on held-out data: preference pairs, questions, and how sure the numbers are."""
