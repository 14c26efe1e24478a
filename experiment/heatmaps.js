const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
const element = id => document.getElementById(id);
const fixed = (number, digits) => number.toFixed(digits).replace(/^-(0\.0+)$/, "$1").replace("-", "−");

// A function that upsamples maps (h x w) to the size of the image (H x W): bilinear, half-pixel centres.
function upsampler([height, width], [mapHeight, mapWidth]) {
  // The two locations beside each pixel, and the weight of the second.
  const neighbours = (pixels, locations) => Array.from({ length: pixels }, (_, pixel) => {
    const place = Math.min(Math.max((pixel + 0.5) * locations / pixels - 0.5, 0), locations - 1);
    return [Math.floor(place), Math.min(Math.floor(place) + 1, locations - 1), place % 1];
  });
  const rows = neighbours(height, mapHeight), columns = neighbours(width, mapWidth);
  return map => {
    const large = new Float32Array(height * width);
    let pixel = 0;
    for (const [upper, lower, down] of rows)
      for (const [left, right, along] of columns) {
        const above = map[upper * mapWidth + left] * (1 - along) + map[upper * mapWidth + right] * along;
        const below = map[lower * mapWidth + left] * (1 - along) + map[lower * mapWidth + right] * along;
        large[pixel++] = above * (1 - down) + below * down;
      }
    return large;
  };
}

// Overlays a heatmap (H x W, 0..255) on an image (H x W x channels, 0..255). A grey one is inverted, so that black does
// not darken the colours. Without a heatmap it shows the image.
function paint(canvas, image, heatmap, colors) {
  const context = canvas.getContext("2d"), picture = context.createImageData(canvas.width, canvas.height);
  const pixels = canvas.width * canvas.height, channels = image.length / pixels;
  for (let pixel = 0; pixel < pixels; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      const under = image[pixel * channels + channel % channels];
      picture.data[4 * pixel + channel] = heatmap
        ? (colors[3 * Math.round(heatmap[pixel]) + channel] + (channels === 1 ? 255 - under : under)) / 2 : under;
    }
    picture.data[4 * pixel + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}

// Scales values to 0..255 by their minimum and maximum; constant ones become zeros.
function normalize(values) {
  const low = least(values), range = greatest(values) - low || 1;
  return values.map(value => 255 * (value - low) / range);
}
const least = values => values.reduce((a, b) => Math.min(a, b)), greatest = values => values.reduce((a, b) => Math.max(a, b));

// Draws a box (x0, y0, x1, y1, half-open) on an image: black, with a white rim, to be seen on any ground.
function frame(canvas, box, dashes = []) {
  if (!box) return;
  const context = canvas.getContext("2d"), [x0, y0, x1, y1] = box;
  const line = Math.max(1, Math.round(canvas.width / 100));  // or it gets lost where the page shrinks the image
  context.setLineDash(dashes);
  for (const [color, lineWidth] of [["#fff", 2 * line], ["#000", line]]) {
    Object.assign(context, { strokeStyle: color, lineWidth });
    context.strokeRect(x0 + 0.5, y0 + 0.5, x1 - x0 - 1, y1 - y0 - 1);
  }
}
