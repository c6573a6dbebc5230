"""From a config to a probe that is ready to run: SAEs, sanity check on plain text, descriptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lightning_limber.models.limber import Limber
from lightning_limber.models.saes import chunks_on_device, hook_layer, load_saes, release_folder
from lightning_limber.probe import sanity_check
from lightning_limber.probe.config import ProbeConfig
from lightning_limber.probe.explanations import Descriptions
from lightning_limber.probe.metrics.match import Match
from lightning_limber.probe.passes import Probe

MATCH_SETTINGS = ("top_latents", "max_image_share", "max_text_density")


def build_probe(
    model: Limber,
    config: ProbeConfig,
    context: Callable[[], AbstractContextManager] = nullcontext,
    gather: Callable[[list], list] = lambda items: items,
    texts: Callable[[], Iterable[str]] = tuple,
) -> Probe:
    """Loads the SAEs, checks them on plain text, and reads the descriptions of their latents.

    Args:
        model: On its device, with its LLM loaded.
        config: Settings.
        context: See `Probe`.
        gather: See `Probe`.
        texts: See `Probe`.

    Raises:
        FileNotFoundError: see `load_saes`.
        ValueError: see `load_saes`, `sanity_check.check` and `Probe`.
    """
    folder = release_folder(config.sae_release)
    saes = load_saes(config.sae_release, config.sae_id, config.layers, model.llm)
    if config.sae_memory_gb is None:
        for sae in saes.values():
            sae.to(model.device)
    prefix = model.collator().prompt.prefix_ids
    bos = model.llm.tokenizer.bos_token_id
    opening = [bos] if prefix[:1] == [bos] else []
    text: dict[str, sanity_check.TextStats] = {}
    for chunk in chunks_on_device(saes, model.device, config.sae_memory_gb):
        text |= sanity_check.measure_once(model.llm, chunk, opening, config.outlier_factor, context)
    ids = {name: sae.cfg.metadata.sae_id for name, sae in saes.items()}
    sanity_check.check(text, sanity_check.expected(config.sae_release, folder, ids), config.sanity_check)
    numbers = [f"{name.split('.')[1]}: {stats.fvu:.2f}, {stats.l0:.0f}" for name, stats in text.items()]
    rank_zero_info(f"[sanity check] fvu and l0 of plain text by layer: {'; '.join(numbers)}")
    pattern = config.descriptions or (f"{folder}/descriptions/{{hook}}" if folder else None)
    descriptions: dict[str, Descriptions] = {}
    if pattern is not None and (config.descriptions or Path(pattern).parent.is_dir()):
        descriptions = _read_descriptions(pattern, {name: sae.cfg.d_sae for name, sae in saes.items()})
    _check_filters(config, descriptions)
    return Probe(model, saes, text, config, descriptions, context, gather, texts)


def _read_descriptions(pattern: str, widths: dict[str, int]) -> dict[str, Descriptions]:
    """Reads each layer's descriptions where `pattern` says, with ``{layer}`` or ``{hook}`` in it.

    Args:
        pattern: See `ProbeConfig.descriptions`.
        widths: Latents of the SAEs by hook name.

    Raises:
        FileNotFoundError: one of them cannot be read.
    """
    found = {}
    for name, d_sae in widths.items():
        where = pattern.format(hook=name, layer=hook_layer(name))
        try:
            found[name] = Descriptions.read(where, d_sae)
        except OSError as error:
            raise FileNotFoundError(
                f"probe.descriptions: cannot read {where}: {error}. Without network, copy these folders "
                "and name them with {layer} in place of the layer; null leaves `match` out."
            ) from error
    return found


def _check_filters(config: ProbeConfig, descriptions: dict[str, Descriptions]) -> None:
    """Warns where settings of `match` can do nothing."""
    given = [name for name in MATCH_SETTINGS if getattr(config, name) != getattr(ProbeConfig, name)]
    matches = any(isinstance(metric, Match) for metric in config.make_metrics())
    if matches and given and not descriptions:
        rank_zero_info(
            f"[warning] probe.{', probe.'.join(given)}: set, but no layer has descriptions of its latents, "
            "so that `match` is not measured. Name some with probe.descriptions."
        )
    without = [str(hook_layer(name)) for name, known in descriptions.items() if not known.density.any()]
    if matches and without:
        rank_zero_info(
            f"[warning] probe.descriptions give no densities at layers {', '.join(without)}: "
            "probe.max_text_density drops no latent there."
        )
