// The list of samples: search, filters, order, marks, downloads, keys. Only what is near the window is in the document.
const CHUNK = 8; // samples that enter and leave the document together
const list = $("list");
const chunks = { nodes: [], found: [], height: 240, watcher: null };
const emptyChunk = make("div", { class: "chunk" });
let current = -1; // place in `chunks.found`

const controls = ["find", "word", "source", "status", "stratum", "kept", "marks", "vig-from", "vig-to", "length-from",
  "length-to", "order"].filter((id) => $(id));
const valueOf = (id) => ($(id) ? $(id).value.trim() : "");
const numberOf = (id) => (valueOf(id) === "" ? null : Number(valueOf(id).replace("−", "-")));

function wordPattern(word) {
  const plain = word.toLowerCase().replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const edge = "[\\p{L}\\p{N}_]";
  const before = new RegExp(`^${edge}`, "u").test(word) ? `(?<!${edge})` : "";
  const after = new RegExp(`${edge}$`, "u").test(word) ? `(?!${edge})` : "";
  return new RegExp(before + plain + after, "u");
}

function matching() {
  const find = valueOf("find").toLowerCase();
  const word = valueOf("word") ? wordPattern(valueOf("word")) : null;
  const source = valueOf("source");
  const [status, stratum, kept, marks] = ["status", "stratum", "kept", "marks"].map(valueOf);
  const [vigFrom, vigTo, from, to] = ["vig-from", "vig-to", "length-from", "length-to"].map(numberOf);
  const hasVig = vigFrom != null || vigTo != null;
  return samples.filter((sample) => {
    if (find && !sample.text.includes(find) && !sample.names.includes(find)) return false;
    if (source && sample.s !== Number(source)) return false;
    if (status && (status === "error" ? sample.st === "ok" || sample.st === "text_only" : sample.st !== status)) return false;
    if (stratum && !sample.w.includes(stratum)) return false;
    if (hasVig && (sample.v[0] == null || (vigFrom != null && sample.v[0] < vigFrom) || (vigTo != null && sample.v[0] > vigTo)))
      return false;
    if ((from != null && sample.length < from) || (to != null && sample.length > to)) return false;
    if (kept && isKept(sample) !== (kept === "kept")) return false;
    if (marks && marked.has(sample.k) !== (marks === "marked")) return false;
    return !word || word.test(sample.shown);
  });
}

const change = (sample) => sample.d;
const lowestToken = (sample) => {
  if (sample.least === undefined) {
    sample.least = null;
    if (sample.b[0] && sample.b[0].length) {
      for (let index = 0; index < sample.length; index += 1) {
        const vig = tokenVig(sample, 0, index);
        if (sample.least == null || vig < sample.least) sample.least = vig;
      }
    }
  }
  return sample.least;
};
const ORDERS = {
  lowest: (sample) => sample.v[0],
  highest: (sample) => (sample.v[0] == null ? null : -sample.v[0]),
  tau: (sample) => (sample.v[0] == null || thresholdOf(sample) == null ? null : Math.abs(selectedVig(sample) - thresholdOf(sample))),
  token: lowestToken,
  row: (sample) => sample.r,
  longest: (sample) => -sample.length,
  shortest: (sample) => sample.length,
  fell: change,
  rose: (sample) => -change(sample),
};

const LAST = Number.MAX_VALUE; // samples without a rank come last
const ranks = new Float64Array(samples.length); // by place
function ordered(found) {
  const rank = ORDERS[valueOf("order")] || ORDERS[state.order];
  for (const sample of found) ranks[sample.place] = rank(sample) ?? LAST;
  return found.sort((a, b) => ranks[a.place] - ranks[b.place] || a.place - b.place);
}

function refresh() {
  chunks.found = ordered(matching());
  current = -1;
  if (chunks.watcher) chunks.watcher.disconnect();
  chunks.watcher = new IntersectionObserver(onScreen, { rootMargin: "1200px 0px" });
  chunks.nodes = [];
  for (let first = 0; first < chunks.found.length; first += CHUNK) {
    const node = emptyChunk.cloneNode();
    node.first = first;
    node.style.height = chunks.height * Math.min(CHUNK, chunks.found.length - first) + "px";
    chunks.nodes.push(node);
  }
  list.replaceChildren(...chunks.nodes);
  for (const node of chunks.nodes) chunks.watcher.observe(node);
  if (chunks.nodes.length) fill(chunks.nodes[0]);
  tell();
}

function onScreen(entries) {
  for (const entry of entries) (entry.isIntersecting ? fill : empty)(entry.target);
}
function fill(node) {
  if (node.firstChild) return;
  node.append(...chunks.found.slice(node.first, node.first + CHUNK).map(renderSample));
  node.style.height = "";
}
function empty(node) {
  if (!node.firstChild || node.contains(document.activeElement)) return;
  const height = node.offsetHeight;
  chunks.height = 0.8 * chunks.height + (0.2 * height) / node.children.length;
  node.style.height = height + "px";
  node.replaceChildren();
}
function redraw() {
  for (const node of chunks.nodes) {
    if (!node.firstChild) continue;
    node.replaceChildren();
    fill(node);
  }
}

function tell() {
  const count = chunks.found.length;
  $("count").textContent = count === samples.length ? `${grouped(count)} samples on this page`
    : `${grouped(count)} of the ${grouped(samples.length)} samples on this page`;
  $("none").hidden = count > 0;
  for (const id of ["save-csv", "save-json"]) if ($(id)) $(id).disabled = !count;
  const filtering = controls.some((id) => id !== "order" && valueOf(id) !== "");
  if ($("reset")) $("reset").hidden = !filtering;
}

