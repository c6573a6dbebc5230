"""What a probe's sums say: metrics with their intervals, chance levels and words, as rows of a table.

The passes (probing.py) leave sums by image and nothing else; all that follows is arithmetic on them, on
the CPU, the same in every process.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_limber.models.llm import LLM
from lightning_limber.probe import concepts, words
from lightning_limber.probe.alignment import UNIONS, ImageSums, alignment, jaccard
from lightning_limber.probe.convergence import TOLERANCES, convergence_layer
from lightning_limber.probe.explanations import explainers, read_explanations
from lightning_limber.probe.sanity_check import TextStats
from lightning_limber.probe.statistics import interval, intervals, resamples

EXTRAS = ("noise", "match", "lens_hit", "knn", "detectors", "loss_recovered", "cross_layer")


class Row(NamedTuple):
    """One number of the tidy table. `layer` is None for numbers about all layers."""

    layer: int | None
    group: str
    metric: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ProbeConfig:
    """What is measured; see `SAEProbe` for each setting."""

    extras: tuple[str, ...] = EXTRAS
    outlier_factor: float = 10.0
    bootstrap_samples: int = 1000
    top_latents: int = 3
    max_image_share: float = 0.05
    max_text_density: float = 0.005
    lens_top_k: int = 5
    knn: int = 10
    detector_auroc: float = 0.8
    seed: int = 0


@dataclass
class Report:
    """What a probe found."""

    rows: list[Row] = field(default_factory=list)
    cross_layer: dict[str, list[list[float]]] = field(default_factory=dict)
    """``fvu`` and ``l0``: [layer of the tokens][layer of the SAE]."""
    detectors: list[tuple] = field(default_factory=list)
    """(layer, attribute, latent, auroc_image, text's latent, auroc_text, its auroc_image)"""
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Descriptions:
    """What is known of each latent of a layer's SAE: texts [K] ("" where none) and density [K]."""

    texts: list[str]
    density: Tensor

    @classmethod
    def read(cls, where: str, d_sae: int) -> Descriptions:
        """Explanations in Neuronpedia's export format; of several for a latent the first counts.

        Where two explainers described latents of one SAE, the message says so: their texts are not
        alike in what they can match.
        """
        rows = read_explanations(where)
        if len(names := explainers(rows)) > 1:
            rank_zero_info(f"[warning] {where}: descriptions by several explainers: {dict(names)}")
        texts, density = [""] * d_sae, torch.zeros(d_sae)
        for row in reversed(rows):
            texts[row.index] = row.description
            density[row.index] = row.density or 0.0
        return cls(texts, density)


class PatchMap(NamedTuple):
    """Where on an image a latent fires."""

    latent: int
    description: str
    activation: Tensor
    """[P], in the order of the image tokens."""


@dataclass
class PassSums:
    """What the passes leave, of all processes' images."""

    groups: dict[tuple[str, str], ImageSums]
    """By group and hook name."""
    truth: list[tuple[int, list[str], set[str] | None]]
    """(place in the held-out set, captions, attributes of the scene), in the order of places."""
    lens: dict[str, set[int]]
    """The logit lens' top tokens by hook name, as place * V + token id."""
    losses: list[tuple[int, list[float]]]
    """(place, [clean, then spliced and ablated of each layer]): summed over the image's targets."""
    cross: list[tuple[list[int], Tensor]]
    """(places, [layer of the tokens, layer of the SAE, 3]): squared errors, active latents, tokens."""


class Clock:
    """Adds up seconds by name. On CUDA the host's: work is queued, not waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


class Findings:
    """Makes a report of a probe's sums.

    Args:
        layers: Layer by hook name, in the order in which the residual stream passes them.
        text: Yardsticks of plain text by hook name, from the text gate.
        config: What is measured.
        descriptions: By hook name, for `match`; layers without any have no match.
        llm: Its tokenizer says what the logit lens saw.
        clock: Told what each metric takes.
    """

    def __init__(
        self,
        layers: dict[str, int],
        text: dict[str, TextStats],
        config: ProbeConfig,
        descriptions: dict[str, Descriptions],
        llm: LLM,
        clock: Clock,
    ) -> None:
        self.layers, self.text, self.config, self.descriptions = layers, text, config, descriptions
        self.llm, self.clock = llm, clock
        self.extras = set(config.extras)

    def report(self, sums: PassSums) -> Report:
        report = Report()
        self._geometry(report, sums.groups)
        self._meaning(report, sums.groups, sums.truth, sums.lens)
        self._costly(report, sums.groups, sums.losses, sums.cross)
        self._match_convergence(report)
        report.seconds = dict(self.clock.seconds)
        return report

    def _geometry(self, report: Report, sums: dict[tuple[str, str], ImageSums]) -> None:
        """Metrics of every group and layer with their intervals, and where image and text converge."""
        with self.clock("intervals"):
            images = len(next(iter(sums.values())).image)
            weights = resamples(images, self.config.bootstrap_samples, self.config.seed)
            values = {
                key: alignment(group, weights, self.text[key[1]].variance) for key, group in sums.items()
            }
            for (group, name), of_layer in values.items():
                layer, nan = self.layers[name], float("nan")
                shared = jaccard(sums[group, name].fires, sums["text", name].fires)
                for metric, numbers in zip(
                    of_layer, intervals(torch.stack(list(of_layer.values()))), strict=True
                ):
                    ends = (nan, nan) if metric in UNIONS else numbers[1:]
                    report.rows.append(Row(layer, group, metric, numbers[0], *ends))
                report.rows.append(Row(layer, group, "shared", float(shared), nan, nan))
            for metric, tolerance in TOLERANCES.items():
                if metric in of_layer:
                    curves = [
                        torch.stack([values[group, name][metric] for name in self.layers], dim=-1)
                        for group in ("image", "text")
                    ]
                    report.rows.append(self._convergence(metric, tolerance, *curves))

    def _convergence(self, metric: str, tolerance: float, image: Tensor, text: Tensor) -> Row:
        """Curves [1 + R, layers] -> the layer and its interval; infinite where they never meet."""
        layers = list(self.layers.values())
        found = [
            convergence_layer(layers, a, b, tolerance)
            for a, b in zip(image.tolist(), text.tolist(), strict=True)
        ]
        numbers = sorted(float("inf") if layer is None else float(layer) for layer in found[1:])
        count = len(numbers)
        ends = (
            [numbers[int(share * (count - 1))] for share in (0.025, 0.975)] if count else [float("nan")] * 2
        )
        value = float("inf") if found[0] is None else float(found[0])
        return Row(None, "image", f"convergence_layer/{metric}", value, *ends)

    def _meaning(
        self,
        report: Report,
        sums: dict[tuple[str, str], ImageSums],
        truth: list[tuple[int, list[str], set[str] | None]],
        lens: dict[str, set[int]],
    ) -> None:
        """`match`, `lens_hit`, `knn` and `detectors`, with their chance levels."""
        images, seed = len(truth), self.config.seed
        weights = resamples(images, self.config.bootstrap_samples, seed)
        pairs = concepts.pairings(images, self.config.bootstrap_samples, seed)
        vocabulary, captions = concepts.words_of(
            [
                sorted({word for text in texts for word in words.content_words(text)})
                for _, texts, _ in truth
            ]
        )
        has_noise = ("noise", next(iter(self.layers))) in sums
        seen = ("image", "text", *(["noise"] if has_noise else []))
        for name, layer in self.layers.items():

            def add(group: str, metric: str, found: concepts.Against, layer: int = layer) -> None:
                report.rows.append(Row(layer, group, metric, found.value, found.low, found.high))
                report.rows.append(
                    Row(layer, group, f"{metric}_chance", found.chance, found.chance_low, found.chance_high)
                )
                report.rows.append(Row(layer, group, f"{metric}_p", found.p, float("nan"), float("nan")))

            if "match" in self.extras and name in self.descriptions:
                with self.clock("match"):
                    known = self.descriptions[name]
                    agrees = torch.from_numpy(words.agreement(known.texts, vocabulary))  # [K, W]
                    for group in seen:
                        top = concepts.top_latents(
                            sums[group, name].strength,
                            known.density,
                            self.config.top_latents,
                            self.config.max_image_share,
                            self.config.max_text_density,
                        )
                        found = top.float() @ agrees.float() > 0  # [I, W]
                        hits = concepts.word_hits(found, captions)
                        add(group, "match", concepts.against_chance(hits, weights, pairs))
            if "lens_hit" in self.extras:
                with self.clock("lens_hit"):
                    found = self._lens_words(lens[name], vocabulary, [place for place, _, _ in truth])
                    hits = concepts.word_hits(found, captions)
                    add("image", "lens_hit", concepts.against_chance(hits, weights, pairs))
            if "knn" in self.extras:
                with self.clock("knn"):
                    for group in ("image", *(["noise"] if has_noise else [])):
                        add(group, "knn", self._knn(sums[group, name].means, sums["text", name].means))
        if "detectors" in self.extras and truth[0][2] is not None:
            with self.clock("detectors"):
                self._detectors(report, sums, [sorted(item[2] or ()) for item in truth], weights, pairs)

    def matching(
        self, hook: str, latents: Tensor, captions: list[list[str]], count: int = 3
    ) -> list[list[PatchMap]]:
        """For each image the strongest latents whose descriptions agree with a word of its captions.

        As in `match`, latents that fire on much of plain text are left out; those common to many images
        are not, as these may be too few to tell.

        Args:
            hook: The layer's hook name; it has descriptions.
            latents: [B, P, K].
            captions: Of each image.
            count: Most of them an image.
        """
        known = self.descriptions[hook]
        said = [{word for text in texts for word in words.content_words(text)} for texts in captions]
        vocabulary, table = concepts.words_of([sorted(found) for found in said])
        agrees = torch.from_numpy(words.agreement(known.texts, vocabulary))  # [K, W]
        allowed = (known.density <= self.config.max_text_density)[:, None] & agrees
        maps = []
        for of_image, has in zip(latents.float().cpu(), table, strict=True):  # [P, K], [W]
            strength = of_image.sum(0).masked_fill(~allowed[:, has].any(-1), 0)
            best = strength.topk(min(count, len(strength)))
            maps.append(
                [
                    PatchMap(latent, known.texts[latent], of_image[:, latent])
                    for latent, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                    if value > 0
                ]
            )
        return maps

    def _knn(self, image: Tensor, text: Tensor) -> concepts.Against:
        """Of images that have tokens left in both groups."""
        whole = ~(image.isnan().any(-1) | text.isnan().any(-1))
        images, seed = int(whole.sum()), self.config.seed
        if images < 3:
            return concepts.Against(*[float("nan")] * 7)
        weights = resamples(images, self.config.bootstrap_samples, seed)
        pairs = concepts.pairings(images, min(200, self.config.bootstrap_samples), seed)
        return concepts.mutual_knn(image[whole], text[whole], self.config.knn, weights, pairs)

    def _match_convergence(self, report: Report) -> None:
        curves = {
            group: [row.value for row in report.rows if (row.group, row.metric) == (group, "match")]
            for group in ("image", "text")
        }
        if len(curves["image"]) == len(self.layers):
            one = [torch.tensor([curve], dtype=torch.float64) for curve in curves.values()]
            report.rows.append(self._convergence("match", TOLERANCES["match"], *one))

    def _lens_words(self, codes: set[int], vocabulary: list[str], places: list[int]) -> Tensor:
        """Bool [I, W]: which words are among the logit lens' top tokens at some position of an image."""
        tokenizer, size = self.llm.tokenizer, self.llm.vocab_size
        if not hasattr(self, "_stem_of_token"):
            pieces = tokenizer.convert_ids_to_tokens(range(min(size, len(tokenizer))))
            texts = (tokenizer.convert_tokens_to_string([piece]).strip().lower() for piece in pieces)
            # Whole words only: a token that opens many words says none of them.
            self._stem_of_token = {
                i: words.stem(text) for i, text in enumerate(texts) if text.isalpha() and len(text) > 2
            }
        columns: dict[str, list[int]] = defaultdict(list)
        for i, word in enumerate(vocabulary):
            columns[words.stem(word)].append(i)
        row = {place: i for i, place in enumerate(places)}
        found = torch.zeros(len(places), len(vocabulary), dtype=torch.bool)
        for place, token in (divmod(code, size) for code in codes):
            found[row[place], columns.get(self._stem_of_token.get(token, ""), [])] = True
        return found

    def _detectors(
        self,
        report: Report,
        sums: dict[tuple[str, str], ImageSums],
        truth: list[list[str]],
        weights: Tensor,
        pairs: Tensor,
    ) -> None:
        names, table = concepts.words_of(truth)
        labels = table.T  # [A, I]
        half = concepts.halves(labels.shape[1])
        # Fewer than five images with it, or without, in a half: no AUROC worth the name.
        sides = torch.stack([side[:, part].sum(-1) for side in (labels, ~labels) for part in (half, ~half)])
        enough = (sides >= 5).all(0)
        names, labels = (
            [name for name, ok in zip(names, enough.tolist(), strict=True) if ok],
            labels[enough],
        )
        if not names:
            return
        bar = self.config.detector_auroc
        shuffled = labels[:, pairs[0]]  # One random pairing: a whole search each.
        one = weights[:1]
        for hook, layer in self.layers.items():
            image, text = (sums[group, hook].strength.float() for group in ("image", "text"))
            found = {
                "detectors/image": concepts.detectors(image, labels, weights),
                "detectors/text": concepts.detectors(text, labels, weights),
                "detectors_same/image": concepts.detectors(image, labels, weights, chosen_by=text),
                "detectors_chance/image": concepts.detectors(image, shuffled, one),
                "detectors_same_chance/image": concepts.detectors(image, shuffled, one, chosen_by=text),
            }
            for key, detection in found.items():
                metric, group = key.split("/")
                for suffix, value in (
                    ("", (detection.auroc >= bar).double().mean(-1)),
                    ("_auroc", detection.auroc.nanmean(-1)),
                ):
                    numbers = interval(value) if len(value) > 1 else (float(value[0]), *[float("nan")] * 2)
                    report.rows.append(Row(layer, group, metric + suffix, *numbers))
            by_image, by_text, same = (
                found[key] for key in ("detectors/image", "detectors/text", "detectors_same/image")
            )
            for i, name in enumerate(names):
                report.detectors.append(
                    (
                        layer,
                        name,
                        int(by_image.latent[i]),
                        float(by_image.auroc[0, i]),
                        int(same.latent[i]),
                        float(by_text.auroc[0, i]),
                        float(same.auroc[0, i]),
                    )
                )

    def _costly(
        self,
        report: Report,
        sums: dict[tuple[str, str], ImageSums],
        losses: list[tuple[int, list[float]]],
        cross: list[tuple[list[int], Tensor]],
    ) -> None:
        """`loss_recovered` and the cross-layer matrix."""
        if losses:
            table = torch.tensor([row for _, row in sorted(losses)], dtype=torch.float64)  # [I, 1 + 2 L]
            weights = resamples(len(table), self.config.bootstrap_samples, self.config.seed)
            clean, *others = (weights @ table).unbind(-1)
            for name, spliced, ablated in zip(self.layers, others[::2], others[1::2], strict=True):
                value = (ablated - spliced) / (ablated - clean)
                if interval(ablated - clean)[1] <= 0:
                    # The mean in place of image tokens does no certain harm: there is nothing to recover.
                    value = torch.full_like(value, torch.nan)
                report.rows.append(Row(self.layers[name], "image", "loss_recovered", *interval(value)))
        if cross:
            total = torch.stack([table for _, table in cross]).sum(0)  # [L, L, 3]
            chosen = {place for places, _ in cross for place in places}
            variance = []
            for name in self.layers:
                group = sums["image", name]
                weights = torch.tensor([[float(int(i) in chosen) for i in group.image]]).double()
                of = alignment(group, weights)
                variance.append(of["variance"] * of["tokens"])
            report.cross_layer = {
                "fvu": (total[..., 0] / torch.cat(variance)[:, None]).tolist(),
                "l0": (total[..., 1] / total[..., 2]).tolist(),
            }
