"""Chat templates of model families as far as conversations need them, after their published formats, on toy tokenizers
with the families' special tokens."""

# ruff: noqa: E501  templates read best by their lines
from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from grpo.model.mlxlm import TokenizerWrapper, load_tokenizer

TEXT = (
    'user assistant system tool_call tool_response name arguments parameters {"city": "Paris"} {"name": "weather"} '
    "\n\n Hello, what is it? The sun shines.\n\n\n I think so.\n It is 3.5 degrees -- naïve, 東京 🌦."
) * 3
"""What the toy tokenizers merge: newlines among other things, as real ones do."""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Where."}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time.",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]


@dataclass(frozen=True)
class Family:
    """`special` are its special tokens, `added` further ones, `ends` those that sampling stops at. SentencePiece puts a
    blank before each text between special tokens, or before the `first` alone."""

    template: str | None
    special: tuple[str, ...]
    ends: tuple[str, ...]
    added: tuple[str, ...] = ()
    bos: str | None = None
    sentencepiece: bool = False
    first: bool = False


def _chatml(turn: str, generation: str = "", head: str = "") -> str:
    """A template in which turns are `<|im_start|>role\\n…<|im_end|>\\n`; `turn` writes the assistant's."""
    return (
        head
        + "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
        "# Tools\n<tools>{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n' }}</tools><|im_end|>\n"
        "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
        "{% for message in messages %}"
        "{% if message.role == 'user' %}<|im_start|>user\n{{ message.content }}<|im_end|>\n"
        "{% elif message.role == 'assistant' %}<|im_start|>assistant\n"
        + turn
        + "{% for tool_call in message.tool_calls or [] %}{% set tool_call = tool_call.function %}"
        "{% if not loop.first or message.content %}{{ '\n' }}{% endif %}"
        '<tool_call>\n{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}\n</tool_call>'
        "{% endfor %}<|im_end|>\n"
        "{% elif message.role == 'tool' %}"
        "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}{{ '\n' }}"
        "<tool_response>\n{{ message.content }}\n</tool_response>"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + generation + "{% endif %}"
    )


LAST_USER = (
    "{% set asked = namespace(last=-1) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}"
)
THOUGHT = (
    "{% set thought = message.reasoning_content or '' %}"
    "{% if loop.index0 > asked.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ message.content }}"
)
SWITCH = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_ENDS = ("<|im_end|>", "<|endoftext|>")
QWEN_ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

