// What the page was given, and how values look. Text from the data enters the document as text alone, never as markup.
const given = (id) => JSON.parse(document.getElementById(id).textContent);
const state = given("state");
const samples = given("samples");
const pictures = given("pictures");
const UNIT = 1e-4; // nats a whole number of token values stands for
const $ = (id) => document.getElementById(id);

function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

// Characters that cannot be seen, or that turn the text around them, are shown by name.
const HIDDEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u202d\u202e]/g;
function visible(text) {
  return text.replace(HIDDEN, (char) => {
    const code = char.charCodeAt(0);
    if (code > 127) return "⟨U+" + code.toString(16).toUpperCase() + "⟩";
    return String.fromCharCode(code === 127 ? 0x2421 : 0x2400 + code);
  });
}

function fixed(value, digits) {
  return value.toFixed(digits).replace("-", "−");
}
function signed(value) {
  const digits = value !== 0 && Math.abs(value) < 0.005 ? 4 : 2;
  const text = fixed(value, digits);
  if (!/[1-9]/.test(text)) return "0.00";
  return value > 0 ? "+" + text : text;
}
function rounded(value) {
  if (value == null || Number.isNaN(value)) return "none";
  const text = Number(value.toPrecision(3));
  return String(Math.abs(text) < 1e-3 && text !== 0 ? text.toExponential() : text).replaceAll("-", "−").replace("+", "");
}
const grouped = (count) => count.toLocaleString("en-US");
const percent = (part, whole) => (whole ? ((100 * part) / whole).toFixed(1) : "0.0") + " %";

function shade(vig) {
  let level = 0;
  while (level < state.steps.length && Math.abs(vig) >= state.steps[level]) level += 1;
  return level ? (vig > 0 ? "p" : "n") + level : "z";
}

// ---- samples: values of the tokens, and what is kept

const SPECIAL = /^(<[^<>\s]{1,40}>|\[[A-Z_]{2,20}\])$/;
for (const [place, sample] of samples.entries()) {
  sample.place = place;
  sample.answer = sample.t.join("");
  sample.shown = visible(sample.answer).toLowerCase();
  sample.text = visible(sample.q + "\n" + sample.u.map((turn) => turn[1]).join("\n")).toLowerCase() + "\n" + sample.shown;
  sample.names = (sample.k + "\n" + sample.i).toLowerCase();
  sample.length = sample.t.length;
}
const byKey = new Map(samples.map((sample) => [sample.k, sample]));
const tokenVig = (sample, pass, index) => (sample.b[pass][index] - sample.a[pass][index]) * UNIT;
// What tau is compared with: as the selection takes it, clipped or with a mean of its own.
const selectedVig = (sample) => (sample.c == null ? sample.v[0] : sample.c);
const MOST = state.clip == null ? Infinity : -state.clip / UNIT; // of a token's NLL
const selectedTokenVig = (sample, index) => (Math.min(sample.b[0][index], MOST) - Math.min(sample.a[0][index], MOST)) * UNIT;

// Likely without the image too: kept whatever its VIG, where the selection keeps such tokens.
const isEasy = (sample, index) => state.easy != null && sample.b[0][index] * UNIT < state.easy;

// Whether samples are shown without their values, for a reader who is to judge their answers unswayed.
const areHidden = () => $("hide") != null && $("hide").checked;

// Which place of the slider is looked at, null for the selection that the page was made with.
const preview = { place: null, rule: "all" };
function thresholdOf(sample) {
  if (preview.place == null) return state.tau;
  const source = preview.rule === "source" ? sample.s : state.keep.sources.length;
  return state.keep.taus[source][preview.place];
}
function keptTokens(sample) {
  // one boolean a token; null where nothing is known of it
  if (sample.st !== "ok" && sample.st !== "text_only") return null;
  if (preview.place == null && sample.m[0] != null) return [...sample.m[0]].map((mark) => mark === "1");
  if (preview.place == null && state.selected) return null;
  if (preview.place == null && !state.keep) return null;
  if (sample.st === "text_only") return sample.t.map(() => true);
  const tau = thresholdOf(sample);
  if (tau == null) return null;
  if (!isKeptByVig(sample, tau)) return sample.t.map((_, index) => isEasy(sample, index));
  const stops = new Set(sample.e);
  return sample.t.map((_, index) => state.level === "sample" || stops.has(index) || selectedTokenVig(sample, index) >= tau
    || isEasy(sample, index));
}
function isKept(sample) {
  if (sample.st === "text_only") return true;
  if (sample.st !== "ok") return false;
  if (preview.place == null && sample.m[0] != null) return sample.m[0].includes("1");
  const tau = thresholdOf(sample);
  if (tau == null) return false;
  return isKeptByVig(sample, tau) || sample.t.some((_, index) => isEasy(sample, index));
}
function isKeptByVig(sample, tau) {
  return state.level === "token" ? sample.t.some((_, index) => selectedTokenVig(sample, index) >= tau) : selectedVig(sample) >= tau;
}
