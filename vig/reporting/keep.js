// The slider for p: what `vig select` would keep, from counts of all samples, not only of those on this page.
const slider = $("p");

function drawKeep() {
  const keep = state.keep;
  const place = Number(slider.value);
  const rule = preview.rule;
  const p = keep.p[place];
  const n = keep.sources.length;
  const sum = (rows) => rows.reduce((total, row) => total + row[place], 0);
  const totals = [0, 1].map((column) => keep.totals.reduce((total, row) => total + row[column], 0));
  const samplesKept = sum(keep.samples[rule]);
  const tokensKept = sum(keep.tokens[rule]);
  const tau = rule === "all" ? keep.taus[n][place] : null;
  $("p-value").textContent = String(p);
  $("tau-value").textContent = tau == null ? "one a source" : rounded(tau);
  $("samples-value").textContent = grouped(samplesKept);
  $("samples-share").textContent = `${percent(samplesKept, totals[0])} of ${grouped(totals[0])} with an image`;
  $("tokens-value").textContent = grouped(tokensKept);
  $("tokens-share").textContent = `${percent(tokensKept, totals[1])} of ${grouped(totals[1])} in their answers`;
  $("command").textContent = state.command.replace("{p}", String(p)) + (rule === "source" ? " --by source" : "") + ` -o selection-${p}/`;
  for (const row of document.querySelectorAll("#by-source tr[data-source]")) {
    const code = Number(row.dataset.source);
    const counts = [keep.samples[rule][code][place], keep.tokens[rule][code][place]];
    const cells = row.querySelectorAll("td");
    counts.forEach((count, column) => {
      cells[column].querySelector("rect").setAttribute("width", percent(count, keep.totals[code][column]).replace(" ", ""));
      cells[column].querySelector("span").textContent = `${grouped(count)} (${percent(count, keep.totals[code][column])})`;
    });
    cells[2].textContent = rounded(keep.taus[rule === "source" ? code : n][place]);
  }
  for (const plot of document.querySelectorAll("svg.curves")) moveMark(plot, p, "p = " + p);
  for (const plot of document.querySelectorAll("svg.plot[data-low]:not(.curves)")) {
    if (tau != null) moveMark(plot, tau, "τ = " + rounded(tau));
    const mark = plot.querySelector("g.tau");
    if (mark) mark.setAttribute("visibility", tau == null ? "hidden" : "visible");
  }
}

function moveMark(plot, value, label) {
  const low = Number(plot.dataset.low);
  const place = Math.min(Math.max((value - low) / (Number(plot.dataset.high) - low), 0), 1) * 100;
  const [line, text] = ["line", "text"].map((tag) => plot.querySelector(`g.tau ${tag}`));
  if (!line) return;
  for (const name of ["x1", "x2"]) line.setAttribute(name, place + "%");
  text.setAttribute("x", place + "%");
  text.setAttribute("dx", place > 75 ? -5 : 5);
  text.setAttribute("text-anchor", place > 75 ? "end" : "start");
  text.textContent = label;
}

function tauOfLegend() {
  const tau = preview.place == null ? state.tau : preview.rule === "all" ? state.keep.taus[state.keep.sources.length][preview.place] : null;
  if ($("legend-tau")) $("legend-tau").textContent = tau == null ? "" : `(τ = ${rounded(tau)})`;
}

function onKeep() {
  preview.place = Number(slider.value);
  const chosen = document.querySelector("input[name=rule]:checked");
  preview.rule = chosen ? chosen.value : "all";
  const asGiven = preview.place === state.place && preview.rule === state.rule;
  if (asGiven && state.selected) preview.place = null;
  drawKeep();
  tauOfLegend();
  clearTimeout(onKeep.waiting);
  onKeep.waiting = setTimeout(() => {
    if (valueOf("kept") || valueOf("order") === "tau") refresh();
    else redraw();
  }, 80);
}

if (slider) {
  slider.addEventListener("input", onKeep);
  for (const choice of document.querySelectorAll("input[name=rule]")) choice.addEventListener("input", onKeep);
  preview.rule = state.rule;
  if (!state.selected) preview.place = state.place;
  drawKeep();
  $("copy").addEventListener("click", async () => {
    try { await navigator.clipboard.writeText($("command").textContent); $("copy").textContent = "copied"; }
    catch { getSelection().selectAllChildren($("command")); }
    setTimeout(() => { $("copy").textContent = "copy"; }, 1500);
  });
}
