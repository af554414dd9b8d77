"""What data and model share, built without weights: tokenizer, chat template, image geometry.

`processor.py` is the fact sheet itself and `build.py` makes it from a config; `tokenizer.py` and `chat_template.py` are
its parts, `conversation.py` checks messages, `stock.py` reads what a checkpoint's folder prompts and shows,
`template_limit.py` bounds what a template may take.
"""

from pivot.processor.build import build_processor
from pivot.processor.processor import EncodedPair, Processor
from pivot.processor.tokenizer import load_tokenizer

__all__ = ["EncodedPair", "Processor", "build_processor", "load_tokenizer"]
