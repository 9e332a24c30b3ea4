"""Plans and drives: what runs when and where, and what is kept."""

__version__ = "0.1.0"
