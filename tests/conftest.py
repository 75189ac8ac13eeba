import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Nothing that a test does may reach a hub: what loads, loads from local files.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# The tests' tensors are small: threads cost more than they bring, and pytest-xdist uses
# the other cores. Set before torch is imported, and inherited by subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"

from importlib.util import find_spec  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Without a GPU, Triton's kernels run where Triton interprets them, which it must know
# when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Without the extra [bench], as where there are no wheels of numpy < 2, tests that need
# SAEBench are left out: modules that are about it, and what is marked `sae_bench`.
HAS_SAE_BENCH = find_spec("sae_bench") is not None
if not HAS_SAE_BENCH:
    collect_ignore = ["test_probing_evals.py", "test_sae_bench.py", "test_sae_forms.py"]

# Files that take longest, in this order, begin first, so that with `--dist loadfile
# --no-loadscope-reorder` the workers end at about the same time.
LONGEST = ("cluster", "sharded_training", "demo", "readme", "compare", "probing_evals")
LONGEST += ("tutorials", "gpu_check", "sae_bench", "scaffold_ablation", "sharding")


def _place(item: pytest.Item) -> int:
    name = item.path.stem.removeprefix("test_")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    items.sort(key=_place)
    if HAS_SAE_BENCH:
        return
    left_out = [item for item in items if item.get_closest_marker("sae_bench")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A headless Chromium, which `make test` installs."""
    from playwright.sync_api import sync_playwright

    from chromium import launch

    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()
