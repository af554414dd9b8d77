"""Warnings are silenced by their exact text, so that one which says something else still shows."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

from pivot.system.quiet import KNOWN, silence_known_output


def test_known_warnings_are_silent_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_known_output()
        for message in KNOWN:
            warnings.warn(message, FutureWarning, stacklevel=1)
            warnings.warn(f"{message} It gives wrong numbers.", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == [f"{message} It gives wrong numbers." for message in KNOWN]


def test_a_rank_draws_no_bars_of_transformers(tmp_path: Path) -> None:
    """Saving and loading show one each, where nothing says otherwise; seen in a process of its own."""
    code = (
        "import sys\n"
        "from pivot.system.quiet import silence_known_output\n"
        "from transformers import LlamaConfig, LlamaModel\n"
        "if sys.argv[2] == 'quiet': silence_known_output()\n"
        "model = LlamaModel(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,"
        " vocab_size=9))\n"
        "model.save_pretrained(sys.argv[1]); LlamaModel.from_pretrained(sys.argv[1])\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    shown = {}
    for how in ("quiet", "loud"):
        command = [sys.executable, "-c", code, str(tmp_path), how]
        shown[how] = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stderr
    assert "it/s" in shown["loud"] and shown["quiet"] == ""
