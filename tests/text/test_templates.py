"""The shipped chat templates: their exact text, their checks of roles, and what a vocabulary needs for them."""

from __future__ import annotations

import re
from functools import cache

import pytest
from transformers import PreTrainedTokenizerFast

from polm.errors import DataError, ModelError
from polm.text.chat import render_chat
from polm.text.templates import CONTROL_TOKENS, TEMPLATES, apply_template, missing_tokens
from polm.text.tokenizer import train_tokenizer

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "U"}
ANSWER = {"role": "assistant", "content": "A"}
EXPECTED = {
    "polm": ("", "<|system|>S<|user|>U<|assistant|>A<|eos|><|user|>U", "<|assistant|>"),
    "chatml": (
        "",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nU<|im_end|>\n",
        "<|im_start|>assistant\n",
    ),
    "llama3": (
        "<|begin_of_text|>",
        "<|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "olmo2": (
        "<|endoftext|>",
        "<|system|>\nS\n<|user|>\nU\n<|assistant|>\nA<|eos|>\n<|user|>\nU\n",
        "<|assistant|>\n",
    ),
    "gemma": (
        "<bos>",
        "<start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>user\nU<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
    "mistral": ("<s>", "[INST] S\n\nU [/INST] A<|eos|>[INST] U [/INST]", ""),
}


@cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    return train_tokenizer(["S U A"], kind="byte", vocab_size=300, chat_template=name)


def render(name: str, messages: list[dict[str, str]], prompt: bool = False) -> str:
    return str(tokenizer_for(name).apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def test_all_six_families_are_there() -> None:
    assert list(TEMPLATES) == ["polm", "chatml", "llama3", "olmo2", "gemma", "mistral"] == list(CONTROL_TOKENS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_exact(name: str) -> None:
    bos, turns, header = EXPECTED[name]
    chat = [SYSTEM, USER, ANSWER, USER]
    assert render(name, chat) == bos + turns
    assert render(name, chat, prompt=True) == bos + turns + header
    assert render(name, [USER], prompt=True).endswith(header)
    assert "S" not in re.sub(r"<s>|INST", "", render(name, [USER], prompt=True))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_a_prefix_of_the_answered_conversation(name: str) -> None:
    chat = [SYSTEM, USER, ANSWER, USER, ANSWER]
    for turn in (2, 4):
        assert render(name, chat).startswith(render(name, chat[:turn], prompt=True))


@pytest.mark.parametrize("name", ["polm", "gemma", "mistral"])
@pytest.mark.parametrize(
    ("chat", "index"),
    [
        ([USER, USER, ANSWER], 1),
        ([ANSWER], 0),
        ([SYSTEM, ANSWER], 1),
        ([USER, ANSWER, ANSWER], 2),
        ([USER, SYSTEM, ANSWER], 1),
    ],
)
def test_families_with_alternating_roles_refuse_others(name: str, chat: list[dict[str, str]], index: int) -> None:
    with pytest.raises(DataError, match=f"refuses the conversation.*message {index} has the role"):
        render_chat(tokenizer_for(name), chat)


@pytest.mark.parametrize("name", ["chatml", "llama3", "olmo2"])
def test_other_families_allow_any_order_but_no_tools(name: str) -> None:
    assert render(name, [USER, USER, ANSWER, SYSTEM]).count("U") == 2
    with pytest.raises(DataError, match="message 1 has the role tool"):
        render_chat(tokenizer_for(name), [USER, {"role": "tool", "content": "T"}, ANSWER])


@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_families_that_trim(name: str) -> None:
    padded = [{"role": "user", "content": " U\n"}, {"role": "assistant", "content": "\nA "}]
    assert render(name, padded) == render(name, [USER, ANSWER])


def test_chatml_drops_line_breaks_before_an_answer_only() -> None:
    chat = [{"role": "user", "content": "\nU "}, {"role": "assistant", "content": "\n\n A "}]
    assert render("chatml", chat) == "<|im_start|>user\n\nU <|im_end|>\n<|im_start|>assistant\n A <|im_end|>\n"


def test_apply_template_names_what_is_missing() -> None:
    tokenizer = train_tokenizer(["a"], kind="byte", vocab_size=300)
    with pytest.raises(ModelError, match=r"'chatml' needs <\|im_start\|>, <\|im_end\|>, .*Cure.*fits: polm"):
        apply_template(tokenizer, "chatml")
    with pytest.raises(ModelError, match=r"\[INST\], \[/INST\], bos_token"):
        apply_template(tokenizer, "mistral")
    with pytest.raises(ModelError, match="unknown chat template 'gpt'; choose one of polm, chatml"):
        apply_template(tokenizer, "gpt")
    assert tokenizer.chat_template == TEMPLATES["polm"]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert missing_tokens(tokenizer, "chatml") == []
    apply_template(tokenizer, "chatml")
    assert tokenizer.chat_template == TEMPLATES["chatml"]


def test_a_token_of_the_plain_vocabulary_is_not_enough() -> None:
    """A word of a word-level vocabulary is only found between spaces; a control token must always be found."""
    tokenizer = train_tokenizer(["a [INST b"], kind="word", vocab_size=300)
    tokenizer.bos_token = "<|system|>"
    assert missing_tokens(tokenizer, "mistral") == ["[INST]", "[/INST]"]
