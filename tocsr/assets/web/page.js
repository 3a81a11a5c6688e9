// The page: reads a file, lets the worker upscale it, shows the two results with a slider.
const MAX_PIXELS = 1_000_000; // the result has 16 times as many; some phones' canvas ends there
const MAX_BYTES = 50_000_000;
const CENTER = 512; // side of the crop that is offered for larger images

const byId = (id) => document.getElementById(id);
const megapixels = (n) => `${Number((n / 1e6).toFixed(1))}\u00a0Mpixel`;

let worker = null;
let current = null; // {name, pixels}: the image that was read
let tooLarge = null; // {name, bitmap}: an image above the limit

function show(id, visible) {
  byId(id).hidden = !visible;
}

function fail(text) {
  byId("error").textContent = text;
  show("error", true);
  show("status", false);
}

function startOver() {
  worker?.terminate();
  worker = null;
  for (const id of ["error", "center", "status", "result"]) show(id, false);
}

// RGBA bytes of a part of a bitmap
function readPixels(bitmap, left, top, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, -left, -top);
  return context.getImageData(0, 0, width, height);
}

async function open(file) {
  startOver();
  if (file.size > MAX_BYTES) {
    const size = `${(file.size / 1e6).toFixed(0)} MB`;
    fail(`${file.name} has ${size}; the limit is ${MAX_BYTES / 1e6} MB. Choose a smaller file.`);
    return;
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file); // upright, in sRGB
  } catch {
    fail(`${file.name} is not an image that this browser reads. Try a PNG, JPEG or WebP file.`);
    return;
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    fail(
      `${file.name} has ${width} × ${height} pixels, ${megapixels(width * height)}; the limit ` +
        `is ${megapixels(MAX_PIXELS)}. Crop or shrink it, or use tocsr upscale.`,
    );
    tooLarge = { name: file.name, bitmap };
    byId("center").textContent = `Upscale its center, ${CENTER} × ${CENTER}, instead`;
    show("center", Math.min(width, height) >= CENTER);
    return;
  }
  current = { name: file.name, pixels: readPixels(bitmap, 0, 0, width, height) };
  run();
}

function openCenter() {
  const { name, bitmap } = tooLarge;
  const left = Math.floor((bitmap.width - CENTER) / 2);
  const top = Math.floor((bitmap.height - CENTER) / 2);
  startOver();
  current = { name, pixels: readPixels(bitmap, left, top, CENTER, CENTER) };
  run();
}

function readOptions() {
  const seed = byId("seed");
  if (!seed.checkValidity() || seed.value === "") {
    fail("The seed must be a whole number from 0 to 999999999.");
    return null;
  }
  const consistency = byId("consistency").value;
  return {
    seed: Number(seed.value),
    tile: Number(byId("tile").value),
    consistency: consistency === "" ? null : Number(consistency),
  };
}

function run() {
  startOver();
  const options = readOptions();
  if (!options) return;
  show("status", true);
  byId("again").disabled = true;
  onProgress({ stage: "Starting", fraction: 0 });
  worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.onerror = (event) => {
    onFailed({ text: event.message ?? "its files cannot be loaded" });
  };
  const handlers = { progress: onProgress, done: onDone, failed: onFailed };
  worker.onmessage = ({ data }) => handlers[data.kind](data);
  const { data: rgba, width, height } = current.pixels;
  worker.postMessage({ rgba, width, height, options });
}

function onProgress({ stage, fraction }) {
  byId("stage").textContent = `${stage}: ${Math.round(100 * fraction)} %`;
  byId("progress").value = fraction;
}

function onFailed({ text }) {
  byId("again").disabled = false;
  fail(`The image could not be upscaled: ${text}`);
}

function cancel() {
  startOver();
  byId("again").disabled = !current;
}

function draw(id, rgba, width, height) {
  const canvas = byId(id);
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
  return canvas;
}

