/** An image of which a part is hidden, drawn on with a pointer, with keys, or by the numbers of a rectangle. */

import { drawLevels, scaleFor } from "./image_view.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class MaskEditor {
  #closed = new AbortController();
  #cursor = [0, 0]; // pixel
  #drawing = false;

  /**
   * canvas: where it is drawn; shape: [H, W, C]; levels: how many a pixel value has.
   * changed(words): called after every change, with what a reader of the screen should hear.
   */
  constructor(canvas, shape, levels, changed) {
    Object.assign(this, { canvas, shape, changed, brightest: levels - 1, tool: "hide", brush: 1 });
    [this.height, this.width, this.channels] = shape;
    this.scale = scaleFor(shape, 320);
    this.shade = Array(this.channels).fill(this.brightest); // what the tool "paint" puts
    this.levels = Array(this.height * this.width * this.channels).fill(null); // null where nothing was ever known
    this.hidden = Array(this.height * this.width).fill(true);
    this.#listen();
    this.draw();
  }

  /** The levels [H * W * C] to be sent, null where hidden. */
  get wanted() {
    return this.levels.map((level, position) => (this.hidden[Math.floor(position / this.channels)] ? null : level));
  }

  get holes() {
    return this.hidden.filter(Boolean).length;
  }

  /** Begin with an image, levels [H * W * C]: what it has of a pixel is shown. */
  open(levels, words) {
    this.levels = [...levels];
    this.hidden = this.hidden.map((_, pixel) => this.#unknown(pixel));
    this.#done(words);
  }

  /** Hide or show everything; what was never known stays hidden. */
  all(hide) {
    for (let pixel = 0; pixel < this.hidden.length; pixel++) this.#set(pixel, hide ? "hide" : "show");
    this.#done(hide ? "all hidden" : "all shown");
  }

  invert() {
    for (let pixel = 0; pixel < this.hidden.length; pixel++) this.#set(pixel, this.hidden[pixel] ? "show" : "hide");
    this.#done("inverted");
  }

  /** Use the tool on a rectangle of pixels. Throws a RangeError in words if it doesn't lie in the image. */
  rectangle(x, y, width, height) {
    const whole = [x, y, width, height].every(Number.isInteger);
    if (!whole || x < 0 || y < 0 || width < 1 || height < 1 || x + width > this.width || y + height > this.height) {
      throw new RangeError(
        `The rectangle must lie in the image of ${this.width} × ${this.height} pixels: whole numbers, such as left 0, ` +
          `top ${this.height >> 1}, width ${this.width}, height ${this.height - (this.height >> 1)} for the lower half.`,
      );
    }
    for (let row = y; row < y + height; row++) {
      for (let column = x; column < x + width; column++) this.#set(row * this.width + column, this.tool);
    }
    this.#done(`${this.tool}: ${width} × ${height} pixels`);
  }

  /** Let go of the canvas. */
  close() {
    this.#closed.abort();
  }

  draw() {
    drawLevels(this.canvas, this.wanted, this.shape, this.brightest, this.scale);
    if (document.activeElement !== this.canvas) return;
    const context = this.canvas.getContext("2d");
    const [x, y, side] = [...this.#corner(...this.#cursor), this.brush].map((size) => size * this.scale);
    for (const [stroke, inset] of [["#fff", 1], ["#111", 3]]) {
      context.strokeStyle = stroke;
      context.lineWidth = 2;
      context.strokeRect(x + inset, y + inset, side - 2 * inset, side - 2 * inset);
    }
  }

  #set(pixel, tool) {
    if (tool === "paint") this.levels.splice(pixel * this.channels, this.channels, ...this.shade);
    this.hidden[pixel] = tool === "hide" || this.#unknown(pixel);
  }

  #unknown(pixel) {
    return this.levels.slice(pixel * this.channels, (pixel + 1) * this.channels).includes(null);
  }

  /** The upper left pixel of the brush around a pixel. */
  #corner(x, y) {
    return [x - (this.brush >> 1), y - (this.brush >> 1)];
  }

  #stroke() {
    const [left, top] = this.#corner(...this.#cursor);
    for (let y = Math.max(0, top); y < Math.min(this.height, top + this.brush); y++) {
      for (let x = Math.max(0, left); x < Math.min(this.width, left + this.brush); x++) {
        this.#set(y * this.width + x, this.tool);
      }
    }
  }

  #done(words) {
    this.draw();
    this.changed(words);
  }

  #listen() {
    const { canvas } = this;
    const on = (name, action) => canvas.addEventListener(name, action, { signal: this.#closed.signal });
    on("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.#drawing = true;
      this.#place(event);
      this.#stroke();
      this.#done("");
    });
    on("pointermove", (event) => {
      if (!this.#drawing) return;
      const [fromX, fromY] = this.#cursor;
      this.#place(event);
      const [toX, toY] = this.#cursor;
      // A quick pointer leaps over pixels: what lies between belongs to the line.
      const leaps = Math.max(Math.abs(toX - fromX), Math.abs(toY - fromY));
      for (let leap = 1; leap <= leaps; leap++) {
        const share = leap / leaps;
        this.#cursor = [Math.round(fromX + share * (toX - fromX)), Math.round(fromY + share * (toY - fromY))];
        this.#stroke();
      }
      this.#done("");
    });
    for (const end of ["pointerup", "pointercancel"]) on(end, () => (this.#drawing = false));
    for (const change of ["focus", "blur"]) on(change, () => this.draw());
    on("keydown", (event) => this.#key(event));
  }

  #place(event) {
    const box = this.canvas.getBoundingClientRect();
    const inside = (value, size) => Math.min(size - 1, Math.max(0, Math.floor(value * size)));
    this.#cursor = [
      inside((event.clientX - box.left) / box.width, this.width),
      inside((event.clientY - box.top) / box.height, this.height),
    ];
  }

  #key(event) {
    const arrow = ARROWS[event.key];
    if (arrow) {
      this.#cursor = [
        Math.min(this.width - 1, Math.max(0, this.#cursor[0] + arrow[0])),
        Math.min(this.height - 1, Math.max(0, this.#cursor[1] + arrow[1])),
      ];
    } else if (event.key !== " " && event.key !== "Enter") {
      return;
    }
    event.preventDefault();
    if (!arrow || event.shiftKey) this.#stroke();
    const [x, y] = this.#cursor;
    this.#done(`row ${y + 1}, column ${x + 1}: ${this.hidden[y * this.width + x] ? "hidden" : "shown"}`);
  }
}

/** A picture file as levels [H * W * C]: cut to the shape's proportions around its centre, then averaged down. */
export async function readPicture(file, [height, width, channels], levels) {
  const picture = await createImageBitmap(file);
  const share = Math.min(picture.width / width, picture.height / height);
  const [cutWidth, cutHeight] = [share * width, share * height];
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // what is transparent lies on white
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const [left, top] = [(picture.width - cutWidth) / 2, (picture.height - cutHeight) / 2];
  context.drawImage(picture, left, top, cutWidth, cutHeight, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  const found = [];
  for (let pixel = 0; pixel < width * height; pixel++) {
    found.push(...toLevels([...data.slice(4 * pixel, 4 * pixel + 3)], channels, levels));
  }
  return found;
}

/** A colour [r, g, b] as levels [C]. */
export function toLevels([red, green, blue], channels, levels) {
  const luma = Math.round(0.299 * red + 0.587 * green + 0.114 * blue);
  const shades = channels === 1 ? [luma] : [red, green, blue];
  return shades.map((shade) => Math.min(levels - 1, Math.floor((shade * levels) / 256)));
}
