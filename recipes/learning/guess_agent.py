"""The number game of `builtin:guess`, played by an agent: a separate program, which calls the model like any OpenAI
client.

The game is the environment `grpo.builtin.guess:Guess`; this file exchanges the messages. It needs the package `openai`.
"""

import openai

from grpo.builtin.guess import Guess


async def run(data: dict, base_url: str, api_key: str) -> float:
    """Play one game for the row `data`. Returns 1 if the model finds the number, else 0."""
    game = Guess()
    game.reset(number=data["number"])
    messages = [{"role": "user", "content": data["question"]}]
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        while True:
            guess = await answer_to(client, messages)
            hint = None if guess is None else game.step(guess)
            if not isinstance(hint, str):  # the game is over, or there is no room to continue
                return game.get_reward()
            messages += [{"role": "assistant", "content": guess}, {"role": "user", "content": hint}]


async def answer_to(client: openai.AsyncOpenAI, messages: list[dict]) -> str | None:
    """The model's answer; None if `rollout.max_completion_length` leaves no room for a whole answer.

    A game that is too long is lost. An agent that does not catch the error gets the same reward: 0.
    """
    try:
        answer = await client.chat.completions.create(model="policy", messages=messages)
    except openai.BadRequestError as error:
        if error.code == "context_length_exceeded":
            return None
        raise
    (choice,) = answer.choices
    return choice.message.content if choice.finish_reason == "stop" else None
