"""TRL's side of the comparison: `python with_trl.py INTO` runs its trainer once, with answers that stand in a script.

Needs TRL and torch, and nothing of this project. INTO has `script.json`; TRL's side goes to `told.json`, and beside it
the tokenizer.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import game2048
import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

END = "<|im_end|>"


def make_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Bytes, under Qwen's template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", END)])
    inner.add_tokens([AddedToken(text, special=False) for text in ("<tool_call>", "</tool_call>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token="<|endoftext|>", chat_template=template
    )


class Scripted(GRPOTrainer):
    """Says what is written, and notes what comes of it."""

    def _generate_single_turn(self, prompt_ids, *_, **__):
        if not hasattr(self, "begun"):
            self.begun, self.said = [list(ids) for ids in prompt_ids], [0] * len(prompt_ids)
        answers = []
        for ids in prompt_ids:
            row = next(i for i, begin in enumerate(self.begun) if ids[: len(begin)] == begin)
            answers.append(self._tokenizer.encode(self.turns[row][self.said[row]] + END, add_special_tokens=False))
            self.said[row] += 1
        return answers, None

    def _generate(self, prompts):
        made = super()._generate(prompts)
        prompt_ids, completion_ids, mask, completions, *_ = made
        self.told = {
            "prompts": prompts,
            "prompt_ids": [list(ids) for ids in prompt_ids],
            "completions": completions,
            "completion_ids": [list(ids) for ids in completion_ids],
            "mask": [list(row) for row in mask],
            "metrics": {name: self._metrics["train"][name][-1] for name in self._metrics["train"] if "tools/" in name},
        }
        return made

    def _calculate_rewards(self, *given):
        rewards = super()._calculate_rewards(*given)
        rows = [[None if value != value else value for value in row] for row in rewards.tolist()]
        self.told["rewards"] = {name: [row[i] for row in rows] for i, name in enumerate(self.reward_func_names)}
        return rewards


def main(into: Path) -> None:
    script = json.loads((into / "script.json").read_text())
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    tokenizer = make_tokenizer(template)
    tokenizer.save_pretrained(into / "tokenizer")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=16384,
    )  # fmt: skip
    rows = script["rows"]
    n = len(rows)
    trainer = Scripted(
        model=Qwen2ForCausalLM(config),
        reward_funcs=[game2048.written, game2048.turns],
        args=GRPOConfig(
            output_dir=str(into / "run"), per_device_train_batch_size=n, num_generations=2, use_cpu=True, bf16=False,
            report_to=[], max_completion_length=script["max_completion_length"],
            max_tool_calling_iterations=script["max_tool_calling_iterations"],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        tools=[game2048.add],
        environment_factory={"game": game2048.Game2048, "diary": game2048.Diary},
    )  # fmt: skip
    trainer.turns = script["turns"]
    trainer._generate_and_score_completions(rows)
    from transformers.utils.chat_template_utils import get_json_schema

    trainer.told["schemas"] = {
        name: [get_json_schema(tool) for tool in tools] for name, tools in trainer._env_tools.items()
    }
    (into / "told.json").write_text(json.dumps(trainer.told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
