// Each model has a letter and a tone on this page, so that no colour stands alone.

import { element, setText } from "./dom.js";

const TONES = 8;
const order = new Map();

/** The place of a model among all that this page has seen. */
function placeOf(handle) {
  if (!order.has(handle)) order.set(handle, order.size);
  return order.get(handle);
}

/** The letter of a model: A to Z, and then AA. */
export function letterOf(handle) {
  const place = placeOf(handle), letter = String.fromCharCode(65 + (place % 26));
  return letter.repeat(1 + Math.floor(place / 26));
}

/** The class that sets the tone of a model. */
export function toneOf(handle) {
  return toneAt(placeOf(handle));
}

/** The class of the n-th tone. */
export function toneAt(place) {
  return `tone-${place % TONES}`;
}

/** A chip with the letter. */
export function tag(handle) {
  const chip = element("span", { class: `tag ${toneOf(handle)}`, "aria-hidden": "true" });
  setText(chip, letterOf(handle));
  return chip;
}
