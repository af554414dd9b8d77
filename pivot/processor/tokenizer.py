"""The tokenizer of a run: loaded without running anybody's code, with the special tokens that pivot needs."""

from __future__ import annotations

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.language_model.path: no tokenizer that transformers knows at '{path}': {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"model.language_model.path: the tokenizer at '{path}' is a slow one ({type(tokenizer).__name__}); "
            "expected one with a tokenizer.json"
        )
    return tokenizer


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> int:
    """Make each of `tokens` one special token; the id of the first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    missing = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in special]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer.added_tokens_encoder[tokens[0]]
