from pathlib import Path
def build(prepared):
    return prepared.store.folder / "report.html"
