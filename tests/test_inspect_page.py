"""The page of `saelens-scaffold inspect`, viewed in a browser."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page
from pydantic import TypeAdapter

from chromium import Visit, visit
from eval_helpers import eval_sae
from saelens_scaffold.evals.tokens import TokenSelection
from saelens_scaffold.inspect.output import Inspection
from saelens_scaffold.inspect.page import CHUNK, page, write_page
from saelens_scaffold_cli import main

HOSTILE = "<script>window.hacked = true</script>"
# Each token that needs care, and how it looks where it stands alone.
SHOWN = {
    HOSTILE: None,
    "</script><script>window.hacked = true</script>": None,
    "<!--<script>": "<!--<script>",
    "<img src=x onerror='window.hacked = true'>": None,
    "a\u2028b": "aU+2028b",
    "\u200b": "U+200B",
    "\u202eevil": "U+202Eevil",
    "\ufeff\x00\x7f": "U+FEFFU+0000U+007F",
    "\ud800": "U+D800",
    "\u0301": "◌\u0301",
    "\u3164": "U+3164",
    "\n": "↵",
    "\n        ": "↵␣×8",
    "\t": "→",
    "\r\n": "␍↵",
    " self": "␣self",
    "": "empty",
    "constructor": "constructor",
    "שלום": "שלום",
}
TOKENS = [*SHOWN, *(f" word{i}" for i in range(60)), "Import", " import"]
PLAIN, SCAFFOLD = f"plain/{HOSTILE}", "scaffold #1 100%"
RANK, D_SAE, N_TOKENS = 3, 300, 10_000
SEQ = 32


def make_inspection() -> dict[str, Any]:
    """A plain SAE and one with a scaffold, as in inspect.json."""
    rng = np.random.default_rng(0)
    plain, scaffold = _sae(rng, PLAIN, 0), _sae(rng, SCAFFOLD, RANK)
    scaffold["scaffold"] = _scaffold(rng)
    plain["n_dense"], plain["dense"] = 3, [_dense(rng, 7), _dense(rng, 9)]
    plain["dense"][1].update(antipode=None, successor=None, label="unexplained")
    alive = [np.array(sae["latents"]["frequency"]) > 0 for sae in (plain, scaffold)]
    nearest = rng.permutation(D_SAE - RANK)[: D_SAE - RANK].tolist() + [0] * RANK
    matched = [
        bool(alive[0][i] and alive[1][of] and i % 3 == 0 and i < D_SAE - RANK)
        for i, of in enumerate(nearest)
    ]
    partners = {
        of for of, is_matched in zip(nearest, matched, strict=True) if is_matched
    }
    found = {
        "model_name": f"py-neox {HOSTILE}",
        "hook_name": "blocks.2.hook_resid_post",
        "dataset": f"python-stdlib {HOSTILE}",
        "dataset_split": "test",
        "selection": TokenSelection(context_size=SEQ),
        "n_tokens": N_TOKENS,
        "n_sequences": 320,
        "n_sample_tokens": 1000,
        "n_removal_tokens": 800,
        "cross_entropy": 2.35,
        "variance_shares": [0.5 / (i + 1) for i in range(16)],
        "predictors": ["position", "topic", "token"],
        "topics": [HOSTILE, "xml"],
        "tokens": TOKENS,
        "saes": [plain, scaffold],
        "pairs": [
            {
                "first": 0,
                "second": 1,
                "nearest": [of + RANK for of in nearest],
                "cosine": rng.uniform(0.1, 1, D_SAE).tolist(),
                "correlation": rng.uniform(-1, 1, D_SAE).tolist(),
                "matched": matched,
                "gone": [i for i in range(D_SAE) if alive[0][i] and not matched[i]],
                "new": [
                    i + RANK
                    for i in range(D_SAE - RANK)
                    if alive[1][i] and i not in partners
                ],
            }
        ],
        "key": {"versions": {"torch": "2"}},
    }
    adapter = TypeAdapter(Inspection)
    return adapter.dump_python(adapter.validate_python(found))


def _ids(rng: np.random.Generator, n: int) -> list[int]:
    return rng.integers(0, len(TOKENS), n).tolist()


def _weighted(rng: np.random.Generator, n: int = 10) -> list[tuple[int, float]]:
    values = sorted(rng.uniform(-9, 9, n).tolist(), reverse=True)
    return list(zip(_ids(rng, n), values, strict=True))


def _context(rng: np.random.Generator, sign: int = 1) -> dict[str, Any]:
    values = (sign * rng.integers(0, 120, 24)).tolist()
    values[15] = sign * 127
    return {
        "sequence": int(rng.integers(0, 320)),
        "position": 20,
        "peak": 15,
        "tokens": _ids(rng, 24),
        "values": values,
    }


def _sae(rng: np.random.Generator, name: str, rank: int) -> dict[str, Any]:
    n = D_SAE - rank
    frequency = [0.0 if i % 4 == 3 else float(rng.uniform(0, 0.3)) for i in range(n)]
    return {
        "name": name,
        "architecture": "jumprelu",
        "d_sae": D_SAE,
        "l0_sparse": 12.4,
        "scaffold": None,
        "n_dense": 0,
        "dense": [],
        "latents": {
            "index": list(range(rank, D_SAE)),
            "frequency": frequency,
            "mean": rng.uniform(1, 2, n).tolist(),
            "scale": [127.0 if i == 0 else float(rng.uniform(2, 9)) for i in range(n)],
            "share_in_scaffold": rng.uniform(0, 1, n).tolist() if rank else None,
            "first_bin": [2] * n,
            "histogram": [[40, 0, 7] if f else [] for f in frequency],
            "promoted": [_weighted(rng) for _ in frequency],
            "suppressed": [_weighted(rng) for _ in frequency],
            "contexts": [
                [_context(rng) for _ in range(3)] if f else [] for f in frequency
            ],
        },
    }


def _scaffold(rng: np.random.Generator) -> dict[str, Any]:
    shares = {"position": 0.1, "topic": -0.02, "token": 0.62}
    directions = [
        {
            "vector": [1.0, 0.0],
            "variance": 9.0 - i,
            "share_of_scaffold": (0.5, 0.3, 0.2)[i],
            "share_of_variance": 0.3 - 0.1 * i,
            "label": "mostly identity of the token (R² 0.62)" if i else "unexplained",
            "r_squared": shares,
            "removal": _removal(0.15 * i),
            "principal_component": i,
            "cosine": 0.9,
            "dimensions": [(3, 0.5), (1, -0.25)],
            "promoted": _weighted(rng),
            "suppressed": _weighted(rng),
            "histogram": rng.integers(0, 500, 48).tolist(),
            "scale": 254.0,
            "high": [_context(rng) for _ in range(4)],
            "low": [_context(rng, -1) for _ in range(4)],
        }
        for i in range(RANK)
    ]
    of_positions = rng.uniform(0.1, 0.7, SEQ).tolist()
    return {
        "rank": RANK,
        "share_of_variance": 0.224,
        "overlap_with_pca": 0.689,
        "overlap_of_random": 0.03,
        "dimensions": [(3, 0.4), (1, 0.2)],
        "outlier_dimensions": [],
        "positions": {
            "n": [320] * SEQ,
            "share_of_variance": of_positions,
            "share_of_squares": of_positions,
            "share_of_total": [1 / SEQ] * SEQ,
        },
        "directions": directions,
    }


def _removal(increase: float) -> dict[str, Any]:
    tokens = [(0, 12, 0.5), (5, 3, 0.25)]
    entropy = 2.35 + increase
    return {"cross_entropy": entropy, "increase": increase, "kl": 0.1, "tokens": tokens}


def _dense(rng: np.random.Generator, latent: int) -> dict[str, Any]:
    return {
        "latent": latent,
        "label": "mostly position in the sequence (R² 0.58)",
        "r_squared": {"position": 0.58, "topic": 0.1, "token": 0.02},
        "removal": _removal(0.123),
        "antipode": {
            "latent": 1,
            "cosine_encoder": -0.5,
            "cosine_decoder": -0.6,
            "both_fire": 0.0,
            "both_if_independent": 0.01,
            "either_fires": 0.2,
        },
        "successor": {"sae": 1, "direction": 2, "cosine": -0.7, "correlation": -0.6},
    }


@pytest.fixture(scope="module")
def inspection() -> dict[str, Any]:
    return make_inspection()


@pytest.fixture(scope="module")
def file(inspection: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "inspect.html"
    write_page(inspection, path)
    return path


@pytest.fixture(scope="module")
def desktop(browser: Browser, file: Path) -> Visit:
    return visit(browser, file, viewport={"width": 1440, "height": 900})


@pytest.fixture(scope="module")
def phone(browser: Browser, file: Path) -> Visit:
    size = {"width": 390, "height": 844}
    return visit(browser, file, viewport=size, is_mobile=True, has_touch=True)


def go(page: Page, *parts: object) -> str:
    """Open a view by its address, and return its heading."""
    page.evaluate(
        "parts => { location.hash = parts.map(encodeURIComponent).join('/'); }",
        [str(part) for part in parts],
    )
    # the view follows the event that the browser sends
    page.evaluate("() => new Promise((resolve) => setTimeout(resolve))")
    return page.locator("#view h2").evaluate("h2 => h2.firstChild.data")


def listed(page: Page) -> list[int]:
    """Latents in the list that is shown."""
    return [int(text) for text in page.locator("#view tbody th a").all_text_contents()]


ADDRESSES = (
    ("scaffold",),
    ("direction", SCAFFOLD, 1),
    ("dense",),
    ("dictionary", SCAFFOLD),
    ("dictionary", PLAIN, "number"),
    ("latent", PLAIN, 7),
    ("latent", PLAIN, 0),
    ("latent", PLAIN, 3),
    ("latent", SCAFFOLD, RANK + 1),
    ("pair", 0),
    ("pair", 0, "gone"),
    ("pair", 0, "new"),
)


def test_every_view_without_network_or_complaint(desktop: Visit, file: Path):
    shown = [go(desktop.page, *address) for address in ADDRESSES]
    assert shown == [
        "The scaffold",
        "Direction 1",
        "Dense latents",
        "Dictionary",
        "Dictionary",
        "Latent 7",
        "Latent 0",
        "Latent 3",
        f"Latent {RANK + 1}",
        *["Side by side"] * 3,
    ]
    assert desktop.requests == [file.as_uri()]
    assert desktop.complaints == []
    assert "NaN" not in desktop.page.locator("main").inner_text()


def test_tokens_and_names_are_shown_and_never_run(
    desktop: Visit, inspection: dict[str, Any]
):
    page = desktop.page
    assert inspection["model_name"] in page.locator("h1").inner_text()
    seen: dict[str, str] = {}
    latents = inspection["saes"][0]["latents"]
    for row in range(0, 60, 4):
        go(page, "latent", PLAIN, row)
        assert PLAIN in page.locator("h2").inner_text()
        chips = page.locator(".chips .token").all_text_contents()
        weighted = latents["promoted"][row] + latents["suppressed"][row]
        assert len(chips) == len(weighted)
        for (token, _), text in zip(weighted, chips, strict=True):
            seen[TOKENS[token]] = text
    assert set(SHOWN) <= set(seen)
    for token, text in SHOWN.items():
        assert seen[token] == (text or token.replace(" ", "␣"))
    assert page.evaluate("window.hacked") is None
    assert page.locator("main img, main script").count() == 0
    assert desktop.complaints == []


def test_contexts_are_the_tokens_with_their_values(
    desktop: Visit, inspection: dict[str, Any]
):
    page, row = desktop.page, CHUNK + 4  # in the second chunk
    go(page, "latent", PLAIN, row)
    latents = inspection["saes"][0]["latents"]
    drawn = page.locator(".contexts li").evaluate_all(
        """items => items.map((item) => ({
            value: item.querySelector("b").textContent,
            tokens: [...item.querySelectorAll(".token")].map((token) => ({
                text: token.textContent,
                weight: Number(token.style.getPropertyValue("--weight")),
                peak: token.classList.contains("peak"),
            })),
        }))"""
    )
    assert len(drawn) == len(latents["contexts"][row]) == 3
    for item, context in zip(drawn, latents["contexts"][row], strict=True):
        assert float(item["value"]) == pytest.approx(latents["scale"][row], rel=0.01)
        weights = [token["weight"] for token in item["tokens"]]
        assert weights == pytest.approx([value / 127 for value in context["values"]])
        assert [token["peak"] for token in item["tokens"]].index(True) == context[
            "peak"
        ]
        for token, i in zip(item["tokens"], context["tokens"], strict=True):
            if TOKENS[i].startswith(" word"):
                assert token["text"] == TOKENS[i]


def expected_rows(
    inspection: dict[str, Any], sae: int, query: str, order: str = "frequency"
) -> list[int]:
    """Latents that a search shall find, in their order."""
    latents = inspection["saes"][sae]["latents"]
    found = []
    for i, latent in enumerate(latents["index"]):
        peaks = [c["tokens"][c["peak"]] for c in latents["contexts"][i]]
        tokens = peaks + [token for token, _ in latents["promoted"][i]]
        texts = [TOKENS[token].lower() for token in tokens]
        if any(query.lower() in text for text in texts) or str(latent) == query:
            frequency = latents["frequency"][i]
            by = latents["share_in_scaffold"][i] if order == "scaffold" else frequency
            found.append((frequency == 0, -by, latent))
    return [latent for *_, latent in (found if order == "number" else sorted(found))]


@pytest.mark.parametrize(
    "query", ["IMPORT", " word7", "<script", "42", "\u200b", "zzz"]
)
def test_search_finds_what_an_independent_computation_finds(
    desktop: Visit, inspection: dict[str, Any], query: str
):
    page = desktop.page
    go(page, "dictionary", SCAFFOLD)
    page.get_by_role("searchbox").fill(query)
    found = listed(page)
    while (following := page.get_by_role("link", name="next →")).count():
        following.click()
        found += listed(page)
    assert found == expected_rows(inspection, 1, query)
    status = page.get_by_role("status").inner_text()
    assert int(status.split(" ")[0]) == len(found)
    assert page.get_by_role("searchbox").input_value() == query


@pytest.mark.parametrize("order", ["frequency", "number", "scaffold"])
def test_the_dictionary_is_sorted(
    desktop: Visit, inspection: dict[str, Any], order: str
):
    page = desktop.page
    go(page, "dictionary", SCAFFOLD)
    page.get_by_label("Order by").select_option(order)
    expected = expected_rows(inspection, 1, "", order)
    assert listed(page) == expected[:50]
    # the latents beside one are those of the list
    page.get_by_role("link", name=str(expected[1]), exact=True).click()
    beside = page.get_by_label("Latents", exact=True).get_by_role("link")
    for link, latent in zip(beside.all(), (expected[0], expected[2]), strict=True):
        assert (link.get_attribute("href") or "").endswith(f"/{latent}")


def test_links_are_addresses_and_back_returns(browser: Browser, file: Path):
    opened = visit(browser, file, viewport={"width": 1280, "height": 600})
    page = opened.page
    # without an address, the first view
    assert page.locator("#view h2").inner_text() == "The scaffold"
    page.get_by_role("link", name="Dictionary").click()
    page.get_by_role("searchbox").fill("word1")
    link = page.locator("#view tbody th a").nth(30)
    link.scroll_into_view_if_needed()
    latent, scrolled = link.inner_text(), page.evaluate("scrollY")
    assert scrolled > 0
    link.click()
    assert page.locator("#view h2").inner_text().startswith(f"Latent {latent}")
    assert page.evaluate("scrollY") == 0
    assert page.title().startswith(f"Latent {latent} – ")
    address = page.url
    page.go_back()
    assert page.get_by_role("searchbox").input_value() == "word1"
    assert page.evaluate("scrollY") == pytest.approx(scrolled, abs=2)
    assert page.evaluate("document.activeElement.textContent") == latent
    page.goto("about:blank")
    page.goto(address)
    assert page.locator("#view h2").inner_text().startswith(f"Latent {latent}")
    assert opened.complaints == []


@pytest.mark.parametrize(
    "address",
    [
        "#latent/nobody/3",
        f"#latent/{SCAFFOLD[:8]}",
        "#latent/plain%2F%3Cscript%3Ewindow.hacked%20%3D%20true%3C%2Fscript%3E/length",
        "#direction/scaffold%20%231%20100%25/length",
        "#latent/%E0%A4%A",
        "#pair/7",
        "#pair/0/constructor",
    ],
)
def test_addresses_of_nothing_say_so(desktop: Visit, address: str):
    page = desktop.page
    page.evaluate("address => { location.hash = address; }", address)
    page.get_by_text("Not found").wait_for()
    page.evaluate("() => { location.hash = 'constructor'; }")
    page.get_by_role("heading", name="The scaffold").wait_for()
    assert desktop.complaints == []


def test_all_is_reached_by_keyboard(browser: Browser, file: Path):
    opened = visit(browser, file, viewport={"width": 1280, "height": 900})
    page = opened.page

    def focused() -> str:
        return page.evaluate("document.activeElement.textContent")

    texts = []
    for _ in range(5):
        page.keyboard.press("Tab")
        texts.append(focused())
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid"
    assert texts == page.locator("#views a").all_text_contents()
    page.locator("#views a", has_text="Dictionary").focus()
    page.keyboard.press("Enter")
    page.get_by_role("searchbox").wait_for()
    assert page.locator("#views [aria-current]").all_text_contents() == ["Dictionary"]
    assert focused() == "Dictionary"  # the heading, where a screen reader goes on
    while page.evaluate("document.activeElement.type") != "search":
        page.keyboard.press("Tab")
    page.keyboard.type("word")
    latents = listed(page)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert focused() == str(latents[1])
    page.keyboard.press("ArrowUp")
    assert focused() == str(latents[0])
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=f"Latent {latents[0]}").wait_for()
    names = page.locator("#view [role=img]").evaluate_all(
        "all => all.map((one) => one.getAttribute('aria-label'))"
    )
    assert names and all(names)
    assert opened.complaints == []


def test_dense_latents_stand_beside_partner_and_successor(
    desktop: Visit, inspection: dict[str, Any]
):
    page = desktop.page
    go(page, "dense")
    row = page.locator("#view tbody tr").first
    text = row.inner_text()
    for part in ("latent 7", "mostly position", "+0.123", "latent 1", "−0.60"):
        assert part in text
    assert "direction 2" in text
    assert page.get_by_text("2 of them are explained").count() == 1
    page.get_by_role("link", name="latent 7").click()
    bars = page.locator(".bars .number").all_text_contents()
    assert bars == ["0.58", "0.10", "0.02"]
    costs = page.locator("section", has=page.get_by_text("Tokens that become harder"))
    assert costs.locator("tbody tr").count() == 2
    assert "+0.123 nats" in page.locator(".facts").inner_text()
    # a negative correlation is shown with the direction's negative end
    follower = page.locator("section", has=page.get_by_text("Scaffold direction that"))
    values = follower.locator(".contexts b").all_text_contents()
    assert values == ["−254"] * 4


def test_side_by_side_counts_each_alive_latent_once(
    desktop: Visit, inspection: dict[str, Any]
):
    page, (pair,) = desktop.page, inspection["pairs"]
    for kind, sae, latents in (
        ("matched", 0, [i for i, is_so in enumerate(pair["matched"]) if is_so]),
        ("gone", 0, pair["gone"]),
        ("new", 1, pair["new"]),
    ):
        go(page, "pair", 0, kind)
        of = inspection["saes"][sae]["latents"]
        rank = of["index"][0]
        order = sorted(latents, key=lambda i: -of["frequency"][i - rank])
        texts = page.locator("#view tbody th").all_text_contents()
        assert texts == [f"latent {i}" for i in order[:50]]
        assert page.get_by_text(f"{len(latents)} {kind}").count() == 1
    # the match of a latent names it in turn
    first = pair["matched"].index(True)
    go(page, "latent", SCAFFOLD, pair["nearest"][first])
    facts = page.locator(".facts").inner_text()
    assert f"latent {first}\n" in facts and "matches" in facts


def test_phone_reads_without_sideways_scrolling(phone: Visit):
    page = phone.page
    for address in ADDRESSES:
        go(page, *address)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= page.evaluate("innerWidth") == 390, address
    assert phone.complaints == []


def test_dark_pages_are_dark_with_light_text(phone: Visit):
    page = phone.page
    page.emulate_media(color_scheme="dark")
    look = page.locator("body").evaluate(
        "body => [getComputedStyle(body).backgroundColor, getComputedStyle(body).color]"
    )
    background, text = (max(map(int, re.findall(r"\d+", of))) for of in look)
    assert background < 50 and text > 200


def test_scripts_are_the_page_s_own(desktop: Visit):
    page = desktop.page
    blocked = page.evaluate(
        """async () => {
            const script = document.createElement("script");
            script.text = "window.hacked = true";
            document.body.append(script);
            const failed = await fetch("https://example.org/").then(() => 0, () => 1);
            return [failed, window.hacked];
        }"""
    )
    assert blocked == [1, None]
    desktop.complaints.clear()


def test_one_plain_sae_without_lens_makes_a_page(browser: Browser, tmp_path: Path):
    found = make_inspection()
    del found["saes"][1]
    (sae,) = found["saes"]
    sae["dense"][0]["successor"] = None
    sae["latents"]["promoted"] = sae["latents"]["suppressed"] = [[]] * D_SAE
    found["pairs"] = []
    write_page(found, tmp_path / "plain.html")
    opened = visit(browser, tmp_path / "plain.html")
    page = opened.page
    views = page.locator("#views a").all_text_contents()
    assert views == ["Dictionary", "Dense latents"]
    assert page.locator("#view h2").inner_text() == "Dictionary"
    assert go(page, "dense") == "Dense latents"
    assert go(page, "latent", PLAIN, 7) == "Latent 7"
    assert page.get_by_text("Not known").count() == 2
    assert opened.complaints == []


def test_the_command_writes_the_page(browser: Browser, tmp_path: Path):
    paths = [tmp_path / "plain", tmp_path / "scaffold"]
    eval_sae(d_sae=40).save_model(paths[0])
    eval_sae(rank=2, d_sae=40).save_model(paths[1])
    command = ["inspect", *map(str, paths), "--text", "python-stdlib"]
    command += ["--out", str(tmp_path / "out"), "--n_tokens", "2500"]
    assert main([*command, "--n_removal_tokens", "500"]) == 0
    opened = visit(browser, tmp_path / "out/inspect.html")
    for view in ("scaffold", "direction", "dense", "dictionary", "pair"):
        go(opened.page, view)
        assert opened.page.locator("#views [aria-current]").count() == 1
    go(opened.page, "dictionary", "scaffold")
    opened.page.locator("#view tbody th a").first.click()
    assert opened.page.locator(".contexts li").count() > 0
    assert opened.complaints == []


def test_page_holds_the_data_once_and_is_made_from_json(inspection: dict[str, Any]):
    html = page(inspection)
    as_json = json.loads(json.dumps(inspection))
    assert page(as_json) == html
    embedded = dict(
        re.findall(
            r'<script type="application/json" id="([\w-]+)">(.*?)</script>', html
        )
    )
    chunks = -(-D_SAE // CHUNK)
    assert len(embedded) == 1 + 2 * chunks
    shown = json.loads(embedded["inspection"])
    assert shown["tokens"] == TOKENS
    assert "key" not in shown
    contexts = [json.loads(embedded[f"contexts-0-{chunk}"]) for chunk in range(chunks)]
    of_all = [latent for chunk in contexts for latent in chunk]
    first = inspection["saes"][0]["latents"]["contexts"][0][0]
    assert of_all[0][0] == list(first.values())
    assert len(of_all) == D_SAE


def test_a_failure_leaves_the_old_page_alone(
    inspection: dict[str, Any], tmp_path: Path
):
    path = tmp_path / "inspect.html"
    write_page(inspection, path)
    before = path.read_bytes()
    broken = copy.deepcopy(inspection)
    del broken["saes"][0]["latents"]["contexts"]
    with pytest.raises(KeyError):
        write_page(broken, path)
    assert path.read_bytes() == before
