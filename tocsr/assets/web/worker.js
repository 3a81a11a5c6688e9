// Upscales images with the exported parts of the network, in exact tiles: every part is computed
// window by window with a margin as wide as its receptive field, so that tiles leave no trace.
import * as ort from "./runtime/ort.wasm.min.mjs";
import * as numerics from "./numerics.js";

ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
// WebAssembly threads need a cross-origin isolated page, which few static hosts serve.
if (!self.crossOriginIsolated) ort.env.wasm.numThreads = 1;

let model = null; // {facts, sessions}

async function fetchBytes(name, onBytes) {
  const response = await fetch(new URL(`./model/${name}`, import.meta.url));
  if (!response.ok) throw new Error(`model/${name} cannot be loaded (HTTP ${response.status})`);
  const chunks = [];
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    chunks.push(value);
    onBytes(value.length);
  }
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}

async function loadModel(report) {
  if (model) return model;
  const text = new TextDecoder().decode(await fetchBytes("model.json", () => {}));
  const facts = JSON.parse(text);
  const parts = Object.entries(facts.parts);
  const total = parts.reduce((sum, [, part]) => sum + part.bytes, 0);
  let loaded = 0;
  const sessions = {};
  for (const [name, part] of parts) {
    const bytes = await fetchBytes(part.file, (n) => report((loaded += n) / total));
    sessions[name] = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  }
  model = { facts, sessions };
  return model;
}

async function runPart(session, inputs) {
  const feeds = {};
  session.inputNames.forEach((name, i) => {
    const { data, channels, height, width } = inputs[i];
    feeds[name] = new ort.Tensor("float32", data, [1, channels, height, width]);
  });
  const output = (await session.run(feeds))[session.outputNames[0]];
  const [, channels, height, width] = output.dims;
  return { data: output.data, channels, height, width };
}

// One part of the network for the whole image; `size`, `tile` and `margin` in result pixels.
async function mapTiles(session, inputs, { size, tile, margin, report }) {
  const [H, W] = size;
  const corners = [];
  for (let top = 0; top < H; top += tile) {
    for (let left = 0; left < W; left += tile) corners.push([top, left]);
  }
  let whole = null;
  for (const [i, [t, c]] of corners.entries()) {
    const bottom = Math.min(H, t + tile);
    const right = Math.min(W, c + tile);
    const top = Math.max(0, t - margin);
    const left = Math.max(0, c - margin);
    const height = Math.min(H, bottom + margin) - top;
    const width = Math.min(W, right + margin) - left;
    const windows = inputs.map((image) => {
      const k = H / image.height;
      return numerics.cutWindow(image, top / k, left / k, height / k, width / k);
    });
    const y = await runPart(session, windows);
    const k = height / y.height;
    whole ??= numerics.makeImage(y.channels, H / k, W / k);
    const part = {
      fromTop: (t - top) / k,
      fromLeft: (c - left) / k,
      height: (bottom - t) / k,
      width: (right - c) / k,
    };
    numerics.pasteWindow(whole, t / k, c / k, y, part);
    report((i + 1) / corners.length);
  }
  return whole;
}

async function upscale(lr, { tile, seed, consistency }, report) {
  const { facts, sessions } = model;
  const { scale, multiple, factor, channels, parts } = facts;
  const [h, w] = [lr.height * scale, lr.width * scale];
  const size = [h, w].map((n) => Math.ceil(n / multiple) * multiple);
  const bicubic = numerics.resize(lr, h, w);
  const x = numerics.padByReflection(bicubic, ...size);
  const noise = numerics.startNoise(channels, size[0] / factor, size[1] / factor, seed);
  const run = (name, inputs, [start, end], side = tile * scale) =>
    mapTiles(sessions[name], inputs, {
      size,
      tile: side,
      margin: parts[name].margin,
      report: (fraction) => report(start + fraction * (end - start)),
    });
  const zLow = await run("encoder", [x], [0, 0.15]);
  // latents are small, and the UNet has the largest receptive field: twice as large tiles
  const z = await run("unet", [noise, zLow], [0.15, 0.35], 2 * tile * scale);
  let y = await run("decoder", [z], [0.35, 0.65]);
  if (sessions.refiner) y = await run("refiner", [y, x], [0.65, 0.85]);
  const cropped = numerics.clamp(numerics.cutWindow(y, 0, 0, h, w));
  const ours = numerics.backProject(cropped, lr, consistency, (f) => report(0.85 + 0.15 * f));
  return { bicubic, ours };
}

self.onmessage = async ({ data: { rgba, height, width, options } }) => {
  const report = (stage) => (fraction) => self.postMessage({ kind: "progress", stage, fraction });
  try {
    await loadModel(report("Loading the model"));
    const start = performance.now();
    const lr = numerics.fromBytes(rgba, height, width);
    options.consistency ??= model.facts.consistency_factor;
    const results = await upscale(lr, options, report("Upscaling"));
    const seconds = (performance.now() - start) / 1000;
    const [bicubic, ours] = [results.bicubic, results.ours].map(numerics.toBytes);
    const message = { kind: "done", bicubic, ours, seconds };
    message.height = results.ours.height;
    message.width = results.ours.width;
    self.postMessage(message, [bicubic.buffer, ours.buffer]);
  } catch (error) {
    self.postMessage({ kind: "failed", text: String(error.message ?? error) });
  }
};
