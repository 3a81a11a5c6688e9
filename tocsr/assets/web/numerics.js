// Bicubic resizing, back-projection and the starting noise, as in tocsr.core.image,
// tocsr.models.consistency and torch.randn. An image is {data, channels, height, width} with
// float32 data in the order (channels, height, width) and values in [-1, 1].

export function makeImage(channels, height, width) {
  return { data: new Float32Array(channels * height * width), channels, height, width };
}

// Keys' cubic convolution kernel with a = -1/2
function cubicKernel(distance) {
  const x = Math.abs(distance);
  if (x <= 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x <= 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

// For each of `m` outputs from `n` inputs: positions and weights of the inputs that count.
// The border is mirrored with the edge pixel repeated; the kernel is widened when shrinking.
function resizeWeights(n, m) {
  const scale = m / n;
  const stretch = Math.max(1, 1 / scale);
  const taps = Math.ceil(4 * stretch) + 2;
  const rows = [];
  for (let i = 0; i < m; i++) {
    const center = (i + 0.5) / scale - 0.5;
    const first = Math.floor(center - 2 * stretch);
    const positions = [];
    const weights = [];
    for (let t = 0; t < taps; t++) {
      const weight = cubicKernel((center - (first + t)) / stretch);
      if (weight === 0) continue;
      const position = (((first + t) % (2 * n)) + 2 * n) % (2 * n);
      positions.push(position < n ? position : 2 * n - 1 - position);
      weights.push(weight);
    }
    const total = weights.reduce((a, b) => a + b, 0);
    rows.push({ positions, weights: weights.map((w) => w / total) });
  }
  return rows;
}

function resizeRows(image, height) {
  const { data, channels, width } = image;
  const out = makeImage(channels, height, width);
  const weightsOfRow = resizeWeights(image.height, height);
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < height; y++) {
      const { positions, weights } = weightsOfRow[y];
      const to = (c * height + y) * width;
      for (let t = 0; t < positions.length; t++) {
        const from = (c * image.height + positions[t]) * width;
        const w = weights[t];
        for (let x = 0; x < width; x++) out.data[to + x] += w * data[from + x];
      }
    }
  }
  return out;
}

function resizeColumns(image, width) {
  const { data, channels, height } = image;
  const out = makeImage(channels, height, width);
  const columns = resizeWeights(image.width, width);
  const taps = Math.max(...columns.map((column) => column.positions.length));
  const positions = new Int32Array(width * taps);
  const weights = new Float64Array(width * taps); // 0 where a column has fewer taps
  columns.forEach((column, x) => {
    positions.set(column.positions, x * taps);
    weights.set(column.weights, x * taps);
  });
  for (let row = 0; row < channels * height; row++) {
    const from = row * image.width;
    const to = row * width;
    for (let x = 0; x < width; x++) {
      let sum = 0;
      for (let t = x * taps; t < (x + 1) * taps; t++) sum += weights[t] * data[from + positions[t]];
      out.data[to + x] = sum;
    }
  }
  return out;
}

// Antialiased bicubic resize, MATLAB's imresize
export function resize(image, height, width) {
  return resizeColumns(resizeRows(image, height), width);
}

// Continue an image to the right and below by reflection; the edge pixel is not repeated.
export function padByReflection(image, height, width) {
  const out = makeImage(image.channels, height, width);
  const reflect = (i, n) => {
    const k = i % Math.max(1, 2 * n - 2);
    return n > 1 ? Math.min(k, 2 * n - 2 - k) : 0;
  };
  for (let c = 0; c < image.channels; c++) {
    for (let y = 0; y < height; y++) {
      const from = (c * image.height + reflect(y, image.height)) * image.width;
      const to = (c * height + y) * width;
      for (let x = 0; x < width; x++) out.data[to + x] = image.data[from + reflect(x, image.width)];
    }
  }
  return out;
}