function onHide() {
  // The order is then that of the data: any other says something of the values.
  const order = $("order");
  if (areHidden()) [onHide.before, order.value] = [order.value, "row"];
  else if (onHide.before) order.value = onHide.before;
  order.disabled = areHidden();
  document.querySelector(".legend").hidden = areHidden();
}

function resetFilters() {
  for (const id of controls) if (id !== "order") $(id).value = "";
  refresh();
}

// ---- going to a sample

function go(place, focus = true) {
  if (place < 0 || place >= chunks.found.length) return;
  current = place;
  const node = chunks.nodes[Math.floor(place / CHUNK)];
  fill(node);
  const article = node.children[place % CHUNK];
  for (const other of list.querySelectorAll(".current")) other.classList.remove("current");
  article.classList.add("current");
  article.scrollIntoView({ block: "start" });
  if (focus) article.focus({ preventScroll: true });
  requestAnimationFrame(() => article.isConnected && article.scrollIntoView({ block: "start" }));
}

function followLink() {
  if (location.hash.length < 2) return;
  let key;
  try { key = decodeURIComponent(location.hash.slice(1)); } catch { return; }
  const sample = byKey.get(key);
  if (!sample) return;
  let place = chunks.found.indexOf(sample);
  if (place < 0) {
    resetFilters();
    place = chunks.found.indexOf(sample);
  }
  go(place);
}

// ---- downloads

function wanted() {
  const first = numberOf("first");
  return first > 0 ? chunks.found.slice(0, first) : chunks.found;
}
const plainAnswer = (sample) => sample.t.filter((text) => !SPECIAL.test(text.trim())).join("");
// A spreadsheet takes text that begins with one of these for a formula.
const cell = (value) => {
  let text = value == null ? "" : String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
  return /[",\n\r]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
};
function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
function saveCsv() {
  const columns = ["key", "id", "source", "status", "vig", "n_tokens", "kept", "marked", "question", "answer"];
  const ownMean = samples.some((sample) => sample.c != null);
  if (state.passes.length > 1) columns.splice(5, 0, "vig_other");
  if (ownMean) columns.splice(5, 0, "vig_selected");
  const rows = wanted().map((sample) => {
    const values = [sample.k, sample.i, state.sources[sample.s], sample.st, sample.v[0]];
    if (ownMean) values.push(sample.c);
    if (state.passes.length > 1) values.push(sample.v[1]);
    return [...values, sample.length, isKept(sample) ? 1 : 0, marked.has(sample.k) ? 1 : 0, sample.q, plainAnswer(sample)];
  });
  save(state.file + ".csv", "text/csv", [columns, ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n");
  onExport(wanted());
}
function saveJson() {
  const filters = Object.fromEntries(controls.map((id) => [id, valueOf(id)]).filter(([, value]) => value !== ""));
  const keys = wanted().map((sample) => sample.k);
  const made = { data: state.data, scores: state.scores, filters, keys, marked: keys.filter((key) => marked.has(key)) };
  save(state.file + ".json", "application/json", JSON.stringify(made, null, 1) + "\n");
  onExport(wanted());
}

// ---- keys

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && !["range", "checkbox"].includes(event.target.type);
  if (typing) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const here = chunks.found[current];
  const actions = {
    j: () => go(current + 1), k: () => go(Math.max(current - 1, 0)),
    "/": () => $("find") && ($("find").focus(), $("find").select()),
    "?": () => $("help").showModal(),
    x: () => here && toggleMark(here),
    z: () => here && zoom(here, 0),
  };
  if (!actions[event.key]) return;
  event.preventDefault();
  actions[event.key]();
}

function onPrint() {
  // On paper: the first samples in full, and none of the empty places behind them.
  const nodes = chunks.nodes.slice(0, Math.ceil(48 / CHUNK));
  nodes.forEach(fill);
  for (const node of chunks.nodes.slice(nodes.length)) node.hidden = true;
  $("print-note").textContent = `The first ${Math.min(48, chunks.found.length)} of ${grouped(chunks.found.length)} samples.`;
}

if (list) {
  let waiting = 0;
  for (const id of controls) {
    $(id).addEventListener("input", () => { // keys that come faster than the list is drawn are taken together
      clearTimeout(waiting);
      waiting = setTimeout(refresh);
    });
  }
  for (const button of document.querySelectorAll("button[data-word]")) {
    button.addEventListener("click", () => {
      $("word").value = button.dataset.word;
      refresh();
      $("samples-heading").scrollIntoView();
    });
  }
  if ($("reset")) $("reset").addEventListener("click", resetFilters);
  if ($("save-csv")) $("save-csv").addEventListener("click", saveCsv);
  if ($("save-json")) $("save-json").addEventListener("click", saveJson);
  $("help-open").addEventListener("click", () => $("help").showModal());
  $("help-close").addEventListener("click", () => $("help").close());
  if ($("hide")) {
    $("hide").addEventListener("input", () => { onHide(); refresh(); });
    onHide();
  }
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", followLink);
  window.addEventListener("beforeprint", onPrint);
  window.addEventListener("afterprint", () => { for (const node of chunks.nodes) node.hidden = false; });
  refresh();
  followLink();
}
