"""What data and model share, built without weights: tokenizer, chat template, image geometry.

`processor.py` is the fact sheet itself, `conversation.py` checks messages, `stock.py` reads what a checkpoint's folder
prompts and shows, `template_limit.py` bounds what a template may take.
"""

from pivot.processor.processor import EncodedPair, Processor, build_processor, load_tokenizer

__all__ = ["EncodedPair", "Processor", "build_processor", "load_tokenizer"]
