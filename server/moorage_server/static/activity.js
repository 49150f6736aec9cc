// What goes on: tiles of numbers, leases, and the latest errors.

import { element, keyed, part, setAttribute, setText, setWords } from "./dom.js";
import { count, percent, secondsOf, several, short, span } from "./format.js";
import { tag } from "./tags.js";

const POINTS = 60; // of a curve, one a second
const RECENT = 10; // of them, those that the number beside it is the mean of
const SVG = "http://www.w3.org/2000/svg";

/** What was seen of some numbers in the last minute. */
const seen = { tokens: [], queued: [] };
let before = null;

/** Draws the tiles. */
export function showTiles(root, status) {
  note(status);
  keyed(root, tilesOf(status.server), (tile) => tile.name, makeTile, updateTile);
}

/** Keeps the rate of tokens and the queue of this second. */
function note(status) {
  const { activity } = status.server, time = new Date(status.time) / 1000;
  const now = { time, tokens: Number(activity.tokens) };
  if (before && now.time > before.time && now.tokens >= before.tokens) {
    seen.tokens.push((now.tokens - before.tokens) / (now.time - before.time));
  }
  seen.queued.push(Number(activity.queued_tokens));
  before = now;
  for (const values of Object.values(seen)) values.splice(0, values.length - POINTS);
}

function tilesOf({ activity, limits, compiles_after_ready: compiles }) {
  const slots = Number(activity.batch_slots), tokens = Number(activity.batch_tokens);
  const [loads, failed] = loadsOf(activity.loads);
  const refused = activity.refusals.reduce((sum, reason) => sum + Number(reason.count), 0);
  return [
    { name: "Requests under way", value: count(activity.requests),
      more: `${several(activity.forwards_under_way, "forward pass", "forward passes")}` },
    { name: "Queued tokens", value: count(activity.queued_tokens),
      more: `of ${short(limits.max_queued_tokens)}`, curve: seen.queued },
    { name: "Tokens a second", value: short(Math.round(mean(seen.tokens.slice(-RECENT)))),
      more: `${count(activity.tokens)} in ${several(activity.forwards, "forward pass", "forward passes")}`,
      curve: seen.tokens },
    { name: "Batch fill", value: percent(tokens, slots), part: slots ? tokens / slots : 0,
      more: `${count(tokens)} of ${count(slots)} slots, ${several(activity.batches, "batch", "batches")}` },
    { name: "Leases", value: count(activity.leases), more: `of ${count(limits.max_leases)}` },
    { name: "Loads", value: count(loads), more: failed },
    { name: "Refused or failed", value: count(refused), more: reasons(activity.refusals) || "none" },
    { name: "Compiles after ready", value: count(compiles),
      more: Number(compiles) ? "a bug: none should be" : "none, as it should be" },
  ];
}

function loadsOf(loads) {
  const ready = Number(loads.find((load) => load.name === "READY")?.count ?? 0);
  return [ready, reasons(loads.filter((load) => load.name !== "READY")) || "none failed"];
}

/** One a line. */
function reasons(counts) {
  return counts.map((reason) => `${reason.name}\u00a0${count(reason.count)}`).join(",\n");
}

function makeTile(tile) {
  const made = element("div", { class: "tile" },
    element("dt", {}, tile.name),
    element("dd", { "data-part": "value" }),
    element("dd", { class: "more", "data-part": "more" }));
  if (tile.curve) made.append(curve());
  if (tile.part !== undefined) made.append(element("meter", { "data-part": "meter" }));
  return made;
}

function updateTile(node, tile) {
  setText(part(node, "value"), tile.value);
  setWords(part(node, "more"), tile.more);
  if (tile.curve) part(node, "line").setAttribute("points", points(tile.curve));
  if (tile.part !== undefined) {
    setAttribute(part(node, "meter"), "value", String(tile.part));
    setAttribute(part(node, "meter"), "aria-label", tile.value);
  }
}

/** A curve of the last minute, for the eye only. */
function curve() {
  const drawing = document.createElementNS(SVG, "svg");
  drawing.setAttribute("viewBox", `0 0 ${POINTS - 1} 20`);
  drawing.setAttribute("preserveAspectRatio", "none");
  drawing.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "polyline");
  line.dataset.part = "line";
  drawing.append(line);
  return drawing;
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / Math.max(1, values.length);
}

function points(values) {
  const most = Math.max(1, ...values), first = POINTS - values.length;
  return values.map((value, i) => `${first + i},${(19 - (18 * value) / most).toFixed(1)}`).join(" ");
}

/** Fills the table of leases. */
export function showLeases(table, status) {
  const leases = status.models.flatMap(({ model }) =>
    model.leases.map((lease, i) => ({ model, lease, key: `${model.handle} ${i}` })));
  keyed(table.tBodies[0], leases, (row) => row.key, makeLease, ({ cells }, { model, lease }) => {
    setText(cells[0], lease.client || "a client");
    setWords(part(cells[1], "name"), model.spec.model_id);
    setText(cells[2], span(secondsOf(lease.time_left)));
    setText(cells[3], span(secondsOf(lease.duration)));
  });
  table.hidden = !leases.length;
  document.getElementById("no-leases").hidden = leases.length > 0;
}

function makeLease({ model }) {
  return element("tr", {},
    element("td", { "data-label": "Client" }),
    element("td", { "data-label": "Model" },
      element("span", { class: "named" }, tag(model.handle),
        element("span", { "data-part": "name" }))),
    element("td", { "data-label": "Ends in" }),
    element("td", { "data-label": "Lasts" }));
}

/** Fills the table of errors, the latest first. */
export function showErrors(table, { server }) {
  const errors = [...server.activity.errors].reverse();
  keyed(table.tBodies[0], errors, (error) => `${error.time} ${error.request_id}`, makeError);
  table.hidden = !errors.length;
  document.getElementById("no-errors").hidden = errors.length > 0;
}

function makeError(error) {
  const time = new Date(error.time);
  return element("tr", {},
    element("td", { "data-label": "Time" },
      element("time", { datetime: error.time, title: error.time }, time.toLocaleTimeString())),
    element("td", { "data-label": "Method" }, error.method),
    element("td", { "data-label": "Why", class: "why" },
      element("div", {}, element("code", {}, error.reason), element("p", {}, error.message))),
    element("td", { "data-label": "Request" },
      element("div", {}, element("code", {}, error.request_id), element("p", {}, error.client))));
}
