"""`python -m orchestrator`: what a submitted job executes."""

import sys

if __name__ == "__main__":
    try:
        from orchestrator.cli import main

        main()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("orchestrator", "workers"):
            raise
        print(
            f"error: the Python of this node, {sys.executable}, has no {error.name}: install diffpruning's dependencies there, "
            "`pip install --constraint constraints.txt .`",
            file=sys.stderr,
        )
        sys.exit(2)
