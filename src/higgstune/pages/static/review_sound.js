// Sounds of utterances: fetched ahead, drawn, and played from memory, so that a key sounds at once.

const KEPT = 12;
const BARS = 2; // pixels a bar

export class Player {
  constructor(canvas, onEnd) {
    this.canvas = canvas;
    this.onEnd = onEnd;
    this.known = new Map();
    this.audio = new AudioContext({ latencyHint: "interactive" });
    this.sound = null;
    this.source = null;
    this.mark = null; // seconds of the sound, where it would be split
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  forget() {
    this.known.clear();
  }

  load(id) {
    let found = this.known.get(id);
    if (found) this.known.delete(id);
    else {
      found = this.fetched(id);
      found.catch(() => this.known.delete(id));
    }
    this.known.set(id, found); // the last one used is the last one to be dropped
    for (const old of this.known.keys()) {
      if (this.known.size <= KEPT) break;
      this.known.delete(old);
    }
    return found;
  }

  async fetched(id) {
    const response = await fetch(`sound?${new URLSearchParams({ id })}`);
    if (!response.ok) throw new Error((await response.json()).error);
    const number = (name) => Number(response.headers.get(name));
    const [start, end, context] = ["X-Start", "X-End", "X-Context"].map(number);
    const buffer = bufferOf(this.audio, await response.arrayBuffer());
    return { id, buffer, start, end, hasContext: Boolean(context), peaks: null };
  }

  show(sound) {
    this.stop();
    this.sound = sound;
    this.mark = null;
    this.draw();
  }

  // From one second of the sound to another; `since` is the time of the key, for measuring.
  play(from, to, since) {
    this.halt();
    if (!this.sound) return;
    if (this.audio.state !== "running") this.audio.resume();
    const source = this.audio.createBufferSource();
    source.buffer = this.sound.buffer;
    source.connect(this.audio.destination);
    source.start(0, from, Math.max(to - from, 0.01));
    this.source = source;
    this.from = from;
    this.began = this.audio.currentTime;
    source.onended = () => {
      if (this.source === source) {
        this.source = null;
        this.draw();
        this.onEnd();
      }
    };
    if (since) {
      const latency = (this.audio.baseLatency || 0) + (this.audio.outputLatency || 0);
      document.body.dataset.keyToSound = (performance.now() - since + 1000 * latency).toFixed(1);
    }
    this.follow();
  }

  get playing() {
    return this.source !== null;
  }

  get position() {
    return this.source ? this.from + this.audio.currentTime - this.began : null;
  }

  halt() {
    if (this.source) {
      const source = this.source;
      this.source = null;
      source.stop();
    }
  }

  stop() {
    this.halt();
    this.draw();
  }

  follow() {
    if (!this.source) return;
    this.draw();
    requestAnimationFrame(() => this.follow());
  }

  // Seconds of the sound at a place on the screen.
  at(clientX) {
    const box = this.canvas.getBoundingClientRect();
    const share = Math.min(Math.max((clientX - box.left) / box.width, 0), 1);
    return share * this.sound.buffer.duration;
  }

  draw() {
    const { canvas, sound } = this;
    const scale = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = canvas.clientHeight;
    if (!width || !height) return;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    if (!sound) return;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name);
    const place = (time) => (time / sound.buffer.duration) * width;
    const bars = Math.floor(width / BARS);
    if (!sound.peaks || sound.peaks.length !== bars) sound.peaks = peaksOf(sound.buffer.getChannelData(0), bars);
    const loudest = Math.max(...sound.peaks, 0.02);
    sound.peaks.forEach((peak, bar) => {
      const time = (bar / bars) * sound.buffer.duration;
      const inside = time >= sound.start && time <= sound.end;
      const tall = Math.max((peak / loudest) * (height - 14), 1);
      pen.fillStyle = colour(inside ? "--accent" : "--edge");
      pen.fillRect(bar * BARS, (height - tall) / 2, BARS - 0.5, tall);
    });
    pen.fillStyle = colour("--ink");
    for (const edge of sound.hasContext ? [sound.start, sound.end] : []) pen.fillRect(place(edge) - 0.5, 0, 1, height);
    pen.fillStyle = colour("--bad");
    if (this.mark !== null) {
      pen.fillRect(place(this.mark) - 1, 0, 2, height);
      pen.fillRect(place(this.mark) - 6, 0, 12, 8);
    }
    if (this.position !== null) {
      pen.fillStyle = colour("--ink");
      pen.fillRect(place(this.position) - 1, 0, 2, height);
    }
  }
}

// A WAV file of 16 bits and one channel, as the server writes it. (Decoding by the browser would resample it first.)
function bufferOf(audio, bytes) {
  const view = new DataView(bytes);
  const rate = view.getUint32(24, true);
  let place = 12;
  while (view.getUint32(place, false) !== 0x64617461) place += 8 + view.getUint32(place + 4, true); // "data"
  const count = view.getUint32(place + 4, true) / 2;
  const buffer = audio.createBuffer(1, Math.max(count, 1), rate);
  const samples = buffer.getChannelData(0);
  for (let index = 0; index < count; index++) samples[index] = view.getInt16(place + 8 + 2 * index, true) / 32768;
  return buffer;
}

function peaksOf(samples, bars) {
  const peaks = new Float32Array(bars);
  for (let bar = 0; bar < bars; bar++) {
    const end = Math.floor(((bar + 1) * samples.length) / bars);
    let peak = 0;
    for (let index = Math.floor((bar * samples.length) / bars); index < end; index++) {
      const size = Math.abs(samples[index]);
      if (size > peak) peak = size;
    }
    peaks[bar] = peak;
  }
  return peaks;
}
