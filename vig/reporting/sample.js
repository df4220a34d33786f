// One sample as the page shows it: pictures, question, coloured answer, its numbers.
const FOLD = { tokens: 600, characters: 3000 }; // longer answers and questions open on demand

function renderSample(sample) {
  const link = make("a", { class: "key", href: "#" + encodeURIComponent(sample.k), title: "link to this sample" });
  link.append(make("bdi", {}, visible(sample.k)));
  const body = make("div", { class: "words-of" });
  body.append(...textOf(sample));
  const hidden = areHidden();
  const why = (hidden ? [] : sample.w).map((name) => make("span", { class: "why" }, state.strata[name] || name));
  const mark = make("button", { class: "mark", type: "button", "aria-pressed": String(marked.has(sample.k)),
    title: "mark this sample (x)", onclick: () => toggleMark(sample) }, "mark");
  const facts = make("p", { class: "facts" }, ...numbersOf(sample), link);
  if (sample.i && !sample.k.includes(sample.i)) facts.append(make("span", {}, "id ", make("bdi", {}, visible(sample.i))));
  if (state.sources.length > 1) facts.append(make("span", {}, make("bdi", {}, visible(state.sources[sample.s] || ""))));
  facts.append(...why, mark);
  body.append(facts);
  if (sample.t.length && !hidden) body.append(valuesOf(sample));
  const article = make("article", { class: "sample", tabindex: "-1", "data-place": sample.place,
    "aria-label": "sample " + visible(sample.k) });
  article.append(picturesOf(sample), body);
  if (marked.has(sample.k)) article.classList.add("marked");
  return article;
}

function numbersOf(sample) {
  if (sample.st === "text_only") return [make("span", {}, "text only: ", make("b", {}, "no VIG"))];
  if (sample.st !== "ok") return [make("span", { class: "error" }, "not scored: " + visible(sample.st.replace(/^error: /, "")))];
  if (areHidden()) return [];
  if (state.passes.length > 1) {
    const parts = state.passes.map((name, pass) => make("span", {}, name + " ", make("b", {}, signed(sample.v[pass]))));
    return [...parts, make("span", {}, "percentile ", make("b", {}, (sample.d > 0 ? "+" : "") + fixed(sample.d, 0)))];
  }
  const kept = keptTokens(sample);
  const found = [make("span", {}, "sample VIG ", make("b", {}, signed(sample.v[0])))];
  if (sample.c != null) found.push(make("span", {}, "as selected ", make("b", {}, signed(sample.c))));
  if (kept) {
    const count = kept.filter(Boolean).length;
    found.push(make("span", {}, "trained on ", make("b", {}, String(count)), ` of ${kept.length} tokens`));
  }
  return found;
}

function textOf(sample) {
  const parts = [folded(sample.q, "question")];
  if (!sample.a.length) return parts;
  state.passes.forEach((name, pass) => {
    if (state.passes.length > 1) parts.push(make("p", { class: "pass" }, name));
    parts.push(...answerOf(sample, pass));
  });
  return parts;
}

function folded(text, kind) {
  const shown = visible(text);
  if (shown.length <= FOLD.characters) return make("p", { class: kind, dir: "auto" }, shown);
  const node = make("p", { class: kind, dir: "auto" }, shown.slice(0, FOLD.characters) + "… ");
  const open = () => { node.textContent = shown; };
  node.append(make("button", { type: "button", class: "more", onclick: open }, `show all ${grouped(shown.length)} characters`));
  return node;
}

function answerOf(sample, pass, all = false) {
  const turns = new Map(pass ? [] : sample.u);
  const kept = state.passes.length > 1 ? null : keptTokens(sample);
  const last = all ? sample.t.length : cutOf(sample);
  let answer = make("p", { class: "answer", dir: "auto" });
  const parts = [answer];
  for (let index = 0; index < last; index += 1) {
    if (turns.has(index)) {
      answer = make("p", { class: "answer", dir: "auto" });
      parts.push(folded(turns.get(index), "question"), answer);
    }
    addToken(answer, sample, pass, index, kept, turns.has(index) || !index, all);
  }
  if (last < sample.t.length || (!all && sample.t.some((text) => text.length > FOLD.characters))) {
    const open = () => {
      parts[0].before(...answerOf(sample, pass, true));
      for (const part of parts) part.remove();
    };
    answer.append("… ", make("button", { type: "button", class: "more", onclick: open },
      `show all ${grouped(sample.t.length)} tokens`));
  }
  return parts;
}

function cutOf(sample) {
  // the number of tokens that are shown before the answer is opened
  let characters = 0;
  for (let index = 0; index < sample.t.length; index += 1) {
    characters += Math.min(sample.t[index].length, FOLD.characters);
    if (index >= FOLD.tokens || characters > 2 * FOLD.characters) return index + 1;
  }
  return sample.t.length;
}

