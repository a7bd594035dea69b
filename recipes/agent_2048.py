"""2048 played by an agent: a program of its own, which asks the model as any OpenAI client does. `agent-2048` trains on
it; the same game as an environment is `qwen3-2048`.

It needs the package `openai`, and imports nothing of grpo: against any other endpoint it plays as well.
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
    """Play the game that a row of the dataset begins. The reward is the game's; what else is returned is a metric."""
    game = Game2048()
    asked = data["prompt"][-1]["content"] + game.reset(**data)
    messages, moves = [{"role": "user", "content": asked}], 0
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
    """What the model says; None where `rollout.max_completion_length` leaves no room for it.

    An agent that lets that error pass gets a reward of 0; this one is rewarded for what it reached until then.
    """
    try:
        answer = await client.chat.completions.create(model="policy", messages=messages, tools=[MOVE])
    except openai.BadRequestError as error:
        if error.code == "context_length_exceeded":
            return None
        raise
    return answer.choices[0].message


def played(game: Game2048, call: object) -> str:
    """The board after a call, or what is wrong with the call: the model reads that, and may try again."""
    try:
        return game.move(**json.loads(call.arguments))
    except (ValueError, TypeError) as error:
        return str({"error": str(error)})
