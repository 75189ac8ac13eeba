"use strict";
// The views of the page, and their addresses.

// ---- the scaffold

function scaffoldView(name) {
  const sae = find(scaffolds, name);
  const { directions, positions, ...scaffold } = sae.scaffold;
  const { latents } = sae;
  const largest = Math.max(...directions.map((of) => of.share_of_scaffold));
  const rows = directions.map((of, i) => [
    directionLink(sae, i), of.label, share(of.share_of_scaffold, largest),
    signed(of.removal.increase), `${of.principal_component} (cosine ${fixed(of.cosine)})`]);
  const alive = latents.frequency.filter((frequency) => frequency > 0).length;
  const overlap = [fixed(scaffold.overlap_with_pca), `${fixed(scaffold.overlap_of_random)} at random`];
  return [
    heading("The scaffold"), saeChoice(scaffolds, "scaffold", sae),
    facts(
      ["Rank", scaffold.rank],
      ["Share of the activations’ variance", percent(scaffold.share_of_variance)],
      ["Overlap with the first principal components", ...overlap],
      ["Sparse latents", whole(latents.index.length), `${whole(alive)} alive`],
      ["Sparse latents per token", fixed(sae.l0_sparse, 1)],
      ["Dense latents", whole(sae.n_dense)]),
    part("Directions", table(["direction", "explained by", ["share of the scaffold’s variance"],
      ["nats without it"], "nearest principal component"], rows)),
    columns(spectrum(directions), byPosition(positions)),
    firstPositions(positions),
    columns(
      part("Dimensions it writes to most", dimensions(scaffold.dimensions)),
      part("Outlier dimensions of the activations", dimensions(scaffold.outlier_dimensions))),
  ];
}

function spectrum(directions) {
  const shares = directions.map((of) => of.share_of_variance);
  const principal = inspection.variance_shares.slice(0, shares.length);
  const top = Math.max(...shares, ...principal);
  const title = (i) =>
    `direction ${i}: ${percent(shares[i])}; principal component ${i}: ${percent(principal[i])}`;
  const steps = principal.map((value, i) => line([[i, value], [i + 1, value]], top, 1));
  const every = Math.ceil(shares.length / 12);
  const ticks = shares.map((_, i) => [i + 0.5, i]).filter(([, i]) => i % every === 0);
  return plot("Spectrum: share of the activations’ variance", percent(top), shares.length,
    [bars(shares, top, title), steps], ticks, ["direction", "principal component"]);
}

function byPosition({ share_of_variance: variance, share_of_squares: squares }) {
  const place = (position) => Math.log2(position + 1);
  const top = Math.max(...variance, ...squares);
  const lines = [variance, squares].map((of, i) =>
    line(of.map((value, position) => [place(position), value]), top, i));
  const powers = [...Array(20).keys()].map((i) => 2 ** i - 1);
  const ticks = powers.filter((i) => i < variance.length).map((i) => [place(i), i]);
  const label = "What the scaffold carries at each position of the sequence";
  const width = Math.max(1, place(variance.length - 1));
  return plot(label, percent(top), width, lines, ticks, ["share of the variance", "share of ‖x‖²"]);
}

function firstPositions({ share_of_total: total, share_of_squares: squares }) {
  const first = total.slice(1, 8);
  const sum = first.reduce((a, b) => a + b, 0);
  return h("p", {}, `Position 0 has ${percent(total[0])} of the scaffold’s ‖s‖² over all positions, `,
    `and positions 1 to ${first.length} have ${percent(sum)}; an even share would be `,
    `${percent(1 / total.length)} each. At position 0 the scaffold is ${percent(squares[0])} of ‖x‖².`);
}

function dimensions(weighted) {
  if (!weighted.length) return quiet("There is none.");
  const largest = Math.max(...weighted.map(([, value]) => value));
  const rows = weighted.map(([i, value]) => [String(i), share(value, largest)]);
  return table(["dimension", ["share in the scaffold"]], rows);
}

