"""A run's adapter as a folder for a hub.

    adapter.safetensors   the weights; fingerprints of the frozen models in its metadata
    config.yaml           what it was trained with; also a config for the command line
    README.md             the model card
    probe.png             the last probe, where there was one
    checksums.json        of the weights: reading them compares

`load(FOLDER)` and ``--model.adapter_weights FOLDER`` read it back, bit by bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from lightning_limber import __version__
from lightning_limber.api import Trained
from lightning_limber.probe.metrics import DEFAULT_METRICS, Panel, resolve_metrics
from lightning_limber.probe.tables import Row
from lightning_limber.utils.checkpoints import EXPORTED, newest_checkpoint, read_checkpoint
from lightning_limber.utils.files import write_checksums, write_text, write_whole
from lightning_limber.utils.hub import source
from lightning_limber.utils.loop_state import stored_epoch

# The rest of the config is about one machine: devices, loggers, files.
SECTIONS = ("seed_everything", "model", "data", "probe", "captions")


def export(ckpt_path: str | Path, output: str | Path) -> Path:
    """Writes the folder; see this file's head.

    Args:
        ckpt_path: A checkpoint, a run's folder (its ``last.ckpt``) or a folder of runs (the newest).
        output: Made if it is not there; files of the same names are replaced.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is not one of this project.
    """
    path, folder = Path(ckpt_path), Path(output)
    path = newest_checkpoint(path) if path.is_dir() else path
    checkpoint = read_checkpoint(path)
    trained = Trained.of_checkpoint(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    notes = {"version": __version__, "backbones": trained.backbones, "trainer": trained.trainer}
    metadata = {"format": "pt"} | {key: json.dumps(value) for key, value in notes.items()}
    weights = {key: value.contiguous() for key, value in trained.weights.items()}
    write_whole(folder / EXPORTED, lambda part: save_file(weights, part, metadata))
    write_checksums(folder, EXPORTED)
    config = {key: trained.config[key] for key in SECTIONS if key in trained.config}
    write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    has_figure = _draw(checkpoint, trained, folder / "probe.png")
    card = _card(checkpoint, trained, _logged(path, checkpoint["global_step"]), has_figure)
    write_text(folder / "README.md", card)
    print(f"[export] {path} to {folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")
    return folder


def _history(checkpoint: dict[str, Any], callback: str) -> dict[int, Any]:
    """What a callback had measured by epoch (or step) when the checkpoint was written."""
    return checkpoint["callbacks"].get(callback, {}).get("history", {})


def _draw(checkpoint: dict[str, Any], trained: Trained, path: Path) -> bool:
    """The last probe's figure, if there was a probe."""
    history = _history(checkpoint, "SAEProbe")
    if not history or (not max(history) and checkpoint["global_step"]):  # Not of an untrained adapter.
        return False
    from lightning_limber.probe.figures import probe_figure

    # A checkpoint of before panels were stored has the metrics that ship.
    stored = checkpoint["callbacks"]["SAEProbe"].get("panels")
    panels = [Panel(**panel) for panel in stored or []]
    panels = panels or [panel for metric in resolve_metrics(DEFAULT_METRICS) for panel in metric.panels]
    rows = {epoch: [Row(*row) for row in rows] for epoch, rows in history.items()}
    fresh = checkpoint["hyper_parameters"]["adapter_weights"] is None
    control = "untrained adapter" if fresh else "adapter at the start"
    title = f"SAE probe of held-out images, epoch {max(rows)}"
    published = trained.config.get("probe", {}).get("published_curves", False)
    figure = probe_figure(rows, max(rows), panels, title, control, published)
    write_whole(path, lambda part: figure.savefig(part, dpi=80))
    return True


def _logged(path: Path, step: int) -> dict[str, float]:
    """The last ``val/`` numbers up to `step` in the run's event files; empty where there are none."""
    run = path.parent.parent
    if path.parent.name != "checkpoints" or not list(run.glob("events.out.tfevents.*")):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        values = [event.value for event in events.Scalars(tag) if event.step <= step]
        if tag.startswith("val/") and values:
            found[tag.removeprefix("val/")] = values[-1]
    return found


