"""Sequences that share a row: which do, and that no token notices."""

import pytest
import tiny
import torch
from scenes import mixed_records

from lightning_limber.data import layout
from lightning_limber.data.layout import Packing, Parts
from lightning_limber.data.packing import fill_rows
from lightning_limber.data.prompt import Text
from lightning_limber.models.limber import Limber
from lightning_limber.models.llm import LLM
from lightning_limber.models.vision import VisionConfig


def test_rows_hold_every_sequence_once_and_spare_positions():
    lengths = [30, 10, 20, 12, 28, 18, 11, 9]
    rows = fill_rows(lengths, 30, hidden_size=10**6, longest_row=10**6)
    assert sorted(i for row in rows for i in row) == list(range(8))
    longest = max(sum(lengths[i] for i in row) for row in rows)
    assert len(rows) * longest < 1.1 * sum(lengths) < 8 * 30


@pytest.mark.parametrize(
    ("lengths", "width", "hidden_size", "longest_row"),
    [
        ([30] * 8, 30, 10**6, 10**6),  # Nothing to spare.
        ([30, 10] * 4, 30, 10**6, 39),  # No two fit.
        ([30, 10] * 4, 30, 10**6, None),  # An LLM that ignores masks.
        ([30, 26] * 4, 30, 0.01, 10**6),  # Attention would cost more than the padding.
        ([5], 30, 10**6, 10**6),
    ],
)
def test_each_has_its_own_row_where_packing_does_not_pay(lengths, width, hidden_size, longest_row):
    assert fill_rows(lengths, width, hidden_size, longest_row) == [[i] for i in range(len(lengths))]


def test_tokens_see_their_own_sequence_alone(monkeypatch):
    monkeypatch.setattr(layout, "fill_rows", lambda *_: [[1, 0]])
    texts = [Text(list(ids), [True] * len(ids), [True] * len(ids)) for ids in ([5, 6, 7, 8], [4, 9, 3])]
    laid = layout.lay_out([Parts(-1, [text]) for text in texts], [], 0, Packing(32, 100))
    # The last label of each is no input: nothing is predicted from it.
    assert laid.input_ids.tolist() == [[4, 9, 5, 6, 7]]
    assert laid.segment_ids.tolist() == [[1, 1, 0, 0, 0]]
    assert laid.position_ids.tolist() == [[0, 1, 0, 1, 2]]
    assert laid.labels.tolist() == [6, 7, 8, 9, 3]  # In the order of the sequences.
    assert laid.label_positions.tolist() == [2, 3, 4, 0, 1]
    assert laid.row_mask().dense()[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("architecture", list(tiny.llm_configs()))
def test_packed_sequences_lose_what_they_lose_apart(
    models, tmp_path, monkeypatch, architecture, share_prefix
):
    """Every token's loss and the adapter's gradient, with an image, without, and with several captions."""
    name = tiny.write_llm(tmp_path, architecture)
    model = Limber(vision=VisionConfig(str(models / "vision"), image_size=32, pool=2), llm=name)
    model.configure_model()
    records, _ = mixed_records()
    captions = [[r.captions[0], "a red cat .", "a dog ."][: 1 + 2 * (i % 2)] for i, r in enumerate(records)]
    found, rows = [], []
    for packed in (True, False):
        monkeypatch.setattr(
            layout,
            "fill_rows",
            lambda lengths, *_, packed=packed: (
                [[0, 2], list({*range(len(lengths))} - {0, 2})]
                if packed
                else [[i] for i in range(len(lengths))]
            ),
        )
        batch = model.collator()(records, captions, share_prefix=share_prefix)
        model.zero_grad()
        _, losses, correct = model(batch)
        losses.mean().backward()
        rows.append((batch.used_positions, batch.input_ids.numel()))
        found.append([losses.detach(), correct, *(p.grad.clone() for p in model.adapter.parameters())])
    assert rows[0][1] < rows[1][1]
    for packed, apart in zip(*found, strict=True):
        torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)


def test_an_llm_that_ignores_masks_is_found_out(models, monkeypatch):
    decode = LLM.decode
    monkeypatch.setattr(LLM, "decode", lambda self, x, first_layer=0, **_: decode(self, x, first_layer))
    assert LLM(str(models / "llm")).load().longest_row is None
    monkeypatch.undo()
    assert LLM(str(models / "llm")).load().longest_row > 10**6
