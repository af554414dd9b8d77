"""Ranks, files, locks, workers, processes, signals: nothing about training."""
