"""Leaves out what others print in every run and what nobody can act on, each by its text and its place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

MESSAGES = {
    "lightning.pytorch.utilities.rank_zero": (
        "💡 Tip:",  # Lightning's other products.
        "GPU available:",  # These three stand in the run's own line, [device].
        "TPU available:",
        "Using bfloat16 Automatic Mixed Precision",
        "Restoring states from the checkpoint path at",  # Before the whole config is checked: [resume].
        "Restored all states from the checkpoint at",
        "`Trainer.fit` stopped:",  # The end of a run says more.
    ),
    "lightning.fabric.utilities.seed": ("Seed set to",),  # In the config, which the run's folder holds.
    "lightning.pytorch.accelerators.cuda": ("LOCAL_RANK:",),
}
"""What messages of a logger begin with, behind the number of their process."""
WARNINGS = {
    # A call of Lightning's to torch that torch has renamed.
    r".*isinstance\(treespec, LeafSpec\)": r"lightning\.pytorch\.utilities\._pytree",
    # A short epoch is no mistake.
    r"The number of training batches \(\d+\) is smaller than the logging interval": (
        r"lightning\.pytorch\.loops\.fit_loop"
    ),
    # These are of all processes when they are logged.
    r"It is recommended to use `self\.log\('(interval/)?(val|test)/(loss|accuracy|perplexity)": (
        r"lightning\.pytorch\.trainer\.connectors\.logger_connector\.result"
    ),
}


def keep_quiet() -> None:
    for message, module in WARNINGS.items():
        warnings.filterwarnings("ignore", message=message, module=module)
    for name in MESSAGES:
        # One object, so that a second call adds none.
        logging.getLogger(name).addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    if text.startswith("[rank: "):
        text = text.partition("] ")[2]
    return not text.startswith(MESSAGES[record.name])


@contextmanager
def without_loading_bars() -> Iterator[None]:
    """Hides transformers' bars of weights that are put into their places; those of downloads stay."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    shown, downloads_hidden = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if not downloads_hidden:
        enable_progress_bars()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
