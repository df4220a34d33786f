// Marks that a reader sets. They stay in this browser, for this file and these data, where the browser lets the page keep
// them; where it does not, the reader is asked before marks that were not exported are lost.
const PLACE = ["vig marks", location.pathname, state.fingerprint || state.data].join(" ");
const marked = new Set(); // keys, of samples on this page
const marks = { away: [], kept: true, lost: false }; // away: of other samples; lost: by leaving the page now

function readMarks() {
  try {
    const stored = JSON.parse(localStorage.getItem(PLACE) || "[]").filter((key) => typeof key === "string");
    marked.clear();
    for (const key of stored) if (byKey.has(key)) marked.add(key);
    marks.away = stored.filter((key) => !byKey.has(key));
  } catch { marks.kept = false; }
}
function writeMarks() {
  const all = [...marked, ...marks.away];
  try {
    if (all.length) localStorage.setItem(PLACE, JSON.stringify(all));
    else localStorage.removeItem(PLACE);
    marks.kept = true;
  } catch { marks.kept = false; }
  marks.lost = !marks.kept && marked.size > 0;
}

function tellMarks() {
  if ($("marks")) $("marks").options[1].text = `marked (${marked.size})`;
  $("marks-kept").textContent = marks.kept ? "Marks stay in this browser, for this file. Export them to keep them elsewhere."
    : "This browser lets the page keep no marks: export them before you leave it.";
}
function toggleMark(sample) {
  if (!marked.delete(sample.k)) marked.add(sample.k);
  writeMarks();
  const article = list.querySelector(`article[data-place="${sample.place}"]`);
  if (article) {
    article.classList.toggle("marked", marked.has(sample.k));
    article.querySelector(".mark").setAttribute("aria-pressed", String(marked.has(sample.k)));
  }
  tellMarks();
}
function onExport(exported) {
  const keys = new Set(exported.map((sample) => sample.k));
  if ([...marked].every((key) => keys.has(key))) marks.lost = false;
}

readMarks();
tellMarks();
window.addEventListener("storage", (event) => { // the same page, open a second time
  if (event.key !== PLACE && event.key !== null) return;
  readMarks();
  tellMarks();
  redraw();
});
window.addEventListener("beforeunload", (event) => { if (marks.lost) event.preventDefault(); });
