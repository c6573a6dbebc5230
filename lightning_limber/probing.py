"""What one probe measures: passes over held-out images, and the rows of numbers that come out.

Pass 1, all images: one forward with the image, one of the same captions alone, one with noise in the
image's place. At every probed layer a hook runs the SAE and adds to sums by image (metrics.py); no
activation outlives its batch. Pass 2, `costly_images` of them: one more forward whose residual streams
are kept for the length of a batch, and forwards that go on from each layer with something replaced.
Everything after that (intervals, chance levels, words) is arithmetic on sums, on the CPU.

Groups of tokens:

    image    image positions                        caption  caption positions behind the image
    text     the same captions, without an image    noise    image positions, filled with Gaussian
                                                             noise of the image tokens' norms

Never counted: the first position of a sequence (an attention sink in every LLM), and tokens whose norm
at a layer is more than `outlier_factor` times the median of plain text there (sinks that form
elsewhere). Their share is the metric ``outliers``.
"""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_limber import concepts, words
from lightning_limber.convergence import TOLERANCES, convergence_layer
from lightning_limber.gate import TextStats
from lightning_limber.metrics import (
    UNIONS,
    ImageSums,
    SAEAlignment,
    alignment,
    interval,
    jaccard,
    resamples,
)
from lightning_limber.model import Limber, Sequences
from lightning_limber.prompt import Batch
from lightning_limber.sae import hook_layer
from lightning_limber.suite.explanations import explainers, read_explanations

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