function onDone({ bicubic, ours, width, height, seconds }) {
  worker.terminate();
  worker = null;
  show("status", false);
  byId("again").disabled = false;
  draw("bicubic", bicubic, width, height);
  draw("ours", ours, width, height).toBlob((blob) => {
    const link = byId("download");
    URL.revokeObjectURL(link.href);
    link.href = URL.createObjectURL(blob);
    link.download = `${current.name.replace(/\.[^.]*$/, "")}_x4.png`;
    const from = current.pixels;
    byId("facts").textContent =
      `${from.width} × ${from.height} to ${width} × ${height} pixels in ${seconds.toFixed(1)} s`;
    show("result", true);
    setZoom(false);
  }, "image/png");
}

function setZoom(actual) {
  byId("viewer").classList.toggle("actual", actual);
  byId("zoom").setAttribute("aria-pressed", String(actual));
  byId("zoom").textContent = actual ? "Fit to width" : "Actual size";
  const { width, height } = byId("ours");
  const natural = `${width / window.devicePixelRatio}px`;
  const fitted = `calc(75vh * ${width / height})`; // the whole image is visible
  byId("figure").style.width = actual ? natural : `min(${natural}, ${fitted})`;
  byId("stack").style.width = actual ? natural : "";
  byId("stack").style.aspectRatio = `${width} / ${height}`;
  const scroller = byId("scroller");
  scroller.scrollLeft = (scroller.scrollWidth - scroller.clientWidth) / 2;
  scroller.scrollTop = (scroller.scrollHeight - scroller.clientHeight) / 2;
  moveBorder();
}

// The border stays where it is on the screen while the images scroll below it.
function moveBorder() {
  const scroller = byId("scroller");
  const left = (byId("slider").value / 1000) * scroller.clientWidth;
  byId("divider").style.left = `${left}px`;
  byId("ours").style.clipPath = `inset(0 0 0 ${scroller.scrollLeft + left}px)`;
}

function dragBorder(event) {
  if (!(event.buttons & 1)) return;
  const box = byId("scroller").getBoundingClientRect();
  const fraction = (event.clientX - box.left) / box.width;
  byId("slider").value = Math.round(1000 * Math.min(1, Math.max(0, fraction)));
  moveBorder();
}

function firstFile(transfer) {
  return [...(transfer?.files ?? [])][0];
}

byId("inert").remove();
byId("limit").textContent = `At most ${megapixels(MAX_PIXELS)}.`;
byId("file").addEventListener("change", (event) => {
  const file = event.target.files[0];
  event.target.value = "";
  if (file) open(file);
});
byId("again").addEventListener("click", run);
byId("cancel").addEventListener("click", cancel);
byId("center").addEventListener("click", openCenter);
byId("zoom").addEventListener("click", () => setZoom(!byId("viewer").classList.contains("actual")));
byId("slider").addEventListener("input", moveBorder);
byId("scroller").addEventListener("scroll", moveBorder);
window.addEventListener("resize", moveBorder);
byId("divider").addEventListener("pointerdown", (event) => {
  event.target.setPointerCapture(event.pointerId);
  event.preventDefault();
});
byId("divider").addEventListener("pointermove", dragBorder);
for (const kind of ["dragover", "dragleave", "drop"]) {
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", kind === "dragover");
    const file = kind === "drop" && firstFile(event.dataTransfer);
    if (file) open(file);
  });
}
window.addEventListener("paste", (event) => {
  const file = firstFile(event.clipboardData);
  if (file) open(file);
});
try {
  const facts = await (await fetch(new URL("./model/model.json", import.meta.url))).json();
  const model = facts.model.replace(" M ", "\u00a0M ");
  byId("about").textContent =
    `tocsr ${facts.version}, ${model}. Model and page: ${facts.license}. ` +
    "Runtime: ONNX Runtime Web, MIT license.";
} catch {
  fail("model/model.json cannot be loaded: write the page with tocsr export web FOLDER.");
}