function addToken(answer, sample, pass, index, kept, first, all) {
  const text = sample.t[index];
  if (!text) return;
  let body = text.replace(/^ +/, "") || text;
  if (!first) answer.append(text.slice(0, text.length - body.length));
  const breaks = /^\n+$/.test(body) ? body : "";
  if (breaks) body = "⏎".repeat(breaks.length);
  const shown = all ? body : body.slice(0, FOLD.characters);
  answer.append(make("span", tokenLook(sample, pass, index, kept), visible(shown)), breaks);
}

function tokenLook(sample, pass, index, kept) {
  const kinds = SPECIAL.test(sample.t[index].trim()) ? ["t", "special"] : ["t"];
  if (areHidden()) return { class: kinds.join(" ") };
  const image = sample.a[pass][index] * UNIT;
  let title;
  if (sample.b[pass].length) {
    const vig = tokenVig(sample, pass, index);
    kinds.push(shade(vig));
    const parts = `${fixed(sample.b[pass][index] * UNIT, 3)} (null) − ${fixed(image, 3)} (image)`;
    title = `VIG ${signed(vig)} = ${parts} nats`;
  } else {
    kinds.push("z");
    title = `NLL ${fixed(image, 3)} nats, one pass: no VIG`;
  }
  for (const [name, values] of Object.entries(sample.x[pass])) title += `; ${name} ${fixed(values[index] * UNIT, 3)}`;
  if (kept) {
    kinds.push(kept[index] ? "kept" : "left");
    title += kept[index] ? "; trained on" : "; not trained on";
  }
  return { class: kinds.join(" "), title };
}

// The same values as a table that opens: for keyboards, touch screens and paper.
function valuesOf(sample) {
  const details = make("details", { class: "values" }, make("summary", {}, "values of its tokens, nats"));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(make("div", { tabindex: "0" }, table(sample)));
  });
  return details;
}

function table(sample) {
  const kept = state.passes.length > 1 ? null : keptTokens(sample);
  const heads = ["token"];
  const columns = [sample.t.map((text) => visible(text.replace(/^ +| +$/g, "").replaceAll("\n", "⏎").slice(0, 200)))];
  const nats = (values) => values.map((value) => fixed(value * UNIT, 3));
  state.passes.forEach((name, pass) => {
    const suffix = state.passes.length > 1 ? ", " + name : "";
    if (sample.b[pass].length) {
      heads.push("VIG" + suffix, "NLL null" + suffix);
      columns.push(sample.t.map((_, index) => signed(tokenVig(sample, pass, index))), nats(sample.b[pass]));
    }
    heads.push("NLL image" + suffix);
    columns.push(nats(sample.a[pass]));
    for (const [name, values] of Object.entries(sample.x[pass])) {
      heads.push(name + suffix);
      columns.push(nats(values));
    }
  });
  if (kept) {
    heads.push("trained on");
    columns.push(kept.map((yes) => (yes ? "yes" : "no")));
  }
  const rows = sample.t.slice(0, 5000).map((_, row) => make("tr", {}, ...columns.map((column) => make("td", {}, column[row]))));
  return make("table", {}, make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows));
}

function picturesOf(sample) {
  const box = make("div", { class: "pictures" });
  if (!sample.im.length) {
    box.append(make("div", { class: "blank" }, visible(sample.o || "no image")));
    return box;
  }
  sample.im.forEach((number, index) => {
    const alt = sample.im.length > 1 ? `image ${index + 1}` : "image";
    const seen = sample.cr.includes(index) ? alt + ", as the model sees it (cropped)" : alt;
    box.append(figure(sample, number, seen, index, sample.o || "left out: over the page’s size budget"));
    state.nullNames.forEach((name, pass) => {
      const null_ = (sample.nu[pass] || [])[index];
      const label = state.nullNames.length > 1 ? `${state.passes[pass]}: ${name}` : name;
      box.append(figure(sample, null_, label, index, sample.o || "not shown"));
    });
  });
  return box;
}

function figure(sample, number, label, index, missing) {
  const caption = make("figcaption", {}, label);
  if (number == null) return make("figure", {}, make("div", { class: "blank" }, visible(missing)), caption);
  const button = make("button", { type: "button", class: "zoom", "aria-label": `enlarge ${label}`,
    onclick: () => zoom(sample, index) });
  button.append(imageOf(number, label, 168));
  return make("figure", {}, button, caption);
}

function imageOf(number, alt, side) {
  const picture = pictures[number];
  const scale = side / Math.max(picture.w, picture.h);
  return make("img", { class: picture.exact ? "pixels" : "photo", width: Math.max(1, Math.round(picture.w * scale)),
    height: Math.max(1, Math.round(picture.h * scale)), alt, src: picture.src, decoding: "async" });
}
