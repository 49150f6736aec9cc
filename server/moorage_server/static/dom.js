// Elements are made here and nowhere else. Text goes in as text: nothing is parsed as HTML, since
// names of models, clients and messages are written by others.

/** An element with attributes and children; strings become text. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** The part of an element that was made with data-part. */
export function part(node, name) {
  return node.querySelector(`[data-part="${name}"]`);
}

/** Sets an element's text, if it is another: a selection survives. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A text as children of an element, which may break after / and _ too. */
export function words(text) {
  return text.split(/(?<=[/_])/).flatMap((word, i) => (i ? [element("wbr"), word] : [word]));
}

/** Sets an element's text, as words. */
export function setWords(node, text) {
  if (node.textContent !== text) node.replaceChildren(...words(text));
}

/** Sets an attribute, if it is another. */
export function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

/**
 * One child for each item, which stays while the item's key does: so do focus, hover and what is
 * unfolded.
 */
export function keyed(parent, items, keyOf, make, update = () => {}) {
  const kept = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const keys = items.map((item) => String(keyOf(item)));
  for (const [key, child] of kept) if (!keys.includes(key)) child.remove();
  items.forEach((item, i) => {
    let child = kept.get(keys[i]);
    if (!child) {
      child = make(item);
      child.dataset.key = keys[i];
    }
    if (parent.children[i] !== child) parent.insertBefore(child, parent.children[i] ?? null);
    update(child, item);
  });
}
