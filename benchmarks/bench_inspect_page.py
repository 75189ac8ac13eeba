"""
Size and speed of the page of `saelens-scaffold inspect`, in headless Chromium.

SAEs of any number of latents, all alive, are made from an inspection by repeating its alive
latents; they keep as many contexts as `inspect` would. Opening is the time from navigation
until the first view has been laid out; a search, the longest of several from input until its
results have been laid out.

    python benchmarks/bench_inspect_page.py inspect-output/inspect.json --latents 2048 16384
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from saelens_scaffold._util.files import temporary_folder
from saelens_scaffold.inspect.page import write_page
from saelens_scaffold.inspect.sums import ALL_CONTEXTS_BYTES, CONTEXT_BYTES, N_CONTEXTS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chromium import launch, visit

QUERIES = ("import", "e", " self", "1", "nothing promotes this")
SEARCH = """(queries) => {
    const input = document.querySelector("input[type=search]");
    const times = [];
    for (const query of queries) {
        const start = performance.now();
        input.value = query;
        input.dispatchEvent(new Event("input"));
        document.body.getBoundingClientRect();
        times.push(performance.now() - start);
    }
    return Math.max(...times);
}"""
LATENT = """(address) => {
    const start = performance.now();
    history.pushState(null, "", "#" + address);
    render();
    document.body.getBoundingClientRect();
    return performance.now() - start;
}"""
OPENED = "performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"


def enlarge(inspection: dict[str, Any], n: int) -> dict[str, Any]:
    """The inspection of SAEs with n latents, all of them alive."""
    large = copy.deepcopy(inspection)
    budget = ALL_CONTEXTS_BYTES // (CONTEXT_BYTES * n * len(large["saes"]))
    n_contexts = max(1, min(N_CONTEXTS, budget))
    rows_of: list[list[int]] = []
    for sae in large["saes"]:
        latents = sae["latents"]
        rank = latents["index"][0]
        alive = [row for row, f in enumerate(latents["frequency"]) if f > 0]
        rows = list(islice(cycle(alive), n - rank))
        rows_of.append(rows)
        for name, column in latents.items():
            if column is not None:
                latents[name] = [column[row] for row in rows]
        latents["index"] = list(range(rank, n))
        latents["contexts"] = [of[:n_contexts] for of in latents["contexts"]]
        sae["n_dense"], sae["dense"] = 0, []
    for pair in large["pairs"]:
        for name in ("nearest", "cosine", "correlation", "matched"):
            pair[name] = [pair[name][row] for row in rows_of[pair["first"]]]
    return large


def measure(browser: Browser, file: Path, inspection: dict[str, Any]) -> list[float]:
    """Milliseconds to open the page, to search, and to show a latent."""
    opened = visit(browser, file, viewport={"width": 1440, "height": 900})
    page = opened.page
    opening = page.evaluate(OPENED)
    sae = inspection["saes"][-1]
    page.get_by_role("link", name="Dictionary").click()
    searching = page.evaluate(SEARCH, QUERIES)
    latent = sae["latents"]["index"][-1]
    address = page.evaluate("encodeURIComponent", sae["name"])
    showing = page.evaluate(LATENT, f"latent/{address}/{latent}")
    assert not opened.complaints, opened.complaints
    return [opening, searching, showing]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("inspection", type=Path, help="inspect.json")
    parser.add_argument("--latents", type=int, nargs="+", default=[2048])
    chosen = parser.parse_args(arguments)
    inspection = json.loads(chosen.inspection.read_text(encoding="utf-8"))
    print("| latents of each SAE | page, MB | opening, ms | search, ms | latent, ms |")
    print("|---|---|---|---|---|")
    with sync_playwright() as playwright, temporary_folder() as folder:
        browser = launch(playwright)
        for n in chosen.latents:
            large = enlarge(inspection, n)
            file = folder / "inspect.html"
            write_page(large, file)
            megabytes = file.stat().st_size / 1e6
            # the first visit also starts the browser's processes
            times = [measure(browser, file, large) for _ in range(4)][1:]
            shown = [f"{sorted(of)[1]:.0f}" for of in zip(*times, strict=True)]
            print(f"| {n:,} | {megabytes:.1f} | {' | '.join(shown)} |", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
