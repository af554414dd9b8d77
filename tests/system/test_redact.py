"""Text without secrets, and with everything else in its place."""

from __future__ import annotations

import pytest

from pivot.system import redact as module
from pivot.system.redact import is_redacted, redact, redact_setting, redact_values, remember


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_remembered", {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host:8080/a/b", "https://***@host:8080/a/b"),
        ("https://tok@host", "https://***@host"),
        ("s3://bucket/set?X-Amz-Signature=ab%2F&X-Amz-Date=1", "s3://bucket/set?X-Amz-Signature=***&X-Amz-Date=***"),
        ("https://host/set?abc", "https://host/set?***"),
        ("https://host/set#access_token=abc", "https://host/set#access_token=***"),
        ("https://me:p/w?x#y@host/set", "https://***@host/set"),
        ("https://[::1]:80/set", "https://[::1]:80/set"),
        ("https://host/pkg@1.2/set", "https://host/pkg@1.2/set"),
        ("cannot read 'https://me:pw@host/a'; try", "cannot read 'https://***@host/a'; try"),
        ("pipe:curl -H 'Authorization: Bearer abc' x", "pipe:curl -H 'Authorization: Bearer ***' x"),
        ("pipe:env AWS_SECRET_ACCESS_KEY=abc get {}", "pipe:env AWS_SECRET_ACCESS_KEY=*** get {}"),
        ("pipe:get --password abc {}", "pipe:get --password *** {}"),
        ("train.max_tokens_per_micro_batch=400", "train.max_tokens_per_micro_batch=400"),
        ("set objective.dpo.reference_per_token=true", "set objective.dpo.reference_per_token=true"),
        ("data.train: sets/a holds no manifest.json", "data.train: sets/a holds no manifest.json"),
    ],
)
def test_secrets_go_and_the_rest_stays(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected
    assert is_redacted(expected) == (text != expected)


@pytest.mark.parametrize(
    ("name", "key", "value", "hidden"),
    [
        ("ANYTHING", "data.train", "hunter2hunter2", True),
        ("HF_TOKEN", "", "abc", True),
        ("X", "some.password", "/abc/def", True),
        ("SCRATCH", "output_dir", "/scratch/me", False),
        ("SLURM_JOB_ID", "", "123456789", False),
        ("DATA", "", "https://host/set", True),
        ("KIND", "", "sft", False),
    ],
)
def test_the_environment_is_shown_by_name(name: str, key: str, value: str, hidden: bool) -> None:
    remember(name, value, key=key)
    assert redact(f"found {value}.") == (f"found ${{oc.env:{name}}}." if hidden else f"found {value}.")


def test_values_under_a_secret_key_go_as_a_whole() -> None:
    found = redact_values({"api_key": "abc", "max_tokens": 7, "items": [{"password": "${oc.env:PW}"}, "a://b:c@d"]})
    assert found == {"api_key": "***", "max_tokens": 7, "items": [{"password": "${oc.env:PW}"}, "a://***@d"]}
    assert redact_setting("log.wandb_token=abc") == "log.wandb_token=***"
    assert redact_setting("train.max_steps=7") == "train.max_steps=7"
