"""Every data file that the package reads."""

from pathlib import Path

ASSETS = Path(__file__).parent