// The window of an image at top, left
export function cutWindow(image, top, left, height, width) {
  const out = makeImage(image.channels, height, width);
  for (let c = 0; c < image.channels; c++) {
    for (let y = 0; y < height; y++) {
      const from = (c * image.height + top + y) * image.width + left;
      out.data.set(image.data.subarray(from, from + width), (c * height + y) * width);
    }
  }
  return out;
}

// Copy the part of `from` at fromTop, fromLeft into `image` at top, left.
export function pasteWindow(image, top, left, from, part) {
  const { fromTop, fromLeft, height, width } = part;
  for (let c = 0; c < image.channels; c++) {
    for (let y = 0; y < height; y++) {
      const start = (c * from.height + fromTop + y) * from.width + fromLeft;
      const row = from.data.subarray(start, start + width);
      image.data.set(row, (c * image.height + top + y) * image.width + left);
    }
  }
}

export function clamp(image) {
  const { data } = image;
  for (let i = 0; i < data.length; i++) data[i] = Math.min(1, Math.max(-1, data[i]));
  return image;
}

// Change `large` until it equals `small` when downsampled (after further downsampling by
// `factor`); factor 0 leaves it as it is.
export function backProject(large, small, factor, onRound, rounds = 12) {
  if (!factor) return large;
  const { height, width } = small;
  const grid = [height, width].map((n) => Math.ceil(n / factor));
  for (let round = 0; round < rounds; round++) {
    let residual = resize(large, height, width);
    for (let i = 0; i < residual.data.length; i++) {
      residual.data[i] = small.data[i] - residual.data[i];
    }
    if (factor > 1) residual = resize(resize(residual, ...grid), height, width);
    const update = resize(residual, large.height, large.width);
    for (let i = 0; i < large.data.length; i++) large.data[i] += update.data[i];
    clamp(large);
    onRound((round + 1) / rounds);
  }
  return large;
}

// RGBA bytes -> image. Transparency is composited on white.
export function fromBytes(rgba, height, width) {
  const out = makeImage(3, height, width);
  const size = height * width;
  for (let i = 0; i < size; i++) {
    const alpha = rgba[4 * i + 3] / 255;
    for (let c = 0; c < 3; c++) {
      const color = rgba[4 * i + c] / 127.5 - 1;
      out.data[c * size + i] = color + (1 - color) * (1 - alpha);
    }
  }
  return out;
}

// Image -> opaque RGBA bytes; Uint8ClampedArray clips and rounds ties to even.
export function toBytes(image) {
  const size = image.height * image.width;
  const rgba = new Uint8ClampedArray(4 * size).fill(255);
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) rgba[4 * i + c] = (image.data[c * size + i] + 1) * 127.5;
  }
  return rgba;
}

// The Mersenne Twister mt19937: a function that returns the next 32 bits
function mersenneTwister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) {
    state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  }
  let next = 624;
  const refill = () => {
    for (let i = 0; i < 624; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    next = 0;
  };
  return () => {
    if (next === 624) refill();
    let y = state[next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

// Standard normal numbers as torch.randn draws them on a CPU, for a multiple of 16 numbers:
// uniform numbers of 24 bits, transformed by Box and Muller's method in groups of 16.
function fillNormal(data, seed) {
  const random = mersenneTwister(seed);
  for (let i = 0; i < data.length; i++) data[i] = (random() & 0xffffff) / 0x1000000;
  for (let i = 0; i < data.length; i += 16) {
    for (let j = i; j < i + 8; j++) {
      const radius = Math.sqrt(-2 * Math.log(1 - data[j]));
      const angle = 2 * Math.PI * data[j + 8];
      data[j] = radius * Math.cos(angle);
      data[j + 8] = radius * Math.sin(angle);
    }
  }
}

// The noise of `tocsr upscale --seed SEED`: start_noise of tocsr.models.generator
export function startNoise(channels, height, width, seed) {
  const out = makeImage(channels, height, width);
  const number = BigInt(seed) * 1000003n * 97n;
  fillNormal(out.data, Number(BigInt.asUintN(32, number)));
  return out;
}
