// How a model lies on the mesh: for each large parameter a picture of its slices, and on request
// what one device holds.

import { element, part, setAttribute, setText } from "./dom.js";
import { bytes, count, several } from "./format.js";
import {
  deviceBytes, parameterBytes, partOf, placed, sliceOf, sliceText, splits, ways,
} from "./mesh.js";
import { toneAt } from "./tags.js";

const SMALL = 0.002; // of a model's bytes: parameters below share one line

/** The unfolding picture of a model; made once, for a layout does not change. */
export function makeLayout({ model, layout }, server) {
  const whole = layout.reduce((sum, parameter) => sum + parameterBytes(parameter), 0);
  const large = layout.filter((parameter) => parameterBytes(parameter) >= SMALL * whole);
  const small = layout.filter((parameter) => parameterBytes(parameter) < SMALL * whole);
  const devices = placed(server);
  const rows = element("div", { class: "parameters" },
    ...large.map((parameter) => parameterRow(parameter, devices, server)));
  const choose = (device) => showSlices(rows, large, device, server);
  const figure = element("details", { class: "layout" },
    element("summary", {}, "Layout on the mesh"),
    meshPicker(devices, server, model.handle, choose), rows);
  if (small.length) figure.append(element("p", { class: "small" }, smallText(small, server)));
  choose(null);
  return figure;
}

function smallText(small, server) {
  const size = small.reduce((sum, parameter) => sum + deviceBytes(parameter, server), 0);
  const names = small.map((parameter) => parameter.name).join(", ");
  return `and ${several(small.length, "small parameter")}, ${bytes(size)} on each device: ${names}`;
}

/** The devices where they stand on the mesh, to choose one of them, or all. */
function meshPicker(devices, server, handle, choose) {
  const axes = server.mesh.map((axis) => `${axis.name}=${axis.size}`).join(" × ");
  const columns = server.mesh.at(-1)?.size ?? 1;
  const grid = element("div", { class: "mesh" });
  grid.style.gridTemplateColumns = `repeat(${columns}, auto)`;
  const radio = (label, value, device) => {
    const input = element("input", { type: "radio", name: `device-${handle}`, value });
    input.addEventListener("change", () => choose(device));
    const tone = device ? toneAt(device.id) : "";
    return element("label", { class: `choice ${tone}` }, input, element("span", {}, label));
  };
  const all = radio("all devices", "all", null);
  all.querySelector("input").checked = true;
  for (const device of devices) grid.append(radio(String(device.id), device.id, device));
  return element("fieldset", {}, element("legend", {}, `Mesh ${axes}, devices`), grid, all);
}

function parameterRow(parameter, devices, server) {
  const shape = parameter.shape.map(count).join(" × ");
  return element("div", { class: "parameter" },
    element("div", { class: "parameter-facts" },
      element("code", {}, parameter.name),
      element("span", {}, `${shape} ${parameter.dtype}`),
      element("span", {}, splitText(parameter)),
      element("span", { "data-part": "holds" })),
    picture(parameter, devices, server));
}

function splitText(parameter) {
  const found = splits(parameter)
    .map((names, axis) => (names.length ? `axis ${axis} over ${names.join(" and ")}` : ""))
    .filter(Boolean);
  return found.length ? `split: ${found.join(", ")}` : "whole on each device";
}

/** A parameter as a rectangle: down the first axis that is split, across the second. */
function picture(parameter, devices, server) {
  const cut = splits(parameter).filter((names) => ways(names, server) > 1);
  const [down, across] = [cut[0] ?? [], cut[1] ?? []];
  const drawn = element("div", { class: "picture", "data-part": "picture" });
  drawn.style.gridTemplateColumns = `repeat(${ways(across, server)}, 1fr)`;
  for (let row = 0; row < ways(down, server); row += 1) {
    for (let column = 0; column < ways(across, server); column += 1) {
      const holders = devices.filter((device) =>
        partOf(down, device, server) === row && partOf(across, device, server) === column);
      drawn.append(cell(parameter, holders, server));
    }
  }
  return drawn;
}

function cell(parameter, holders, server) {
  const ids = holders.map((device) => device.id);
  const all = ids.length > 1 && ids.length === server.devices.length;
  const slice = sliceText(sliceOf(parameter, holders[0], server), parameter);
  const said = `${ids.length > 1 ? "devices" : "device"} ${ids.join(", ")}: ${slice}`;
  const made = element("div", { class: "cell", role: "img", title: said, "aria-label": said },
    element("span", {}, all ? "all" : ids.join(" ")));
  made.dataset.devices = ids.join(" ");
  const step = 100 / ids.length;
  const stripes = ids.map((id, i) =>
    `var(--tint-${id % 8}) ${i * step}% ${(i + 1) * step}%`).join(", ");
  made.style.background = `linear-gradient(90deg, ${stripes})`;
  return made;
}

/** Says what one device holds of each parameter, or how much each of them does. */
function showSlices(rows, parameters, device, server) {
  [...rows.children].forEach((row, i) => {
    const parameter = parameters[i], size = bytes(deviceBytes(parameter, server));
    const text = device
      ? `device ${device.id}: ${sliceText(sliceOf(parameter, device, server), parameter)}, ${size}`
      : `${size} on each device`;
    setText(part(row, "holds"), text);
    for (const drawn of part(row, "picture").children) {
      const holds = !device || drawn.dataset.devices.split(" ").includes(String(device.id));
      setAttribute(drawn, "data-dim", String(!holds));
    }
  });
}
