"""A run's folder: checkpoints, log, status, costs, guards, profile, export."""
