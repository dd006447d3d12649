// The list of all utterances: only the rows that can be seen are in the page, only those near to it are fetched.

import { element, post, seconds } from "./common.js";

const HEIGHT = 64; // pixels a row, as in the style
const BEYOND = 6; // rows above and below what can be seen
const BLOCK = 60; // rows a request

export const statusTag = (row) => {
  if (row.status === "accepted") return ["accepted", "good"];
  if (row.status === "edited") return ["text edited", "good"];
  if (row.status === "dropped") return ["dropped", "bad"];
  if (row.refused) return [row.refused.reason, "warn"];
  return null;
};

export class List {
  constructor(scroller, onChoose) {
    this.scroller = scroller;
    this.window = scroller.querySelector("ol");
    this.onChoose = onChoose;
    this.ids = [];
    this.places = new Map();
    this.rows = new Map();
    this.coming = new Map();
    this.current = null;
    this.waiting = false;
    scroller.addEventListener("scroll", () => this.soon());
    new ResizeObserver(() => this.soon()).observe(scroller);
    this.window.addEventListener("click", (event) => {
      const button = event.target.closest("button");
      if (button) onChoose(button.dataset.id);
    });
  }

  fill(ids) {
    this.ids = ids;
    this.places = new Map(ids.map((id, place) => [id, place]));
    this.window.style.height = `${HEIGHT * ids.length}px`;
    this.draw();
  }

  forget() {
    this.rows.clear();
    this.coming.clear();
  }

  keep(rows) {
    for (const row of rows) this.rows.set(row.id, row);
    this.soon();
  }

  // A row, fetched with its neighbours where it is not here yet; undefined for one that is gone.
  async row(id) {
    if (!this.rows.has(id)) await this.fetchAround(id);
    return this.rows.get(id);
  }

  fetchAround(id) {
    if (this.coming.has(id)) return this.coming.get(id);
    const place = this.places.get(id) ?? 0;
    const first = Math.max(place - BLOCK / 3, 0);
    const near = this.places.has(id) ? this.ids.slice(first, first + BLOCK) : [id];
    const missing = near.filter((one) => !this.rows.has(one) && !this.coming.has(one));
    const coming = post("rows", { ids: missing }).then((content) => {
      if (missing.every((one) => this.coming.get(one) === coming)) this.keep(content.rows);
    }).finally(() => missing.forEach((one) => this.coming.delete(one)));
    missing.forEach((one) => this.coming.set(one, coming));
    return coming;
  }

  choose(id) {
    this.current = id;
    const place = this.places.get(id);
    if (place !== undefined) {
      const top = place * HEIGHT;
      const { scrollTop, clientHeight } = this.scroller;
      if (top < scrollTop + HEIGHT || top > scrollTop + clientHeight - 2 * HEIGHT) {
        this.scroller.scrollTop = Math.max(top - clientHeight / 3, 0);
      }
    }
    this.soon();
  }

  soon() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.draw();
    });
  }

  draw() {
    const first = Math.max(Math.floor(this.scroller.scrollTop / HEIGHT) - BEYOND, 0);
    const count = Math.ceil(this.scroller.clientHeight / HEIGHT) + 2 * BEYOND;
    const shown = this.ids.slice(first, first + count);
    const focused = document.activeElement?.dataset?.id;
    this.window.replaceChildren(...shown.map((id, index) => this.item(id, first + index)));
    if (focused) this.window.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
    const missing = shown.find((id) => !this.rows.has(id) && !this.coming.has(id));
    if (missing !== undefined) this.fetchAround(missing).catch(() => {}); // the next one to be needed says it
  }

  item(id, place) {
    const row = this.rows.get(id);
    const isCurrent = id === this.current;
    const tag = row ? statusTag(row) : null;
    const facts = row ? [seconds(row.end - row.start), row.speaker, ...row.flags].filter(Boolean).join(" \u00b7 ") : "";
    const button = element(
      "button",
      { type: "button", "data-id": id, "aria-current": isCurrent ? "true" : null, tabindex: isCurrent || (!this.places.has(this.current) && place === 0) ? "0" : "-1" },
      element("span", { class: "line" }, row ? row.text || "(no text)" : "\u2026"),
      element("span", { class: "facts" }, facts),
      tag ? element("span", { class: `tag ${tag[1]}` }, tag[0]) : null,
    );
    const item = element("li", { "aria-setsize": this.ids.length, "aria-posinset": place + 1 }, button);
    item.style.top = `${HEIGHT * place}px`;
    return item;
  }
}
