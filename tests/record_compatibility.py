"""Measures what `results/compatibility-callers.json` says: ``python tests/record_compatibility.py [family ...]``.

Per family whether logits with offloaded weights, and selections from three threads at once, equal those without, as
"equal", "differs", or the error; "stock fails" where `accelerate` cannot offload the model without foveate.
"""

import copy
import json
import sys
import threading
from pathlib import Path

import accelerate
import torch

import foveate
from tiny import FAMILIES, collate, make, model, samples

METHODS = ("vispruner", "downsample")
OUT = Path(__file__).parents[1] / "results" / "compatibility-callers.json"


def offloaded(family, method):
    net, inputs = copy.deepcopy(model(family)), collate(samples(family))
    reducer = make((method, {}), 9, family)
    with foveate.attach(net, reducer):
        expected = net(**inputs).logits
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    try:
        net(**inputs)
    except (RuntimeError, NotImplementedError):
        return "stock fails"
    with foveate.attach(net, reducer):
        return "equal" if torch.equal(net(**inputs).logits, expected) else "differs"


def threaded(family, method):
    net, inputs = model(family), collate(samples(family))
    reducer = make((method, {}), 9, family)

    def kept():
        return [span.kept.tolist() for span in foveate.reduce(net, inputs, reducer).selection]

    expected, found = kept(), []

    @torch.no_grad()
    def work():
        found.extend(kept() == expected for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return "equal" if len(found) == 9 and all(found) else "differs"


def measured(measure, family, method):
    try:
        return measure(family, method)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


if __name__ == "__main__":
    rows = json.loads(OUT.read_text()) if OUT.exists() else {}
    for family in sys.argv[1:] or FAMILIES:
        with torch.no_grad():
            rows[family] = {
                column: {method: measured(measure, family, method) for method in METHODS}
                for column, measure in (("offload", offloaded), ("threads", threaded))
            }
        OUT.write_text(json.dumps(rows, indent=1) + "\n")
