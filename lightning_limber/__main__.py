import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:  # Reads files: nothing that trains is imported.
        from lightning_limber.tools.report import main

        main(sys.argv[2:])
    else:
        from lightning_limber.cli import main as cli

        cli()
