"""
HTML pages that need no network.

A page is a folder with page.html, which extends base.html, page.css and page.js. Its data
are embedded as JSON; its content security policy forbids any network access, and any script
but its own, whatever the data contain.
"""

import base64
import hashlib

from jinja2 import (
    ChoiceLoader,
    Environment,
    PackageLoader,
    StrictUndefined,
    select_autoescape,
)

PACKAGE = "saelens_scaffold"


def environment(folder: str) -> Environment:
    """
    The environment of a folder's templates; only those of HTML escape what they show.

    Args:
        folder: Its path within the package.
    """
    made = Environment(
        loader=ChoiceLoader(
            [PackageLoader(PACKAGE, of) for of in (folder, "_util/pages")]
        ),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters["csp_hash"] = _csp_hash
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return made


def _csp_hash(script: str) -> str:
    """Hash by which a content security policy allows a script."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
