"""What the report says of first models: how the starts went, and whether they tell of the same molecule."""

from collections.abc import Mapping
from typing import Any

from dcryo import figures

# An explanation that is no better than a blob's by this factor says nothing of the molecule.
_BETTER_THAN_BLOB = 1.1


def starts(record: Mapping[str, Any]) -> tuple[str, str, list[list[str]]] | None:
    """Picture of the evidence of each start over the iterations, words, and a table of the resolution at which models
    of any two agree; None where there were no starts."""
    rows = [row for row in record["iterations"] if isinstance(row.get("log_evidence"), list)]
    if not rows:
        return None
    result = record.get("result") or {}
    picture = figures.evidence(rows, result.get("evidence_of_blob"))
    words = "Log-evidence of an image: how much better the models explain it than noise alone does."
    if "agreeing" not in result:
        return picture, words, []
    return picture, f"{words} {judgement(result)}", _between(result)


def judgement(result: Mapping[str, Any]) -> str:
    """In plain words, how far the models can be trusted; of the figures of a finished run."""
    count, total = len(result["agreeing"]), result["starts"]
    evidence, blob = result["evidence_of_starts"][result["agreeing"][0]], result["evidence_of_blob"]
    if total == 1:
        said = "One start alone cannot be checked; more of them would be compared."
    elif count == 1:
        said = (
            f"No two of {total} starts agree: do not trust the model. Check the mask diameter, throw junk away with "
            "class2d and select, or give more particles or starts."
        )
    elif count == total:
        said = f"All {total} starts, which know nothing of one another, agree."
    else:
        said = f"{count} of {total} starts agree; the model is theirs."
    said += f" It explains an image with {evidence:.1f}, its rotational average with {blob:.1f}."
    if evidence < _BETTER_THAN_BLOB * max(blob, 0.1):
        said += " That is hardly better than a blob: the images may hold no detail at this resolution."
    symmetry = result.get("symmetry_agreement") or []
    if any(value < 1 for value in symmetry):
        said += (
            " Agreement of the model made without symmetry with the point group (1: perfect, 0: chance): "
            + ", ".join(f"{value:.2f}" for value in symmetry)
            + "."
        )
    return said + " The hand cannot be known from projections."


def _between(result: Mapping[str, Any]) -> list[list[str]]:
    resolutions = result["resolution_between_A"]
    if len(resolutions) < 2:
        return []
    table = [["correlated by half to (Å)", *(f"start {number + 1}" for number in range(len(resolutions)))]]
    for number, row in enumerate(resolutions):
        table.append(
            [f"start {number + 1}", *("" if other == number else f"{value:.1f}" for other, value in enumerate(row))]
        )
    return table
