// The memory of each device: what models hold of it, what is promised, and what is free.

import { element, keyed, part, setAttribute, setText } from "./dom.js";
import { bytes } from "./format.js";
import { deviceBytes } from "./mesh.js";
import { letterOf, tag, toneOf } from "./tags.js";

const LETTER_PERCENT = 2.5; // of the bar, from which on a letter has room

/** Draws a bar for each device, and what its parts mean. */
export function showDevices(bars, legend, status) {
  keyed(bars, status.server.devices, (device) => device.id, makeRow, (row, device) =>
    updateRow(row, device, status));
  keyed(legend, entries(status), (entry) => entry.key, makeEntry, (node, entry) =>
    setText(part(node, "text"), entry.text));
}

/** The parts of one device's bar, from left to right. */
function segments(device, { server, models }) {
  const found = models.map((entry) => {
    const held = entry.model.device_bytes.find((x) => x.device_id === device.id);
    const kind = held ? "held" : "promised";
    const size = held ? Number(held.bytes) : planned(entry, server);
    return { key: entry.model.handle, kind, size, name: entry.model.spec.model_id };
  });
  const weights = models.reduce((sum, entry) => sum + planned(entry, server), 0);
  const programs = Math.max(0, Number(server.memory.reserved_bytes) - weights);
  found.push({ key: "programs", kind: "programs", size: programs, name: "programs" });
  return found.filter((segment) => segment.size > 0);
}

/** Bytes that are promised to a model's parameters on each device; none before it is admitted. */
function planned({ model, layout }, server) {
  if (!Number(model.reserved_bytes)) return 0;
  return layout.reduce((sum, parameter) => sum + deviceBytes(parameter, server), 0);
}

function makeRow(device) {
  return element("div", { class: "device" },
    element("span", { class: "device-name" }, `device ${device.id}`),
    element("div", { class: "bar", role: "img", "data-part": "bar" },
      element("div", { class: "segments", "data-part": "segments" }),
      element("span", { class: "live-mark", "data-part": "live" })),
    element("span", { class: "device-sum", "data-part": "sum" }));
}

function updateRow(row, device, status) {
  const memory = status.server.memory, budget = Number(memory.budget_bytes);
  const live = Number(memory.live_bytes.find((x) => x.device_id === device.id)?.bytes ?? 0);
  const shown = segments(device, status);
  const used = shown.reduce((sum, segment) => sum + segment.size, 0);
  const whole = Math.max(budget, used, live, 1);
  keyed(part(row, "segments"), shown, (segment) => segment.key, makeSegment, (node, segment) => {
    const share = (100 * segment.size) / whole;
    node.style.width = `${share}%`;
    setAttribute(node, "class", `segment ${segment.kind} ${toneFor(segment)}`);
    setAttribute(node, "title", `${segment.name}: ${bytes(segment.size)}`);
    const letter = segment.kind === "programs" ? "" : letterOf(segment.key);
    setText(node, share >= LETTER_PERCENT ? letter : "");
  });
  part(row, "live").style.left = `${(100 * live) / whole}%`;
  setAttribute(part(row, "live"), "title", `arrays alive: ${bytes(live)}`);
  setText(part(row, "sum"), `${bytes(used)} of ${bytes(budget)}`);
  const told = shown.map((segment) => `${segment.name} ${bytes(segment.size)}`);
  told.push(`free ${bytes(Math.max(0, budget - used))}`, `arrays alive ${bytes(live)}`);
  setAttribute(part(row, "bar"), "aria-label", `Device ${device.id}: ${told.join(", ")}`);
}

function makeSegment() {
  return element("span", {});
}

function toneFor(segment) {
  return segment.kind === "programs" ? "" : toneOf(segment.key);
}

function entries({ server, models }) {
  const found = models.filter(({ model }) => Number(model.reserved_bytes)).map((entry) => {
    const size = bytes(planned(entry, server));
    const loading = entry.model.device_bytes.length ? "" : ", on its way: hatched";
    const text = `${entry.model.spec.model_id}, ${size} each${loading}`;
    return { key: entry.model.handle, handle: entry.model.handle, text };
  });
  return [
    ...found,
    { key: "programs", swatch: "programs", text: "what the largest program takes while it runs" },
    { key: "live", swatch: "live-mark", text: "arrays alive, as the runtime counts them" },
  ];
}

function makeEntry(entry) {
  const mark = entry.handle
    ? tag(entry.handle)
    : element("span", { class: `swatch ${entry.swatch}`, "aria-hidden": "true" });
  return element("li", {}, mark, element("span", { "data-part": "text" }));
}
