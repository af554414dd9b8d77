"""A chat template that never ends or eats memory is refused within seconds, in a process of its own."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from pivot.config import DataConfig, ModelConfig
from pivot.processor import build_processor, template_limit
from pivot.processor.template_limit import render_bounded, require_bounded
from tests.kit import tiny

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


def test_a_process_that_cannot_start_is_told(monkeypatch):
    monkeypatch.setattr(template_limit, "_RENDER", "import no_such_module")
    with pytest.raises(RuntimeError, match="failed with exit code 1: .*no_such_module"):
        require_bounded("{{ 'no process' }}")


def test_a_process_that_is_killed_is_told(monkeypatch):
    monkeypatch.setattr(template_limit, "_RENDER", "import os; os.abort()")
    with pytest.raises(ValueError, match="the process that tried it ended by signal 6; correct it"):
        require_bounded("{{ 'killed' }}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("limit")
    tiny.tiny_tokenizer(root / "tokenizer")
    tiny.tiny_vision_tower(root / "vision")
    return root


def make(folder, template):
    model = ModelConfig()
    model.vision_tower.path, model.language_model.path = str(folder / "vision"), str(folder / "tokenizer")
    return build_processor(model, DataConfig(chat_template=tiny.CHATML + template))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "TypeError"),
    ],
)
def test_a_template_that_fails_is_one_sentence(folder, template, words):
    with pytest.raises(ValueError, match=rf"^chat template: it fails \({words}.*\); correct it, or give another one"):
        make(folder, template)


def test_a_loop_for_some_samples_is_interrupted(folder, monkeypatch):
    """Its filter `int` swallows errors, so one alone would not end it."""
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' | int }}{% endfor %}{% endfor %}"
    processor = make(folder, "{% if 'hang' in messages[0]['content'] %}" + loop + "{% endif %}")
    question, hang = ([{"role": "user", "content": text}] for text in ("Why?", "hang"))
    before = processor.encode(question, {}).prompt
    monkeypatch.setattr(template_limit, "RENDER_S", 0.2)
    with pytest.raises(ValueError, match=r"^chat template: it takes more than 0.2 s to render this sample; correct it"):
        processor.encode(hang, {})
    assert processor.encode(question, {}).prompt.tolist() == before.tolist()


def test_the_work_of_other_threads_does_not_count(monkeypatch):
    monkeypatch.setattr(template_limit, "RENDER_S", 0.05)

    def work():
        began = time.thread_time()
        while time.thread_time() - began < 0.3:
            sum(range(1000))

    def render():
        worker = threading.Thread(target=work)
        worker.start()
        worker.join()
        return "done"

    assert render_bounded(render) == "done"


def test_a_text_that_is_too_long_is_not_tokenised(monkeypatch):
    """Neither here nor in a thread."""
    monkeypatch.setattr(template_limit, "MAX_RENDERED", 10)
    assert render_bounded(lambda: "x" * 10) == "x" * 10
    with ThreadPoolExecutor(1) as pool:
        for run in (lambda task: task(), lambda task: pool.submit(task).result()):
            with pytest.raises(ValueError, match="it makes 11 letters of this sample, more than 10; correct it"):
                run(lambda: render_bounded(lambda: "x" * 11))
