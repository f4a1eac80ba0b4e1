"""Compact chat templates of six families, each with generation marks.

A template is Jinja source that turns a list of messages into one string. Every template here wraps an
assistant turn, up to and including its end-of-turn token but without the line break after it, in
`{% generation %}` ... `{% endgeneration %}`, so that `polm.text.chat` can tell exactly which tokens to train on.
All of them understand `add_generation_prompt`. None of them knows tools: for tools use the model's own template.

The layouts follow the published formats of the families; default system prompts, dates and tools are left out.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from polm.errors import ModelError

_ALTERNATE = (
    "{% set chat = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in chat %}{% if m.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('message ' ~ (loop.index0 + messages|length - chat|length) ~ ' has the role ' ~ m.role"
    " ~ ', but after an optional system message the roles must be user, assistant, user, assistant, ...') }}"
    "{% endif %}{% endfor %}"
)
_PLAIN_ROLES = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('message ' ~ loop.index0 ~ ' has the role ' ~ m.role"
    " ~ '; this template knows system, user and assistant') }}"
    "{% endif %}{% endfor %}"
)
# Families without a system role put its text in front of the first user turn.
_FOLD_SYSTEM = "{% set preface = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' %}"

TEMPLATES: dict[str, str] = {
    "polm": _ALTERNATE
    + (
        "{% if messages[0].role == 'system' %}{{ '<|system|>' + messages[0].content }}{% endif %}"
        "{% for m in chat %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}"
        "{% else %}{{ '<|assistant|>' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
    # Qwen and SmolLM3. Line breaks in front of an answer are dropped: with the line break of the header they would
    # become one token, half header and half answer.
    "chatml": _PLAIN_ROLES
    + (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content.lstrip('\\n') + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": _PLAIN_ROLES
    + (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content|trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content|trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "olmo2": _PLAIN_ROLES
    + (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% if not loop.last %}{{ '\\n' }}{% endif %}"
        "{% else %}{{ m.content + '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
    "gemma": _ALTERNATE
    + _FOLD_SYSTEM
    + (
        "{{ bos_token }}{% for m in chat %}{% if m.role == 'assistant' %}{{ '<start_of_turn>model\\n' }}"
        "{% generation %}{{ m.content|trim + '<end_of_turn>' }}{% endgeneration %}"
        "{% else %}{{ '<start_of_turn>user\\n' + (preface if loop.first else '') + m.content|trim + '<end_of_turn>' }}"
        "{% endif %}{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    # The space in front of an answer is the model's own: a prompt ends at `[/INST]`, and there is nothing to add to it.
    "mistral": _ALTERNATE
    + _FOLD_SYSTEM
    + (
        "{{ bos_token }}{% for m in chat %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}"
        "{% else %}{{ '[INST] ' + (preface if loop.first else '') + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
}

# What a tokenizer must hold as single tokens before the template may be set. OLMo-2 writes its role markers as plain
# text, so it needs none; `eos_token` is needed wherever the template names it.
CONTROL_TOKENS: dict[str, tuple[str, ...]] = {
    "polm": ("<|system|>", "<|user|>", "<|assistant|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "olmo2": (),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "mistral": ("[INST]", "[/INST]"),
}

# Role markers that the template writes as plain text. No tokenizer can tell them from the same text in a message,
# so `polm.text.chat` refuses messages that contain them.
TEXT_MARKERS: dict[str, tuple[str, ...]] = {"olmo2": ("<|system|>", "<|user|>", "<|assistant|>")}

# The usual beginning-of-sequence token of the families that have one.
BOS_TOKENS: dict[str, str] = {
    "llama3": "<|begin_of_text|>",
    "olmo2": "<|endoftext|>",
    "gemma": "<bos>",
    "mistral": "<s>",
}


def require_template_name(name: str) -> None:
    """Raise ModelError unless `name` is a key of TEMPLATES."""
    if name not in TEMPLATES:
        raise ModelError(f"unknown chat template {name!r}; choose one of {', '.join(TEMPLATES)}")


def missing_tokens(tokenizer: PreTrainedTokenizerFast, name: str) -> list[str]:
    """What the template `name` needs and the tokenizer lacks: tokens, and `bos_token` / `eos_token` if they are unset.

    A token counts only if it is an added token: only those are matched before any other rule of the tokenizer.
    """
    require_template_name(name)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    missing = [token for token in CONTROL_TOKENS[name] if token not in added]
    roles: dict[str, Any] = tokenizer.special_tokens_map
    missing += [role for role in ("bos_token", "eos_token") if role in TEMPLATES[name] and not roles.get(role)]
    return missing


def apply_template(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """Set the chat template `name` on the tokenizer.

    Raises ModelError for an unknown name, or if the vocabulary lacks a control token of the template as one token.
    Tokens are not added here: new tokens need new rows in the model, which is the caller's decision.
    """
    missing = missing_tokens(tokenizer, name)
    if missing:
        fitting = [other for other in TEMPLATES if not missing_tokens(tokenizer, other)]
        raise ModelError(
            f"the chat template {name!r} needs {', '.join(missing)}, which this tokenizer does not have as special"
            " tokens. Cure: add them (tokenizer.add_special_tokens) and resize the model's embeddings"
            + (f", or choose a template that fits: {', '.join(fitting)}" if fitting else "")
        )
    tokenizer.chat_template = TEMPLATES[name]
