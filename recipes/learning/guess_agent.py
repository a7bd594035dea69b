"""The number game of `builtin:guess`, played by an agent: a program of its own, which asks the model as any OpenAI
client does.

The game is the environment's, `grpo.builtin.guess:Guess`; who says what to whom is written here. It needs the package
`openai`.
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
            said = await asked(client, messages)
            heard = None if said is None else game.step(said)
            if not isinstance(heard, str):  # the game is over, or there is no room to go on
                return game.get_reward()
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": heard}]


async def asked(client: openai.AsyncOpenAI, messages: list[dict]) -> str | None:
    """What the model says; None where `rollout.max_completion_length` leaves it no room to say it to its end.

    A game that was too long is lost. An agent that lets the error pass gets the same: a reward of 0.
    """
    try:
        answer = await client.chat.completions.create(model="policy", messages=messages)
    except openai.BadRequestError as error:
        if error.code == "context_length_exceeded":
            return None
        raise
    (choice,) = answer.choices
    return choice.message.content if choice.finish_reason == "stop" else None
