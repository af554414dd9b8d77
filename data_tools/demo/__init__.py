"""The demo world: drawn scenes, questions about them, and a tiny model's architecture. `python -m data_tools demo`."""
