"""Watch pictures become language: train an adapter between a frozen vision encoder and a frozen LLM
and measure, while it trains, where in the LLM the image tokens start to look like text.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_limber.api import load

__all__ = ["load"]
__version__ = "0.1.0"

if not (Path(__file__).parent / "callbacks").is_dir():
    # An install has callbacks/ and configs/ inside the package; in a clone they stand beside it.
    __path__.append(str(Path(__file__).parents[1]))


def __getattr__(name: str) -> Any:
    """Only who loads a model waits for torch and transformers."""
    if name == "load":
        from lightning_limber.api import load

        return load
    raise AttributeError(f"module 'lightning_limber' has no attribute '{name}'")
