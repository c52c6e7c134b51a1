/** One sample on the page: its heading, itself, and what can be done with it. */

import { copier, make } from "./elements.js";
import { ImageView } from "./image_view.js";
import { Replay } from "./replay.js";
import { TextView } from "./text_view.js";

export class Card {
  /**
   * index: of the sample; begun: `{seed, canvas}`; served: the model's description.
   * actions: `useSeed(seed)`, `edit(levels, name)` (images).
   */
  constructor(index, { seed, canvas }, served, actions) {
    this.replay = new Replay(canvas);
    this.served = served;
    this.name = `Sample ${index + 1}`;
    this.seed = seed;
    this.answer = null; // the sample as the service tells it at the end
    this.calls = 0; // shown
    const { shape } = served;
    this.view = shape ? new ImageView(this.replay, shape, served.vocab_size - 1) : new TextView(this.replay);
    this.words = make("p", { className: "unseen sample-text" });
    this.count = make("span", { className: "hint" });

    const again = make("button", { type: "button", className: "minor", textContent: "Keep seed" });
    again.setAttribute("aria-label", `Keep seed ${seed} for the next samples`);
    again.addEventListener("click", () => actions.useSeed(seed));
    const buttons = make("div", { className: "row" }, again);
    if (!shape) {
      const copying = copier("Copy", () => this.text);
      copying.setAttribute("aria-label", `Copy ${this.name.toLowerCase()}`);
      buttons.prepend(copying);
    } else {
      const button = (words, action) => {
        const found = make("button", { type: "button", className: "minor", textContent: words });
        found.setAttribute("aria-label", `${words} ${this.name.toLowerCase()}`);
        found.addEventListener("click", action);
        return found;
      };
      buttons.prepend(
        button("Edit", () => actions.edit(this.view.levels(this.calls), this.name)),
        button("Save", () => this.view.save(this.calls, `seed ${seed}.png`)),
      );
    }
    const title = make("h2", {}, this.name, make("span", { className: "seed", textContent: `seed ${seed}` }));
    const head = make("div", { className: "row spread" }, title, this.count);
    this.element = make("li", { className: shape ? "card image" : "card" }, head, this.view.element, this.words, buttons);
  }

  /** A text as it is shown: at its end the service's own words. */
  get text() {
    const complete = this.answer && this.calls >= this.replay.calls;
    return complete ? this.answer.text : this.view.words(this.calls);
  }

  /** Show it after `calls` of `total` network calls. ended: no more will come; byAge: see ImageView. */
  draw(calls, total, ended, byAge) {
    this.calls = calls;
    this.view.draw(calls, total, this.answer !== null, byAge);
    const { revealed, remasked } = this.replay.after(calls);
    const again = remasked ? `, ${remasked} masked again` : "";
    this.count.textContent = `${revealed} of ${this.replay.unknown}${again}`;
    if (this.served.shape) {
      const what = this.served.shape[2] > 1 ? "levels" : "pixels";
      this.view.element.setAttribute("aria-label", `${this.name}: ${this.count.textContent} ${what} revealed`);
    } else if (ended) {
      this.words.textContent = this.text;
    }
  }
}