function directionView(name, index = "0") {
  const sae = find(scaffolds, name);
  const { directions } = sae.scaffold;
  const of = directions[Number(index)] ?? missing(`${sae.name} has no direction ${index}.`);
  const { removal } = of;
  const edge = (bin) => fixed((bin - of.histogram.length / 2) * inspection.bin_width, 0);
  const components = of.dimensions.map(([i, value]) => [String(i), fixed(value, 3)]);
  return [
    heading(`Direction ${index}`, of.label), saeChoice(scaffolds, "direction", sae),
    choice("Directions", directions.map((other, i) =>
      option(["direction", sae.name, i], String(i), other === of))),
    facts(
      ["Share of the scaffold’s variance", percent(of.share_of_scaffold)],
      ["Share of the activations’ variance", percent(of.share_of_variance)],
      lossWithout(removal),
      ["Nearest principal component", of.principal_component, `cosine ${fixed(of.cosine)}`]),
    columns(explained(of.r_squared),
      histogram("Coordinate, in standard deviations from its mean", of.histogram, edge, 8)),
    columns(part("Positive end", contextList(of.high, of.scale)),
      part("Negative end", contextList(of.low, of.scale))),
    columns(part("Promoted by the positive end", weightedChips(of.promoted)),
      part("Promoted by the negative end", weightedChips(of.suppressed))),
    columns(
      costs(removal),
      part("Dimensions it writes to most", table(["dimension", ["component"]], components))),
  ];
}

const lossWithout = ({ increase, kl }) =>
  ["Loss without it", `${signed(increase)} nats`, `KL ${fixed(kl, 3)} nats`];

function costs(removal) {
  const rows = removal.tokens.map(([id, n, mean]) => [
    loneToken(id), whole(n), signed(mean), fixed(n * mean, 1)]);
  return part("Tokens that become harder to predict without it",
    table(["next token", ["predictions"], ["mean, nats"], ["in total"]], rows));
}

// ---- dense latents

function denseView() {
  const heads = ["latent", ["fires on"], "explained by", ["nats without it"], "strongest on",
    "antipodal partner", "scaffold direction that follows it most"];
  const shown = saes.map((sae) => {
    const rows = sae.dense.map((of) => {
      const row = rowOf(sae, of.latent);
      return [latentLink(sae, of.latent), percent(sae.latents.frequency[row]), of.label,
        signed(of.removal.increase), strongest(sae, row, 3), antipode(sae, of), successor(of)];
    });
    const isAll = sae.n_dense === rows.length;
    return part(`${sae.name}: ${whole(sae.n_dense)}`,
      sae.n_dense ? !isAll && quiet(`${rows.length} of them are explained.`) : quiet("There is none."),
      rows.length > 0 && table(heads, rows));
  });
  return [heading("Dense latents", inspection.dense), shown];
}

function antipode(sae, { antipode: of }) {
  if (!of) return "none";
  const both = sae.latents.frequency[rowOf(sae, of.latent)]
    ? `both fire on ${percent(of.both_fire)}, ${percent(of.both_if_independent)} if independent`
    : "dead";
  const cosines = `cosines ${fixed(of.cosine_encoder)} and ${fixed(of.cosine_decoder)}`;
  return [latentLink(sae, of.latent), " ", h("small", {}, `${cosines}; ${both}`)];
}
const successor = ({ successor: of }) =>
  !of ? "none" : [directionLink(saes[of.sae], of.direction), " ",
    h("small", {}, `correlation ${fixed(of.correlation)}, cosine ${fixed(of.cosine)}`)];
const strongest = (sae, row, n) => chips(sae.latents.strongest[row].slice(0, n));

// ---- the dictionary

