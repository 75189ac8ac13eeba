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

import pytest  # noqa: E402
import torch  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Without a GPU, Triton's kernels run where Triton interprets them, which it must know
# when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A headless Chromium, which `make test` installs."""
    from playwright.sync_api import sync_playwright

    from chromium import launch

    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()
