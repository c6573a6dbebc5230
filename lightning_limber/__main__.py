import sys

from lightning_limber.utils.commands import COMMANDS, HELP, program


def main() -> None:
    """The command line: ``lightning-limber`` and ``python -m lightning_limber``."""
    if sys.argv[1:] in ([], ["-h"], ["--help"]):  # Nothing is imported.
        commands = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
        print(HELP.format(prog=program(), commands=commands), end="")
    elif sys.argv[1] == "report":  # Reads files: nothing that trains is imported.
        from lightning_limber.tools.report import main as report

        report(sys.argv[2:])
    else:
        from lightning_limber.cli import main as cli

        cli()


if __name__ == "__main__":
    main()
