/** The part of the form that draws on an image: the editor, its tools, and pictures from files. */

import { Refused } from "./api.js";
import { $, say } from "./elements.js";
import { MaskEditor, readPicture, toLevels } from "./mask_editor.js";

const TOOLS = ["hide", "show", "paint"];

export class DrawingBoard {
  #editor = null;
  #model;

  /** forgive(): called before something is done; complain(error): if it can't be done. */
  constructor(forgive, complain) {
    const tools = document.querySelectorAll("[name=tool]");
    const choose = (tool) => {
      tools[TOOLS.indexOf(tool)].checked = true;
      this.#editor.tool = tool;
    };
    for (const tool of tools) tool.addEventListener("change", () => choose(tool.value));
    $("brush").addEventListener("input", () => this.#brush());
    $("paint").addEventListener("input", () => {
      const colour = [1, 3, 5].map((at) => Number.parseInt($("paint").value.slice(at, at + 2), 16));
      this.#editor.shade = toLevels(colour, this.#model.shape[2], this.#model.vocab_size);
      choose("paint");
    });
    $("hide-all").addEventListener("click", () => this.#editor.all(true));
    $("show-all").addEventListener("click", () => this.#editor.all(false));
    $("invert").addEventListener("click", () => this.#editor.invert());
    $("rect-apply").addEventListener("click", () => {
      forgive();
      try {
        this.#editor.rectangle(...["x", "y", "w", "h"].map((side) => Number($(`rect-${side}`).value.trim() || NaN)));
      } catch (error) {
        complain(error instanceof RangeError ? new Refused(0, error.message) : error);
      }
    });
    $("upload").addEventListener("change", async () => {
      forgive();
      const [file] = $("upload").files;
      if (!file) return;
      try {
        const levels = await readPicture(file, this.#model.shape, this.#model.vocab_size);
        this.#editor.open(levels, `${file.name} is on the drawing board`);
      } catch {
        complain(new Refused(0, `${file.name} is no picture that this browser can read.`));
      }
      $("upload").value = "";
    });
  }

  /** Begin with an empty image of a model's shape; a model of text needs none. */
  use(model) {
    this.#model = model;
    this.#editor?.close();
    this.#editor = null;
    if (!model.shape) return;
    this.#editor = new MaskEditor($("editor"), model.shape, model.vocab_size, (words) => this.#told(words));
    this.#editor.tool = document.querySelector("[name=tool]:checked").value;
    this.#brush();
    this.#told("");
  }

  /** Go on with an image: levels [H * W * C], null where hidden. */
  edit(levels, words) {
    this.#editor.open(levels, words);
    $("editor").scrollIntoView({ block: "nearest" });
    $("editor").focus();
  }

  /** The levels to ask for, null where hidden; undefined if all is. Throws `Refused` if nothing is. */
  get pixels() {
    if (this.#editor.holes) return this.#editor.holes < this.#editor.hidden.length ? this.#editor.wanted : undefined;
    $("editor").focus();
    throw new Refused(0, "Nothing is hidden: hide a part of the image, it will be filled.");
  }

  #brush() {
    $("brush-size").textContent = `${$("brush").value} px`;
    this.#editor.brush = Number($("brush").value);
    this.#editor.draw();
  }

  #told(words) {
    const [height, width] = this.#model.shape;
    $("editor-count").textContent = `${this.#editor.holes.toLocaleString("en")} of ${(width * height).toLocaleString("en")} hidden`;
    if (words) say(words);
  }
}
