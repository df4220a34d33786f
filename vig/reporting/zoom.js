// A picture enlarged, with a slider that wipes from the image to its null image.
const dialog = $("zoom");
const view = { sample: null, index: 0, pass: 0 };

function zoom(sample, index) {
  if (!dialog || !sample.im.length) return;
  view.sample = sample;
  view.index = index;
  view.pass = 0;
  drawZoom();
  if (!dialog.open) dialog.showModal();
  $("wipe").focus();
}

function drawZoom() {
  const { sample, index, pass } = view;
  const stage = $("stage");
  const null_ = (sample.nu[pass] || [])[index];
  const number = sample.im[index];
  const side = Math.min(640, window.innerWidth - 72, window.innerHeight - 220);
  stage.replaceChildren();
  if (number != null) stage.append(imageOf(number, "image", side));
  if (null_ != null) {
    const over = imageOf(null_, state.nullNames[pass], side);
    over.classList.add("over");
    stage.append(over);
  }
  const several = sample.im.length > 1 ? `image ${index + 1} of ${sample.im.length}; ` : "";
  const name = state.passes.length > 1 ? `${state.passes[pass]}: ${state.nullNames[pass]}` : state.nullNames[pass];
  $("zoom-label").textContent = several + "left of the handle the image, right of it: " + name;
  $("zoom-key").textContent = visible(sample.k);
  $("zoom-question").textContent = visible(sample.q.slice(0, 300));
  for (const id of ["zoom-before", "zoom-next"]) $(id).hidden = sample.im.length * state.nullNames.length < 2;
  wipe();
}

function wipe() {
  const over = $("stage").querySelector(".over");
  if (over) over.style.clipPath = `inset(0 0 0 ${$("wipe").value}%)`;
  $("stage").style.setProperty("--wipe", $("wipe").value + "%");
}

function turn(step) {
  const count = view.sample.im.length * state.nullNames.length;
  const place = (view.index * state.nullNames.length + view.pass + step + count) % count;
  view.index = Math.floor(place / state.nullNames.length);
  view.pass = place % state.nullNames.length;
  drawZoom();
}

if (dialog) {
  $("wipe").addEventListener("input", wipe);
  $("zoom-close").addEventListener("click", () => dialog.close());
  $("zoom-before").addEventListener("click", () => turn(-1));
  $("zoom-next").addEventListener("click", () => turn(1));
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  const drag = (event) => {
    if (!(event.buttons & 1)) return;
    const box = $("stage").getBoundingClientRect();
    $("wipe").value = String(Math.round((100 * (event.clientX - box.left)) / box.width));
    wipe();
  };
  $("stage").addEventListener("pointerdown", drag);
  $("stage").addEventListener("pointermove", drag);
}
