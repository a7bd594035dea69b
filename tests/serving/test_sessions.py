"""Sessions on the wire: turns that go on from what was answered, and rollouts' sessions with rules."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from environments.families import TOOLS, tokenizer_of
from saying import Base, Says
from starlette.testclient import TestClient

from grpo.errors import UserError
from grpo.generation.sampling import Sampling
from grpo.serving import sessions as sessions_module
from grpo.serving import speaker as speaker_module
from grpo.serving.app import application
from grpo.serving.asks import Ask
from grpo.serving.guard import Guard
from grpo.serving.service import Service
from grpo.serving.sessions import SessionRules
from grpo.serving.shelf import PolicyModels
from grpo.serving.speaker import Speaker

QUESTION = [{"role": "user", "content": "Hello"}]
CHAT = "/v1/chat/completions"
RULES = SessionRules(Sampling(1.0, 50, top_p=0.9), Sampling(1.0, 50, top_p=0.9))


class Talk:
    """A client, and the service that it talks to, whose model says what it is told to."""

    def __init__(self, family: str, sessions_only: bool = False) -> None:
        self.tokenizer = tokenizer_of(family)
        self.says = Says(self.tokenizer, "Yes.")
        vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        models: Any = PolicyModels("org/name") if sessions_only else Base()
        speaker = Speaker(self.tokenizer, vocabulary, 4000)
        self.service = Service(self.says, speaker, models, Sampling(1.0, 100), None, sessions_only)  # type: ignore[arg-type]
        self.client = TestClient(application(self.service, Guard()), "http://localhost")

    def ask(self, messages: Any, said: Any = "Yes.", path: str = "/s/one" + CHAT, **more: Any) -> Any:
        """The answer's message."""
        body = {"messages": messages, **more}
        return self.post(body, said, path)["choices"][0]["message"]

    def post(self, body: Any, said: Any = "Yes.", path: str = "/s/one" + CHAT, status: int = 200, **how: Any) -> Any:
        encode = self.tokenizer.encode
        self.says.ids = encode(said, add_special_tokens=False) if isinstance(said, str) else list(said)
        answer = self.client.post(path, json=body, **how)
        assert answer.status_code == status, answer.text
        return answer.json()

    @property
    def asked(self) -> Ask:
        return self.says.asks[-1]

    def text(self) -> str:
        """What the model read at last."""
        return str(self.tokenizer.decode(list(self.asked.prompt_ids)))


@pytest.fixture
def talk() -> Iterator[Talk]:
    made = Talk("qwen2.5")
    yield made
    made.service.close()


def letters(talk: Talk, text: str, end: str = "<|im_end|>") -> list[int]:
    """Token ids of a text as no tokenizer would encode it: a token each character, then the end."""
    encode = talk.tokenizer.encode
    ids = [token for letter in text for token in encode(letter, add_special_tokens=False)]
    assert ids != encode(text, add_special_tokens=False)
    return [*ids, *encode(end, add_special_tokens=False)]


