// What opens beneath or above an utterance: splitting it, joining it with the next one, naming speakers.

import { byId, element, say, seconds } from "./common.js";
import { counts, decide, list, player, playing, show, start, state } from "./review.js"; // used only once both are loaded
import { divided } from "./review_text.js";

const STEP = 0.01; // seconds, of the arrow keys

// Splitting

export function leave() {
  byId("splitting").hidden = byId("joining").hidden = true;
  byId("plain").hidden = false;
  player.mark = null;
  player.draw();
}

export function split() {
  const { sound } = player;
  if (!sound || byId("split").disabled) {
    say("Splitting needs the recording.");
    return;
  }
  const at = player.position;
  player.stop();
  playing(false);
  byId("plain").hidden = true;
  byId("joining").hidden = true;
  byId("splitting").hidden = false;
  byId("mark").max = (sound.end - sound.start).toFixed(2);
  state.written = false;
  setMark(at !== null && at > sound.start && at < sound.end ? at : middlePause());
  byId("mark").focus();
}

// Seconds of the sound: the middle of the longest pause, or of the utterance.
function middlePause() {
  const { row } = state;
  const { sound } = player;
  let best = [0, (row.start + row.end) / 2];
  for (let index = 1; index < row.speech.length; index++) {
    const [from, to] = [row.speech[index - 1][1], row.speech[index][0]];
    if (to - from > best[0]) best = [to - from, (from + to) / 2];
  }
  return best[1] - row.start + sound.start;
}

export function setMark(time) {
  const { sound } = player;
  player.mark = Math.min(Math.max(time, sound.start + STEP), sound.end - STEP);
  byId("mark").value = (player.mark - sound.start).toFixed(2);
  player.draw();
  if (state.written) return;
  const at = state.row.start + player.mark - sound.start;
  let [before, whole] = [0, 0];
  for (const [from, to] of state.row.speech) {
    whole += to - from;
    before += Math.min(Math.max(at - from, 0), to - from);
  }
  [byId("before").value, byId("behind").value] = divided(byId("text").value, whole ? before / whole : 0.5);
}

async function doSplit() {
  const { row } = state;
  const at = Number((row.start + player.mark - player.sound.start).toFixed(3));
  const texts = [byId("before").value.trim(), byId("behind").value.trim()];
  leave();
  const content = await decide({ decision: { id: row.id, cut: [at], texts } }, [row.id], null);
  if (!content) return;
  const first = content.rows.find((one) => one.start >= row.start - STEP && one.end <= row.end + STEP);
  if (first) await show(first.id);
  say("Split. The next collect measures both.");
}

export function join() {
  const { row } = state;
  if (!row?.next || byId("join").disabled) {
    say("There is nothing to join with.");
    return;
  }
  byId("plain").hidden = true;
  byId("splitting").hidden = true;
  byId("joining").hidden = false;
  byId("gap").textContent = `${row.next.id} begins ${seconds(row.next.gap)} later; together they last ${seconds(row.next.end - row.start)}.`;
  byId("joined").value = `${byId("text").value.trim()} ${row.next.text.trim()}`.trim();
  byId("joined").focus();
}

async function doJoin() {
  const { row } = state;
  const text = byId("joined").value.trim();
  leave();
  const content = await decide({ decision: { id: row.id, join: row.next.id, text } }, [row.id], null);
  if (!content) return;
  await show(row.id);
  say("Joined. The next collect measures it.");
}

// Speakers

export function setSpeaker() {
  const { row } = state;
  const speaker = byId("speaker").value.trim();
  if (!speaker || speaker === row.speaker) {
    byId("speaker").value = row.speaker ?? "";
    return;
  }
  decide({ decision: { id: row.id, speaker } }, [row.id], { speaker });
}

export function speakers() {
  const counts = state.all.speakers;
  const items = Object.entries(counts).map(([name, count], index) => {
    const input = element("input", { id: `speaker-${index}`, list: "names", autocomplete: "off", value: name });
    const button = element("button", { type: "submit", disabled: true }, "Rename");
    const form = element("form", {}, element("label", { for: `speaker-${index}` }, `${name} (${count})`, input), button);
    input.addEventListener("input", () => {
      const to = input.value.trim();
      button.disabled = !to || to === name;
      button.textContent = to !== name && to in counts ? "Merge" : "Rename";
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const to = input.value.trim();
      if (!to || to === name) return;
      await rename(name, to);
      await countSpeakers();
      byId("speaker-list").querySelector("input")?.focus();
    });
    return element("li", {}, form);
  });
  byId("speaker-list").replaceChildren(...(items.length ? items : [element("li", {}, "No speaker has a name.")]));
}

async function countSpeakers() {
  await counts();
  speakers();
}

async function rename(name, to) {
  const content = await decide({ rename: name, to }, [], null);
  if (content) say(`${name} is now ${to}.`);
}

// What is pressed in them

byId("mark").addEventListener("input", () => {
  const value = byId("mark").valueAsNumber;
  if (Number.isFinite(value)) {
    const typed = byId("mark").value;
    setMark(player.sound.start + value);
    byId("mark").value = typed;
  }
});
byId("mark").addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -STEP, ArrowDown: -STEP, ArrowRight: STEP, ArrowUp: STEP }[event.key];
  if (!by) return;
  event.preventDefault();
  setMark(player.mark + by * (event.shiftKey ? 10 : 1));
});
for (const id of ["before", "behind"]) byId(id).addEventListener("input", () => { state.written = true; });
byId("play-before").addEventListener("click", (event) => start(event.timeStamp, player.sound.start, player.mark));
byId("play-behind").addEventListener("click", (event) => start(event.timeStamp, player.mark, player.sound.end));
byId("splitting").addEventListener("submit", (event) => { event.preventDefault(); doSplit(); });
byId("joining").addEventListener("submit", (event) => { event.preventDefault(); doJoin(); });
document.querySelectorAll(".leave").forEach((button) => button.addEventListener("click", leave));
