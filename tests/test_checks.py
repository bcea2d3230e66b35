"""Reasons to distrust an audit that lie in its edits."""

import dataclasses
from pathlib import Path
from typing import Any

from synthetic_audit import synthetic_audit

from dori.audit.checks import with_distrust
from dori.findings import EditInfo


def test_searches_that_pruned_nothing_or_too_much_are_reasons_to_distrust(tmp_path: Path) -> None:
    audit = synthetic_audit(tmp_path)

    def told(*searches: dict[str, Any]) -> list[str]:
        details = {"memories": {f"m{k}": one for k, one in enumerate(searches)}}
        edits = (EditInfo("NeMo", "joint", 9, details), EditInfo("NeMo", "own", 9, {"sizes": {}}))
        return [
            reason
            for reason in with_distrust(dataclasses.replace(audit, edits=edits), diverged=0).distrust
            if reason.startswith("NeMo:")
        ]

    found = {"flagged": True, "judged": 7, "converged": True, "suppressed": True}
    silent = {"flagged": False, "converged": True, "suppressed": False}
    assert told(found, found) == []
    assert told(found, silent) == [
        "NeMo: 1 of 2 prompts were not taken for memorized, and nothing was pruned for them."
    ]
    (kept,) = told(found, found | {"suppressed": False}, found)
    assert kept == "NeMo: 1 of 3 searches found no set that brings the score down to the threshold."
    (cut,) = told(found | {"converged": False}, found)
    assert cut.startswith("NeMo: 1 of 2 refinements were cut short")
    assert told(found | {"converged": False, "judged": 0}) == []  # unrefined by its settings, and named so