def test_a_turn_that_goes_on_keeps_the_sampled_tokens(talk: Talk) -> None:
    sampled = letters(talk, "The sun shines")
    answer = talk.ask(QUESTION, sampled)
    first = talk.asked
    assert answer["content"] == "The sun shines"
    talk.ask([*QUESTION, answer, {"role": "user", "content": "And then?"}])
    known = [*first.prompt_ids, *sampled]
    assert list(talk.asked.prompt_ids[: len(known)]) == known
    assert talk.text().endswith(
        "The sun shines<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (first.session, talk.asked.session) == ("one", "one")


@pytest.mark.parametrize("family", ["qwen2.5", "gpt-oss", "glm-4", "mistral"])
def test_the_prompt_that_goes_on_reads_as_the_template_has_it(family: str) -> None:
    talk = Talk(family)
    said = {
        "qwen2.5": "It is so.<|im_end|>",
        "gpt-oss": "<|channel|>final<|message|>It is so.<|return|>",
        "glm-4": "<think></think>It is so.<|user|>",
        "mistral": "It is so.</s>",
    }[family]
    answer = talk.ask(QUESTION, said)
    more = [*QUESTION, {"role": "assistant", "content": answer["content"]}, {"role": "user", "content": "What is it?"}]
    talk.ask(more)
    chained = talk.text()
    talk.ask(more, path=CHAT)
    assert talk.asked.session is None
    told = [text.replace("<|return|>", "<|end|>") for text in (chained, talk.text())]
    assert "".join(told[0].split()) == "".join(told[1].split())
    talk.service.close()


def test_calls_and_results_go_on_by_the_names_of_tools() -> None:
    """The client sends the calls back with its ids, arguments written otherwise, and nulls."""
    talk = Talk("gpt-oss")
    said = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city":"Paris"}<|call|>'
    )
    message = talk.ask(QUESTION, said, tools=TOOLS)
    first, call = talk.asked, message["tool_calls"][0]
    call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=4)
    message = {**message, "audio": None, "annotations": None}
    del message["reasoning_content"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    talk.ask([*QUESTION, message, result], tools=TOOLS)
    assert tuple(talk.asked.prompt_ids[: len(first.prompt_ids)]) == tuple(first.prompt_ids)
    assert said + "<|start|>functions.weather to=assistant<|channel|>commentary<|message|>" in talk.text()
    talk.service.close()


CALLS = (
    '<tool_call>\n{"name":"weather","arguments":{"city":"Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name":"now","arguments":{}}\n</tool_call><|im_end|>'
)


def results(message: Any) -> list[dict[str, Any]]:
    contents = ("sunny", "noon")
    calls = message["tool_calls"]
    pairs = zip(calls, contents, strict=True)
    return [{"role": "tool", "tool_call_id": call["id"], "content": content} for call, content in pairs]


def test_results_in_another_order_are_rendered_whole(talk: Talk) -> None:
    message = talk.ask(QUESTION, CALLS, tools=TOOLS)
    compact = '{"name":"weather","arguments":{"city":"Paris"}}'  # as it was said, and no template writes it
    for order, kept in ((results(message), True), (results(message)[::-1], False)):
        talk.ask([*QUESTION, message, *order], tools=TOOLS)
        assert (compact in talk.text()) is kept
        assert talk.text().index(order[0]["content"]) < talk.text().index(order[1]["content"])


@pytest.mark.parametrize(
    "change",
    [
        {"content": "The sun shone"},
        {"content": "The sun shines "},
        {"role": "user"},
        {"reasoning_content": "Hm."},
        {"tool_calls": [{"id": "x", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
    ],
)
def test_an_answer_that_was_changed_is_rendered_whole(talk: Talk, change: dict[str, Any]) -> None:
    sampled = letters(talk, "The sun shines")
    answer = talk.ask(QUESTION, sampled)
    first = [*talk.asked.prompt_ids, *sampled]
    more = {"role": "user", "content": "And then?"}
    talk.ask([*QUESTION, {**answer, **change}, more])
    assert list(talk.asked.prompt_ids[: len(first)]) != first
    for changed in ([{**QUESTION[0], "content": "Hullo"}, answer, more], [*QUESTION, answer]):
        talk.ask(changed)
        assert list(talk.asked.prompt_ids[: len(first)]) != first
    talk.ask([*QUESTION, answer, more], tools=TOOLS)
    assert list(talk.asked.prompt_ids[: len(first)]) != first


def test_results_without_a_call_and_turns_of_others_are_rendered_whole(talk: Talk) -> None:
    sampled = letters(talk, "The sun shines")
    answer = talk.ask(QUESTION, sampled)
    known = [*talk.asked.prompt_ids, *sampled]
    user = {"role": "user", "content": "So?"}
    for more in ([{"role": "tool", "content": "sunny"}], [user, {"role": "assistant", "content": "No."}, user]):
        talk.ask([*QUESTION, answer, *more])
        assert list(talk.asked.prompt_ids[: len(known)]) != known
        assert talk.text().count(more[0]["content"]) == len(more) // 2 + 1


def test_changed_arguments_and_names_are_rendered_whole(talk: Talk) -> None:
    named = [{**QUESTION[0], "name": "Ann"}]
    message = talk.ask(named, CALLS, tools=TOOLS)
    known = [*talk.asked.prompt_ids, *talk.says.ids]
    made = json.dumps({"city": "Rome"})
    calls = [{**call, "function": {**call["function"], "arguments": made}} for call in message["tool_calls"]]
    changed = {**message, "tool_calls": calls}
    for question, answer, kept in ((named, message, True), (QUESTION, message, False), (named, changed, False)):
        talk.ask([*question, answer, *results(answer)], tools=TOOLS)
        assert (list(talk.asked.prompt_ids[: len(known)]) == known) is kept


def test_the_longest_conversation_goes_on_and_of_two_alike_the_newest(talk: Talk) -> None:
    user = {"role": "user", "content": "So?"}
    answer = {"role": "assistant", "content": "The sun shines"}
    other = talk.tokenizer.encode("The sun shines<|im_end|>", add_special_tokens=False)
    for sampled in (other, letters(talk, "The sun shines"), other):
        talk.ask(QUESTION, sampled)
        talk.ask([*QUESTION, answer, user], letters(talk, "Hello"))
        assert sampled == list(talk.asked.prompt_ids[len(talk.says.asks[0].prompt_ids) :][: len(sampled)])
    known = [*talk.asked.prompt_ids, *letters(talk, "Hello")]
    talk.ask(QUESTION, letters(talk, "The sun shines"))  # the newest, and a shorter beginning of the next
    talk.ask([*QUESTION, answer, user, {"role": "assistant", "content": "Hello"}, user])
    assert list(talk.asked.prompt_ids[: len(known)]) == known


def test_what_cannot_go_on_is_rendered_whole(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise UserError("the template refuses a conversation of tools")

    answer = talk.ask(QUESTION)
    monkeypatch.setattr(speaker_module, "prompt_after", refuses)
    talk.ask([*QUESTION, answer, {"role": "user", "content": "So?"}])
    assert "Yes.<|im_end|>" in talk.text()


@pytest.mark.parametrize("path", [CHAT, "/s/one" + CHAT])
def test_a_template_that_insists_on_ids_of_calls_takes_them_back(path: str) -> None:
    talk = Talk("mistral")
    calls = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>'
    message = talk.ask(QUESTION, calls, path, tools=TOOLS)
    (call,) = message["tool_calls"]
    assert talk.ask(QUESTION, calls, path, tools=TOOLS)["tool_calls"][0]["id"] == call["id"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    talk.ask([*QUESTION, message, result], path=path, tools=TOOLS)
    shown = call["id"] if path == CHAT else "call00000"  # the model has seen no id of its own call
    assert f'{{"content": sunny, "call_id": "{shown}"' in talk.text()
    again = talk.ask([*QUESTION, message, result], calls, path, tools=TOOLS)
    assert again["tool_calls"][0]["id"] != call["id"]
    talk.service.close()


def test_a_turn_that_was_cut_short_is_rendered_whole(talk: Talk) -> None:
    sampled = letters(talk, "The sun shines", end="!")
    answer = talk.ask(QUESTION, sampled)
    known = [*talk.asked.prompt_ids, *sampled]
    talk.ask([*QUESTION, answer, {"role": "user", "content": "And then?"}])
    assert list(talk.asked.prompt_ids[: len(known)]) != known
    assert "The sun shines!<|im_end|>" in talk.text()


def test_of_several_answers_the_one_sent_back_goes_on(talk: Talk) -> None:
    """Also in a stream, and after a turn in between."""
    ways = {text: letters(talk, text) for text in ("The sun shines", "Hello", "I think so")}
    for text, sampled in ways.items():
        talk.says.ids = sampled
        body = {"messages": QUESTION, "stream": True}
        assert "data: [DONE]" in talk.client.post("/s/one" + CHAT, json=body).text, text
    first = talk.asked.prompt_ids
    for text, sampled in ways.items():
        talk.ask([*QUESTION, {"role": "assistant", "content": text}, {"role": "user", "content": "So?"}])
        assert list(talk.asked.prompt_ids[: len(first) + len(sampled)]) == [*first, *sampled]


THINKS = "<think>\nHm, so.\n</think>\n\n"


def test_thinking_that_the_template_drops_begins_a_new_row_and_other_turns_go_on() -> None:
    talk = Talk("qwen3")
    thoughts = talk.tokenizer.encode(THINKS, add_special_tokens=False)
    for thought, kept in ((thoughts, False), ([], True)):
        answer = talk.ask(QUESTION, [*thought, *letters(talk, "The sun shines")])
        known = [*talk.asked.prompt_ids, *talk.says.ids]
        answer.pop("reasoning_content", None)
        talk.ask([*QUESTION, answer, {"role": "user", "content": "And then?"}])
        assert (list(talk.asked.prompt_ids[: len(known)]) == known) is kept
        assert "Hm, so." not in talk.text()
    message = talk.ask(QUESTION, THINKS + CALLS, tools=TOOLS)
    known = [*talk.asked.prompt_ids, *talk.says.ids]
    del message["reasoning_content"]
    talk.ask([*QUESTION, message, *results(message)], tools=TOOLS)
    assert list(talk.asked.prompt_ids[: len(known)]) == known  # before a tool's result the template has it, too
    talk.service.close()


def test_the_rules_can_keep_thinking() -> None:
    talk = Talk("qwen3", sessions_only=True)
    talk.service.open("one", SessionRules(Sampling(1.0, 50), Sampling(1.0, 50), keep_thinking=True))
    answer = talk.ask(QUESTION, THINKS + "Yes.<|im_end|>")
    talk.ask([*QUESTION, answer, {"role": "user", "content": "And then?"}])
    assert "Hm, so." in talk.text()
    talk.service.close()


def test_what_was_said_is_remembered_until_the_end() -> None:
    talk = Talk("qwen2.5", sessions_only=True)
    talk.service.open("one", RULES)
    with pytest.raises(ValueError, match="already open"):
        talk.service.open("one", RULES)
    answer = talk.ask(QUESTION, "Yes.<|im_end|>")
    more = [*QUESTION, answer, {"role": "user", "content": "And then?"}]
    talk.ask(more, "No.<|im_end|>", n=2)
    talk.post({"prompt": ["a", "b"]}, "c", "/s/one/v1/completions")
    talk.post({"token_ids": list(talk.asked.prompt_ids)}, "d", "/s/one/inference/v1/generate")
    memory = talk.service.end("one")
    assert [(len(one.messages), one.answer["content"]) for one in memory.said] == [
        *((1, "Yes."), (3, "No."), (3, "No.")),
        *((1, "c"), (1, "c"), (1, "d")),
    ]
    assert memory.said[1].messages[1] is memory.said[0].answer
    for one, ask in zip((memory.said[0], memory.said[1], memory.said[3]), talk.says.asks, strict=False):
        assert one.prompt_ids == tuple(ask.prompt_ids)
    assert memory.said[1].prompt_ids[: len(memory.said[0].prompt_ids)] == memory.said[0].prompt_ids
    texts = [one.messages[0]["content"] for one in memory.said[3:]]
    assert texts == ["a", "b", "b"]
    memory.add(memory.said)
    assert len(memory.said) == 6
    with pytest.raises(KeyError):
        talk.service.end("one")
    talk.service.close()


def test_a_session_keeps_each_token_once() -> None:
    """However many turns go on from it, and from whichever answer the next one does."""
    talk = Talk("qwen2.5", sessions_only=True)
    talk.service.open("one", RULES)
    messages, asked = list(QUESTION), []
    for number in range(6):
        answer = talk.ask(messages, letters(talk, f"The sun shines {number}"))
        asked.append(tuple(talk.asked.prompt_ids))
        messages += [answer, {"role": "user", "content": "And then?"}]
    talk.ask([*messages[:4], {"role": "user", "content": "Or so?"}])
    known = talk.service.session("one").said[1]  # type: ignore[union-attr]
    assert talk.asked.prompt_ids[: len(asked[1]) + len(known.token_ids)] == (*asked[1], *known.token_ids)
    said = talk.service.end("one").said
    assert [one.prompt_ids for one in said[:6]] == asked
    assert sum(len(one.own_ids) + len(one.token_ids) for one in said[:6]) == len(asked[5]) + len(said[5].token_ids)
    assert said[5].marks[0] is said[0].marks[0]
    talk.service.close()


def test_what_tokens_add_to_an_answer_is_what_was_said() -> None:
    """A client that sends tokens sends all of them each time; they are remembered once, as the messages are."""
    talk = Talk("qwen2.5", sessions_only=True)
    talk.service.open("one", RULES)
    path, ids = "/s/one/inference/v1/generate", talk.tokenizer.encode("Count.")
    for number in range(5):
        talk.post({"token_ids": ids}, f"said {number}", path)
        ids = [*ids, *talk.says.ids, *talk.tokenizer.encode(f"heard {number}")]
    talk.post({"prompt": talk.tokenizer.decode(ids)}, "done", "/s/one/v1/completions")
    talk.post({"token_ids": ids[:3]}, "else", path)
    said = talk.service.end("one").said
    assert [message["content"] for message in said[4].messages] == [
        "Count.",
        *(text for number in range(4) for text in (f"said {number}", f"heard {number}")),
    ]
    assert said[4].messages[1] is said[0].answer
    assert [one.prompt_ids for one in said] == [tuple(ask.prompt_ids) for ask in talk.says.asks]
    assert sum(len(one.own_ids) + len(one.token_ids) for one in said[:5]) == len(said[4].prompt_ids) + len(
        said[4].token_ids
    )
    assert (len(said[5].messages), said[5].messages[-1]["content"]) == (11, "heard 4")
    assert said[6].messages == ({"role": "user", "content": talk.tokenizer.decode(ids[:3])},)
    talk.service.close()


def test_without_an_open_session_nothing_is_answered() -> None:
    talk = Talk("qwen2.5", sessions_only=True)
    body = {"messages": QUESTION}
    assert talk.post(body, path=CHAT, status=400)["error"]["code"] == "no_session"
    assert talk.post(body, status=404)["error"]["code"] == "session_over"
    talk.service.open("one", RULES)
    talk.post(body)
    talk.post(body, path=CHAT, headers={"X-Session-ID": "one"})
    assert [model["id"] for model in talk.client.get("/s/one/v1/models").json()["data"]] == ["policy", "org/name"]
    assert talk.client.get("/s/one/v1/models/policy").json()["max_model_len"] == 4000
    for model in ("policy", "org/name", None):
        assert talk.post({**body, "model": model})["model"] == "policy"
    assert talk.post({**body, "model": "gpt"}, status=404)["error"]["code"] == "model_not_found"
    talk.service.end("one")
    refused = talk.post(body, status=404)["error"]
    assert (refused["code"], refused["type"]) == ("session_over", "not_found_error")
    assert "'one' is not open" in refused["message"]
    assert talk.post({"token_ids": [5]}, path="/s/one/inference/v1/generate", status=404)
    assert talk.post({"prompt": "a"}, path="/s/one/v1/completions", status=404)
    talk.service.close()


def test_in_a_session_the_run_decides_how_to_sample() -> None:
    talk = Talk("qwen2.5", sessions_only=True)
    talk.service.open("train", RULES)
    talk.service.open("eval", SessionRules(Sampling(0.0, 30), RULES.recipe))
    body = {"messages": QUESTION}
    for session, sampling in (("train", RULES.sampling), ("eval", Sampling(0.0, 30))):
        path = f"/s/{session}{CHAT}"
        talk.post({**body, "temperature": 1, "top_p": 0.9, "top_k": -1, "min_p": 0, "repetition_penalty": 1}, path=path)
        assert talk.asked.sampling == sampling
        for name, value in (("temperature", 0.0), ("top_p", 1), ("top_k", 5), ("min_p", 0.1), ("seed", 3)):
            refused = talk.post({**body, name: value}, path=path, status=400)["error"]
            assert (refused["param"], refused["code"]) == (name, "session_decides")
        assert "rollout.top_p: 0.9" in talk.post({**body, "top_p": 1}, path=path, status=400)["error"]["message"]
        free = {"stop": ["\n"], "stop_token_ids": [7], "min_tokens": 2, "n": 3, "max_tokens": 9}
        talk.post({**body, **free}, path=path)
        found = talk.asked.sampling
        assert (found.stop, found.stop_ids, found.min_tokens, found.max_tokens) == (("\n",), (7,), 2, 9)
        assert (talk.asked.n, found.temperature, found.top_p) == (3, sampling.temperature, sampling.top_p)
        talk.post({**body, "max_completion_tokens": 10_000}, path=path)
        assert talk.asked.sampling.max_tokens == sampling.max_tokens
    talk.service.open("long", SessionRules(Sampling(1.0, 5000), Sampling(1.0, 5000)))
    for more in ({}, {"max_tokens": 4500}):
        talk.post({**body, **more}, path=f"/s/long{CHAT}")
        assert talk.asked.sampling.max_tokens == 4000 - len(talk.asked.prompt_ids)
    talk.service.close()


@pytest.mark.parametrize(
    ("path", "headers", "code"),
    [
        ("/s/one" + CHAT, ["one"], None),
        ("/s/one" + CHAT, ["two"], None),
        (CHAT, ["one", "two"], "two_sessions"),
        (CHAT, [""], "invalid_session"),
        (CHAT, ["x" * 300], "invalid_session"),
        ("/s/%0A" + CHAT, [], "invalid_session"),
    ],
)
def test_a_request_names_one_session(talk: Talk, path: str, headers: list[str], code: str | None) -> None:
    given = [("X-Session-ID", one) for one in headers]
    answer = talk.client.post(path, json={"messages": QUESTION}, headers=given)
    if code is None:
        assert talk.asked.session == "one"
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


def test_sessions_that_nobody_opened_are_forgotten_in_time(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = letters(talk, "The sun shines")

    def goes_on(session: str) -> bool:
        path = f"/s/{session}{CHAT}"
        more = [*QUESTION, {"role": "assistant", "content": "The sun shines"}, {"role": "user", "content": "So?"}]
        talk.post({"messages": more}, path=path)
        return talk.asked.prompt_ids[len(first) : len(first) + len(sampled)] == tuple(sampled)

    talk.ask(QUESTION, sampled)
    first = talk.asked.prompt_ids
    assert goes_on("one")
    monkeypatch.setattr(sessions_module, "MOST_SESSIONS", 2)
    for other in ("two", "one", "three"):
        talk.post({"messages": QUESTION}, sampled, path=f"/s/{other}{CHAT}")
    assert [goes_on(session) for session in ("one", "three", "two")] == [True, True, False]
    monkeypatch.setattr(sessions_module, "MOST_CHARACTERS", 100)
    talk.post({"messages": QUESTION}, sampled, path=f"/s/four{CHAT}")
    assert not goes_on("three")


def test_of_a_session_that_nobody_opened_the_newest_answers_are_remembered(talk: Talk) -> None:
    for number in range(sessions_module.MOST_SAID + 5):
        talk.ask([{"role": "user", "content": str(number)}])
    memory = talk.service.session("one")
    assert memory is not None
    assert [one.messages[0]["content"] for one in memory.said] == [str(number) for number in range(5, 13)]
