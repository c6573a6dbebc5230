"""Settings of the probe: which SAEs, which metrics, how they are measured."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lightning_limber.probe.metrics import DEFAULT_METRICS, REGISTRY, ProbeMetric, resolve_metrics
from lightning_limber.probe.sanity_check import Policy

OLD_NAMES = {"extras": "metrics", "costly_images": "intervention_images", "text_gate": "sanity_check"}
"""Settings that were renamed; configs and checkpoints with the old names still load."""


@dataclass
class ProbeConfig:
    """What the probe measures.

    Args:
        sae_release: A SAELens release, a folder of SAELens folders, or ``shipped:NAME``.
        sae_id: Id of each layer's SAE, with ``{layer}``.
        layers: Layers to probe; null takes every layer that has an SAE.
        metrics: Metrics beside reconstruction and sparsity, each of which costs its own time (logged as
            ``probe_seconds``): direction, noise, words_long, match, neighbours, lens_hit, knn, detectors,
            linear_probe, use, loss_recovered, cross_layer by default; words, told, object_patches and
            object_steer besides. A class of your own is named by its path, or as {class_path: ...,
            init_args: {...}}.
        sanity_check: What to do when the SAEs do not behave on plain text as is known of them (see
            sanity_check.py): ``stop``, ``warn`` or ``off``.
        sae_memory_gb: Most memory that the SAEs' weights may take on the device, in 1e9 bytes; null keeps
            all there. With a number they wait in host memory, and a probe makes its passes once for each
            chunk of layers that fits: more time, the same numbers.
        intervention_images: Images for use, loss_recovered, cross_layer, object_patches and object_steer,
            which need many forwards.
        outlier_factor: Leave out tokens of more than this many times the median norm of plain text, beside
            those that point as attention sinks do; null leaves out the latter alone. The share of all that
            is left out is logged as ``outliers``.
        text_tokens: What the group ``text`` is: ``caption``, the tokens that the group ``caption`` has
            too; or ``prompt``, all tokens of the sequence without an image but its first position (chat
            template and question included), as in the code of Venhoff et al. (arXiv 2506.11976).
        bootstrap_samples: Bootstrap samples over images, on which the intervals rest.
        descriptions: Folder or URL of each SAE's explanations in Neuronpedia's export format, with
            ``{layer}`` or ``{hook}`` in it; null takes those that ship with the SAEs.
        top_latents: Number of an image's latents whose descriptions `match` looks at.
        max_image_share: `match` leaves out latents that fire on a larger share of the images.
        max_text_density: `match` leaves out latents that fire on a larger share of text tokens.
        lens_top_k: Number of the logit lens' tokens that `lens_hit` looks at, at each image position.
        knn: Number of neighbours of `knn`.
        detector_auroc: AUROC from which a latent counts as a detector of an attribute, in the shares.
        seed: Seed of bootstrap and chance levels.
        extras: Old name of metrics.
        costly_images: Old name of intervention_images.
        text_gate: Old name of sanity_check.
    """

    sae_release: str = "shipped:smollm2-135m-instruct"
    sae_id: str = "blocks.{layer}.hook_resid_post"
    layers: list[int] | None = None
    metrics: list[str | dict[str, Any]] = field(default_factory=lambda: list(DEFAULT_METRICS))
    sanity_check: Policy = "stop"
    sae_memory_gb: float | None = None
    intervention_images: int = 64
    outlier_factor: float | None = None
    text_tokens: Literal["caption", "prompt"] = "caption"
    bootstrap_samples: int = 1000
    descriptions: str | None = None
    top_latents: int = 3
    max_image_share: float = 0.05
    max_text_density: float = 0.005
    lens_top_k: int = 5
    knn: int = 10
    detector_auroc: float = 0.8
    seed: int = 0
    extras: list[str | dict[str, Any]] | None = None
    costly_images: int | None = None
    text_gate: Policy | None = None

    def __post_init__(self) -> None:
        for old, new in OLD_NAMES.items():
            if (given := getattr(self, old)) is not None:
                setattr(self, new, given)
                setattr(self, old, None)
        self.metrics = _without_repeats(self.metrics)
        if self.text_tokens not in ("caption", "prompt"):
            raise ValueError(f"probe.text_tokens={self.text_tokens!r}: allowed are caption and prompt.")
        if self.bootstrap_samples < 1:
            raise ValueError(f"probe.bootstrap_samples={self.bootstrap_samples}: at least 1 is needed.")
        try:
            (self.descriptions or "").format(layer=0, hook="")
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"probe.descriptions={self.descriptions!r}: {{layer}} and {{hook}} are known, in braces "
                f"({type(error).__name__}: {error})."
            ) from error
        self.make_metrics()  # A wrong name is an error before anything is loaded.

    @classmethod
    def of(cls, settings: dict[str, Any]) -> ProbeConfig:
        """The settings among a run's ``probe`` section, whose others are the callback's."""
        known = {setting.name for setting in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in known})

    def make_metrics(self) -> list[ProbeMetric]:
        """New metrics, in the order in which they are computed."""
        return resolve_metrics(self.metrics)


def _without_repeats(metrics: list[str | dict[str, Any]]) -> list[str | dict[str, Any]]:
    """Leaves repeats out; a name alone stands for a metric of that name, whatever its settings.

    A command that starts from a checkpoint names a user's metric again, which must not add another.
    """
    kept: list[str | dict[str, Any]] = []
    for spec in metrics:
        named = spec in kept if isinstance(spec, dict) else _class_path(spec) in map(_class_path, kept)
        if not named:
            kept.append(spec)
    return kept


def _class_path(spec: str | dict[str, Any]) -> str | None:
    """Import path of the class that a metric's name or spec stands for."""
    path = spec if isinstance(spec, str) else spec.get("class_path")
    found = REGISTRY.get(path) if isinstance(path, str) else None
    return f"{found.__module__}.{found.__qualname__}" if found else path


def _with_path(spec: Any) -> Any:
    """{class_path: import path, ...} of a metric's spec; the name of a shipped one stays a name."""
    if isinstance(spec, dict) and "class_path" in spec:
        return spec | {"class_path": _class_path(spec)}
    return {"class_path": spec} if isinstance(spec, str) and "." in spec else spec


def in_present_form(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the probe's present names, and metrics with settings or of a user's own as
    {class_path: import path, ...}.

    Flags with present names then win over a stored config with old ones, and classes are seen as such.
    """
    probe = config.get("probe")
    if not isinstance(probe, dict):
        return config
    old = {name: probe[name] for name in OLD_NAMES if probe.get(name) is not None}
    probe = {name: value for name, value in probe.items() if name not in OLD_NAMES}
    probe |= {OLD_NAMES[name]: value for name, value in old.items()}
    if isinstance(probe.get("metrics"), (list, tuple)):
        probe["metrics"] = [_with_path(spec) for spec in probe["metrics"]]
    return config | {"probe": probe}
