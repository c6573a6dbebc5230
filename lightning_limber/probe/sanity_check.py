"""The sanity check: do these SAEs, on this LLM as it is loaded here, behave on plain text as they should?

An SAE on the wrong layer, a hook that is off by one, a BOS that is missing or embeddings on another
scale spoil every number of the probe without a word. So before anything is trained, a few pages of
plain English (`plain_text.txt`, held-out documents of the shipped SAEs' corpus) go through the LLM and
the SAEs, and `fvu` and `l0` are held against what is known of each SAE:

    a release with a card    the same two numbers on the same text, written into the card when it was
                             scored (`python -m lightning_limber.sae_training evaluate --write true`)
    a SAELens release        the l0 that it publishes
    anything else            nothing is known but that an SAE must beat half of the variance

The same pass measures the yardsticks of the probe: text's median norm (outliers) and variance
(`fvu_text`) at each layer. Nothing of it changes from run to run, so it is kept on disk (`measure_once`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_limber.assets import ASSETS
from lightning_limber.models import activations
from lightning_limber.models.frozen import fingerprint
from lightning_limber.models.llm import LLM
from lightning_limber.probe.metrics.geometry import reconstruction_metrics
from lightning_limber.probe.screened_encoder import make_encoder
from lightning_limber.probe.token_stats import TokenStats
from lightning_limber.utils.cache import cache_dir

TEXT = ASSETS / "plain_text.txt"
CONTEXT_SIZE = 128
Policy = Literal["stop", "warn", "off"]

L0_RATIO_OWN, FVU_RATIO_OWN = 1.1, 1.1
"""Allowed against a card. On the shipped SAEs bf16 moves both by less than a hundredth, a missing BOS
takes fvu up to 1.18 times its value (layer 3), and a layer off by one to at least 1.39 times."""
L0_RATIO_PUBLISHED = 3.0
"""Published l0 is of other text: Venhoff et al. (arXiv 2506.11976) read up to 2.4 times Gemma Scope's
canonical l0 on their text."""
FVU_UNKNOWN = 0.5
MEASUREMENT_VERSION = 1
"""Raise it when `measure` gives other numbers for the same input: what is on disk is then measured anew."""


@dataclass(frozen=True)
class TextStats:
    """Plain text at one layer.

    Attributes:
        median_norm: Median of |x| over tokens, without the first of each sequence.
        variance: Mean of |x - mean|^2 over tokens that are no outliers.
        fvu: The SAE's unexplained variance on them.
        l0: The SAE's active latents per token.
    """

    median_norm: float
    variance: float
    fvu: float
    l0: float


@torch.no_grad()
def measure(
    llm: LLM,
    saes: dict[str, Any],
    prefix_ids: list[int],
    outlier_factor: float = activations.SINK_FACTOR,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, TextStats]:
    """Runs the plain text through LLM and SAEs, by hook name.

    Args:
        llm: The loaded LLM.
        saes: SAEs by hook name.
        prefix_ids: What opens every sequence: BOS where the prompt has one.
        outlier_factor: Tokens with more than this many times the median norm are left out.
        context: Makes the context of each forward (autocast).
    """
    device = llm.embedding.weight.device
    batches = list(activations.batches(_passages(llm, prefix_ids), batch_tokens=2048))
    # Two passes: what an outlier is must be known before anything is summed.
    norms: dict[str, list[Tensor]] = {name: [] for name in saes}
    # Every process reads the whole text.
    sums = {name: TokenStats(False, sync_on_compute=False).to(device) for name in saes}
    encoders = {name: make_encoder(sae, device) for name, sae in saes.items()}
    limits: dict[str, float] = {}

    def read(name: str, index: Tensor, residual: Tensor) -> None:
        x = residual.flatten(0, 1).index_select(0, index).float()  # [n, D]
        norm = x.norm(dim=-1)
        if name not in limits:
            norms[name].append(norm)
            return
        with torch.autocast(device.type, enabled=False):
            latents = encoders[name](x)
            reconstruction = saes[name].decode(latents)
        row = torch.zeros(len(x), dtype=torch.long, device=device)
        sums[name].update(x, reconstruction, latents, row, [0], norm <= limits[name])

    for _ in range(2):
        for ids, mask, _places in batches:
            mask[:, 0] = 0  # The first position is an attention sink in every LLM.
            index = mask.flatten().nonzero()[:, 0].to(device)
            with context(), llm.residual_hooks({name: partial(read, name, index) for name in saes}):
                llm.decode(llm.embed(ids.to(device)))
        medians = {name: float(torch.cat(norms[name]).median()) for name in saes}
        limits = {name: outlier_factor * median for name, median in medians.items()}
    stats = {}
    for name, metric in sums.items():
        values = {key: float(value[0]) for key, value in reconstruction_metrics(metric.compute()).items()}
        stats[name] = TextStats(medians[name], values["variance"], values["fvu"], values["l0"])
    return stats


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
    outlier_factor: float,
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
    if path.is_file():
        return {name: TextStats(**stats) for name, stats in json.loads(path.read_text()).items()}
    found = measure(llm, saes, prefix_ids, outlier_factor, context)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps({name: asdict(stats) for name, stats in found.items()}))
    scratch.replace(path)  # Whole or not at all.
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
        return {name: dict(layers.get(name, {}).get("gate", {})) for name in sae_ids}
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
        of = known[name]
        if "fvu" in of:
            bounds = [
                ("fvu", stats.fvu, of["fvu"] / FVU_RATIO_OWN, of["fvu"] * FVU_RATIO_OWN, of["fvu"]),
                ("l0", stats.l0, of["l0"] / L0_RATIO_OWN, of["l0"] * L0_RATIO_OWN, of["l0"]),
            ]
        else:
            bounds = [("fvu", stats.fvu, 0.0, FVU_UNKNOWN, 0.0)]
            if l0 := of.get("published_l0"):
                bounds.append(("l0", stats.l0, l0 / L0_RATIO_PUBLISHED, l0 * L0_RATIO_PUBLISHED, l0))
        for metric, value, low, high, wanted in bounds:
            if not low <= value <= high:
                source = "nothing is published" if not wanted else f"known: {wanted:.3g}"
                allowed = f"allowed {low:.3g} to {high:.3g} ({source})"
                lines.append(f"{name}: {metric} on plain text {value:.3g}, {allowed}")
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
