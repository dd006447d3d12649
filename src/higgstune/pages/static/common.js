// What all pages share: elements, requests, settings, and the line in which a page says what it did.

export const byId = (id) => document.getElementById(id);

// An element with attributes and children; a text is always text, whatever is in it.
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export class RequestError extends Error {
  constructor(status, content) {
    super(content.error || `the server answered ${status}`);
    this.status = status;
    this.content = content;
  }
}

async function answered(response) {
  const content = await response.json().catch(() => ({}));
  if (!response.ok) throw new RequestError(response.status, content);
  return content;
}

export const get = async (path, query = {}) =>
  answered(await fetch(`${path}?${new URLSearchParams(query)}`, { cache: "no-store" }));

export const post = async (path, body) =>
  answered(await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }));

export function say(text) {
  byId("said").textContent = "";
  requestAnimationFrame(() => { byId("said").textContent = text; });
}

// A check box that keeps its state; where the browser keeps nothing, it begins as it is in the page.
export function remembered(box) {
  const key = `higgstune.${box.id}`;
  try {
    const kept = localStorage.getItem(key);
    if (kept !== null) box.checked = kept === "true";
    box.addEventListener("change", () => localStorage.setItem(key, box.checked));
  } catch (error) {
    if (!(error instanceof DOMException)) throw error;
  }
  return box;
}

export const seconds = (value) => `${value.toFixed(2)} s`;

export function duration(value) {
  if (value < 60) return `${Math.round(value)} s`;
  if (value < 3600) return `${(value / 60).toFixed(1)} min`;
  return `${(value / 3600).toFixed(2)} h`;
}
