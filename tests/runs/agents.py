"""A toy run whose model is asked by an agent, or by a program."""

import json
import sys
from pathlib import Path

import pytest

AGENT = '''
import json, os, random, sys
from http.client import HTTPConnection
from urllib.parse import urlsplit

def ask(base_url, api_key, messages, **more):
    at = urlsplit(base_url)
    connection = HTTPConnection(at.hostname, at.port, timeout=60)
    headers = {"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"}
    body = {"model": "policy", "messages": messages, **more}
    connection.request("POST", f"{at.path}/chat/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    told = json.loads(answer.read())
    connection.close()
    if answer.status != 200:
        raise RuntimeError(told["error"]["message"])
    return told["choices"][0]["message"]["content"]

def play(base_url, api_key, question, turns=2):
    """As many turns as the row is long, each with a number that is drawn."""
    messages = [{"role": "user", "content": question}]
    for _ in range(turns):
        said = ask(base_url, api_key, messages, max_tokens=6)
        drawn = str(random.randint(0, 9))
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": drawn}]
    return {"reward": sum(map(ord, said)) % 8 / 8 + int(drawn) / 100, "drawn": int(drawn)}

def run(data, base_url, api_key, question, turns=2):
    open("processes", "a").write(f"{os.getpid()} ")
    return play(base_url, api_key, question, turns)

def seeded(data, base_url, api_key, question, seed):
    """Draws what the program draws."""
    random.seed(seed)
    return run(data, base_url, api_key, question)

def once(data, base_url, api_key, question):
    return run(data, base_url, api_key, question, 1)["reward"] - 2

def fails(data, base_url, api_key, question, answer):
    got = run(data, base_url, api_key, question)
    if int(answer) % 4:
        raise ValueError("no luck")
    return got

def nothing(data, base_url, api_key, question):
    run(data, base_url, api_key, question, 1)

def idle(data, base_url, api_key):
    return 1.0

if __name__ == "__main__":
    row = json.loads(sys.stdin.readline())
    random.seed(int(os.environ["GRPO_SEED"]))
    print("playing")
    where = os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]
    print(json.dumps(play(*where, row["question"], *map(int, sys.argv[1:]))))
'''


@pytest.fixture
def asking(toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe of a toy run of four steps, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "play.py").write_text(AGENT)
    rows = [{"question": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(1, 5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(
        f"model: {{name: {toy_folder}}}\n"
        'environment: {agent: "play.py:run", workers: 1}\n'
        "data: {source: train.jsonl, prompt: question}\n"
        "rollout: {prompts_per_step: 2, num_generations: 3, max_completion_length: 48}\n"
        "optim: {steps: 4, learning_rate: 1e-3}\n"
        "checkpoint: {every: 1, keep: 9}\n"
    )
    return recipe


COMMAND = f"environment={{command: [{sys.executable}, play.py], workers: 1}}"
"""The same agent, as a program."""
