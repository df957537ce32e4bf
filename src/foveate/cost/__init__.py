"""Costs from a configuration alone: true FLOPs by part, bytes of the KV cache, and the papers' formulas by name."""

from foveate.cost.anatomy import anatomy_of
from foveate.cost.flops import Cost, Patches, decode_flops, kv_bytes, prefill_flops, probe_flops, vision_layers
from foveate.cost.formulas import FORMULAS, equivalent_tokens, fastv, pyramiddrop
from foveate.cost.work import Work, work_of

__all__ = [
    "FORMULAS", "Cost", "Patches", "Work", "anatomy_of", "decode_flops", "equivalent_tokens", "fastv", "kv_bytes",
    "prefill_flops", "probe_flops", "pyramiddrop", "vision_layers", "work_of",
]  # fmt: skip
