"""A logger without a folder for each run, which takes figures and tables, as WandbLogger does."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import Logger


class WandbLogger(Logger):
    def __init__(self, save_dir: str = "logs", name: str = "project") -> None:
        super().__init__()
        self._save_dir, self._name = save_dir, name
        self.experiment = self
        self.images: list[str] = []
        self.numbers: dict[str, float] = {}
        self.tables: dict[str, Any] = {}

    save_dir = property(lambda self: self._save_dir)
    name = property(lambda self: self._name)
    version = property(lambda self: None)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.numbers |= metrics

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        self.images += [f"{key} {type(image).__name__}" for image in images]

    def log_table(self, key: str, dataframe: Any, step: int | None = None) -> None:
        self.tables[key] = dataframe
