/** Images on the page: levels as pixels, hidden ones striped. */

import { HIDDEN } from "./replay.js";

/** The side of a pixel on a canvas, so that it is about `wanted` wide and pixels stay square and whole. */
export function scaleFor([height, width], wanted) {
  return Math.max(1, Math.round(wanted / Math.max(height, width)));
}

/** The colour [r, g, b] of a pixel by its levels, null where hidden; null if all of it is. */
function colour(levels, position, channels, brightest) {
  const own = levels.slice(position, position + channels);
  if (own.every((level) => level === null)) return null;
  const shades = own.map((level) => (level === null ? 0 : (255 * level) / brightest));
  return channels === 1 ? [shades[0], shades[0], shades[0]] : shades.slice(0, 3);
}

/** The colour of a call, as the tokens of a text have it. */
export const ageColour = (age) => `oklch(${0.5 + 0.32 * age} 0.13 ${(300 - 210 * age).toFixed(0)})`;

/**
 * Draw levels on a canvas.
 *
 * levels: [H * W * C], null where hidden; tint: a CSS colour for a pixel number, or null for the pixel's own.
 */
export function drawLevels(canvas, levels, shape, brightest, scale, tint = () => null) {
  const [height, width, channels] = shape;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const context = canvas.getContext("2d");
  stripes(context, canvas, scale);
  for (let pixel = 0; pixel < width * height; pixel++) {
    const own = colour(levels, pixel * channels, channels, brightest);
    if (own === null) continue;
    context.fillStyle = tint(pixel) ?? `rgb(${own.map(Math.round).join(" ")})`;
    context.fillRect((pixel % width) * scale, Math.floor(pixel / width) * scale, scale, scale);
  }
}

/** What hidden pixels look like, everywhere: told by stripes, not by a colour alone. */
function stripes(context, { width, height }, scale) {
  const distance = Math.max(6, scale / 2);
  context.fillStyle = "#26548c";
  context.fillRect(0, 0, width, height);
  context.strokeStyle = "#5b86b8";
  context.lineWidth = distance / 5;
  context.beginPath();
  for (let start = distance / 2; start < width + height; start += distance) {
    context.moveTo(start, 0);
    context.lineTo(start - height, height);
  }
  context.stroke();
}

export class ImageView {
  constructor(replay, shape, brightest) {
    Object.assign(this, { replay, shape, brightest });
    this.element = document.createElement("canvas");
    this.element.className = "picture";
    this.element.setAttribute("role", "img");
    this.scale = scaleFor(shape, 192);
  }

  /** Show the image after `calls` of `total` network calls. byAge: colour pixels by the call that revealed them. */
  draw(calls, total, _complete, byAge) {
    const [, width, channels] = this.shape;
    const { values, call, newest } = this.replay.after(calls);
    const tint = (pixel) => {
      const at = call[pixel * channels];
      return byAge && at >= 0 ? ageColour(at / Math.max(1, total - 1)) : null;
    };
    drawLevels(this.element, values, this.shape, this.brightest, this.scale, tint);
    if (newest && this.scale >= 6) {
      const context = this.element.getContext("2d");
      context.lineWidth = 2;
      for (const [positions, stroke] of [[newest.positions, "#f2a900"], [newest.hidden, "#e5484d"]]) {
        context.strokeStyle = stroke;
        for (const position of positions) {
          const pixel = Math.floor(position / channels);
          const [x, y] = [pixel % width, Math.floor(pixel / width)];
          context.strokeRect(x * this.scale + 1, y * this.scale + 1, this.scale - 2, this.scale - 2);
        }
      }
    }
  }

  /** Let the browser keep the image after `calls` network calls as a PNG of its own size. */
  save(calls, name) {
    const canvas = document.createElement("canvas");
    drawLevels(canvas, this.replay.after(calls).values, this.shape, this.brightest, 1);
    canvas.toBlob((blob) => {
      const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }

  /** The levels after `calls` network calls, null where hidden. */
  levels(calls) {
    const { values, call } = this.replay.after(calls);
    return values.map((level, position) => (call[position] === HIDDEN ? null : level));
  }
}
