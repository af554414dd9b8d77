"""Warnings are silenced by their exact text, so that one which says something else still shows."""

from __future__ import annotations

import warnings

from pivot.system.quiet import KNOWN, silence_known_warnings


def test_known_warnings_are_silent_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        silence_known_warnings()
        for message in KNOWN:
            warnings.warn(message, FutureWarning, stacklevel=1)
            warnings.warn(f"{message} It gives wrong numbers.", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == [f"{message} It gives wrong numbers." for message in KNOWN]
