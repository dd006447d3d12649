// Proof-reading: one utterance at a time, worst first; every decision is sent at once, in order.

import { byId, duration, element, get, post, remembered, RequestError, say, seconds } from "./common.js";
import { List, statusTag } from "./review_list.js";
import { join, leave, setMark, setSpeaker, speakers, split } from "./review_panels.js";
import { Player } from "./review_sound.js";
import { difference } from "./review_text.js";

const POLL = 3000; // milliseconds
const AHEAD = 3; // sounds fetched before they are needed

export const state = { generation: 0, seen: 0, row: null, open: new Set(), undo: [], pending: 0, all: null };
export const player = new Player(byId("canvas"), () => playing(false));
export const list = new List(byId("rows"), (id) => show(id, { since: performance.now(), leaveList: true }));
const autoplay = remembered(byId("autoplay"));
const singleKeys = remembered(byId("single-keys"));

// What is chosen

let showing = 0;

export async function show(id, { since = 0, play = autoplay.checked, leaveList = false } = {}) {
  const turn = ++showing;
  leave();
  list.choose(id);
  if (leaveList) listing(false);
  const coming = player.load(id);
  coming.catch(() => {});
  const row = await list.row(id);
  if (turn !== showing) return;
  if (!row) {
    say(`${id} is gone`);
    return;
  }
  state.row = row;
  fillIn();
  const sound = await coming.catch((error) => {
    if (turn === showing) silent(error.message);
  });
  if (turn !== showing || !sound) return;
  player.show(sound);
  byId("play").disabled = byId("context").disabled = false;
  structural(sound.hasContext);
  if (play) start(since);
  fetchAhead(id);
}

function silent(reason) {
  player.show(null);
  byId("play").disabled = byId("context").disabled = true;
  structural(false);
  say(reason);
}

function structural(possible) {
  byId("split").disabled = !possible;
  byId("join").disabled = !possible || !state.row.next;
}

function fetchAhead(id) {
  let next = id;
  for (let count = 0; count < AHEAD; count++) {
    next = following(next);
    if (next === null) return;
    player.load(next).catch(() => {});
  }
}

// The next utterance that nobody has decided about, or simply the next one.
function following(id, onlyOpen = true) {
  const place = list.places.get(id) ?? -1;
  for (let index = place + 1; index < list.ids.length; index++) {
    if (!onlyOpen || state.open.has(list.ids[index])) return list.ids[index];
  }
  return null;
}

function step(by, since) {
  const place = (list.places.get(state.row?.id) ?? -1) + by;
  if (place < 0 || place >= list.ids.length) say(by < 0 ? "This is the first one." : "This is the last one.");
  else show(list.ids[place], { since });
}

function fillIn() {
  const { row } = state;
  byId("one-title").textContent = row.id;
  const place = list.places.get(row.id);
  byId("place").textContent = place === undefined ? "" : `${place + 1} of ${list.ids.length}`;
  byId("text").value = row.text;
  byId("speaker").value = row.speaker ?? "";
  byId("elsewhere").hidden = true;
  byId("times").textContent = `${row.recording}, ${seconds(row.start)} to ${seconds(row.end)} (${seconds(row.end - row.start)})`;
  byId("take").disabled = !row.recognised;
  byId("checks").replaceChildren(...row.checks.map((check) => element("li", {}, `${check.what}: ${check.message}`)));
  drawTags();
  drawDifference();
}

function drawTags() {
  const { row } = state;
  const tag = statusTag(row);
  const tags = tag ? [element("span", { class: `tag ${tag[1]}` }, row.refused && row.status === "open" ? `refused: ${tag[0]}` : tag[0])] : [];
  for (const flag of row.flags.filter((one) => one !== row.refused?.reason)) tags.push(element("span", { class: "tag warn" }, flag));
  if (row.snr !== null) tags.push(element("span", { class: "tag" }, `SNR ${row.snr.toFixed(0)} dB`));
  if (row.language) tags.push(element("span", { class: "tag" }, row.language));
  if (row.split) tags.push(element("span", { class: "tag" }, row.split));
  byId("tags").replaceChildren(...tags);
}

