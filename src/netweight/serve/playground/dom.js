// Elements. What comes from a server or a person goes into the page as text, never as markup.

export const find = (id) => document.getElementById(id);

// Say something in a place that is read aloud when it changes: not again where it says so already.
export function say(id, text) {
  if (find(id).textContent !== text) find(id).textContent = text;
}

function fill(element, given, children) {
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined)); // strings become text nodes
  return element;
}

export const make = (tag, given = {}, ...children) => fill(document.createElement(tag), given, children);

export const draw = (tag, given = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), given, children);

// A name that may break after its underscores, dashes and slashes.
export const breakable = (name) => name.split(/(?<=[_\-/.])/).flatMap((part, i) => (i ? [make("wbr"), part] : [part]));

// A variable of the style sheet; an attribute `style` would be refused by the page's own policy.
export function styled(element, name, value) {
  element.style.setProperty(name, value);
  return element;
}
