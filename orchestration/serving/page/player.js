/** The slider through the network calls, and its buttons. */

const WHOLE_MS = 6000; // what playing all calls takes, as far as one call then is neither too fast nor too slow to see
const CALL_MS = [40, 500];

export class Player {
  #timer = null;

  /** parts: the elements by name; moved(calls): called whenever another moment is to be shown. */
  constructor({ box, slider, play, back, forward }, moved) {
    Object.assign(this, { box, slider, play, moved });
    slider.addEventListener("input", () => {
      this.#stop();
      moved(this.calls);
    });
    back.addEventListener("click", () => this.#step(-1));
    forward.addEventListener("click", () => this.#step(1));
    play.addEventListener("click", () => (this.#timer === null ? this.#start() : this.#stop()));
  }

  /** Network calls that are shown. */
  get calls() {
    return Number(this.slider.value);
  }

  get total() {
    return Number(this.slider.max);
  }

  /** Begin anew: nothing has been called yet. */
  reset() {
    this.#stop();
    this.slider.max = this.slider.value = 0;
    this.box.hidden = false;
  }

  /** There are now `total` calls; who looks at the last one goes on to the new last one. */
  extend(total) {
    const follows = this.calls >= this.total && this.#timer === null;
    this.slider.max = total;
    if (follows) this.slider.value = total;
    this.slider.disabled = total === 0;
  }

  #go(calls) {
    this.slider.value = calls;
    this.moved(this.calls);
  }

  #step(by) {
    this.#stop();
    this.#go(this.calls + by);
  }

  #start() {
    if (this.calls >= this.total) this.#go(0);
    this.box.classList.add("playing");
    this.play.setAttribute("aria-label", "Pause");
    const pace = Math.min(CALL_MS[1], Math.max(CALL_MS[0], WHOLE_MS / Math.max(1, this.total)));
    this.#timer = setInterval(() => {
      if (this.calls >= this.total) this.#stop();
      else this.#go(this.calls + 1);
    }, pace);
  }

  #stop() {
    clearInterval(this.#timer);
    this.#timer = null;
    this.box.classList.remove("playing");
    this.play.setAttribute("aria-label", "Play");
  }
}
