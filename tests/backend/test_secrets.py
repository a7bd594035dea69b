"""A secret is masked however a text writes it: as it is, as JSON, as `repr`, or as a web address."""

import json
from urllib.parse import quote, quote_plus, urlencode

import pytest

from grpo.backend.secrets import masked
from grpo.runs.completions import read_completions, store_failed
from grpo.types import Group, Rollout, Task, Trajectory

SECRET = """it's "dé\\p" & a/b c\nd"""
WRITTEN = {
    "plain": lambda text: text,
    "json": json.dumps,
    "json with its own letters": lambda text: json.dumps(text, ensure_ascii=False),
    "repr": repr,
    "repr of a text without other quotes": lambda text: repr(text.replace('"', "")),
    "repr of an error": lambda text: repr(ValueError(text)),
    "json of a repr": lambda text: json.dumps({"error": repr(text)}),
    "repr of json": lambda text: repr(json.dumps(text)),
    "json in json": lambda text: json.dumps(json.dumps([text])),
    "a path": lambda text: f"https://host/{quote(text)}",
    "a part of a path": lambda text: f"https://host/{quote(text, safe='')}",
    "a form": lambda text: f"https://host/?{urlencode({'key': text})}",
    "json of a form": lambda text: json.dumps(quote_plus(text)),
}


@pytest.mark.parametrize("write", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("secret", [SECRET, "a-plain-secret", 'say "friend"', "it's it's", "back\\slash\\n"])
def test_a_secret_is_masked_however_it_is_written(monkeypatch, write, secret: str) -> None:
    if write is WRITTEN["repr of a text without other quotes"]:
        secret = secret.replace('"', "")
    monkeypatch.setenv("A_TOKEN", secret)
    said = masked(f"refused: {write(f'<{secret}>')}, sorry")
    assert "[A_TOKEN]" in said
    assert len(said) <= len(f"refused: {write('<[A_TOKEN]>')}, sorry") + 2, said


def test_a_variable_that_is_no_text_is_masked(monkeypatch) -> None:
    monkeypatch.setenv("A_TOKEN", b"abc\xff\xfedef".decode(errors="surrogateescape"))
    assert masked("key=abc%FF%FEdef") == "key=[A_TOKEN]"


def test_what_a_reward_logs_is_stored_without_secrets(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("A_TOKEN", SECRET)
    extras = {"note": f"sent {SECRET}", "reply": json.dumps({"key": SECRET})}
    rollout = Rollout(Trajectory.sampled((1,), (0.0,), "c", "stop"), extras=extras)
    path = store_failed(tmp_path / "failed.parquet", 1, [Group(Task(0, "p", (1,), {}), (rollout,))])
    _, [group] = read_completions(path)
    assert group.rollouts[0].extras == {"note": "sent [A_TOKEN]", "reply": '{"key": "[A_TOKEN]"}'}