function drawDifference() {
  const { row } = state;
  const text = byId("text").value;
  byId("accept-word").textContent = text === row.text ? (row.refused && row.status !== "accepted" ? "Take back" : "Accept") : "Keep text";
  byId("compared").hidden = !row.recognised;
  if (!row.recognised) return;
  const runs = difference(text, row.recognised);
  const tags = { same: "span", text: "del", recognised: "ins" };
  byId("difference").replaceChildren(...runs.flatMap(([kind, words]) => [element(tags[kind], {}, words.join(" ")), " "]));
}

// Sound

export function playing(is) {
  byId("play").firstChild.textContent = is ? "Pause" : "Play";
}

export function start(since, from, to) {
  const { sound } = player;
  if (!sound) return;
  player.play(from ?? sound.start, to ?? sound.end, since);
  playing(true);
}

function toggle(since) {
  if (player.playing) {
    player.stop();
    playing(false);
  } else start(since);
}

const withContext = (since) => player.sound && start(since, 0, player.sound.buffer.duration);

byId("wave").addEventListener("pointerdown", (event) => {
  if (!player.sound) return;
  const time = player.at(event.clientX);
  if (byId("splitting").hidden) start(event.timeStamp, time, Math.max(player.sound.end, time + 0.05));
  else setMark(time);
});
byId("wave").addEventListener("pointermove", (event) => {
  if (event.buttons && player.sound && !byId("splitting").hidden) setMark(player.at(event.clientX));
});

// Decisions: sent one after the other; what another tab decided comes with the answers

let line = Promise.resolve();

function inLine(task) {
  line = line.then(task, task);
  return line;
}

const wait = (time) => new Promise((resolve) => setTimeout(resolve, time));

function trouble(text) {
  byId("trouble").textContent = text;
  byId("trouble").hidden = !text;
}

async function sent(body) {
  for (;;) {
    try {
      const content = await post("decide", { ...body, seen: state.seen, generation: state.generation });
      trouble("");
      return content;
    } catch (error) {
      if (error instanceof RequestError) throw error;
      trouble(`${state.pending} not saved: the server does not answer. Start higgstune review again; until then keep this page open.`);
      await wait(1500);
    }
  }
}

// Decide, show it at once, and send it. What the server does not take is shown as it is.
export function decide(body, ids, change) {
  for (const id of ids) {
    const row = list.rows.get(id);
    if (row && change) Object.assign(row, change);
    if (change?.status) state.open.delete(id);
  }
  list.soon();
  state.pending += 1;
  return inLine(async () => {
    try {
      const content = await sent(body);
      state.undo.push(...content.made.filter(() => !body.decision?.undo).map((number) => ({ number, id: ids[0] })));
      await take(content, []);
      return content;
    } catch (error) {
      if (!(error instanceof RequestError)) throw error;
      say(`Not done: ${error.message}.`);
      for (const id of ids) list.rows.delete(id);
      if (error.status === 409) await take(error.content, ids);
      else await reload(ids[0]);
      return null;
    } finally {
      state.pending -= 1;
    }
  });
}

// Take over what an answer says; `back` are rows to show as they are.
async function take(content, back) {
  if (content.generation !== state.generation) {
    say("The data set was collected anew.");
    await reload(state.row?.id);
    return;
  }
  state.seen = content.sequence;
  if (content.structural) {
    list.forget();
    player.forget();
    await refill();
  } else {
    for (const row of content.rows) {
      if (row.status === "open") state.open.add(row.id);
      else state.open.delete(row.id);
    }
    list.keep(content.rows);
    const own = content.rows.find((row) => row.id === state.row?.id);
    if (own) replaced(own);
  }
  if (back.length) await show(back[0], { play: false });
  countSoon();
}

// The utterance on the screen has changed; what is being written stays.
function replaced(row) {
  const writing = byId("text").value !== state.row.text;
  const changed = row.text !== state.row.text;
  state.row = row;
  if (writing && changed) {
    byId("elsewhere").textContent = `Its text is now, from another tab: ${row.text}`;
    byId("elsewhere").hidden = false;
  } else if (!writing) byId("text").value = row.text;
  byId("speaker").value = row.speaker ?? "";
  drawTags();
  drawDifference();
}

const isLeft = () => state.row !== null;

function advance(since) {
  const next = following(state.row.id);
  if (next !== null) show(next, { since });
  else {
    say(state.open.size ? "The end of the list: others above are open." : "Every utterance is decided.");
    fillIn();
  }
}

