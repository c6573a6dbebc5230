import sys

from lightning_limber.utils.commands import COMMANDS, HELP, program


def read_settings(args: list[str]) -> str:
    """The config, as YAML, of the run that a command would start; nothing of the run is built."""
    from lightning_limber.cli import LimberCLI
    from lightning_limber.cli import main as cli
    from lightning_limber.utils.trainer import new_run_config

    class ReadOnlyCLI(LimberCLI):
        def _set_seed(self) -> None:
            pass

        def instantiate_classes(self) -> None:
            pass

        def _run_subcommand(self, subcommand: str) -> None:
            self.text = new_run_config(self._parser(subcommand), self._settings)

    return cli(args, ReadOnlyCLI).text  # type: ignore[attr-defined]


def main() -> None:
    """The command line: ``lightning-limber`` and ``python -m lightning_limber``."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):  # Nothing is imported.
        commands = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
        print(HELP.format(prog=program(), commands=commands), end="")
    elif sys.argv[1] == "report":  # Reads files: nothing that trains is imported.
        from lightning_limber.tools.report import main as report

        report(sys.argv[2:])
    elif sys.argv[1] == "grid":  # Its runs are commands of their own; what reads their settings comes late.
        from lightning_limber.tools.grid import main as grid

        grid(sys.argv[2:], read_settings)
    else:
        from lightning_limber.cli import main as cli

        cli()


if __name__ == "__main__":
    main()