def _card(checkpoint: dict[str, Any], trained: Trained, logged: dict[str, float], has_figure: bool) -> str:
    """The model card, in the hub's Markdown with a YAML head."""
    model, trainer = trained.config["model"], trained.trainer
    names = {"vision": model["vision"]["name"], "llm": model["llm"]}
    # A hub knows models by owner/name.
    on_hub = [name for name in names.values() if name.count("/") == 1 and not Path(name).is_dir()]
    vision, llm = (Path(name).name if Path(name).is_dir() else name for name in names.values())
    head: dict[str, Any] = {
        "library_name": "lightning_limber",
        "pipeline_tag": "image-to-text",
        "tags": ["adapter", "interpretability", "sparse-autoencoders", "vision-language"],
    }
    if on_hub:
        head["base_model"] = on_hub
    adapter = model["adapter"]["class_path"].rpartition(".")[2]
    parameters = sum(value.numel() for key, value in trained.weights.items() if key.startswith("project"))
    lines = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {adapter} adapter from {vision} to {llm}",
        "An adapter, trained on captions, that turns patch features of a frozen vision encoder into input "
        "tokens of a frozen language model. Neither model was changed; their weights are not in this "
        f"repository. {parameters:,} parameters.",
        "## Use",
        "```python\nfrom lightning_limber import load\n\n"
        'model = load("THIS_FOLDER")\nprint(model.caption("picture.jpg"))\n```',
        "```bash\npython -m lightning_limber predict --config THIS_FOLDER/config.yaml "
        "--model.adapter_weights THIS_FOLDER --images picture.jpg\n```",
        "Loading compares the frozen models with the fingerprints below and says when they differ.",
        "## Frozen models",
        _table(
            ["", "name", "source", "fingerprint"],
            [[part, names[part], source(names[part]), trained.backbones[part]] for part in names],
        ),
        "The encoder's settings, the adapter's and the prompt:",
        "```yaml\n"
        + yaml.safe_dump({key: model[key] for key in ("vision", "adapter", "prompt")}, sort_keys=False)
        + "```",
        "## Training",
    ]
    if data := trained.config.get("data"):
        lines.append(f"```yaml\n{yaml.safe_dump({'data': data}, sort_keys=False)}```")
    optimizer = model["optimizer"]
    epoch, is_whole = stored_epoch(checkpoint)
    lines.append(
        f"{checkpoint['global_step']} steps of AdamW (peak learning rate {optimizer['lr']:g}), precision "
        f"{trainer['precision']}, seed {trainer['seed_everything'] or 'none'}; "
        f"lightning_limber {checkpoint['lightning_limber']['version']}. The weights are those "
        f"{'at the end of' if is_whole else 'within'} epoch {epoch}."
    )
    lines += _scores(checkpoint, logged)
    if has_figure:
        lines += [
            f"## SAE probe after epoch {max(_history(checkpoint, 'SAEProbe'))}",
            "Where in the language model the image tokens look like text, by layer; bands are 95 % "
            "bootstrap intervals over images. Reconstruction alone does not show alignment: read it "
            "against `text`, `noise` and the adapter at the start.",
            "![SAE probe by layer](probe.png)",
        ]
    lines += [
        "## Licence",
        "That of the weights is for their author to state here; the frozen models and the data have "
        "their own.",
    ]
    return "\n\n".join(lines) + "\n"


def _scores(checkpoint: dict[str, Any], logged: dict[str, float]) -> list[str]:
    """Scores of captions on held-out images with their intervals, and the held-out loss."""
    rows, head = [[name, f"{value:.3f}", ""] for name, value in logged.items()], "## Held-out images"
    if validations := _history(checkpoint, "RunRecord"):  # By step; older checkpoints have none.
        rows = [_row(name, *score) for name, score in validations[max(validations)][1].items()]
        head += f", after {max(validations)} steps"
    if captions := _history(checkpoint, "CaptionSamples"):
        rows += [_row(name, *score) for name, score in captions[max(captions)].items()]
    if not rows:
        return []
    return [head, _table(["", "value", "95 % over images"], rows)]


def _row(name: str, value: float, low: float, high: float) -> list[str]:
    return [name, f"{value:.3f}", f"{low:.3f} to {high:.3f}"]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
