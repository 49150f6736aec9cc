// The models: what each is, how far its load has come, who uses it, and how it lies on the mesh.

import { element, keyed, part, setAttribute, setText, words } from "./dom.js";
import { bytes, count, nameOf, secondsOf, several, short, span } from "./format.js";
import { makeLayout } from "./layout.js";
import { tag } from "./tags.js";

/** The stages of a load in their order, and what those count that do not count bytes. */
const STAGES = { fetch: "", place: "", compile: "program", prove: "trial" };
const SIGNS = { queued: "…", loading: "◐", ready: "✓", draining: "↓" };

/** Draws a card for each model. */
export function showModels(root, status) {
  keyed(root, status.models, ({ model }) => model.handle,
    (entry) => makeCard(entry, status.server),
    (card, { model }) => updateCard(card, model, new Date(status.time)));
}

function makeCard(entry, server) {
  const { model } = entry;
  return element("article", { class: "model", "aria-label": model.spec.model_id },
    element("header", {},
      tag(model.handle),
      element("h3", {}, ...words(model.spec.model_id)),
      element("span", { class: "state", "data-part": "state" })),
    element("p", { class: "facts" }, factsOf(model)),
    element("div", { class: "stages", "data-part": "stages" }),
    element("p", { class: "load", "data-part": "load" }),
    element("dl", { class: "use", "data-part": "use" }),
    makeLayout(entry, server));
}

function factsOf(model) {
  const source = nameOf(model.spec.source, "MODEL_SOURCE_"), config = model.config;
  const dtype = model.compute_dtype === model.dtype
    ? model.dtype : `${model.dtype}, computed in ${model.compute_dtype}`;
  const size = `${short(config.num_parameters)} parameters in ${several(config.num_layers, "layer")}`;
  const asker = model.client ? `, asked for by ${model.client}` : "";
  return `${model.handle} · ${source} · ${size} · ${dtype}${asker}`;
}

function updateCard(card, model, now) {
  const state = nameOf(model.state, "MODEL_STATE_"), badge = part(card, "state");
  setText(badge, `${SIGNS[state] ?? ""} ${state.toUpperCase()}`);
  setAttribute(badge, "data-state", state);
  const stages = [...(model.progress?.stages ?? [])];
  const place = ({ stage }) => Object.keys(STAGES).indexOf(stage);
  stages.sort((a, b) => place(a) - place(b));
  keyed(part(card, "stages"), stages, (stage) => stage.stage, makeStage, updateStage);
  setText(part(card, "load"), loadText(model));
  keyed(part(card, "use"), useOf(model, now), ([name]) => name, makeUse,
    (node, [, value]) => setText(part(node, "value"), value));
}

function makeStage(stage) {
  return element("div", { class: "stage" },
    element("span", { class: "stage-name" }, stage.stage),
    element("progress", { "data-part": "bar", "aria-label": stage.stage }),
    element("span", { class: "stage-text", "data-part": "text" }));
}

function updateStage(node, stage) {
  const done = Number(stage.done), total = Number(stage.total), bar = part(node, "bar");
  setAttribute(bar, "max", String(total || 1));
  setAttribute(bar, "value", String(done));
  const unit = STAGES[stage.stage];
  const amount = unit ? (n) => several(n, unit) : bytes;
  const of = total ? `${unit ? count(done) : bytes(done)} of ${amount(total)}` : amount(done);
  const rate = stage.rate && !unit ? `, ${bytes(stage.rate)}/s` : "";
  setText(part(node, "text"), of + rate);
}

function loadText(model) {
  if (!model.progress) return "";
  const waiting = several(model.progress.waiters, "caller");
  return `${span(secondsOf(model.progress.elapsed))} so far, ${waiting} waiting`;
}

/** What is said of a model's use, in pairs of a name and a value. */
function useOf(model, now) {
  const held = model.device_bytes.map((device) => Number(device.bytes));
  const each = held.length ? bytes(Math.max(...held)) : "–";
  const used = model.last_use_time ? `${span((now - new Date(model.last_use_time)) / 1000)} ago` : "–";
  const took = secondsOf(model.load_duration);
  return [
    ["each device", each],
    ["reserved", Number(model.reserved_bytes) ? bytes(model.reserved_bytes) : "–"],
    ["loaded in", took ? span(took) : "–"],
    ["forwards", count(model.forward_count)],
    ["tokens", count(model.token_count)],
    ["running", count(model.running_count)],
    ["leases", count(model.leases.length)],
    ["last use", used],
  ];
}

function makeUse([name]) {
  return element("div", {}, element("dt", {}, name), element("dd", { "data-part": "value" }));
}
