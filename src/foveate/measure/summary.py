"""What came out of a run, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.core.in_llm import solved
from foveate.measure.job import Job
from foveate.measure.run import Outcome


def summarize(job: Job, unpruned: Outcome, pruned: Outcome, others: Sequence[Outcome] = ()) -> dict[str, Any]:
    """Return the outcome of a run as JSON-compatible data."""
    spans = [
        {"kind": span.kind, "grid": list(span.grid), "before": len(span), "after": len(chosen)}
        for span, chosen in zip(job.spans, pruned.selection, strict=True)
    ]
    assert pruned.reducer is not None
    method = solved(pruned.reducer, len(pruned.layers), [len(span) for span in job.spans])
    data: dict[str, Any] = {
        "answer": pruned.answer,
        "answer_unpruned": unpruned.answer,
        "answer_tokens": {"before": unpruned.answer_tokens, "after": pruned.answer_tokens},
        "method": repr(method),
        "tokens": {"before": unpruned.kept, "after": pruned.kept, "text": job.text_tokens, "spans": spans},
        "layers": {"before": list(unpruned.layers), "after": list(pruned.layers)},
        "equivalent_tokens": {"before": unpruned.equivalent, "after": pruned.equivalent},
        "flops": {"before": unpruned.to_dict()["flops"], "after": pruned.to_dict()["flops"]},
        "flops_by_part": {
            when: arm.cost and arm.cost.to_dict() for when, arm in (("before", unpruned), ("after", pruned))
        },
        "kv_bytes": {"before": unpruned.kv_bytes, "after": pruned.kv_bytes},
        "seconds": {"before": unpruned.seconds, "after": pruned.seconds},
        "kept": [span.kept.tolist() for span in pruned.selection],
    }
    if others:
        data["compare"] = [arm.to_dict() for arm in (unpruned, pruned, *others)]
    return data
