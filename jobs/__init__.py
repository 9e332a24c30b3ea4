"""Jobs are YAML files; this package only carries them."""
