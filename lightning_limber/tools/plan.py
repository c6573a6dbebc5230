"""What a run will cost, before any weight is downloaded: parameters, FLOPs, memory, hours.

The training step is rehearsed on fake tensors (rehearsal.py); a probe is counted from its parts. GPUs are
known by their data sheets. Validation, loading and communication are not counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning_limber.models.limber import Limber
from lightning_limber.models.llm import LLM
from lightning_limber.models.saes import find_saes
from lightning_limber.probe.metrics.neighbours import MAX_LAYERS, MAX_TOKENS
from lightning_limber.tools.rehearsal import Rehearsal, Step, tensor_bytes

RESERVE = 0.1
"""Share of a GPU's memory left to the CUDA context, workspaces, fragmentation and the probe's batches."""


FILLS = frozenset(("noise", "words_long", "words", "told"))
"""Metrics of the probe that put something in the image's place."""


class GPU(NamedTuple):
    """Dense peaks (no sparsity) of NVIDIA's data sheets."""

    bf16_flops: float
    """FLOP/s of the tensor cores with float32 accumulation; float16 is the same."""
    fp32_flops: float
    """FLOP/s in float32 outside the tensor cores: torch's default."""
    memory_bytes: float


GPUS = {
    "H200": GPU(989e12, 67e12, 141e9),  # SXM
    "H100": GPU(989e12, 67e12, 80e9),  # SXM
    "A100": GPU(312e12, 19.5e12, 80e9),
    "A100-40GB": GPU(312e12, 19.5e12, 40e9),
    "L40S": GPU(362e12, 91.6e12, 48e9),
    "L4": GPU(121e12, 30.3e12, 24e9),
    "RTX4090": GPU(165e12, 82.6e12, 24e9),
}


# -- SAEs and the probe -----------------------------------------------------------------------------


class SAESize(NamedTuple):
    """One layer's SAE."""

    next_layer: int
    """The first layer of the LLM after the hook that it reads."""
    d_sae: int | None
    """Number of latents; None where neither a file nor a name tells."""


def sae_sizes(release: str, sae_id: str, layers: list[int] | None, llm: LLM) -> list[SAESize]:
    """Sizes of the SAEs of a config: from their ``cfg.json``, or from what a registry's names say.

    Args:
        release: See `find_saes`.
        sae_id: See `find_saes`.
        layers: See `find_saes`.
        llm: The LLM that they read, without weights.

    Raises:
        FileNotFoundError: see `find_saes`.
        ValueError: see `find_saes`; or they do not fit the LLM.
    """
    folder, ids = find_saes(release, sae_id, layers)
    pattern = re.compile(re.escape(sae_id).replace(re.escape("{layer}"), r"(\d+)"))
    sizes = []
    for name in ids:
        match = pattern.fullmatch(name)
        assert match is not None
        layer, d_in, hook = int(match[1]), llm.hidden_size, f"{release} {name}"
        d_sae = width_in_name(hook, d_in)
        if folder:
            config = json.loads((folder / name / "cfg.json").read_text(encoding="utf-8"))
            d_in, hook, d_sae = config["d_in"], config["metadata"]["hook_name"], config["d_sae"]
        if d_in != llm.hidden_size or layer >= len(llm.layers):
            raise ValueError(
                f"SAE {release} {name}, of width {d_in}, does not fit {llm.name}, which has "
                f"{len(llm.layers)} layers of width {llm.hidden_size}. Choose a release trained on this "
                "LLM, or switch the probe off with probe.every_n_epochs=0."
            )
        sizes.append(SAESize(layer + ("resid_pre" not in hook), d_sae))
    return sizes


