"""`python -m orchestrator`: what a submitted job executes."""

from orchestrator.cli import main

if __name__ == "__main__":
    main()
