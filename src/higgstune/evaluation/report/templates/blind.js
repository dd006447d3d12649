// The blind test. Sets and their order come with the page; votes stay in the browser until they are saved.
function signTest(wins, losses) {
  // Two-sided, exact: how likely a split at least as uneven is, if either is as often preferred.
  const n = wins + losses;
  let term = -n * Math.LN2, tail = 0; // the logarithm of C(n, k) / 2^n, from k = 0 on
  for (let k = 0; k <= Math.min(wins, losses); k++) {
    tail += Math.exp(term);
    term += Math.log(n - k) - Math.log(k + 1);
  }
  return n === 0 ? 1 : Math.min(1, 2 * tail);
}

function countVotes(systems, sets, votes) {
  // Wins of each system; ties; and each pair of systems, counted where one of the two was preferred to the other.
  const wins = systems.map(() => 0), pairs = [];
  let ties = 0;
  for (let a = 0; a < systems.length; a++) for (let b = a + 1; b < systems.length; b++) pairs.push({ a, b, wins: [0, 0], ties: 0, other: 0 });
  sets.forEach((set, i) => {
    const best = votes[i] === "none" ? null : set.takes[votes[i]].system;
    if (best === null) ties++; else wins[best]++;
    const present = set.takes.map((take) => take.system);
    for (const pair of pairs) {
      if (!present.includes(pair.a) || !present.includes(pair.b)) continue;
      if (best === null) pair.ties++;
      else if (best === pair.a) pair.wins[0]++;
      else if (best === pair.b) pair.wins[1]++;
      else pair.other++;
    }
  });
  return { wins, ties, pairs: pairs.map((pair) => ({ ...pair, p: signTest(...pair.wins) })) };
}