// Latents are known by their row: that of latent `rank` is 0.
const rowOf = (sae, latent) => latent - sae.latents.index[0];
const ORDERS = {
  frequency: "firing frequency",
  number: "number",
  scaffold: "share in the scaffold",
};
const lastRows = new Map();
const lowered = tokens.map((token) => token.toLowerCase());

// Rows in some order, dead latents last, and which tokens have the text that was searched for.
function search(sae, order, query) {
  const { index, frequency, share_in_scaffold: inScaffold, promoted, strongest } = sae.latents;
  const text = query.toLowerCase();
  const isFound = text ? lowered.map((token) => token.includes(text)) : [];
  const matches = (row) =>
    !text || String(index[row]) === text ||
    strongest[row].some((id) => isFound[id]) || promoted[row].some(([id]) => isFound[id]);
  const rows = [...index.keys()].filter(matches);
  const column = order === "scaffold" ? inScaffold ?? frequency : frequency;
  const before = (a, b) =>
    (frequency[b] > 0) - (frequency[a] > 0) || column[b] - column[a] || a - b;
  if (order !== "number") rows.sort(before);
  lastRows.set(sae, rows);
  return { rows, isFound };
}

function dictionaryView(name, order = "frequency", pageNumber = "0", query = "") {
  const sae = find(saes, name);
  const state = { order, query, page: Number(pageNumber) || 0 };
  const parts = (page) => ["dictionary", sae.name, state.order, page, state.query];
  const status = h("p", { role: "status", class: "quiet" });
  const results = h("div", { onkeydown: move });
  const options = Object.entries(ORDERS)
    .filter(([of]) => of !== "scaffold" || sae.latents.share_in_scaffold)
    .map(([of, text]) => h("option", { value: of, selected: of === order && "" }, text));
  const input = h("input", { type: "search", placeholder: "token or number", autocomplete: "off",
    spellcheck: "false", oninput: change("query"), onkeydown: move });
  input.value = query;

  function show() {
    const { rows, isFound } = search(sae, state.order, state.query);
    const dead = rows.filter((row) => !sae.latents.frequency[row]).length;
    status.replaceChildren(`${whole(rows.length)} latents, ${whole(dead)} of them dead`);
    results.replaceChildren(latentTable(sae, onPage(rows, state.page), isFound),
      pager(rows.length, state.page, parts));
    history.replaceState(history.state, "", address(...parts(state.page)));
  }
  function change(field) {
    return (event) => {
      Object.assign(state, { [field]: event.target.value, page: 0 });
      show();
    };
  }
  // arrow keys go through the list, which starts at the search
  function move(event) {
    const stops = [input, ...results.querySelectorAll("th a")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const next = step && stops[stops.indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    next.focus();
  }
  show();
  return [
    heading("Dictionary"), saeChoice(saes, "dictionary", sae),
    h("div", { class: "search", role: "search" },
      h("label", {}, "Fires on or promotes ", input),
      h("label", {}, "Order by ", h("select", { onchange: change("order") }, options))),
    status, results,
  ];
}

function latentTable(sae, rows, isFound) {
  const { index, frequency, share_in_scaffold: inScaffold, promoted, strongest } = sae.latents;
  const few = (ids) => {
    const found = [...ids].sort((a, b) => (isFound[b] ?? 0) - (isFound[a] ?? 0));
    return chips(found.slice(0, 4), undefined, isFound);
  };
  return table(["latent", ["fires on"], [inScaffold && "in the scaffold"], "strongest on", "promotes"],
    rows.map((row) => [
      link(["latent", sae.name, index[row]], String(index[row])),
      frequency[row] ? percent(frequency[row]) : "dead",
      inScaffold && percent(inScaffold[row]),
      few(strongest[row]),
      few(promoted[row].map(([id]) => id))]));
}

function latentView(name, latent) {
  const sae = find(saes, name);
  const { latents } = sae;
  const row = rowOf(sae, Number(latent));
  if (!(row in latents.index)) missing(`${sae.name} has no sparse latent ${latent}.`);
  const rows = lastRows.get(sae) ?? search(sae, "frequency", "").rows;
  const neighbour = (step, text) => {
    const other = rows[rows.indexOf(row) + step];
    return other !== undefined && link(["latent", sae.name, latents.index[other]], text);
  };
  const frequency = latents.frequency[row];
  const fired = Math.round(frequency * inspection.n_tokens);
  const counts = latents.histogram[row];
  const edge = (bin) => number(2 ** ((latents.first_bin[row] + bin) / 2), 2);
  const dense = sae.dense.find((of) => of.latent === latents.index[row]);
  const logits = [part("Promoted", weightedChips(latents.promoted[row])),
    part("Suppressed", weightedChips(latents.suppressed[row]))];
  const activation = frequency > 0 &&
    histogram("Activation where it fires", counts, edge, Math.ceil(counts.length / 8));
  return [
    heading(`Latent ${latent}`, `${dense ? `dense, ${dense.label}; ` : ""}of ${sae.name}`),
    choice("Latents", [neighbour(-1, "← previous"), neighbour(1, "next →")]),
    facts(
      ["Fires on", frequency ? percent(frequency) : "nothing: dead",
        frequency > 0 && `${whole(fired)} of ${whole(inspection.n_tokens)} tokens`],
      frequency && ["Mean where it fires", number(latents.mean[row]),
        `at most ${number(latents.scale[row])}`],
      latents.share_in_scaffold && ["Share in the scaffold", percent(latents.share_in_scaffold[row])],
      dense && lossWithout(dense.removal),
      ...pairs.map((pair) => counterpart(pair, sae, row))),
    columns(dense && explained(dense.r_squared), activation, dense ? [] : h("div", {}, logits)),
    frequency > 0 &&
      part("Strongest contexts", contextList(contextsOf(sae, row), latents.scale[row])),
    dense && [columns(logits, costs(dense.removal)), columns(besideDense(sae, dense))],
  ];
}

function besideDense(sae, dense) {
  const { antipode: opposite, successor: follower } = dense;
  const shown = [];
  if (opposite) {
    const row = rowOf(sae, opposite.latent);
    const contexts = contextsOf(sae, row).slice(0, 5);
    shown.push(part("Antipodal partner", h("p", {}, antipode(sae, dense)),
      contextList(contexts, sae.latents.scale[row])));
  }
  if (follower) {
    const of = saes[follower.sae].scaffold.directions[follower.direction];
    const end = follower.correlation < 0 ? of.low : of.high;
    shown.push(part("Scaffold direction that follows it most", h("p", {}, successor(dense)),
      contextList(end.slice(0, 5), of.scale)));
  }
  return shown;
}

// ---- side by side

// What a latent is in the other SAE of a pair, as a fact.
function counterpart(pair, sae, row) {
  const [first, second] = [saes[pair.first], saes[pair.second]];
  const latent = sae.latents.index[row];
  const note = (at) =>
    `${pair.matched[at] ? "matches" : "nearest, no match"}: cosine ${fixed(pair.cosine[at])}`;
  if (sae === first)
    return [`In ${second.name}`, latentLink(second, pair.nearest[row]), note(row)];
  if (sae !== second) return undefined;
  const at = pair.nearest.findIndex((of, i) => of === latent && pair.matched[i]);
  if (at < 0) return [`In ${first.name}`, "no match"];
  return [`In ${first.name}`, latentLink(first, first.latents.index[at]), note(at)];
}

function pairView(index = "0", kind = "matched", pageNumber = "0") {
  const pair = pairs[Number(index)] ?? missing("There is no such pair of SAEs.");
  const [first, second] = [saes[pair.first], saes[pair.second]];
  const lists = new Map([
    ["matched", [...pair.matched.keys()].filter((row) => pair.matched[row])],
    ["gone", pair.gone.map((latent) => rowOf(first, latent))],
    ["new", pair.new.map((latent) => rowOf(second, latent))]]);
  const isPaired = kind !== "new";
  const sae = isPaired ? first : second;
  const frequency = (of, row) => of.latents.frequency[row];
  const rows = [...(lists.get(kind) ?? missing("Latents are matched, gone or new."))]
    .sort((a, b) => frequency(sae, b) - frequency(sae, a));
  const page = Number(pageNumber) || 0;
  const beside = (row) => {
    const other = pair.nearest[row];
    return [latentLink(second, other), percent(frequency(second, rowOf(second, other))),
      fixed(pair.cosine[row]), fixed(pair.correlation[row])];
  };
  const cells = onPage(rows, page).map((row) => [
    latentLink(sae, sae.latents.index[row]), percent(frequency(sae, row)), strongest(sae, row, 4),
    ...(isPaired ? beside(row) : [])]);
  const heads = ["latent", ["fires on"], "strongest on",
    isPaired && (kind === "gone" ? "nearest" : "match"), [isPaired && "which fires on"],
    [isPaired && "cosine"], [isPaired && "correlation"]];
  return [
    heading("Side by side"),
    pairs.length > 1 && choice("Pairs", pairs.map((of, i) =>
      option(["pair", i], saes[of.second].name, of === pair))),
    h("p", {}, "Latents of ", h("b", {}, first.name), " and of ", h("b", {}, second.name),
      ", most frequent first."),
    choice("Which latents", [...lists].map(([of, all]) =>
      option(["pair", index, of], `${whole(all.length)} ${of}`, of === kind))),
    table(heads, cells),
    pager(rows.length, page, (at) => ["pair", index, kind, at]),
  ];
}

// ---- views and their addresses

const views = new Map([
  ...(scaffolds.length ? [["scaffold", [scaffoldView, "Scaffold"]]] : []),
  ...(scaffolds.length ? [["direction", [directionView, "Directions"]]] : []),
  ["dictionary", [dictionaryView, "Dictionary"]],
  ["dense", [denseView, "Dense latents"]],
  ...(pairs.length ? [["pair", [pairView, "Side by side"]]] : []),
  ["latent", [latentView]],
]);

class Missing extends Error {}
function missing(text) {
  throw new Missing(text);
}
const find = (among, name) =>
  (name === undefined ? among[0] : among.find((sae) => sae.name === name)) ??
  missing(`There is no such SAE: ${name}`);

function render() {
  const area = document.getElementById("view");
  let [name, ...rest] = location.hash.slice(1).split("/");
  if (!views.has(name)) [name, rest] = [views.keys().next().value, []];
  try {
    const shown = views.get(name)[0](...rest.filter(Boolean).map(decodeURIComponent));
    area.replaceChildren(...h("div", {}, shown).childNodes);
  } catch (error) {
    if (!(error instanceof Missing || error instanceof URIError)) throw error;
    area.replaceChildren(heading("Not found", error.message));
  }
  document.title = `${area.querySelector("h2").firstChild.data} – ${pageTitle}`;
  const links = [...views].filter(([, [, text]]) => text).map(([view, [, text]]) => {
    const isCurrent = view === (name === "latent" ? "dictionary" : name);
    return link([view], text, { "aria-current": isCurrent && "page" });
  });
  document.getElementById("views").replaceChildren(...links);
}

// A link starts at the top of its view; going back returns to the link that was followed.
document.addEventListener("click", (event) => {
  const from = event.target.closest?.("a[href^='#']")?.getAttribute("href");
  if (from) history.replaceState({ y: scrollY, from }, "");
});
addEventListener("popstate", ({ state }) => {
  render();
  const links = [...document.querySelectorAll("main a")];
  const from = links.find((of) => of.getAttribute("href") === state?.from);
  (from ?? document.querySelector("#view h2")).focus({ preventScroll: true });
  scrollTo(0, state?.y ?? 0);
});
history.scrollRestoration = "manual";
render();
