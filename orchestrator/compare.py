"""Do the timesteps of two runs' models cluster alike? One sentence, and the page that shows why."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from orchestrator import figures_compare
from orchestrator.remarks import RELIABLE, RETURNED
from orchestrator.results import JOB
from orchestrator.store import read_object
from orchestrator.words import both
from workers import agreement, families
from workers.agreement import Side
from workers.contracts import InputError, Partition, SimilarityMatrix
from workers.diffusion import NoiseSchedule
from workers.files import replacing

LEARNED = "learned"


@dataclass(frozen=True)
class Run:
    """A run whose timesteps were compared and cut."""

    name: str
    folder: Path
    side: Side
    rule: str
    """How it was cut: learned, given, uniform in t or uniform in log-SNR."""


def load(folder: Path) -> Run:
    """Read a run folder. Raises: InputError if its first two stages are not done, or its model is no longer there."""
    owner = read_object(folder / "run.json", "name") or {}
    fingerprints = (read_object(folder / "progress.json") or {}).get("fingerprints", {})
    (analyzed, analysis), (_, cut) = (_done(folder, stage, fingerprints.get(stage, "")) for stage in ("analyze", "partition"))
    matrix = SimilarityMatrix.from_json(analysis["similarity"])
    try:
        schedule = NoiseSchedule(families.load_scheduler_config(str(families.locate(owner["model.path"][0]))))
    except InputError as error:
        raise InputError(f"{folder}: the noise levels are those of its model, which cannot be read ({error})") from None
    side = Side(
        matrix=matrix,
        gram=np.load(analyzed / "gram.npy"),
        partition=Partition.from_json(cut["partition"]),
        log_snr=schedule.log_snr(range(matrix.num_timesteps)),
        min_length=cut.get("min_length", 1),
        learned=(rule := _rule(folder, cut)) == LEARNED,
    )
    return Run(owner["name"], folder, side, rule)


def _rule(folder: Path, cut: dict[str, Any]) -> str:
    """How a run was cut; an older version left that to its job."""
    asked = (read_object(folder / JOB) or {}).get("config", {}).get("partition", {})
    return cut.get("rule") or ("given" if isinstance(asked.get("experts"), list) else asked.get("method", LEARNED))


def _done(run: Path, stage: str, fingerprint: str) -> tuple[Path, dict[str, Any]]:
    """The folder and the result of a stage, under the settings that the run was last used with."""
    folder = run / f"{stage}-{fingerprint[:8]}"
    record = read_object(folder / "done.json", "result")
    if record is None:
        raise InputError(f"{run}: stage {stage} is not done: run `diffpruning analyze` on its job first")
    return folder, record["result"]


def compare(left: Run, right: Run, replicates: int = 200, seed: int = 0) -> dict[str, Any]:
    """How alike the two runs' matrices and cuts are, as JSON, with a sentence on top. Raises: InputError if they cannot be compared."""
    found = agreement.compare(left.side, right.side, replicates, seed)
    runs = [
        {
            "name": run.name,
            "run_folder": str(run.folder),
            "images": run.side.matrix.images,
            "timesteps": len(run.side.matrix.timesteps),
            "boundaries": list(run.side.partition.boundaries),
            "log_snr_of_boundaries": [float(run.side.log_snr[b]) for b in run.side.partition.boundaries],
            "reliability": reliability,
            "self_agreement": own,
            "rule": run.rule,
        }
        for run, reliability, own in zip((left, right), found.pop("reliability"), found.pop("self_agreement"), strict=True)
    ]
    return {"verdict": verdict(runs, found), "runs": runs, **found}


