"use strict";
// What every view is made of: elements, tokens and plots.
// Whatever the data contain is shown as text nodes and never read as HTML.
const parse = (id) => JSON.parse(document.getElementById(id).textContent);
const inspection = parse("inspection");
const { tokens, saes, pairs, predictors } = inspection;
const scaffolds = saes.filter((sae) => sae.scaffold);
const pageTitle = document.title;
const PER_PAGE = 50;

// ---- elements

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat(9).filter((child) => child != null && child !== false));
  return element;
}
const h = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const address = (...parts) => "#" + parts.map(encodeURIComponent).join("/");
const link = (parts, text, more = {}) => h("a", { href: address(...parts), ...more }, text);
const latentLink = (sae, latent) => link(["latent", sae.name, latent], `latent ${latent}`);
const directionLink = (sae, i) => link(["direction", sae.name, i], `direction ${i}`);

const whole = (x) => x.toLocaleString("en");
const fixed = (x, digits = 2) => x.toFixed(digits).replace(/^-(?=.*[1-9])/, "−").replace("-", "");
const number = (x, digits = 3) => String(Number(x.toPrecision(digits))).replace("-", "−");
const signed = (x) => (x > 0 ? "+" : "") + fixed(x, 3);
const percent = (x) => (x > 0 && x < 0.01 ? number(100 * x, 2) : fixed(100 * x, x && 1)) + "%";

const heading = (text, about) => h("h2", { tabindex: -1 }, text, about && h("small", {}, about));
const part = (title, ...children) => h("section", {}, h("h3", {}, title), children);
const columns = (...children) => h("div", { class: "columns" }, children);
const quiet = (text) => h("p", { class: "quiet" }, text);

function facts(...rows) {
  const shown = rows.filter(Boolean).map(([term, value, note]) =>
    h("div", {}, h("dt", {}, term), h("dd", {}, value, note && h("small", {}, note))));
  return h("dl", { class: "facts" }, shown);
}

