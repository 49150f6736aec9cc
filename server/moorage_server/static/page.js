// Listens to the server, and draws what it says.

import { showErrors, showLeases, showTiles } from "./activity.js";
import { showDevices } from "./devices.js";
import { setAttribute, setText } from "./dom.js";
import { several, span } from "./format.js";
import { showModels } from "./models.js";

const AGAIN_MS = 2000;
const SILENT_MS = 5000;

const at = (id) => document.getElementById(id);
let heard = 0;

function show(status) {
  const { server } = status;
  const axes = server.mesh.map((axis) => `${axis.name}=${axis.size}`).join(" × ");
  const kind = server.devices[0]?.kind ?? server.platform;
  const up = span((new Date(status.time) - new Date(server.start_time)) / 1000);
  const devices = several(server.devices.length, "device");
  setText(at("about"), `${server.version} · ${devices} (${kind}), mesh ${axes} · up ${up}`);
  showTiles(at("tiles"), status);
  showDevices(at("devices"), at("legend"), status);
  showModels(at("models"), status);
  at("no-models").hidden = status.models.length > 0;
  showLeases(at("leases"), status);
  showErrors(at("errors"), status);
}

function tell(state, text) {
  setAttribute(at("live"), "data-state", state);
  setText(at("live"), text);
}

function listen() {
  const source = new EventSource("events");
  source.addEventListener("message", (event) => {
    heard = Date.now();
    show(JSON.parse(event.data));
    tell("live", "live");
  });
  source.addEventListener("error", () => {
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, AGAIN_MS);
  });
}

setInterval(() => {
  if (Date.now() - heard < SILENT_MS) return;
  tell("lost", heard ? `lost since ${new Date(heard).toLocaleTimeString()}` : "connecting");
}, 1000);
listen();
