"""The adapter to SAEBench: the only place that calls its evaluations.

`passthrough` runs SAEBench's evaluations as they are. `sparse_probing`,
`sparse_probing_sae_probes` and `tpp` run them `over_seeds`. What has to be replaced in
SAEBench and sae-probes for that is listed in `replacements`.
"""

import glob
import json
from pathlib import Path
from typing import Any


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """A result file anywhere below a folder; None if it is missing or incomplete."""
    for file in folder.rglob(glob.escape(name)):
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError:  # SAEBench was interrupted while it wrote the file
            return None
    return None
