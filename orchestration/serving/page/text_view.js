/** A text on the page: one cell a token, coloured by the call that revealed it. */

import { GIVEN, HIDDEN } from "./replay.js";

/** What a cell shows; line ends are made visible, they would have no width. */
const shown = (piece) => piece.replace(/\n/g, "↵\n");

export class TextView {
  #cells;
  #drawn = []; // what each cell shows now, so that only what changes is touched

  constructor(replay) {
    this.replay = replay;
    this.element = document.createElement("p");
    this.element.className = "tokens";
    // Hundreds of cells are no reading matter: readers are given the text itself, see `Card`.
    this.element.setAttribute("aria-hidden", "true");
    this.element.translate = false;
    this.#cells = replay.canvas.map(() => document.createElement("span"));
    this.element.append(...this.#cells);
  }

  /** Show the text after `calls` of `total` network calls; `complete`: nothing is left to reveal. */
  draw(calls, total, complete) {
    const { values, call, again, newest } = this.replay.after(calls);
    const now = new Set(newest ? [...newest.positions, ...newest.hidden] : []);
    const last = complete && calls >= this.replay.calls;
    this.#cells.forEach((cell, position) => {
      const at = call[position];
      let kind = at === GIVEN ? "given" : at === HIDDEN ? "hidden" : "revealed";
      if (at === HIDDEN && again[position]) kind += " again";
      if (at === HIDDEN && last) kind = "unused"; // behind a stop token
      if (now.has(position)) kind += " now";
      const age = at >= 0 ? at / Math.max(1, total - 1) : 0;
      const key = `${kind}|${at}|${total}|${values[position]}`;
      if (this.#drawn[position] === key) return;
      this.#drawn[position] = key;
      cell.className = `cell ${kind}`;
      cell.textContent = at === HIDDEN ? "·" : shown(values[position]);
      cell.title = at === HIDDEN ? "hidden" : at === GIVEN ? "given" : `call ${at + 1}`;
      cell.style.setProperty("--age", age.toFixed(3));
    });
  }

  /** The text after `calls` network calls, `_` where hidden. */
  words(calls) {
    return this.replay.after(calls).values.map((piece) => piece ?? "_").join("");
  }
}
