"""Post-train a whole multimodal LLM with preference optimisation, and get a better vision encoder out."""

__version__ = "0.1.0"