if (typeof document !== "undefined") {
  const find = (id) => document.getElementById(id);
  const dialog = find("blind"), data = JSON.parse(find("blind-data").textContent);
  const { sets, systems, labels } = data, place = "higgstune-blind-" + data.key;
  const player = new Audio();
  let votes = savedVotes(), playing = null, played = new Set();

  function savedVotes() {
    try {
      const kept = JSON.parse(localStorage.getItem(place));
      const fits = (vote, i) => vote === "none" || (Number.isInteger(vote) && vote >= 0 && vote < sets[i].takes.length);
      return Array.isArray(kept) && kept.length <= sets.length && kept.every(fits) ? kept : [];
    } catch {
      return []; // nothing kept, or the browser keeps nothing
    }
  }

  function keep() {
    try {
      localStorage.setItem(place, JSON.stringify(votes));
      return "";
    } catch {
      return " This browser keeps no votes: save them before you close the page.";
    }
  }

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function button(text, key, action) {
    const made = element("button", text, { type: "button" });
    made.append(element("kbd", key));
    made.setAttribute("aria-keyshortcuts", key);
    made.addEventListener("click", action);
    return made;
  }

  function stop() {
    player.pause();
    playing = null;
    for (const each of find("blind-plays").children) each.setAttribute("aria-pressed", "false");
  }

  async function play(i) {
    const wasPlaying = playing === i;
    stop();
    if (wasPlaying) return;
    playing = i;
    const round = votes.length, source = find(sets[round].takes[i].audio).src;
    if (player.src !== source) player.src = source;
    player.currentTime = 0;
    find("blind-plays").children[i].setAttribute("aria-pressed", "true");
    try {
      await player.play();
      if (round === votes.length) markPlayed(i);
    } catch (error) {
      if (error.name !== "AbortError") find("blind-status").textContent = "The clip cannot be played: " + error.message;
    }
  }

  function markPlayed(i) {
    played.add(i);
    const ready = played.size === sets[votes.length].takes.length;
    for (const each of find("blind-choices").children) each.setAttribute("aria-disabled", String(!ready));
    if (ready) find("blind-status").textContent = "You can vote now.";
  }

  function vote(choice) {
    if (votes.length === sets.length) return;
    if (played.size < sets[votes.length].takes.length) {
      find("blind-status").textContent = "Play each of them first.";
      return;
    }
    votes.push(choice);
    const said = choice === "none" ? "No difference" : labels[choice] + " is best";
    show("Noted: " + said + "." + keep());
  }

  function undo() {
    if (votes.length === 0) return;
    votes.pop();
    show("The last vote is undone." + keep());
  }

  function restart() {
    if (votes.length && !confirm("Delete all votes and start again?")) return;
    votes = [];
    show("All votes are deleted." + keep());
  }

  function save() {
    const done = votes.length === sets.length;
    // Before the end the file has only labels, so that reading it does not unblind.
    const rows = votes.map((choice, i) => ({
      text: sets[i].text,
      vote: choice === "none" ? "no difference" : labels[choice],
      ...(done && { order: sets[i].takes.map((take) => systems[take.system]) }),
      ...(done && choice !== "none" && { system: systems[sets[i].takes[choice].system] }),
    }));
    const saved = { test: data.key, seed: data.seed, texts: sets.length, done: rows.length, votes: rows };
    if (done) saved.result = { systems, ...countVotes(systems, sets, votes) };
    const link = element("a", "", { download: "blind-votes-" + data.key + ".json" });
    link.href = URL.createObjectURL(new Blob([JSON.stringify(saved, null, 1)], { type: "application/json" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    find("blind-status").textContent = rows.length + " votes are saved.";
  }

  function show(status) {
    stop();
    played = new Set();
    const done = votes.length === sets.length;
    find("blind-count").textContent = done ? "all " + sets.length + " texts" : "text " + (votes.length + 1) + " of " + sets.length;
    find("blind-progress").value = votes.length;
    find("blind-vote").hidden = done;
    find("blind-result").hidden = !done;
    find("blind-undo").disabled = votes.length === 0;
    find("blind-start").textContent = votes.length === 0 ? "Start the blind test" : done ? "Show the result of the blind test" : "Continue the blind test";
    if (done) showResult(); else showSet(sets[votes.length]);
    find("blind-status").textContent = status;
    if (dialog.open) find("blind-h").focus();
  }

  function showSet(set) {
    find("blind-text").textContent = set.text;
    find("blind-text").lang = set.language;
    const count = set.takes.map((_, i) => i);
    find("blind-plays").replaceChildren(...count.map((i) => button("Play " + labels[i], String(i + 1), () => play(i))));
    find("blind-choices").replaceChildren(
      ...count.map((i) => button(labels[i] + (count.length > 2 ? " is best" : " is better"), labels[i], () => vote(i))),
      button("No difference", "0", () => vote("none")),
    );
    for (const each of find("blind-plays").children) each.setAttribute("aria-pressed", "false");
    for (const each of find("blind-choices").children) each.setAttribute("aria-disabled", "true");
  }

  function showResult() {
    const { wins, ties, pairs } = countVotes(systems, sets, votes);
    const list = element("ul", "");
    systems.forEach((name, i) => list.append(element("li", name + ": preferred in " + wins[i] + " of " + sets.length + " texts")));
    list.append(element("li", "no difference: in " + ties + " of " + sets.length));
    const preferences = pairs.map(({ a, b, wins: [x, y], p }) =>
      element("p", systems[a] + " " + x + ", " + systems[b] + " " + y + ": " + (p < 0.001 ? "p < 0.001" : "p = " + p.toFixed(3)) +
        (p < 0.05 ? ", a preference beyond chance." : ", which chance alone can explain.")));
    const note = element("p", "p of a two-sided sign test over the texts where one of the two was preferred; ties do not count.", { class: "note" });
    find("blind-result").replaceChildren(element("h3", "Your result"), list, ...preferences, note);
  }

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const key = event.key.toUpperCase(), done = votes.length === sets.length;
    const count = done ? 0 : sets[votes.length].takes.length;
    if (key === "U") undo();
    else if (key === "S") save();
    else if (key === "0" && !done) vote("none");
    else if (/^[1-9]$/.test(key) && key <= count) play(key - 1);
    else if (key.length === 1 && labels.includes(key) && labels.indexOf(key) < count) vote(labels.indexOf(key));
    else return;
    event.preventDefault();
  }

  player.addEventListener("timeupdate", () => {
    if (playing !== null) find("blind-plays").children[playing].style.setProperty("--played", player.currentTime / player.duration || 0);
  });
  player.addEventListener("ended", stop);
  dialog.addEventListener("keydown", pressed);
  dialog.addEventListener("close", stop);
  find("blind-start").addEventListener("click", () => {
    for (const audio of document.querySelectorAll("audio")) audio.pause();
    dialog.showModal();
    show("Play each of them, then vote.");
  });
  find("blind-close").addEventListener("click", () => dialog.close());
  find("blind-undo").addEventListener("click", undo);
  find("blind-save").addEventListener("click", save);
  find("blind-restart").addEventListener("click", restart);
  find("blind-start").hidden = false;
  show("");
}
