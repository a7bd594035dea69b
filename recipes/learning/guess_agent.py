"""The number game of `builtin:guess`, played by an agent: a program of its own, which asks the model as any OpenAI
client does.

The game is the environment's, `grpo.builtin.guess:Guess`; who says what to whom is written here.
"""

import openai

from grpo.builtin.guess import Guess


async def run(data: dict, base_url: str, api_key: str) -> float:
    """Play one game. `data` is the row. Returns 1 if the number was found, else 0."""
    game = Guess()
    game.reset(number=data["number"])
    messages = [{"role": "user", "content": data["question"]}]
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        while True:
            answer = await client.chat.completions.create(model="policy", messages=messages)
            (choice,) = answer.choices
            if choice.finish_reason != "stop":  # no room is left: what was said is cut off
                break
            heard = game.step(choice.message.content)
            if not isinstance(heard, str):  # the game is over
                break
            messages += [choice.message.model_dump(include={"role", "content"}), {"role": "user", "content": heard}]
    return game.get_reward()
