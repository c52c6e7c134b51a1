/** One sample as it was after any number of its network calls. */

export const GIVEN = -1; // instead of the call that revealed a position: it was known from the start
export const HIDDEN = -2; // it is still masked

export class Replay {
  #applied = 0; // steps in `#state`
  #state;

  /** canvas: what is known of each position from the start, null where it is hidden. */
  constructor(canvas) {
    this.canvas = canvas;
    this.steps = [];
    this.unknown = canvas.reduce((count, value) => count + (value === null), 0);
    this.#reset();
  }

  #reset() {
    this.#applied = 0;
    this.#state = {
      values: [...this.canvas],
      call: this.canvas.map((value) => (value === null ? HIDDEN : GIVEN)), // that revealed each position
      again: this.canvas.map(() => false), // masked, after it had been revealed
      revealed: 0,
      remasked: 0, // so far
    };
  }

  /** A step event: what one call of this sample revealed and hid. */
  add({ call, positions = [], pieces, levels, hidden = [] }) {
    this.steps.push({ call, positions, values: pieces ?? levels ?? [], hidden: hidden ?? [] });
  }

  /** Network calls up to the last that changed something. */
  get calls() {
    return this.steps.length ? this.steps.at(-1).call + 1 : 0;
  }

  /**
   * The state after the first `calls` network calls: `values`, `call`, `again` by position, `revealed` and `remasked` in
   * numbers, and `newest`: the step of the last of these calls, if it changed anything. Not to be changed.
   */
  after(calls) {
    if (this.#applied && this.steps[this.#applied - 1].call >= calls) this.#reset();
    while (this.#applied < this.steps.length && this.steps[this.#applied].call < calls) {
      this.#apply(this.steps[this.#applied++]);
    }
    const last = this.#applied ? this.steps[this.#applied - 1] : null;
    return { ...this.#state, newest: last?.call === calls - 1 ? last : null };
  }

  #apply({ call, positions, values, hidden }) {
    const state = this.#state;
    for (const position of hidden) {
      if (state.call[position] >= 0) state.revealed--;
      state.values[position] = null;
      state.call[position] = HIDDEN;
      state.again[position] = true;
      state.remasked++;
    }
    positions.forEach((position, index) => {
      if (state.call[position] === HIDDEN) state.revealed++;
      state.values[position] = values[index];
      state.call[position] = call;
      state.again[position] = false;
    });
  }
}
