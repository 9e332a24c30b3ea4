"""Plans and drives: what runs when and where, and what is kept."""
