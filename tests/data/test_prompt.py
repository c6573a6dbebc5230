from __future__ import annotations

import types

import pytest
import tiny

from lightning_limber.data.collate import Collator, choose_captions
from lightning_limber.data.prompt import CAPTION_QUESTION, Prompt
from lightning_limber.data.records import Record
from lightning_limber.models.llm import LLM

CAPTION = "a red circle ."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm")
    return LLM(tiny.write_llm(folder)).tokenizer


def layout(tokenizer, template, caption: str = CAPTION, limit: int = 64) -> tuple[str, str, str, str]:
    """Prefix, text, its caption tokens and its target tokens, as words."""
    prompt = Prompt(template, tokenizer, limit)
    ids, is_caption, is_target, _ = prompt.text(caption)

    def words(chosen) -> str:
        return " ".join(tokenizer.convert_ids_to_tokens(chosen))

    return (
        words(prompt.prefix_ids),
        words(ids),
        words([i for i, keep in zip(ids, is_caption, strict=True) if keep]),
        words([i for i, keep in zip(ids, is_target, strict=True) if keep]),
    )


CHAT = [
    {"role": "user", "content": "{image} describe the picture"},
    {"role": "assistant", "content": "{caption}"},
]


@pytest.mark.parametrize(
    ("template", "prefix", "text"),
    [
        pytest.param("{image}{caption}{eos}", "", f"{CAPTION} <eos>", id="LiMBeR"),
        pytest.param(
            "{bos}{image}describe the picture . {caption}{eos}",
            "<bos>",
            f"describe the picture . {CAPTION} <eos>",
            id="Venhoff",
        ),
        pytest.param(
            CHAT,
            "<bos> <turn> user",
            f"describe the picture <eos> <turn> assistant {CAPTION} <eos>",
            id="chat template",
        ),
    ],
)
def test_layouts(tokenizer, template, prefix, text):
    # The loss is on the caption and the one token that ends it, wherever the prompt stands.
    assert layout(tokenizer, template) == (prefix, text, CAPTION, f"{CAPTION} <eos>")


def test_no_end_token_is_no_target(tokenizer):
    assert layout(tokenizer, "{image}{caption}") == ("", CAPTION, CAPTION, CAPTION)


def test_long_captions_are_cut_and_still_end(tokenizer):
    assert layout(tokenizer, "{bos}{image}{caption}{eos}", limit=2)[1:] == (
        "a red <eos>",
        "a red",
        "a red <eos>",
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{bos}{caption}", "needs {image} exactly once"),
        ("{image}{image}{caption}", "needs {image} exactly once"),
        ("{image}", "needs {caption} exactly once"),
        ("{caption}{image}", "must follow"),
    ],
)
def test_wrong_templates(tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        Prompt(template, tokenizer, 64)


def test_missing_special_tokens_and_chat_templates(tmp_path):
    tokenizer = LLM(tiny.write_llm(tmp_path, chat=False)).tokenizer
    with pytest.raises(ValueError, match="has no chat template"):
        Prompt(CHAT, tokenizer, 64)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="{bos} but this tokenizer has no bos_token"):
        Prompt("{bos}{image}{caption}", tokenizer, 64)


def test_generation_starts_where_the_caption_does(tokenizer):
    prompt = Prompt("{bos}{image}describe the picture . {caption}{eos}", tokenizer, 64)
    ids, is_caption, *_ = prompt.text(CAPTION)
    assert prompt.generation_ids == ids[: is_caption.index(True)]
    assert Prompt("{bos}{image} {caption}{eos}", tokenizer, 64).generation_ids == []


def test_choice_of_captions():
    captions = list("abcde")
    record = Record("a", None, captions)
    assert choose_captions(record, 5, (0,)) == captions
    draws = [tuple(choose_captions(record, 2, (0, epoch))) for epoch in range(50)]
    assert draws == [tuple(choose_captions(record, 2, (0, epoch))) for epoch in range(50)]
    assert all(len(set(draw)) == 2 for draw in draws)
    assert {name for draw in draws for name in draw} == set(captions)


# -- conversations ----------------------------------------------------------------------------------

TURNS = [("describe the picture", "a red circle"), ("one or two ?", "two")]


@pytest.mark.parametrize(
    ("template", "prefix", "opening"),
    [
        pytest.param("{conversation}", "<bos> <turn> user", "", id="LLaVA"),
        pytest.param("{bos}{image}{conversation}", "<bos>", "<turn> user ", id="Venhoff"),
        pytest.param("{image}{conversation}", "", "<turn> user ", id="no bos"),
    ],
)
def test_conversations(tokenizer, template, prefix, opening):
    """All turns in the tokenizer's chat template; the loss is on what the assistant says and its ends."""
    got = layout(tokenizer, template, TURNS)
    between = "<eos> <turn> user one <unk> two <unk> <eos> <turn> assistant"
    assert got == (
        prefix,
        f"{opening}describe the picture <eos> <turn> assistant a red circle {between} two <eos>",
        "a red circle two",
        "a red circle <eos> two <eos>",
    )


def test_a_conversation_is_the_chat_templates_own_text(tokenizer):
    prompt = Prompt("{conversation}", tokenizer, 64)
    messages = []
    for user, assistant in TURNS:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    ids, *_ = prompt.text(TURNS, has_image=False)
    assert prompt.prefix_ids + ids == whole


def test_long_conversations_are_cut_at_the_end(tokenizer):
    whole = layout(tokenizer, "{conversation}", TURNS)
    cut = layout(tokenizer, "{conversation}", TURNS, limit=9)
    assert cut[1].split() == whole[1].split()[:9]
    assert cut[2:] == ("a red circle", "a red circle")
    assert Prompt("{conversation}", tokenizer, 9).text(TURNS)[3]
    assert not Prompt("{conversation}", tokenizer, 64).text(TURNS)[3]


def test_one_turn_is_a_caption_to_a_caption_prompt(tokenizer):
    template = "{bos}{image}{caption}{eos}"
    assert layout(tokenizer, template, TURNS[:1]) == layout(tokenizer, template, "a red circle")
    with pytest.raises(ValueError, match="a record has 2 turns: use"):
        Prompt(template, tokenizer, 64).text(TURNS)
    with pytest.raises(ValueError, match="captions without turns"):
        Prompt("{conversation}", tokenizer, 64).text("a red circle")


def test_a_caption_is_asked_for_in_a_conversation(tokenizer):
    for template in ("{conversation}", "{bos}{image}{conversation}"):
        prompt = Prompt(template, tokenizer, 64)
        ids, is_caption, *_ = prompt.text([(CAPTION_QUESTION, "cat")])
        assert prompt.generation_ids == ids[: is_caption.index(True)]


def test_no_padding_token_is_needed(tokenizer):
    assert tokenizer.pad_token is None
    transform = types.SimpleNamespace(__call__=None)
    collator = Collator(transform, Prompt("{bos}{image}{caption}{eos}", tokenizer, 64), image_tokens=4)
    records = [Record("a", None, ["cat"]), Record("b", None, ["a red cat ."])]
    batch = collator(records, [record.captions for record in records])
    assert batch.input_ids.shape == (2, 6)
    assert batch.label_counts == [2, 5]
    assert batch.label_images.tolist() == [-1] * 7
