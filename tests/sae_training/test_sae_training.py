"""SAEs of tiny random models: corpus, training, scores, descriptions, Neuronpedia files."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from dev.shipped_saes.captions import caption
from dev.shipped_saes.corpus import SOURCES, Document
from lightning_limber.models import activations
from lightning_limber.models.llm import LLM
from lightning_limber.probe.explanations import (
    Explanation,
    explainers,
    neuronpedia_id,
    read_explanations,
    write_explanations,
)
from lightning_limber.sae_training import describe, evaluate
from lightning_limber.sae_training.corpus import read_texts
from lightning_limber.sae_training.train import TrainConfig, train

WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "cat",
    "dog",
    "boat",
    "sea",
    "runs",
    "sleeps",
    "on",
    "under",
    "near",
    "small",
    "old",
    "tree",
    "house",
    "and",
]
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a word tokenizer, saved as a hub folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llm")
    vocab = {word: i for i, word in enumerate(["<bos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocab),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=0,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(llm_folder: Path) -> LLM:
    return LLM(str(llm_folder)).load()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    with path.open("w") as file:
        for i in range(160):
            words = " ".join(rng.choice(WORDS, 25))
            record = {"text": words, "split": "heldout" if i % 4 == 0 else "train"}
            file.write(json.dumps(record) + "\n")
    return path


def _config(llm_folder: Path, text: Path, folder: Path, **changed) -> TrainConfig:
    values = dict(
        llm=str(llm_folder),
        text=str(text),
        out=str(folder / "out"),
        work=str(folder / "work"),
        layers=[0, 1],
        sae={"d_sae": 32, "k": 4, "topk_threshold_lr": 0.3},
        tokens=1280,
        batch_tokens=64,
        warm_up_steps=2,
        dead_after_steps=5,
        context_size=24,
        block_contexts=20,
        llm_batch_tokens=256,
        checkpoint_blocks=1,
        bf16=False,
    )
    return TrainConfig(**{**values, **changed})


@pytest.fixture(scope="module")
def release(llm_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(_config(llm_folder, text, tmp_path_factory.mktemp("release")))


def _saes(release: Path) -> dict:
    from sae_lens import SAE

    return {name: SAE.load_from_disk(release / name, device="cpu").float() for name in HOOKS}


def _weights(release: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {
        f"{name}/{key}": value
        for name in HOOKS
        for key, value in load_file(release / name / "sae_weights.safetensors").items()
    }


def _heldout(llm: LLM, text: Path) -> list[list[int]]:
    return list(activations.contexts(read_texts(text, "heldout"), llm.tokenizer, 24))


# --- corpus -----------------------------------------------------------------------------------


def test_split_is_by_document_and_stable() -> None:
    documents = [Document(f"x/{i}", "text", "x", "") for i in range(4000)]
    share = sum(d.split == "heldout" for d in documents) / len(documents)
    assert 0.04 < share < 0.08
    assert [d.split for d in documents] == [Document(d.id, "", "", "other").split for d in documents]


def test_sources_name_a_licence_each() -> None:
    assert len({s.package for s in SOURCES}) == len(SOURCES)
    assert all(s.licence for s in SOURCES)


def test_captions_vary_and_repeat_with_the_seed() -> None:
    import random

    drawn = [caption(random.Random(i)) for i in range(500)]
    assert len(set(drawn)) > 450
    assert drawn == [caption(random.Random(i)) for i in range(500)]
    assert all(2 <= len(c.split()) <= 40 and "  " not in c for c in drawn)


def test_texts_of_a_folder_and_of_jsonl(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    both = [t for s in ("train", "heldout") for t in read_texts(tmp_path, s)]
    assert sorted(both) == sorted(f"text {i}" for i in range(60))
    file = tmp_path / "x.jsonl"
    file.write_text('{"body": "hello"}\n')
    with pytest.raises(ValueError, match=r"'text'.*'body'"):
        list(read_texts(file, "train"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(read_texts(tmp_path / "nowhere.jsonl", "train"))


# --- activations ----------------------------------------------------------------------------------


def test_contexts_open_with_bos_and_lose_no_token(llm: LLM) -> None:
    words = " ".join(WORDS * 5)
    found = list(activations.contexts([words], llm.tokenizer, 24))
    assert all(c[0] == llm.tokenizer.bos_token_id and len(c) <= 24 for c in found)
    assert sum(len(c) - 1 for c in found) == len(WORDS) * 5


def test_batches_hold_every_context_once_and_padding_changes_nothing(llm: LLM, text: Path) -> None:
    contexts = [c[: 6 + i % 15] for i, c in enumerate(_heldout(llm, text))]
    seen = []
    for ids, mask, chosen in activations.batches(contexts, 100):
        hidden = activations.residuals(llm, ids, HOOKS)[HOOKS[1]]
        for row, place in enumerate(chosen):
            seen.append(place)
            ids_alone = torch.tensor([contexts[place].tolist()])
            alone = activations.residuals(llm, ids_alone, HOOKS)[HOOKS[1]]
            width = len(contexts[place])
            assert mask[row].sum() == width
            torch.testing.assert_close(hidden[row, :width], alone[0], rtol=1e-4, atol=1e-5)
    assert sorted(seen) == list(range(len(contexts)))


def test_counted_leaves_out_position_0_padding_and_sinks() -> None:
    hidden = torch.ones(1, 4, 4)  # norm 2
    hidden[0, 2] *= 10.5
    mask = torch.tensor([[1, 1, 1, 0]])
    assert activations.counted(hidden, mask, median_norm=2.0).tolist() == [[False, True, False, False]]
    assert activations.counted(hidden, mask, median_norm=2.2).tolist() == [[False, True, True, False]]


# --- training -------------------------------------------------------------------------------------


def test_release_loads_with_saelens_alone_in_16_bits(release: Path) -> None:
    weights = _weights(release)
    assert {value.dtype for value in weights.values()} == {torch.float16}
    for name, sae in _saes(release).items():
        assert sae.cfg.architecture() == "jumprelu"
        assert sae.cfg.metadata.hook_name == name
        assert sae.cfg.metadata.prepend_bos is True
    card = json.loads((release / "card.json").read_text())
    assert card["tokens_trained"] == 1280
    assert set(card["layers"]) == set(HOOKS)


@pytest.mark.parametrize(
    ("architecture", "sae"),
    [("topk", {"d_sae": 32, "k": 4}), ("jumprelu", {"d_sae": 32}), ("standard", {"d_sae": 32})],
)
def test_other_architectures_train(
    llm_folder: Path, text: Path, tmp_path: Path, architecture: str, sae: dict
) -> None:
    config = _config(llm_folder, text, tmp_path, architecture=architecture, sae=sae, tokens=512)
    assert {s.cfg.architecture() for s in _saes(train(config)).values()} == {architecture}


def test_a_block_too_small_for_a_step_stops(llm_folder: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="raise block_contexts"):
        train(_config(llm_folder, text, tmp_path, block_contexts=1))


def test_saved_threshold_lets_about_k_latents_fire(llm: LLM, text: Path, release: Path) -> None:
    contexts = _heldout(llm, text)
    medians, _, _ = activations.median_norms(llm, contexts, HOOKS, 256)
    for score in evaluate.reconstruction(llm, _saes(release), medians, contexts).values():
        assert 2 < score["l0"] < 6


def test_one_seed_gives_equal_weights_and_another_does_not(
    llm_folder: Path, text: Path, release: Path, tmp_path: Path
) -> None:
    again = _weights(train(_config(llm_folder, text, tmp_path / "again")))
    other = _weights(train(_config(llm_folder, text, tmp_path / "other", seed=1)))
    for key, value in _weights(release).items():
        assert torch.equal(value, again[key])
    assert any(not torch.equal(value, other[key]) for key, value in _weights(release).items())


def test_interrupted_run_goes_on_exactly(
    llm_folder: Path, text: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_limber.sae_training.train import Blocks

    config = _config(llm_folder, text, tmp_path)
    read = Blocks._read

    def stop_in_third_block(self, block: int):
        if block == 2:
            raise KeyboardInterrupt
        return read(self, block)

    monkeypatch.setattr(Blocks, "_read", stop_in_third_block)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.setattr(Blocks, "_read", read)
    with pytest.raises(ValueError, match=r"'lr'"):
        train(_config(llm_folder, text, tmp_path, lr=0.1))
    resumed = _weights(train(config))
    for key, value in _weights(release).items():
        assert torch.equal(value, resumed[key])


# --- scores ---------------------------------------------------------------------------------------


class _FakeSAE(torch.nn.Module):
    """Reconstructs perfectly, or always says the same vector."""

    def __init__(self, constant: torch.Tensor | None = None) -> None:
        super().__init__()
        self.cfg = type("cfg", (), {"d_in": 16, "d_sae": 32})()
        self.constant = constant

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, -x], dim=-1).relu()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        positive, negative = latents.chunk(2, dim=-1)
        x = positive - negative
        return x if self.constant is None else self.constant.expand_as(x)


def test_perfect_sae_scores_one_and_the_mean_scores_zero(llm: LLM, text: Path) -> None:
    contexts = _heldout(llm, text)
    medians, means, _ = activations.median_norms(llm, contexts, HOOKS, 256)
    for constant, wanted in ((None, 1.0), (means[HOOKS[0]], 0.0)):
        saes = {HOOKS[0]: _FakeSAE(constant)}
        scores = evaluate.reconstruction(llm, saes, medians, contexts)[HOOKS[0]]
        assert scores["explained_variance"] == pytest.approx(wanted, abs=1e-4)
        recovered = evaluate.ce_recovered(llm, saes, medians, {HOOKS[0]: scores["mean"]}, contexts)[
            HOOKS[0]
        ]
        assert recovered["ce_recovered"] == pytest.approx(wanted, abs=1e-3)


def test_scores_do_not_depend_on_batches_and_variance_is_numpys(
    llm: LLM, text: Path, release: Path
) -> None:
    contexts, saes = _heldout(llm, text), _saes(release)
    medians, _, _ = activations.median_norms(llm, contexts, HOOKS, 256)
    small, large = (evaluate.reconstruction(llm, saes, medians, contexts, n)[HOOKS[1]] for n in (60, 4096))
    for key in ("explained_variance", "l0", "dead", "variance"):
        assert small[key] == pytest.approx(large[key], rel=1e-5)
    x = np.concatenate(
        [
            activations.residuals(llm, torch.tensor([c.tolist()]), HOOKS)[HOOKS[1]][0, 1:].numpy()
            for c in contexts
        ]
    ).astype(np.float64)
    assert large["variance"] == pytest.approx(((x - x.mean(0)) ** 2).sum(1).mean(), rel=1e-5)


def test_saelens_evals_agree_where_they_must(llm: LLM, text: Path, release: Path) -> None:
    """Without sinks, explained variance, l0 and dead latents mean the same to SAELens and to us."""
    contexts = [c for c in _heldout(llm, text) if len(c) == 24][:16]
    card = json.loads((release / "card.json").read_text())
    scores = evaluate.evaluate(llm, _saes(release), card, contexts, saelens_tokens=16 * 24)
    for name in HOOKS:
        ours, theirs = scores[name]["same_text"], scores[name]["saelens"]
        for key in ("explained_variance", "l0", "dead"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key
        # Zero ablation against mean ablation: another denominator, never another sign.
        assert theirs["ce_recovered"] != pytest.approx(ours["ce_recovered"], abs=1e-6)
    assert "| blocks.1.hook_resid_post |" in evaluate.table(scores)
    assert not llm.layers[0]._forward_hooks


# --- descriptions -------------------------------------------------------------------------------


def test_auroc_and_precision_equal_counting() -> None:
    rng = np.random.default_rng(1)
    seen = (rng.random((200, 5)) < 0.3).astype(np.float32)
    weight, fires = rng.random(3), rng.random(200) < 0.4
    words = np.array([4, 0, 2])
    auroc, precision = describe._predicts(sparse.csc_matrix(seen), words, weight, np.flatnonzero(fires))
    prediction = (seen[:, words] * weight).max(1)
    pairs = prediction[fires][:, None] - prediction[~fires][None]
    assert auroc == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())
    levels = sorted(set(prediction), reverse=True)
    expected = sum(fires[prediction == level].sum() * fires[prediction >= level].mean() for level in levels)
    assert precision == pytest.approx(expected / fires.sum())


def test_a_latent_that_fires_on_a_word_is_described_by_it() -> None:
    rng = np.random.default_rng(2)
    words = rng.integers(0, 8, 2000)
    seen = sparse.csc_matrix((np.ones(2000, np.float32), (np.arange(2000), words)))
    active = sparse.csr_matrix(np.stack([words == 3, rng.random(2000) < 0.1], 1).astype(np.float32))
    (named, weight), _ = describe._choose(active, seen)
    assert named[0] == 3
    assert weight[0] > 0.95


def test_words_join_their_tokens_and_marks_stand_alone() -> None:
    assert [w for _, w in describe._words(["The", " l", "ight", "house", ",", " old", "\n"])] == [
        "the",
        "lighthouse",
        "lighthouse",
        "lighthouse",
        ",",
        "old",
        "⏎",
    ]


def test_every_live_latent_gets_a_row(llm: LLM, text: Path, release: Path) -> None:
    saes = _saes(release)
    medians = {
        name: v["median_norm"]
        for name, v in json.loads((release / "card.json").read_text())["layers"].items()
    }
    texts = list(read_texts(text, "heldout"))
    firings = describe.collect(llm, saes, medians, texts, 24)
    rows = list(describe.describe(firings, HOOKS[0], saes[HOOKS[0]], llm, "tiny"))
    live = np.flatnonzero(np.asarray((firings.fires[HOOKS[0]] > 0).sum(0))[0])
    assert [row.index for row in rows] == live.tolist()
    assert all(0 < row.density <= 1 and row.explainer == describe.EXPLAINER for row in rows)
    scored = [row.score for row in rows if row.score is not None]
    assert scored
    assert all(0 <= s <= 1 for s in scored)
    best = rows[0].index
    assert "[[" in describe.top_contexts(firings, HOOKS[0], best)[0]


# --- Neuronpedia ----------------------------------------------------------------------------------


def _neuronpedia_row(index: int, **changed) -> dict:
    return {
        "modelId": "gemma-2-2b",
        "layer": "20-gemmascope-res-16k",
        "index": str(index),
        "description": f" about {index}",
        "explanationModelName": "gpt-4o-mini",
        "typeName": "oai_token-act-pair",
        "embedding": "[0.1]",
        **changed,
    }


def test_reads_neuronpedia_batches_in_order_with_their_explainers(tmp_path: Path) -> None:
    for batch in (10, 2):
        rows = [
            _neuronpedia_row(batch, explanationModelName=f"model-{batch}"),
            _neuronpedia_row(99, description=""),
        ]
        (tmp_path / f"batch-{batch}.jsonl.gz").write_bytes(
            gzip.compress("\n".join(map(json.dumps, rows)).encode())
        )
    rows = read_explanations(tmp_path)
    assert [row.index for row in rows] == [2, 10]
    assert rows[0] == Explanation("gemma-2-2b", "20-gemmascope-res-16k", 2, "about 2", "model-2")
    assert explainers(rows) == {"model-2": 1, "model-10": 1}


@pytest.mark.parametrize("where", ["memory://a", "ssh://host/a.jsonl", "zip://a.jsonl::https://b/c.zip"])
def test_other_schemes_are_not_opened(where: str) -> None:
    """A checkpoint from elsewhere may name where descriptions are."""
    with pytest.raises(ValueError, match=r"probe.descriptions=.*allowed are files, folders, and addresses"):
        read_explanations(where)


def test_reads_a_url_batch_by_batch(monkeypatch) -> None:
    import fsspec

    monkeypatch.setattr("lightning_limber.probe.explanations.SCHEMES", ("memory",))
    for batch in (0, 1):
        with fsspec.open(f"memory://np/explanations/batch-{batch}.jsonl.gz", "wb") as file:
            file.write(gzip.compress(json.dumps(_neuronpedia_row(batch)).encode()))
    assert [row.index for row in read_explanations("memory://np/explanations/")] == [0, 1]
    with pytest.raises(FileNotFoundError, match="neuronpedia_id"):
        read_explanations("memory://np/none")


def test_rows_survive_writing_and_a_broken_row_is_named(tmp_path: Path) -> None:
    rows = [
        Explanation("m", "3-res", 7, "on: rot", "x", 0.01, 0.9),
        Explanation("m", "3-res", 8, "b", "y"),
    ]
    write_explanations(rows, tmp_path / "a" / "batch-0.jsonl.gz")
    first = (tmp_path / "a" / "batch-0.jsonl.gz").read_bytes()
    assert read_explanations(tmp_path / "a") == rows
    write_explanations(rows, tmp_path / "a" / "batch-0.jsonl.gz")
    assert (tmp_path / "a" / "batch-0.jsonl.gz").read_bytes() == first
    (tmp_path / "b.jsonl").write_text('{"layer": "3", "index": 1}\n')
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: no description"):
        read_explanations(tmp_path / "b.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl"):
        read_explanations(tmp_path / "empty")


def test_neuronpedia_ids_come_from_saelens_registry() -> None:
    found = neuronpedia_id("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical")
    assert found == "gemma-2-2b/20-gemmascope-res-16k"
    with pytest.raises(ValueError, match="no release 'nope'"):
        neuronpedia_id("nope", "x")


# --- the command ------------------------------------------------------------------------------------


def test_commands_score_and_describe_a_release(release: Path, text: Path, tmp_path: Path, capsys) -> None:
    """`--suite`, the former name of `--release`, is understood too."""
    from lightning_limber.sae_training.__main__ import main

    copy = Path(shutil.copytree(release, tmp_path / "release"))
    common = [f"--text={text}", "--context_size=24", "--bf16=false", "--write=true"]
    main(["evaluate", f"--suite={copy}", "--saelens_tokens=0", *common])
    main(["describe", "--release", str(copy), "--show=1", *common])
    output = capsys.readouterr().out
    assert f"| {HOOKS[0]} |" in output
    assert re.search(r"latent \d+, density", output)
    for name, layer in json.loads((copy / "card.json").read_text())["layers"].items():
        assert set(layer["gate"]) == {"median_norm", "variance", "fvu", "l0", "version"}
        rows = read_explanations(copy / "descriptions" / name)
        assert layer["descriptions"]["described"] == len(rows) > 0