// Heads in brackets are of numbers; columns with an empty head are left out. Each cell knows
// its head, which a phone shows beside it.
function table(heads, rows) {
  const columns = heads.flatMap((head, i) =>
    head && head[0] ? [{ text: [head].flat()[0], look: Array.isArray(head) && "number", i }] : []);
  const cell = (row, { text, look, i }, at) =>
    at ? h("td", { class: look, "data-head": text }, row[i]) : h("th", { scope: "row" }, row[i]);
  const head = columns.map(({ text, look }) => h("th", { scope: "col", class: look }, text));
  const body = rows.map((row) => h("tr", {}, columns.map((of, at) => cell(row, of, at))));
  return h("div", { class: "scroll", tabindex: 0 },
    h("table", { class: columns.length > 4 && "stacked" },
      h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

// Links of which one is chosen.
const choice = (label, links) => h("nav", { class: "choice", "aria-label": label }, links);
const option = (parts, text, isChosen) =>
  link(parts, text, { "aria-current": isChosen && "true" });
const saeChoice = (among, view, chosen) =>
  among.length > 1 &&
  choice("SAE", among.map((sae) => option([view, sae.name], sae.name, sae === chosen)));

function pager(n, page, parts) {
  const last = Math.ceil(n / PER_PAGE) - 1;
  if (last < 1) return "";
  return choice("Pages", [
    page > 0 && link(parts(page - 1), "← previous"),
    h("span", {}, `page ${page + 1} of ${last + 1}`),
    page < last && link(parts(page + 1), "next →")]);
}
const onPage = (rows, page) => rows.slice(page * PER_PAGE, (page + 1) * PER_PAGE);

// ---- tokens

const MARKS = { "\n": "↵", "\r": "␍", "\t": "→" };
// runs of spaces, and single characters without a look of their own
const UNSEEN =
  /( +|(?! )[\p{C}\p{Z}\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\u{e0100}-\u{e01ef}])/u;

function mark(part) {
  const isCode = part[0] !== " " && !(part in MARKS);
  const code = part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  const text = isCode ? `U+${code}` : MARKS[part] ?? (part.length > 1 ? `␣×${part.length}` : "␣");
  return h("span", { class: isCode ? "mark boxed" : "mark" }, text);
}

// A single space stays one in running text, and is marked in a token that stands alone.
function visible(text, isRunning) {
  if (!text) return h("span", { class: "mark boxed" }, "empty");
  const onBase = text.replace(/^(?=\p{M})/u, "◌");
  return onBase.split(UNSEEN).map((part, i) =>
    i % 2 && !(isRunning && part === " ") ? mark(part) : part);
}
const loneToken = (id) => h("span", { class: "token" }, visible(tokens[id]));

function chips(ids, notes, isFound) {
  return h("ul", { class: "chips" }, ids.map((id, i) =>
    h("li", { class: isFound?.[id] && "found" }, loneToken(id), notes && h("small", {}, notes[i]))));
}
const weightedChips = (weighted) =>
  weighted.length
    ? chips(weighted.map(([id]) => id), weighted.map(([, logit]) => number(logit)))
    : quiet("Not known: the SAE is not of the residual stream.");

function contextList(contexts, scale) {
  const shown = contexts.map(([sequence, position, peak, ids, values]) => {
    const at = (i) => number((values[i] * scale) / 127);
    const text = ids.map((id, i) =>
      h("span", {
        class: `token ${values[i] < 0 ? "low" : "high"}${i === peak ? " peak" : ""}`,
        "--weight": Math.abs(values[i]) / 127,
        title: `${JSON.stringify(tokens[id])}: ${at(i)}`,
      }, visible(tokens[id], true)));
    const where = `sequence ${sequence}, position ${position}`;
    const start = position > peak && "…";
    return h("li", {}, h("b", { title: where }, at(peak)), h("p", {}, start, text));
  });
  return h("ol", { class: "contexts" }, shown);
}

// Contexts are parsed in chunks, when one of their latents is looked at.
const chunks = new Map();
function contextsOf(sae, row) {
  const id = `contexts-${saes.indexOf(sae)}-${Math.floor(row / inspection.chunk)}`;
  if (!chunks.has(id)) chunks.set(id, parse(id));
  return chunks.get(id)[row % inspection.chunk];
}

// ---- plots: shapes in a box that stretches, words around it

function plot(label, top, width, shapes, ticks, series = []) {
  const box = { viewBox: `0 0 ${width} 1`, preserveAspectRatio: "none" };
  const keys = series.map((text, i) => h("span", { class: `key series${i}` }, text));
  const words = ticks.map(([x, text]) => h("span", { "--x": x / width }, text));
  return h("figure", { class: "plot" },
    h("figcaption", {}, label, h("div", {}, keys)),
    h("div", { role: "img", "aria-label": label }, h("span", {}, top), svg("svg", box, shapes)),
    h("div", { class: "ticks", "aria-hidden": "true" }, words));
}
const bars = (values, top, title) =>
  values.map((value, i) =>
    svg("g", {},
      svg("rect", { x: i + 0.08, width: 0.84, y: 1 - value / top, height: value / top }),
      svg("rect", { class: "target", x: i, width: 1, height: 1 }, svg("title", {}, title(i)))));
const line = (points, top, series) =>
  svg("path", {
    class: `series${series}`,
    d: "M" + points.map(([x, y]) => `${x} ${1 - Math.max(0, y) / top}`).join("L"),
  });

function histogram(label, counts, edge, step) {
  const top = Math.max(...counts, 1);
  const title = (i) => `${edge(i)} to ${edge(i + 1)}: ${whole(counts[i])} tokens`;
  const edges = [...Array(counts.length + 1).keys()].filter((i) => i % step === 0);
  const ticks = edges.map((i) => [i, edge(i)]);
  return plot(label, `${whole(top)} tokens`, counts.length, bars(counts, top, title), ticks);
}

const bar = (share) => h("div", { class: "bar", "--share": Math.max(0, share) });
const share = (value, largest) =>
  h("div", { class: "share" }, bar(value / largest), percent(value));

// Grid lines stand at the R² from which labels are given.
function explained(rSquared) {
  const known = Object.entries(predictors).filter(([name]) => name in rSquared);
  const rows = known.map(([name, text]) =>
    h("tr", {}, h("th", { scope: "row" }, text), h("td", {}, bar(rSquared[name])),
      h("td", { class: "number" }, fixed(rSquared[name]))));
  const caption = h("caption", {}, "Held-out R² of each predictor alone");
  return h("table", { class: "bars" }, caption, h("tbody", {}, rows));
}