class Probe:
    """One set of SAEs on one LLM; `run` measures whatever adapter the model has at that moment.

    Args:
        model: With its LLM loaded.
        saes: By hook name, on the model's device.
        text: Yardsticks of plain text by hook name, from the text gate.
        config: What is measured.
        descriptions: By hook name, for `match`; layers without any have no match.
        context: Makes the context of each forward (autocast).
        gather: Makes of a process' list the list of all processes' items, in any order.
    """

    def __init__(
        self,
        model: Limber,
        saes: dict[str, Any],
        text: dict[str, TextStats],
        config: ProbeConfig,
        descriptions: dict[str, Descriptions] | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
        gather: Callable[[list], list] = lambda items: items,
    ) -> None:
        self.model, self.text, self.config = model, text, config
        # In the order in which the residual stream passes them.
        self.saes = dict(sorted(saes.items(), key=lambda item: (_next_layer(item[0]), item[0])))
        self.descriptions = descriptions or {}
        self.context, self.gather = context, gather
        self.extras = set(config.extras)
        self.layers = {name: hook_layer(name) for name in self.saes}
        self.seconds: dict[str, float] = defaultdict(float)

    @torch.no_grad()
    def run(
        self,
        batches: Iterable[Batch],
        costly_batches: Iterable[Batch] = (),
        attributes: Callable[[Any], set[str] | None] = lambda scene: None,
    ) -> Report:
        """Measures everything.

        Args:
            batches: Held-out images, on the model's device, this process' share.
            costly_batches: The first of them again, for the costly metrics; may be empty.
            attributes: Truth of a scene in words, for the detectors.
        """
        self.seconds.clear()
        training = self.model.training
        self.model.eval()
        groups = ["image", "caption", "text", *(["noise"] if "noise" in self.extras else [])]
        metrics = {
            (group, name): SAEAlignment().to(self.model.device) for group in groups for name in self.saes
        }
        lens: dict[str, list[Tensor]] = {name: [] for name in self.saes}
        truth: list[tuple[int, list[str], set[str] | None]] = []
        for batch in batches:
            self._clean_pass(batch, metrics, lens)
            truth += [
                (place, captions, attributes(scene))
                for place, captions, scene in zip(batch.index, batch.captions, batch.scenes, strict=True)
            ]
        # One by one: the parts that a metric was given are let go when its whole is made.
        sums = {key: metrics.pop(key).compute() for key in list(metrics)}
        report = Report()
        pooled: dict[str, list] = {"loss": [], "cross": []}
        for batch in costly_batches:
            self._costly_pass(batch, sums, pooled)
        self.model.train(training)
        truth = sorted(self.gather(truth), key=lambda item: item[0])
        self._geometry(report, sums)
        self._meaning(report, sums, truth, lens)
        self._costly(report, sums, self.gather(pooled["loss"]), self.gather(pooled["cross"]))
        self._match_convergence(report)
        report.seconds = dict(self.seconds)
        return report

    # -- passes -----------------------------------------------------------------------------------

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        """Adds to the seconds of one metric. On CUDA the host's: work is queued, not waited for."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def _clean_pass(
        self,
        batch: Batch,
        metrics: dict[tuple[str, str], SAEAlignment],
        lens: dict[str, list[Tensor]],
    ) -> None:
        start, hooks = time.perf_counter(), sum(self.seconds.values())
        with self.context():
            tokens = self.model.image_tokens(batch.pixel_values)
            sequences = self.model.sequences(batch, tokens)
            self._forward(batch, sequences, {"image": "image", "caption": "caption"}, metrics, lens)
            self._forward(batch, self.model.sequences(batch, None), {"text": "caption"}, metrics)
            if "noise" in self.extras:
                with self._clock("noise"):
                    noise = self.model.sequences(batch, gaussian_like(tokens, batch.ids))
                    before = self.seconds["sae"]
                    self._forward(batch, noise, {"noise": "image"}, metrics)
                self.seconds["noise"] -= self.seconds["sae"] - before
        spent = sum(self.seconds.values()) - hooks
        self.seconds["forward"] += time.perf_counter() - start - spent

    def _forward(
        self,
        batch: Batch,
        sequences: Sequences,
        groups: dict[str, str],
        metrics: dict[tuple[str, str], SAEAlignment],
        lens: dict[str, list[Tensor]] | None = None,
    ) -> None:
        """One forward of the LLM that feeds the metrics of all layers."""
        indices = {group: self._index(batch, sequences, where) for group, where in groups.items()}

        def read(name: str, residual: Tensor) -> None:
            with self._clock("sae"):
                for group, (index, row) in indices.items():
                    x = residual.flatten(0, 1).index_select(0, index).float()  # [n, D_l]
                    latents, reconstruction = self._sae(name, x)
                    keep = self._keep(name, x)
                    metrics[group, name].update(x, reconstruction, latents, row, batch.index, keep)
            if lens is not None and "lens_hit" in self.extras:
                with self._clock("lens_hit"):
                    index, row = indices["image"]
                    x = residual.flatten(0, 1).index_select(0, index)  # [n, D_l]
                    self._lens(name, x, row, batch, lens[name])

        with self.model.llm.residual_hooks({name: partial(read, name) for name in self.saes}):
            self.model.llm.decode(sequences.embeds)

    def _index(self, batch: Batch, sequences: Sequences, where: str) -> tuple[Tensor, Tensor]:
        """Flat positions [n] of a group's tokens in [N * S], and the image [n] that each belongs to."""
        mask = sequences.groups[where]
        if where == "image":
            # An image with several captions stands in several sequences: it counts once.
            first = torch.ones_like(batch.image_index, dtype=torch.bool)
            first[1:] = batch.image_index[1:] != batch.image_index[:-1]
            mask = mask & first[:, None]
        index = mask.flatten().nonzero()[:, 0]
        return index, batch.image_index[index // mask.shape[1]]

    def _sae(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [n, K] and reconstruction [n, D_l] of float32 tokens."""
        with torch.autocast(x.device.type, enabled=False):
            latents = self.saes[name].encode(x)
            return latents, self.saes[name].decode(latents)

    def _keep(self, name: str, x: Tensor) -> Tensor:
        """Which of the tokens [n, D_l] are no outliers."""
        return x.norm(dim=-1) <= self.config.outlier_factor * self.text[name].median_norm

    def _lens(self, name: str, x: Tensor, row: Tensor, batch: Batch, lens: list[Tensor]) -> None:
        """Keeps the logit lens' top tokens at image positions, as image * V + token id."""
        llm = self.model.llm
        hidden = llm.decode(x[None], first_layer=len(llm.layers))[0]  # final norm alone
        top = llm.logits(hidden).topk(self.config.lens_top_k, dim=-1).indices  # [n, k]
        place = torch.tensor(batch.index, device=x.device)[row]
        code = place[:, None] * llm.vocab_size + top
        lens.append(code[self._keep(name, x.float())].unique())

    def _costly_pass(
        self, batch: Batch, sums: dict[tuple[str, str], ImageSums], pooled: dict[str, list]
    ) -> None:
        """Forwards that go on from each layer with something replaced, and SAEs of other layers."""
        model, llm = self.model, self.model.llm
        with self.context():
            sequences = model.sequences(batch, model.image_tokens(batch.pixel_values))
            index, _ = self._index(batch, sequences, "image")
            every = sequences.groups["image"].flatten().nonzero()[:, 0]
            kept: dict[str, Tensor] = {}
            with llm.residual_hooks({name: partial(kept.__setitem__, name) for name in self.saes}):
                hidden = llm.decode(sequences.embeds)
            if "loss_recovered" in self.extras:
                with self._clock("loss_recovered"):
                    losses = [self._losses(batch, sequences, hidden)]
                    for name in self.saes:
                        residual = kept[name]
                        x = residual.flatten(0, 1).index_select(0, every)
                        counted = self._keep(name, x.float())
                        where, x = every[counted], x[counted]
                        mean = _mean(sums["image", name]).to(x)
                        for new in (self._sae(name, x.float())[1].to(x), mean.expand_as(x)):
                            spliced = residual.flatten(0, 1).index_copy(0, where, new).view_as(residual)
                            onward = llm.decode(spliced, first_layer=_next_layer(name))
                            losses.append(self._losses(batch, sequences, onward))
                    pooled["loss"] += zip(
                        batch.index, torch.stack(losses, dim=-1).cpu().tolist(), strict=True
                    )
            if "cross_layer" in self.extras:
                with self._clock("cross_layer"):
                    pooled["cross"].append((batch.index, self._cross(kept, index).cpu()))

    def _losses(self, batch: Batch, sequences: Sequences, hidden: Tensor) -> Tensor:
        """Cross-entropy summed over each image's targets, [B] float64."""
        losses, _ = self.model.token_losses(batch, sequences.text_start, hidden)
        row = batch.image_index[batch.target_index[:, 0]]
        return losses.new_zeros(len(batch.ids), dtype=torch.float64).index_add_(0, row, losses.double())

    def _cross(self, kept: dict[str, Tensor], index: Tensor) -> Tensor:
        """Tokens of each layer through the SAE of each: sums [L, L, 3] of squared errors, active latents
        and tokens.
        """
        table = torch.zeros(len(kept), len(kept), 3, dtype=torch.float64, device=index.device)
        for i, name in enumerate(self.saes):
            x = kept[name].flatten(0, 1).index_select(0, index).float()
            x = x[self._keep(name, x)]
            for j, other in enumerate(self.saes):
                latents, reconstruction = self._sae(other, x)
                table[i, j, 0] = (x - reconstruction).double().pow(2).sum()
                table[i, j, 1] = (latents > 0).sum()
                table[i, j, 2] = len(x)
        return table

    # -- arithmetic -------------------------------------------------------------------------------

    def _geometry(self, report: Report, sums: dict[tuple[str, str], ImageSums]) -> None:
        """Metrics of every group and layer with their intervals, and where image and text converge."""
        with self._clock("intervals"):
            images = len(next(iter(sums.values())).image)
            weights = resamples(images, self.config.bootstrap_samples, self.config.seed)
            values = {
                key: alignment(group, weights, self.text[key[1]].variance) for key, group in sums.items()
            }
            for (group, name), of_layer in values.items():
                layer, nan = self.layers[name], float("nan")
                shared = jaccard(sums[group, name].fires, sums["text", name].fires)
                for metric, value in of_layer.items():
                    numbers = (float(value[0]), nan, nan) if metric in UNIONS else interval(value)
                    report.rows.append(Row(layer, group, metric, *numbers))
                report.rows.append(Row(layer, group, "shared", float(shared), nan, nan))
            for metric, tolerance in TOLERANCES.items():
                if metric in of_layer:
                    curves = [
                        torch.stack([values[group, name][metric] for name in self.saes], dim=-1)
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
        lens: dict[str, list[Tensor]],
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
        has_noise = ("noise", next(iter(self.saes))) in sums
        seen = ("image", "text", *(["noise"] if has_noise else []))
        for name, layer in self.layers.items():

            def add(group: str, metric: str, found: concepts.Against, layer: int = layer) -> None:
                report.rows.append(Row(layer, group, metric, found.value, found.low, found.high))
                report.rows.append(
                    Row(layer, group, f"{metric}_chance", found.chance, found.chance_low, found.chance_high)
                )
                report.rows.append(Row(layer, group, f"{metric}_p", found.p, float("nan"), float("nan")))

            if "match" in self.extras and name in self.descriptions:
                with self._clock("match"):
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
                with self._clock("lens_hit"):
                    codes = set(self.gather(torch.cat(lens[name]).tolist()))
                    found = self._lens_words(codes, vocabulary, [place for place, _, _ in truth])
                    hits = concepts.word_hits(found, captions)
                    add("image", "lens_hit", concepts.against_chance(hits, weights, pairs))
            if "knn" in self.extras:
                with self._clock("knn"):
                    for group in ("image", *(["noise"] if has_noise else [])):
                        add(group, "knn", self._knn(sums[group, name].means, sums["text", name].means))
        if "detectors" in self.extras and truth[0][2] is not None:
            with self._clock("detectors"):
                self._detectors(report, sums, [sorted(item[2] or ()) for item in truth], weights, pairs)

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
        tokenizer, size = self.model.llm.tokenizer, self.model.llm.vocab_size
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
            for name, spliced, ablated in zip(self.saes, others[::2], others[1::2], strict=True):
                value = (ablated - spliced) / (ablated - clean)
                if interval(ablated - clean)[1] <= 0:
                    # The mean in place of image tokens does no certain harm: there is nothing to recover.
                    value = torch.full_like(value, torch.nan)
                report.rows.append(Row(self.layers[name], "image", "loss_recovered", *interval(value)))
        if cross:
            total = torch.stack([table for _, table in cross]).sum(0)  # [L, L, 3]
            chosen = {place for places, _ in cross for place in places}
            variance = []
            for name in self.saes:
                group = sums["image", name]
                weights = torch.tensor([[float(int(i) in chosen) for i in group.image]]).double()
                of = alignment(group, weights)
                variance.append(of["variance"] * of["tokens"])
            report.cross_layer = {
                "fvu": (total[..., 0] / torch.cat(variance)[:, None]).tolist(),
                "l0": (total[..., 1] / total[..., 2]).tolist(),
            }


def _mean(group: ImageSums) -> Tensor:
    """[D] mean over all tokens of all images."""
    return group.total.sum(0) / group.sums[:, 0].sum()


def _next_layer(hook_name: str) -> int:
    """The layer that the residual stream at this hook enters."""
    return hook_layer(hook_name) + hook_name.endswith("post")


def gaussian_like(tokens: Tensor, ids: list[str]) -> Tensor:
    """Gaussian directions with the norms of `tokens` [B, P, D_l]; an image's are a function of its name."""
    noise = []
    for name in ids:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise.append(torch.randn(tokens.shape[1:], generator=generator))
    directions = torch.stack(noise).to(tokens)
    return directions * (tokens.norm(dim=-1, keepdim=True) / directions.norm(dim=-1, keepdim=True))
