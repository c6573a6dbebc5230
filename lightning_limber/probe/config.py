"""Settings of the probe: which SAEs, which metrics, how they are measured."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lightning_limber.probe.metrics import DEFAULT_METRICS, ProbeMetric, resolve_metrics
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
        metrics: Metrics beside reconstruction and sparsity, each of which costs its own time (printed
            after every probe): direction, noise, words_long, match, lens_hit, knn, detectors,
            use, loss_recovered, cross_layer by default; words and told besides. A class of your own is
            named by its path, or as {class_path: ..., init_args: {...}}.
        sanity_check: What to do when the SAEs do not behave on plain text as is known of them (see
            sanity_check.py): ``stop``, ``warn`` or ``off``.
        sae_memory_gb: Most memory that the SAEs' weights may take on the device, in 1e9 bytes; null keeps
            all there. With a number they wait in host memory, and a probe makes its passes once for each
            chunk of layers that fits: more time, the same numbers.
        intervention_images: Images for use, loss_recovered and cross_layer, which need many forwards.
        outlier_factor: Leave out tokens of more than this many times the median norm of plain text, beside
            those that point as attention sinks do; null leaves out the latter alone. The share of all that
            is left out is logged as ``outliers``.
        bootstrap_samples: Bootstrap samples over images, on which the intervals rest.
        descriptions: Folder or URL of each SAE's explanations in Neuronpedia's export format, with
            ``{layer}`` or ``{hook}`` in it; null takes those that ship with the SAEs.
        top_latents: Number of an image's latents whose descriptions `match` looks at.
        max_image_share: `match` leaves out latents that fire on a larger share of the images.
        max_text_density: `match` leaves out latents that fire on a larger share of text tokens.
        lens_top_k: Number of the logit lens' tokens that `lens_hit` looks at, at each image position.
        knn: Number of neighbours of `knn`.
        detector_auroc: AUROC from which a latent counts as a detector of an attribute.
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
        if self.bootstrap_samples < 1:
            raise ValueError(f"probe.bootstrap_samples={self.bootstrap_samples}: at least 1 is needed.")
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
        names = [other if isinstance(other, str) else other.get("class_path") for other in kept]
        if spec not in (kept if isinstance(spec, dict) else names):
            kept.append(spec)
    return kept


def in_present_form(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the probe's present names, and metrics of a user's own as {class_path: ...}.

    Flags with present names then win over a stored config with old ones, and classes are seen as such.
    """
    probe = config.get("probe")
    if not isinstance(probe, dict):
        return config
    old = {name: probe[name] for name in OLD_NAMES if probe.get(name) is not None}
    probe = {name: value for name, value in probe.items() if name not in OLD_NAMES}
    probe |= {OLD_NAMES[name]: value for name, value in old.items()}
    if isinstance(probe.get("metrics"), (list, tuple)):
        probe["metrics"] = [
            {"class_path": spec} if isinstance(spec, str) and "." in spec else spec
            for spec in probe["metrics"]
        ]
    return config | {"probe": probe}
