"""``python -m lightning_limber grid FILE``: trains designs with several seeds, goes on where it stopped,
and ends in a page that says which design is better at what (grid_page.py).

    config: configs/default.yaml          # settings of all runs ...
    set: {data.val_size: 512}             # ... and further ones
    arms:                                 # designs: what they set besides
      linear: {}
      late: {model.entry.layer: 12}
    base: linear                          # the arm that the others are compared with
    seeds: [0, 1, 2]
    choose:                               # for each arm, on training records alone:
      model.optimizer.lr: [0.005, 0.02, 0.08]   # the value with the lowest loss
      records: 300                        # of so many training records that are held out
      set: {trainer.max_steps: 140}       # further settings of these runs
    endpoints: [held_out/loss, probe/neighbour_lift@3]

A run is the ordinary ``fit`` in a process of its own, in ``runs/{FILE's name}/{arm}/seed_{n}``. No torch is
loaded before the settings are read.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from lightning_limber.tools.grid_file import Grid, Settings, read_grid, with_newer, without_own
from lightning_limber.utils.commands import COMMANDS, Parser, program
from lightning_limber.utils.files import in_words, write_text

ReadSettings = Callable[[list[str]], str]
"""A command's arguments -> its whole config as YAML."""
FOR_ALL: Settings = {"model.cache_features": True}
GRID_LOCK = ".grid_lock"
FOR_CHOOSING: Settings = {"probe.every_n_epochs": 0, "captions.num_images": 0}


@dataclass(frozen=True)
class Run:
    """One run: its folder, and the settings that make it."""

    folder: Path
    config: str | None
    settings: Settings
    seed: int

    @property
    def arguments(self) -> list[str]:
        """Those of ``fit`` but the seed and the folder."""
        return [*(["--config", self.config] if self.config else []), *map(flag, self.settings.items())]

    @property
    def command(self) -> list[str]:
        """Begins the run, or goes on with it."""
        if (self.folder / "checkpoints/last.ckpt").is_file():
            return ["fit", "--ckpt_path", str(self.folder)]
        logger = {
            "save_dir": self.folder.parent.parent,
            "name": self.folder.parent.name,
            "version": self.folder.name,
        }
        own: Settings = {"seed_everything": self.seed}
        own |= {f"trainer.logger.init_args.{name}": str(value) for name, value in logger.items()}
        return ["fit", *self.arguments, *map(flag, own.items())]

    @property
    def is_over(self) -> bool:
        record = self.folder / "run.json"
        starts = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else []
        return bool(starts) and "ended_at_step" in starts[-1]


def flag(setting: tuple[str, Any]) -> str:
    name, value = setting
    return f"--{name}={value if isinstance(value, str) else json.dumps(value)}"


def main(args: list[str], read_settings: ReadSettings) -> None:
    description = f"{COMMANDS['grid']} What is there is left or gone on with."
    parser = Parser(f"{program()} grid", description=description)
    parser.add_argument(
        "file", metavar="FILE", help="The grid's YAML file; docs/lab.md says what it holds."
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="Check the file, print the commands and what is done."
    )
    options = parser.parse_args(args)
    try:
        grid = read_grid(options.file)
        Work(grid, read_settings).do(options.dry_run)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        if os.environ.get("LIGHTNING_LIMBER_TRACEBACK"):
            raise
        parser.exit(2, f"error: {in_words(error)}\n")


# -- the work -----------------------------------------------------------------------------------------


