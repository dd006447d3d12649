// Texts compared word by word, and divided where a sound is split.

const unspaced = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}]/u;

// Words with what separates them; of scripts that part no words, characters.
export function wordsOf(text) {
  const words = [];
  for (const word of text.trim().split(/\s+/u).filter(Boolean)) {
    if (unspaced.test(word)) words.push(...word);
    else words.push(word);
  }
  return words;
}

const keyOf = (word) => word.normalize("NFKC").toLowerCase().replace(/[^\p{L}\p{N}\p{M}]+/gu, "");

// [["same" | "text" | "recognised", words]] by the longest common sequence; case and punctuation make no difference.
export function difference(text, recognised) {
  const own = wordsOf(text);
  const other = wordsOf(recognised);
  const keys = own.map(keyOf);
  const others = other.map(keyOf);
  const width = others.length + 1;
  const common = new Uint16Array((keys.length + 1) * width);
  for (let i = keys.length - 1; i >= 0; i--) {
    for (let j = others.length - 1; j >= 0; j--) {
      common[i * width + j] = keys[i] === others[j]
        ? common[(i + 1) * width + j + 1] + 1
        : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const runs = [];
  const add = (kind, word) => {
    const last = runs[runs.length - 1];
    if (last && last[0] === kind) last[1].push(word);
    else runs.push([kind, [word]]);
  };
  let i = 0;
  let j = 0;
  while (i < keys.length || j < others.length) {
    if (i < keys.length && j < others.length && keys[i] === others[j]) {
      add("same", own[i]);
      i += 1;
      j += 1;
    } else if (j === others.length || (i < keys.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) {
      if (keys[i]) add("text", own[i]);
      else add("same", own[i]); // a dash alone
      i += 1;
    } else {
      if (others[j]) add("recognised", other[j]);
      j += 1;
    }
  }
  return runs;
}

// Both parts of a text at a share of its speech, between two words, at a mark of punctuation if one is near.
export function divided(text, share) {
  const words = text.trim().split(/\s+/u).filter(Boolean);
  const whole = words.join(" ").length;
  let best = 0;
  let cost = Infinity;
  let length = 0;
  for (let place = 0; place <= words.length; place++) {
    const ends = place > 0 && /[.!?;:,\u2026\u3002\uff01\uff1f\uff0c]["'\u201d\u2019)]*$/u.test(words[place - 1]);
    const away = Math.abs(length / Math.max(whole, 1) - share) - (ends ? 0.08 : 0);
    if (away < cost) {
      cost = away;
      best = place;
    }
    length += place < words.length ? words[place].length + 1 : 0;
  }
  return [words.slice(0, best).join(" "), words.slice(best).join(" ")];
}
