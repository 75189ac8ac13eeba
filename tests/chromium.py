"""The browser that tests look at pages in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Browser, Page, Playwright, sync_playwright

NAMES = (
    "chromium",
    "chromium-browser",
    "chromium-headless-shell",
    "google-chrome",
    "google-chrome-stable",
)
# Debian's, the smaller first.
PACKAGES = ("chromium-headless-shell", "chromium")
ARGUMENTS = (
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


def find_chromium(playwright: Playwright) -> str | None:
    """$CHROMIUM, one that is on the path, or playwright's own; None if there is none."""
    if chosen := os.environ.get("CHROMIUM"):
        return chosen
    for name in NAMES:
        if found := shutil.which(name):
            return found
    own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def launch(playwright: Playwright) -> Browser:
    """A headless Chromium."""
    executable = find_chromium(playwright)
    assert executable, "no Chromium: run `make test`, or set $CHROMIUM"
    # Chromium has no sandbox for root
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    return playwright.chromium.launch(
        executable_path=executable,
        args=[*ARGUMENTS, *(["--no-sandbox"] if is_root else [])],
    )


class Visit(NamedTuple):
    """An open page, with the browser's complaints and requests."""

    page: Page
    complaints: list[str]
    requests: list[str]


def visit(browser: Browser, file: Path, **device: Any) -> Visit:
    """Open a page, offline."""
    context = browser.new_context(offline=True, **device)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    return Visit(page, complaints, requests)


def _install() -> str | None:
    """Try the ways to a Chromium, and say which one there is then."""
    for command in _ways():
        print("Installing Chromium for the tests:", " ".join(command), flush=True)
        subprocess.run(command, stdin=subprocess.DEVNULL, check=False)
        with sync_playwright() as playwright:
            if found := find_chromium(playwright):
                return found
    return None


def _ways() -> list[list[str]]:
    ways: list[list[str]] = []
    root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if shutil.which("apt-get") and (not root or shutil.which("sudo")):
        apt = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
        ways.append([*apt, "update"])
        ways += [
            [*apt, "install", "-y", "--no-install-recommends", package]
            for package in PACKAGES
        ]
    # downloads it, for this user alone
    return [*ways, [sys.executable, "-m", "playwright", "install", "chromium"]]


def main() -> None:
    """Install Chromium unless there is one."""
    with sync_playwright() as playwright:
        found = find_chromium(playwright)
    if not found and not _install():
        sys.exit(
            "The tests of HTML pages need Chromium, and it could not be "
            "installed. Install it (Debian: apt install chromium) or Google Chrome, and "
            "set CHROMIUM=/path/to/it if it is not on the PATH."
        )


if __name__ == "__main__":
    main()