class Work:
    """Does what a grid asks, and knows what is done.

    Args:
        grid: The grid.
        read_settings: Reads a command's settings as the command itself does.
    """

    def __init__(self, grid: Grid, read_settings: ReadSettings) -> None:
        self.grid, self.read_settings = grid, read_settings
        self._configs: dict[tuple[str, ...], Settings] = {}
        self._child: Popen | None = None
        self._stop = 0
        self.failed: list[Run] = []

    def do(self, dry_run: bool = False) -> None:
        """Checks all, then does what is left and writes the page.

        Raises:
            ValueError: a setting is wrong, a folder holds something else, or runs have failed.
        """
        grid = self.grid
        for arm in grid.arms:
            self.config_of(
                Run(grid.folder, grid.config, FOR_ALL | grid.set | grid.arms[arm], 0), f"arms.{arm}"
            )
        for value, run in self.search(grid.base).items():
            self.config_of(run, f"choose: {value}")
        for arm in grid.arms:
            for run in (*self.search(arm).values(), *self.main(arm)):
                self.check_unchanged(run)
        if dry_run:
            self.show()
            return
        from lightning_limber.utils.run_lock import release_run  # It imports torch.

        with self.passing_signals_on():
            while left := self.left():
                if claimed := next(filter(self.claim, left), None):
                    self.execute(claimed)
                    release_run(claimed.folder, GRID_LOCK)
                else:  # Others do what is left: wait for their ends.
                    time.sleep(5)
                self.end_if_stopped()
            self.write_page()
        if self.failed:
            folders = ", ".join(str(run.folder) for run in self.failed)
            raise ValueError(
                f"{len(self.failed)} run(s) failed: {folders}. What does not need them is done; the same "
                "command tries them again."
            )

    def left(self) -> list[Run]:
        """The runs that can be done now, in order: those that choose values, then all arms of each seed."""
        arms = self.grid.arms
        mains = [self.main(arm) for arm in arms]
        for runs in mains:
            for run in runs:  # The choice may be new.
                self.check_unchanged(run)
        of_seeds = [runs[place] for place in range(len(self.grid.seeds)) for runs in mains if runs]
        runs = [run for arm in arms for run in self.pending(arm)] + of_seeds
        return [run for run in runs if not run.is_over and run not in self.failed]

    def show(self) -> None:
        """Prints what is done, and the commands of what is not."""
        for arm in self.grid.arms:
            tried = [run for run in self.search(arm).values() if run.is_over]
            for run in (*tried, *self.pending(arm), *self.main(arm)):
                print(f"done: {run.folder}" if run.is_over else shown(run.command))
            if not self.main(arm):
                print(
                    f"then {arm} with further values, and with the chosen one and seeds {self.grid.seeds}"
                )

    def main(self, arm: str) -> list[Run]:
        """An arm's runs, one a seed; none before its value is chosen."""
        grid, searched = self.grid, self.search(arm)
        settings, chosen = FOR_ALL | grid.set | grid.arms[arm], self.choice(arm)
        if grid.choose and searched:
            if chosen is None:
                return []
            settings[grid.choose.setting] = chosen
        return [Run(grid.folder / arm / f"seed_{seed}", grid.config, settings, seed) for seed in grid.seeds]

    # -- choosing ---------------------------------------------------------------------------------

    def search(self, arm: str) -> dict[Any, Run]:
        """The runs that choose an arm's value, by value; none where the arm sets it."""
        grid, choose = self.grid, self.grid.choose
        if choose is None or choose.setting in grid.arms[arm]:
            return {}
        settings = FOR_ALL | grid.set | grid.arms[arm] | FOR_CHOOSING | choose.set
        settings["data.choose_on"] = choose.records
        name = choose.setting.rpartition(".")[2]
        return {
            value: Run(
                grid.folder / arm / f"{name}_{value}", grid.config, settings | {choose.setting: value}, 0
            )
            for value in choose.values
        }

    def losses(self, arm: str) -> dict[Any, float]:
        """Loss of the held-out training records at the end of each run that is over, by value."""
        from lightning_limber.tools.report import read_validation

        found = {}
        for value, run in self.search(arm).items():
            if run.is_over:
                of_epoch = read_validation(run.folder / "validation.csv")
                found[value] = of_epoch[max(of_epoch)]["loss"][0]
        return found

    def pending(self, arm: str) -> list[Run]:
        """The runs that an arm's choice needs next; none once it is chosen.

        Of numbers the middle one is tried first, then where the loss falls, until both neighbours of the
        best are tried: fewer runs, and the same choice where the loss has one valley.
        """
        runs, losses = self.search(arm), self.losses(arm)
        values = list(runs)
        if are_numbers(values):
            values.sort()
            best = values.index(min(losses, key=losses.__getitem__)) if losses else len(values) // 2
            values = values[max(best - 1, 0) : best + 2] if losses else values[best : best + 1]
        return [runs[value] for value in values if value not in losses]

    def choice(self, arm: str) -> Any:
        """The value with the lowest loss; None before its neighbours are tried."""
        losses = self.losses(arm)
        return min(losses, key=losses.__getitem__) if losses and not self.pending(arm) else None

    def choices(self) -> dict[str, Settings]:
        """What was chosen, of what, by arm."""
        found = {arm: (self.choice(arm), self.losses(arm)) for arm in self.grid.arms}
        return {
            arm: {
                "chosen": value,
                "at the edge": value in edges(self.search(arm)),
                "losses": {str(one): loss for one, loss in losses.items()},
            }
            for arm, (value, losses) in found.items()
            if value is not None
        }

    def tell_choice(self, arm: str) -> None:
        """Writes ``choice.json``, and says what was chosen for an arm."""
        choices, choose = self.choices(), self.grid.choose
        if choose is None or arm not in choices:
            return
        write_text(self.grid.folder / "choice.json", json.dumps({choose.setting: choices}, indent=1))
        edge = " It is at the edge of the values: try some beyond." * choices[arm]["at the edge"]
        print(f"[grid] {arm}: {choose.setting} {choices[arm]['chosen']}, of {self.losses(arm)}.{edge}")

    # -- runs -------------------------------------------------------------------------------------

    def config_of(self, run: Run, where: str) -> Settings:
        """The run's config but for seed and folder, as the command reads it.

        Raises:
            ValueError: the command refuses a setting; `where` says whose.
        """
        key = tuple(run.arguments)
        if key not in self._configs:
            said = StringIO()
            try:
                with redirect_stderr(said), redirect_stdout(StringIO()):
                    text = self.read_settings(["fit", *key])
            except (SystemExit, ValueError, OSError) as error:
                reason = said.getvalue().strip().removeprefix("error: ") or str(error)
                raise ValueError(f"{self.grid.file}: {where}: {reason}") from error
            self._configs[key] = without_own(text)
        return self._configs[key]

    def check_unchanged(self, run: Run) -> None:
        """Checks that what is in the run's folder was made by these settings.

        Raises:
            ValueError: it was not.
        """
        kept = run.folder / "config.yaml"
        if not kept.is_file():
            return
        from lightning_limber.utils.checkpoints import differences

        wanted = self.config_of(run, str(run.folder))
        plain = self.config_of(Run(self.grid.folder, self.grid.config, {}, 0), "config")
        there = with_newer(without_own(kept.read_text(encoding="utf-8")), wanted, plain)
        if lines := differences(there, wanted, ""):
            lines = [line.removeprefix(".").replace("in the checkpoint", "there") for line in lines]
            raise ValueError(
                f"{run.folder} was made with other settings:\n  "
                + "\n  ".join(lines)
                + "\nMove it away, or give the arm or the grid's file another name."
            )

    def claim(self, run: Run) -> bool:
        """Takes a run for this process; False where another has it or has ended it."""
        from lightning_limber.utils.run_lock import hold_run, release_run

        try:
            hold_run(run.folder, GRID_LOCK)
            hold_run(run.folder)  # A run outlives a grid that is killed.
            release_run(run.folder)
        except ValueError:
            release_run(run.folder, GRID_LOCK)
            return False
        if run.is_over:  # Another process ended it since.
            release_run(run.folder, GRID_LOCK)
        return not run.is_over

    def execute(self, run: Run) -> None:
        """Does what is left of a run, and says what follows from it."""
        print(f"[grid] {run.folder}\n{shown(run.command)}", flush=True)
        # A session of its own: Ctrl-C at a terminal reaches it once, from here.
        self._child = Popen(
            [sys.executable, "-m", "lightning_limber", *run.command],
            stdin=DEVNULL,
            start_new_session=True,
        )
        if self._stop:  # It came in between.
            self._child.send_signal(self._stop)
        code = self._child.wait()
        if self._stop:
            return
        if code or not run.is_over:
            print(f"[grid] {run.folder} failed with exit code {code}", file=sys.stderr, flush=True)
            self.failed.append(run)
            return
        for arm in self.grid.arms:
            if run in self.search(arm).values():
                self.tell_choice(arm)
            elif run in self.main(arm):
                self.write_page()  # A wrong endpoint is met after the first run, not the last.

    def end_if_stopped(self) -> None:
        if self._stop:
            print(f"[grid] stopped; go on with: {program()} grid {shlex.quote(str(self.grid.file))}")
            sys.exit(128 + self._stop)

    @contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C go to the run under way, which saves and ends; then the grid does."""

        def pass_on(number: int, frame: Any) -> None:
            self._stop = number
            if self._child is not None:
                self._child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def write_page(self) -> None:
        from lightning_limber.tools.grid_page import write_page

        grid = self.grid
        folders = {arm: [run.folder for run in self.main(arm) if run.is_over] for arm in grid.arms}
        if folders[grid.base]:
            write_page(grid, folders, self.choices())
            print(f"[grid] {grid.folder / 'README.md'}", flush=True)


def are_numbers(values: Collection[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def edges(values: Collection[Any]) -> tuple[Any, ...]:
    """The least and the greatest of numbers; of anything else none."""
    return (min(values), max(values)) if are_numbers(values) else ()


def shown(command: list[str]) -> str:
    return f"{program()} {shlex.join(command)}"
