"""The sanity check: do these SAEs, on this LLM as it is loaded here, behave on plain text as they should?

An SAE on the wrong layer, a hook that is off by one, a BOS that is missing or embeddings on another
scale spoil every number of the probe without a word. So before anything is trained, a few pages of
plain English (`plain_text.txt`, held-out documents of the shipped SAEs' corpus) go through the LLM and
the SAEs, and `fvu` and `l0` are held against what is known of each SAE:

    a release with a card    the same two numbers on the same text, written into the card when it was
                             scored (`python -m lightning_limber.sae_training evaluate --write true`)
    a SAELens release        the l0 that it publishes
    anything else            nothing is known but that an SAE must beat half of the variance

And each SAE must explain its own layer better than the layers before and behind it, which needs nothing
that is known.

The same pass measures the yardsticks of the probe at each layer: text's median norm, its variance
(`fvu_text`), and the direction of attention sinks (`counted`). Nothing of it changes from run to run, so it
is kept on disk (`measure_once`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_limber.assets import ASSETS
from lightning_limber.models import activations
from lightning_limber.models.frozen import fingerprint
from lightning_limber.models.llm import HOOK_NAME, LLM
from lightning_limber.probe.metrics.geometry import reconstruction_metrics
from lightning_limber.probe.screened_encoder import make_encoder
from lightning_limber.probe.token_stats import TokenStats
from lightning_limber.utils.cache import cache_dir, keep, read_kept

TEXT = ASSETS / "plain_text.txt"
CONTEXT_SIZE = 128
Policy = Literal["stop", "warn", "off"]

L0_RATIO_OWN, FVU_RATIO_OWN = 1.1, 1.015
"""Allowed against a card. On the shipped SAEs float32 in place of bf16 moves fvu by 0.23 % at most, a
missing BOS by 2 to 5 % from layer 3 on, and a layer off by one by 23 % at least."""
L0_RATIO_PUBLISHED = 3.0
"""Published l0 is of other text: Venhoff et al. (arXiv 2506.11976) read up to 2.4 times Gemma Scope's
canonical l0 on their text."""
FVU_UNKNOWN = 0.5
MEASUREMENT_VERSION = 2
"""Raise it when `measure` gives other numbers for the same input: what is on disk is then measured anew,
and the numbers of a card of before are not held against it."""
SINK_COSINE = 0.8
SINK_SHARE = 0.1
"""Where more of plain text than this points as the first position does, that direction tells no sinks."""


@dataclass(frozen=True)
class TextStats:
    """Plain text at one layer.

    Attributes:
        median_norm: Median of |x| over tokens, without the first of each sequence.
        variance: Mean of |x - mean|^2 over tokens that are counted.
        fvu: The SAE's unexplained variance on them.
        l0: The SAE's active latents per token.
        sink: [D] direction of attention sinks, of length 1; empty where it tells none.
        fvu_beside: The SAE's unexplained variance on the layers before and behind its own, by hook name.
    """

    median_norm: float
    variance: float
    fvu: float
    l0: float
    sink: list[float] = field(default_factory=list)
    fvu_beside: dict[str, float] = field(default_factory=dict)

    def for_card(self) -> dict[str, float]:
        """What a release's card keeps of it."""
        known = {name: getattr(self, name) for name in ("median_norm", "variance", "fvu", "l0")}
        return known | {"version": MEASUREMENT_VERSION}


def counted(x: Tensor, sink: Tensor | None, longest: float = math.inf) -> Tensor:
    """[n] which of the float32 tokens [n, D] count: false at attention sinks.

    A sink points where the LLM's first position does, whose residual stream hardly depends on the token
    there: its cosine to that direction is above `SINK_COSINE`. Length does not tell sinks: in early layers
    they are shorter than ten median norms, and tokens of a trained adapter are longer.

    Args:
        x: Tokens at one layer.
        sink: [D] direction of length 1; None: there are no sinks.
        longest: Leave out tokens of a larger norm too.
    """
    norm = x.norm(dim=-1)
    keep = norm <= longest
    # Not a matrix product, which autocast would round.
    return keep if sink is None else keep & ((x * sink).sum(-1) <= SINK_COSINE * norm)


