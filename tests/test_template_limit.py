"""A chat template that never ends or eats memory is refused within seconds, in a process of its own."""

import time

import pytest

from pivot import template_limit
from pivot.template_limit import require_bounded

NESTED = "{% for i in range(100000) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (NESTED, "more than 1 s"),
        ("{% generation %}" + NESTED + "{% endgeneration %}", "more than 1 s"),
        ("{% if add_generation_prompt %}" + NESTED + "{% endif %}", "more than 1 s"),
        ("{% set text = 'x' * 10**10 %}", "more than 1.1 GB of memory"),
        ("{{ 'x' * 2 * 10**6 }}", "more than 1,000,000 letters"),
    ],
)
def test_what_has_no_bounds_is_refused(template, words, monkeypatch):
    monkeypatch.setattr(template_limit, "MAX_SECONDS", 1)
    with pytest.raises(ValueError, match=f"chat template: it takes {words} to render four short messages; correct it"):
        require_bounded(template)


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "{{ raise_exception('no') }}", "{% broken", ""])
def test_others_pass(template):
    """What is wrong otherwise is told when the template is rendered in earnest; a second look costs nothing."""
    require_bounded(template)
    began = time.monotonic()
    require_bounded(template)
    assert time.monotonic() - began < 0.01
