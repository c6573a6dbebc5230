"""Which tokens of a vocabulary begin a word."""

from __future__ import annotations

from typing import Any

WORD_MARKS = ("\u0120", "\u2581")
"""What stands for the space before a word in byte-level vocabularies ("Ġ") and SentencePiece's ("▁")."""


def word_tokens(tokenizer: Any, vocab_size: int) -> dict[int, str]:
    """Texts of the tokens that begin a word and have letters alone, by token id.

    A token without the mark of a space goes on with a word: "red" of "hundred" says nothing of red. In a
    vocabulary without marks every token of letters is a word.
    """
    pieces = tokenizer.convert_ids_to_tokens(range(min(vocab_size, len(tokenizer))))
    marked = {i: piece for i, piece in enumerate(pieces) if piece.startswith(WORD_MARKS)}
    texts = {
        i: tokenizer.convert_tokens_to_string([piece]).strip()
        for i, piece in (marked or dict(enumerate(pieces))).items()
    }
    return {i: text for i, text in texts.items() if text.isalpha()}
