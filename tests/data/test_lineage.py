"""What a run came from, by the records of the runs before it."""

from pathlib import Path

from dcryo.data.lineage import lineage
from dcryo.data.run import Run


def test_runs_are_followed_through_inputs_and_options(tmp_path: Path) -> None:
    motion = Run.start(tmp_path / "motion", "motion", {"movies": ["raw/*.tif"]})
    motion.done({})
    (motion.path / "micrographs.star").write_text("data_\n")
    picked = Run.start(tmp_path / "picked", "pick", {"micrographs": [str(motion.path / "micrographs.star")]})
    picked.done({})
    (picked.path / "picks.star").write_text("data_\n")
    last = Run.start(tmp_path / "last", "extract", {"out": tmp_path / "motion"}, [picked.path / "picks.star"])
    last.done({})
    Run.start(tmp_path / "another", "pick", {}).done({})
    assert [step.record["job"] for step in lineage(last.path)] == ["motion", "pick", "extract"]
    (picked.path / "run.json").unlink()
    assert [step.record["job"] for step in lineage(last.path)] == ["extract"]
