"""Leaves out what others print in every run and what nobody can act on, each by its text and its place."""

from __future__ import annotations

import logging
import warnings

ADVICE = (
    "💡 Tip:",  # Lightning's other products.
    "TPU available:",
    "`Trainer.fit` stopped:",  # The end of a run says more.
)
WARNINGS = {
    # A call of Lightning's to torch that torch has renamed.
    r".*isinstance\(treespec, LeafSpec\)": r"lightning\.pytorch\.utilities\._pytree",
    # A short epoch is no mistake.
    r"The number of training batches \(\d+\) is smaller than the logging interval": (
        r"lightning\.pytorch\.loops\.fit_loop"
    ),
}


def keep_quiet() -> None:
    for message, module in WARNINGS.items():
        warnings.filterwarnings("ignore", message=message, module=module)
    # One object, so that a second call adds none.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(ADVICE)
