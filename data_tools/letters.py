"""A stand-in for a model's processor, for simulating runs without one: a token a letter, 64 tokens an image.

Its token counts follow from the index alone, so a plan over millions of samples opens no shard; and the real loader
accepts it, since what it encodes is exactly as long as the index says.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pivot.data.lengths import LENGTH_RECORD, Lengths
from pivot.data.samples import ROLES_OF_KIND, UNPAIRED, image_parts, message_text
from pivot.data.shards import ShardSet
from pivot.encoders.facts import ImageGeometry
from pivot.processor import EncodedPair

IMAGE_TOKENS = 64
IMAGE_TOKEN_ID, END_OF_TURN = 256, 257


class LetterProcessor:
    geometry = ImageGeometry(size=32, num_tokens=IMAGE_TOKENS, mean=(0.5,) * 3, std=(0.5,) * 3, fit="squash")
    image_token_id = IMAGE_TOKEN_ID
    fingerprint = "letters"

    def encode(self, prompt: list[dict[str, Any]], completions: dict[str, list[dict[str, Any]]]) -> EncodedPair:
        num_images = len(image_parts(prompt))
        ids = np.concatenate([np.full(num_images * IMAGE_TOKENS, IMAGE_TOKEN_ID), _letters(message_text(prompt))])
        encoded = {
            role: np.append(_letters(message_text(messages)), END_OF_TURN) for role, messages in completions.items()
        }
        return EncodedPair(ids, encoded, num_images)


def letter_lengths(shards: ShardSet) -> Lengths:
    """What LetterProcessor would count."""
    index = shards.index
    records = np.zeros(len(shards), dtype=LENGTH_RECORD)
    records["image"] = index["n_images"].astype(np.uint32) * IMAGE_TOKENS
    records["prompt"] = index["chars_prompt"] + records["image"]
    for role in ROLES_OF_KIND[shards.kind]:
        letters = index[f"chars_{role}"]
        records[role] = np.where(letters > 0, letters + 1, 0) if shards.kind == UNPAIRED else letters + 1
    return Lengths.from_records(records)


def _letters(text: str) -> np.ndarray:
    return np.array([ord(letter) % 256 for letter in text], dtype=np.int64)