def width_in_name(name: str, d_in: int) -> int | None:
    """``width_16k`` -> 16384, ``w80k`` -> 81920, ``width_1m`` -> 1048576, ``8x`` -> 8 d_in."""
    if match := re.search(r"(?:width_|-w|-)(\d+)k(?![a-z])", name):
        return -(-int(match[1]) * 1000 // 4096) * 4096
    if match := re.search(r"width_(\d+)m(?![a-z])", name):
        return int(match[1]) << 20
    if match := re.search(r"_(\d+)x(?![a-z])", name):
        return int(match[1]) * d_in
    return None


def probe_flops(
    rehearsal: Rehearsal,
    flops: dict[str, int],
    saes: list[SAESize],
    metrics: set[str],
    text_tokens: int = MAX_TOKENS,
) -> dict[str, float]:
    """FLOPs of a probe for each image: of all images, and on top of it of those of interventions.

    Follows `Probe._clean_pass` and `Probe._intervention_pass`. SAEs of unknown width count as nothing, and
    so do metrics of a user's own.

    Args:
        rehearsal: The model.
        flops: FLOPs of one image in training, see `Step`.
        saes: SAEs of the probed layers.
        metrics: Names of the metrics, see `ProbeConfig`.
        text_tokens: Tokens in the bank of `neighbours`; making it, once a run, is not counted.
    """
    llm, text = rehearsal.model.llm, rehearsal.text_flops()
    # The first position of a sequence and the first token of a caption are never counted.
    image = rehearsal.image_tokens - (rehearsal.prefix_tokens == 0)
    captions = rehearsal.captions_per_image * (rehearsal.caption_tokens - 1)
    decode, head = flops["LLM forward"], flops["head"] / 2  # No gradient here.
    all_saes = sum(4 * llm.hidden_size * (sae.d_sae or 0) for sae in saes)  # One token through all of them.
    fills = len(FILLS & metrics)
    clean = flops["vision forward"] + flops["adapter forward"] + decode + text
    clean += fills * rehearsal.opening_flops()
    clean += all_saes * (image * (1 + fills) + 2 * captions)
    clean += ("direction" in metrics) * all_saes * (image * (1 + fills) + captions)
    clean += ("lens_hit" in metrics) * len(saes) * image * 2 * llm.hidden_size * llm.vocab_size
    compared = text_tokens * min(len(saes), MAX_LAYERS)
    clean += ("neighbours" in metrics) * len(saes) * image * (1 + fills) * 2 * llm.hidden_size * compared
    intervened = 0.0
    if metrics & {"use", "loss_recovered", "cross_layer", "object_patches", "object_steer"}:
        # The encoder's features are kept from the first pass.
        intervened += flops["adapter forward"] + decode
    onward = sum(decode * (1 - sae.next_layer / len(llm.layers)) + head for sae in saes)
    if metrics & {"use", "loss_recovered", "object_patches"}:
        intervened += head
    if metrics & {"use", "loss_recovered"}:
        intervened += onward + flops["adapter forward"] + rehearsal.opening_flops()
    if "loss_recovered" in metrics:
        intervened += onward + all_saes * image
    intervened += ("object_patches" in metrics) * 2 * onward
    # The head's product is with a few of its rows.
    intervened += ("object_steer" in metrics) * 3 * (onward - len(saes) * head)
    if "cross_layer" in metrics:
        controls = "noise" in metrics
        intervened += len(saes) * all_saes * image * (1 + controls)
        intervened += controls * (flops["adapter forward"] + rehearsal.opening_flops())
    return {"every image": clean, "images of interventions": intervened}


# -- the plan ---------------------------------------------------------------------------------------


def make_plan(
    model: Limber,
    data: Any,
    probe: Any,
    trainer: Any,
    gpus: list[str],
    counts: list[int],
    utilisation: float,
    caption_tokens: int | None,
) -> str:
    """Plans a run and returns a table, one column for each number of GPUs of a kind.

    M, G, T are powers of 1000. Hours are of training alone.

    Args:
        model: Not loaded.
        data: The `CaptionData`; only its settings are read.
        probe: The `SAEProbe`.
        trainer: Settings of the Trainer.
        gpus: Names in `GPUS`.
        counts: Numbers of GPUs.
        utilisation: Share of the peak FLOP/s that the run reaches.
        caption_tokens: Mean tokens of a caption; None takes 32, or the model's maximum if lower.

    Raises:
        FileNotFoundError: see `Rehearsal`.
        ValueError: a setting is not allowed.
    """
    names = {name.lower(): name for name in GPUS}
    if unknown := [gpu for gpu in gpus if gpu.lower() not in names]:
        raise ValueError(f"--gpu {' '.join(unknown)}: known are {', '.join(GPUS)}.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation {utilisation}: it is a share of the GPU's peak, in (0, 1].")
    longest = model.hparams["max_caption_tokens"]
    caption_tokens = min(32, longest) if caption_tokens is None else caption_tokens
    if not 1 <= caption_tokens <= longest:
        raise ValueError(
            f"--caption_tokens {caption_tokens}: allowed are 1 to model.max_caption_tokens={longest}."
        )
    odd = [count for count in counts if count < 1 or data.batch_size % count]
    odd_text = ", ".join(map(str, odd))
    if len(odd) == len(counts):
        raise ValueError(f"--gpus {odd_text}: data.batch_size={data.batch_size} must divide by it.")
    rehearsal = Rehearsal(model, trainer.precision, caption_tokens, data.captions_per_image)
    one = rehearsal.step(1)
    steps = {count: rehearsal.step(data.batch_size // count) for count in counts if count not in odd}
    penalty = model.regularise_config
    of_penalty: list[SAESize] = []
    if penalty.weight and penalty.kind != "norm":
        of_penalty = sae_sizes(penalty.sae_release, penalty.sae_id, penalty.layers, model.llm)
        # Forward and backward, whose gradient is that of the tokens alone.
        of_token = sum(8 * model.llm.hidden_size * (sae.d_sae or 0) for sae in of_penalty)
        one.flops["SAEs of the penalty"] = rehearsal.image_tokens * of_token
    saes: list[SAESize] = []
    of_probe: dict[str, float] = {}
    if probe.every_n_epochs:
        config = probe.config
        saes = sae_sizes(config.sae_release, config.sae_id, config.layers, model.llm)
        metrics = {metric.name for metric in config.make_metrics()}
        of_probe = probe_flops(rehearsal, one.flops, saes, metrics)

    fleets = [(names[gpu.lower()], count) for gpu in gpus for count in steps]
    memory = [_memory(rehearsal, steps[count], count, saes, probe) for _, count in fleets]
    for parts in memory if of_penalty else ():
        parts["SAEs of the penalty"] = _sae_bytes(of_penalty, model.llm.hidden_size)
    whole = [sum(parts.values()) for parts in memory]
    capacity = [GPUS[gpu].memory_bytes for gpu, _ in fleets]
    peak = "fp32_flops" if rehearsal.dtype is None else "bf16_flops"
    speeds = [getattr(GPUS[gpu], peak) * utilisation * count for gpu, count in fleets]  # FLOP/s
    of_image = sum(one.flops.values())
    images = trainer.max_steps * data.batch_size * trainer.accumulate_grad_batches
    # Nothing else says how long a run is.
    times = [_time(images * of_image / speed) if images > 0 else "unknown" for speed in speeds]
    parameters, captions = rehearsal.parameters, rehearsal.captions_per_image
    prompt = rehearsal.prefix_tokens + rehearsal.text_tokens - captions * caption_tokens
    repeated = f"{captions} x " if captions > 1 else ""
    lines = [
        f"{model.hparams['vision']['name']} -> {type(model.adapter).__name__} -> {model.hparams['llm']}",
        f"{trainer.precision}, attention: {model.llm.model.config._attn_implementation}",
        f"a sequence: {rehearsal.image_tokens} image + {repeated}{caption_tokens} caption "
        f"(--caption_tokens) + {prompt} prompt tokens",
    ]
    if odd:
        lines.append(f"not on {odd_text} GPUs: data.batch_size={data.batch_size} must divide by it")
    lines += ["", "parameters"]
    lines.append(_row("vision encoder, frozen", [_number(parameters["vision"])]))
    lines.append(_row("LLM, frozen", [_number(parameters["llm"])]))
    lines.append(_row("adapter, trainable", [_number(parameters["adapter"])]))
    if saes:
        widths = Counter(sae.d_sae for sae in saes)
        cell = ", ".join(f"{n} x {d or 'unknown'} latents" for d, n in widths.items())
        lines.append(_row("SAEs, frozen", [cell]))
    lines += ["", "FLOPs per image"]
    lines += [_row(name, [_number(count)]) for name, count in one.flops.items()]
    lines.append(_row("training, all of it", [_number(of_image)]))
    lines += [_row(f"probe, {name}", [_number(count)]) for name, count in of_probe.items()]
    lines += ["", _row("memory per GPU", [f"{count} x {gpu}" for gpu, count in fleets])]
    lines += [_row(part, [_bytes(parts[part]) for parts in memory]) for part in memory[0]]
    lines.append(_row("all of it", map(_bytes, whole)))
    lines.append(_row("of", map(_bytes, capacity)))
    fits = [used <= (1 - RESERVE) * there for used, there in zip(whole, capacity, strict=True)]
    lines.append(_row(f"with {RESERVE:.0%} to spare", ["fits" if it else "does not fit" for it in fits]))
    lines += ["", f"time at {utilisation:.0%} of the peak"]
    lines.append(_row("images/s", [f"{speed / of_image:,.0f}" for speed in speeds]))
    name = f"training, {_number(images)} images" if images > 0 else "training"
    lines.append(_row(name, times))
    if of_probe:
        total = probe.num_images * of_probe["every image"]
        total += probe.intervention_images * of_probe["images of interventions"]
        lines.append(_row("one probe", [_time(total / speed) for speed in speeds]))
    lines += ["", _row("checkpoint", [_bytes(rehearsal.checkpoint_bytes())])]
    if any(sae.d_sae is None for sae in saes):
        lines.append("SAEs of unknown width are in no sum: neither a file nor their names tell it.")
    return "\n".join(lines)


def _memory(
    rehearsal: Rehearsal, step: Step, count: int, saes: list[SAESize], probe: Any
) -> dict[str, float]:
    """Bytes on each of `count` GPUs. Trained weights are float32: so are gradients and moments."""
    weights, model = rehearsal.weight_bytes(), rehearsal.model
    llm, d_in = float(weights["llm"]), model.llm.hidden_size
    adapter = tensor_bytes(list(rehearsal.parts["adapter"].parameters()))
    if count > 1 and model.hparams.get("shard_llm"):
        # A share of the decoder layers, and two of them whole: the one at work and the one fetched.
        layers = tensor_bytes(list(model.llm.layers.parameters()))
        llm += layers / count - layers + 2 * layers / len(model.llm.layers)
    # What the probe keeps of every image, group and layer: see `ImageStats`.
    groups = 3 + sum(name in probe.config.metrics for name in FILLS)
    sums = probe.num_images * groups * sum(8 * d_in + 2 * (sae.d_sae or 0) for sae in saes)
    return {
        "vision encoder": weights["vision"],
        "LLM": llm,
        "adapter": weights["adapter"],
        "gradients": adapter,
        "AdamW moments": 2 * adapter,
        "activations kept": step.kept_bytes,
        "head, logits": step.head_bytes,
        "temporaries": step.peak_bytes - step.kept_bytes - step.head_bytes,
        "SAEs": _sae_bytes(saes, d_in),
        "probe's sums": sums / count,
    }


def _sae_bytes(saes: list[SAESize], d_in: int) -> int:
    """Two matrices and two biases each, in float32."""
    return sum(4 * (2 * d_in * d + d_in + d) for sae in saes if (d := sae.d_sae))


def _row(name: str, cells: Iterable[str]) -> str:
    return f"  {name:32}" + "".join(f"{cell:>16}" for cell in cells)


def _time(seconds: float) -> str:
    """Three digits in the largest unit of which there are two."""
    for unit, scale in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "under 0.1 s"


def _number(value: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f}"


def _bytes(value: float) -> str:
    return f"{_number(value)}B" if value >= 1e3 else f"{value:.0f} B"