function accept(since) {
  if (!isLeft()) return;
  const { row } = state;
  const text = byId("text").value.trim();
  if (!text) {
    say("It has no text: write it first.");
    byId("text").focus();
    return;
  }
  byId("text").blur();
  const edit = text === row.text ? {} : { text };
  decide({ decision: { id: row.id, ...edit, keep: true } }, [row.id], { ...edit, status: "accepted" });
  advance(since);
}

function drop(since) {
  if (!isLeft()) return;
  const { row } = state;
  decide({ decision: { id: row.id, keep: false } }, [row.id], { status: "dropped" });
  advance(since);
}

async function undo() {
  await line;
  const last = state.undo.pop();
  if (!last) {
    say("Nothing is left to undo.");
    return;
  }
  const content = await decide({ decision: { undo: last.number } }, [], null);
  if (!content) return;
  const id = last.id ?? content.rows[0]?.id;
  if (id && list.places.has(id)) await show(id, { play: false });
  say("Undone.");
}

// Lists, filters, counts

const filters = { status: "f-status", kind: "f-kind", speaker: "f-speaker", flag: "f-flag", words: "f-words" };
const query = () => Object.fromEntries(Object.entries(filters).map(([key, id]) => [key, byId(id).value.trim()]));

async function refill() {
  const [found, open] = await Promise.all([get("list", query()), get("list", { status: "open" })]);
  state.open = new Set(open.ids);
  list.fill(found.ids);
  byId("shown").textContent = `${found.ids.length} shown`;
}

function options(select, counts, all) {
  const chosen = select.value;
  select.replaceChildren(element("option", { value: "" }, all), ...Object.entries(counts).map(([name, count]) => element("option", { value: name }, `${name} (${count})`)));
  select.value = chosen in counts ? chosen : "";
}

let counting = 0;

function countSoon() {
  clearTimeout(counting);
  counting = setTimeout(counts, 300);
}

export async function counts() {
  const all = await get("state");
  if (all.generation !== state.generation) return;
  state.all = all;
  const decided = all.utterances - all.status.open;
  document.title = `Review: ${all.name}`;
  byId("name").textContent = all.name;
  byId("progress").max = Math.max(all.utterances, 1);
  byId("progress").value = decided;
  byId("counts").textContent = `${decided} of ${all.utterances} decided, ${duration(all.kept_seconds)} of ${duration(all.seconds)} kept`;
  options(byId("f-speaker"), all.speakers, "all");
  options(byId("f-flag"), all.flags, "all");
  byId("names").replaceChildren(...Object.keys(all.speakers).map((name) => element("option", { value: name })));
}

async function reload(id) {
  const all = await get("state");
  state.generation = all.generation;
  state.seen = all.sequence;
  state.undo = all.undoable.map((number) => ({ number, id: null }));
  list.forget();
  player.forget();
  await refill();
  await counts();
  const first = list.places.has(id) ? id : (list.ids.find((one) => state.open.has(one)) ?? list.ids[0]);
  if (first !== undefined) await show(first, { play: false });
}

let typing = 0;

async function filter() {
  await line;
  await refill();
  const { row } = state;
  if (list.ids.length && !list.places.has(row?.id)) {
    await show(list.ids[0], { play: false });
  } else if (row && list.places.has(row.id)) {
    list.choose(row.id);
    byId("place").textContent = `${list.places.get(row.id) + 1} of ${list.ids.length}`;
  }
  say(`${list.ids.length} shown`);
}

for (const id of Object.values(filters)) {
  byId(id).addEventListener(id === "f-words" ? "input" : "change", () => {
    clearTimeout(typing);
    typing = setTimeout(filter, id === "f-words" ? 250 : 0);
  });
}
byId("filters").addEventListener("submit", (event) => event.preventDefault());

function listing(is) {
  document.body.classList.toggle("listing", is);
  byId("show-list").setAttribute("aria-expanded", is);
  byId("show-list").textContent = is ? "Utterance" : "List";
  if (is) list.choose(list.current);
}

// Keys