@torch.no_grad()
def measure(
    llm: LLM,
    saes: dict[str, Any],
    prefix_ids: list[int],
    outlier_factor: float | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, TextStats]:
    """Runs the plain text through LLM and SAEs, by hook name.

    Args:
        llm: The loaded LLM.
        saes: SAEs by hook name.
        prefix_ids: What opens every sequence: BOS where the prompt has one.
        outlier_factor: Tokens with more than this many times the median norm are left out too.
        context: Makes the context of each forward (autocast).
    """
    device = llm.embedding.weight.device
    passages = _passages(llm, prefix_ids)
    batches = list(activations.batches(passages, batch_tokens=2048))
    beside = {name: _beside(name, len(llm.layers)) for name in saes}
    # Which SAEs look at each place.
    readers = {
        place: [name for name in saes if place == name or place in beside[name]]
        for place in sorted({*saes, *(place for names in beside.values() for place in names)})
    }
    sinks = _first_position(llm, passages, list(readers), context)
    # Two passes: what is counted must be known before anything is summed.
    norms: dict[str, list[Tensor]] = {place: [] for place in readers}
    parallel: dict[str, list[Tensor]] = {place: [] for place in readers}
    # Every process reads the whole text.
    sums = {
        (name, place): TokenStats(False, sync_on_compute=False).to(device)
        for place, names in readers.items()
        for name in names
    }
    encoders = {name: make_encoder(sae, device) for name, sae in saes.items()}
    limits: dict[str, float] = {}

    def read(place: str, index: Tensor, residual: Tensor) -> None:
        x = residual.flatten(0, 1).index_select(0, index).float()  # [n, D]
        if place not in limits:
            norms[place].append(x.norm(dim=-1))
            parallel[place].append(~counted(x, sinks[place]))
            return
        keep = counted(x, sinks[place], limits[place])
        row = torch.zeros(len(x), dtype=torch.long, device=device)
        for name in readers[place]:
            with torch.autocast(device.type, enabled=False):
                latents = encoders[name](x)
                reconstruction = saes[name].decode(latents)
            sums[name, place].update(x, reconstruction, latents, row, [0], keep)

    for _ in range(2):
        for ids, mask, _places in batches:
            mask[:, 0] = 0  # The first position is an attention sink in every LLM.
            index = mask.flatten().nonzero()[:, 0].to(device)
            with context(), llm.residual_hooks({place: partial(read, place, index) for place in readers}):
                llm.decode(llm.embed(ids.to(device)))
        medians = {place: float(torch.cat(found).median()) for place, found in norms.items()}
        limits = {place: median * (outlier_factor or math.inf) for place, median in medians.items()}
        for place, found in parallel.items():
            if torch.cat(found).double().mean() > SINK_SHARE:
                sinks[place] = None
    values = {
        key: {metric: float(value[0]) for metric, value in reconstruction_metrics(metric.compute()).items()}
        for key, metric in sums.items()
    }
    stats = {}
    for name in saes:
        own, sink = values[name, name], sinks[name]
        stats[name] = TextStats(
            *(medians[name], own["variance"], own["fvu"], own["l0"]),
            sink=[] if sink is None else sink.tolist(),
            fvu_beside={place: values[name, place]["fvu"] for place in beside[name]},
        )
    return stats


def _beside(name: str, layers: int) -> list[str]:
    """Hook names of the layers before and behind one, where they are."""
    match = HOOK_NAME.fullmatch(name)
    assert match is not None
    near = (int(match[1]) - 1, int(match[1]) + 1)
    return [f"blocks.{layer}.hook_resid_{match[2]}" for layer in near if 0 <= layer < layers]


def _first_position(
    llm: LLM,
    passages: list[activations.Context],
    places: list[str],
    context: Callable[[], AbstractContextManager],
) -> dict[str, Tensor | None]:
    """[D] mean direction of the first position at each place; it sees nothing but itself."""
    first = torch.tensor(sorted({passage[0] for passage in passages}))[:, None]
    found: dict[str, Tensor] = {}
    with context(), llm.residual_hooks({place: partial(found.__setitem__, place) for place in places}):
        llm.decode(llm.embed(first.to(llm.embedding.weight.device)))
    normalize = partial(torch.nn.functional.normalize, dim=-1)
    return {place: normalize(normalize(x[:, 0].float()).mean(0)) for place, x in found.items()}


def _passages(llm: LLM, prefix_ids: list[int]) -> list[activations.Context]:
    ids_of = partial(llm.tokenizer, add_special_tokens=False)
    return [
        activations.array("i", [*prefix_ids, *ids_of(line)["input_ids"]][:CONTEXT_SIZE])
        for line in TEXT.read_text().splitlines()
    ]