def verdict(runs: list[dict[str, Any]], found: dict[str, Any]) -> str:
    """Whether the clusters agree, in one sentence; where the images do not suffice to tell, that."""
    unmeasured = [f"{run['name']} ({run['reliability']:.2f})" for run in runs if run["reliability"] < RELIABLE]
    if unmeasured:
        return (
            "Cannot say whether the clusters agree: two halves of the images agree too little about the similarities of "
            f"{both(unmeasured)}, median cosine in brackets; raise similarity.images."
        )
    told = [f"{run['name']} ({run['rule']})" for run in runs if run["rule"] != LEARNED]
    rand, chance, uniform = found["adjusted_rand"], found["adjusted_rand_of_random"], found["adjusted_rand_with_uniform"]
    if told:
        return (
            f"Cannot say whether the clusters agree by the cuts that were used, since those of {both(told)} were not learned from images: "
            f"their adjusted Rand index is {rand['value']:.2f}, and one pair of random cuts in twenty exceeds {chance:.2f}; see both cut "
            "anew into as many intervals."
        )
    unsure = [f"{run['name']} ({run['self_agreement']:.2f})" for run in runs if run["self_agreement"] < RETURNED]
    if unsure:
        return (
            "Cannot say whether the clusters agree: when images are resampled, the cuts do not agree with themselves in "
            f"{both(unsure)}, adjusted Rand index in brackets; raise similarity.images."
        )
    measured = f"adjusted Rand index {rand['value']:.2f}, {rand['low']:.2f} to {rand['high']:.2f} when images are resampled"
    if rand["value"] <= chance:
        return f"The clusters do not agree more than random cuts may: {measured}; one random pair in twenty exceeds {chance:.2f}."
    if rand["low"] <= chance:
        return f"Cannot say whether the clusters agree: {measured}, and one pair of random cuts in twenty exceeds {chance:.2f}."
    beyond = f", but no more than uniform cuts agree with them ({uniform:.2f})" if rand["value"] <= uniform else ""
    return (
        f"The clusters agree{beyond}: {measured}; one pair of random cuts in twenty exceeds {chance:.2f}, uniform cuts reach {uniform:.2f}."
    )


ROWS = {
    "correlation": "correlation of the similarities",
    "correlation_beyond_distance": "the same, beyond what distance explains",
    "adjusted_rand": "adjusted Rand index of the cuts",
}


def text(found: dict[str, Any]) -> str:
    lines = [found["verdict"], "", f"{'':<44}{'value':>8}{'5%':>8}{'95%':>8}"]
    for key, words in ROWS.items():
        lines.append(f"{words:<44}" + "".join(f"{found[key][part]:>8.2f}" for part in ("value", "low", "high")))
    lines.append(f"{'  exceeded by one random pair in twenty':<44}{found['adjusted_rand_of_random']:>8.2f}")
    lines.append(f"{'  of each with uniform cuts':<44}{found['adjusted_rand_with_uniform']:>8.2f}")
    lines += ["", f"{'both cut anew into as many intervals':<44}{'value':>8}{'5%':>8}{'95%':>8}{'random':>9}"]
    for k, rand in found["at_equal_numbers"].items():
        lines.append(f"{'  ' + k:<44}" + "".join(f"{rand[part]:>8.2f}" for part in ("value", "low", "high")) + f"{rand['random']:>9.2f}")
    lines.append("")
    for run in found["runs"]:
        cuts = ", ".join(f"{b} ({snr:+.1f})" for b, snr in zip(run["boundaries"], run["log_snr_of_boundaries"], strict=True))
        lines.append(
            f"{run['name']:<16}{run['rule']} cuts at t (log-SNR) {cuts}; {run['images']} images, reliability {run['reliability']:.2f}, "
            f"agreement with itself {run['self_agreement']:.2f}"
        )
    return "\n".join(lines)


def write_page(found: dict[str, Any], out: Path) -> None:
    """One self-contained HTML file."""
    template = Path(__file__).with_name("compare.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    picture = base64.b64encode(figures_compare.matrices(found)).decode()
    page = environment.from_string(template).render(found=found, rows=ROWS, picture=f"data:image/png;base64,{picture}")
    with replacing(out) as path:
        path.write_text(page)
