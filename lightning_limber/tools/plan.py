"""What a run will cost, before any weight is downloaded: parameters, FLOPs, memory, hours.

The training step is rehearsed on fake tensors (rehearsal.py); a probe is counted from its parts. GPUs are
known by their data sheets. Validation, loading and communication are not counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from lightning_limber.models.limber import Limber
from lightning_limber.models.llm import LLM
from lightning_limber.probe.saes import find_saes
from lightning_limber.tools.rehearsal import Rehearsal, Step, tensor_bytes

RESERVE = 0.1
"""Share of a GPU's memory left to the CUDA context, workspaces, fragmentation and the probe's batches."""


@dataclass(frozen=True)
class GPU:
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


@dataclass(frozen=True)
class SAESize:
    """Of one layer's SAE."""

    next_layer: int
    """The first layer of the LLM after the place that it reads."""
    d_sae: int | None
    """None where neither a file nor a name tells."""


def sae_sizes(release: str, sae_id: str, layers: list[int] | None, llm: LLM) -> list[SAESize]:
    """Sizes of the SAEs of a config: from their ``cfg.json``, or from what a registry's names say.

    Args:
        release: See `find_saes`.
        sae_id: See `find_saes`.
        layers: See `find_saes`.
        llm: The one they read, on fake tensors.

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
        d_in, place = llm.hidden_size, f"{release} {name}"
        d_sae = width_in_name(place, d_in)
        if folder:
            config = json.loads((folder / name / "cfg.json").read_text(encoding="utf-8"))
            d_in, place, d_sae = config["d_in"], config["metadata"]["hook_name"], config["d_sae"]
        if d_in != llm.hidden_size or int(match[1]) >= len(llm.layers):
            raise ValueError(
                f"SAE {release} {name}, of width {d_in}, does not fit {llm.name}, which has "
                f"{len(llm.layers)} layers of width {llm.hidden_size}. Choose a release trained on this "
                "LLM, or switch the probe off with probe.every_n_epochs=0."
            )
        sizes.append(SAESize(int(match[1]) + ("resid_pre" not in place), d_sae))
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
    rehearsal: Rehearsal, flops: dict[str, int], saes: list[SAESize], extras: set[str]
) -> dict[str, float]:
    """FLOPs of a probe for each image: of all images, and on top of it of the costly ones.

    Follows `Probe._clean_pass` and `Probe._costly_pass`. SAEs of unknown width count as nothing.

    Args:
        rehearsal: The model.
        flops: Of one image in training, see `Step`.
        saes: Of the probed layers.
        extras: Metrics, see `SAEProbe`.
    """
    llm, text = rehearsal.model.llm, rehearsal.text_flops()
    # The first position of a sequence is never counted.
    image = rehearsal.image_tokens - (rehearsal.prefix_tokens == 0)
    captions = rehearsal.captions_per_image * rehearsal.caption_tokens
    embed = flops["vision forward"] + flops["adapter forward"]
    decode, head = flops["LLM forward"], flops["head"] / 2  # No gradient here.
    per_token = [4 * llm.hidden_size * (sae.d_sae or 0) for sae in saes]
    logits = 2 * llm.hidden_size * llm.vocab_size
    noise = "noise" in extras
    clean = embed + decode * (1 + noise) + text
    clean += sum(per_token) * (image * (1 + noise) + 2 * captions)
    clean += ("lens_hit" in extras) * len(saes) * image * logits
    costly = 0.0
    if extras & {"loss_recovered", "cross_layer"}:
        costly += embed + decode
    if "loss_recovered" in extras:
        onward = sum(decode * (1 - sae.next_layer / len(llm.layers)) + head for sae in saes)
        costly += head + 2 * onward
        costly += sum(per_token) * rehearsal.image_tokens
    if "cross_layer" in extras:
        costly += len(saes) * sum(per_token) * image
    return {"every image": clean, "costly images": costly}


# -- the plan ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fleet:
    """What a run costs on some number of GPUs of a kind."""

    gpu: str
    count: int
    memory: dict[str, float]
    """Bytes on each GPU, by part."""
    images_per_second: float
    hours: float | None
    """Training alone; None where neither steps nor images are known."""
    probe_minutes: float | None
    """One probe; None without one."""

    @property
    def fits(self) -> bool:
        return sum(self.memory.values()) <= (1 - RESERVE) * GPUS[self.gpu].memory_bytes


@dataclass(frozen=True)
class Plan:
    """Everything that `plan` says."""

    title: list[str]
    parameters: dict[str, int]
    saes: list[SAESize]
    flops: dict[str, int]
    """Of one image in training."""
    probe: dict[str, float]
    """Of one image in a probe; empty without one."""
    fleets: list[Fleet]
    images: int | None
    """Of the whole run."""
    checkpoint_bytes: int
    utilisation: float


def make_plan(
    model: Limber,
    data: Any,
    probe: Any,
    trainer: Any,
    gpus: list[str],
    counts: list[int],
    utilisation: float,
    caption_tokens: int | None,
) -> Plan:
    """Plans a run.

    Args:
        model: Not loaded.
        data: The `CaptionData`; nothing of it is read but its settings.
        probe: The `SAEProbe`.
        trainer: Settings of the Trainer.
        gpus: Names in `GPUS`.
        counts: Numbers of GPUs.
        utilisation: Share of the peak FLOP/s that the run reaches.
        caption_tokens: Mean tokens of a caption; None takes 32, or the model's maximum if lower.

    Raises:
        FileNotFoundError: see `Rehearsal`.
        ValueError: a setting that cannot be.
    """
    names = {name.lower(): name for name in GPUS}
    unknown = [gpu for gpu in gpus if gpu.lower() not in names]
    if unknown:
        raise ValueError(f"--gpu {' '.join(unknown)}: known are {', '.join(GPUS)}.")
    if not 0 < utilisation <= 1:
        raise ValueError(f"--utilisation {utilisation}: it is a share of the GPU's peak, in (0, 1].")
    longest = model.hparams["max_caption_tokens"]
    caption_tokens = min(32, longest) if caption_tokens is None else caption_tokens
    if not 1 <= caption_tokens <= longest:
        raise ValueError(
            f"--caption_tokens {caption_tokens}: allowed are 1 to model.max_caption_tokens={longest}."
        )
    odd = [str(count) for count in counts if count < 1 or data.batch_size % count]
    if len(odd) == len(counts):
        raise ValueError(f"--gpus {' '.join(odd)}: data.batch_size={data.batch_size} must divide by it.")
    counts = [count for count in counts if str(count) not in odd]
    rehearsal = Rehearsal(model, trainer.precision, caption_tokens, data.captions_per_image)
    one = rehearsal.step(1)
    steps = {count: rehearsal.step(data.batch_size // count) for count in counts}
    saes: list[SAESize] = []
    of_probe: dict[str, float] = {}
    if probe.every_n_epochs:
        saes = sae_sizes(probe.sae_release, probe.sae_id, probe.layers, model.llm)
        of_probe = probe_flops(rehearsal, one.flops, saes, set(probe.config.extras))
    images = trainer.max_steps * data.batch_size * trainer.accumulate_grad_batches
    fleets = []
    for gpu in (names[gpu.lower()] for gpu in gpus):
        for count in counts:
            peak = GPUS[gpu].fp32_flops if rehearsal.dtype is None else GPUS[gpu].bf16_flops
            speed = peak * utilisation * count
            rate = speed / sum(one.flops.values())
            memory = _memory(rehearsal, steps[count], count, saes, probe)
            whole_probe = 0.0
            if of_probe:
                whole_probe = probe.num_images * of_probe["every image"]
                whole_probe += probe.costly_images * of_probe["costly images"]
            fleets.append(
                Fleet(
                    gpu,
                    count,
                    memory,
                    rate,
                    images / rate / 3600 if images > 0 else None,
                    whole_probe / speed / 60 if of_probe else None,
                )
            )
    hparams, adapter = model.hparams, type(model.adapter).__name__
    prompt = rehearsal.prefix_tokens + rehearsal.text_tokens - caption_tokens
    title = [
        f"{hparams['vision']['name']} -> {adapter} -> {hparams['llm']}",
        f"{trainer.precision}, attention: {model.llm.model.config._attn_implementation}",
        f"a sequence: {rehearsal.image_tokens} image + {caption_tokens} caption (--caption_tokens) + "
        f"{prompt} prompt tokens; {rehearsal.captions_per_image} to an image",
    ]
    if odd:
        title.append(f"not on {', '.join(odd)} GPUs: data.batch_size={data.batch_size} must divide by it")
    return Plan(
        title,
        rehearsal.parameters,
        saes,
        one.flops,
        of_probe,
        fleets,
        images if images > 0 else None,
        rehearsal.checkpoint_bytes(),
        utilisation,
    )


def _memory(
    rehearsal: Rehearsal, step: Step, count: int, saes: list[SAESize], probe: Any
) -> dict[str, float]:
    """Bytes on each of `count` GPUs. Trained weights are float32: so are gradients and moments."""
    weights = rehearsal.weight_bytes()
    llm, adapter = float(weights["llm"]), tensor_bytes(list(rehearsal.model.adapter.parameters()))
    if count > 1 and rehearsal.model.hparams.get("shard_llm"):
        # A share of the decoder layers, and two of them whole: the one at work and the one fetched.
        layers = tensor_bytes(list(rehearsal.model.llm.layers.parameters()))
        llm += layers / count - layers + 2 * layers / len(rehearsal.model.llm.layers)
    d_in = rehearsal.model.llm.hidden_size
    return {
        "vision encoder": weights["vision"],
        "LLM": llm,
        "adapter": weights["adapter"],
        "gradients": adapter,
        "AdamW moments": 2 * adapter,
        "activations kept": step.kept_bytes,
        "head, logits": step.head_bytes,
        "temporaries": step.peak_bytes - step.kept_bytes - step.head_bytes,
        "SAEs": sum(4 * sae_parameters(sae, d_in) for sae in saes),
        "probe's sums": _sum_bytes(saes, d_in, probe) / count,
    }


def sae_parameters(sae: SAESize, d_in: int) -> int:
    """Two matrices and two biases."""
    return 2 * d_in * sae.d_sae + d_in + sae.d_sae if sae.d_sae else 0


def _sum_bytes(saes: list[SAESize], d_in: int, probe: Any) -> int:
    """What the probe keeps of every image, group and layer: see metrics.py."""
    groups = 3 + ("noise" in probe.config.extras)
    return probe.num_images * groups * sum(8 * d_in + 2 * (sae.d_sae or 0) for sae in saes)


def table(plan: Plan) -> str:
    """The plan, to be read. M, G, T are powers of 1000."""
    parameters = {
        ("vision encoder", "frozen"): plan.parameters["vision"],
        ("LLM", "frozen"): plan.parameters["llm"],
        ("adapter", "trainable"): plan.parameters["adapter"],
    }
    lines = [*plan.title, "", "parameters"]
    lines += [_row(f"{part}, {how}", [_number(count)]) for (part, how), count in parameters.items()]
    if plan.saes:
        widths = Counter(sae.d_sae for sae in plan.saes)
        lines.append(
            _row("SAEs, frozen", [", ".join(f"{n} x {d or 'unknown'} latents" for d, n in widths.items())])
        )
    lines += ["", "FLOPs per image"]
    lines += [_row(name, [_number(count)]) for name, count in plan.flops.items()]
    lines.append(_row("training, all of it", [_number(sum(plan.flops.values()))]))
    lines += [_row(f"probe, {name}", [_number(count)]) for name, count in plan.probe.items()]
    fleets = plan.fleets
    lines += ["", _row("memory per GPU", [f"{fleet.count} x {fleet.gpu}" for fleet in fleets])]
    for part in fleets[0].memory:
        lines.append(_row(part, [_bytes_of(fleet.memory[part]) for fleet in fleets]))
    lines.append(_row("all of it", [_bytes_of(sum(fleet.memory.values())) for fleet in fleets]))
    lines.append(_row("of", [_bytes_of(GPUS[fleet.gpu].memory_bytes) for fleet in fleets]))
    lines.append(
        _row(f"with {RESERVE:.0%} to spare", ["fits" if f.fits else "does not fit" for f in fleets])
    )
    images = "" if plan.images is None else f", {_number(plan.images)} images"
    lines += ["", f"time at {plan.utilisation:.0%} of the peak"]
    lines.append(_row("images/s", [f"{fleet.images_per_second:,.0f}" for fleet in fleets]))
    hours = ["unknown" if fleet.hours is None else f"{fleet.hours:.3g} h" for fleet in fleets]
    lines.append(_row(f"training{images}", hours))
    if plan.probe:
        lines.append(_row("one probe", [f"{fleet.probe_minutes:.3g} min" for fleet in fleets]))
    lines += ["", _row("checkpoint", [_bytes_of(plan.checkpoint_bytes)])]
    if any(sae.d_sae is None for sae in plan.saes):
        lines.append("SAEs of unknown width are in no sum: neither a file nor their names tell it.")
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"  {name:32}" + "".join(f"{cell:>16}" for cell in cells)


def _number(value: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f}"


def _bytes_of(value: float) -> str:
    return f"{_number(value)}B" if value >= 1e3 else f"{value:.0f} B"