const keys = {
  " ": ["space", "play or pause", toggle],
  a: ["a", "accept (takes back what is refused), and next", accept],
  e: ["e", "edit the text; enter keeps it, esc leaves it", () => editText()],
  d: ["d", "drop, and next", drop],
  c: ["c", "play with what is around it", withContext],
  r: ["r", "take what was recognised as the text", () => takeRecognised()],
  s: ["s", "split: arrows move the mark, enter splits", split],
  j: ["j", "join with the next one", join],
  w: ["w", "who speaks", () => byId("speaker").select()],
  v: ["v", "all speakers: rename, merge", () => open("speakers")],
  n: ["n or \u2193", "next", (since) => step(1, since)],
  b: ["b or \u2191", "previous", (since) => step(-1, since)],
  u: ["u", "undo", undo],
  "/": ["/", "find words", () => { listing(true); byId("f-words").select(); }],
  "?": ["?", "these keys", () => open("keys")],
};
const same = { ArrowDown: "n", ArrowUp: "b", Enter: "a" };

function editText() {
  const text = byId("text");
  text.focus();
  text.setSelectionRange(text.value.length, text.value.length);
}

function takeRecognised() {
  if (!state.row?.recognised) return;
  byId("text").value = state.row.recognised;
  drawDifference();
  editText();
}

function open(id) {
  if (id === "speakers") speakers();
  byId(id).showModal();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || document.querySelector("dialog[open]")) return;
  const { target, key, timeStamp } = event;
  if (!byId("splitting").hidden && event.altKey && ["1", "2"].includes(key)) {
    event.preventDefault();
    byId(key === "1" ? "play-before" : "play-behind").click();
    return;
  }
  if (event.altKey) return;
  if (key === "Escape") {
    const wasOpen = byId("plain").hidden;
    leave();
    if (target === byId("text") && state.row) {
      byId("text").value = state.row.text;
      drawDifference();
    }
    if (target.matches("input, select, textarea") || wasOpen) byId("one").focus({ preventScroll: true });
    return;
  }
  if (target.matches("input:not([type=checkbox]), select, textarea")) {
    if (key !== "Enter" || event.shiftKey || event.isComposing) return;
    if (target === byId("text")) {
      event.preventDefault();
      byId("one").focus({ preventScroll: true });
      accept(timeStamp);
    } else if (target.matches("#before, #behind, #joined")) {
      event.preventDefault();
      target.form.requestSubmit();
    } else if (target === byId("speaker")) {
      byId("one").focus({ preventScroll: true });
    }
    return;
  }
  if (byId("plain").hidden || !singleKeys.checked) return;
  const isButton = target.matches("button, [type=checkbox], a");
  if (isButton && (key === " " || key === "Enter")) return; // which the browser presses
  const found = keys[same[key] ?? (key.length === 1 ? key.toLowerCase() : key)];
  if (!found || event.repeat && !["ArrowDown", "ArrowUp", "n", "b"].includes(key)) return;
  event.preventDefault();
  found[2](timeStamp);
});

document.querySelectorAll("dialog .close").forEach((button) => button.addEventListener("click", () => button.closest("dialog").close()));

for (const [id, act] of Object.entries({
  play: toggle, accept, drop, context: withContext, split, join, undo, take: takeRecognised,
  next: (since) => step(1, since), previous: (since) => step(-1, since),
})) byId(id).addEventListener("click", (event) => act(event.timeStamp));
byId("text").addEventListener("input", drawDifference);
byId("speaker").addEventListener("change", setSpeaker);
byId("show-list").addEventListener("click", () => listing(!document.body.classList.contains("listing")));
byId("show-speakers").addEventListener("click", () => open("speakers"));
byId("show-keys").addEventListener("click", () => open("keys"));
byId("key-list").replaceChildren(...Object.values(keys).flatMap(([key, what]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, what)]));

// Other tabs

async function poll() {
  if (document.visibilityState === "visible" && !state.pending) {
    await inLine(async () => {
      try {
        const content = await get("changes", { seen: state.seen });
        if (content.sequence === state.seen && content.generation === state.generation) return;
        const several = content.rows.length === 1 ? content.rows[0].id : `${content.rows.length} utterances`;
        await take(content, []);
        if (content.generation === state.generation) say(`Another tab changed ${several}.`);
        trouble("");
      } catch (error) {
        if (error instanceof RequestError) trouble(error.message);
        else trouble("The server does not answer: start higgstune review again.");
      }
    });
  }
  setTimeout(poll, POLL);
}

addEventListener("beforeunload", (event) => {
  if (state.pending) event.preventDefault();
});

reload().then(() => { document.body.dataset.ready = "true"; }).catch((error) => trouble(error.message));
setTimeout(poll, POLL);