def measure_once(
    llm: LLM,
    saes: dict[str, Any],
    prefix_ids: list[int],
    outlier_factor: float | None,
    context: Callable[[], AbstractContextManager],
) -> dict[str, TextStats]:
    """`measure`, or what it found before for the same models, tokens, precision and code."""
    if llm.sharded:  # Its processes run forwards together: all of them or none.
        return measure(llm, saes, prefix_ids, outlier_factor, context)
    device = llm.embedding.weight.device.type
    with context():
        precision = str(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)
    key = [
        MEASUREMENT_VERSION,
        [importlib.metadata.version(name) for name in ("torch", "transformers", "sae-lens")],
        [passage.tolist() for passage in _passages(llm, prefix_ids)],
        [outlier_factor, device, precision],
        [fingerprint(llm), llm.model.config.to_json_string()],
        [[name, fingerprint(one), repr(one.cfg.to_dict())] for name, one in saes.items()],
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    path = cache_dir() / "sanity_check" / f"{digest}.json"
    if (kept := read_kept(path)) is not None:
        return {name: TextStats(**stats) for name, stats in json.loads(kept).items()}
    found = measure(llm, saes, prefix_ids, outlier_factor, context)
    keep(path, json.dumps({name: asdict(stats) for name, stats in found.items()}))
    return found


def expected(release: str, folder: Path | None, sae_ids: dict[str, str]) -> dict[str, dict[str, float]]:
    """What is known of each SAE: a release's card, or SAELens' registry; {} where nothing is.

    Args:
        release: As in `load_saes`.
        folder: The release's folder, or None for a release that SAELens knows by name.
        sae_ids: Id of each SAE by hook name.
    """
    if folder is not None:
        path = folder / "card.json"
        layers = json.loads(path.read_text())["layers"] if path.exists() else {}
        gates = {name: dict(layers.get(name, {}).get("gate", {})) for name in sae_ids}
        old = [name for name, gate in gates.items() if gate and gate.get("version") != MEASUREMENT_VERSION]
        if old:
            rank_zero_info(
                f"[warning] {path} was scored by another version, under another rule of what is counted: "
                "its l0 and fvu of plain text are not compared. To compare them, score it anew: python -m "
                "lightning_limber.sae_training evaluate --write true."
            )
        return {name: {} if name in old else gate for name, gate in gates.items()}
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    entry = get_pretrained_saes_directory()[release]
    known = {}
    for name, sae_id in sae_ids.items():
        # The registry's own number is 0 where nobody filled it in; Gemma Scope has it in the path.
        in_path = re.search(r"average_l0_(\d+)", entry.saes_map[sae_id])
        l0 = (entry.expected_l0 or {}).get(sae_id) or (float(in_path[1]) if in_path else 0)
        known[name] = {"published_l0": float(l0)} if l0 else {}
    return known


def complaints(measured: dict[str, TextStats], known: dict[str, dict[str, float]]) -> list[str]:
    """One line for each layer and number that is not as it should be."""
    lines = []
    for name, stats in measured.items():
        known_here = known[name]
        if "fvu" in known_here:
            fvu, l0 = known_here["fvu"], known_here["l0"]
            bounds = [
                ("fvu", stats.fvu, fvu / FVU_RATIO_OWN, fvu * FVU_RATIO_OWN, fvu),
                ("l0", stats.l0, l0 / L0_RATIO_OWN, l0 * L0_RATIO_OWN, l0),
            ]
        else:
            bounds = [("fvu", stats.fvu, 0.0, FVU_UNKNOWN, 0.0)]
            if published := known_here.get("published_l0"):
                ends = (published / L0_RATIO_PUBLISHED, published * L0_RATIO_PUBLISHED)
                bounds.append(("l0", stats.l0, *ends, published))
        for metric, value, low, high, wanted in bounds:
            if not low <= value <= high:
                source = "nothing is published" if not wanted else f"known: {wanted:.3g}"
                allowed = f"allowed {low:.3g} to {high:.3g} ({source})"
                lines.append(f"{name}: {metric} on plain text {value:.3g}, {allowed}")
        for place, fvu in stats.fvu_beside.items():
            if fvu < stats.fvu:
                lines.append(f"{name}: fvu {stats.fvu:.3g} there, and lower at {place}: {fvu:.3g}")
    return lines


def check(measured: dict[str, TextStats], known: dict[str, dict[str, float]], policy: Policy) -> None:
    """Stops, warns, or says nothing.

    Raises:
        ValueError: policy is ``stop`` and some number is not as it should be.
    """
    lines = complaints(measured, known)
    if not lines or policy == "off":
        return
    message = (
        "The sanity check: these SAEs do not behave on plain text as is known of them.\n  "
        + "\n  ".join(lines)
        + "\nLikely causes: SAEs of another layer or hook point, or of another model (base or instruct); "
        "a model.prompt without {bos} where the SAEs were trained with it; embeddings on another scale. "
        "Set probe.sanity_check to warn or off to go on all the same."
    )
    if policy == "stop":
        raise ValueError(message)
    print(f"[warning] {message}")