LLAMA = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n{% if tools %}Environment: ipython\n{% endif %}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ message.content | tojson }}<|eot_id|>"
    "{% elif message.tool_calls %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('a single tool call at once') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson }}\n\n{% endfor %}{% endif %}"
    "{{ message.content | trim }}<|eot_id|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}"
    "{% if tools and message == users[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ message.content }}[/INST]"
    "{% elif message.tool_calls %}[TOOL_CALLS] ["
    "{% for tool_call in message.tool_calls %}"
    "{% if tool_call.id is not defined or tool_call.id | length != 9 %}{{ raise_exception('ids of 9 letters') }}{% endif %}"
    '{{ (tool_call.function | tojson)[:-1] }}, "id": "{{ tool_call.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% elif message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}"
    "{% elif message.role == 'tool' %}"
    "{% if message.tool_call_id is not defined %}{{ raise_exception('ids of 9 letters') }}{% endif %}"
    '[TOOL_RESULTS] {"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% if tools %}<|system|>\n<tools>{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n' }}</tools>"
    "{% endif %}" + LAST_USER + "{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>\n{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>\n<think>"
    "{% if loop.index0 > asked.last and message.reasoning_content %}{{ message.reasoning_content }}{% endif %}</think>"
    "{% if message.content.strip() %}{{ '\n' + message.content.strip() }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{% set call = call.function %}{{ '\n<tool_call>' + call.name + '\n' }}"
    "{% for key, value in call.arguments.items() %}<arg_key>{{ key }}</arg_key>\n"
    "<arg_value>{{ value if value is string else value | tojson }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    "{% elif message.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|observation|>{% endif %}{{ '\n' }}"
    "<tool_response>\n{{ message.content }}\n</tool_response>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>' }}{% endif %}{% endif %}"
)
PHI = (
    "{% for message in messages %}<|im_start|>{{ message.role }}<|im_sep|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
PHI_MINI = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
HARMONY = (
    "<|start|>system<|message|>Reasoning: low\n# Valid channels: analysis, commentary, final.<|end|>"
    "{% if tools %}<|start|>developer<|message|># Tools\nnamespace functions {\n"
    "{% for tool in tools %}// {{ tool.function.description }}\ntype {{ tool.function.name }} = () => any;\n{% endfor %}"
    "}<|end|>{% endif %}"
    "{% set last = namespace(name=none) %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}<|start|>user<|message|>{{ message.content }}<|end|>"
    "{% elif message.role == 'tool' %}<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>"
    "{{ message.content | tojson }}<|end|>"
    "{% elif 'tool_calls' in message %}{% set call = message.tool_calls[0].function %}{% set last.name = call.name %}"
    "{% set later = namespace(final=false) %}{% for other in messages[loop.index:] %}"
    "{% if other.role == 'assistant' and 'tool_calls' not in other %}{% set later.final = true %}{% endif %}{% endfor %}"
    "{% if message.thinking and not later.final %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>"
    "{% elif loop.last and not add_generation_prompt %}"
    "{% if 'thinking' in message %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|return|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

FAMILIES = {
    "qwen2.5": Family(_chatml("{{ message.content }}"), QWEN, QWEN_ENDS, QWEN_ADDED),
    "qwen3": Family(_chatml(THOUGHT, SWITCH, LAST_USER), QWEN, QWEN_ENDS, (*QWEN_ADDED, "<think>", "</think>")),
    "qwen3-thinking": Family(
        _chatml(THOUGHT, "<think>\n", LAST_USER), QWEN, QWEN_ENDS, (*QWEN_ADDED, "<think>", "</think>")
    ),
    "llama3.1": Family(
        LLAMA,
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
            "<|python_tag|>",
        ),
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
        bos="<|begin_of_text|>",
    ),
    "mistral": Family(
        MISTRAL,
        (
            "<s>",
            "</s>",
            "[INST]",
            "[/INST]",
            "[TOOL_CALLS]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        ("</s>",),
        bos="<s>",
        sentencepiece=True,
    ),
    "gemma": Family(
        GEMMA,
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        ("<eos>", "<end_of_turn>"),
        bos="<bos>",
    ),
    "glm-4": Family(
        GLM,
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        (*QWEN_ADDED, "<think>", "</think>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    "phi-4": Family(PHI, ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"), ("<|im_end|>",)),
    "phi-4-mini": Family(
        PHI_MINI,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        ("<|end|>", "<|endoftext|>"),
    ),
    "gpt-oss": Family(
        HARMONY,
        (
            "<|endoftext|>",
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|channel|>",
            "<|constrain|>",
            "<|call|>",
            "<|return|>",
        ),
        ("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    "chatml on sentencepiece": Family(
        _chatml("{{ message.content }}"),
        ("<s>", "<|im_start|>", "<|im_end|>"),
        ("<|im_end|>",),
        QWEN_ADDED,
        sentencepiece=True,
        first=True,
    ),
    "plain": Family(None, ("<|endoftext|>",), ("<|endoftext|>",)),
}


@cache
def tokenizer_of(name: str) -> TokenizerWrapper:
    """The toy tokenizer of a family."""
    return made(FAMILIES[name])


def made(family: Family) -> TokenizerWrapper:
    tokenizer = _sentencepiece(family) if family.sentencepiece else _bytes(family)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.added])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": family.ends[0],
        "clean_up_tokenization_spaces": False,
        **({"bos_token": family.bos} if family.bos else {}),
        **({"chat_template": family.template} if family.template else {}),
    }
    with TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(Path(folder), eos_token_ids=[tokenizer.token_to_id(text) for text in family.ends])


def _specials(family: Family) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False) for text in family.special]


def _bytes(family: Family) -> Tokenizer:
    """Byte-level BPE, as of GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_specials(family),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _sentencepiece(family: Family) -> Tokenizer:
    """BPE on bytes with a blank before each text, as of Llama 2 and of Mistral."""
    letters = sorted(set(TEXT.replace(" ", "")) | set("▁[]/_abcdefghijklmnopqrstuvwxyz0123456789"))
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "▁i", "▁t", "on", '▁"']
    merges = [("▁", "i"), ("▁", "t"), ("o", "n"), ("▁", '"')]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if family.first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(_specials(family))
    return tokenizer
