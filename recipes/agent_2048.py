"""2048 played by an agent: a separate program, which calls the model like any OpenAI client. The recipe `agent-2048`
trains on it; `qwen3-2048` has the same game as an environment.

It needs the package `openai`, and does not import grpo, so it also plays against other endpoints.
"""

import json

import openai
from game_2048 import WAYS, Game2048

MOVES = 40
MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "description": "Slide all tiles, and see the board.",
        "parameters": {
            "type": "object",
            "properties": {"direction": {"type": "string", "enum": list(WAYS)}},
            "required": ["direction"],
        },
    },
}


async def run(data: dict, base_url: str, api_key: str) -> dict:
    """Play the game of a row in the dataset. Returns the game's reward; the other values are metrics."""
    game = Game2048()
    question = data["prompt"][-1]["content"] + game.reset(**data)
    messages, moves = [{"role": "user", "content": question}], 0
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        while moves < MOVES and (answer := await answer_to(client, messages)) is not None:
            messages.append(answer.model_dump(exclude_none=True))
            for call in answer.tool_calls or []:
                messages.append({"role": "tool", "tool_call_id": call.id, "content": played(game, call.function)})
                moves += 1
            if not answer.tool_calls:
                break
    return {"reward": game.get_reward(), "moves": moves}


async def answer_to(client: openai.AsyncOpenAI, messages: list[dict]) -> object | None:
    """The model's answer; None if `rollout.max_completion_length` leaves no room for it.

    An agent that does not catch this error gets a reward of 0; this agent is rewarded for its result so far.
    """
    try:
        answer = await client.chat.completions.create(model="policy", messages=messages, tools=[MOVE])
    except openai.BadRequestError as error:
        if error.code == "context_length_exceeded":
            return None
        raise
    return answer.choices[0].message


def played(game: Game2048, call: object) -> str:
    """The board after a call, or the call's error, which the model reads before it tries again."""
    try:
        return game.move(**json.loads(call.arguments))
    except (ValueError, TypeError) as error:
        return str({"error": str(error)})
